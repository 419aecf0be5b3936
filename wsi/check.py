"""python data.py check --data NAME: what a data set's folder holds, what is missing and where to get it."""
from collections import Counter
from pathlib import Path

from common.errors import InputError, first_of, printable
from common.flags import MAX_GIGAPIXELS
from common.pool import call, in_processes
from wsi import gdc
from wsi.cache import cells_of_crop, describe_side, kept_cells, other_sides, tile_infos, usual_side
from wsi.cell_files import cell_files, is_builtin, unused_cell_files
from wsi.cells import cell_format
from wsi.datasets import DATASETS, OWN, PATCH_SETS, folder_of
from wsi.folders import not_read
from wsi.sanity import MISPLACED, open_slide, read_slide_cells, what_is_odd
from wsi.slides import CROP, Slide
from wsi.splits import equal_in_two_splits


def check(data, root, found, error, md5=False, workers=2, gigapixels=MAX_GIGAPIXELS):
    """Prints what a data set's folder holds, and a warning for whatever is missing or odd.

    data, root: as given to find_data; found: the wsi.folders.Data, or None with the error of find_data. md5:
    compares slides with the manifest. Returns the exit code, 1 if there are warnings.
    """
    known = DATASETS.get(data, OWN)
    folder = folder_of(data, root)
    print(f"{data}: {known.source}\nexpected: {known.layout.format(folder)}")
    if not folder.is_dir():
        return report([f"{folder}/ is missing; see the two lines above"])
    has_patches = data in PATCH_SETS or found and found.kind == "crops" and found.labels
    warnings = [] if has_patches else not_read(folder)
    if error:
        return report([error] + [line for line in warnings if line not in error])
    print(f"{found.kind}: {len(found.images)}")
    broken, lines = check_images(found, workers, gigapixels)
    warnings += lines + check_split(found, broken)
    if data not in PATCH_SETS:
        warnings += check_cells(found, broken, workers)
    if md5:
        warnings += check_md5(found)
    return report(warnings, len(found.warnings))


def report(warnings, printed=0):
    """Prints the warnings, and their number with those already printed; returns the exit code."""
    for line in warnings:
        print("warning:", printable(line))
    count = len(warnings) + printed
    print(f"warnings: {count}" if count else "nothing is missing")
    return int(bool(count))


def check_md5(found):
    """Returns a warning for each slide that differs from the manifest, and one for all that are missing.

    Slides that labels.csv lists as missing, and unfinished ones, have their warning already.
    """
    manifest = found.source / "manifest.tsv"
    statuses, error = call(gdc.md5_check, (found.source / "slides", manifest))
    if error:
        return [error]
    missing = [file for file, status in statuses
               if status == "missing" and Path(file).stem not in found.absent]
    warnings = []
    if missing:
        warnings.append(f"{manifest}: {len(missing)} of {len(statuses)} files are missing "
                        f"({first_of(missing)}); run gdc-client download again")
    for file, status in statuses:
        if status not in ("ok", "missing", "unfinished"):
            warnings.append(f"{file}: {status}; delete it and run gdc-client download again")
    return warnings


def look_at_slide(path, slide_mpp, said_mpp, mpp, gigapixels):
    """Returns where a slide's um/px are from, its um/px, and what is odd about it.

    mpp: um/px of the tiles, or None. InputError if the slide cannot be read, or is too coarse for them.
    """
    slide = open_slide(path, slide_mpp, said_mpp, gigapixels)
    if mpp:
        slide.check_target(mpp)
    return slide.source, slide.mpp, what_is_odd(slide)


def check_images(found, workers, gigapixels):
    """Opens every image and prints where the um/px of slides are from, or the sides of crops.

    Returns the names of the images that cannot be used (unreadable, too coarse, or no um/px), and a warning
    for each of these and for whatever is odd.
    """
    if found.kind == "slides":
        look = look_at_slide
        tasks = {(path, found.slide_mpp, found.said_mpp(name), found.mpp, gigapixels): name
                 for name, path in found.images.items()}
    else:
        look = cells_of_crop
        tasks = {(path, None, None): name for name, path in found.images.items()}
    results = {}
    warnings = []
    for task, result, error in in_processes(look, list(tasks), workers, found.kind):
        if error:
            warnings.append(error)
        else:
            results[tasks[task]] = result
    broken = found.images.keys() - results.keys()
    print(f"{found.kind} that cannot be used: {len(broken)}")
    if found.kind == "slides":
        warnings += check_slides(found, results)
    elif results:
        warnings += check_crops(found, results)
    return broken, warnings


