"""Reads a data set's folder (A.1): slides or ready-cut crops, with labels. Layouts: docs/data.md.

The user's folder is only read: tiles, cells and the split are written to datasets/<name>/.
"""
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import InputError, first_of, printable
from common.files import files_under, read_json, write_json
from wsi.datasets import DATASETS, OWN, PATCH_SETS, folder_of, safe_name
from wsi.labels import (
    COLUMNS,
    bright_rows,
    check_rows,
    labels_row,
    named,
    read_chaoyang,
    read_mhist,
    read_table,
    refuse_repeats,
    same_patients,
    slide_of,
    tcga_patient,
)
from wsi.slides import PLAIN_TYPES, SLIDE_TYPES, file_identity, find_slides, slide_name, why_not_read

CROP_TYPES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}


@dataclass
class Data:
    """A data set on disk.

    images: {name: file}, slides or crops. labels: {name: {"label", "patient", "split", "mpp"}}; "patient" is
    the unit that stays in one split: a patient, or the source tile or group of ready-cut crops.
    pretrain_only: such rows of slides without a label, or that a published split leaves out. absent: those of
    slides without a file, which still tie their patient to a split. warnings: what was printed about
    labels.csv. split_file: of a published split (wsi.published), else the data set's own split counts.
    """

    name: str
    source: Path  # the user's folder
    work: Path  # datasets/<name>
    mpp: float  # um/px of the crops; None if not given
    kind: str  # "slides" or "crops"
    images: dict
    slide_mpp: float = None  # --slide-mpp: um/px of slides that record none
    prior: str = "auto"  # whose cells: one of PRIORS, or NO_CELLS
    paper_prior: str = ""  # whose cells "auto" looks for first, "" for none
    labels: dict = field(default_factory=dict)
    pretrain_only: dict = field(default_factory=dict)
    absent: dict = field(default_factory=dict)
    classes: list = field(default_factory=list)
    warnings: list = field(default_factory=list)
    split_file: Path = None

    def split(self, *splits):
        """Returns the images of splits, split after split, each sorted; without labels all are "train"."""
        split_of = {name: row["split"] for name, row in self.labels.items()}
        split_of = split_of or dict.fromkeys(self.images, "train")
        return [name for split in splits for name in sorted(split_of) if split_of[name] == split]

    def said_mpp(self, name):
        """Returns a slide's um/px in the column mpp of labels.csv, or None."""
        row = self.labels.get(name) or self.pretrain_only.get(name, {})
        return row.get("mpp")

    def content_of(self, name):
        """Returns the hash of an image's file, by which it is known under another name; "" if unreadable."""
        return file_identity(self.images[name])["file_hash"]

    def has_own_content(self, name):
        """Whether files of equal content are one image: not crops (glass), nor .mrxs without its folder."""
        return self.kind == "slides" and self.images[name].suffix.lower() != ".mrxs"

    def names_of_patients(self):
        """Returns same_patients of all rows, including slides that only split.csv still lists."""
        rows = self.absent | self.pretrain_only | self.labels
        return same_patients((name, row["patient"]) for name, row in rows.items())

    def unlabelled(self):
        """Returns the slides without a label that join pre-training: no slide of their patient is tested.

        The patient is known from a row of labels.csv with an empty label, or from a TCGA name; slides of
        unknown patients are skipped, and so are those that split.csv has in test. A published split has no
        such slides.
        """
        if not self.labels or self.split_file:
            return []
        names_of = self.names_of_patients()
        held_out = {name: row for name, row in (self.absent | self.labels).items() if row["split"] == "test"}
        tested = set()
        for row in held_out.values():
            tested |= names_of.get(row["patient"], {row["patient"]})  # labels.csv may have renamed it
        patients = {name: tcga_patient(name) for name in self.images if name not in self.labels}
        patients |= {name: row["patient"] for name, row in self.pretrain_only.items()}
        return sorted(name for name, patient in patients.items()
                      if patient and patient not in tested and name not in held_out)


