"""What `experiments.study show` prints and draws: the measures of a study's runs, and the map.

The map is the middle bin against 20-NN accuracy on the probe, along training, a line per run: so sparsity is
compared at equal quality. It has the measured runs only; the probe's tables also have runs that are still in
training, and what is not measured is listed.
"""
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
    """Returns {(arm, seed): measures.statistics} of the runs that are measured."""
    runs = {}
    draws = {}  # of the same test groups, drawn once
    for run, folder in found.items():
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
        runs[run] = statistics(file, draws[groups], pair)
    return runs


def unmeasured(found, runs):
    """Returns a text for each pair of an arm and a seed, of those that have runs, that is not measured."""
    arms = dict.fromkeys(arm for arm, _ in found)
    seeds = sorted({seed for _, seed in found})
    out = []
    for arm, seed in product(arms, seeds):
        if (arm, seed) not in runs:
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

def minus_baseline(runs, baseline_of):
    """Returns {(arm, seed): {name: value}} of the arms that have a baseline, minus its of the same seed."""
    out = {}
    for (arm, seed), values in runs.items():
        base = runs.get((baseline_of.get(arm, "baseline"), seed), {})
        title = f"{arm} minus {baseline_of[arm]}" if arm in baseline_of else arm
        if arm not in ("random", "baseline", *baseline_of.values()):
            names = [name for name in values if name in base]
            out[title, seed] = {name: np.subtract(values[name], base[name]) for name in names}
    return out


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


def by_arm(runs):
    """Returns {"arm, seeds 0 1": [values of each seed]}, the columns of a table, of {(arm, seed): values}."""
    arms = {}
    for (arm, seed), values in runs.items():
        arms.setdefault(arm, {})[seed] = values
    columns = {}
    for arm, of_seed in arms.items():
        title = f"{arm}, seed{'s' * (len(of_seed) > 1)} {' '.join(map(str, of_seed))}"
        columns[title] = list(of_seed.values())
    return columns


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
    print_columns("measure", by_arm(runs))
    print_columns("arm minus baseline, same seeds", by_arm(minus_baseline(runs, baseline_of)))
    print_columns("last epoch's loss / ln K", by_arm({run: loss_shares(found[run]) for run in runs}))
    print(f"in parentheses: 95 % of {DRAWS} draws of test groups (DSMIL: of its synthetic slides); "
          "±: sd over seeds")
    if note := note_on_middle([values[MIDDLE][0] for values in runs.values()]):
        print(note)
    print()

    curves = {run: probe_curve(path) for run, path in found.items()}
    minus = minus_baseline(curves, baseline_of)
    for name, place in ON_THE_PROBE.items():
        print_columns(f"probe: {name}", by_steps(curves, place))
        print_columns("minus baseline, same seeds", by_steps(minus, place))
    if missing := unmeasured(found, runs):
        print(f"not measured yet: {'; '.join(missing)}")

    write_csv(Path(folder) / "claim.csv", rows_of(runs, curves))
    save_figure(draw_claim(found, runs, curves), Path(folder) / "claim.png")
    print(f"Wrote {folder}/claim.csv, claim.png")
    return 0


def rows_of(runs, curves):
    """Returns the rows of claim.csv: the statistics of each run with their intervals, then the probes."""
    rows = [("arm", "seed", "measure", "value", "low", "high")]
    for run, measured in runs.items():
        for name, values in measured.items():
            numbers = (values[0], *interval(values))
            rows.append((*run, name, *(f"{number:.4f}" for number in numbers)))
    for run, curve in curves.items():
        for step, (name, place) in product(curve, ON_THE_PROBE.items()):
            rows.append((*run, f"probe at {step} steps: {name}", curve[step][place], "", ""))
    return rows


# ---------------------------------------------------------------- the figure

def draw_claim(found, runs, curves):
    """Draws Fig. 4 of each measured arm, all seeds together, next to the map."""
    figure = Figure(figsize=(13.5, 4), layout="constrained")
    fig_4, on_map = figure.subplots(1, 2)
    colors = network_colors(dict.fromkeys(arm for arm, _ in curves))
    pooled = {}
    for arm, seed in runs:
        pooled.setdefault(arm, []).extend(read_npz(found[arm, seed] / "claim.npz")["attention"])
    draw_distribution(fig_4, pooled, colors)
    draw_map(on_map, runs, curves, colors)
    return figure


def draw_map(axis, runs, curves, colors):
    """Draws each measured run's probes as a line that ends in a large dot; the random start as measured."""
    handles = {}
    for (arm, seed), values in runs.items():
        curve = curves[arm, seed]
        if arm == "random":
            place = (values["accuracy, 20-NN"][0], 100 * values[MIDDLE][0])
            handles["random (all test images)"], = axis.plot(*place, "x", color=colors[arm])
        elif curve:
            middle = [100 * probe[1] for probe in curve.values()]
            accuracy = [probe[3] for probe in curve.values()]
            axis.plot(accuracy, middle, "o-", ms=3, lw=1, color=colors[arm])
            handles[arm], = axis.plot(accuracy[-1], middle[-1], "o", ms=7, color=colors[arm])
    axis.set(xlabel="20-NN accuracy on the probe", ylabel=f"{MIDDLE}, %")
    if handles:
        axis.legend(handles.values(), handles, fontsize=8, **BESIDE)
