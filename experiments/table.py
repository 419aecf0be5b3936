"""The paper's tables from runs (Table 1, 2, 5): a row per network, accuracy and AUC per data set.

    python -m experiments.table runs [--format latex] [--measures accuracy auc macro_f1 middle]

Reads slides.csv, patches.csv and results.csv of every run below a folder, and of each other folder where
eval.py writes results: on_<data>/ of another data set, encoder_<epoch>/, weights of other programs. Repeats
are DSMIL's trainings, or the folds, of all runs that differ in nothing but the seed; a run with other
settings has its own row, which names what differs. Every setting in which the rows of a data set differ is
listed below the table; bold marks the best of a column of accuracies, AUC or F1.

Below: the table and the figures of experiments.study, from the files of its runs.
"""
import csv
import json
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import dirl
from common.errors import InputError, run_script
from common.figures import draw_distribution, save_figure
from common.files import atomic_write, file_stamp, print_table, read_json, read_npz, write_csv
from common.flags import RUNNING
from common.log import MIDDLE, PROBED, read_log, symbol_of
from common.metrics import DRAWS
from common.report import note_on_middle
from experiments import compare
from experiments.figures import shared
from experiments.measures import ABOUT, draws_of, statistics

METHODS = {"baseline": "Baseline", "cellback": "Cellback", "dirl": "DiRL"}  # the paper's order
SSL = {"byol": "BYOL", "simclr": "SimCLR", "esvit": "EsViT", "selfpatch": "SelfPatch", "imix": "i-mix",
       "lsup": "L_sup", "registers": "registers",
       "evenness": "evenness"}  # experiments.compare's, instead of DINO
SIZES = {"vit_t4": "T4", "vit_t": "T", "vit_s": "S", "vit_h": "H"}
MEASURES = {"accuracy": "accuracy", "auc": "AUC", "macro_f1": "macro F1", "middle": "tokens 0.5 to 2"}
NO_SETTING = {*RUNNING, "seed", "method", "arch", "data", "mpp", "crops", "images", "pixels", "precision",
              "steps", "weights", "pretrained_on"}
IN_THE_LABEL = {*RUNNING, "seed", "method", "arch", "ssl", "images", "pixels",  # or no setting
                "pretrained_on"}
ARM_COLORS = ("#999999", "#1b1b1b", "#1f78b4", "#d95f02", "#e7b416", "#984ea3", "#4daf4a", "#7fc97f",
              "#a65628", *matplotlib.colormaps["tab20"].colors)  # of the arms of study claim, in their order


def arguments(argv):
    parser, add = shared.parser_of("table", "The paper's table from the runs below a folder.")
    add("folder", nargs="?", default="runs", help="folder of the runs, searched in depth")
    add("--format", default="markdown", choices=["markdown", "latex"], help="latex needs booktabs")
    add("--measures", nargs="+", default=["accuracy", "auc"], choices=list(MEASURES),
        help="macro_f1 is BRIGHT's (Table 5); middle is the share of tokens with attention 0.5 to 2")
    add("--out", help="default: table.md or table.tex in the folder; the numbers go next to it, as .csv")
    return parser.parse_args(argv)


def read_rows(path):
    """Returns the rows of a CSV as dicts; [] if it is missing. Of columns with one name the last counts."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


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


def defaults_of(config):
    """Returns {flag: default} of experiments.compare for a config.json's data set, as JSON keeps them."""
    flags = compare.arguments(["--data", config["data"], "--ssl", config.get("ssl", "dino")])
    return json.loads(json.dumps(vars(flags)))


def labels_of(runs):
    """Returns [label, ...]: "DiRL-T, BYOL", and what differs from other runs of this network and data set.

    Only what is not the flags' default is named, so that runs with the paper's settings have no addition.
    """
    def key_of(config):
        return [config["data"], config["arch"], config["method"], config.get("ssl", "dino")]
    labels = []
    for _, config, _ in runs:
        _, arch, method, ssl = key_of(config)
        others = [other for _, other, _ in runs if key_of(other) == key_of(config)]
        default = defaults_of(config)
        additions = [SSL[ssl]] if ssl in SSL else []
        for name, value in config.items():
            usual = default.get(name)
            differs = any(other.get(name, usual) != value for other in others)
            if name not in NO_SETTING and differs and value != usual:
                additions.append(f"{name.replace('_', ' ')} {value}")
        labels.append(", ".join([f"{METHODS.get(method, method)}-{SIZES.get(arch, arch)}", *additions]))
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


def settings_of(folder, config):
    """Returns {setting: value as text} of a run: flags and crops of its config.json, and its steps."""
    if "weights" in config:  # another program's: its training has no such settings
        return {}
    settings = defaults_of(config) | config
    log = read_log(folder / "log.csv")
    if log:
        settings["steps"] = int(log[-1]["step"]) + 1
    settings.setdefault("steps", "unknown")
    return {name.replace("_", " "): str(value) for name, value in settings.items()
            if name not in IN_THE_LABEL}


