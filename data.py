"""Data sets (A.1): from a user's disk to crops of 224 px with their cells.

Coordinates on a slide are level-0 px, x before y. What is made here stands under datasets/<name>/:
crops/<slide>/<x>_<y>.jpg with crops/<slide>.json (what they were cut with, written last), and
cells/builtin/<slide>.npz. The user's own folder is only read.

    python data.py manifest --data lung    the list of slides that gdc-client downloads, and labels.csv
    python data.py check --data NAME       what lies there, what is missing and where to get it
    python data.py look SLIDE              a picture: slide, tissue, tiles, cells
"""
import argparse
import csv
import json
import os
import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import prior
from errors import InputError, exit_code, renamed
from slides import CROP, Slide, cut_tiles

# ---------------------------------------------------------------- the paper's data sets

DATASETS = {  # name: um/px (A.1: 5x, BRIGHT 10x), epochs of pre-training (A.1.2)
    "demo": (2.0, 6), "lung": (2.0, 100), "brca": (2.0, 30), "paad": (2.0, 100),
    "bright3": (1.0, 50), "bright6": (1.0, 50)}
FOLDERS = {"bright3": "bright", "bright6": "bright"}  # both sub-tasks are on the same slides, with six labels
BRIGHT3 = {"PB": "non-cancerous", "UDH": "non-cancerous", "ADH": "pre-cancerous", "FEA": "pre-cancerous",
           "DCIS": "cancerous", "IC": "cancerous"}  # A.1
PRIORS = ("auto", "builtin", "hovernet", "cellpose", "histomicstk")
SLIDE_TYPES = {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif", ".dcm",
               ".png", ".jpg", ".jpeg"}
CROP_TYPES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}


# ---------------------------------------------------------------- work in processes

def call(function, arguments):
    """(function's result, None), or (None, one line) for what the user can mend."""
    try:
        return function(*arguments), None
    except InputError as error:
        return None, str(error)
    except MemoryError:
        return None, f"{arguments[0]}: not enough memory for it"


def pool_of(workers):
    """Processes of one thread each."""
    return ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))


def each(function, tasks, workers, what):
    """Yields (task, result, error) as they end, under a progress bar; a worker that dies costs its own task only."""
    bar = tqdm(total=len(tasks), desc=what, unit="", disable=not tasks, leave=False)
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            yield (task, *call(function, task))
            bar.update()
        return bar.close()
    left = []
    with pool_of(min(workers, len(tasks))) as pool:
        futures = {pool.submit(call, function, task): task for task in tasks}
        for future in as_completed(futures):
            try:
                result = future.result()
            except BrokenProcessPool:
                left.append(futures[future])
                continue
            yield (futures[future], *result)
            bar.update()
    for task in left:  # one of these killed its process: each alone now
        with pool_of(1) as pool:
            try:
                result = pool.submit(call, function, task).result()
            except BrokenProcessPool:
                result = None, f"{task[0]}: reading it ended the process; is the file whole?"
        yield (task, *result)
        bar.update()
    bar.close()


# ---------------------------------------------------------------- data sets

@dataclass
class Data:
    """A data set on disk. images: {name: file}, slides or crops; labels: {name: row of labels.csv}."""

    name: str
    source: Path  # the user's folder
    work: Path  # datasets/<name>
    mpp: float  # um/px of the crops
    kind: str  # "slides" or "crops"
    images: dict
    prior: str = "auto"  # whose cells: one of PRIORS
    labels: dict = field(default_factory=dict)
    classes: list = field(default_factory=list)

    def split(self, part):
        """Names of "train", "val" or "test"; without labels everything is "train"."""
        if not self.labels:
            return sorted(self.images) if part == "train" else []
        return sorted(name for name in self.images if self.labels[name]["split"] == part)


