"""What is in a data set's folder (A.1): slides or ready-cut crops, and labels.csv. Layouts: docs/data.md.

What is made from it (tiles, cells, the split) goes to datasets/<name>/; the user's folder is only read.
"""
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import InputError, check_mpp, printable
from common.files import files_under, read_csv, read_json, write_json
from wsi.datasets import BRIGHT3, DATASETS, PATCH_SETS, folder_of, safe_name
from wsi.slides import PLAIN_TYPES, SLIDE_TYPES, find_slides, why_not_read

CROP_TYPES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
          "test": "test"}


@dataclass
class Data:
    """A data set on disk.

    images: {name: file}, slides or crops; labels: {name: {"label", "patient", "split", "mpp"}}. patient is
    what has to stay in one split: a patient, or a source tile or group of ready-cut crops. pretrain_only has
    the rows of slides without a label, absent those of slides without a file, which still place a patient.
    """

    name: str
    source: Path  # the user's folder
    work: Path  # datasets/<name>
    mpp: float  # um/px of the crops; None if not given
    kind: str  # "slides" or "crops"
    images: dict
    slide_mpp: float = None  # um/px of slides that record none, as the user said
    prior: str = "auto"  # whose cells: one of PRIORS
    labels: dict = field(default_factory=dict)
    pretrain_only: dict = field(default_factory=dict)
    absent: dict = field(default_factory=dict)
    classes: list = field(default_factory=list)

    def split(self, *parts):
        """Names of "train", "val", "test", part after part, each sorted; without labels all is "train"."""
        split_of = {name: row["split"] for name, row in self.labels.items()}
        split_of = split_of or dict.fromkeys(self.images, "train")
        return [name for part in parts for name in sorted(split_of) if split_of[name] == part]

    def crops_of_part(self, part):
        """How captions name the crops of a part; without labels.csv every crop is for training."""
        return f"{part} crops" if self.labels else "training crops (no labels)"

    def said_mpp(self, name):
        """um/px of a slide by the column mpp of labels.csv, or None."""
        row = self.labels.get(name) or self.pretrain_only.get(name, {})
        return row.get("mpp")

    def names_of_patients(self):
        """same_patients of all rows: of labels.csv, and of slides that split.csv alone still names."""
        rows = self.absent | self.pretrain_only | self.labels
        return same_patients((name, row["patient"]) for name, row in rows.items())

    def unlabelled(self):
        """Slides without a label that join pre-training: their patient is known and has no test slide.

        The patient is known by a row of labels.csv with an empty label, or by a TCGA name.
        """
        if not self.labels:
            return []
        names_of, tested = self.names_of_patients(), set()
        for row in (self.absent | self.labels).values():
            if row["split"] == "test":
                tested |= names_of[row["patient"]]
        patients = {name: tcga_patient(name) for name in self.images if name not in self.labels}
        patients |= {name: row["patient"] for name, row in self.pretrain_only.items()}
        return sorted(name for name, patient in patients.items() if patient and patient not in tested)


def find_folder(data, mpp=None, prior="auto", root="datasets", slide_mpp=None):
    """The data set of a name in DATASETS or of a folder; its split is labels.csv's ("" if it has none).

    A folder holds slides/ (or slides directly), crops/ alone, or images with a labels.csv of image,label.
    InputError in one line for what is missing.
    """
    check_mpp(mpp, "--mpp")
    check_mpp(slide_mpp, "--slide-mpp")
    known = data in DATASETS
    source = folder_of(data, root)
    if not source.is_dir():
        raise InputError(
            f"{source}/ is not there; "
            f"python data.py check --data {data} says where to get it and what goes where"
            if known else f"--data {data}: neither a folder nor one of {', '.join(DATASETS)}")
    name = source.name if known else safe_name(source)
    kind, images, rows = read_layout(data, source)
    if not images:
        types = SLIDE_TYPES if kind == "slides" else CROP_TYPES
        others = not_read(source) if kind == "slides" else []
        raise InputError(f"{source}: no {kind} in it ({' '.join(sorted(types))})"
                         f"{'; ' + others[0] if others else ''}")
    mpp = mpp or (DATASETS[data].mpp if known else None)
    found = Data(name, source, Path(root) / name, mpp, kind, images, slide_mpp, prior)
    if rows:
        found.labels, found.pretrain_only, found.absent = check_rows(rows, images, kind)
        found.classes = sorted({row["label"] for row in found.labels.values()})
    if data in PATCH_SETS:
        found.classes = list(DATASETS[data].classes)
    return found