def differences(runs, columns):
    """Returns a line per data set and setting in which its rows differ, with the rows of each value."""
    rows_of = {}  # {(data set, setting): {value: {label: None}}}
    for label, (folder, config, values) in zip(labels_of(runs), runs):
        data_sets = dict.fromkeys(column[0] for column in columns if column in values)
        for setting, value in settings_of(folder, config).items():
            for data in data_sets:
                rows_of.setdefault((data, setting), {}).setdefault(value, {})[label] = None
    lines = []
    for (data, setting), rows in rows_of.items():
        if len(rows) > 1:
            of_values = [f"{value} ({'; '.join(labels)})" for value, labels in rows.items()]
            lines.append(f"{data}: rows differ in {setting}: {', '.join(of_values)}")
    return lines


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


def cells_of(table, columns, bold, plus_minus):
    """Returns rows of texts: mean and sd of each cell, the best printed mean of a column through bold().

    The middle bin has no best: a network that has learned nothing has 1.
    """
    rows = [[label] for label in table]
    for column in columns:
        means = [f"{np.mean(row[column]):.3f}" if column in row else "" for row in table.values()]
        best = "" if column[1] == "middle" else max(means)
        for cells, row, mean in zip(rows, table.values(), means):
            sd = sd_of(row.get(column, ()), 3)
            cells.append((bold(mean) if mean and mean == best else mean) + (plus_minus(sd) if sd else ""))
    return rows


def markdown(table, columns, notes):
    """Returns the table in Markdown, the notes below it."""
    rows = cells_of(table, columns, lambda text: f"**{text}**", lambda sd: f" ± {sd}")
    head = ["", *(f"{data} {MEASURES[measure]}" for data, measure in columns)]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    for note in notes:
        lines += ["", note]
    return "\n".join(lines) + "\n"


def latex(table, columns, notes):
    """Returns the table in LaTeX with booktabs: data sets over their measures, the notes below."""
    def escape(text):
        return text.replace("_", r"\_").replace("%", r"\%")

    rows = cells_of(table, columns, lambda text: rf"\textbf{{{text}}}", lambda sd: rf" $\pm$ {sd}")
    spans = Counter(data for data, _ in columns)
    above = "".join(rf" & \multicolumn{{{count}}}{{c}}{{{escape(data)}}}" for data, count in spans.items())
    measures = "".join(f" & {escape(MEASURES[measure])}" for _, measure in columns)
    body = [" & ".join([escape(row[0]), *row[1:]]) + r" \\" for row in rows]
    return "\n".join([rf"\begin{{tabular}}{{l{'c' * len(columns)}}}", r"\toprule", above + r" \\",
                      measures + r" \\", r"\midrule", *body, r"\bottomrule", r"\end{tabular}",
                      *(rf"\par\footnotesize {escape(note)}" for note in notes), ""])


def run(args):
    runs = read_runs(args.folder)
    table, columns = collect(runs, args.measures)
    if not columns:
        raise InputError(f"{args.folder}: no run has {', '.join(args.measures)}; python eval.py measures it")
    notes = differences(runs, columns)
    middle = [np.mean(row[column]) for row in table.values() for column in columns
              if column[1] == "middle" and column in row]
    if note := note_on_middle(middle):
        notes.append(note)
    text = (latex if args.format == "latex" else markdown)(table, columns, notes)
    out = Path(args.out or Path(args.folder) / ("table.tex" if args.format == "latex" else "table.md"))
    with atomic_write(out) as temp:
        temp.write_text(text, encoding="utf-8")
    write_csv(out.with_suffix(".csv"), [("network", "data", "measure", "mean", "sd", "repeats")] + [
        (label, *column, f"{np.mean(row[column]):.4f}", sd_of(row[column]), len(row[column]))
        for label, row in table.items() for column in columns if column in row])
    print(text)
    print(f"Mean and sd over repeats of {len(runs)} runs. Wrote {out} and {out.stem}.csv next to it")
    return 0


# ---------------------------------------------------------------- study claim: the table

@dataclass
class Measured:
    """An arm pre-trained with a seed and measured."""

    seed: int
    folder: Path
    values: dict  # measures.statistics


