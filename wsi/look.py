"""python data.py look SLIDE: draws a slide, its tissue, its tiles and some of them with their cells.

python data.py look FOLDER draws all slides of a folder in one picture, to see which one is odd.
"""
import tempfile
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from PIL import Image

from common.errors import InputError, exit_code_of, print_skipped, printable
from common.figures import draw_prior, save_figure, squares
from common.pool import in_processes
from prior import bin_centroids
from wsi.cache import describe_cells
from wsi.cells import read_cells
from wsi.folders import find_folder, mpp_in_table
from wsi.sanity import USUAL, open_slide, read_slide_cells, what_is_odd
from wsi.segment import segment_slides
from wsi.slides import CROP, MASK_MPP, SLIDE_TYPES, cut_tiles, slide_name, tissue_mask, tissue_shares

SHOWN = 3  # tiles that are drawn large
CROSS = "#e00000"  # color of cells
LABEL = dict(facecolor="white", edgecolor="none", alpha=0.8, pad=1)


@dataclass(frozen=True)
class Cutting:
    """How slides are cut into tiles; the first three are as in train.py."""

    mpp: float  # um/px of the tiles
    slide_mpp: float  # um/px of slides that record none, or None
    tissue: float  # minimum share of tissue in a tile
    workers: int
    gigapixels: float  # more px are refused


def cells_of_slide(slide, file, workers):
    """Returns the cells (K, 2) of a slide in level-0 px: those of a file, or the built-in detector's."""
    if file:
        xy, odd = read_slide_cells(file, slide)
        if odd:
            print(f"warning: {slide.path}: {file}: {odd}")
        return xy
    with tempfile.TemporaryDirectory() as folder:
        failed = segment_slides([(slide.path, slide.mpp)], "builtin", Path(folder), workers)
        if failed:
            raise InputError(failed[slide.path])
        return read_cells(Path(folder) / "builtin" / f"{slide_name(slide.path)}.npz")


def chosen_tiles(corners, side, counts, points):
    """Returns (index of a tile, point) for the tiles that hold the points ("x,y" in level-0 px).

    Without points, SHOWN tiles from the median to the largest count of cells, each with None as its point.
    InputError for a point that is not two numbers or lies in no tile.
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
            raise InputError(f"--tile {point}: no tile holds it; lower --tissue, or take another point")
        chosen.append((int(inside[0]), (x, y)))
    return chosen


def look(path, cutting, cells=None, points=None, out=None):
    """Draws a slide as training would cut it, or all slides of a folder; returns the exit code.

    cells: a segmentation result of the slide; points: texts "x,y" for chosen_tiles; out: the picture's name.
    """
    if not path.is_dir() and path.suffix.lower() not in SLIDE_TYPES:
        raise InputError(f"{path}: not a slide ({' '.join(sorted(SLIDE_TYPES))})")
    if not path.is_dir():
        look_at_slide(path, cutting, cells, points, out)
        return 0
    if cells or points:
        raise InputError(f"--cells, --tile: belong to one slide, and {path} is a folder; name the slide")
    found = find_folder(str(path.resolve()), slide_mpp=cutting.slide_mpp, has_classes=False)
    if found.kind != "slides":
        raise InputError(f"{path}: holds crops, not slides; name one of them to see it")
    return exit_code_of(draw_sheet(found, cutting, Path(out or f"runs/look_{found.name}.png")))


def look_at_slide(path, cutting, cells, points, out):
    """Cuts a slide into a temporary folder, finds its cells, draws it and prints what was found."""
    mpp = cutting.mpp
    slide = open_slide(path, cutting.slide_mpp, mpp_in_table(path), cutting.gigapixels)
    with tempfile.TemporaryDirectory() as folder:
        cut_tiles(slide, Path(folder), mpp, cutting.tissue)
        files = sorted((Path(folder) / slide_name(path)).glob("*.jpg"))
        corners = np.array([file.stem.split("_") for file in files]).astype(np.int64)
        side = CROP * mpp / slide.mpp  # of a tile, in level-0 px
        xy = cells_of_slide(slide, cells, cutting.workers)
        cells_of_tiles = [xy[inside_box(xy, corner, side)] for corner in corners]
        priors = torch.stack([bin_centroids((inside - corner) * (CROP / side), CROP)
                              for inside, corner in zip(cells_of_tiles, corners)])
        counts = [len(inside) for inside in cells_of_tiles]
        shown = []
        for i, point in chosen_tiles(corners, side, counts, points):
            tile = np.asarray(Image.open(files[i]).convert("RGB"))
            inset = close_up(slide, corners[i], side, cells_of_tiles[i], point)
            shown.append(Shown(tile, priors[i], cells_of_tiles[i], corners[i], side, *inset))
    scale = f"{slide.mpp:g} um/px by {slide.source}"
    print(f"{path}: {slide.width} x {slide.height} px, {scale}")
    for odd in what_is_odd(slide):
        print(f"warning: {odd}")
    print(f"{len(corners)} tiles at {mpp:g} um/px with {cutting.tissue:.0%} tissue;",
          describe_cells(sum(counts), len(corners), priors.mean().item(), mpp))
    out = Path(out or f"runs/look_{slide_name(path)}.png")
    draw(slide, scale, corners, side, shown, mpp, out)
    print(f"Wrote {out}. If the tissue, the tiles or the cells are wrong, correct them before training: "
          "see --tissue, --mpp, --slide-mpp and --prior of train.py.")


# ---------------------------------------------------------------- close-ups

INSET = 100  # um: side of the box that is shown at native resolution


@dataclass(frozen=True)
class Shown:
    """A tile (RGB, CROP px) and an inset, a square of it at level 0; corners, sides, cells in level-0 px."""

    tile: np.ndarray
    p_c: torch.Tensor
    cells: np.ndarray  # (K, 2)
    corner: np.ndarray
    side: float
    inset: np.ndarray  # RGB (h, w, 3)
    inset_corner: np.ndarray
    inset_side: int


def close_up(slide, corner, side, cells, point=None):
    """Returns an inset of a tile, its corner and side, around a point, its cells' median or its centre."""
    length = min(side, INSET / slide.mpp)
    if point is None:
        point = np.median(cells, axis=0) if len(cells) else corner + side / 2
    best = np.clip(np.array(point) - length / 2, corner, corner + side - length)
    best = np.floor(best).astype(int)
    length = max(1, int(length))
    return np.asarray(slide.read_level(0, *best.tolist(), length, length)), best, length


