"""python data.py look SLIDE: a slide, its tissue, its tiles and some of them with their cells."""
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.errors import InputError, check_mpp, check_ranges
from common.figures import save_figure
from common.parallel import limits_of, time_limit
from prior import bin_centroids
from wsi.cells import read_cells
from wsi.plausible import NUCLEUS, misplaced, what_is_odd, where_cells_are_odd
from wsi.prepare import describe_cells, read_slide_cells
from wsi.segment import segment_slides
from wsi.slides import CROP, MASK_MPP, SLIDE_TYPES, cut_tiles, find_slides, slide_name, tissue_mask

SHOWN = 3  # tiles that are drawn large
USUAL = sum(NUCLEUS) / 2  # um, diameter of the circle that is drawn beside the cells


def cells_of(slide, args, limits):
    """Returns the cells (K, 2) of a slide in level-0 px: those of --cells, or the built-in detector's."""
    if args.cells:
        xy = read_slide_cells(args.cells, slide)
        odd = where_cells_are_odd(*misplaced(xy, slide), args.cells)
        if odd:
            print(f"warning: {slide.path}: {odd}")
        return xy
    with tempfile.TemporaryDirectory() as folder:
        tasks = [(slide.path, slide.mpp)]
        for error in segment_slides(tasks, "builtin", Path(folder), args.workers, limits).values():
            raise InputError(error)
        return read_cells(Path(folder) / "builtin" / f"{slide_name(slide.path)}.npz")


def chosen_tiles(corners, side, counts, points):
    """Indices of the tiles that hold the points ("x,y" in level-0 px); without points, of SHOWN tiles.

    InputError for a point that is no two numbers or lies in no tile.
    """
    if not points:
        ranks = np.linspace(0.5, 1, SHOWN) * (len(counts) - 1)
        return list(dict.fromkeys(np.argsort(counts, kind="stable")[ranks.astype(int)].tolist()))
    chosen = []
    for point in points:
        try:
            x, y = map(float, point.split(","))
        except ValueError:
            raise InputError(f"--tile {point}: x,y in level-0 px is expected, such as 1200,3400") from None
        inside = np.flatnonzero(((corners <= (x, y)) & ((x, y) < corners + side)).all(1))
        if not len(inside):
            raise InputError(f"--tile {point}: no tile there; lower --tissue, or take another point")
        chosen.append(int(inside[0]))
    return chosen


def look(args):
    """Draws a slide as training would cut it and prints its counts; gives the exit code."""
    check_mpp(args.mpp, "--mpp")
    check_mpp(args.slide_mpp, "--slide-mpp")
    check_ranges(args, tissue=(0, 1))
    path, mpp, limits = Path(args.slide), args.mpp or 2.0, limits_of(args)
    if path.is_dir():  # of a DICOM series
        path = next(iter(find_slides(path.iterdir()).values()), path)
    if path.suffix.lower() not in SLIDE_TYPES:
        raise InputError(f"{path}: not a slide ({' '.join(sorted(SLIDE_TYPES))})")
    with tempfile.TemporaryDirectory() as folder:
        with time_limit(limits.seconds, path):
            slide = cut_tiles(path, Path(folder), mpp, args.slide_mpp, args.tissue, None, limits.gigapixels)
        files = sorted((Path(folder) / slide_name(path)).glob("*.jpg"))
        corners = np.array([[int(v) for v in file.stem.split("_")] for file in files])
        xy, side = cells_of(slide, args, limits), CROP * mpp / slide.mpp  # level-0 px of a tile
        inside = [xy[((xy >= corner) & (xy < corner + side)).all(1)] for corner in corners]
        cells = [(found - corner) * (CROP / side) for found, corner in zip(inside, corners)]  # px of the tile
        priors = torch.stack([bin_centroids(found, CROP) for found in cells])
        shown = [(np.asarray(Image.open(files[i]).convert("RGB")), cells[i], priors[i], corners[i])
                 for i in chosen_tiles(corners, side, list(map(len, cells)), args.tile)]
    scale = f"{slide.mpp:g} um/px by {slide.source}"
    print(f"{path}: {slide.width} x {slide.height} px, {scale}")
    for odd in what_is_odd(slide):
        print(f"Warning: {odd}")
    print(f"{len(corners)} tiles at {mpp:g} um/px with {args.tissue:.0%} tissue;",
          describe_cells(sum(map(len, inside)), len(corners), priors.mean().item(), mpp))
    out = Path(args.out or f"runs/look_{slide_name(path)}.png")
    draw(slide, scale, corners, side, shown, mpp, out)
    print(f"Wrote {out}. If the tissue, the tiles or the cells are wrong, training learns from it: "
          "see --tissue, --mpp, --slide-mpp and --prior of train.py.")
    return 0