def find_folder(data, mpp=None, prior="auto", root="datasets", slide_mpp=None, has_classes=True):
    """Returns the Data of a name in DATASETS or of a folder; splits are those of labels.csv, or "".

    A folder holds slides/ (or slides directly), crops/ alone, or images with a labels.csv of image,label.
    has_classes: otherwise labels.csv's classes and splits are neither read nor checked. InputError if the
    folder or its images are missing, or if a name's labels are not the paper's.
    """
    if data in DATASETS:
        source = folder_of(data, root)
        name = source.name
        mpp = mpp or DATASETS[data].mpp
        missing = (f"{source}/ is missing; python data.py check --data {data} prints where to get it and its "
                   "layout")
    else:
        source = Path(data)
        name = safe_name(source)
        missing = f"{data}: neither a folder nor one of {', '.join(DATASETS)}"
    if not source.is_dir():
        raise InputError(missing)
    kind, images, rows, warnings = read_layout(data, source)
    if not images:
        types = SLIDE_TYPES if kind == "slides" else CROP_TYPES
        others = not_read(source) + [f"put them into {source}/slides/"] if kind == "slides" else []
        raise InputError("; ".join([f"{source}: no {kind} in it ({' '.join(sorted(types))})", *others[:1]]))
    paper_prior = DATASETS.get(data, OWN).prior
    found = Data(name, source, Path(root) / name, mpp, kind, images, slide_mpp, prior, paper_prior)
    refuse_repeats(rows)
    if rows and not has_classes:
        found.pretrain_only = {row["name"]: row for row in rows}
    elif rows:
        found.labels, found.pretrain_only, found.absent, more = check_rows(rows, images, kind)
        warnings = warnings + more
        found.classes = sorted({row["label"] for row in found.labels.values()})
    if data in PATCH_SETS:
        found.classes = list(DATASETS[data].classes)
    unknown = [label for label in found.classes if data in DATASETS and label not in DATASETS[data].classes]
    if unknown:
        segmenter = f" --prior {paper_prior}" if paper_prior else ""
        raise InputError(f"{source}/labels.csv: --data {data} has the labels "
                         f"{', '.join(DATASETS[data].classes)}, not {first_of(unknown)}; for other classes "
                         f"name the folder: --data {source} --mpp {mpp:g}{segmenter}")
    found.warnings = warnings
    for line in warnings:
        print("warning:", line)
    return found


def read_layout(data, source):
    """Returns a folder's kind, {name: file}, label rows (see labels_row), [] without labels, and warnings."""
    if data in PATCH_SETS:
        rows = read_mhist(source) if data == "mhist" else read_chaoyang(source)
        folder = source / "images" if data == "mhist" else source
        return "crops", image_files(rows, folder), rows, []
    table = find_table(source)
    if table is None and has_crops(source):
        crops = source / "crops"
        images = {str(path.relative_to(crops)): path for path in files_under(crops)
                  if path.suffix.lower() in CROP_TYPES}
        return "crops", images, [], unread_tables(source)
    if table is None:
        return "slides", find_slides(files_in(source)), [], unread_tables(source)
    names, rows = read_table(table)
    kind = "crops" if "image" in names else "slides"
    unread = sorted(set(names) - {"", *COLUMNS[kind]})
    warnings = named(unread, f"{table}: these columns are not read (those of {kind} are "
                     f"{', '.join(COLUMNS[kind])})")
    if kind == "crops":
        rows = [labels_row(table, line, row, row.get("image", "")) for line, row in rows]
        images = image_files(rows, source)
        if not images and (source / "slides").is_dir():
            raise InputError(f"{table}: its column image is for ready-cut crops, and no file has these "
                             "names; for slides, name the column slide")
        return kind, images, rows, warnings
    if has_crops(source):
        raise InputError(f"{table}: labels slides, but {source} holds crops; the columns for crops are "
                         "image,label, where image is crops/...")
    images = find_slides(files_in(source))
    rows = [labels_row(table, line, row, slide_of(row.get("slide") or row.get("slide_id", ""), images))
            for line, row in rows]
    return kind, images, bright_rows(rows, data) if data in ("bright3", "bright6") else rows, warnings


def unread_tables(source):
    """Returns a warning if a folder without labels.csv has a file that is probably meant to be it."""
    names = [path.relative_to(source).as_posix() for path in [*source.glob("*"), *source.glob("slides/*")]
             if re.fullmatch(r"labels?[\w. ]*\.(csv|tsv|txt|xlsx?)", path.name.lower())]
    return named(sorted(names), f"{source}: has no labels.csv, so all its images are for pre-training; "
                 f"is it this file? Save it as {source}/labels.csv")


