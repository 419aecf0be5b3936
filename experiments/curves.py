"""Curves of runs: python -m experiments.curves RUN... draws their log.csv, to see whether a run learns.

The teacher's entropy H(q) and the divergence KL(q || p) of student and teacher are shares of ln K; the loss
is their sum. train.py's progress bar shows their means over the heads.
"""
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common.errors import InputError, Parser, run_script
from common.figures import save_figure
from common.log import MIDDLE, ONE_PROTOTYPE, PROBED, UNIFORM, read_log, symbol_of

STYLES = ("-", "--", ":", "-.")  # one per run, repeated


def read_run(folder):
    """Returns a run's name and {column: (2, N) of steps and values}; InputError if it has no log.csv."""
    rows = read_log(Path(folder) / "log.csv")
    if not rows:
        raise InputError(f"{folder}: no log.csv; name the folder of a run")
    columns = {}
    for name in rows[0]:
        pairs = [(int(row["step"]), row[name]) for row in rows if row.get(name)]
        columns[name] = np.array([(step, float(value)) for step, value in pairs]).reshape(-1, 2).T
    return Path(folder).resolve().name, columns


def smoothed(values, width):
    """Returns the moving average over up to width values, fewer at the start."""
    sums = np.convolve(values, np.ones(width))[: len(values)]
    return sums / np.minimum(np.arange(len(values)) + 1, width)


def plot_runs(folders):
    """Draws entropy, divergence and loss of every head, the features' rank and the probe; returns 0."""
    runs = [read_run(folder) for folder in folders]
    heads = list(dict.fromkeys(name.removeprefix("entropy_") for _, columns in runs for name in columns
                               if name.startswith("entropy_")))
    panels = [("entropy", "teacher's entropy H(q) / ln K"), ("kl", "KL(q || p) / ln K"),
              ("sum", "loss / ln K"), ("rank", "effective rank of f")]
    probed = any(columns.get(PROBED[-1], np.zeros((2, 0))).size for _, columns in runs)
    if probed:
        panels += [(PROBED[1], MIDDLE), (PROBED[-1], "20-NN accuracy")]
    figure = Figure(figsize=(4.2 * ((len(panels) + 1) // 2), 6.4), layout="constrained")
    axes = figure.subplots(2, (len(panels) + 1) // 2)
    for axis, (panel, title) in zip(axes.T.flat, panels):
        for (name, columns), style in zip(runs, STYLES * len(runs)):
            draw_panel(axis, panel, heads, columns, style, name if len(runs) > 1 else "")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
    for border in (UNIFORM, ONE_PROTOTYPE):
        axes.T.flat[0].axhline(border, color="grey", linewidth=0.8, linestyle=":")
    handles, labels = axes.T.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=7)
    out = Path(folders[0]) / "curves.png"
    save_figure(figure, out)
    print(f"Wrote {out}. A head learns nothing at an entropy above {UNIFORM} (uniform outputs) or below "
          f"{ONE_PROTOTYPE} (one prototype).")
    return 0


def draw_panel(axis, panel, heads, columns, style, name):
    """Draws one run's curves in one panel: a colour per head, or a single black curve."""
    if panel not in ("entropy", "kl", "sum"):
        if panel in columns and columns[panel].size:
            axis.plot(*columns[panel], style, marker=".", color="black", linewidth=1.2)
        return
    for k, head in enumerate(heads):
        if f"entropy_{head}" not in columns:
            continue
        step, entropy = columns[f"entropy_{head}"]
        divergence = columns[f"kl_{head}"][1]
        values = {"entropy": entropy, "kl": divergence, "sum": entropy + divergence}[panel]
        axis.plot(step, smoothed(values, max(1, len(step) // 50)), style, color=f"C{k}", linewidth=1.2,
                  label=f"{symbol_of(head)} {name}")


def main(argv=None):
    parser = Parser(prog="python -m experiments.curves", description="Draws the curves of runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; the picture goes to the first")
    return run_script("curves", lambda: plot_runs(parser.parse_args(argv).runs))


if __name__ == "__main__":
    sys.exit(main())
