"""python data.py look SLIDE: a slide, its tissue, tiles and a tile with its cells, as training gets them."""
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.errors import InputError, check_mpp, check_ranges
from common.figures import save_figure
from prior import bin_centroids
from wsi.cells import read_cells
from wsi.prepare import describe_cells
from wsi.segment import segment_slides
from wsi.slides import CROP, MASK_MPP, SLIDE_TYPES, Slide, cut_tiles, find_slides, slide_name, tissue_mask


def cells_of(path, slide, args):
    """Cells (K, 2) of a slide in level-0 px: those of --cells, or the built-in detector's."""
    if args.cells:
        return read_cells(args.cells, slide.mpp, (slide.width, slide.height))
    with tempfile.TemporaryDirectory() as folder:
        for error in segment_slides([(path, args.slide_mpp)], "builtin", Path(folder), args.workers).values():
            raise InputError(error)
        return read_cells(Path(folder) / "builtin" / f"{slide_name(path)}.npz")


def look(args):
    """Draws a slide as training would cut it and prints its counts; gives the exit code."""
    check_mpp(args.mpp, "--mpp")
    check_mpp(args.slide_mpp, "--slide-mpp")
    check_ranges(args, tissue=(0, 1))
    path, mpp = Path(args.slide), args.mpp or 2.0
    if path.is_dir():  # of a DICOM series
        path = next(iter(find_slides(path.iterdir()).values()), path)
    if path.suffix.lower() not in SLIDE_TYPES:
        raise InputError(f"{path}: not a slide ({' '.join(sorted(SLIDE_TYPES))})")
    slide = Slide(path, args.slide_mpp)
    with tempfile.TemporaryDirectory() as folder:
        cut_tiles(path, Path(folder), mpp, args.slide_mpp, args.tissue)
        files = sorted((Path(folder) / slide_name(path)).glob("*.jpg"))
        corners = np.array([[int(v) for v in file.stem.split("_")] for file in files])
        xy, side = cells_of(path, slide, args), CROP * mpp / slide.mpp  # level-0 px of a tile
        inside = [xy[((xy >= corner) & (xy < corner + side)).all(1)] for corner in corners]
        cells = [(found - corner) * (CROP / side) for found, corner in zip(inside, corners)]  # px of the tile
        by_cells = np.argsort([len(found) for found in inside])
        shown = int(by_cells[len(inside) * 3 // 4])  # many cells, not the most
        tile = np.asarray(Image.open(files[shown]).convert("RGB"))
    priors = torch.stack([bin_centroids(found, CROP) for found in cells])
    print(f"{path}: {slide.width} x {slide.height} px, {slide.mpp:g} um/px by {slide.source}"
          + (f"; {slide.warning}" if slide.warning else ""))
    print(f"{len(corners)} tiles at {mpp:g} um/px with {args.tissue:.0%} tissue;",
          describe_cells(sum(map(len, inside)), len(corners), priors.mean().item(), mpp))
    out = Path(args.out or f"look_{slide_name(path)}.png")
    draw(slide, corners, side, tile, cells[shown], priors[shown], out)
    print(f"Wrote {out}. If the tissue, the tiles or the cells are wrong, training learns from it: "
          "see --tissue, --mpp, --slide-mpp and --prior of train.py.")
    return 0


def squares(corners, side, **style):
    """Squares of that side with these upper left corners, as a collection of patches."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle
    return PatchCollection([Rectangle(corner, side, side) for corner in corners], **style)


def draw(slide, corners, side, tile, cells, p_c, out):
    """Four pictures in one: slide, tissue mask, tile grid, a tile with its cells (px of the tile) and P_c."""
    from matplotlib.figure import Figure
    picture, unit = slide.picture(max(MASK_MPP, slide.mpp * max(slide.width, slide.height) / 2000))
    height = 13 * min(1.6, max(0.5, picture.shape[0] / picture.shape[1])) * 0.95
    figure = Figure(figsize=(13, height), layout="constrained")
    axes = figure.subplots(2, 2).flat
    images = (picture, tissue_mask(picture, unit * slide.mpp), picture, tile)
    titles = (slide.path.name, "tissue", f"{len(corners)} tiles", f"a tile: {len(cells)} cells, P_c in green")
    for axis, image, title in zip(axes, images, titles):
        axis.imshow(image, cmap="gray")
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    axes[2].add_collection(squares(
        corners / unit, side / unit, facecolor="none", edgecolor="#00a040", linewidth=0.6))
    grid = int(len(p_c) ** 0.5)
    p, patches = CROP / grid, p_c.nonzero().flatten().tolist()
    axes[3].add_collection(squares(
        [(i % grid * p - 0.5, i // grid * p - 0.5) for i in patches], p,
        facecolor=(0, 0.8, 0.2, 0.15), edgecolor=(0, 0.6, 0.2, 0.5), linewidth=0.5))
    axes[3].plot(cells[:, 0] - 0.5, cells[:, 1] - 0.5, "+", color="#d00000", markersize=7)
    save_figure(figure, out, dpi=100)
