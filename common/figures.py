"""Figures of attention: its distribution (Fig. 4), overlays on crops (Fig. 5) and on a slide.

Heat is drawn in viridis, whose brightness grows evenly and which colour-blind readers can read.
"""
import numpy as np
import torch
from PIL import Image

import dirl
from common.files import atomic_write

HEAT, BLUE, ORANGE = "viridis", "#0072B2", "#D55E00"
BRIGHTEST = 3  # times an even share of the attention: the end of the colours
KIND_COLOURS = ("#FFFFFF", "#F0E442", "#E69F00", "#BBBBBB", "#0072B2", "#CC79A7", "#56B4E9", "#009E73",
                "#D55E00")  # Okabe and Ito's


def save_figure(figure, path, dpi=130):
    with atomic_write(path) as temp:
        figure.savefig(temp, format="png", dpi=dpi)


def draw_distribution(axis, aggregated, colors=None):
    """Fig. 4: the distribution of tokens' aggregated attention, the bins' borders, the shares in 0.5 to 2.

    aggregated: {title: values}, any shape. The axis is logarithmic, so 0.5 and 2 are equally far from 1;
    values beyond it are drawn at its ends.
    """
    edges = np.geomspace(2.0 ** -4, 2.0 ** 4, 65)
    for title, values in aggregated.items():
        values = np.asarray(values).ravel()
        middle = dirl.attention_bins(torch.from_numpy(values))[1]
        axis.hist(values.clip(edges[0], edges[-1]), edges, weights=np.full(len(values), 100 / len(values)),
                  histtype="step", lw=1.4, color=(colors or {}).get(title), label=f"{title}: {middle:.1%}")
    axis.set_xscale("log", base=2)
    for border in (0.5, 2):
        axis.axvline(border, color="grey", ls=":", lw=1)
    axis.set_xticks([2.0 ** k for k in range(-4, 5, 2)] + [0.5, 2],
                    ["1/16", "1/4", "1", "4", "16", "1/2", "2"])
    axis.set(xlabel="aggregated attention of a token", ylabel="tokens, % (64 steps)")
    axis.legend(title="between 0.5 and 2", fontsize=8, title_fontsize=8)


def plot_distribution(aggregated, title, path):
    """Fig. 4 of one or more encoders: {name: values of aggregated attention}."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axis = figure.subplots()
    draw_distribution(axis, aggregated, dict(zip(aggregated, (BLUE, ORANGE))))
    axis.set_title(title, fontsize=9)
    save_figure(figure, path)


def plot_overlays(crops, attention, priors, path):
    """A row per crop: the crop, its patches with a cell (P_c), each encoder's aggregated attention over it.

    crops: images (3, H, H); attention: {title: (B, n)}; priors: P_c (n,) of each crop, or None without cells.
    """
    from matplotlib.figure import Figure
    titles = ["crop", *(["patches with a cell, P_c"] if priors is not None else []), *attention]
    figure = Figure(figsize=(2.2 * len(titles), 2.2 * len(crops)), layout="constrained")
    axes = figure.subplots(len(crops), len(titles), squeeze=False)

    def enlarge(values, side):
        grid = int(len(values) ** 0.5)
        small = Image.fromarray(values.view(grid, grid).numpy())
        return np.asarray(small.resize((side, side), Image.NEAREST))
    for row, image in enumerate(crops):
        side = image.shape[-1]
        for axis in axes[row]:
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set_axis_off()
        if priors is not None:
            green = np.zeros((side, side, 4))
            green[..., 1], green[..., 3] = 0.8, 0.35 * enlarge(priors[row], side)
            axes[row, 1].imshow(green)
        for axis, heat in zip(axes[row, -len(attention):], attention.values()):
            shown = axis.imshow(enlarge(heat[row], side), cmap=HEAT, alpha=0.6, vmin=0, vmax=BRIGHTEST)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    bar = figure.colorbar(shown, ax=axes[:, -1], shrink=0.8)
    bar.set_label("aggregated attention of a token (even: 1)", fontsize=8)
    save_figure(figure, path, dpi=110)


def draw_truth(axis, corners, side, truth):
    """The kind of each tile in a colour, the telling ones outlined, with a legend (plot_slide)."""
    from matplotlib.patches import Rectangle
    colour, label = dict(zip(sorted({kind for kind, _ in truth}), KIND_COLOURS)), {}
    for corner, (kind, telling) in sorted(zip(corners.tolist(), truth), key=lambda tile: tile[1][1]):
        style = dict(facecolor=colour[kind], edgecolor="black" if telling else "grey", alpha=0.8,
                     lw=2.5 if telling else 0.5)
        label[kind + ", telling" * telling] = axis.add_patch(Rectangle(corner, side, side, **style))
    axis.set_title("truth: what fills most of a tile", fontsize=9)
    axis.legend(label.values(), label.keys(), fontsize=7, ncols=3, loc="upper center",
                bbox_to_anchor=(0.5, -0.02))


def plot_slide(picture, corners, side, attention, truth, title, path):
    """A slide, DSMIL's attention over its tiles, and the truth of the tiles.

    picture uint8 (h, w, 3); corners (N, 2) and side of the tiles in its px; attention: {network: (N,)};
    truth: [(kind, is it telling), ...] of the tiles, or None.
    """
    from matplotlib.figure import Figure
    panels, height = 1 + len(attention) + bool(truth), 3.6 * picture.shape[0] / picture.shape[1]
    figure = Figure(figsize=(3.6 * panels, height + 1.2), layout="constrained")
    axes = figure.subplots(1, panels)
    for axis in axes:
        axis.imshow(picture)
        axis.set_axis_off()
    axes[0].set_title(title, fontsize=9)

    column, row = (corners / side).round().astype(int).T
    for axis, (network, values) in zip(axes[1:], attention.items()):
        grid = np.full((row.max() + 1, column.max() + 1), np.nan)
        grid[row, column] = values / values.max()
        extent = (0, grid.shape[1] * side, grid.shape[0] * side, 0)
        shown = axis.imshow(grid, HEAT, extent=extent, interpolation="nearest", alpha=0.7, vmin=0, vmax=1)
        axis.set_title(f"DSMIL's attention, {network}", fontsize=9)
    bar = figure.colorbar(shown, ax=axes[1: 1 + len(attention)], location="bottom", shrink=0.6)
    bar.set_label("attention of a tile / the slide's largest", fontsize=8)
    if truth:
        draw_truth(axes[-1], corners, side, truth)
    for axis in axes:
        axis.set(xlim=(0, picture.shape[1]), ylim=(picture.shape[0], 0))
    save_figure(figure, path)


def spread(count, wanted):
    """Up to wanted of count indices, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist()
