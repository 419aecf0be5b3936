"""The tables that eval.py prints and writes: rows (measure, mean, sd, over) of texts."""
from itertools import chain

import numpy as np

from common.files import print_table, write_csv
from common.log import EVERY_TOKEN, MIDDLE, read_log, symbol_of

RESULTS = ("measure", "mean", "sd", "over")  # columns of results.csv


def row_of(measure, values, over):
    """A row of the table for a measure over seeds; a single one has no sd."""
    sd = f"{np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return measure, f"{np.mean(values):.4f}", sd, over


def last_losses(run):
    """Rows of the table: the last epoch's mean loss of f, or of f_c and f_b, next to its ln K if it has one.

    Only losses over prototypes have one, and log.csv then has the head's entropy; BYOL's and SimCLR's losses
    have none.
    """
    log = read_log(run / "log.csv")
    last = [row for row in log if row["epoch"] == log[-1]["epoch"]]
    rows = []
    for head in ("f", "c", "b"):
        losses = [float(row[f"loss_{head}"]) for row in last if row.get(f"loss_{head}")]
        if not losses:
            continue
        over = ""
        if last[0].get(f"entropy_{head}"):
            over = f"uniform outputs: ln K = {float(last[0]['ln_out_dim']):.4f}"
        rows.append(row_of(f"loss of {symbol_of(head)}, last epoch", [np.mean(losses)], over))
    return rows


def note_on_middle(shares):
    """Returns a line to print below shares of MIDDLE if one of them is printed as 1.000, else ""."""
    if not any(share >= EVERY_TOKEN for share in shares):
        return ""
    return f"{MIDDLE}: a network that has learned nothing has 1.000, so 1.000 alone is no success"


def cell(mean, sd):
    """Returns a mean and its sd, texts, for reading: "0.932 ± 0.012"."""
    text = f"{float(mean):.3f}" if mean else ""
    return f"{text} ± {float(sd):.3f}" if sd else text


def side_by_side(tables):
    """Joins {network: rows} to a table for programs (measure, each mean and sd, over) and one for reading."""
    header = ["measure"]
    over_of = {}  # {measure: over}
    values = {}  # {(network, measure): (mean, sd)}
    for network, rows in tables.items():
        header += [network, f"{network} sd"]
        for measure, mean, sd, over in rows:
            over_of.setdefault(measure, over)
            values[network, measure] = mean, sd
    lines = [[*header, "over"]]
    shown = [["measure", *tables, "over"]]
    for measure, over in over_of.items():
        pairs = [values.get((network, measure), ("", "")) for network in tables]
        lines.append([measure, *chain(*pairs), over])
        shown.append([measure, *(cell(*pair) for pair in pairs), over])
    return lines, shown


def print_results(tables, path):
    """Prints {network: rows}: one network's rows, or several side by side, which are also written to path."""
    table = [RESULTS, *next(iter(tables.values()))]
    if len(tables) > 1:
        lines, table = side_by_side(tables)
        write_csv(path, lines)
    print_table(table)
    shares = []
    for rows in tables.values():
        shares += [float(mean) for measure, mean, _, _ in rows if measure == MIDDLE]
    if note := note_on_middle(shares):
        print(note)
