"""Tiles and cells of a data set, computed once and kept under datasets/<name>/ (layout: docs/data.md).

Tiles at 2 um/px are crops/2um/<slide>/<x>_<y>.jpg, with crops/2um/<slide>.json next to them; cells/ are in
level-0 px. What was computed from another file or with other settings is recomputed or refused, never used.
"""
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.errors import InputError, check_mpp, printable
from common.files import atomic_write, read_json, read_npz
from common.flags import MAX_GIGAPIXELS
from common.pool import call, in_processes
from prior import segment_nuclei
from wsi.cell_files import cell_files, is_builtin, unused_cell_files, whose_cells
from wsi.cells import READERS, read_cells
from wsi.datasets import NO_CELLS
from wsi.folders import not_read
from wsi.pixels import is_grey, read_image
from wsi.sanity import MISPLACED, open_slide, read_slide_cells, what_is_odd
from wsi.segment import save_cells, segment_slides, source_of
from wsi.slides import CROP, Slide, cut_tiles, file_identity


def prepare(data, tissue=0.5, workers=2, gigapixels=MAX_GIGAPIXELS):
    """Cuts the missing tiles and finds the missing cells; returns a line for each image that was skipped."""
    if data.prior == "auto":
        print(whose_cells(data))
    if data.kind == "crops":
        return prepare_crop_cells(data, workers)
    skipped = prepare_tiles(data, tissue, workers, gigapixels)
    return skipped if data.prior == NO_CELLS else skipped + prepare_cells(data, workers)


def warn_of_cell_files(data):
    """Prints a warning for files of cells/ that match no image, and for those that another file hides."""
    for line in unused_cell_files(data):
        print("warning:", printable(line))


def keep_shard(data, shard):
    """Keeps only the slides of a shard "i/n", every n-th, in a data set, or all for None."""
    if shard and data.kind != "slides":
        raise InputError(f"--shard: {data.source} holds crops and no slides; leave the flag out")
    numbers = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", shard or "0/1")
    if not numbers or int(numbers[1]) >= int(numbers[2]):
        raise InputError(f"--shard {shard}: two numbers are expected, 0/8 to 7/8 for eight shards")
    names = sorted(data.images)[int(numbers[1])::int(numbers[2])]
    data.images = {name: data.images[name] for name in names}


def need_mpp(data):
    """InputError if the um/px of the crops is unknown."""
    if data.mpp is None:
        raise InputError(f"--data {data.source}: give the um/px of its crops with --mpp "
                         "(2.0 is 5x, 1.0 10x, 0.5 20x)")


USUAL_SHARE = (0.05, 0.8)  # of patches with a cell
USUAL_DENSITY = (100, 20_000)  # nuclei per mm2 of tissue


def describe_cells(count, crops, share, mpp, outside=0):
    """Returns a line on cells in crops at mpp um/px, or two with a warning.

    share: of the patches that hold a cell; outside: the number of further cells that are outside their crop.
    """
    density = count / (crops * (CROP * mpp / 1000) ** 2)  # per mm2
    line = f"{count} cells in {crops} crops, {density:.0f} per mm2; a cell in {share:.1%} of the patches"
    if outside > MISPLACED * (count + outside):
        return (f"{line}\nwarning: {outside} more cells lie outside of their crop; are they in px of the "
                "slide?")
    if not USUAL_DENSITY[0] <= density <= USUAL_DENSITY[1]:
        return (f"{line}\nwarning: tissue has {USUAL_DENSITY[0]:,} to {USUAL_DENSITY[1]:,} nuclei per mm2; "
                "are the um/px right, and is the stain H&E? python data.py look SLIDE shows it")
    if not USUAL_SHARE[0] <= share <= USUAL_SHARE[1]:
        return (f"{line}\nwarning: nearly all patches are in one region, so that P_c says little, as "
                "in dense tissue at 5x; try a finer --mpp (of slides), smaller crops, or another --prior")
    return line


# ---------------------------------------------------------------- tiles

def tiles_folder(data):
    """Returns the folder of the tiles at the data set's um/px; each um/px has its own."""
    return data.work / "crops" / f"{data.mpp:g}um"


def tile_info(data, name):
    """Returns what a slide's tiles were cut from and with; None without tiles, or if their input has changed.

    "side" is a tile's side in level-0 px. The input has changed if the slide's file has another name, size or
    hash, or if --slide-mpp or labels.csv give other um/px than it was cut with. Without some of its tiles, as
    after a partial copy, a slide is cut again.
    """
    info = read_json(tiles_folder(data) / f"{name}.json") if data.mpp else {}
    if "bounds" not in info or not file_identity(data.images[name]).items() <= info.items():
        return None
    if len(tiles_in(tiles_folder(data) / name)) != info["tiles"]:
        return None
    used, source = info["slide_mpp"], info["mpp_source"]
    if data.said_mpp(name) != (used if source == "labels.csv" else None):
        return None
    if source == "--slide-mpp" and data.slide_mpp not in (None, used):
        return None
    return info | {"side": CROP * info["mpp"] / used}


