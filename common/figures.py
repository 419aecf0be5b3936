"""Figures of attention: its distribution (Fig. 4) and overlays on crops (Fig. 5)."""
import numpy as np
import torch
from PIL import Image

import dirl
from common.files import atomic_write


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
    """Fig. 4 of one encoder."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    draw_distribution(figure.subplots(), {title: aggregated})
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
            shown = axis.imshow(enlarge(heat[row], side), cmap="jet", alpha=0.5, vmin=0, vmax=3)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    figure.colorbar(shown, ax=axes[:, -1], shrink=0.6)
    save_figure(figure, path, dpi=110)


def spread(count, wanted):
    """Up to wanted of count indices, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist()