def read_claim(folder, arms, pair):
    """Returns {arm: [Measured, ...]} of a study's folder, in the order of arms; InputError if none."""
    found = {}
    draws = {}  # of the same test groups, drawn once
    for path in sorted(Path(folder).glob("*_seed*/claim.npz")):
        arm, seed = path.parent.name.rsplit("_seed", 1)
        file = read_npz(path)
        if arm not in arms or not seed.isdigit() or not file or not {*ABOUT, "attention"} <= file.keys():
            raise InputError(f"{path}: cannot be read as a measured run; delete it and run again")
        if not str(file["stamp"]).startswith(file_stamp(path.parent / "encoder.pt")):
            print(f"skipped: {path}: belongs to an earlier encoder; run the study to measure it again")
            continue
        if pair and not set(pair) <= set(file["classes"]):
            raise InputError(f"--pair {' '.join(pair)}: the classes are {', '.join(file['classes'])}")
        groups = tuple(file["groups"])
        if groups not in draws:
            draws[groups] = draws_of(file["groups"])
        values = statistics(file, draws[groups], pair)
        found.setdefault(arm, []).append(Measured(int(seed), path.parent, values))
    if not found:
        raise InputError(f"{folder}: has no measured run; first: python -m experiments.study claim --data "
                         f"FOLDER --out {folder}")
    return {arm: sorted(found[arm], key=lambda run: run.seed) for arm in arms if arm in found}


def probe_curve(folder):
    """Returns {epochs done: (low, middle, high, k-NN accuracy)} that --probe wrote to log.csv."""
    curve = {}
    for row in read_log(folder / "log.csv"):
        if row[PROBED[-1]]:
            curve[int(row["epoch"]) + 1] = tuple(float(row[name]) for name in PROBED)
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


def minus_baseline(arm, baseline):
    """Returns {statistic: difference to the baseline's of the same seed} of each run; {} without one."""
    of_seed = {run.seed: run.values for run in baseline}
    out = []
    for run in arm:
        base = of_seed.get(run.seed, {})
        out.append({name: run.values[name] - base[name] for name in run.values if name in base})
    return out


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


def show_claim(folder, arms, baseline_of, pair=None):
    """Prints and draws what the measured runs in a study's folder hold; returns 0.

    baseline_of: {arm: its baseline}; that of others is "baseline". pair: two classes to tell apart.
    """
    runs = read_claim(folder, arms, pair)
    values = {}
    differences = {}
    losses = {}
    for arm, measured in runs.items():
        seeds = " ".join(str(run.seed) for run in measured)
        title = f"{arm}, seed{'s' * (len(measured) > 1)} {seeds}"
        values[title] = [run.values for run in measured]
        losses[title] = [loss_shares(run.folder) for run in measured]
        if arm not in ("random", "baseline", *baseline_of.values()):
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
    print("curves on the probe: epochs, tokens with attention 0.5 to 2, 20-NN accuracy")
    rows = [("arm", "seed", "measure", "value", "low", "high")]
    for arm, measured in runs.items():
        for run in measured:
            points = [f"{epoch}: {p[1]:.1%} {p[3]:.3f}" for epoch, p in probe_curve(run.folder).items()]
            if points:
                print(f"{arm}, seed {run.seed}".ljust(28) + "  ".join(points))
            for name, values in run.values.items():
                numbers = (values[0], *interval(values))
                rows.append((arm, run.seed, name, *(f"{number:.4f}" for number in numbers)))
    write_csv(Path(folder) / "claim.csv", rows)
    save_figure(draw_claim(runs, dict(zip(arms, ARM_COLORS))), Path(folder) / "claim.png")
    print(f"Wrote {folder}/claim.csv, claim.png")
    return 0


def draw_claim(runs, colors):
    """Draws Fig. 4 of each arm (all seeds), the middle bin's share and the k-NN accuracy over the epochs.

    The latter two have a line per seed.
    """
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    fig_4, middle, knn = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    pooled = {}
    for arm, measured in runs.items():
        of_seed = [read_npz(run.folder / "claim.npz", "attention")["attention"] for run in measured]
        pooled[arm] = np.concatenate(of_seed)
        for run in measured:
            points = probe_curve(run.folder)
            style = {"ms": 3, "lw": 1, "color": colors[arm]}
            middle.plot(list(points), [100 * p[1] for p in points.values()], "o-", **style)
            knn.plot(list(points), [p[3] for p in points.values()], "o-", **style)
    draw_distribution(fig_4, pooled, colors)
    middle.set(xlabel="epochs", ylabel=f"{MIDDLE}, %")
    knn.set(xlabel="epochs", ylabel="20-NN accuracy on the probe")
    return figure


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
        for k, (method, color) in enumerate(zip(METHODS, shared.COLORS)):
            repeats = {value: measures[measure] for (name, value), measures in found.items()
                       if name == method and measure in measures}
            if "" in repeats:
                axis.axhline(np.mean(repeats[""]), color=color, ls="--",
                             label=f"{METHODS[method]} (no prior)")
            elif repeats:
                shift = (0.004 if is_number else 0.08) * (k - 1)  # side by side, so that bars can be told
                measured = [value for value in values if value in repeats]
                axis.errorbar([place[value] + shift for value in measured],
                              [np.mean(repeats[value]) for value in measured],
                              [float(sd_of(repeats[value]) or 0) for value in measured],
                              fmt="o-" if is_number else "o", color=color, capsize=3, lw=1.4, ms=4,
                              label=METHODS[method])
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
