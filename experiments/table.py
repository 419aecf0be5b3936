"""The paper's tables from runs (Table 1, 2, 5): a row a network, accuracy and AUC a data set.

    python -m experiments.table runs [--format latex] [--measures accuracy auc macro_f1 middle]

Reads slides.csv, patches.csv and results.csv of every run below a folder, as eval.py writes them. Repeats
are DSMIL's trainings, or the folds, of all runs that differ in nothing but the seed; runs with other settings
have rows of their own, which name what differs. Every setting in which the rows of a data set differ is
listed below the table; bold marks the best of a column of accuracies, AUC or F1.
"""
import csv
import sys
from pathlib import Path

import numpy as np

from common.errors import InputError, run_script
from common.files import atomic_write, read_json, write_csv
from common.flags import RUNNING
from common.log import MIDDLE, read_log
from common.report import note_on_middle
from experiments import compare
from experiments.figures import shared

METHODS = {"baseline": "Baseline", "cellback": "Cellback", "dirl": "DiRL"}  # the paper's order
SSL = {"byol": "BYOL", "simclr": "SimCLR", "esvit": "EsViT", "selfpatch": "SelfPatch", "imix": "i-mix",
       "lsup": "L_sup"}  # experiments.compare's, instead of DINO
SIZES = {"vit_t4": "T4", "vit_t": "T", "vit_s": "S", "vit_h": "H"}
MEASURES = {"accuracy": "accuracy", "auc": "AUC", "macro_f1": "macro F1", "middle": "tokens 0.5 to 2"}
NO_SETTING = {*RUNNING, "seed", "method", "arch", "data", "mpp", "crops", "images", "pixels", "precision"}
IN_THE_LABEL = {*RUNNING, "seed", "method", "arch", "ssl", "images", "pixels"}  # or no settings


def arguments(argv):
    parser, add = shared.parser_of("table", "The paper's table from the runs below a folder.")
    add("folder", nargs="?", default="runs", help="every run in it and below counts")
    add("--format", default="markdown", choices=["markdown", "latex"], help="latex needs booktabs")
    add("--measures", nargs="+", default=["accuracy", "auc"], choices=list(MEASURES),
        help="macro_f1 is BRIGHT's (Table 5); middle is the share of tokens with attention 0.5 to 2")
    add("--out", help="default: table.md or table.tex in the folder; the numbers go beside it, as .csv")
    return parser.parse_args(argv)


def read_rows(path):
    """The rows of a CSV as lists, the header first; [] if it is not there."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))  # results.csv has two columns "sd"


def read_values(folder):
    """{(data set, measure): [value of each repeat]} of a run that eval.py has measured; {} if none."""
    config, out = read_json(folder / "config.json"), {}
    data = config.get("data", "")
    try:
        header, *rows = read_rows(folder / "slides.csv") or [()]
        for name in header[1:]:
            out[data, name] = [float(row[header.index(name)]) for row in rows]
        header, *rows = read_rows(folder / "patches.csv") or [()]
        for row in (dict(zip(header, row)) for row in rows):
            if row["encoder"] == folder.resolve().name:
                kind = row["data"] + (", linear" if row["training"] == "linear" else "")
                for name in ("accuracy", "auc"):
                    out.setdefault((kind, name), []).append(float(row[name]))
        for row in read_rows(folder / "results.csv"):
            if row[0] == MIDDLE:
                out[data, "middle"] = [float(row[1])]
    except (ValueError, KeyError, IndexError) as error:
        raise InputError(f"{folder}: its tables cannot be read ({error}); run eval.py again") from None
    return out


def read_runs(folder):
    """[(folder, config, values), ...] of the measured runs below a folder; InputError if there are none."""
    runs = [(path.parent, read_json(path), read_values(path.parent))
            for path in sorted(Path(folder).rglob("config.json"))]
    runs = [run for run in runs if {"data", "arch", "method"} <= run[1].keys() and run[2]]
    if not runs:
        raise InputError(f"{folder}: no run in it that eval.py has measured; first: python train.py, "
                         "python eval.py")
    return runs


def labels_of(runs):
    """[label, ...] of runs: "DiRL-T, BYOL", and what differs from other runs of the same network and data.

    Only what is not the flags' default is named, so that runs with the paper's settings have no addition.
    """
    def key_of(config):
        return [config["data"], config["arch"], config["method"], config.get("ssl", "dino")]
    out = []
    for _, config, _ in runs:
        data, arch, method, ssl = key_of(config)
        others = [other for _, other, _ in runs if key_of(other) == key_of(config)]
        default = vars(compare.arguments(["--data", data, "--ssl", ssl]))
        differs = [name for name, value in config.items() if name not in NO_SETTING
                   and any(other.get(name, plain(default.get(name))) != value for other in others)
                   and plain(default.get(name)) != value]
        additions = [SSL[ssl]] if ssl in SSL else []
        additions += [f"{name.replace('_', ' ')} {config[name]}" for name in differs]
        out.append(", ".join([f"{METHODS.get(method, method)}-{SIZES.get(arch, arch)}", *additions]))
    return out


def plain(value):
    """A flag's value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def settings_of(folder, config):
    """{setting: value as text} of a run: the flags and crops of its config.json, and its steps."""
    default = vars(compare.arguments(["--data", config["data"], "--ssl", config.get("ssl", "dino")]))
    settings = {name: plain(value) for name, value in default.items()} | config
    log = read_log(folder / "log.csv")
    settings["steps"] = int(log[-1]["step"]) + 1 if log else "unknown"
    return {name.replace("_", " "): str(value) for name, value in settings.items()
            if name not in IN_THE_LABEL}


