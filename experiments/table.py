"""The paper's tables from runs (Table 1, 2, 5): a row per network, accuracy and AUC per data set.

    python -m experiments.table runs [--measures accuracy auc macro_f1 middle]

Reads slides.csv, patches.csv and results.csv of every run below a folder, and of each other folder where
eval.py writes results: on_<data>/ of another data set or um/px, encoder_<epoch>/, other weights. Repeats
are DSMIL's trainings, or the folds, of all runs that differ in nothing but the seed. A row names the settings
in which the rows of a data set differ, unless they are the default; bold marks the best of a column of
accuracies, AUC or F1.

Below: the curves of experiments.study fraction and prior, from the files of their runs.
"""
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common.errors import InputError, run_script
from common.figures import NETWORK_COLORS
from common.files import atomic_write, read_json, read_rows, write_csv
from common.flags import RUNNING
from common.log import MIDDLE, is_finished, read_log
from common.report import note_on_middle
from experiments import compare
from experiments.figures import shared

METHODS = {"baseline": "Baseline", "cellback": "Cellback", "dirl": "DiRL"}  # the paper's order
SSL = {"byol": "BYOL", "simclr": "SimCLR", "esvit": "EsViT", "selfpatch": "SelfPatch", "imix": "i-mix",
       "lsup": "L_sup"}  # experiments.compare's, instead of DINO; the others are named as they are there
SIZES = {"vit_t4": "T4", "vit_t": "T", "vit_s": "S", "vit_h": "H"}
MEASURES = {"accuracy": "accuracy", "auc": "AUC", "macro_f1": "macro F1", "middle": "tokens 0.5 to 2"}
NO_SETTING = {*RUNNING, "seed", "data", "crops", "places", "images", "pixels", "steps", "weights",
              "measured_at", "mpp", "method", "arch", "ssl", "pretrained_on"}  # the last six: named otherwise


def arguments(argv):
    parser, add = shared.parser_of("table", "The paper's table from the runs below a folder.")
    add("folder", nargs="?", default="runs", help="folder of the runs, searched in depth")
    add("--measures", nargs="+", default=["accuracy", "auc"], choices=list(MEASURES),
        help="macro_f1 is BRIGHT's (Table 5); middle is the share of tokens with attention 0.5 to 2")
    add("--out", help="default: table.md in the folder; the numbers go next to it, as .csv")
    return parser.parse_args(argv)


def read_values(folder):
    """Returns {(data set, measure): [value of each repeat]} of a run that eval.py measured; {} otherwise."""
    out = defaultdict(list)
    data = read_json(folder / "config.json").get("data", "")
    try:
        for row in read_rows(folder / "slides.csv"):
            for name in list(row)[1:]:  # the first is the seed
                out[data, name].append(float(row[name]))
        for row in read_rows(folder / "patches.csv"):
            if row["encoder"] == folder.resolve().name:
                kind = row["data"] + (", linear" if row["training"] == "linear" else "")
                for name in ("accuracy", "auc"):
                    out[kind, name].append(float(row[name]))
        for row in read_rows(folder / "results.csv"):
            measure, value = list(row.values())[:2]
            if measure == MIDDLE:
                out[data, "middle"].append(float(value))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: its tables cannot be read ({error}); run eval.py again") from None
    return out


def read_runs(folder):
    """Returns [(folder, config, values), ...] of the measured runs below a folder; InputError if none."""
    runs = [(path.parent, read_json(path), read_values(path.parent))
            for path in sorted(Path(folder).rglob("config.json"))]
    runs = [run for run in runs if {"data", "arch", "method"} <= run[1].keys() and run[2]]
    if not runs:
        raise InputError(f"{folder}: has no run that eval.py measured; first: python train.py, "
                         "python eval.py")
    return runs


def um_per_px(config):
    """Returns the um/px at which slides were measured, None if unknown."""
    return config.get("measured_at") or config.get("mpp")


