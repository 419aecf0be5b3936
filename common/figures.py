"""What all figures share (colours of networks, P_c, attention) and eval.py's: Fig. 4, Fig. 5, a slide.

Attention is drawn in viridis, whose brightness grows evenly and which colour-blind readers can read; the
other colours are those of Okabe and Ito.
"""
from itertools import cycle

import matplotlib
import numpy as np
import torch
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

import dirl
from common.files import atomic_write

HEAT = "viridis"
BRIGHTEST = 3  # even shares of the attention: where the colour scale ends
CELL_PATCH = "#00b848"  # outline of a patch with a cell
NETWORK_COLORS = {"baseline": "#1b1b1b", "dino": "#1b1b1b", "cellback": "#0072B2", "dirl": "#D55E00",
                  "random": "#999999"}
OTHER_COLORS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", *matplotlib.colormaps["tab20"].colors)
KIND_COLORS = {"glass": "#FFFFFF", "loose stroma": "#F0E442", "dense stroma": "#E69F00", "fat": "#BBBBBB",
               "clusters": "#0072B2", "necrosis": "#CC79A7", "glands": "#56B4E9", "nests": "#009E73",
               "infiltrated nests": "#D55E00"}  # of the demo's tiles
REGION_COLORS = {"tumour": "white", "lymphocytes": "limegreen", "necrosis": "yellow"}  # Fig. 12
BESIDE = dict(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)  # a legend right of its axes
BINS = ("0 to 0.5", "0.5 to 2", "over 2")


def network_colors(names):
    """Returns {name: color}, such that a method has the same colour in every figure.

    A name that contains a key of NETWORK_COLORS ("Baseline-T4", "random start") takes its colour, if no
    earlier name has it; all other names take OTHER_COLORS in turn.
    """
    colors = {}
    others = cycle(OTHER_COLORS)
    for name in names:
        own = [color for network, color in NETWORK_COLORS.items() if network in name.lower()]
        free = [color for color in own if color not in colors.values()]
        colors[name] = free[0] if free else next(others)
    return colors


def save_figure(figure, path, dpi=130):
    with atomic_write(path) as temp:
        figure.savefig(temp, format="png", dpi=dpi)


def add_scale(figure, shown, label, extend="neither", **place):
    """Adds the colour scale of a drawn map; its label names the range. place: where, for figure.colorbar."""
    low, high = shown.get_clim()
    bar = figure.colorbar(shown, extend=extend, **place)
    bar.set_label(f"{label}: {low:g} to {high:g}" + (" and above" if extend == "max" else ""), fontsize=8)
    bar.ax.tick_params(labelsize=8)


# ---------------------------------------------------------------- a crop, its P_c, its attention

def squares(corners, side, **style):
    """Returns squares of a side with these upper left corners as a collection for axis.add_collection."""
    return PatchCollection([Rectangle(corner, side, side) for corner in corners], **style)


def draw_crop(axis, image):
    """Draws an image (3, H, H), uint8 or of 0 to 1, from 0 to H; without ticks."""
    side = image.shape[-1]
    axis.imshow(image.permute(1, 2, 0).numpy(), extent=(0, side, side, 0))
    axis.set(xticks=[], yticks=[])


