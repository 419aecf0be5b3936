"""python data.py look FOLDER: draws all slides of a folder in one picture, to see which one is odd."""
from dataclasses import dataclass
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from common.errors import printable
from common.figures import save_figure
from common.pool import in_processes
from wsi.sanity import open_slide
from wsi.slides import CROP, MASK_MPP, tissue_mask, tissue_shares

PER_PAGE = 60  # slides of a picture
COLUMNS = 6
THUMBNAIL = 360  # px of its longer side, at most


@dataclass(frozen=True)
class Overview:
    """A slide at a glance: thumbnail RGB (h, w, 3), its tissue (h, w), and about how many tiles it has."""

    thumbnail: np.ndarray
    tissue: np.ndarray
    tiles: int
    caption: str


def overview(path, slide_mpp, said_mpp, mpp, tissue, gigapixels):
    """Returns the Overview of a slide for tiles at mpp um/px with that share of tissue.

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
    return Overview(np.asarray(thumbnail), np.asarray(mask), tiles, caption)


def draw_sheet(found, cutting, out):
    """Draws the slides of a wsi.folders.Data, PER_PAGE to a picture, and prints a line for each.

    cutting: the look.Cutting. The second picture is <out>_2.png, and so on. Returns a line for each slide
    that cannot be used.
    """
    failed = []
    all_names = sorted(found.images)
    pages = [all_names[i: i + PER_PAGE] for i in range(0, len(all_names), PER_PAGE)]
    for number, names in enumerate(pages, 1):
        entries = overviews(found, names, cutting)
        for name, entry in entries.items():
            if isinstance(entry, Overview):
                print(printable(f"{found.images[name]}: {entry.caption}"))
            else:
                failed.append(f"{found.images[name]}: {entry}")
                print("skipped:", printable(failed[-1]))
        tiles = f"tiles of {CROP} px at {cutting.mpp:g} um/px"
        title = f"{found.source.name}: {len(found.images)} slides, {tiles}"
        if len(pages) > 1:
            title += f" (picture {number} of {len(pages)})"
        page = out if number == 1 else out.with_stem(f"{out.stem}_{number}")
        draw_page(title, entries, page)
        print(f"Wrote {page}.")
    return failed


def overviews(found, names, cutting):
    """Returns {name: its Overview, or why there is none} of slides."""
    tasks = {(found.images[name], found.slide_mpp, found.said_mpp(name), cutting.mpp, cutting.tissue,
              cutting.gigapixels): name for name in names}
    entries = {}
    for task, result, error in in_processes(overview, list(tasks), cutting.workers, "slides"):
        entries[tasks[task]] = result or error.removeprefix(f"{task[0]}: ")
    return {name: entries[name] for name in names}


def draw_page(title, entries, out):
    """Draws slides in rows. entries: as overviews returns them."""
    columns = min(COLUMNS, len(entries))
    rows = -(-len(entries) // columns)
    figure = Figure(figsize=(max(6, 2.6 * columns), 3.2 * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (name, entry) in zip(axes, entries.items()):
        label = fill(name if len(name) < 70 else name[:66] + "...", 34)
        if isinstance(entry, Overview):
            axis.imshow(entry.thumbnail)
            if entry.tissue.any() and not entry.tissue.all():
                axis.contour(entry.tissue, [0.5], colors="#00a040", linewidths=0.8)
            label += "\n" + fill(entry.caption, 34)
        else:
            axis.text(0.5, 0.5, fill(entry, 40), ha="center", va="center", fontsize=7, color="#d00000")
        axis.text(0.5, -0.02, label, transform=axis.transAxes, ha="center", va="top", fontsize=8,
                  parse_math=False)
    save_figure(figure, out, dpi=100)
