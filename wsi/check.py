"""python data.py check --data NAME: what a data set's folder holds, what is missing and where to get it."""
from collections import Counter

import numpy as np

from common.errors import InputError, printable
from common.flags import MAX_GIGAPIXELS
from common.pool import in_processes
from wsi import gdc
from wsi.cache import (
    describe_side,
    is_builtin,
    kept_shares,
    other_sides,
    read_slide_cells,
    read_square,
    tile_info,
    usual_side,
    without_color,
)
from wsi.cell_files import cell_files, unused_cell_files
from wsi.cells import cell_format
from wsi.datasets import DATASETS, OWN, PATCH_SETS, folder_of
from wsi.folders import not_read
from wsi.pixels import is_grey
from wsi.sanity import misplaced, suggested_scale, what_is_odd, where_cells_are_odd
from wsi.slides import CROP, NoScale, Slide

NO_SCALE = "not recorded"


def check(data, root, found, error, md5=False, workers=2, gigapixels=MAX_GIGAPIXELS):
    """Prints what a data set's folder holds, and a warning for whatever is missing or odd.

    data, root: as given to find_data; found: the wsi.folders.Data, or None with the error of find_data. md5:
    compares slides with the manifest. Returns the exit code, 1 if there are warnings.
    """
    known = DATASETS.get(data, OWN)
    folder = folder_of(data, root)
    print(f"{data}: {known.source}\nexpected: {known.layout.format(folder)}")
    if found:
        is_slides = found.kind == "slides"
    else:
        is_slides = folder.is_dir() and data not in PATCH_SETS
    others = not_read(folder) if is_slides else []
    if error:
        warnings = [error if folder.is_dir() else f"{folder}/ is missing; see the two lines above"]
        return report(warnings + [line for line in others if line not in error])
    warnings = [f"{path}: unfinished; run gdc-client download again"
                for path in gdc.unfinished(folder / "slides")] + others
    print(f"{found.kind}: {len(found.images)}")
    broken, lines = check_images(found, workers, gigapixels)
    warnings += lines + check_split(found, broken)
    if data not in PATCH_SETS:
        warnings += check_cells(found, broken, workers)
    if md5:
        statuses = gdc.md5_check(folder / "slides", folder / "manifest.tsv")
        warnings += [f"{file}: {status}" for file, status in statuses if status != "ok"]
    return report(warnings)


def report(warnings):
    """Prints the warnings and their number; returns the exit code."""
    for line in warnings:
        print("warning:", printable(line))
    print(f"warnings: {len(warnings)}" if warnings else "nothing is missing")
    return int(bool(warnings))


def look_at_slide(path, slide_mpp, said_mpp, gigapixels):
    """Returns where a slide's um/px are from (NO_SCALE: it has none), its um/px, and what is odd about it."""
    try:
        slide = Slide(path, slide_mpp, said_mpp, gigapixels)
    except NoScale:
        return NO_SCALE, None, [f"no um/px; {suggested_scale(path, gigapixels)}; "
                                "give it with --slide-mpp or a column mpp in labels.csv"]
    return slide.source, slide.mpp, what_is_odd(slide)


def look_at_crop(path):
    """Returns a crop's side in px, and whether it has no colour."""
    image = read_square(path)
    return image.width, is_grey(np.asarray(image))


def check_images(found, workers, gigapixels):
    """Opens every image and prints where the um/px of slides are from, or the sides of crops.

    Returns the names of the images that cannot be used (unreadable, or no um/px), and a warning for each of
    these and for whatever is odd.
    """
    if found.kind == "slides":
        look = look_at_slide
        tasks = {(path, found.slide_mpp, found.said_mpp(name), gigapixels): name
                 for name, path in found.images.items()}
    else:
        look = look_at_crop
        tasks = {(path,): name for name, path in found.images.items()}
    results = {}
    broken = set()
    warnings = []
    for task, result, error in in_processes(look, list(tasks), workers, found.kind):
        if error:
            warnings.append(error)
            broken.add(tasks[task])
        else:
            results[tasks[task]] = result
    print(f"{found.kind} that cannot be read: {len(broken)}")
    if found.kind == "slides":
        broken |= {name for name, (source, _, _) in results.items() if source == NO_SCALE}
        warnings += check_slides(found, results)
    elif results:
        warnings += check_crops(found, results)
    return broken, warnings


