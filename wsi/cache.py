"""Tiles and cells of a data set, made once under datasets/<name>/ (layout: docs/data.md).

crops/2um/<slide>/<x>_<y>.jpg (at 2 um/px) have crops/2um/<slide>.json beside them, and cells/ are in level-0
px. What was made from another file or with other settings than now is recomputed or refused, never used.
"""
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.errors import InputError, check_mpp, exit_code_of, print_skipped, printable
from common.files import atomic_write, read_json, read_npz
from common.pool import LIMITS, call, in_processes, limits_of, shard_of
from prior import segment_nuclei
from wsi.cell_files import cell_file, cell_files, unused_cell_files
from wsi.cells import READERS, read_cells
from wsi.folders import not_read, tell_source
from wsi.pixels import is_grey, read_image
from wsi.sanity import misplaced, scale_suggested, what_is_odd, where_cells_are_odd
from wsi.segment import save_cells, segment_slides, source_of
from wsi.slides import CROP, Slide, cut_tiles, file_identity


def prepare(data, tissue=0.5, workers=2, limits=LIMITS):
    """Cuts the tiles and finds the cells that are not there yet; one line for each image that was skipped."""
    if data.kind == "crops":
        return prepare_crop_cells(data, workers, limits)
    return prepare_tiles(data, tissue, workers, limits) + prepare_cells(data, workers, limits)


def warn_of_cell_files(data):
    """Prints a line on the files of cells/ that match no image, and on those that another one hides."""
    for line in unused_cell_files(data):
        print("warning:", printable(line))


def keep_shard(data, shard):
    """Leaves only the slides of a --shard in a data set, all for None; InputError if it holds crops."""
    if shard and data.kind != "slides":
        raise InputError(f"--shard: {data.source} holds crops and no slides; leave the flag out")
    data.images = {name: data.images[name] for name in shard_of(data.images, shard)}


def run_shard(data, args):
    """data.py prepare: prepare() of all images, or of a shard of the slides; gives the exit code."""
    warn_of_cell_files(data)  # before the other shards' slides are left out
    keep_shard(data, args.shard)
    failed = prepare(data, args.tissue, args.workers, limits_of(args)) if data.images else []
    print_skipped(failed)
    print(f"Prepared {len(data.images) - len(failed)} {data.kind} in {data.work}/. "
          f"Next: python train.py --data {args.data}")
    return exit_code_of(failed)


def need_mpp(data):
    """InputError if the um/px of the crops is not given."""
    if data.mpp is None:
        raise InputError(f"--data {data.source}: give the um/px of its crops with --mpp "
                         "(2.0 is 5x, 1.0 10x, 0.5 20x)")


USUAL_SHARE, USUAL_DENSITY = (0.05, 0.8), (100, 20_000)  # of patches with a cell; nuclei per mm2 of tissue


def describe_cells(count, crops, share, mpp):
    """One line on cells in crops of CROP px at mpp um/px, with a warning for what tissue does not have.

    share: of the patches that hold a cell.
    """
    density = count / (crops * (CROP * mpp / 1000) ** 2)  # per mm2
    line = f"{count} cells in {crops} crops, {density:.0f} per mm2; a cell in {share:.1%} of the patches"
    if not USUAL_DENSITY[0] <= density <= USUAL_DENSITY[1]:
        line += (". Warning: tissue has {:,} to {:,} nuclei per mm2; is the um/px right, and the stain H&E? "
                 "python data.py look SLIDE shows it").format(*USUAL_DENSITY)
    elif not USUAL_SHARE[0] <= share <= USUAL_SHARE[1]:
        line += (". Warning: P_c is nearly all one region and tells little apart, as in dense tissue at 5x; "
                 "try a finer --mpp (of slides), smaller crops, or another --prior")
    return line


# ---------------------------------------------------------------- tiles

TILES = ("file_name", "file_bytes", "file_hash", "mpp", "slide_mpp", "mpp_source", "tissue", "tiles", "width",
         "height", "power", "bounds")


def tiles_folder(data):
    """Where the tiles of a um/px are: several um/px of one slide can be side by side."""
    return data.work / "crops" / f"{data.mpp:g}um"


def tile_info(data, name):
    """What a slide's tiles were cut from and with; None without tiles, or if they are of other input.

    Other input is a slide's file of another name, size or hash, or other um/px than it was cut with, by
    --slide-mpp or labels.csv.
    """
    info = read_json(tiles_folder(data) / f"{name}.json") if data.mpp else {}
    if not info.keys() >= set(TILES) or not file_identity(data.images[name]).items() <= info.items():
        return None
    said, used, source = data.said_mpp(name), info["slide_mpp"], info["mpp_source"]
    if said != (used if source == "labels.csv" else None):
        return None
    return None if source == "--slide-mpp" and data.slide_mpp not in (None, used) else info


