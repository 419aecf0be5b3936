"""What README and docs/ say: figures that both give are the same, and commands and files exist."""
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ((ROOT / name).read_text() for name in ("README.md", "docs/results.md"))


def cells_of(line):
    """The texts of a Markdown table's row."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def first_table(text, heading):
    """The rows of the first table below a heading, {column: text} each; of equal columns the first counts."""
    below = text.split(f"\n{heading}\n", 1)[1]
    header, _, *rows = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)[0].splitlines()
    names = cells_of(header)
    return [dict(zip(reversed(names), reversed(cells_of(row)))) for row in rows]


@pytest.mark.parametrize("heading, columns", [
    ("## The demo", {"random start": "random start", "baseline (DINO)": "baseline (DINO)", "DiRL": "DiRL"}),
    ("**Twice the steps** (520), one core per run, all else as above:",
     {"DINO, twice as long": "baseline (DINO)", "DiRL, twice as long": "DiRL"})])
def test_the_demo_in_readme_is_the_mean_over_the_seeds_in_results(heading, columns):
    """columns: {column of README: network in results.md}."""
    of_seeds = {}  # {(measure, network): values}
    for row in first_table(RESULTS, heading):
        values = [float(value) for name, value in row.items() if name.startswith("seed")]
        of_seeds[row["measure"], row["network"]] = values
    shown = first_table(README, "## Start")
    for row in shown:
        for column, network in columns.items():
            values = of_seeds[row["measure"], network]
            assert row[column] == f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    assert len(shown) >= 4


@pytest.mark.parametrize("measure, heading", [
    ("tokens", "### Tokens with attention 0.5 to 2"), ("20-NN", "### 20-NN accuracy")])
def test_the_claim_in_readme_is_that_in_results(measure, heading):
    start, earlier, *_ = first_table(README, "## What was measured")
    means = {row["arm"]: row["mean"] for row in first_table(RESULTS, heading)}
    for arm, name in (("baseline", "DINO"), ("DiRL", "DiRL")):
        assert start[f"{name}, {measure}"] == means["random start"]
        assert earlier[f"{name}, {measure}"] == means[arm]


def test_todays_runs_in_readme_are_in_results():
    _, _, *rows, _ = first_table(README, "## What was measured")
    measured = first_table(RESULTS, "### Where attention goes, and the weaker colour")
    for row, colour in zip(rows, ("DINO's", "weaker"), strict=True):
        for name in ("DINO", "DiRL"):
            runs = [run for run in measured if run["colour"] == colour
                    and re.fullmatch(rf"{name}(, seed \d)?", run["network"])]
            assert len(runs) == int(row["seeds"])
            for shown, column in (("tokens", "tokens, 0.5 to 2"), ("20-NN", "20-NN accuracy")):
                mean = sum(float(run[column]) for run in runs) / len(runs)
                assert row[f"{name}, {shown}"] == f"{mean:.3f}"


def test_the_counterexample_in_readme_is_in_results():
    *_, shown = first_table(README, "## What was measured")
    depth = first_table(RESULTS, "**Depth, heads and colour**, seed 0 unless stated:")
    for arm, name in (("baseline", "DINO"), ("DiRL", "DiRL")):
        row = next(row for row in depth if (row["blocks"], row["colour augmentation"], row["arm"])
                   == ("12", "weaker", arm))
        assert (shown[f"{name}, tokens"], shown[f"{name}, 20-NN"]) == (row["tokens, 0.5 to 2"],
                                                                       row["20-NN accuracy"])


def test_modules_files_and_links_in_the_docs_exist():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = document.read_text()
        modules = [name.replace(".", "/") + ".py" for name in re.findall(r"python -m ([\w.]*\w)", text)]
        scripts = re.findall(r"(?<![\w/.])(?:\w+/)*\w+\.py\b", text)
        links = re.findall(r"\]\(([^)#:]+)[^):]*\)", text)
        missing = [name for name in modules + scripts if not (ROOT / name).is_file()]
        missing += [link for link in links if not (document.parent / link).is_file()]
        assert not missing, (document.name, missing)


def test_the_python_block_in_readme_runs():
    """As README has it, but with 2 crops instead of 8 and few outputs."""
    block = re.search(r"## In Python\n+```python\n(.*?)```", README, re.DOTALL)[1]
    for old, new in (("(2, 8,", "(2, 2,"), ("(8, 8,", "(8, 2,"), ("65536", "64"), ("4096", "16")):
        assert old in block
        block = block.replace(old, new)
    names = {}
    exec(block, names)
    assert names["loss"].isfinite() and list(names["each"]) == ["c", "b", "cc", "bb", "cb", "bc"]
    assert names["tokens"].shape == (2, 196, 192)