def tiles_in(folder):
    """Returns the names of the tiles in a slide's folder, <x>_<y>.jpg and no stray files, sorted."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(name for name in names if re.fullmatch(r"\d+_\d+\.jpg", name))


def tile_infos(data):
    """Returns {slide: tile_info} of the slides that have tiles."""
    infos = {name: tile_info(data, name) for name in sorted(data.images)}
    return {name: info for name, info in infos.items() if info}


def cut(path, slide_mpp, said_mpp, gigapixels, crops, mpp, tissue):
    """Cuts the tiles of a slide; returns what is odd about the slide, a list of texts."""
    slide = open_slide(path, slide_mpp, said_mpp, gigapixels)
    cut_tiles(slide, crops, mpp, tissue)
    return what_is_odd(slide)


def prepare_tiles(data, tissue=0.5, workers=2, gigapixels=MAX_GIGAPIXELS):
    """Cuts the slides that have no tiles yet; returns a line for each slide that was skipped.

    InputError if no slide can be used, or if tiles were cut with another --tissue.
    """
    need_mpp(data)
    others = not_read(data.source)
    if others:
        print(printable(f"warning: {len(others)} files or folders look like slides and are not read; "
                        f"python data.py check names each: {others[0]}"))
    folder = tiles_folder(data)
    tasks = []
    for name, path in data.images.items():
        info = tile_info(data, name)
        if info is None:
            tasks.append((path, data.slide_mpp, data.said_mpp(name), gigapixels, folder, data.mpp, tissue))
        elif info["tissue"] != tissue:
            raise InputError(f"{folder / name}: cut with --tissue {info['tissue']:g} (now {tissue:g}); "
                             f"use the same, or delete {folder}")
    failed = []
    for (path, *_), odd, error in in_processes(cut, tasks, workers, "tiles, slides"):
        if error:
            failed.append(error)
        if odd:
            tqdm.write(printable(f"warning: {path}: {'; '.join(odd)}"))
    if len(failed) == len(data.images):
        raise InputError(f"no slide could be used: {failed[0]}")
    return failed


# ---------------------------------------------------------------- cells of slides

def made_from(data, name, cells):
    """Returns what an image's cells are computed from, a text that is kept with them and compared later.

    It holds the file of cells with its size, time and the version of the readers, or the detector and its
    version; and the image's file and um/px.
    """
    mpp = round(data.mpp, 6) if data.kind == "crops" else tile_info(data, name)["slide_mpp"]
    if cells is None or is_builtin(data, cells):
        return source_of(data.images[name], mpp)
    status = cells.stat()
    file = f"{cells.name} {status.st_size} {status.st_mtime_ns}, readers {READERS}"
    return source_of(data.images[name], mpp, file, None)


def level0_copy(data, name):
    """Returns the file that keeps the cells of a user's file in level-0 px."""
    return data.work / "cells" / "level0" / data.prior / f"{name}.npz"


def copy_level0(file, copy, path, slide_mpp, source):
    """Reads a cell file once and writes its cells in level-0 px, with the warning that it returns."""
    xy, odd = read_slide_cells(file, Slide(path, said_mpp=slide_mpp))
    save_cells(copy, xy, source, odd=odd)
    return odd


def kept_cells(data, name, file):
    """Returns what save_cells wrote of a slide's cell file; None if prepare has to run first."""
    if file is None or tile_info(data, name) is None:
        return None
    kept = read_npz(file if is_builtin(data, file) else level0_copy(data, name))
    return kept if kept and str(kept.get("source")) == made_from(data, name, file) else None


def ready_cells(data, name, files=None):
    """Returns a slide's cells (K, 2) in level-0 px, by y; None before prepare. files: cell_files if known."""
    if data.prior == NO_CELLS:
        return np.zeros((0, 2))
    kept = kept_cells(data, name, (files or cell_files(data))[name])
    return np.stack([kept["x"], kept["y"]], 1).astype(np.float64) if kept else None


