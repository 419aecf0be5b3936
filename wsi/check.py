"""python data.py check --data NAME: what is in a data set's folder, what is missing and where to get it."""
from collections import Counter
from pathlib import Path

import numpy as np

from common.errors import InputError, printable
from common.pool import in_processes, limits_of
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
from wsi.datasets import CLASSES, DATASETS, FOLDERS, OWN, WHERE
from wsi.folders import not_read
from wsi.pixels import is_grey
from wsi.sanity import misplaced, suggested_scale, what_is_odd, where_cells_are_odd
from wsi.slides import CROP, NoScale, Slide

NO_SCALE = "not recorded"


def check(args, found, error):
    """Prints what is there; 1 if something is missing or has to be looked at, else 0.

    found: the wsi.folders.Data, or None with the error that kept it from being read.
    """
    name = FOLDERS.get(args.data, args.data)
    folder = Path(args.root) / name if args.data in DATASETS else Path(args.data)
    where, layout = WHERE.get(name, OWN)
    print(f"{args.data}: {where}\nexpected: {layout.format(folder)}")
    is_slides = found.kind == "slides" if found else folder.is_dir() and args.data not in CLASSES
    others = not_read(folder) if is_slides else []
    if error:
        print("missing:", error if folder.is_dir() else f"{folder}/; see the two lines above")
        for line in others:
            if line not in error:
                print("look at:", printable(line))
        return 1
    problems = [f"{path}: unfinished; run gdc-client download again"
                for path in gdc.unfinished(folder / "slides")] + others
    print(f"{found.kind}: {len(found.images)}")
    broken, lines = check_images(found, args)
    problems += lines + check_split(found, broken)
    if args.data not in CLASSES:
        problems += check_cells(found, broken, args)
    if args.md5:
        problems += [f"{file}: {status}" for file, status in
                     gdc.md5_check(folder / "slides", folder / "manifest.tsv") if status != "ok"]
    for line in problems:
        print("look at:", printable(line))
    print(f"{len(problems)} to look at" if problems else "all is there")
    return int(bool(problems))


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


def check_images(found, args):
    """Opens every image and prints where the um/px of slides are from, or the sides of crops.

    Returns the names of those that cannot be used (not readable, or no um/px), and a line for each of these
    and for what is odd.
    """
    problems, broken, results, limits = [], set(), {}, limits_of(args)
    slides = found.kind == "slides"
    tasks = {(path, args.slide_mpp, found.said_mpp(name), limits.gigapixels) if slides else (path,): name
             for name, path in found.images.items()}
    look = look_at_slide if slides else look_at_crop
    for task, result, error in in_processes(look, list(tasks), args.workers, found.kind, limits.seconds):
        if error:
            problems.append(error)
            broken.add(tasks[task])
        else:
            results[task[0]] = result
    print(f"{found.kind} that cannot be read: {len(broken)}")
    if slides:
        sources = Counter(source for source, _, _ in results.values())
        values = Counter(f"{mpp:.3g}" for _, mpp, _ in results.values() if mpp)
        problems += [f"{path}: {'; '.join(odd)}" for path, (_, _, odd) in results.items() if odd]
        broken |= {name for task, name in tasks.items() if results.get(task[0], [""])[0] == NO_SCALE}
        print("slides without um/px:", sources[NO_SCALE])
        print("um/px by:", ", ".join(f"{source} {n}" for source, n in sources.most_common()) or "none")
        print("um/px:", ", ".join(f"{mpp} ({n})" for mpp, n in values.most_common(8)) or "none")
        made = sum(tile_info(found, name) is not None for name in found.images)
        print(f"tiles cut: {made} of {len(found.images)} slides")
    elif results:
        problems += check_crops(found, results)
    return broken, problems


def check_crops(found, results):
    """Prints the sides of crops; returns a line for what is odd. results: {file: its side, is it grey}."""
    sides = [side for side, _ in results.values()]
    print("px a side:", ", ".join(f"{side:,} ({n})" for side, n in Counter(sides).most_common(8)))
    usual = usual_side(sides)
    if found.mpp and usual != CROP:
        print(describe_side(usual, found.mpp))
    grey = without_color([grey for _, grey in results.values()])
    return other_sides(list(results), sides) + ([f"{found.source}: {grey}"] if grey else [])


def check_split(found, broken):
    """Prints readable images and patients of each class in each split; a line for each class without any."""
    if not found.labels:
        print("no labels.csv: all is for pre-training")
        return []
    if found.kind == "slides":
        print(f"without a label, for pre-training only: {len(found.unlabelled())}")
    problems, parts = [], ("train", "val", "test") if found.kind == "slides" else ("train", "test")
    for part in parts:
        rows = [found.labels[name] for name in found.split(part) if name not in broken]
        counts = Counter(row["label"] for row in rows)
        patients = {label: len({row["patient"] for row in rows if row["label"] == label})
                    for label in found.classes}
        print(f"{part}: " + ", ".join(f"{label} {counts[label]} of {patients[label]} patients or groups"
                                      for label in found.classes))
        missing = [label for label in found.classes if not counts[label]]
        if missing and (part != "val" or not rows):
            problems.append(f"labels.csv: no usable {part} image of {', '.join(missing)}: eval.py needs one")
    return problems


def look_at_cells(path, slide_mpp, said_mpp, file):
    """Returns the shares of the cells in the file that lie outside of the slide and on its glass."""
    slide = Slide(path, slide_mpp, said_mpp)
    return misplaced(read_slide_cells(file, slide), slide)


def check_places(found, files, args):
    """Returns a line for each slide whose cells do not lie on its tissue; files: {slide: its file of cells}.

    Files that prepare() has read are not read again.
    """
    problems, tasks, places = [], [], []
    for name, file in files.items():
        path, shares = found.images[name], kept_shares(found, name, file)
        if shares is None:
            tasks.append((path, args.slide_mpp, found.said_mpp(name), file))
        else:
            places.append((path, file, shares))
    seconds = limits_of(args).seconds
    for task, shares, error in in_processes(look_at_cells, tasks, args.workers, "cells, files", seconds):
        if error:
            problems.append(error)
        else:
            places.append((task[0], task[-1], shares))
    for path, file, shares in places:
        odd = where_cells_are_odd(*shares, file)
        problems += [f"{path}: {odd}"] if odd else []
    return problems


def check_cells(found, broken, args):
    """Prints whose cells exist; returns a line for each image whose cells are missing, broken or misplaced.

    broken: names of the images that cannot be read.
    """
    problems, cells, given = unused_cell_files(found), Counter(), {}
    files = cell_files(found)
    for name, path in found.images.items():
        file = files[name]
        if file is None:
            cells["none yet"] += 1
            if found.prior not in ("auto", "builtin"):
                problems.append(f"{path}: no cells of {found.prior}")
            continue
        try:
            cells["the built-in detector" if file.parent.name == "builtin" else cell_format(file)] += 1
        except InputError as error:
            problems.append(str(error))
            continue
        if found.kind == "slides" and name not in broken and not is_builtin(found, file):
            given[name] = file
    print("cells:", ", ".join(f"{kind} {n}" for kind, n in cells.most_common()))
    return problems + check_places(found, given, args)