def draw_prior(axis, prior, side):
    """Outlines the patches with a cell, P_c (n,), on a square picture drawn from 0 to side."""
    grid = int(len(prior) ** 0.5)
    p = side / grid
    gap = p / 16  # between the outlines of neighbours
    corners = [(i % grid * p + gap, i // grid * p + gap) for i in prior.nonzero().flatten().tolist()]
    axis.add_collection(squares(corners, p - 2 * gap, facecolor="none", edgecolor=CELL_PATCH, linewidth=0.8))


def draw_heat(axis, values, side):
    """Draws attention in even shares, a value per token (n,), on a picture from 0 to side; for add_scale."""
    grid = int(len(values) ** 0.5)
    return axis.imshow(values.view(grid, grid).numpy(), HEAT, alpha=0.6, vmin=0, vmax=BRIGHTEST,
                       extent=(0, side, side, 0), interpolation="nearest")


def draw_bars(axis, attention, colors):
    """Draws the shares of the three bins for each network's tokens: {network: (n,)} of one crop."""
    width = 0.8 / len(attention)
    for k, (network, values) in enumerate(attention.items()):
        shares = [100 * share for share in dirl.attention_bins(values)]
        axis.bar(np.arange(len(BINS)) + (k + 0.5) * width - 0.4, shares, width, color=colors[network])
    axis.set_xticks(range(len(BINS)), BINS, fontsize=8)
    axis.set_ylim(0, 100)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_box_aspect(1)


def draw_outlines(axis, outlines):
    """Draws outlines [(region: of REGION_COLORS, points (K, 2)), ...] with a dark rim on a picture."""
    for region, points in outlines:
        ring = np.concatenate([points, points[:1]])
        rim = [withStroke(linewidth=2.4, foreground="black")]
        drawn = LineCollection([ring], colors=REGION_COLORS[region], linewidths=1.4, path_effects=rim)
        axis.add_collection(drawn, autolim=False)


def draw_overlays(crops, attention, priors=None, outlines=None, title="crop"):
    """Returns Fig. 5 or 12, a row per crop: the crop, P_c, each network's attention over it, and its bins.

    crops: images (3, H, H); attention: {network: aggregated attention (B, n)}; priors: P_c (n,) of each crop,
    or None without cells; outlines: those of each crop, see draw_outlines, or None; title: of the images.
    """
    colors = network_colors(attention)
    first = 1 if priors is None else 2  # column of attention
    columns = first + len(attention) + 1
    figure = Figure(figsize=(2.1 * columns + 0.6, 2.15 * len(crops) + 0.3), layout="constrained")
    axes = figure.subplots(len(crops), columns, squeeze=False)
    for i, (line, image) in enumerate(zip(axes, crops)):
        side = image.shape[-1]
        for axis in line[:-1]:
            draw_crop(axis, image)
        if priors is not None:
            draw_prior(line[1], priors[i], side)
        for axis, values in zip(line[first:], attention.values()):
            shown = draw_heat(axis, values[i], side)
        if outlines is not None:
            for axis in (line[0], *line[first:-1]):
                draw_outlines(axis, outlines[i])
        draw_bars(line[-1], {network: values[i] for network, values in attention.items()}, colors)
    axes[0, 0].set_title(title, fontsize=9)
    if priors is not None:
        axes[0, 1].set_title("P_c: patches with a cell", fontsize=9)
    for axis, network in zip(axes[0, first:], attention):
        axis.set_title(network, fontsize=9, color=colors[network])
    axes[0, -1].set_title("tokens per bin of attention, %", fontsize=9)
    add_scale(figure, shown, "attention of a token (even share: 1)", "max", ax=axes[:, -2],
              shrink=min(1, 2.5 / len(crops)))
    return figure


# ---------------------------------------------------------------- distribution

def draw_distribution(axis, aggregated, colors=None):
    """Fig. 4: the distribution of tokens' aggregated attention, the bins' borders, the shares in 0.5 to 2.

    aggregated: {network: values}, any shape. The axis is logarithmic, so 0.5 and 2 are equally far from 1;
    values beyond it are drawn at its ends.
    """
    colors = colors or network_colors(aggregated)
    edges = np.geomspace(2.0 ** -4, 2.0 ** 4, 65)
    for network, values in aggregated.items():
        values = np.asarray(values).ravel()
        middle = dirl.attention_bins(torch.from_numpy(values))[1]
        axis.hist(values.clip(edges[0], edges[-1]), edges, weights=np.full(len(values), 100 / len(values)),
                  histtype="step", lw=1.4, color=colors.get(network), label=f"{network}: {middle:.1%}")
    axis.set_xscale("log", base=2)
    for border in (0.5, 2):
        axis.axvline(border, color="grey", ls=":", lw=1)
    axis.set_xticks([2.0 ** k for k in range(-4, 5, 2)] + [0.5, 2],
                    ["1/16", "1/4", "1", "4", "16", "1/2", "2"])
    axis.set(xlabel="aggregated attention of a token", ylabel="tokens in each of 64 bins, %")
    axis.legend(title="between 0.5 and 2", fontsize=8, title_fontsize=8, **BESIDE)


def draw_fig_4(aggregated, title):
    """Returns Fig. 4 of one or more encoders, {network: values of aggregated attention}."""
    figure = Figure(figsize=(6.2, 3.2), layout="constrained")
    axis = figure.subplots()
    draw_distribution(axis, aggregated)
    axis.set_title(title, fontsize=9)
    return figure


# ---------------------------------------------------------------- a slide

def draw_truth(axis, legend, corners, side, truth):
    """Fills each tile with its kind's colour, outlines the telling ones; the legend goes to an axis below."""
    drawn = {}  # {label: patch}
    for corner, (kind, telling) in sorted(zip(corners.tolist(), truth), key=lambda tile: tile[1][1]):
        style = dict(facecolor=KIND_COLORS[kind], edgecolor="black" if telling else "grey", alpha=0.8,
                     lw=2.5 if telling else 0.5)
        drawn[kind + ", telling" * telling] = axis.add_patch(Rectangle(corner, side, side, **style))
    axis.set_title("truth: what fills most of a tile", fontsize=9)
    legend.legend(drawn.values(), drawn.keys(), fontsize=7, ncols=3, loc="upper center", borderaxespad=0)


def plot_slide(picture, corners, side, attention, truth, title, path):
    """Writes a slide, DSMIL's attention over its tiles, and the truth of the tiles as a .png.

    picture uint8 (h, w, 3); corners (N, 2) and side of the tiles in its px; attention: {network: (N,)};
    truth: [(kind, is it telling), ...] of the tiles, or None.
    """
    count = 1 + len(attention) + bool(truth)
    columns = min(3, count)
    lines = -(-count // columns)
    height = 3.6 * picture.shape[0] / picture.shape[1]
    figure = Figure(figsize=(3.6 * columns, (height + 0.2) * lines + 0.7), layout="constrained")
    axes = figure.subplots(lines + 1, columns, height_ratios=[height] * lines + [0.12])
    for axis in axes.flat:
        axis.set_axis_off()
    panels = axes[:-1].flatten()[:count]
    below = axes[-1]
    for axis in panels:
        axis.imshow(picture)
    panels[0].set_title(title, fontsize=9, parse_math=False)

    for axis, (network, values) in zip(panels[1:], attention.items()):
        heat = stitch(values[:, None] / values.max(), corners, side, 1, picture.shape[:2])
        shown = axis.imshow(heat, HEAT, interpolation="nearest", alpha=0.7, vmin=0, vmax=1)
        axis.set_title(f"DSMIL's attention, {network}", fontsize=9)
    below[1].set_axis_on()
    add_scale(figure, shown, "attention of a tile / the slide's largest", cax=below[1],
              orientation="horizontal")
    if truth:
        draw_truth(panels[-1], below[-1], corners, side, truth)
    for axis in panels:
        axis.set(xlim=(0, picture.shape[1]), ylim=(picture.shape[0], 0))
    save_figure(figure, path)


def stitch(values, corners, side, unit, shape):
    """Returns the values (N, n) of N tiles' n = g x g tokens as a picture (h, w), NaN outside of the tiles.

    corners (N, 2) as x, y and side: the tiles in level-0 px; unit: level-0 px that a px of the picture spans.
    A px takes the value of the token that its middle lies in. n = 1: one value per tile.
    """
    out = np.full(shape, np.nan, np.float32)
    grid = int(values.shape[1] ** 0.5)
    for tile, corner in zip(np.reshape(values, (-1, grid, grid)), corners):
        axes = []
        for low, size in zip(corner, shape[::-1]):  # x, then y
            first, end = (int(np.ceil(edge / unit - 0.5)) for edge in (low, low + side))
            px = np.arange(max(0, first), min(size, end))
            axes.append((px, np.clip((((px + 0.5) * unit - low) / side * grid).astype(int), 0, grid - 1)))
        (x, column), (y, row) = axes
        out[np.ix_(y, x)] = tile[np.ix_(row, column)]
    return out


def draw_maps(picture, maps, title):
    """Returns the slide next to each network's maps over it: {network: {title: (h, w) in even shares}}."""
    columns = 1 + max(map(len, maps.values()))
    height = 4 * picture.shape[0] / picture.shape[1]
    figure = Figure(figsize=(4 * columns, (height + 0.35) * len(maps) + 0.8), layout="constrained")
    axes = figure.subplots(len(maps), columns, squeeze=False)
    for line, (network, of_network) in zip(axes, maps.items()):
        for axis in line:
            axis.imshow(picture)
            axis.set_axis_off()
        line[0].set_title(title, fontsize=9, parse_math=False)
        for axis, (map_title, values) in zip(line[1:], of_network.items()):
            shown = axis.imshow(values, HEAT, alpha=0.65, vmin=0, vmax=BRIGHTEST, interpolation="nearest")
            axis.set_title(f"{network}: {map_title}", fontsize=9)
    add_scale(figure, shown, "attention (even share: 1)", "max", ax=axes, location="bottom", shrink=0.4,
              aspect=30)
    return figure