def differences(runs, columns):
    """[line, ...]: for each data set, every setting in which its rows differ, with the rows of each value."""
    rows_of = {}  # {(data set, setting): {value: [label, ...]}}
    for label, (folder, config, values) in zip(labels_of(runs), runs):
        shown = dict.fromkeys(column[0] for column in columns if column in values)
        for setting, value in settings_of(folder, config).items():
            for data in shown:
                rows = rows_of.setdefault((data, setting), {}).setdefault(value, [])
                rows += [label] if label not in rows else []
    lines = []
    for (data, setting), rows in rows_of.items():
        if len(rows) > 1:
            of_values = [f"{value} ({'; '.join(labels)})" for value, labels in rows.items()]
            lines.append(f"{data}: rows differ in {setting}: {', '.join(of_values)}")
    return lines


def order_of(label):
    """Sorts rows as the paper does: by size, then by method, then by what was added."""
    network, *additions = label.split(", ")
    method, _, size = network.rpartition("-")
    sizes, methods = list(SIZES.values()), list(METHODS.values())
    return (sizes.index(size) if size in sizes else 9, methods.index(method) if method in methods else 9,
            method, additions)


def collect(runs, measures):
    """{label: {(data set, measure): values of all repeats}} in the paper's order, and the columns."""
    table, columns = {}, {}
    for label, (_, _, values) in zip(labels_of(runs), runs):
        for (data, measure), repeats in values.items():
            if measure in measures:
                table.setdefault(label, {}).setdefault((data, measure), []).extend(repeats)
                columns[data] = None
    columns = [(data, measure) for data in columns for measure in measures
               if any((data, measure) in row for row in table.values())]
    return {label: table[label] for label in sorted(table, key=order_of)}, columns


def sd_of(values, digits=4):
    """The standard deviation of repeats as text; "" of a single one."""
    return f"{np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""


def cells_of(table, columns, bold, plus_minus):
    """Rows of texts: mean and sd of each cell, the best mean of a column (as printed) through bold.

    The middle bin has no best: a network that has learned nothing has 1.
    """
    shown = {(label, column): f"{np.mean(row[column]):.3f}" for label, row in table.items()
             for column in columns if column in row}
    best = {column: max(text for (_, c), text in shown.items() if c == column) for column in columns
            if column[1] != "middle"}
    rows = []
    for label, row in table.items():
        cells = [label]
        for column in columns:
            text = shown.get((label, column), "")
            sd = sd_of(row[column], 3) if text else ""
            is_best = text and text == best.get(column)
            cells.append((bold(text) if is_best else text) + (sd and plus_minus(sd)))
        rows.append(cells)
    return rows


def markdown(table, columns, notes):
    """The table in Markdown, the notes below it."""
    rows = cells_of(table, columns, lambda text: f"**{text}**", lambda sd: f" ± {sd}")
    head = ["", *(f"{data} {MEASURES[measure]}" for data, measure in columns)]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    for note in notes:
        lines += ["", note]
    return "\n".join(lines) + "\n"


def latex(table, columns, notes):
    """The table in LaTeX with booktabs: data sets over their measures, the notes below."""
    def escape(text):
        return text.replace("_", r"\_").replace("%", r"\%")
    rows = cells_of(table, columns, lambda text: rf"\textbf{{{text}}}", lambda sd: rf" $\pm$ {sd}")
    sets = list(dict.fromkeys(data for data, _ in columns))
    spans = [sum(data == one for data, _ in columns) for one in sets]
    above = "".join(rf" & \multicolumn{{{n}}}{{c}}{{{escape(one)}}}" for one, n in zip(sets, spans))
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
    notes += [note] if (note := note_on_middle(middle)) else []
    text = (latex if args.format == "latex" else markdown)(table, columns, notes)
    out = Path(args.out or Path(args.folder) / ("table.tex" if args.format == "latex" else "table.md"))
    with atomic_write(out) as temp:
        temp.write_text(text, encoding="utf-8")
    write_csv(out.with_suffix(".csv"), [("network", "data", "measure", "mean", "sd", "repeats")] + [
        (label, *column, f"{np.mean(row[column]):.4f}", sd_of(row[column]), len(row[column]))
        for label, row in table.items() for column in columns if column in row])
    print(text)
    print(f"Mean and sd over repeats of {len(runs)} runs. Wrote {out} and {out.stem}.csv beside it")
    return 0


def main(argv=None):
    return run_script("table", lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
