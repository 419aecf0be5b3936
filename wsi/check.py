"""python data.py check --data NAME: what is in a data set's folder, what is missing and where to get it."""
from collections import Counter
from pathlib import Path

from common.datasets import CLASSES, DATASETS, FOLDERS
from common.errors import InputError, printable
from common.parallel import in_processes, limits_of
from wsi import gdc
from wsi.cells import cell_format
from wsi.plausible import suggested_scale, what_is_odd
from wsi.prepare import cell_file, read_crop, tile_info
from wsi.slides import NoScale, Slide

SLIDES_LAYOUT = ("{0}/slides/ (in subfolders too), {0}/labels.csv: slide,label[,patient][,split][,mpp], "
                 "{0}/cells/<slide>.*")
WHERE = {  # where to get a data set, and its layout
    "demo": ("made by python train.py; synthetic", SLIDES_LAYOUT),
    "lung": ("the GDC: python data.py manifest --data lung; LUAD, LUSC", SLIDES_LAYOUT),
    "brca": ("the GDC: python data.py manifest --data brca; IDC, ILC", SLIDES_LAYOUT),
    "paad": ("slides from the GDC (project TCGA-PAAD, diagnostic slides, portal.gdc.cancer.gov); basal or "
             "classical per patient is in the supplement of TCGA's PAAD paper (Raphael et al. 2017), for "
             "labels.csv", SLIDES_LAYOUT),
    "bright": ("research.ibm.com/haifa/Workshops/BRIGHT, after registering; labels PB, UDH, FEA, ADH, DCIS, "
               "IC, split train or validation (the paper tests on the official validation part); for bright3 "
               "and bright6", SLIDES_LAYOUT),
    "mhist": ("bmirds.github.io/MHIST, after registering",
              "{0}/images/*.png, {0}/annotations.csv as it comes"),
    "chaoyang": ("bupt-ai-cz.github.io/HSA-NRL, after registering",
                 "{0}/train.json, {0}/test.json, images at the names in them"),
}
NO_SCALE = "not recorded"
OWN = ("your own", SLIDES_LAYOUT + ", or crops/, or images with a labels.csv of image,label")


def check(args, found, error):
    """Prints what is there; 1 if something is missing or has to be looked at, else 0.

    found: the wsi.folders.Data, or None with the error that kept it from being read.
    """
    name = FOLDERS.get(args.data, args.data)
    folder = Path(args.root) / name if args.data in DATASETS else Path(args.data)
    where, layout = WHERE.get(name, OWN)
    print(f"{args.data}: {where}\nexpected: {layout.format(folder)}")
    if error:
        print("missing:", error)
        return 1
    problems = [f"{path}: unfinished; run gdc-client download again"
                for path in gdc.unfinished(folder / "slides")]
    print(f"{found.kind}: {len(found.images)}")
    broken, lines = check_images(found, args)
    problems += lines + check_split(found, broken)
    if args.data not in CLASSES:
        problems += check_cells(found)
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
        slide = Slide(path, slide_mpp, said_mpp)
    except NoScale:
        return NO_SCALE, None, [f"no um/px; {suggested_scale(path, gigapixels)}; "
                                "give it with --slide-mpp or a column mpp in labels.csv"]
    slide.check_size(gigapixels)
    return slide.source, slide.mpp, what_is_odd(slide)


def look_at_crop(path):
    """Nothing to say of a crop that can be read."""
    read_crop(path)
    return "no file: give --mpp", 0, []


def check_images(found, args):
    """Opens every image and prints where the um/px of slides are from.

    Returns the names of those that cannot be used (not readable, or no um/px), and a line for each of these
    and for what is odd.
    """
    problems, broken, sources, values = [], set(), Counter(), Counter()
    slides = found.kind == "slides"
    limits = limits_of(args)
    tasks = {(path, args.slide_mpp, found.said_mpp(name), limits.gigapixels) if slides else (path,): name
             for name, path in found.images.items()}
    look = look_at_slide if slides else look_at_crop
    for task, result, error in in_processes(look, list(tasks), args.workers, found.kind,
                                            limits.seconds):
        if error:
            problems.append(error)
            broken.add(tasks[task])
            continue
        source, mpp, odd = result
        sources[source] += 1
        if source == NO_SCALE:
            broken.add(tasks[task])
        else:
            values[f"{mpp:.3g}"] += 1
        problems += [f"{task[0]}: {'; '.join(odd)}"] if odd else []
    print(f"{found.kind} that cannot be read: {len(broken) - sources[NO_SCALE]}")
    if slides:
        print("slides without um/px:", sources[NO_SCALE])
        print("um/px by:", ", ".join(f"{source} {n}" for source, n in sources.most_common()) or "none")
        print("um/px:", ", ".join(f"{mpp} ({n})" for mpp, n in values.most_common(8)) or "none")
        made = sum(tile_info(found, name) is not None for name in found.images)
        print(f"tiles cut: {made} of {len(found.images)} slides")
    return broken, problems


def check_split(found, broken):
    """Prints readable images and patients of each class in each split; a line for each class without any."""
    if not found.labels:
        print("no labels.csv: all is for pre-training")
        return []
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


def check_cells(found):
    """Prints whose cells are there; one line for each image that has none of --prior or no readable ones."""
    problems, cells = [], Counter()
    for name, path in found.images.items():
        file = cell_file(found, name if found.kind == "slides" else str(Path(name).with_suffix("")))
        if file is None:
            cells["none yet"] += 1
            if found.prior not in ("auto", "builtin"):
                problems.append(f"{path}: no cells of {found.prior}")
            continue
        try:
            cells["the built-in detector" if file.parent.name == "builtin" else cell_format(file)] += 1
        except InputError as error:
            problems.append(str(error))
    print("cells:", ", ".join(f"{kind} {n}" for kind, n in cells.most_common()))
    return problems
