"""What `experiments.study show` prints and draws: the measures of a study's runs, and the map.

The map is the middle bin against 20-NN accuracy on the probe, along training, a line per run: so sparsity is
compared at equal quality. Runs that are still in training are on it, and it is listed what is not measured.
"""
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import dirl
from common.errors import InputError
from common.figures import BESIDE, draw_distribution, network_colors, save_figure
from common.files import file_stamp, print_table, read_json, read_npz, write_csv
from common.log import MIDDLE, PROBED, read_log, symbol_of
from common.metrics import DRAWS
from common.report import note_on_middle
from experiments.measures import ABOUT, draws_of, statistics

ON_THE_PROBE = {MIDDLE: 1, "20-NN accuracy": 3}  # places in PROBED


# ---------------------------------------------------------------- the runs of a study

@dataclass
class Measured:
    """An arm pre-trained with a seed and measured."""

    seed: int
    folder: Path
    values: dict  # measures.statistics


def find_runs(folder, arms):
    """Returns {(arm, seed): folder} of a study's runs, measured or not, in the order of arms."""
    found = {}
    for path in Path(folder).glob("*_seed*"):
        arm, seed = path.name.rsplit("_seed", 1)
        if arm not in arms or not seed.isdigit():
            raise InputError(f"{path}: is no arm with its seed; move it out of the study's folder")
        found[arm, int(seed)] = path
    return dict(sorted(found.items(), key=lambda run: (arms.index(run[0][0]), run[0][1])))


def read_claim(found, pair):
    """Returns {arm: [Measured, ...]} of the runs that are measured."""
    runs = {}
    draws = {}  # of the same test groups, drawn once
    for (arm, seed), folder in found.items():
        path = folder / "claim.npz"
        if not path.is_file():
            continue
        file = read_npz(path)
        if not file or not {*ABOUT, "attention"} <= file.keys():
            raise InputError(f"{path}: cannot be read as a measured run; delete it and run again")
        if not str(file["stamp"]).startswith(file_stamp(folder / "encoder.pt")):
            print(f"skipped: {path}: belongs to an earlier encoder; run the study to measure it again")
            continue
        if pair and (pair[0] == pair[1] or not set(pair) <= set(file["classes"])):
            raise InputError(f"--pair {' '.join(pair)}: name two of the classes {', '.join(file['classes'])}")
        groups = tuple(file["groups"])
        if groups not in draws:
            draws[groups] = draws_of(file["groups"])
        runs.setdefault(arm, []).append(Measured(seed, folder, statistics(file, draws[groups], pair)))
    return runs


def unmeasured(found, runs):
    """Returns a text for each arm and seed that is not measured, of those of which a run exists."""
    measured = {(arm, run.seed) for arm in runs for run in runs[arm]}
    arms = dict.fromkeys(arm for arm, _ in found)
    seeds = sorted({seed for _, seed in found})
    out = []
    for arm, seed in product(arms, seeds):
        if (arm, seed) not in measured:
            steps = len(read_log(found[arm, seed] / "log.csv")) if (arm, seed) in found else 0
            out.append(f"{arm}, seed {seed} ({steps} steps trained)")
    return out


def probe_curve(folder):
    """Returns {steps done: (low, middle, high, k-NN accuracy)} that --probe wrote to log.csv."""
    curve = {}
    for row in read_log(folder / "log.csv"):
        if row[PROBED[-1]]:
            curve[int(row["step"]) + 1] = tuple(float(row[name]) for name in PROBED)
    return curve