def squares(corners, side, **style):
    """Squares of that side with these upper left corners, as a collection of patches."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle
    return PatchCollection([Rectangle(corner, side, side) for corner in corners], **style)


def scale_bar(axis, um, um_per_px, width, height):
    """A bar of so many um in the lower left corner of a picture of width x height px."""
    left, length, y = 0.04 * width, um / um_per_px, 0.95 * height
    axis.plot([left, left + length], [y, y], color="black", linewidth=3, solid_capstyle="butt")
    axis.text(left, y - 0.02 * height, f"{um:g} um", fontsize=8, va="bottom",
              bbox=dict(facecolor="white", edgecolor="none", alpha=0.7, pad=1))


def round_length(um):
    """The longest of 1, 2, 5, 10, ... um that is at most um."""
    power = 10 ** np.floor(np.log10(um))
    return power * max(k for k in (1, 2, 5) if k * power <= um * 1.0001)


def draw(slide, scale, corners, side, shown, mpp, out):
    """One picture: the slide, its tissue and its tiles above; below, tiles with their cells and P_c.

    shown: [(tile, cells in its px, P_c, corner), ...]; the circle has the diameter of a usual nucleus.
    """
    from matplotlib.figure import Figure
    picture, unit = slide.picture(max(MASK_MPP, slide.mpp * max(slide.width, slide.height) / 2000))
    height = 4.5 * min(2, max(0.5, picture.shape[0] / picture.shape[1])) + 4.7
    figure = Figure(figsize=(13, height), layout="constrained")
    figure.suptitle(slide.path.name, fontsize=10)
    above, below = figure.subfigures(2, 1, height_ratios=(height - 4.7, 4.7))
    images = (picture, tissue_mask(picture, unit * slide.mpp), picture)
    titles = (scale, "tissue (white)", f"{len(corners)} tiles of {CROP} px at {mpp:g} um/px")
    axes = above.subplots(1, 3)
    for axis, image, title in zip(axes, images, titles):
        axis.imshow(image, cmap="gray")
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    rows, columns = picture.shape[:2]
    scale_bar(axes[0], round_length(columns * unit * slide.mpp / 4), unit * slide.mpp, columns, rows)
    axes[2].add_collection(squares(
        corners / unit, side / unit, facecolor="none", edgecolor="#00a040", linewidth=0.6))
    for (tile, cells, p_c, (x, y)), axis in zip(shown, below.subplots(1, max(3, len(shown)))):
        axis.set_title(f"tile {x},{y}: {len(cells)} cells, P_c in green", fontsize=10)
        draw_tile(axis, tile, cells, p_c, mpp)
    for axis in below.axes:
        axis.set_axis_off()
    save_figure(figure, out, dpi=100)


def draw_tile(axis, tile, cells, p_c, mpp):
    """A tile with its cells as crosses, its cell patches, a scale bar and a usual nucleus as a circle."""
    from matplotlib.patches import Circle
    grid = int(len(p_c) ** 0.5)
    p, patches = CROP / grid, p_c.nonzero().flatten().tolist()
    axis.imshow(tile)
    axis.add_collection(squares(
        [(i % grid * p - 0.5, i // grid * p - 0.5) for i in patches], p,
        facecolor=(0, 0.8, 0.2, 0.15), edgecolor=(0, 0.6, 0.2, 0.5), linewidth=0.5))
    axis.plot(cells[:, 0] - 0.5, cells[:, 1] - 0.5, "+", color="#d00000", markersize=6)
    scale_bar(axis, round_length(CROP * mpp / 4), mpp, CROP, CROP)
    axis.add_patch(Circle((0.92 * CROP, 0.92 * CROP), USUAL / mpp / 2, facecolor="none", linewidth=1.5,
                          edgecolor="black"))
    axis.text(0.98 * CROP, 0.88 * CROP - USUAL / mpp / 2, f"nucleus of {USUAL:g} um", fontsize=8, ha="right",
              va="bottom", bbox=dict(facecolor="white", edgecolor="none", alpha=0.7, pad=1))