def find_table(source):
    """Returns a folder's labels.csv, or None; InputError if it is spelled differently or is not a file."""
    for path in source.iterdir():
        if path.name.lower() == "labels.csv":
            if path.name != "labels.csv" or not path.is_file():
                raise InputError(f"{path}: is not a file named labels.csv; rename or remove it")
            return path
    return None


def has_crops(source):
    """Returns whether a folder holds ready-cut crops, and not slides with the tiles that were cut from them.

    The latter is so for slides directly in datasets/<name>/, where their tiles go to crops/2um/.
    """
    crops = source / "crops"
    if not crops.is_dir() or (source / "slides").is_dir():
        return False
    has_tiles = any(crops.glob("[0-9]*um"))
    return not (has_tiles and find_slides(files_in(source)))


def files_in(source):
    """Returns the files to search for slides: those under slides/ if it exists, else those of the folder."""
    if (source / "slides").is_dir():
        return files_under(source / "slides")
    return (path for path in source.iterdir() if path.is_file() and not path.name.startswith("."))


def not_read(source):
    """Returns a line for each file that looks like a slide but is not read, and one for all subfolders.

    Of ready-cut crops it is a line for each such file in crops/.
    """
    are_crops = has_crops(source)
    files = files_under(source / "crops") if are_crops else files_in(source)
    lines = [f"{path}: {why}" for path in sorted(files) if (why := why_not_read(path))]
    others = slides_elsewhere(source)
    if others and not are_crops:
        lines.append(f"{source}: {len(others)} subfolders or files in it hold slides ({first_of(others)}), "
                     f"but only {source}/slides/ is read, with its subfolders; move them there")
    return lines


def slides_elsewhere(source):
    """Returns the names of slides in a folder, or of folders with slides, where slides are not read.

    Next to slides/, plain images do not count as slides.
    """
    has_slides_folder = (source / "slides").is_dir()
    types = SLIDE_TYPES - PLAIN_TYPES if has_slides_folder else SLIDE_TYPES
    names = []
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in ("slides", "cells", "crops"):
            continue
        files = []
        if path.is_dir():
            files = path.iterdir()
        elif has_slides_folder:
            files = [path]
        if any(file.suffix.lower() in types and not file.name.startswith(".") for file in files):
            names.append(path.name)
    return names


def claim_work(found):
    """Records in datasets/<name>/source.json which folder it is made from, if writable; returns the Data.

    InputError if it is made from another folder of the same name, or is itself a data set: results of the
    two would overwrite each other's.
    """
    folder = found.source.resolve()
    if folder == found.work.resolve():
        return found
    tables = ("labels.csv", "annotations.csv", "train.json")  # read_layout's
    is_data_set = any((found.work / name).exists() for name in ("slides", *tables))
    if is_data_set or found.work.is_dir() and find_slides(files_in(found.work)):
        raise InputError(f"{found.source}: {found.work} is another data set of this name; rename one of them")
    record = found.work / "source.json"
    before = Path(read_json(record).get("folder", folder))
    if before == folder and record.is_file():
        return found
    if before.is_dir() and not before.samefile(folder):
        raise InputError(f"{found.source}: {found.work} is of another folder of the same name, {before}; "
                         f"rename one of the two, or delete {record} if this is a copy of that")
    if before != folder:
        print(printable(f"{found.work}: was made from {before}, which is gone, and is now used for {folder}"))
    with suppress(InputError):
        write_json(record, {"folder": str(folder)})
    return found


def image_files(rows, folder):
    """Returns {name: file} of the images in rows that exist; InputError if one is outside the folder."""
    for row in rows:
        name = Path(row["name"])
        if name.is_absolute() or ".." in name.parts:
            raise InputError(f"{row['where']}: image {row['name']!r} is outside the folder")
        row["name"] = name.as_posix()  # so that a/./b and a/b are one name
    return {row["name"]: folder / row["name"] for row in rows if (folder / row["name"]).is_file()}


def mpp_in_table(path):
    """Returns the um/px of a slide file in the labels.csv of its data set's folder, or None."""
    folder = next((parent.parent for parent in path.parents if parent.name == "slides"), path.parent)
    table = find_table(folder)
    names, rows = read_table(table) if table else ([], [])
    images = {slide_name(path): path}
    for line, row in rows:
        name = slide_of(row.get("slide") or row.get("slide_id", ""), images)
        if name in images:
            return labels_row(table, line, row, name)["mpp"]
    return None
