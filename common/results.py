"""The table that eval.py prints and writes: rows (measure, mean, sd, over) of texts."""
import numpy as np

from common.files import print_table, write_csv
from common.log import read_log


def row_of(measure, values, over):
    """A row of the table for a measure over several seeds."""
    sd = np.std(values, ddof=1) if len(values) > 1 else 0
    return measure, f"{np.mean(values):.4f}", f"{sd:.4f}", over


def last_losses(run):
    """Rows of the table: the last epoch's mean loss of f, or of f_c and f_b, beside ln K."""
    log = read_log(run / "log.csv")
    last = [row for row in log if row["epoch"] == log[-1]["epoch"]]
    return [(f"loss of f{head[4:]}, last epoch", f"{np.mean([float(row[head]) for row in last]):.4f}", "",
             f"uniform outputs: ln K = {float(last[0]['ln_out_dim']):.4f}")
            for head in ("loss_f", "loss_c", "loss_b") if last and last[0].get(head)]


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