def labels_of(runs):
    """Returns [label, ...]: "DiRL-T, BYOL", and the settings in which it differs from runs of its data set.

    Only what is not the flags' default is named, so that runs with the paper's settings have no addition.
    """
    labels = []
    runs_on = defaultdict(list)  # {data set: configs}
    for _, config, _ in runs:
        runs_on[config["data"]].append(config)
    configs = [config for _, config, _ in runs if "weights" not in config]  # another program's: no settings
    for folder, config, _ in runs:
        others = [other for other in configs if other["data"] == config["data"]]
        ssl = config.get("ssl", "dino")
        flags = compare.arguments(["--data", config["data"], "--ssl", ssl])
        default = json.loads(json.dumps(vars(flags)))  # as config.json keeps them
        additions = [] if ssl == "dino" else [SSL.get(ssl, ssl)]
        for name, value in config.items():
            usual = default.get(name)
            differs = any(other.get(name, usual) != value for other in others)
            if name not in NO_SETTING and differs and value != usual:
                additions.append(f"{name.replace('_', ' ')} {value}")
        at = um_per_px(config)
        if at and any(um_per_px(other) not in (None, at) for other in runs_on[config["data"]]):
            additions.append(f"at {at:g} um/px")
        log = read_log(folder / "log.csv")
        if log and not is_finished(folder):
            additions.append(f"stopped at step {int(log[-1]['step']) + 1}")
        method = METHODS.get(config["method"], config["method"])
        size = SIZES.get(config["arch"], config["arch"])
        labels.append(", ".join([f"{method}-{size}", *additions]))
    return told_apart(labels, runs)


def told_apart(labels, runs):
    """Adds the data set of pre-training to the labels of encoders that differ in it alone.

    Only if they were measured on the same data set, such as those of lung and of brca on MHIST: they would
    be taken for repeats.
    """
    sources = []  # (label, data set of pre-training) of each run
    sources_of = defaultdict(set)  # {(label, data set of the results): sources}
    for label, (_, config, values) in zip(labels, runs):
        source = label, config.get("pretrained_on", config["data"])
        sources.append(source)
        for data, _ in values:
            sources_of[label, data].add(source)
    several = set().union(*(found for found in sources_of.values() if len(found) > 1))
    return [f"{source[0]}, pretrained on {source[1]}" if source in several else source[0]
            for source in sources]


def order_of(label):
    """Returns a sorting key, the paper's order: by size, then by method, then by what was added."""
    network, *additions = label.split(", ")
    method, _, size = network.rpartition("-")
    sizes = list(SIZES.values())
    methods = list(METHODS.values())
    return (sizes.index(size) if size in sizes else 9, methods.index(method) if method in methods else 9,
            method, additions)


def collect(runs, measures):
    """Returns {label: {(data set, measure): values of all repeats}} in the paper's order, and the columns."""
    table = defaultdict(lambda: defaultdict(list))
    for label, (_, _, values) in zip(labels_of(runs), runs):
        for (data, measure), repeats in values.items():
            if measure in measures:
                table[label][data, measure] += repeats
    data_sets = dict.fromkeys(data for _, _, values in runs for data, _ in values)
    found = {column for row in table.values() for column in row}
    columns = [(data, measure) for data in data_sets for measure in measures if (data, measure) in found]
    return {label: table[label] for label in sorted(table, key=order_of)}, columns


def sd_of(values, digits=4):
    """Returns the standard deviation of repeats as text; "" of a single one."""
    return f"{np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""


def cells_of(table, columns):
    """Returns rows of texts: mean and sd of each cell, the best printed mean of a column in bold.

    The middle bin has no best: a network that has learned nothing has 1.
    """
    rows = [[label] for label in table]
    for column in columns:
        means = [f"{np.mean(row[column]):.3f}" if column in row else "" for row in table.values()]
        best = "" if column[1] == "middle" else max(means)
        for cells, row, mean in zip(rows, table.values(), means):
            sd = sd_of(row.get(column, ()), 3)
            text = f"**{mean}**" if mean and mean == best else mean
            cells.append(f"{text} ± {sd}" if sd else text)
    return rows