def prepare_cells(data, workers=2):
    """Finds or reads the cells of slides that have tiles; returns a line for each slide that was skipped."""
    files = cell_files(data)
    tiled = tile_infos(data)
    to_read = []
    to_detect = []
    without_cells = []
    for name, info in tiled.items():
        if ready_cells(data, name, files) is not None:
            continue
        path, file = data.images[name], files[name]
        if file and not is_builtin(data, file):
            source = made_from(data, name, file)
            to_read.append((file, level0_copy(data, name), path, info["slide_mpp"], source))
        elif file or data.prior in ("auto", "builtin"):
            to_detect.append((path, info["slide_mpp"]))
        else:
            without_cells.append(path)
    advice = f"put them into {data.source}/cells/{data.prior}/, or use --prior builtin"
    if without_cells and len(without_cells) == len(tiled):
        raise InputError(f"--prior {data.prior}: no slide has such cells; {advice}")
    failed = [f"{path}: no cells of {data.prior}; {advice}" for path in without_cells]
    for (file, _, path, *_), odd, error in in_processes(copy_level0, to_read, workers, "cells, files"):
        if error:
            failed.append(error)
        if odd:
            tqdm.write(printable(f"warning: {path}: {file}: {odd}"))
    return failed + list(segment_slides(to_detect, "builtin", data.work / "cells", workers).values())


# ---------------------------------------------------------------- ready-cut crops and their cells

class CropCells(NamedTuple):
    """What is kept of a ready-cut crop."""

    side: int  # px in its file
    grey: bool  # has no colour
    xy: np.ndarray  # its cells (K, 2) in px of its CROP px square


def read_square(path):
    """Returns the image of a crop at the file's own size; InputError if unreadable or not square."""
    image = read_image(path)
    if image.width != image.height:
        raise InputError(f"{path}: is {image.width:,} x {image.height:,} px, and crops are square; cut it to "
                         "a square, or put it in slides/ to have it cut into tiles")
    return image


def read_crop(path):
    """Returns a crop as an RGB image of CROP px a side, and its side in the file."""
    try:
        image = read_square(path)
    except InputError as error:
        is_tile = Path(f"{Path(path).parent}.json").is_file()
        raise InputError(f"{error}; delete it, and its slide is cut again" if is_tile else error) from None
    side = image.width
    if side != CROP:
        image = image.resize((CROP, CROP), Image.BICUBIC)
    return image, side


def cells_of_crop(path, mpp, cells):
    """Returns the CropCells of an image file: from a file of cells, or by the detector on the file's own px.

    mpp: um/px of the image file, None with NO_CELLS. cells: the file of cells, or None.
    """
    image = read_square(path)
    pixels = np.asarray(image)
    if mpp is None:
        xy = np.zeros((0, 2))
    elif cells is None:
        xy = segment_nuclei(pixels, mpp)
    else:
        xy = read_cells(cells, slide_mpp=mpp, slide_size=image.size)
    return CropCells(image.width, is_grey(pixels), xy * (CROP / image.width))


def usual_side(sides):
    """Returns the most common of crops' sides, the larger of two that tie; None without crops."""
    counts = Counter(sides)
    return max(counts, key=lambda side: (counts[side], side), default=None)


def crop_sides(data):
    """Returns {ready-cut crop: its side in px in its file} of those that prepare read, {} before prepare.

    The sides do not depend on the cells: without a file of the data set's prior, that of NO_CELLS is read.
    """
    for prior in (data.prior, NO_CELLS):
        kept = read_npz(crop_cells_file(data, prior), "names", "side")
        if kept:
            sides = zip(kept["names"].tolist(), kept["side"].tolist())
            return {name: side for name, side in sides if name in data.images}
    return {}


def crop_side(data):
    """Returns the side in px of a data set's ready-cut crops in their files; None before prepare.

    Crops of another side would have other um/px at CROP px: they are skipped.
    """
    return usual_side(crop_sides(data).values())


def usable_crops(data):
    """Returns the names of the ready-cut crops of the usual side; before prepare, of all crops."""
    usual = crop_side(data)
    return [name for name, side in crop_sides(data).items() if side == usual] or list(data.images)


def crop_mpp(data):
    """Returns the um/px of a data set's crops as the network sees them, CROP px a side."""
    return data.mpp * (crop_side(data) / CROP) if data.kind == "crops" else data.mpp


def file_mpp(data, mpp):
    """Returns the um/px that ready-cut crops have in their files if the network sees mpp; None if unknown."""
    side = crop_side(data)
    return mpp / (side / CROP) if side and mpp else None


def other_sides(paths, sides):
    """Returns a line for each crop whose side is not the usual one."""
    usual = usual_side(sides)
    return [f"{path}: is {side:,} px a side, and most of the other crops are {usual:,}, so that their um/px "
            f"at {CROP} px would differ; put it in its own folder"
            for path, side in zip(paths, sides) if side != usual]


def describe_side(side, mpp):
    """Returns a text on what crops of that side at mpp um/px become."""
    return (f"{side:,} px crops at {mpp:g} um/px become {CROP} px at {mpp * side / CROP:.4g}; to cut them "
            "into tiles put them in slides/")


def warn_of_grey(grey, source=""):
    """Prints a warning if most crops have no colour; grey: whether each has none; source: where they are."""
    if 2 * sum(grey) > len(grey):
        print(f"warning: {source}{sum(grey):,} of {len(grey):,} crops have no colour; H&E is needed")