def find_data(data, mpp=None, slide_mpp=None, seed=0, prior="auto", root="datasets"):
    """The data set of a name in DATASETS or of a folder, with its labels and split, as a Data.

    A folder holds slides/ (or slides as they are), crops/ alone, or images with a labels.csv of image,label.
    InputError in one line for what is missing.
    """
    for value, flag in ((mpp, "--mpp"), (slide_mpp, "--slide-mpp")):
        if value is not None and not 0.05 <= value <= 20:
            raise InputError(f"{flag} {value:g}: um/px between 0.05 and 20 is expected (0.5 is 20x)")
    known = data in DATASETS
    source = Path(root) / FOLDERS.get(data, data) if known else Path(data)
    if not source.is_dir():
        if known:
            raise InputError(f"{source}/ is not there: put the slides into {source}/slides/ and labels.csv "
                             f"(slide,label) beside it; python data.py check --data {data} says where they are to be had")
        raise InputError(f"--data {data}: neither a folder nor one of {', '.join(DATASETS)}")
    if mpp is None and not known:
        raise InputError(f"--data {data}: say the um/px of its crops with --mpp (2.0 is 5x, 1.0 10x, 0.5 20x)")
    name = FOLDERS.get(data, data) if known else safe_name(source)
    mpp, work = mpp or DATASETS[data][0], Path(root) / name
    table = source / "labels.csv"
    rows = read_table(table) if table.is_file() else None
    column = "image" if rows and "image" in rows[0] else "slide"
    if column == "image":
        kind, images = "crops", {}
        for row in rows:
            path = source / row["image"]
            if Path(row["image"]).is_absolute() or ".." in Path(row["image"]).parts:
                raise InputError(f"{table}: image {row['image']!r} lies outside the folder")
            if path.is_file():
                images[row["image"]] = path
    elif (source / "slides").is_dir() or not (source / "crops").is_dir():
        kind, folder = "slides", source / "slides" if (source / "slides").is_dir() else source
        images = by_stem(folder, SLIDE_TYPES, folder.rglob("*") if folder.name == "slides" else folder.iterdir())
    else:
        kind, folder = "crops", source / "crops"
        images = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.suffix.lower() in CROP_TYPES}
        rows = None
    if not images:
        raise InputError(f"{source}: no {kind} in it ({' '.join(sorted(SLIDE_TYPES if kind == 'slides' else CROP_TYPES))})")
    found = Data(name, source, work, mpp, kind, images, prior)
    if rows is not None and name == "bright":
        rows = bright_rows(table, rows, data)
    if rows is not None:
        found.labels = check_labels(table, rows, column, found.images, seed)
        found.classes = sorted({row["label"] for row in found.labels.values()})
    return found


def bright_rows(path, rows, data):
    """BRIGHT's rows with their classes for three or six; its official validation part is the test part (A.1)."""
    for line, row in enumerate(rows, 2):
        if row["label"] not in BRIGHT3:
            raise InputError(f"{path}: line {line}: label {row['label']!r} is none of {', '.join(BRIGHT3)}")
    tested = any(SPLITS.get(row.get("split", "").lower()) == "test" for row in rows)
    return [row | {"label": BRIGHT3[row["label"]] if data == "bright3" else row["label"]}
            | ({"split": "test"} if not tested and SPLITS.get(row.get("split", "").lower()) == "val" else {}) for row in rows]


def safe_name(folder):
    """The name that a folder's work and runs go by."""
    return re.sub(r"[^\w.-]+", "_", Path(folder).resolve().name)


def by_stem(folder, types, files):
    """{stem: file}; InputError where two files have one stem, for crops and cells are named by it."""
    out = {}
    for path in sorted(files):
        if path.suffix.lower() not in types or path.name.startswith(".") or not path.is_file():
            continue
        if path.stem in out:
            raise InputError(f"{path}: has the name of {out[path.stem]}; rename one of the two")
        out[path.stem] = path
    return out