def check_slides(found, results):
    """Prints the um/px of slides; returns a warning for each odd slide.

    results: {slide: what look_at_slide returned}.
    """
    sources = Counter(source for source, _, _ in results.values())
    values = Counter(f"{mpp:.3g}" for _, mpp, _ in results.values() if mpp)
    cut = sum(tile_info(found, name) is not None for name in found.images)
    print("slides without um/px:", sources[NO_SCALE])
    print("um/px by:", ", ".join(f"{source} {n}" for source, n in sources.most_common()) or "none")
    print("um/px:", ", ".join(f"{mpp} ({n})" for mpp, n in values.most_common(8)) or "none")
    print(f"tiles cut: {cut} of {len(found.images)} slides")
    return [f"{found.images[name]}: {'; '.join(odd)}" for name, (_, _, odd) in results.items() if odd]


def check_crops(found, results):
    """Prints the sides of crops; returns a warning for each odd one. results: {crop: (side, is it grey)}."""
    sides = [side for side, _ in results.values()]
    usual = usual_side(sides)
    print("px a side:", ", ".join(f"{side:,} ({n})" for side, n in Counter(sides).most_common(8)))
    if found.mpp and usual != CROP:
        print(describe_side(usual, found.mpp))
    warnings = other_sides([found.images[name] for name in results], sides)
    grey = without_color([grey for _, grey in results.values()])
    if grey:
        warnings.append(f"{found.source}: {grey}")
    return warnings


def check_split(found, broken):
    """Prints readable images and patients of each class in each split; returns a warning for each gap.

    broken: names of the images that cannot be used.
    """
    if not found.labels:
        print("no labels.csv: all is for pre-training")
        return []
    splits = ("train", "test")
    if found.kind == "slides":
        splits = ("train", "val", "test")
        print(f"without a label, for pre-training only: {len(found.unlabelled())}")
    warnings = []
    for split in splits:
        rows = [found.labels[name] for name in found.split(split) if name not in broken]
        images = Counter(row["label"] for row in rows)
        patients_of_classes = {(row["label"], row["patient"]) for row in rows}
        patients = Counter(label for label, _ in patients_of_classes)
        print(f"{split}: " + ", ".join(f"{label} {images[label]} of {patients[label]} patients or groups"
                                       for label in found.classes))
        empty = [label for label in found.classes if not images[label]]
        if empty and (split != "val" or not rows):
            warnings.append(f"labels.csv: no usable {split} image of {', '.join(empty)}: eval.py needs one")
    return warnings


def look_at_cells(path, slide_mpp, said_mpp, file):
    """Returns the shares of the cells in the file that lie outside of the slide and on its glass."""
    slide = Slide(path, slide_mpp, said_mpp)
    return misplaced(read_slide_cells(file, slide), slide)


def check_places(found, files, workers):
    """Returns a warning for each slide whose cells do not lie on its tissue; files: {slide: file of cells}.

    Files that prepare() has read are not read again.
    """
    tasks, places, warnings = [], [], []
    for name, file in files.items():
        path = found.images[name]
        shares = kept_shares(found, name, file)
        if shares is None:
            tasks.append((path, found.slide_mpp, found.said_mpp(name), file))
        else:
            places.append((path, file, shares))
    for task, shares, error in in_processes(look_at_cells, tasks, workers, "cells, files"):
        if error:
            warnings.append(error)
        else:
            places.append((task[0], task[-1], shares))
    for path, file, shares in places:
        odd = where_cells_are_odd(*shares, file)
        if odd:
            warnings.append(f"{path}: {odd}")
    return warnings


def check_cells(found, broken, workers):
    """Prints whose cells exist; returns a warning for each image with missing, corrupt or misplaced cells.

    broken: names of the images that cannot be used.
    """
    warnings = unused_cell_files(found)
    files = cell_files(found)
    counts = Counter()
    to_place = {}
    for name, path in found.images.items():
        file = files[name]
        if file is None:
            counts["none yet"] += 1
            if found.prior not in ("auto", "builtin"):
                warnings.append(f"{path}: no cells of {found.prior}")
            continue
        try:
            counts["the built-in detector" if file.parent.name == "builtin" else cell_format(file)] += 1
        except InputError as error:
            warnings.append(str(error))
            continue
        if found.kind == "slides" and name not in broken and not is_builtin(found, file):
            to_place[name] = file
    print("cells:", ", ".join(f"{kind} {n}" for kind, n in counts.most_common()))
    return warnings + check_places(found, to_place, workers)