def markdown(table, columns, note):
    """Returns the table in Markdown, the note below it if there is one."""
    head = ["", *(f"{data} {MEASURES[measure]}" for data, measure in columns)]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells_of(table, columns))]
    if note:
        lines += ["", note]
    return "\n".join(lines) + "\n"


def run(args):
    runs = read_runs(args.folder)
    table, columns = collect(runs, args.measures)
    if not columns:
        raise InputError(f"{args.folder}: no run has {', '.join(args.measures)}; python eval.py measures it")
    middle = [np.mean(row[column]) for row in table.values() for column in columns
              if column[1] == "middle" and column in row]
    text = markdown(table, columns, note_on_middle(middle))
    out = Path(args.out or Path(args.folder) / "table.md")
    with atomic_write(out) as temp:
        temp.write_text(text, encoding="utf-8")
    write_csv(out.with_suffix(".csv"), [("network", "data", "measure", "mean", "sd", "repeats")] + [
        (label, *column, f"{np.mean(row[column]):.4f}", sd_of(row[column]), len(row[column]))
        for label, row in table.items() for column in columns if column in row])
    print(text)
    print(f"Mean and sd over repeats of {len(runs)} runs. Wrote {out} and {out.stem}.csv next to it")
    return 0


# ---------------------------------------------------------------- study fraction, study prior: the curves

def write_sweep(jobs, flag, values, folder):
    """Writes sweep.csv and sweep.png of the jobs (study.Job) that are measured so far."""
    found = {}  # {(method, value): {measure: values of all seeds and repeats}}
    for job in jobs:
        for (_, measure), repeats in read_values(job.folder).items():
            found.setdefault((job.arm, job.value), {}).setdefault(measure, []).extend(repeats)
    rows = [(flag, "method", "measure", "mean", "sd", "repeats")]
    for (method, value), measures in found.items():
        rows += [(value, method, name, np.mean(v), sd_of(v), len(v)) for name, v in measures.items()]
    if found:
        shared.save_both(draw_sweep(found, flag, values), rows, folder / "sweep.png")


def draw_sweep(found, flag, values):
    """Draws Fig. 6: accuracy and AUC over a flag's values, a line per method; bars: sd over repeats."""
    is_number = flag == "fraction"
    place = {value: float(value) if is_number else k for k, value in enumerate(values)}
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    for axis, measure in zip(figure.subplots(1, 2), ("accuracy", "auc")):
        for k, (method, name) in enumerate(METHODS.items()):
            color = NETWORK_COLORS[method]
            repeats = {value: measures[measure] for (arm, value), measures in found.items()
                       if arm == method and measure in measures}
            if "" in repeats:
                axis.axhline(np.mean(repeats[""]), color=color, ls="--", label=f"{name} (no prior)")
            elif repeats:
                shift = (0.004 if is_number else 0.08) * (k - 1)  # side by side, so that bars can be told
                measured = [value for value in values if value in repeats]
                axis.errorbar([place[value] + shift for value in measured],
                              [np.mean(repeats[value]) for value in measured],
                              [float(sd_of(repeats[value]) or 0) for value in measured],
                              fmt="o-" if is_number else "o", color=color, capsize=3, lw=1.4, ms=4,
                              label=name)
        if is_number:
            axis.set_xlabel("share of the training crops")
        else:
            axis.set_xticks(range(len(values)), values)
            axis.set_xlim(-0.5, len(values) - 0.5)
        axis.set_ylabel(f"{MEASURES[measure]} (bars: sd over repeats)", fontsize=9)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    return figure


def main(argv=None):
    return run_script("table", lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
