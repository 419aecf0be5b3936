"""Figures that README and docs/results.md both give are the same."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ((ROOT / name).read_text() for name in ("README.md", "docs/results.md"))


def results_row(measure):
    """The numbers of the table row in docs/results.md that begins with the measure; None for no number."""
    line = re.search(rf"^\| {re.escape(measure)}(?: \(.*?\))? \|(.*)\|$", RESULTS, re.MULTILINE)
    numbers = [re.match(r"\s*(-?[\d.]+)", cell) for cell in line[1].split("|")]
    return [number and float(number[1]) for number in numbers]


def readme_table():
    """{measure: [trained, random start or None]} of what eval.py prints, as README shows it."""
    block = re.search(r"```\n(measure .*?)```", README, re.DOTALL)[1].splitlines()
    starts = [block[0].index(name) for name in ("trained", "random start", "over")]
    out = {}
    for line in block[1:]:
        columns = line[starts[0]: starts[1]], line[starts[1]: starts[2]]
        numbers = [float(text.split()[0]) if text.strip() else None for text in columns]
        out[line[: starts[0]].strip()] = numbers
    return out


@pytest.mark.parametrize("measure", [
    "kind of a tile, 20-NN", "slide AUC, DSMIL", "telling tiles by DSMIL's attention, AUC",
    "tokens with attention 0.5 to 2", "loss of f_c, last epoch", "loss of f_b, last epoch"])
def test_the_demo_in_readme_is_seed_0_in_results(measure):
    shown = readme_table()[measure]
    for value, given in zip(shown, results_row(measure)[:2], strict=True):
        assert (value is None) == (given is None)
        assert value is None or abs(value - given) < (0.00051 if "loss" not in measure else 0.0051)


def readme_numbers(pattern):
    """The numbers in what the pattern's group finds in README, however its lines are broken."""
    text = re.search(pattern, " ".join(README.split()))[1]
    return [float(number) for number in re.findall(r"[\d.]*\d", text)]


@pytest.mark.parametrize("pattern, measure, columns, unit", [
    (r"kind of a synthetic tile in ([\d, and]+) %", "kind of a tile, 20-NN", (0, 2, 4), 0.01),
    (r"random start in ([\d, and]+) %", "kind of a tile, 20-NN", (1, 3, 5), 0.01),
    (r"positive slides with AUC ([\d., and]+) \(", "slide AUC, DSMIL", (0, 2, 4), 1),
    (r"telling tiles with ([\d., and]+)\. On", "telling tiles by DSMIL's attention, AUC", (0, 2, 4), 1),
    (r"goes sparse \((\d+) %", "tokens, attention 0.5 to 2", (1,), 0.01),
    (r"hardly does \((\d+) %", "tokens, attention 0.5 to 2", (3,), 0.01)])
def test_what_readme_says_is_in_results(pattern, measure, columns, unit):
    """A number is given to two digits: it may differ by half of the last one."""
    row = results_row(measure)
    for value, column in zip(readme_numbers(pattern), columns, strict=True):
        assert abs(value * unit - row[column]) <= 0.005 + 1e-9, (value, row)
