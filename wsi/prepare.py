"""Tiles and cells of a data set, made once under datasets/<name>/ (layout: docs/data.md).

crops/2um/<slide>/<x>_<y>.jpg (at 2 um/px) have crops/2um/<slide>.json beside them, and cells/ are in level-0
px. What was made from another file or with other settings than now is recomputed or refused, never used.
"""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.errors import InputError, exit_code_of, print_skipped, printable
from common.files import atomic_write, read_json, read_npz
from common.parallel import LIMITS, call, in_processes, limits_of, shard_of
from prior import segment_nuclei
from wsi.cells import cell_format, read_cells
from wsi.plausible import scale_suggested, what_is_odd
from wsi.segment import save_cells, segment_slides, source_of
from wsi.slides import CROP, FORMATS, cut_tiles, file_identity

NAME_LIMIT = 200  # bytes: with what is added to it, a file system takes 255
CELL_ENDINGS = (".json", ".geojson", ".csv", ".tsv", ".npz", "_seg.npy",
                "_cp_masks.png", "_cp_masks.tif", "_cp_masks.tiff")


def prepare(data, tissue=0.5, workers=2, limits=LIMITS):
    """Cuts the tiles and finds the cells that are not there yet; one line for each image that was skipped."""
    if data.kind == "crops":
        return prepare_crop_cells(data, workers, limits)
    return prepare_tiles(data, tissue, workers, limits) + prepare_cells(data, workers, limits)


def keep_shard(data, shard):
    """Leaves only the slides of a --shard in a data set, all for None; InputError if it holds crops."""
    if shard and data.kind != "slides":
        raise InputError(f"--shard: {data.source} holds crops and no slides; leave the flag out")
    data.images = {name: data.images[name] for name in shard_of(data.images, shard)}


def run_shard(data, args):
    """data.py prepare: prepare() of all images, or of a shard of the slides; gives the exit code."""
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
                 "try a finer --mpp or another --prior")
    return line


# ---------------------------------------------------------------- tiles

TILES = ("file_name", "file_bytes", "mpp", "slide_mpp", "mpp_source", "tissue", "tiles", "width", "height")


def tiles_folder(data):
    """Where the tiles of a um/px are: several um/px of one slide can be side by side."""
    return data.work / "crops" / f"{data.mpp:g}um"


def tile_info(data, name):
    """What a slide's tiles were cut from and with; None without tiles, or if they are of other input.

    Other input is a slide's file of another name or size, or other um/px than it was cut with, by --slide-mpp
    or labels.csv.
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
    crops, todo, failed = tiles_folder(data), [], []
    for name, path in data.images.items():
        info = tile_info(data, name)
        if len(name.encode()) > NAME_LIMIT:
            failed.append(f"{path}: its name has more than {NAME_LIMIT} bytes; rename it")
        elif info is None:
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

def cell_file(data, name):
    """The cells of a slide or crop, or None.

    cells/<prior>/<name>.*, else the user's cells/<name>.* of that segmenter ("auto": of any), else, with
    "auto", what the built-in detector found.
    """
    def those(folder):
        paths = [folder / (name + ending) for ending in CELL_ENDINGS]
        return [path for path in paths if path.is_file()]

    def is_of_prior(path):
        try:
            return cell_format(path) == data.prior
        except InputError:
            return False  # some other file, of no use here
    given, made = data.source / "cells", data.work / "cells"
    if data.prior == "auto":
        files = those(given) + those(given / "builtin") + those(made / "builtin")
    else:
        files = those(given / data.prior) + those(made / data.prior)
        files += [path for path in those(given) if is_of_prior(path)]
    return files[0] if files else None


def is_builtin(data, file):
    """Is this what the built-in detector found here?"""
    return file.parent == data.work / "cells" / "builtin"


def made_from(data, name, cells):
    """What an image's cells are made from, as text, to be kept with them and compared.

    The file of cells with its size and time, or the detector and its version; the image's file and um/px.
    """
    mpp = data.mpp if data.kind == "crops" else tile_info(data, name)["slide_mpp"]
    if cells is None or is_builtin(data, cells):
        return source_of(data.images[name], mpp)
    status = cells.stat()
    return source_of(data.images[name], mpp, f"{cells.name} {status.st_size} {status.st_mtime_ns}", None)


def level0_copy(data, name):
    """Where the cells of the user's file are kept in level-0 px."""
    return data.work / "cells" / "level0" / data.prior / f"{name}.npz"


def copy_level0(file, copy, slide_mpp, size, source):
    """Reads a segmentation result once, whatever its format, and writes its cells in level-0 px."""
    save_cells(copy, read_cells(file, slide_mpp, size), source)


def ready_cells(data, name):
    """A slide's cells (K, 2) in level-0 px, sorted by y; None if prepare_cells has to find them first."""
    file = cell_file(data, name)
    if file is None or tile_info(data, name) is None:
        return None
    kept = read_npz(file if is_builtin(data, file) else level0_copy(data, name), "source", "x", "y")
    if not kept or str(kept["source"]) != made_from(data, name, file):
        return None
    return np.stack([kept["x"], kept["y"]], 1).astype(np.float64)


