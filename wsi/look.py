"""python data.py look SLIDE: a slide, its tissue, its tiles and some of them with their cells.

Of a folder: all of its slides in one picture (sheet.py).
"""
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.errors import InputError, check_mpp, check_ranges, exit_code_of
from common.figures import draw_prior, save_figure, squares
from common.pool import limits_of, time_limit
from prior import bin_centroids
from wsi.cache import describe_cells, read_slide_cells
from wsi.cells import read_cells
from wsi.folders import find_folder
from wsi.sanity import USUAL, misplaced, scale_suggested, what_is_odd, where_cells_are_odd
from wsi.segment import segment_slides
from wsi.sheet import draw_sheet
from wsi.slides import CROP, MASK_MPP, SLIDE_TYPES, cut_tiles, find_slides, slide_name, tissue_mask

SHOWN = 3  # tiles that are drawn large
CROSS = "#e00000"  # of cells
LABEL = dict(facecolor="white", edgecolor="none", alpha=0.8, pad=1)


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
    """Returns (index of a tile, point) for the tiles that hold the points ("x,y" in level-0 px).

    Without points, SHOWN tiles from the median to the largest count of cells, each with None for its point.
    InputError for a point that is no two numbers or lies in no tile.
    """
    if not points:
        ranks = np.linspace(0.5, 1, SHOWN) * (len(counts) - 1)
        tiles = dict.fromkeys(np.argsort(counts, kind="stable")[ranks.astype(int)].tolist())
        return [(i, None) for i in tiles]
    chosen = []
    for point in points:
        try:
            x, y = map(float, point.split(","))
        except ValueError:
            raise InputError(f"--tile {point}: x,y in level-0 px is expected, such as 1200,3400") from None
        inside = np.flatnonzero(((corners <= (x, y)) & ((x, y) < corners + side)).all(1))
        if not len(inside):
            raise InputError(f"--tile {point}: no tile there; lower --tissue, or take another point")
        chosen.append((int(inside[0]), (x, y)))
    return chosen


def look(args):
    """Draws a slide as training would cut it, or all slides of a folder; returns the exit code."""
    check_mpp(args.mpp, "--mpp")
    check_mpp(args.slide_mpp, "--slide-mpp")
    check_ranges(args, tissue=(0, 1))
    path, mpp, limits = Path(args.slide), args.mpp or 2.0, limits_of(args)
    if path.is_dir():
        slides = find_slides(path.iterdir())
        path = next(iter(slides.values()), path)
        if len(slides) != 1 or path.suffix.lower() != ".dcm":  # not one DICOM series
            return look_at_folder(Path(args.slide), mpp, args, limits)
    if path.suffix.lower() not in SLIDE_TYPES:
        raise InputError(f"{path}: not a slide ({' '.join(sorted(SLIDE_TYPES))})")
    with tempfile.TemporaryDirectory() as folder:
        with time_limit(limits.seconds, path), scale_suggested(path, limits.gigapixels):
            slide = cut_tiles(path, Path(folder), mpp, args.slide_mpp, args.tissue, None, limits.gigapixels)
        files = sorted((Path(folder) / slide_name(path)).glob("*.jpg"))
        corners = np.array([[int(v) for v in file.stem.split("_")] for file in files])
        xy, side = cells_of(slide, args, limits), CROP * mpp / slide.mpp  # level-0 px of a tile
        inside = [xy[((xy >= corner) & (xy < corner + side)).all(1)] for corner in corners]
        priors = torch.stack([bin_centroids((found - corner) * (CROP / side), CROP)
                              for found, corner in zip(inside, corners)])
        shown = []
        for i, point in chosen_tiles(corners, side, list(map(len, inside)), args.tile):
            tile = np.asarray(Image.open(files[i]).convert("RGB"))
            inset = close_up(slide, corners[i], side, inside[i], point)
            shown.append(Shown(tile, priors[i], inset, inside[i], corners[i], side))
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


def look_at_folder(folder, mpp, args, limits):
    """Draws the contact sheet of a folder's slides; returns the exit code."""
    for flag, value in (("--cells", args.cells), ("--tile", args.tile)):
        if value:
            raise InputError(f"{flag}: is of one slide, and {folder} is a folder; name the slide")
    found = find_folder(str(folder.resolve()), slide_mpp=args.slide_mpp)
    if found.kind != "slides":
        raise InputError(f"{folder}: holds crops, not slides; name one of them to see it")
    out = Path(args.out or f"runs/look_{found.name}.png")
    return exit_code_of(draw_sheet(found, mpp, args.tissue, args.workers, limits, out))


# ---------------------------------------------------------------- close-ups

INSET = 100  # um: side of the box that is shown at native resolution


@dataclass(frozen=True)
class Inset:
    """A square of a slide at level 0: RGB (h, w, 3), its corner and side in level-0 px."""

    image: np.ndarray
    corner: np.ndarray
    side: int


@dataclass(frozen=True)
class Shown:
    """A tile, RGB of CROP px, with its P_c, an inset and cells (K, 2); corner, side, cells in level-0 px."""

    tile: np.ndarray
    p_c: torch.Tensor
    inset: Inset
    cells: np.ndarray
    corner: np.ndarray
    side: float


