"""From the cache to crops with their cells: which tiles a slide has, and which cells lie in each."""
from typing import NamedTuple

import numpy as np

from wsi.cache import read_crop_cells, ready_cells, tile_info, tiles_folder, tiles_in, usable_crops
from wsi.cell_files import cell_files
from wsi.slides import Slide


def crops_of(data, names, with_cells):
    """Yields (name, file, (x, y) in level-0 px, cells (K, 2) in px of the crop) of the images' crops.

    Images whose tiles or cells could not be prepared have none.
    """
    no_cells = np.zeros((0, 2))
    if data.kind == "crops":
        cells_of = read_crop_cells(data) if with_cells else dict.fromkeys(usable_crops(data), no_cells)
        for name in names:
            if name in cells_of:
                yield name, data.images[name], (0, 0), cells_of[name]
        return
    cells_in = cell_files(data) if with_cells else {}
    for name in names:
        info = tile_info(data, name)
        xy = ready_cells(data, name, cells_in) if with_cells else no_cells
        if info is None or xy is None:
            continue
        folder = tiles_folder(data) / name
        files = tiles_in(folder)
        corners = np.array([file.removesuffix(".jpg").split("_") for file in files]).astype(np.int64)
        scale = info["slide_mpp"] / info["mpp"]  # px of the crop in a level-0 px
        for file, corner, inside in zip(files, corners, cells_in_tiles(xy, corners, info["side"])):
            yield name, f"{folder}/{file}", corner.tolist(), ((inside - corner) * scale).astype(np.float32)


def cells_in_tiles(xy, corners, side):
    """Returns the cells in each square tile, sorted by x: [(K_i, 2), ...]; all in level-0 px.

    xy (K, 2) are sorted by y; corners (T, 2) are the tiles' upper left ones. A row of tiles is searched at
    once, which takes seconds for 10^6 tiles.
    """
    cells = [None] * len(corners)
    for top in np.unique(corners[:, 1]):
        first, last = np.searchsorted(xy[:, 1], (top, top + side))
        row = xy[first:last]
        row = row[row[:, 0].argsort()]
        tiles = np.flatnonzero(corners[:, 1] == top)
        lefts = corners[tiles, 0]
        firsts = np.searchsorted(row[:, 0], lefts)
        lasts = np.searchsorted(row[:, 0], lefts + side)
        for tile, first, last in zip(tiles, firsts, lasts):
            cells[tile] = row[first:last]
    return cells


class Picture(NamedTuple):
    """A slide on a page, with what places its tiles on it."""

    pixels: np.ndarray  # uint8 (h, w, 3)
    unit: float  # level-0 px that a px spans
    side: float  # of a tile in level-0 px
    bounds: tuple  # of the slide (Slide.bounds)


def picture_of(data, name, longer_side):
    """Returns the Picture of a slide that has tiles; longer_side: in px, about."""
    info = tile_info(data, name)
    slide = Slide(data.images[name], said_mpp=info["slide_mpp"])
    pixels, unit = slide.picture(max(info["width"], info["height"]) * slide.mpp / longer_side)
    return Picture(pixels, unit, info["side"], slide.bounds)