def read_layout(data, source):
    """(kind, {name: file}, label rows or []) of a folder; rows have where, name, label, patient, split."""
    if data in PATCH_SETS:
        rows = read_mhist(source) if data == "mhist" else read_chaoyang(source)
        folder = source / "images" if data == "mhist" else source
        return "crops", image_files(rows, folder), rows
    table = find_table(source)
    names, rows = read_table(table) if table else ([], [])
    if "image" in names:
        rows = [labels_row(table, line, row, row.get("image", "")) for line, row in rows]
        return "crops", image_files(rows, source), rows
    if (source / "crops").is_dir() and not (source / "slides").is_dir():
        files = sorted(path for path in files_under(source / "crops") if path.suffix.lower() in CROP_TYPES)
        return "crops", {str(path.relative_to(source / "crops")): path for path in files}, []
    images = find_slides(files_in(source))
    rows = [labels_row(table, line, row, slide_of(row.get("slide", ""), images)) for line, row in rows]
    return "slides", images, bright_rows(rows, data) if data in ("bright3", "bright6") else rows


def find_table(source):
    """The labels.csv of a folder, or None; InputError for another spelling of it, or for what is no file."""
    for path in source.iterdir():
        if path.name.lower() == "labels.csv":
            if path.name != "labels.csv" or not path.is_file():
                raise InputError(f"{path}: is not a file named labels.csv; rename it or take it out")
            return path
    return None


def files_in(source):
    """The files among which a folder's slides are: all under its slides/, else its own; no hidden ones."""
    if (source / "slides").is_dir():
        return files_under(source / "slides")
    return (path for path in source.iterdir() if path.is_file() and not path.name.startswith("."))


def not_read(source):
    """What looks like slides in a folder and is not read: a line for each file, one for all subfolders."""
    lines = [f"{path}: {why}" for path in sorted(files_in(source)) if (why := why_not_read(path))]
    beside = slides_beside(source)
    if beside:
        names = ", ".join(beside[:3]) + (", ..." if len(beside) > 3 else "")
        lines.append(f"{source}: {len(beside)} subfolders or files in it hold slides ({names}), but only "
                     f"{source}/slides/ is read, with its subfolders; move them there")
    return lines


def slides_beside(source):
    """Names in a folder that are slides, or folders of slides, and are not where slides are read.

    Next to slides/, plain images are no slides.
    """
    apart = (source / "slides").is_dir()
    types = SLIDE_TYPES - PLAIN_TYPES if apart else SLIDE_TYPES
    out = []
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in ("slides", "cells", "crops"):
            continue
        files = path.iterdir() if path.is_dir() else [path] if apart else []
        if any(file.suffix.lower() in types and not file.name.startswith(".") for file in files):
            out.append(path.name)
    return out


def tell_source(found):
    """Prints a warning if what is kept of a data set was made from another folder of its name."""
    kept, folder = found.work / "source.json", str(found.source.resolve())
    before = read_json(kept).get("folder", folder)
    if before != folder:
        print(printable(f"warning: {found.work} was made from {before} and is now used for {folder}; what "
                        "differs is recomputed. Rename one of the two folders to keep both"))
    if read_json(kept) != {"folder": folder} and found.work.resolve() != found.source.resolve():
        write_json(kept, {"folder": folder})


def image_files(rows, folder):
    """{name: file} of the images that rows name and that exist; InputError if one is outside the folder."""
    for row in rows:
        name = Path(row["name"])
        if name.is_absolute() or ".." in name.parts:
            raise InputError(f"{row['where']}: image {row['name']!r} lies outside the folder")
        row["name"] = name.as_posix()  # one name for a/./b and a/b
    return {row["name"]: folder / row["name"] for row in rows if (folder / row["name"]).is_file()}


def slide_of(name, images):
    """The name of a slide, which labels.csv gives with or without its file's extension."""
    known_ending = Path(name).suffix.lower() in SLIDE_TYPES
    return Path(name).stem if name not in images and known_ending else name


# ---------------------------------------------------------------- labels

