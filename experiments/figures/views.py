"""How often views have both regions (A.5, Fig. 14): over crop scales, at 5x and 10x.

    python -m experiments.figures.views --data demo [--mpp 2.0 1.0] [flags of train.py]

In a view of one region alone, tokens have nothing to attend to across regions (M_cross, eq. 4). Writes the
shares as a plot and as CSV; below the plot, views as the network sees them with their P_c.
"""
import sys
from dataclasses import replace

import torch
from matplotlib.figure import Figure

import train
from common.encoders import MEAN, STD
from common.errors import InputError, run_script
from common.figures import BESIDE, OTHER_COLORS, draw_crop, draw_prior
from common.flags import MPP, whole
from data import Draws, collate, make_views, random_boxes, spread
from dirl import regions_present
from experiments.figures import shared
from prior import view_prior
from wsi.slides import CROP
from wsi.splits import find_data

SCALES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LOCALS = 4  # local views to draw, at most


def arguments(argv):
    parser, add = shared.parser_of(
        "figures.views", "Share of views with cells and background, over crop scales.", allow_abbrev=False,
        epilog="All other flags are train.py's: --data, --prior, --global-size, --local-crops, --jitter, ...")
    add("--mpp", type=MPP, nargs="+", default=[2.0, 1.0], help="um/px to compare; 2.0 is 5x, 1.0 10x")
    add("--crops", type=whole(), default=2000, help="largest number of training crops; more is steadier")
    add("--show", type=whole(1, 20), default=2, help="how many crops of each um/px to draw views of")
    add("--out", type=shared.png, default="runs/views.png", help="the picture")
    args, rest = parser.parse_known_args(argv)
    args.settings = train.arguments(rest)
    return args


def region_shares(cells, scale, size, generator):
    """Returns the shares of views with both regions, cells alone, background alone; one view per crop.

    cells (B, K, 2) in px of the crops, NaN where a crop has fewer; scale: area of a view; size: its px.
    """
    boxes = random_boxes(len(cells), CROP, (scale, scale), Draws(generator))
    flip = torch.zeros(len(cells), dtype=torch.bool)
    has_cell, has_background = regions_present(view_prior(cells, boxes, flip, size))
    return [share.float().mean().item() for share in (has_cell & has_background, ~has_background, ~has_cell)]


def views_of(crops, augmentation, seed):
    """Returns for each crop (image (3, H, H), [(view (3, h, h) of 0 to 1, P_c), ...]).

    crops: [(image uint8 (3, H, H), its cells (K, 2)), ...]; augmentation: an Augmentation.
    """
    images, cells = collate(crops)
    views, priors = make_views(images, cells, torch.Generator().manual_seed(seed),
                               replace(augmentation, mean=(0, 0, 0), std=(1, 1, 1)))
    of_crop = [[] for _ in images]
    for views_of_size, priors_of_size in zip(views, priors):
        for view, prior in zip(views_of_size, priors_of_size):  # (B, 3, h, h), (B, n)
            for pairs, x, p in zip(of_crop, view, prior):
                pairs.append((x, p))
    return list(zip(images, of_crop))


def draw_shares(axis, rows, settings):
    """Draws the share of views with both regions over their scale: a colour per um/px, a style per size."""
    for color, mpp in zip(OTHER_COLORS, dict.fromkeys(row[0] for row in rows)):
        for style, kind in zip(("-", "--"), dict.fromkeys(row[1] for row in rows)):
            curve = [row for row in rows if row[:2] == (mpp, kind)]
            axis.plot([row[3] for row in curve], [100 * row[4] for row in curve], style, marker=".",
                      color=color, label=f"{mpp:g} um/px ({10 / mpp:g}x), {kind} views, {curve[0][2]} px")
    axis.axvspan(*settings.global_scale, color="grey", alpha=0.12, lw=0)
    axis.set(xlabel="area of the view, share of the crop (grey: the global views')",
             ylabel="views with both regions, %", ylim=(0, 103))
    axis.legend(fontsize=8, **BESIDE)


def run(args):
    settings = args.settings
    rows = []
    shown = {}  # {um/px: views_of some crops}
    augmentation = train.settings_of(settings, 1, MEAN, STD).augmentation
    augmentation = replace(augmentation, local_crops=min(augmentation.local_crops, LOCALS))
    for mpp in dict.fromkeys(args.mpp):
        found = find_data(settings.data, mpp, settings.prior, slide_mpp=settings.slide_mpp,
                          split=settings.split, drop_shared=settings.drop_shared)
        if found.kind != "slides":
            raise InputError(f"--data {settings.data}: ready-cut crops have one um/px; slides are needed")
        crops = shared.crops_of(found, found.split("train", "val"), settings)
        cells = [torch.from_numpy(crops.cells(i)) for i in spread(len(crops), args.crops)]
        cells = torch.nn.utils.rnn.pad_sequence(cells, True, float("nan"))  # (B, K, 2)
        generator = torch.Generator().manual_seed(settings.seed)
        sizes = {"global": settings.global_size}
        if settings.local_crops:
            sizes["local"] = settings.local_size
        for kind, size in sizes.items():
            for scale in SCALES:
                rows.append((mpp, kind, size, scale, *region_shares(cells, scale, size, generator)))
        priors = crops.priors()
        chosen = shared.choose_crops(crops, priors, args.show)
        shown[mpp] = views_of([crops[i] for i in chosen], augmentation, settings.seed)
        has_cell, has_background = regions_present(priors)
        print(f"{mpp:g} um/px: {(has_cell & has_background).float().mean():.1%} of {len(crops)} crops have "
              f"both regions, a cell in {priors.mean():.1%} of the patches")
    columns = 1 + len(next(iter(shown.values()))[0][1])
    lines = sum(map(len, shown.values()))
    width = max(8, 1.5 * columns)
    figure = Figure(figsize=(width, 3.4 + 1.75 * lines), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3.4, 1.75 * lines))
    draw_shares(above.subplots(), rows, settings)
    axes = iter(below.subplots(lines, columns, squeeze=False))
    for mpp, of_crops in shown.items():
        for (image, views), line in zip(of_crops, axes):
            draw_crop(line[0], image)
            line[0].set_title(f"crop, {mpp:g} um/px", fontsize=8)
            for k, (axis, (view, prior)) in enumerate(zip(line[1:], views)):
                draw_crop(axis, view)
                draw_prior(axis, prior, view.shape[-1])
                kind = "local" if k > 1 else "global"
                axis.set_title(f"{kind}, {prior.mean():.0%} cells", fontsize=8)
    header = ("um/px", "view", "px", "scale", "both regions", "cells alone", "background alone")
    shared.save_both(figure, [header, *rows], args.out)
    return 0


def main(argv=None):
    return run_script("views", lambda: run(arguments(argv)), "--crops")


if __name__ == "__main__":
    sys.exit(main())