def loss_shares(folder):
    """Returns {symbol: last epoch's mean loss / ln(its outputs), (1,)}: 1 if both networks are uniform.

    Losses without a centre, such as BYOL's and SimCLR's, have no such value: log.csv has no entropy of them.
    """
    log = read_log(folder / "log.csv")
    config = read_json(folder / "config.json")
    last = [row for row in log if row["epoch"] == log[-1]["epoch"]]
    out = {}
    for head in ("f", *dirl.REGIONS, *dirl.DISENTANGLED):
        if last and last[0].get(f"entropy_{head}"):
            outputs = config["disentangled_dim" if head in dirl.DISENTANGLED else "out_dim"]
            losses = [float(row[f"loss_{head}"]) for row in last]
            out[symbol_of(head)] = np.array([np.mean(losses) / np.log(outputs)])
    return out


# ---------------------------------------------------------------- minus the baseline

def minus_baseline(arm, baseline):
    """Returns {statistic: difference to the baseline's of the same seed} of each run; {} without one."""
    of_seed = {run.seed: run.values for run in baseline}
    out = []
    for run in arm:
        base = of_seed.get(run.seed, {})
        out.append({name: run.values[name] - base[name] for name in run.values if name in base})
    return out


def curves_minus_baseline(curves, baseline_of):
    """Returns the curves of the arms that have a baseline, minus its of the same seed and number of steps."""
    out = {}
    for (arm, seed), curve in curves.items():
        base = curves.get((baseline_of.get(arm, "baseline"), seed), {})
        if has_baseline(arm, baseline_of):
            out[arm, seed] = {step: np.subtract(curve[step], base[step]) for step in curve if step in base}
    return out


def has_baseline(arm, baseline_of):
    return arm not in ("random", "baseline", *baseline_of.values())


# ---------------------------------------------------------------- tables

def interval(values):
    """Returns the 95 % interval over the draws in values (1 + DRAWS,)."""
    return np.nanpercentile(values[1:], (2.5, 97.5))


def cell(values, seeds):
    """Returns the text of values (1 + DRAWS,) of each seed: mean, sd over several seeds, 95 % interval.

    If some seeds have no value, the text tells how many have. Values without draws have no interval.
    """
    if not values:
        return ""
    mean = np.mean(values, 0)
    text = f"{mean[0]:.3f}"
    if len(values) > 1:
        text += f" ± {np.std([value[0] for value in values], ddof=1):.3f}"
    if len(mean) > 1:
        text += " ({:.3f} to {:.3f})".format(*interval(mean))
    return text + (f" [{len(values)} of {seeds} seeds]" if len(values) < seeds else "")


def print_columns(title, columns):
    """Prints a row per name and a cell per column, {heading: [{name: values} of each seed, ...]}."""
    names = dict.fromkeys(name for seeds in columns.values() for values in seeds for name in values)
    rows = [(title, *columns)]
    for name in names:
        row = [name]
        for seeds in columns.values():
            row.append(cell([values[name] for values in seeds if name in values], len(seeds)))
        rows.append(row)
    if names:
        print_table(rows)
        print()


def by_steps(curves, place):
    """Returns {"N steps": [{arm: (value,)} of each seed]}, the columns of a table of arms by probes."""
    seeds = sorted({seed for _, seed in curves})
    columns = {}
    for step in sorted({step for curve in curves.values() for step in curve}):
        of_seed = {seed: {} for seed in seeds}
        for (arm, seed), curve in curves.items():
            if step in curve:
                of_seed[seed][arm] = (curve[step][place],)
        columns[f"{step} steps"] = list(of_seed.values())
    return columns


