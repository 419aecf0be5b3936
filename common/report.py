"""The table that eval.py prints and writes: rows (measure, mean, sd, over) of texts."""
import numpy as np

from common.files import print_table, write_csv
from common.log import EVERY_TOKEN, MIDDLE, read_log, symbol_of


def row_of(measure, values, over):
    """A row of the table for a measure over several seeds."""
    sd = np.std(values, ddof=1) if len(values) > 1 else 0
    return measure, f"{np.mean(values):.4f}", f"{sd:.4f}", over


def row_of_one(measure, value, over):
    """A row of the table for a measure that has no seeds, and so no sd."""
    return measure, f"{value:.4f}", "", over


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
        rows.append(row_of_one(f"loss of {symbol_of(head)}, last epoch", np.mean(losses), over))
    return rows


def note_on_middle(shares):
    """Returns a line to print below shares of MIDDLE if one of them is printed as 1.000, else ""."""
    if not any(share >= EVERY_TOKEN for share in shares):
        return ""
    return f"{MIDDLE}: a network that has learned nothing has 1.000, so 1.000 alone is no success"


def beside(trained, other):
    """Joins rows (measure, mean, sd, over) of two networks to rows (measure, mean, sd, mean, sd, over)."""
    mean_and_sd = {measure: (mean, sd) for measure, mean, sd, _ in other}
    return [(measure, mean, sd, *mean_and_sd.get(measure, ("", "")), over)
            for measure, mean, sd, over in trained]


def write_results(tables, shared, path):
    """Prints and writes the table of one network, or of two next to each other.

    tables: {network: rows}; shared: rows that are not of one network, which go to the first.
    """
    first, *others = tables
    header = ("measure", "mean", "sd", "over")
    table = tables[first] + shared
    if others:
        header = ("measure", first, "sd", others[0], "sd", "over")
        table = beside(table, tables[others[0]])
    write_csv(path, [header, *table])
    print_table([header, *table])
    shares = []
    for rows in tables.values():
        shares += [float(mean) for measure, mean, _, _ in rows if measure == MIDDLE]
    if note := note_on_middle(shares):
        print(note)