def crop_cells_file(data, prior):
    """Returns the file that keeps all cells of a data set's crops by a prior."""
    return data.work / "cells" / f"crops_{prior}.npz"


def prepare_crop_cells(data, workers):
    """Finds or reads the cells of the crops that have none yet, or whose cells came from another file.

    All are kept in one file, cells/crops_<prior>.npz: x, y in px of the CROP px square and each cell's crop;
    the crops' names, sides, whether they are grey, and what their cells were computed from. Returns a line
    for each crop that was skipped.
    """
    need_mpp(data)
    done = kept_crops(data)
    files = cell_files(data)
    tasks = {}
    failed = []
    mpp = None if data.prior == NO_CELLS else data.mpp
    for name in sorted(data.images.keys() - done.keys()):
        if files[name] or data.prior in ("auto", "builtin", NO_CELLS):
            tasks[data.images[name], mpp, files[name]] = name
        else:
            failed.append(f"{data.images[name]}: no cells of {data.prior}; "
                          f"put them into {data.source}/cells/{data.prior}/")
    for task, result, error in in_processes(cells_of_crop, list(tasks), workers, "cells, crops"):
        if error:
            failed.append(error)
        else:
            done[tasks[task]] = result
    if not done:
        raise InputError(f"no crop could be used: {failed[0]}")
    if tasks:
        write_crop_cells(data, done, files)
    side = crop_side(data)
    if side != CROP:
        print(describe_side(side, data.mpp))
        check_mpp(crop_mpp(data), f"{data.source}: its crops at {CROP} px have um/px")
    warn_of_grey([crop.grey for crop in done.values()], f"{data.source}: ")
    return failed + other_sides([data.images[name] for name in done], [crop.side for crop in done.values()])


def write_crop_cells(data, done, files):
    """Writes crop_cells_file. done: {crop: its CropCells}; files: {crop: its file of cells, or None}."""
    crops = done.values()
    xy = np.concatenate([crop.xy for crop in crops])
    xy = np.clip(xy, -1e9, 1e9).astype(np.float32)
    owner = np.repeat(np.arange(len(done)), [len(crop.xy) for crop in crops])
    source = [made_from(data, name, files[name]) for name in done]
    with atomic_write(crop_cells_file(data, data.prior)) as temp, open(temp, "wb") as file:
        np.savez_compressed(file, x=xy[:, 0], y=xy[:, 1], crop=owner, names=list(done), source=source,
                            side=[crop.side for crop in crops], grey=[crop.grey for crop in crops])


def kept_crops(data):
    """Returns {crop: its CropCells} of the kept cells that were computed from the files found now.

    {} if the um/px that they were found at are unknown.
    """
    if data.mpp is None:
        return {}
    kept = read_npz(crop_cells_file(data, data.prior), "x", "y", "crop", "names", "source", "side", "grey")
    if kept is None:
        return {}
    xy = np.stack([kept["x"], kept["y"]], 1)
    names, source, side, grey = (kept[key].tolist() for key in ("names", "source", "side", "grey"))
    ends = np.searchsorted(kept["crop"], range(len(names) + 1))
    files = cell_files(data)
    out = {}
    for i, name in enumerate(names):
        if name in files and source[i] == made_from(data, name, files[name]):
            out[name] = CropCells(side[i], grey[i], xy[ends[i]: ends[i + 1]])
    return out


def read_crop_cells(data):
    """Returns {crop: cells (K, 2) in px of its CROP px square} of the kept crops that have the usual side."""
    side = crop_side(data)
    return {name: crop.xy for name, crop in kept_crops(data).items() if crop.side == side}


# ---------------------------------------------------------------- images in memory

def load_crops(paths, workers):
    """Returns images uint8 (N, 3, CROP, CROP), the indices of the paths read, a line for each other path.

    Prints a warning if their sides in the files differ, or if most of them have no colour.
    """
    images = torch.empty(len(paths), 3, CROP, CROP, dtype=torch.uint8)

    def load(path, i):
        image, side = read_crop(path)
        pixels = np.array(image)
        images[i] = torch.from_numpy(pixels).permute(2, 0, 1)
        return i, side, is_grey(pixels)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        loading = pool.map(lambda i: call(load, (paths[i], i)), range(len(paths)))
        results = list(tqdm(loading, "images", len(paths), leave=False))
    failed = [error for _, error in results if error]
    loaded = [result for result, _ in results if result]
    counts = sorted(Counter(side for _, side, _ in loaded).items())
    if len(counts) > 1:
        listed = ", ".join(f"{side:,} px ({count:,})" for side, count in counts)
        print(f"warning: images of {listed} a side all become {CROP} px, so their um/px differ")
    warn_of_grey([grey for _, _, grey in loaded])
    read = [i for i, _, _ in loaded]
    return (images[read] if failed else images), read, failed