def read_table(path):
    """read_csv of a labels.csv; InputError without rows, or without columns slide,label or image,label.

    CLAM's case_id,slide_id,label is read as patient,slide,label.
    """
    names, rows = read_csv(path)
    clam = {"slide_id": "slide", "case_id": "patient"}
    names = [clam.get(name, name) for name in names]
    rows = [(line, {clam.get(name, name): value for name, value in row.items()}) for line, row in rows]
    if "label" not in names or not {"slide", "image"} & set(names):
        raise InputError(f"{path}: its first line has to name the columns slide,label (or image,label), "
                         f"not {','.join(names)}")
    if not rows:
        raise InputError(f"{path}: no row in it")
    return names, rows


def tcga_patient(name):
    """The patient in a TCGA barcode, its first 12 characters (TCGA-55-1234); "" for any other name."""
    barcode = re.match(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?![A-Za-z0-9])", name.rsplit("/", 1)[-1])
    return barcode[0] if barcode else ""


def patient_of(name):
    """The patient of an image where labels.csv names none: TCGA's, else the image itself."""
    return tcga_patient(name) or name


def same_patients(named):
    """{name of a patient: all names of that patient} of (slide, patient) pairs.

    A slide with a TCGA name is also of the patient in that name, whatever labels.csv says: two patients of
    labels.csv that share one are one.
    """
    names_of = {}
    for slide, patient in named:
        barcodes = {tcga_patient(patient), tcga_patient(slide)} - {""}
        names = {patient} | barcodes
        for known in names & names_of.keys():
            names = names | names_of[known]
        names_of |= dict.fromkeys(names, names)
    return names_of


def labels_row(path, line, row, name):
    """A line of labels.csv as a row of read_layout."""
    try:
        mpp = float(row["mpp"]) if row.get("mpp") else None
        check_mpp(mpp, "mpp")
    except (ValueError, InputError):
        raise InputError(f"{path}: line {line}: mpp {row['mpp']!r} is not the um/px of a slide "
                         "(0.5 is 20x)") from None
    patient = row.get("patient") or row.get("group") or row.get("source_tile") or ""
    return {"where": f"{path}: line {line}", "name": name, "label": row.get("label", ""), "patient": patient,
            "split": row.get("split", "").lower(), "mpp": mpp}


def bright_rows(rows, data):
    """BRIGHT's rows with their three or six classes; its official validation part is the test part (A.1)."""
    has_test = any(SPLITS.get(row["split"]) == "test" for row in rows)
    for row in rows:
        if not row["label"]:
            continue  # check_rows decides
        if row["label"] not in BRIGHT3:
            raise InputError(f"{row['where']}: label {row['label']!r} is none of {', '.join(BRIGHT3)}")
        if data == "bright3":
            row["label"] = BRIGHT3[row["label"]]
        if not has_test and SPLITS.get(row["split"]) == "val":
            row["split"] = "test"
    return rows


def read_mhist(source):
    """Rows of MHIST as distributed: annotations.csv, with its official Partition."""
    table = source / "annotations.csv"
    names, rows = read_csv(table)
    columns = ("image name", "majority vote label", "partition")
    if not set(columns) <= set(names):
        raise InputError(f"{table}: its first line has to name Image Name, Majority Vote Label and Partition")
    out = []
    for line, row in rows:
        name, label, part = (row.get(column, "") for column in columns)
        out.append({"where": f"{table}: line {line}", "name": name, "label": label, "patient": name,
                    "split": part.lower()})
    return check_patch_rows(out, "mhist")


