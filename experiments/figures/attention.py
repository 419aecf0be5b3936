"""Where encoders look (4.2, A.6): Fig. 4, 7 to 9 and 11, Fig. 5 and 12, Fig. 13.

    python -m experiments.figures.attention distribution --checkpoint Baseline=RUN DiRL=RUN [--data demo]
    python -m experiments.figures.attention overlay ...     crops with aggregated attention, bars of the bins
    python -m experiments.figures.attention query ...       what single tokens attend to

Each writes a picture and its numbers as CSV beside it. Whole slides: experiments/figures/heatmap.py.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import dirl
from common.encoders import attention_of, in_batches, inputs_of
from common.errors import InputError, run_script
from common.figures import BRIGHTEST, HEAT, draw_distribution, spread
from common.report import note_on_middle
from experiments.figures import shared
from wsi.slides import CROP

BINS = ("0 to 0.5", "0.5 to 2", "over 2")
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
BLACK = shared.COLORS[0]


def arguments(argv):
    parser, _ = shared.parser_of("attention", "Aggregated attention of encoders, side by side.")
    commands = parser.add_subparsers(dest="command", required=True)
    style = argparse.ArgumentDefaultsHelpFormatter
    about = {"distribution": "Fig. 4, 7 to 9, 11: the distribution over all tokens, and its three bins",
             "overlay": "Fig. 5, 12: crops with the attention over them, and bars of the three bins",
             "query": "Fig. 13: the row of the attention of single tokens"}
    for command, help in about.items():
        sub = commands.add_parser(command, help=help, description=help, formatter_class=style)
        shared.add_networks(sub.add_argument)
        sub.add_argument("--out", default=f"runs/attention_{command}.png", help="the picture")
        if command == "distribution":
            sub.add_argument("--crops", type=int, default=1000, help="most crops; more is steadier, slower")
            continue
        sub.add_argument("--show", nargs="+", metavar="CROP",
                         help="these crops: <slide>/<x>_<y> as under datasets/<data>/crops, or the end of a "
                              "file's name; default: some that have cells and background")
        sub.add_argument("--crops", type=int, default=4 if command == "overlay" else 1,
                         help="how many, without --show")
        if command == "query":
            sub.add_argument("--query", nargs="+", default=["3"], metavar="X,Y",
                             help="points in px of the crop (0 to 224) whose tokens ask; one number k: a "
                                  "grid of k x k")
    args = parser.parse_args(argv)
    shared.check_flags(args, crops=(1, 1e9))
    return args


# ---------------------------------------------------------------- numbers

def query_rows(attention, tokens):
    """attention (heads, n, n) to the rows of these tokens, (Q, n): mean over heads, times n (even: 1)."""
    return attention[:, tokens].mean(0) * attention.shape[-1]


def tokens_at(queries, grid, size=CROP):
    """Indices of the tokens of a grid x grid crop at points "x,y" in px; ["k"]: of k x k spread points.

    InputError for what is neither, or outside 0 to size.
    """
    try:
        if len(queries) == 1 and queries[0].isdigit() and int(queries[0]):
            k = int(queries[0])
            places = (np.arange(k) + 0.5) * size / k
            points = [(x, y) for y in places for x in places]
        else:
            points = [tuple(map(float, query.split(","))) for query in queries]
        if not all(0 <= x < size and 0 <= y < size for x, y in points):
            raise ValueError
    except ValueError:
        raise InputError(f"--query {' '.join(queries)}: x,y within 0 to {size} px is expected, such as "
                         "100,60, or one number for a grid") from None
    return [int(y * grid // size) * grid + int(x * grid // size) for x, y in points]


def choose(crops, args):
    """Indices of the crops of --show, else of --crops of them that have both regions."""
    if not args.show:
        mixed = shared.with_both_regions(crops.priors())
        return mixed[spread(len(mixed), args.crops)].tolist()
    chosen = []
    for name in args.show:
        ends = [i for i, file in enumerate(crops.files) if file.removesuffix(".jpg").endswith(name)
                or file.endswith(name)]
        if len(ends) != 1:
            raise InputError(f"--show {name}: {len(ends)} crops of --part {args.part} end so; one is needed")
        chosen += ends
    return chosen


def name_of(crops, i):
    """A crop as --show names it."""
    return f"{crops.owner[i]}/{Path(crops.files[i]).stem}"


# ---------------------------------------------------------------- pictures

def distribution(encoders, found, names, args):
    """Fig. 4: the distribution of aggregated attention of each network; shares of the bins as CSV."""
    crops = shared.crops_of(found, names, args, with_cells=False)
    images = shared.images_of(crops, spread(len(crops), args.crops))
    aggregated = {name: in_batches(lambda x: attention_of(encoder, x), images, 64, name)
                  for name, encoder in encoders.items()}
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axis = figure.subplots()
    draw_distribution(axis, aggregated, dict(zip(aggregated, shared.COLORS)))
    axis.set_title(f"{found.name}, {len(images)} {found.crops_of_part(args.part)}", fontsize=9)
    rows = [("network", "crops", "tokens", *BINS, *(f"quantile {q:g}" for q in QUANTILES))]
    for name, values in aggregated.items():
        numbers = (*dirl.attention_bins(values), *np.quantile(values.numpy(), QUANTILES))
        rows.append((name, len(images), values.numel(), *numbers))
        print(f"{name}: " + ", ".join(f"{v:.1%} of the tokens {b}" for v, b in zip(numbers, BINS)))
    if note := note_on_middle([row[4] for row in rows[1:]]):
        print(note)
    shared.save_both(figure, rows, args.out)


def show_heat(axis, image, heat):
    """A crop uint8 (3, H, H) with a value for each token (n,) over it."""
    grid, side = int(len(heat) ** 0.5), image.shape[-1]
    axis.imshow(image.permute(1, 2, 0).numpy())
    return axis.imshow(heat.view(grid, grid).numpy(), HEAT, alpha=0.6, vmin=0, vmax=BRIGHTEST,
                       extent=(-0.5, side - 0.5, side - 0.5, -0.5), interpolation="nearest")


def draw_bars(axis, of_network):
    """Fig. 5: the three bins' shares of each network's tokens (n,), in the order of the networks."""
    width = 0.8 / len(of_network)
    for k, (values, color) in enumerate(zip(of_network.values(), shared.COLORS)):
        shares = [100 * share for share in dirl.attention_bins(values)]
        axis.bar(np.arange(3) + (k + 0.5) * width - 0.4, shares, width, color=color)
    axis.set_xticks(range(3), BINS, fontsize=8)
    axis.set_ylim(0, 100)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_box_aspect(1)


def overlay(encoders, found, names, args):
    """Fig. 5 and 12: each crop, P_c, the aggregated attention of each network, bars of its bins."""
    crops = shared.crops_of(found, names, args)
    chosen = choose(crops, args)
    images, priors = shared.images_of(crops, chosen), crops.priors()[chosen]
    aggregated = {name: in_batches(lambda x: attention_of(encoder, x), images, 64)
                  for name, encoder in encoders.items()}
    columns = 3 + len(encoders)
    figure = Figure(figsize=(2.1 * columns + 0.6, 2.15 * len(chosen) + 0.3), layout="constrained")
    axes = figure.subplots(len(chosen), columns, squeeze=False)
    rows = [("crop", "network", *BINS)]
    for k, (line, image) in enumerate(zip(axes, images)):
        crop = name_of(crops, chosen[k])
        for axis in line[:-1]:
            axis.set_axis_off()
        line[0].imshow(image.permute(1, 2, 0).numpy())
        show_heat(line[1], image, BRIGHTEST * priors[k])
        for axis, values in zip(line[2:], aggregated.values()):
            shown = show_heat(axis, image, values[k])
        draw_bars(line[-1], {name: values[k] for name, values in aggregated.items()})
        rows += [(crop, name, *dirl.attention_bins(values[k])) for name, values in aggregated.items()]
    titles = ["crop", "P_c: a cell (bright)", *aggregated, "tokens in the bins, %"]
    for axis, title, color in zip(axes[0], titles, [BLACK, BLACK, *shared.COLORS[:len(encoders)], BLACK]):
        axis.set_title(title, fontsize=9, color=color)
    add_bar(figure, shown, axes[:, -2], "aggregated attention (even: 1)")
    shared.save_both(figure, rows, args.out, dpi=110)


def add_bar(figure, shown, axes, label):
    """The colours' scale beside some axes."""
    bar = figure.colorbar(shown, ax=axes, shrink=min(1, 2.5 / len(axes)), extend="max")
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)