def inside_box(cells, corner, side):
    """Returns which cells (K, 2) lie in the square with that upper left corner: bool (K,)."""
    return ((cells >= corner) & (cells < np.add(corner, side))).all(1)


# ---------------------------------------------------------------- drawing

def scale_bar(axis, um, um_per_px, width, height):
    """Draws a scale bar of that length in the lower left corner of a picture of width x height px."""
    left = 0.04 * width
    right = left + um / um_per_px
    y = 0.95 * height
    for color, linewidth in (("white", 6), ("black", 3)):
        axis.plot([left, right], [y, y], color=color, linewidth=linewidth, solid_capstyle="butt", zorder=4)
    axis.text(left, y - 0.02 * height, f"{um:g} um", fontsize=8, va="bottom", zorder=4, bbox=LABEL)


def round_length(um):
    """Returns the longest of 1, 2, 5, 10, ... um that is at most um."""
    power = 10 ** np.floor(np.log10(um))
    return power * max(k for k in (1, 2, 5) if k * power <= um * 1.0001)


def draw(slide, scale, corners, side, shown, mpp, out):
    """Draws the slide, its tissue and tiles; the Shown tiles; below each its inset with cells."""
    picture, unit = slide.picture(max(MASK_MPP, slide.mpp * max(slide.width, slide.height) / 2000))
    rows, width = picture.shape[:2]
    columns = max(3, len(shown))
    height_above = 4.5 * min(2, max(0.5, rows / width))  # inches
    height_below = 2 * 4.7
    figure = Figure(figsize=(13 * columns / 3, height_above + height_below), layout="constrained")
    figure.suptitle(slide.path.name, fontsize=11, x=0.01, ha="left", parse_math=False)
    above, below = figure.subfigures(2, 1, height_ratios=(height_above, height_below))
    images = (picture, tissue_mask(picture, unit * slide.mpp), picture)
    titles = (scale, "tissue (white)", f"{len(corners)} tiles of {CROP} px at {mpp:g} um/px")
    axes = above.subplots(1, 3)
    for axis, image, title in zip(axes, images, titles):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
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
    """Draws the Shown tile with its cell patches outlined, the box of its inset and a scale bar."""
    px = CROP / shown.side  # px of the tile in a level-0 px
    axis.imshow(shown.tile, extent=(0, CROP, CROP, 0))
    draw_prior(axis, shown.p_c, CROP)
    left, top = (shown.inset_corner - shown.corner) * px
    length = shown.inset_side * px
    axis.add_patch(Rectangle((left, top), length, length, facecolor="none", edgecolor="black", linewidth=2.5))
    scale_bar(axis, round_length(CROP * mpp / 4), mpp, CROP, CROP)
    axis.set(xlim=(0, CROP), ylim=(CROP, 0))