def show_claim(folder, arms, baseline_of, pair=None):
    """Prints and draws what the runs in a study's folder hold; returns 0. InputError if none is measured.

    baseline_of: {arm: its baseline}; that of others is "baseline". pair: two classes to tell apart.
    """
    found = find_runs(folder, arms)
    runs = read_claim(found, pair)
    if not runs:
        raise InputError(f"{folder}: has no measured run; first: python -m experiments.study claim --data "
                         f"FOLDER --out {folder}")
    values = {}
    differences = {}
    losses = {}
    for arm, measured in runs.items():
        seeds = " ".join(str(run.seed) for run in measured)
        title = f"{arm}, seed{'s' * (len(measured) > 1)} {seeds}"
        values[title] = [run.values for run in measured]
        losses[title] = [loss_shares(run.folder) for run in measured]
        if has_baseline(arm, baseline_of):
            heading = f"{arm} minus {baseline_of[arm]}" if arm in baseline_of else arm
            baseline = runs.get(baseline_of.get(arm, "baseline"), [])
            differences[heading] = minus_baseline(measured, baseline)
    print_columns("measure", values)
    print_columns("arm minus baseline, same seeds", differences)
    print_columns("last epoch's loss / ln K", losses)
    print(f"in brackets: 95 % of {DRAWS} draws of test groups (DSMIL: of its synthetic slides); "
          "±: sd over seeds")
    if note := note_on_middle([run.values[MIDDLE][0] for measured in runs.values() for run in measured]):
        print(note)
    print()

    curves = {run: probe_curve(path) for run, path in found.items()}
    minus = curves_minus_baseline(curves, baseline_of)
    for name, place in ON_THE_PROBE.items():
        print_columns(f"probe: {name}", by_steps(curves, place))
        print_columns("minus baseline, same seeds", by_steps(minus, place))
    if missing := unmeasured(found, runs):
        print(f"not measured yet: {'; '.join(missing)}")

    write_csv(Path(folder) / "claim.csv", rows_of(runs, curves))
    save_figure(draw_claim(runs, curves), Path(folder) / "claim.png")
    print(f"Wrote {folder}/claim.csv, claim.png")
    return 0


def rows_of(runs, curves):
    """Returns the rows of claim.csv: the statistics of each run with their intervals, then the probes."""
    rows = [("arm", "seed", "measure", "value", "low", "high")]
    for arm, measured in runs.items():
        for run in measured:
            for name, values in run.values.items():
                numbers = (values[0], *interval(values))
                rows.append((arm, run.seed, name, *(f"{number:.4f}" for number in numbers)))
    for (arm, seed), curve in curves.items():
        for step, (name, place) in product(curve, ON_THE_PROBE.items()):
            rows.append((arm, seed, f"probe at {step} steps: {name}", curve[step][place], "", ""))
    return rows


# ---------------------------------------------------------------- the figure

def draw_claim(runs, curves):
    """Draws Fig. 4 of each measured arm, all seeds together, next to the map."""
    figure = Figure(figsize=(13.5, 4), layout="constrained")
    fig_4, on_map = figure.subplots(1, 2)
    colors = network_colors(dict.fromkeys(arm for arm, _ in curves))
    pooled = {}
    for arm, measured in runs.items():
        of_seed = [read_npz(run.folder / "claim.npz", "attention")["attention"] for run in measured]
        pooled[arm] = np.concatenate(of_seed)
    draw_distribution(fig_4, pooled, colors)
    draw_map(on_map, runs, curves, colors)
    return figure


def draw_map(axis, runs, curves, colors):
    """Draws each measured run's probes as a line that ends in a large dot; the random start as measured."""
    handles = {}
    measured = {(arm, run.seed) for arm, of_arm in runs.items() for run in of_arm}
    for run in runs.get("random", []):
        place = (run.values["accuracy, 20-NN"][0], 100 * run.values[MIDDLE][0])
        handles["random (all test images)"], = axis.plot(*place, "x", color=colors["random"])
    for (arm, seed), curve in curves.items():
        if curve and (arm, seed) in measured:
            middle = [100 * probe[1] for probe in curve.values()]
            accuracy = [probe[3] for probe in curve.values()]
            axis.plot(accuracy, middle, "o-", ms=3, lw=1, color=colors[arm])
            handles[arm], = axis.plot(accuracy[-1], middle[-1], "o", ms=7, color=colors[arm])
    axis.set(xlabel="20-NN accuracy on the probe", ylabel=f"{MIDDLE}, %")
    if handles:
        axis.legend(handles.values(), handles, fontsize=8, **BESIDE)