def prepare_cells(data, workers=2, limits=LIMITS):
    """Finds or reads the cells of the slides that have tiles; one line for each slide that was skipped."""
    todo, missing, given = [], [], []
    ready = {name: info for name in data.images if (info := tile_info(data, name))}
    for name, info in ready.items():
        if ready_cells(data, name) is not None:
            continue
        file, path = cell_file(data, name), data.images[name]
        if file and not is_builtin(data, file):
            size = info["width"], info["height"]
            copy, source = level0_copy(data, name), made_from(data, name, file)
            given.append((file, copy, info["slide_mpp"], size, source))
        elif file or data.prior in ("auto", "builtin"):
            todo.append((path, info["slide_mpp"]))
        else:
            missing.append(path)
    way_out = f"put them into {data.source}/cells/{data.prior}/, or use --prior builtin"
    if missing and len(missing) == len(ready):
        raise InputError(f"--prior {data.prior}: no cells of it for any slide; {way_out}")
    failed = [f"{path}: no cells of {data.prior}; {way_out}" for path in missing]
    for _, _, error in in_processes(copy_level0, given, workers, "cells, files", limits.seconds):
        if error:
            failed.append(error)
    return failed + list(segment_slides(todo, "builtin", data.work / "cells", workers, limits).values())


# ---------------------------------------------------------------- cells of ready-cut crops

def read_crop(path):
    """A crop as an RGB image of CROP px a side, and its size in the file; InputError if it cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error})") from None
    return image if image.size == (CROP, CROP) else image.resize((CROP, CROP), Image.BICUBIC), image.size


def cells_of_crop(path, mpp, cells):
    """Cells (K, 2) of an image file in px of its CROP px square; from a file of cells, or by the detector."""
    image, size = read_crop(path)
    if cells is None:
        return segment_nuclei(np.asarray(image), mpp)
    return read_cells(cells, slide_size=size) * (CROP / np.array(size))


def crop_cells_file(data):
    """All cells of a data set's crops."""
    return data.work / "cells" / f"crops_{data.prior}.npz"


def cell_files_of_crops(data):
    """{crop: its file of cells, or None}."""
    if not (data.source / "cells").is_dir() and data.prior in ("auto", "builtin"):
        return dict.fromkeys(data.images)
    return {name: cell_file(data, str(Path(name).with_suffix(""))) for name in data.images}


def prepare_crop_cells(data, workers, limits=LIMITS):
    """Finds or reads the cells of the crops that have none yet, or that were made from another file.

    All go into one file, cells/crops_<prior>.npz: x, y in px of the CROP px square, each cell's crop, the
    crops' names and what each was made from. Gives one line for each crop that was skipped.
    """
    need_mpp(data)
    done, files, failed, todo = read_crop_cells(data), cell_files_of_crops(data), [], {}
    for name in sorted(data.images.keys() - done.keys()):
        if files[name] or data.prior in ("auto", "builtin"):
            todo[data.images[name], data.mpp, files[name]] = name
        else:
            failed.append(f"{data.images[name]}: no cells of {data.prior}; "
                          f"put them into {data.source}/cells/{data.prior}/")
    for task, xy, error in in_processes(cells_of_crop, list(todo), workers, "cells, crops",
                                        limits.seconds):
        if error:
            failed.append(error)
        else:
            done[todo[task]] = xy
    if todo and done:
        write_crop_cells(data, done, files)
    if not done:
        raise InputError(failed[0] if len(failed) == 1 else
                         f"none of the {len(failed)} crops could be used: {failed[0]}")
    return failed


def write_crop_cells(data, done, files):
    """done: {crop: cells (K, 2)}; files: {crop: its file of cells, or None}."""
    xy = np.clip(np.concatenate(list(done.values())), -1e9, 1e9).astype(np.float32)
    crop = np.repeat(np.arange(len(done)), [len(cells) for cells in done.values()])
    source = [made_from(data, name, files[name]) for name in done]
    with atomic_write(crop_cells_file(data)) as temp, open(temp, "wb") as file:
        np.savez_compressed(file, x=xy[:, 0], y=xy[:, 1], crop=crop, names=list(done), source=source)


def read_crop_cells(data):
    """{crop: cells (K, 2)} of the crops whose cells are there and made from the files that are there now."""
    path = crop_cells_file(data)
    kept = read_npz(path, "x", "y", "crop", "names", "source")
    if kept is None:
        if path.is_file():
            print(f"note: {path}: cannot be read; its cells are recomputed")
        return {}
    xy, names, source = np.stack([kept["x"], kept["y"]], 1), kept["names"], kept["source"]
    ends = np.searchsorted(kept["crop"], range(len(names) + 1))
    files, out = cell_files_of_crops(data), {}
    for name, made, start, end in zip(names.tolist(), source.tolist(), ends, ends[1:]):
        if name in files and made == made_from(data, name, files[name]):
            out[name] = xy[start: end]
    return out


# ---------------------------------------------------------------- images in memory

def load_crops(paths, workers):
    """Images uint8 (N, 3, CROP, CROP), indices of the paths that were read, a line for each of the others."""
    images = torch.empty(len(paths), 3, CROP, CROP, dtype=torch.uint8)

    def load(i):
        result, error = call(read_crop, (paths[i],))
        if result:
            images[i] = torch.from_numpy(np.array(result[0])).permute(2, 0, 1)
        return error
    with ThreadPoolExecutor(workers) as pool:
        errors = list(tqdm(pool.map(load, range(len(paths))), "images", len(paths), leave=False))
    good = [i for i, error in enumerate(errors) if error is None]
    images = images if len(good) == len(paths) else images[good]
    return images, good, [error for error in errors if error]