def tile_side(info):
    """A tile's side in level-0 px, of a slide's tile_info."""
    return CROP * info["mpp"] / info["slide_mpp"]


def cut(path, crops, mpp, slide_mpp, tissue, said_mpp, gigapixels):
    """Cuts the tiles of a slide; returns what is odd about the slide, as a list of texts."""
    with scale_suggested(path, gigapixels):
        slide = cut_tiles(path, crops, mpp, slide_mpp, tissue, said_mpp, gigapixels)
    return what_is_odd(slide)


def prepare_tiles(data, tissue=0.5, workers=2, limits=LIMITS):
    """Cuts the slides that have no tiles yet; one line for each that was skipped.

    InputError if no slide can be used, or tiles are there that were cut with another --tissue.
    """
    need_mpp(data)
    tell_source(data)
    others = not_read(data.source)
    if others:
        print(printable(f"warning: {len(others)} files or folders look like slides and are not read; "
                        f"python data.py check names each: {others[0]}"))
    crops, todo, failed = tiles_folder(data), [], []
    for name, path in data.images.items():
        info = tile_info(data, name)
        if info is None:
            todo.append((path, crops, data.mpp, data.slide_mpp, tissue, data.said_mpp(name),
                         limits.gigapixels))
        elif info["tissue"] != tissue:
            raise InputError(f"{crops / name}: cut with --tissue {info['tissue']:g} (now {tissue:g}); "
                             f"use the same, or delete {crops}")
    for (path, *_), odd, error in in_processes(cut, todo, workers, "tiles, slides", limits.seconds):
        if error:
            failed.append(error)
        if odd:
            tqdm.write(printable(f"note: {path}: {'; '.join(odd)}"))
    if len(failed) == len(data.images):
        raise InputError(failed[0] if len(failed) == 1 else
                         f"none of the {len(failed)} slides could be used: {failed[0]}")
    return failed


# ---------------------------------------------------------------- cells of slides

def is_builtin(data, file):
    """Is this what the built-in detector found here?"""
    return file.parent == data.work / "cells" / "builtin"


def made_from(data, name, cells):
    """What an image's cells are made from, as text, to be kept with them and compared.

    The file of cells with its size and time and the version of the readers, or the detector and its version;
    the image's file and um/px.
    """
    mpp = round(data.mpp, 6) if data.kind == "crops" else tile_info(data, name)["slide_mpp"]
    if cells is None or is_builtin(data, cells):
        return source_of(data.images[name], mpp)
    status = cells.stat()
    file = f"{cells.name} {status.st_size} {status.st_mtime_ns}, readers {READERS}"
    return source_of(data.images[name], mpp, file, None)


def level0_copy(data, name):
    """Where the cells of the user's file are kept in level-0 px."""
    return data.work / "cells" / "level0" / data.prior / f"{name}.npz"


def read_slide_cells(file, slide):
    """Returns the cells (K, 2) of an open Slide in level-0 px, whatever the format of the file."""
    return read_cells(file, slide.mpp, (slide.width, slide.height), slide.power, slide.bounds)


def copy_level0(file, copy, path, slide_mpp, source):
    """Reads a segmentation result once, whatever its format, and writes its cells in level-0 px.

    Returns a warning if many of them lie outside of the slide or on its glass, else "".
    """
    slide = Slide(path, said_mpp=slide_mpp)
    xy = read_slide_cells(file, slide)
    shares = misplaced(xy, slide)
    save_cells(copy, xy, source, misplaced=shares)
    return where_cells_are_odd(*shares, file)


def ready_cells(data, name):
    """A slide's cells (K, 2) in level-0 px, sorted by y; None if prepare_cells has to find them first."""
    file = cell_file(data, name)
    if file is None or tile_info(data, name) is None:
        return None
    kept = read_npz(file if is_builtin(data, file) else level0_copy(data, name), "source", "x", "y")
    if not kept or str(kept["source"]) != made_from(data, name, file):
        return None
    return np.stack([kept["x"], kept["y"]], 1).astype(np.float64)


def kept_shares(data, name, file):
    """Returns the shares of a slide's cells from the file that are misplaced; None if it has to be read."""
    kept = read_npz(level0_copy(data, name), "source", "misplaced")
    if not kept or tile_info(data, name) is None or str(kept["source"]) != made_from(data, name, file):
        return None
    return kept["misplaced"]