def read_table(path):
    """Rows of a CSV file as dicts, column names lower-cased; commas or semicolons, with or without a BOM."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=";" if head.count(";") > head.count(",") else ",")
            names = [name.strip().lower() for name in next(reader, [])]
            rows = [dict(zip(names, (value.strip() for value in row))) for row in reader if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error}); save it as UTF-8") from None
    if not {"label"} < set(names) or not {"slide", "image"} & set(names):
        raise InputError(f"{path}: its first line has to name the columns slide,label (or image,label), not {','.join(names)}")
    if not rows:
        raise InputError(f"{path}: no row in it")
    return rows


SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def check_labels(path, rows, column, images, seed):
    """{name: {"label", "patient", "split"}} of labels.csv; makes the split by patient where none is given.

    InputError for: no label, a name twice, a name with no file, a file with no name, a patient in two splits.
    """
    out = {}
    for line, row in enumerate(rows, 2):
        name = row.get(column, "")
        if column == "slide" and name not in images and Path(name).suffix.lower() in SLIDE_TYPES:
            name = Path(name).stem
        if not row.get("label"):
            raise InputError(f"{path}: line {line} has no label for {name!r}")
        if name in out:
            raise InputError(f"{path}: line {line} names {name!r} a second time")
        if name not in images:
            raise InputError(f"{path}: line {line}: there is no file of {name!r}; take the line out or fetch the {column}")
        split = row.get("split", "").lower()
        if split and split not in SPLITS:
            raise InputError(f"{path}: line {line}: split {split!r} is none of train, val, test")
        patient = row.get("patient") or row.get("group") or row.get("source_tile")
        out[name] = {"label": row["label"], "patient": patient or (name[:12] if name.startswith("TCGA-") else name),
                     "split": SPLITS.get(split, "")}
    for name in sorted(images):
        if name not in out:
            raise InputError(f"{images[name]}: has no label in {path}; add a line or move the file away")
    if len({row["label"] for row in out.values()}) < 2:
        raise InputError(f"{path}: one label only; two classes at least are needed")
    given = [bool(row["split"]) for row in out.values()]
    if any(given) and not all(given):
        raise InputError(f"{path}: some lines have a split and some have none; give all or none")
    if not any(given):
        divide(out, list(out), "test", 0.2, seed)
    if not any(row["split"] == "val" for row in out.values()):
        divide(out, [name for name, row in out.items() if row["split"] != "test"], "val", 0.2, seed + 1)
    seen = {}
    for name, row in out.items():
        if seen.setdefault(row["patient"], row["split"]) != row["split"]:
            raise InputError(f"{path}: patient {row['patient']!r} is in {seen[row['patient']]} and in {row['split']} ({name}); "
                             "keep a patient in one split")
    return out


def divide(labels, names, part, share, seed):
    """Puts that share of the patients of each class into part, the rest into train; seeded."""
    classes = {}
    for name in sorted(names):
        classes.setdefault(labels[name]["patient"], labels[name]["label"])
    rng, chosen = np.random.default_rng(seed), set()
    for label in sorted(set(classes.values())):
        patients = sorted(p for p in classes if classes[p] == label)
        count = max(1, round(share * len(patients))) if len(patients) > 1 else 0
        chosen |= {patients[i] for i in rng.permutation(len(patients))[:count]}
    for name in names:
        labels[name]["split"] = part if labels[name]["patient"] in chosen else "train"


# ---------------------------------------------------------------- preparing

def prepare(data, slide_mpp=None, tissue=0.5, workers=2):
    """Cuts the tiles and finds the cells that are not there yet. Gives one line for each image that was passed over."""
    failed = []
    note = data.work / "source.txt"
    if note.is_file() and note.read_text() != str(data.source.resolve()):
        raise InputError(f"{data.work}: made from {note.read_text()}, not from {data.source}; rename one of the folders")
    with renamed(note) as temp:
        temp.write_text(str(data.source.resolve()))
    if data.kind == "crops":
        return crop_cells(data, workers)
    crops, todo = data.work / "crops", []
    for name, path in data.images.items():
        info = tile_info(data, name)
        if info is None:
            todo.append((path, crops, data.mpp, slide_mpp, tissue))
        elif abs(info["mpp"] / data.mpp - 1) > 1e-6 or info["tissue"] != tissue:
            raise InputError(f"{crops / name}: cut with --mpp {info['mpp']:g} --tissue {info['tissue']:g}; "
                             f"say the same, or delete {crops}")
    for _, warning, error in each(cut_tiles, todo, workers, "tiles, slides"):
        failed += [error] if error else []
        if warning:
            tqdm.write(f"note: {warning}")
    ready = [name for name in data.images if tile_info(data, name)]
    if not ready:
        raise InputError(failed[0] if len(failed) == 1 else f"none of the {len(failed)} slides could be used: {failed[0]}")
    todo, wanting, given = [], [], []
    for name in ready:
        file, info = cell_file(data, name), tile_info(data, name)
        if file and not read_already(file, level0_file(data, name)):
            given.append((file, level0_file(data, name), info["slide_mpp"], (info["width"], info["height"])))
        elif file is None and data.prior not in ("auto", "builtin"):
            wanting.append(name)
        elif file is None:
            todo.append((data.images[name], info["slide_mpp"]))
    way = f"put them into {data.source}/cells/{data.prior}/, or take --prior builtin"
    if len(wanting) == len(ready):
        raise InputError(f"--prior {data.prior}: no cells of it for any slide; {way}")
    failed += [f"{data.images[name]}: no cells of {data.prior}; {way}" for name in wanting]
    failed += [error for _, _, error in each(keep_level0, given, workers, "cells, files") if error]
    return failed + list(segment_all(todo, "builtin", data.work / "cells", workers).values())


def segment_all(tasks, segmenter, folder, workers, mpp=prior.WORK_MPP):
    """Finds the cells of slides by regions, over several processes: tasks are [(path, slide_mpp), ...], mpp is what the
    segmenter sees. Keeps <folder>/<segmenter>/<slide>.npz as soon as a slide is done; gives {path: why it is not}."""
    failed, found, regions = {}, {}, []
    for (path, *_), result, error in each(prior.slide_regions, [(*task, segmenter, mpp) for task in tasks], workers, "tissue, slides"):
        failed |= {path: error} if error else {}
        regions += result or []
    left, slide_mpp = Counter(path for path, *_ in regions), dict(tasks)
    for (path, *_, box), xy, error in each(prior.segment_region, regions, workers, f"{segmenter}, regions"):
        failed |= {path: error} if error else {}
        found.setdefault(path, {})[box] = xy
        left[path] -= 1
        if not left[path] and path not in failed:
            parts, near = sorted(found.pop(path).items()), prior.SEAM / Slide(path, slide_mpp[path]).mpp
            save_cells(folder / segmenter / f"{path.stem}.npz", prior.one_each([xy for _, xy in parts], near))
    return failed


def save_cells(path, xy, **more):
    """x and y (K,) float32 in level-0 px, sorted by y then x."""
    xy = np.clip(xy, -1e9, 1e9)  # nothing lies there, and float32 has an end
    order = np.lexsort((xy[:, 0], xy[:, 1])) if not more else slice(None)
    with renamed(path) as temp, open(temp, "wb") as file:
        np.savez_compressed(file, x=xy[order, 0].astype(np.float32), y=xy[order, 1].astype(np.float32), **more)


def tile_info(data, name):
    """What a finished slide's tiles were cut with, or None."""
    try:
        return json.loads((data.work / "crops" / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None


CELL_ENDINGS = (".json", ".geojson", ".csv", ".tsv", ".npz", "_seg.npy", "_cp_masks.png", "_cp_masks.tif", "_cp_masks.tiff")


def cell_file(data, name):
    """The cells of a slide or crop, or None: cells/<prior>/<name>.*, else the user's cells/<name>.* that are of that
    segmenter (with "auto": of any), else, with "auto", what the built-in detector found."""
    def those(folder):
        return [folder / (name + ending) for ending in CELL_ENDINGS if (folder / (name + ending)).is_file()]

    def is_of(path):
        try:
            return prior.cell_format(path) == data.prior
        except InputError:
            return False  # some other file, of no use here
    own = those(data.source / "cells")
    if data.prior == "auto":
        own += those(data.source / "cells" / "builtin") + those(data.work / "cells" / "builtin")
    else:
        own = (those(data.source / "cells" / data.prior) + those(data.work / "cells" / data.prior)
               + [path for path in own if is_of(path)])
    return next(iter(own), None)


def level0_file(data, name):
    """What training reads of a slide's cells: the built-in detector's own file, or a copy of the user's in level-0 px."""
    file = cell_file(data, name)
    if file and file.parent == data.work / "cells" / "builtin":
        return file
    return data.work / "cells" / "level0" / data.prior / f"{name}.npz"


def read_already(file, copy):
    return copy.is_file() and copy.stat().st_mtime_ns >= file.stat().st_mtime_ns


def keep_level0(file, copy, slide_mpp, size):
    """Reads a segmentation result once, whatever its format, and keeps the cells in level-0 px."""
    save_cells(copy, prior.read_cells(file, slide_mpp, size))


def cells_of_crop(path, mpp, cells):
    """Cells (K, 2) of one image file in px of its CROP px square; from a file of its own, or by the detector."""
    image, size = read_crop(path)
    if cells is None:
        return prior.segment_nuclei(np.asarray(image), mpp)
    return prior.read_cells(cells, slide_size=size) * (CROP / np.array(size))


def read_crop(path):
    """A crop as an RGB image of CROP px a side, and its size in the file; InputError where it cannot be read."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error})") from None
    return image if image.size == (CROP, CROP) else image.resize((CROP, CROP), Image.BICUBIC), image.size


def crop_cells(data, workers):
    """Finds the cells of the crops that have none yet, or none of the file that is there now, all in
    cells/crops_<prior>.npz: x, y in px of the CROP px square, the crop's number; the crops' names, when the file of each was
    written, and the um/px. Gives a line for each that cannot be read."""
    path, failed, done = data.work / "cells" / f"crops_{data.prior}.npz", [], read_crop_cells(data)
    given = (data.source / "cells").is_dir() or data.prior not in ("auto", "builtin")
    todo, written = {}, {}
    for name in sorted(data.images):
        cells = cell_file(data, str(Path(name).with_suffix(""))) if given else None
        written[name] = cells.stat().st_mtime_ns if cells else 0
        if name in done and done[name][1] == written[name]:
            continue
        done.pop(name, None)
        if cells is None and data.prior not in ("auto", "builtin"):
            failed.append(f"{data.images[name]}: no cells of {data.prior}; put them into {data.source}/cells/{data.prior}/")
        else:
            todo[data.images[name], data.mpp, cells] = name
    for task, xy, error in each(cells_of_crop, list(todo), workers, "cells, crops"):
        if error:
            failed.append(error)
        else:
            done[todo[task]] = xy, written[todo[task]]
    if todo and done:
        cells, times = zip(*done.values())
        save_cells(path, np.concatenate(cells), names=np.array(list(done)), written=np.array(times), mpp=data.mpp,
                   crop=np.repeat(np.arange(len(done)), [len(xy) for xy in cells]))
    if not done:
        raise InputError(failed[0] if len(failed) == 1 else f"none of the {len(failed)} crops could be used: {failed[0]}")
    return failed


def read_crop_cells(data):
    """{crop: (cells (K, 2), when the file they are from was written, in ns; 0: by the detector, at this um/px)} of what
    crop_cells wrote."""
    path = data.work / "cells" / f"crops_{data.prior}.npz"
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            xy, names = np.stack([file["x"], file["y"]], 1), file["names"].tolist()
            ends = np.searchsorted(file["crop"], range(len(names) + 1))
            written, mpp = (file["written"].tolist(), file["mpp"]) if "mpp" in file.files else ([0] * len(names), None)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it, it is made anew") from None
    return {name: (xy[start: end], when) for name, start, end, when in zip(names, ends, ends[1:], written) if when or mpp == data.mpp}


# ---------------------------------------------------------------- crops with their cells

class Crops(torch.utils.data.Dataset):
    """The crops of some slides (or crops): item i is (uint8 (3, 224, 224), cells (K, 2) float32 in px of the crop).

    files[i], owner[i] (the slide), corners[i] (level-0 px) and cells(i) say what it is. Slides whose cells could not
    be read are left out; with_cells=False takes them too, all without cells, for what needs no prior. shuffle_seed:
    each crop's cells at other places, as shuffle_places says, for a control without biology.
    """

    def __init__(self, data, names, with_cells=True, shuffle_seed=None):
        self.files, self.owner, corners, cells = [], [], [], []
        if data.kind == "crops":
            rows = read_crop_cells(data)
            for name in names:
                if name in rows:
                    self.files.append(data.images[name])
                    self.owner.append(name)
                    corners.append((0, 0))
                    cells.append(rows[name][0])
        else:
            for name in names:
                info, file = tile_info(data, name), level0_file(data, name)
                if info is None or with_cells and not file.is_file():
                    continue  # passed over when it was prepared, and said so
                xy = prior.read_cells(file) if with_cells else np.zeros((0, 2))  # sorted by y
                side, scale = CROP * info["mpp"] / info["slide_mpp"], info["slide_mpp"] / info["mpp"]
                for path in sorted((data.work / "crops" / name).glob("*.jpg")):
                    x, y = (int(v) for v in path.stem.split("_"))
                    row = xy[np.searchsorted(xy[:, 1], y): np.searchsorted(xy[:, 1], y + side)]
                    row = row[(row[:, 0] >= x) & (row[:, 0] < x + side)]
                    self.files.append(path)
                    self.owner.append(name)
                    corners.append((x, y))
                    cells.append((row - [x, y]) * scale)
        if shuffle_seed is not None:
            cells = [shuffle_places(xy, np.random.default_rng([shuffle_seed, i])) for i, xy in enumerate(cells)]
        self.corners = np.array(corners, np.int64).reshape(-1, 2)
        self.start = np.cumsum([0] + [len(c) for c in cells])  # flat arrays: workers share them without copies
        self.xy = np.concatenate(cells).astype(np.float32) if cells else np.zeros((0, 2), np.float32)

    def __len__(self):
        return len(self.files)

    def cells(self, i):
        return self.xy[self.start[i]: self.start[i + 1]]

    def priors(self):
        """P_c of every crop as a whole, (N, n)."""
        p, grid = 16, CROP // 16
        inside = ((self.xy >= 0) & (self.xy < CROP)).all(1)
        x, y = (self.xy[inside] // p).astype(np.int64).T
        out = torch.zeros(len(self), grid * grid)
        out[np.repeat(np.arange(len(self)), np.diff(self.start))[inside], y * grid + x] = 1  # all crops at once
        return out

    def __getitem__(self, i):
        image = torch.from_numpy(np.asarray(read_crop(self.files[i])[0]).copy())
        return image.permute(2, 0, 1), torch.from_numpy(self.cells(i))


def shuffle_places(xy, rng, patch_size=16):
    """Cells (K, 2) of a crop with its patches permuted: as many cell patches as before, each with its cells, elsewhere."""
    grid = CROP // patch_size
    column, row = (np.clip(xy, 0, CROP - 1) // patch_size).astype(int).T
    to = rng.permutation(grid * grid)[row * grid + column]
    return np.stack([to % grid, to // grid], 1) * patch_size + xy % patch_size


def describe_prior(crops, mpp):
    """One line on the cells of the crops, with a warning where P_c hardly tells two regions apart."""
    area = len(crops) * (CROP * mpp / 1000) ** 2  # mm2
    share = crops.priors().mean().item() if len(crops) else 0
    line = f"{len(crops.xy)} cells in {len(crops)} crops, {len(crops.xy) / max(area, 1e-9):.0f} per mm2; a cell in {share:.1%} of the patches"
    if not 0.02 <= share <= 0.98:
        line += ". Warning: P_c is nearly all one region; python data.py look SLIDE shows why (um/px? stain? segmentation?)"
    return line


def collate(items):
    """Crops (B, 3, H, W) uint8 and their cells (B, K, 2), filled up with NaN."""
    cells = torch.nn.utils.rnn.pad_sequence([xy for _, xy in items], True, float("nan"))
    return torch.stack([image for image, _ in items]), cells


# ---------------------------------------------------------------- script

def main(argv=None):
    import gdc
    import look
    parser = argparse.ArgumentParser(description="What lies on disk and what is missing, before training.")
    commands = parser.add_subparsers(dest="command", required=True)
    manifest = commands.add_parser("manifest", help="asks the GDC for the slides of lung or brca; writes manifest.tsv and labels.csv")
    manifest.add_argument("--data", required=True, choices=list(gdc.PROJECTS), help="which TCGA data set")
    gdc.add_arguments(manifest)
    checked = commands.add_parser("check", help="what lies there, what is missing, where to get it")
    looked = commands.add_parser("look", help="a picture of a slide: thumbnail, tissue mask, tile grid, cells")
    checked.add_argument("--data", required=True, help=f"{', '.join(DATASETS)}, mhist, chaoyang, or a folder")
    checked.add_argument("--md5", action="store_true", help="compare with the manifest's md5 sums; reads every byte")
    checked.add_argument("--prior", default="auto", choices=PRIORS, help="whose cells to look for")
    checked.add_argument("--seed", type=int, default=0, help="of the split, where labels.csv has none")
    looked.add_argument("slide", help="a slide or an image")
    looked.add_argument("--tissue", type=float, default=0.5, help="least share of tissue in a tile, as in train.py")
    looked.add_argument("--cells", help="a segmentation result of this slide; default: the built-in detector")
    looked.add_argument("--out", help="the picture (look_<slide>.png)")
    for sub in (checked, looked):
        sub.add_argument("--mpp", type=float, help="um/px of the crops (2.0 is the paper's 5x)")
        sub.add_argument("--slide-mpp", type=float, help="um/px of slides that record none")
        sub.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes")
    for sub in (manifest, checked):
        sub.add_argument("--root", default="datasets", help="where the data sets lie")
    args = parser.parse_args(argv)

    def command():
        if args.command == "manifest":
            gdc.manifest(args.data, args.root, args.limit, args.server, args.timeout, args.force)
            return 0
        return look.check(args) if args.command == "check" else look.look(args)
    return exit_code("data.py", command)


if __name__ == "__main__":
    import data  # under its own name, so that InputError and Data are the same everywhere
    sys.exit(data.main())