def check_slides(found, results):
    """Prints the um/px of slides; returns a warning for each odd one. results: {slide: its look_at_slide}."""
    sources = Counter(source for source, _, _ in results.values())
    values = Counter(f"{mpp:.3g}" for _, mpp, _ in results.values())
    print("um/px by:", ", ".join(f"{source} {n}" for source, n in sources.most_common()) or "none")
    print("um/px:", ", ".join(f"{mpp} ({n})" for mpp, n in values.most_common(8)) or "none")
    if found.mpp:
        print(f"tiles cut at {found.mpp:g} um/px: {len(tile_infos(found))} of {len(found.images)} slides")
    return [f"{found.images[name]}: {'; '.join(odd)}" for name, (_, _, odd) in results.items() if odd]


def check_crops(found, results):
    """Prints the sides of crops; returns a warning for each odd one. results: {crop: its CropCells}."""
    sides = [crop.side for crop in results.values()]
    usual = usual_side(sides)
    print("px a side:", ", ".join(f"{side:,} ({n})" for side, n in Counter(sides).most_common(8)))
    if found.mpp and usual != CROP:
        print(describe_side(usual, found.mpp))
    warnings = other_sides([found.images[name] for name in results], sides)
    grey = sorted(name for name, crop in results.items() if crop.grey)
    if grey:
        warnings.append(f"{found.source}: {len(grey):,} of {len(results):,} crops have no colour "
                        f"({first_of(grey)}); H&E is needed")
    return warnings


def check_split(found, broken):
    """Prints readable images and patients of each class in each split; returns a warning for each gap.

    broken: names of the images that cannot be used.
    """
    if not found.labels:
        print("no labels.csv: all images are for pre-training")
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
    return warnings + equal_in_two_splits(found, found.labels.keys() - broken)


def look_at_cells(path, file, kind, mpp, slide_mpp, said_mpp):
    """Returns a warning if the cells in the file do not seem to belong where they lie on the image, or ""."""
    if kind == "slides":
        return read_slide_cells(file, Slide(path, slide_mpp, said_mpp))[1]
    xy = cells_of_crop(path, mpp or 1.0, file).xy
    outside = ((xy < 0) | (xy >= CROP)).any(1).sum()
    return f"{outside} of {len(xy)} cells lie outside of the crop" if outside > MISPLACED * len(xy) else ""


def check_places(found, files, workers):
    """Returns a warning for each image whose cells may be misplaced; files: {image: file of cells}.

    Files that prepare() has read are not read again.
    """
    tasks = []
    warnings = []
    for name, file in files.items():
        path = found.images[name]
        kept = kept_cells(found, name, file) if found.kind == "slides" else None
        if kept is None:
            tasks.append((path, file, found.kind, found.mpp, found.slide_mpp, found.said_mpp(name)))
        elif odd := str(kept.get("odd", "")):
            warnings.append(f"{path}: {file}: {odd}")
    for (path, file, *_), odd, error in in_processes(look_at_cells, tasks, workers, "cells, files"):
        if error or odd:
            warnings.append(error or f"{path}: {file}: {odd}")
    return warnings


def check_cells(found, broken, workers):
    """Prints whose cells exist; returns a warning for each image with missing, corrupt or misplaced cells.

    broken: names of the images that cannot be used.
    """
    warnings = unused_cell_files(found)
    files = cell_files(found)
    counts = Counter()
    missing = []
    to_place = {}
    for name in found.images:
        file = files[name]
        if file is None:
            counts["none yet"] += 1
            missing.append(name)
            continue
        try:
            counts["the built-in detector" if file.parent.name == "builtin" else cell_format(file)] += 1
        except InputError as error:
            warnings.append(str(error))
            continue
        if name not in broken and not is_builtin(found, file):
            to_place[name] = file
    print("cells:", ", ".join(f"{kind} {n}" for kind, n in counts.most_common()))
    if missing and found.prior not in ("auto", "builtin"):
        warnings.append(f"{found.source}/cells: {len(missing)} of {len(found.images)} {found.kind} have no "
                        f"cells of {found.prior} ({first_of(missing)}); put them into cells/{found.prior}/, "
                        "or use --prior builtin")
    return warnings + check_places(found, to_place, workers)