def prepare_cells(data, workers=2, limits=LIMITS):
    """Finds or reads the cells of the slides that have tiles; one line for each slide that was skipped."""
    todo, missing, given = [], [], []
    files = cell_files(data)
    ready = {name: info for name in data.images if (info := tile_info(data, name))}
    for name, info in ready.items():
        if ready_cells(data, name) is not None:
            continue
        file, path = files[name], data.images[name]
        if file and not is_builtin(data, file):
            copy, source = level0_copy(data, name), made_from(data, name, file)
            given.append((file, copy, path, info["slide_mpp"], source))
        elif file or data.prior in ("auto", "builtin"):
            todo.append((path, info["slide_mpp"]))
        else:
            missing.append(path)
    way_out = f"put them into {data.source}/cells/{data.prior}/, or use --prior builtin"
    if missing and len(missing) == len(ready):
        raise InputError(f"--prior {data.prior}: no cells of it for any slide; {way_out}")
    failed = [f"{path}: no cells of {data.prior}; {way_out}" for path in missing]
    for (_, _, path, *_), odd, error in in_processes(copy_level0, given, workers, "cells, files",
                                                     limits.seconds):
        if error:
            failed.append(error)
        if odd:
            tqdm.write(printable(f"warning: {path}: {odd}"))
    return failed + list(segment_slides(todo, "builtin", data.work / "cells", workers, limits).values())


# ---------------------------------------------------------------- ready-cut crops and their cells

class CropCells(NamedTuple):
    """What is kept of a ready-cut crop."""

    side: int  # px in its file
    grey: bool  # has no colour
    xy: np.ndarray  # its cells (K, 2) in px of its CROP px square


def read_square(path):
    """Returns the image of a crop as it is in the file; InputError if it cannot be read or is oblong."""
    image = read_image(path)
    if image.width != image.height:
        raise InputError(f"{path}: is {image.width:,} x {image.height:,} px, and crops are square; cut it to "
                         "a square, or put it in slides/ to have it cut into tiles")
    return image


def read_crop(path):
    """Returns a crop as an RGB image of CROP px a side, and its side in the file."""
    image = read_square(path)
    return image if image.width == CROP else image.resize((CROP, CROP), Image.BICUBIC), image.width


def cells_of_crop(path, mpp, cells):
    """Returns the CropCells of an image file: from a file of cells, or by the detector on the file's own px.

    mpp: um/px of the image file.
    """
    image = read_square(path)
    pixels = np.asarray(image)
    xy = segment_nuclei(pixels, mpp) if cells is None else read_cells(cells, slide_size=image.size)
    return CropCells(image.width, is_grey(pixels), xy * (CROP / image.width))


def usual_side(sides):
    """Returns the most common of crops' sides, of two the larger."""
    counts = Counter(sides)
    return max(counts, key=lambda side: (counts[side], side))


def crop_side(data):
    """Returns the side in px of a data set's ready-cut crops in their files; None before cells are found.

    Crops of another side would have another um/px at CROP px: read_crop_cells leaves them out.
    """
    kept = read_npz(crop_cells_file(data), "names", "side")
    if kept is None:
        return None
    side_of = dict(zip(kept["names"].tolist(), kept["side"].tolist()))
    sides = [side for name, side in side_of.items() if name in data.images]
    return usual_side(sides) if sides else None


def crop_mpp(data):
    """Returns the um/px of a data set's crops as the network sees them, CROP px a side."""
    return data.mpp * (crop_side(data) / CROP) if data.kind == "crops" else data.mpp


def file_mpp(data, mpp):
    """Returns the um/px of the files of ready-cut crops that the network sees at mpp; None if unknown."""
    side = crop_side(data)
    return mpp / (side / CROP) if side else None


def other_sides(paths, sides):
    """Returns a line for each of the crops whose side is not the usual one."""
    usual = usual_side(sides)
    text = (f"px a side, and most of the other crops are {usual:,}, so that their um/px at {CROP} px would "
            "differ; put it in its own folder")
    return [f"{path}: is {side:,} {text}" for path, side in zip(paths, sides) if side != usual]


def describe_side(side, mpp):
    """Returns what becomes of crops of that side at mpp um/px."""
    return (f"{side:,} px crops at {mpp:g} um/px become {CROP} px at {mpp * side / CROP:.4g}; to cut them "
            "into tiles put them in slides/")


def without_color(grey):
    """Returns a line if most of some crops have no colour, else ""; grey: whether each of them has none."""
    if 2 * sum(grey) <= len(grey):
        return ""
    return f"{sum(grey):,} of {len(grey):,} crops have no colour; H&E is needed"


def crop_cells_file(data):
    """All cells of a data set's crops."""
    return data.work / "cells" / f"crops_{data.prior}.npz"


def cell_files_of_crops(data):
    """{crop: its file of cells, or None}."""
    if not (data.source / "cells").is_dir() and data.prior in ("auto", "builtin"):
        return dict.fromkeys(data.images)
    return cell_files(data)