def query(encoders, found, names, args):
    """Fig. 13: the rows of query tokens (boxed, yellow) in the last block's attention, a line a network."""
    crops = shared.crops_of(found, names, args)
    chosen = choose(crops, args)
    rows = [("crop", "network", "query x", "query y", "token x", "token y", "attention times n")]
    lines = [(i, name) for i in range(len(chosen)) for name in encoders]
    grid = CROP // 16
    tokens = tokens_at(args.query, grid)
    corner = [(t % grid * 16, t // grid * 16) for t in range(grid * grid)]  # of each token, px
    figure = Figure(figsize=(1.6 * len(tokens) + 1.4, 1.8 * len(lines) + 0.2), layout="constrained")
    axes = figure.subplots(len(lines), len(tokens), squeeze=False)
    for (i, name), line in zip(lines, axes):
        image, encoder = shared.images_of(crops, [chosen[i]]), encoders[name]
        crop = name_of(crops, chosen[i])
        with torch.no_grad():
            attention = encoder.last_attention(inputs_of(encoder, image))[0].cpu()
        for axis, token, values in zip(line, tokens, query_rows(attention, tokens)):
            shown = show_heat(axis, image[0], values)
            x, y = corner[token]
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 16, 16, fill=False, edgecolor="yellow", lw=1.8))
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f"token at {x},{y} px", fontsize=8)
            rows += [(crop, name, x, y, *corner[t], v) for t, v in enumerate(values.tolist())]
        line[0].set_ylabel(name if len(chosen) == 1 else f"{name}\n{crop}", fontsize=8)
    add_bar(figure, shown, axes[:, -1], "attention to a token (even: 1)")
    shared.save_both(figure, rows, args.out, dpi=110)


def run(args):
    encoders, _, found, names = shared.open_all(args)
    {"distribution": distribution, "overlay": overlay, "query": query}[args.command](
        encoders, found, names, args)
    return 0


def main(argv=None):
    return run_script("attention", lambda: run(arguments(argv)), "--crops")


if __name__ == "__main__":
    sys.exit(main())