def read_chaoyang(source):
    """Rows of Chaoyang as distributed: train.json and test.json, lists of {"name": file, "label": 0 to 3}."""
    out, classes = [], DATASETS["chaoyang"].classes
    for part in ("train", "test"):
        table = source / f"{part}.json"
        try:
            entries = json.loads(table.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{table}: cannot be read as JSON ({error}); download it again") from None
        for number, entry in enumerate(entries if isinstance(entries, list) else [None]):
            where = f"{table}: entry {number}"
            if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or "label" not in entry:
                raise InputError(f'{where}: {{"name", "label"}} is expected')
            name, label = entry["name"], entry["label"]
            known = isinstance(label, int) and 0 <= label < len(classes)
            out.append({"where": where, "name": name, "label": classes[label] if known else label,
                        "patient": name, "split": part})
    return check_patch_rows(out, "chaoyang")


def check_patch_rows(rows, data):
    """InputError if a row of MHIST or Chaoyang has a label or split that the data set does not have."""
    for row in rows:
        if row["label"] not in DATASETS[data].classes:
            raise InputError(f"{row['where']}: label {row['label']!r} of {row['name']} is none of "
                             f"{', '.join(DATASETS[data].classes)}")
        if row["split"] not in ("train", "test"):
            raise InputError(f"{row['where']}: Partition {row['split']!r} of {row['name']} "
                             "is neither train nor test")
    return rows


def check_rows(rows, images, kind):
    """Returns three {name: {"label", "patient", "split", "mpp"}}; split is "" if left open.

    They hold the rows with a label and a file, the rows of slides for pre-training only (a patient, and an
    empty label), and the rows of slides without a file. Slides without a row and rows without a slide are
    counted and named, for downloads are often partial. InputError for: no label and no patient, an unknown
    split, a name twice, a crop without a file, fewer than two classes, a split for some rows only.
    """
    labels, pretrain_only, absent = {}, {}, {}
    for row in rows:
        where, name = row["where"], row["name"]
        if name in labels or name in pretrain_only or name in absent:
            raise InputError(f"{where} names {name!r} a second time; take one out")
        if row["split"] and row["split"] not in SPLITS:
            raise InputError(f"{where}: split {row['split']!r} is none of train, val, test")
        checked = {"label": row["label"], "patient": row["patient"] or patient_of(name),
                   "split": SPLITS.get(row["split"], ""), "mpp": row.get("mpp")}
        if not row["label"]:
            check_no_label(row, kind)
        if name not in images:
            if kind == "crops" or Path(name).name != name:
                raise InputError(f"{where}: there is no file of {name!r}; take the line out or fetch it")
            absent[name] = checked
        elif row["label"]:
            labels[name] = checked
        else:
            pretrain_only[name] = checked
    table = rows[0]["where"].split(": ")[0]
    note(list(absent), f"{table}: {len(absent)} of {len(rows)} rows have no file and are left out")
    no_row = sorted(images.keys() - labels.keys() - pretrain_only.keys())
    of_tcga = [name for name in no_row if tcga_patient(name)]
    note(of_tcga, f"{table}: {len(of_tcga)} of {len(images)} slides have no row; they only pre-train, "
         "those of test patients excepted")
    unknown = [name for name in no_row if not tcga_patient(name)]
    note(unknown, f"{table}: {len(unknown)} of {len(images)} slides have no row and are left out of "
         "pre-training; to use them there, add rows with their patient and an empty label")
    if len({row["label"] for row in labels.values()}) < 2:
        raise InputError(f"{table}: fewer than two classes among the {len(labels)} rows that have a file")
    given = [bool(row["split"]) for row in labels.values()]
    if any(given) and not all(given):
        raise InputError(f"{table}: some lines have a split and some have none; give all or none")
    join_patients(labels | pretrain_only | absent, table)
    return labels, pretrain_only, absent


def check_no_label(row, kind):
    """InputError for a row without a label, unless it is of a slide for pre-training only."""
    where, name = row["where"], row["name"]
    if kind == "crops":
        raise InputError(f"{where} has no label for {name!r}")
    if not row["patient"]:
        raise InputError(f"{where} has no label for {name!r}; for pre-training only, give its patient")
    if SPLITS.get(row["split"], "train") != "train":
        raise InputError(f"{where} has split {row['split']} and no label for {name!r}: without a label it is "
                         "for pre-training only; take the line out, or give its label")


def join_patients(rows, table):
    """Gives patients of labels.csv who share a patient of TCGA one name, in place, with a warning.

    rows: {slide: row}. A patient of their own name only keeps it.
    """
    names_of = same_patients((name, row["patient"]) for name, row in rows.items())
    given = {row["patient"] for row in rows.values()}
    joined = {}
    for row in rows.values():
        names = names_of[row["patient"]] & given
        row["patient"] = min(names)
        if len(names) > 1:
            joined[row["patient"]] = " = ".join(sorted(names))
    note(list(joined.values()), f"{table}: {len(joined)} patients have several names, by the TCGA names of "
         "their slides; each counts as one")


def note(names, text):
    """Prints the text and the first of the names, if there are any."""
    if names:
        print(f"warning: {text}: {printable(first_of(names))}")


def first_of(names):
    """The first three names as text."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