def prepare_crop_cells(data, workers, limits=LIMITS):
    """Finds or reads the cells of the crops that have none yet, or that were made from another file.

    All go into one file, cells/crops_<prior>.npz: x, y in px of the CROP px square and each cell's crop; the
    crops' names, sides, whether they are grey, and what each was made from. Returns one line for each crop
    that was skipped.
    """
    need_mpp(data)
    tell_source(data)
    done, files, failed, todo = kept_crops(data), cell_files_of_crops(data), [], {}
    for name in sorted(data.images.keys() - done.keys()):
        if files[name] or data.prior in ("auto", "builtin"):
            todo[data.images[name], data.mpp, files[name]] = name
        else:
            failed.append(f"{data.images[name]}: no cells of {data.prior}; "
                          f"put them into {data.source}/cells/{data.prior}/")
    for task, result, error in in_processes(cells_of_crop, list(todo), workers, "cells, crops",
                                            limits.seconds):
        if error:
            failed.append(error)
        else:
            done[todo[task]] = result
    if todo and done:
        write_crop_cells(data, done, files)
    if not done:
        raise InputError(failed[0] if len(failed) == 1 else
                         f"none of the {len(failed)} crops could be used: {failed[0]}")
    side = crop_side(data)
    if side != CROP:
        print(describe_side(side, data.mpp))
        check_mpp(crop_mpp(data), f"{data.source}: its crops at {CROP} px have um/px")
    grey = without_color([crop.grey for crop in done.values()])
    if grey:
        print(f"warning: {data.source}: {grey}")
    return failed + other_sides([data.images[name] for name in done], [crop.side for crop in done.values()])


def write_crop_cells(data, done, files):
    """done: {crop: its CropCells}; files: {crop: its file of cells, or None}."""
    cells = [crop.xy for crop in done.values()]
    xy = np.clip(np.concatenate(cells), -1e9, 1e9).astype(np.float32)
    owner = np.repeat(np.arange(len(done)), [len(of_crop) for of_crop in cells])
    source = [made_from(data, name, files[name]) for name in done]
    with atomic_write(crop_cells_file(data)) as temp, open(temp, "wb") as file:
        np.savez_compressed(file, x=xy[:, 0], y=xy[:, 1], crop=owner, names=list(done), source=source,
                            side=[crop.side for crop in done.values()],
                            grey=[crop.grey for crop in done.values()])


def kept_crops(data):
    """Returns {crop: its CropCells} where cells are kept and were made from the files found now."""
    path = crop_cells_file(data)
    kept = read_npz(path, "x", "y", "crop", "names", "source", "side", "grey")
    if kept is None:
        if path.is_file():
            print(f"warning: {path}: is damaged or of an older version; its cells are recomputed")
        return {}
    xy = np.stack([kept["x"], kept["y"]], 1)
    names, source, side, grey = (kept[key].tolist() for key in ("names", "source", "side", "grey"))
    ends = np.searchsorted(kept["crop"], range(len(names) + 1))
    files, out = cell_files_of_crops(data), {}
    for i, name in enumerate(names):
        if name in files and source[i] == made_from(data, name, files[name]):
            out[name] = CropCells(side[i], grey[i], xy[ends[i]: ends[i + 1]])
    return out


def read_crop_cells(data):
    """Returns {crop: cells (K, 2) in px of its CROP px square} of the kept crops of the usual side."""
    side = crop_side(data)
    return {name: crop.xy for name, crop in kept_crops(data).items() if crop.side == side}


# ---------------------------------------------------------------- images in memory

def load_crops(paths, workers):
    """Images uint8 (N, 3, CROP, CROP), indices of the paths that were read, a line for each of the others.

    Prints a warning if their sides in the files differ, or if most of them have no colour.
    """
    images = torch.empty(len(paths), 3, CROP, CROP, dtype=torch.uint8)

    def load(i):
        result, error = call(read_crop, (paths[i],))
        if error:
            return 0, False, error
        image, side = result
        pixels = np.array(image)
        images[i] = torch.from_numpy(pixels).permute(2, 0, 1)
        return side, is_grey(pixels), None
    with ThreadPoolExecutor(max(1, workers)) as pool:
        loaded = list(tqdm(pool.map(load, range(len(paths))), "images", len(paths), leave=False))
    good = [i for i, (_, _, error) in enumerate(loaded) if error is None]
    sides = Counter(loaded[i][0] for i in good)
    if len(sides) > 1:
        counts = ", ".join(f"{side:,} px ({count:,})" for side, count in sorted(sides.items()))
        print(f"warning: images of {counts} a side all become {CROP} px, so their um/px differ")
    grey = without_color([loaded[i][1] for i in good])
    if grey:
        print(f"warning: {grey}")
    images = images if len(good) == len(paths) else images[good]
    return images, good, [error for _, _, error in loaded if error]
