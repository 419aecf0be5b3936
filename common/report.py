"""The table that eval.py prints and writes: rows (measure, mean, sd, over) of texts."""
import numpy as np

from common.files import print_table, write_csv
from common.log import EVERY_TOKEN, MIDDLE, read_log, symbol_of


def row_of(measure, values, over):
    """A row of the table for a measure over several seeds."""
    sd = np.std(values, ddof=1) if len(values) > 1 else 0
    return measure, f"{np.mean(values):.4f}", f"{sd:.4f}", over


def last_losses(run):
    """Rows of the table: the last epoch's mean loss of f, or of f_c and f_b, next to its ln K if it has one.

    Only a loss with a centre has one: log.csv then has the head's entropy. BYOL's and SimCLR's have none.
    """
    log = read_log(run / "log.csv")
    last = [row for row in log if row["epoch"] == log[-1]["epoch"]]
    rows = []
    for head in ("f", "c", "b"):
        losses = [float(row[f"loss_{head}"]) for row in last if row.get(f"loss_{head}")]
        if losses:
            ln_k = f"uniform outputs: ln K = {float(last[0]['ln_out_dim']):.4f}"
            has_centre = last[0].get(f"entropy_{head}")
            rows.append((f"loss of {symbol_of(head)}, last epoch", f"{np.mean(losses):.4f}", "",
                         ln_k if has_centre else ""))
    return rows


def note_on_middle(shares):
    """A line to print below shares of MIDDLE, if one of them is printed as 1.000; else ""."""
    if not any(share >= EVERY_TOKEN for share in shares):
        return ""
    return f"{MIDDLE}: a network that has learned nothing has 1.000, so 1.000 alone is no success"


def beside(trained, other):
    """Rows (measure, mean, sd, over) of both, those with the same measure in one row."""
    of = {row[0]: row for row in other}
    return [(measure, mean, sd, *of.get(measure, ("", "", ""))[1:3], over)
            for measure, mean, sd, over in trained]


def write_results(tables, shared, path):
    """Prints and writes the table; with two networks the second's columns stand beside the first's."""
    first, *others = tables
    header, table = ("measure", "mean", "sd", "over"), tables[first] + shared
    if others:
        header = ("measure", first, "sd", others[0], "sd", "over")
        table = beside(table, tables[others[0]])
    write_csv(path, [header, *table])
    print_table([header, *table])
    shares = [float(row[1]) for rows in tables.values() for row in rows if row[0] == MIDDLE]
    if note := note_on_middle(shares):
        print(note)