def close_up(slide, corner, side, cells, point=None):
    """Returns the Inset of a tile about a point of it, or about the median of its cells, or its centre.

    corner, side, cells (K, 2), point: level-0 px.
    """
    length = min(side, INSET / slide.mpp)
    if point is None:
        point = np.median(cells, axis=0) if len(cells) else corner + side / 2
    best = np.clip(np.array(point) - length / 2, corner, corner + side - length)
    best = np.floor(best).astype(int)
    length = max(1, int(length))
    return Inset(np.asarray(slide.read_level(0, *best.tolist(), length, length)), best, length)


def inside_box(cells, corner, side):
    """Which cells (K, 2) lie in the square with that upper left corner: bool (K,)."""
    return ((cells >= corner) & (cells < np.add(corner, side))).all(1)


# ---------------------------------------------------------------- drawing

def scale_bar(axis, um, um_per_px, width, height):
    """A bar of so many um in the lower left corner of a picture of width x height px."""
    left, length, y = 0.04 * width, um / um_per_px, 0.95 * height
    for colour, linewidth in (("white", 6), ("black", 3)):
        axis.plot([left, left + length], [y, y], color=colour, linewidth=linewidth, solid_capstyle="butt",
                  zorder=4)
    axis.text(left, y - 0.02 * height, f"{um:g} um", fontsize=8, va="bottom", zorder=4, bbox=LABEL)


def round_length(um):
    """The longest of 1, 2, 5, 10, ... um that is at most um."""
    power = 10 ** np.floor(np.log10(um))
    return power * max(k for k in (1, 2, 5) if k * power <= um * 1.0001)


def draw(slide, scale, corners, side, shown, mpp, out):
    """One picture: the slide, its tissue and its tiles; the Shown tiles; below each its inset with cells."""
    from matplotlib.figure import Figure
    picture, unit = slide.picture(max(MASK_MPP, slide.mpp * max(slide.width, slide.height) / 2000))
    columns, close = max(3, len(shown)), 2 * 4.7
    height = 4.5 * min(2, max(0.5, picture.shape[0] / picture.shape[1])) + close
    figure = Figure(figsize=(13 * columns / 3, height), layout="constrained")
    figure.suptitle(slide.path.name, fontsize=11, x=0.01, ha="left")
    above, below = figure.subfigures(2, 1, height_ratios=(height - close, close))
    images = (picture, tissue_mask(picture, unit * slide.mpp), picture)
    titles = (scale, "tissue (white)", f"{len(corners)} tiles of {CROP} px at {mpp:g} um/px")
    axes = above.subplots(1, 3)
    for axis, image, title in zip(axes, images, titles):
        axis.imshow(image, cmap="gray")
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    rows, width = picture.shape[:2]
    scale_bar(axes[0], round_length(width * unit * slide.mpp / 4), unit * slide.mpp, width, rows)
    axes[2].add_collection(squares(
        corners / unit, side / unit, facecolor="none", edgecolor="#00a040", linewidth=0.6))
    axes = below.subplots(2, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, tile in enumerate(shown):
        x, y = tile.corner
        title = f"tile {x},{y}: {len(tile.cells)} cells; green: patches with a cell"
        axes[0, i].set_title(title, fontsize=10)
        draw_tile(axes[0, i], tile, mpp)
        count = draw_inset(axes[1, i], tile, mpp)
        axes[1, i].set_title(f"the box above, {slide.mpp:g} um/px: {count} cells", fontsize=10)
    save_figure(figure, out, dpi=100)


def draw_tile(axis, shown, mpp):
    """The Shown tile with its cell patches outlined, the box of its inset and a scale bar."""
    from matplotlib.patches import Rectangle
    px = CROP / shown.side  # of the tile, a level-0 px
    axis.imshow(shown.tile, extent=(0, CROP, CROP, 0))
    draw_prior(axis, shown.p_c, CROP)
    left, top = (shown.inset.corner - shown.corner) * px
    length = shown.inset.side * px
    axis.add_patch(Rectangle((left, top), length, length, facecolor="none", edgecolor="black", linewidth=2.5))
    scale_bar(axis, round_length(CROP * mpp / 4), mpp, CROP, CROP)
    axis.set(xlim=(0, CROP), ylim=(CROP, 0))


def draw_inset(axis, shown, mpp):
    """The Shown tile's inset: cells as crosses, a scale bar, a usual nucleus as a circle of its true size.

    Returns the number of cells in it.
    """
    from matplotlib.patches import Circle
    inset, unit = shown.inset, mpp * CROP / shown.side  # um of a level-0 px
    um = inset.side * unit
    cells = shown.cells[inside_box(shown.cells, inset.corner, inset.side)]
    x, y = ((cells - inset.corner) * unit).T
    axis.imshow(inset.image, extent=(0, um, um, 0))
    for colour, width, size in (("white", 2, 7.5), (CROSS, 1, 7)):
        axis.plot(x, y, "+", color=colour, markersize=size, markeredgewidth=width)
    scale_bar(axis, round_length(um / 4), 1, um, um)
    for colour, width in (("white", 3), ("black", 1.5)):
        axis.add_patch(Circle((0.92 * um, 0.92 * um), USUAL / 2, facecolor="none", linewidth=width,
                              edgecolor=colour, zorder=4))
    axis.text(0.98 * um, 0.9 * um - USUAL / 2, f"nucleus of {USUAL:g} um", fontsize=8, ha="right",
              va="bottom", zorder=4, bbox=LABEL)
    axis.set(xlim=(0, um), ylim=(um, 0))
    return len(cells)