def draw_inset(axis, shown, mpp):
    """Draws the Shown tile's inset: cells as crosses, a scale bar, a usual nucleus as a circle at true size.

    Returns the number of cells in it.
    """
    unit = mpp * CROP / shown.side  # um of a level-0 px
    um = shown.inset_side * unit
    cells = shown.cells[inside_box(shown.cells, shown.inset_corner, shown.inset_side)]
    x, y = ((cells - shown.inset_corner) * unit).T
    axis.imshow(shown.inset, extent=(0, um, um, 0))
    for color, width, size in (("white", 2, 7.5), (CROSS, 1, 7)):
        axis.plot(x, y, "+", color=color, markersize=size, markeredgewidth=width)
    scale_bar(axis, round_length(um / 4), 1, um, um)
    for color, width in (("white", 3), ("black", 1.5)):
        axis.add_patch(Circle((0.92 * um, 0.92 * um), USUAL / 2, facecolor="none", linewidth=width,
                              edgecolor=color, zorder=4))
    axis.text(0.98 * um, 0.9 * um - USUAL / 2, f"nucleus of {USUAL:g} um", fontsize=8, ha="right",
              va="bottom", zorder=4, bbox=LABEL)
    axis.set(xlim=(0, um), ylim=(um, 0))
    return len(cells)


# ---------------------------------------------------------------- all slides of a folder

PER_PAGE = 60  # slides of a picture
COLUMNS = 6
THUMBNAIL = 360  # px of its longer side, at most


def overview(path, slide_mpp, said_mpp, mpp, tissue, gigapixels):
    """Returns a slide's thumbnail RGB (h, w, 3), its tissue (h, w), and a caption with its number of tiles.

    Tiles are counted on a picture of MASK_MPP and not cut: the number may differ a little from what is cut.
    """
    slide = open_slide(path, slide_mpp, said_mpp, gigapixels)
    slide.check_target(mpp)
    picture, unit = slide.picture(max(MASK_MPP, slide.mpp))
    side = CROP * mpp / slide.mpp  # level-0 px of a tile
    edges = [np.arange(int(n / side + 1e-9) + 1) * side / unit for n in (slide.width, slide.height)]
    tiles = int((tissue_shares(picture, unit * slide.mpp, *edges) >= tissue).sum())
    thumbnail = Image.fromarray(picture)
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    mask = Image.fromarray(tissue_mask(picture, unit * slide.mpp)).resize(thumbnail.size)
    caption = f"tiles: about {tiles}; {slide.mpp:.3g} um/px by {slide.source}"
    return np.asarray(thumbnail), np.asarray(mask), caption


def draw_sheet(found, cutting, out):
    """Draws the slides of a wsi.folders.Data, PER_PAGE to a picture, and prints a line for each.

    The second picture is <out>_2.png, and so on. Returns a line for each slide that cannot be used.
    """
    failed = []
    all_names = sorted(found.images)
    pages = [all_names[i: i + PER_PAGE] for i in range(0, len(all_names), PER_PAGE)]
    for number, names in enumerate(pages, 1):
        tasks = [(found.images[name], found.slide_mpp, found.said_mpp(name), cutting.mpp, cutting.tissue,
                  cutting.gigapixels) for name in names]
        results = {}
        for (path, *_), seen, error in in_processes(overview, tasks, cutting.workers, "slides"):
            results[path] = seen, error
        entries = {}
        for name in names:
            path = found.images[name]
            seen, error = results[path]
            if error:
                failed.append(error)
                print_skipped([error])
                error = error.removeprefix(f"{path}: ")
            else:
                print(printable(f"{path}: {seen[-1]}"))
            entries[name] = seen, error
        tiles = f"tiles of {CROP} px at {cutting.mpp:g} um/px"
        title = f"{found.source.name}: {len(found.images)} slides, {tiles}"
        if len(pages) > 1:
            title += f" (picture {number} of {len(pages)})"
        page = out if number == 1 else out.with_stem(f"{out.stem}_{number}")
        draw_page(title, entries, page)
        print(f"Wrote {page}.")
    return failed


def draw_page(title, entries, out):
    """Draws slides in rows; entries: {name: (its overview or None, why there is none)}."""
    columns = min(COLUMNS, len(entries))
    rows = -(-len(entries) // columns)
    figure = Figure(figsize=(max(6, 2.6 * columns), 3.2 * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (name, (seen, error)) in zip(axes, entries.items()):
        label = fill(name if len(name) < 70 else name[:66] + "...", 34)
        if error:
            axis.text(0.5, 0.5, fill(error, 40), ha="center", va="center", fontsize=7, color="#d00000")
        else:
            thumbnail, mask, caption = seen
            axis.imshow(thumbnail)
            if mask.any() and not mask.all():
                axis.contour(mask, [0.5], colors="#00a040", linewidths=0.8)
            label += "\n" + fill(caption, 34)
        axis.text(0.5, -0.02, label, transform=axis.transAxes, ha="center", va="top", fontsize=8,
                  parse_math=False)
    save_figure(figure, out, dpi=100)
