"""Reads labels.csv, and the tables of BRIGHT, MHIST and Chaoyang (A.1); checks their rows. docs/data.md."""
import json
import re
import unicodedata
from pathlib import Path

from common.errors import InputError, check_mpp, first_of, one_line, printable
from common.files import read_csv
from wsi.datasets import BRIGHT3, DATASETS
from wsi.slides import SLIDE_TYPES

SPLITS = ("train", "val", "test")
COLUMNS = {  # of labels.csv; slide_id and case_id are CLAM's
    "slides": ("slide", "slide_id", "label", "patient", "case_id", "split", "mpp"),
    "crops": ("image", "label", "patient", "case_id", "group", "source_tile", "split")}
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
               "test": "test"}  # as labels.csv may have them
MISSING = {"nan", "na", "n/a", "null", "none", "?", "-"}  # how tables write an unknown value


def read_table(path):
    """Returns the column names and rows of a labels.csv as read_csv does.

    InputError without rows, or without columns slide,label or image,label (CLAM's: slide_id,label).
    """
    names, rows = read_csv(path)
    if "label" not in names or not {"slide", "slide_id", "image"} & set(names):
        raise InputError(f"{path}: its first line has to name the columns slide,label (or image,label), "
                         f"not {','.join(names)}")
    if not rows:
        raise InputError(f"{path}: has no rows")
    return names, rows


def slide_of(name, images):
    """Returns the name of a slide that labels.csv lists with or without its file's extension.

    Umlauts of macOS (NFD, two characters) and of other systems (NFC, one) are the same.
    """
    known_ending = Path(name).suffix.lower() in SLIDE_TYPES
    name = Path(name).stem if name not in images and known_ending else name
    if name in images or name.isascii():
        return name
    same = {unicodedata.normalize("NFC", image): image for image in images}
    return same.get(unicodedata.normalize("NFC", name), name)


def tcga_patient(name):
    """Returns the patient in a TCGA barcode, its first 12 characters (TCGA-55-1234); "" for other names."""
    barcode = re.match(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?![A-Za-z0-9])", name.rsplit("/", 1)[-1])
    return barcode[0] if barcode else ""


def same_patients(pairs):
    """Returns {name of a patient: all names of that patient} from pairs (slide, patient).

    A slide with a TCGA name also belongs to the patient in that name, whatever labels.csv lists, so that
    patients of labels.csv with the same TCGA patient are one.
    """
    names_of = {}
    for slide, patient in pairs:
        barcodes = {tcga_patient(patient), tcga_patient(slide)} - {""}
        names = {patient} | barcodes
        for known in names & names_of.keys():
            names = names | names_of[known]
        names_of |= dict.fromkeys(names, names)
    return names_of


def labels_row(path, line, row, name):
    """Returns a line of labels.csv as {"where", "name", "label", "patient", "split", "mpp"}."""
    try:
        mpp = float(row["mpp"]) if row.get("mpp") else None
        check_mpp(mpp, "mpp")
    except (ValueError, InputError):
        raise InputError(f"{path}: line {line}: mpp {row['mpp']!r} is not the um/px of a slide "
                         "(0.5 is 20x)") from None
    columns = ["patient", "case_id"]
    if "image" in row:
        columns += ["group", "source_tile"]
    patient = next((row[name] for name in columns if row.get(name)), "")
    return {"where": f"{path}: line {line}", "name": name, "label": row.get("label", ""), "patient": patient,
            "split": row.get("split", "").lower(), "mpp": mpp}


def bright_rows(rows, data):
    """Returns BRIGHT's rows with three or six classes; its official validation split is for testing (A.1)."""
    has_test = any(SPLIT_NAMES.get(row["split"]) == "test" for row in rows)
    for row in rows:
        if not row["label"]:
            continue  # check_rows decides
        if row["label"] not in BRIGHT3:
            raise InputError(f"{row['where']}: label {row['label']!r} is not one of {', '.join(BRIGHT3)}")
        if data == "bright3":
            row["label"] = BRIGHT3[row["label"]]
        if not has_test and SPLIT_NAMES.get(row["split"]) == "val":
            row["split"] = "test"
    return rows


def read_mhist(source):
    """Returns the rows of MHIST as distributed: annotations.csv, with its official Partition."""
    table = source / "annotations.csv"
    names, lines = read_csv(table)
    columns = ("image name", "majority vote label", "partition")
    if not set(columns) <= set(names):
        raise InputError(f"{table}: its first line has to name Image Name, Majority Vote Label and Partition")
    rows = []
    for line, values in lines:
        name, label, split = (values.get(column, "") for column in columns)
        where = f"{table}: line {line}"
        if label not in DATASETS["mhist"].classes:
            raise InputError(f"{where}: label {label!r} of {name} is neither HP nor SSA")
        if split.lower() not in ("train", "test"):
            raise InputError(f"{where}: Partition {split!r} of {name} is neither train nor test")
        rows.append({"where": where, "name": name, "label": label, "patient": name, "split": split.lower()})
    return rows


def read_chaoyang(source):
    """Returns the rows of Chaoyang as distributed: train.json, test.json, lists of {"name", "label": 0-3}."""
    classes = DATASETS["chaoyang"].classes
    rows = []
    for split in ("train", "test"):
        table = source / f"{split}.json"
        try:
            for number, entry in enumerate(json.loads(table.read_text(encoding="utf-8"))):
                name, label = entry["name"], classes[entry["label"]]
                rows.append({"where": f"{table}: entry {number}", "name": name, "label": label,
                             "patient": name, "split": split})
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise InputError(f"{table}: cannot be read ({one_line(error)}); download it again") from None
    return rows


def refuse_repeats(rows):
    """InputError for a row with the name of an earlier one."""
    names = set()
    for row in rows:
        if row["name"] in names:
            raise InputError(f"{row['where']} names {row['name']!r} a second time; remove one of the lines")
        names.add(row["name"])


def check_rows(rows, images, kind):
    """Returns labels, pretrain_only, absent and warnings of Data; splits that labels.csv leaves open are "".

    Slides without a row and rows without a slide cost a warning, since downloads are often partial.
    InputError for a row without a label and a patient, an unknown split, a crop without a file, fewer than
    two classes, classes that differ only in case, or splits for some rows only.
    """
    labels = {}
    pretrain_only = {}
    absent = {}
    for row in rows:
        where, name = row["where"], row["name"]
        if row["split"] and row["split"] not in SPLIT_NAMES:
            raise InputError(f"{where}: split {row['split']!r} is not one of train, val, test")
        checked = {"label": row["label"], "patient": row["patient"] or tcga_patient(name) or name,
                   "split": SPLIT_NAMES.get(row["split"], ""), "mpp": row.get("mpp")}
        if not row["label"]:
            check_no_label(row, kind)
        if name not in images:
            if kind == "crops" or Path(name).name != name:
                missing = [row["name"] for row in rows if row["name"] not in images]
                raise InputError(f"{where}: no file of {name!r}; remove the line or fetch the file (in all "
                                 f"{len(missing):,} of {len(rows):,} files are missing)")
            absent[name] = checked
        elif row["label"]:
            labels[name] = checked
        else:
            pretrain_only[name] = checked
    table = rows[0]["where"].split(": ")[0]
    no_row = sorted(images.keys() - labels.keys() - pretrain_only.keys())
    tcga = [name for name in no_row if tcga_patient(name)]
    unknown = [name for name in no_row if not tcga_patient(name)]
    warnings = [
        *named(list(absent), f"{table}: {len(absent)} of {len(rows)} rows have no file and are skipped; "
               "fetch the files or remove the rows"),
        *named(tcga, f"{table}: {len(tcga)} of {len(images)} slides have no row; they only pre-train, except "
               "those of test patients; to classify them, add rows with their label"),
        *named(unknown, f"{table}: {len(unknown)} of {len(images)} slides have no row and are not used; to "
               "use them for pre-training, add rows with their patient and an empty label")]
    of_no_patient = [row["name"] for row in rows if not row["patient"] and not tcga_patient(row["name"])]
    warnings += named(of_no_patient, f"{table}: {len(of_no_patient)} of {len(rows)} rows have no patient and "
                      "each counts as its own, so a patient may be in two splits; fill in the column patient "
                      "(a slide's own name, if it is the only one)")
    missing = sorted({row["label"] for row in rows if row["label"].lower() in MISSING})
    warnings += named(missing, f"{table}: these labels count as classes; if they are unknown labels, leave "
                      "them empty")
    patients = {row["patient"] for row in rows}
    warnings += [f"{table}: patients {pair} differ only in case and count as two" for pair in alike(patients)]
    for pair in alike({row["label"] for row in rows}):
        raise InputError(f"{table}: labels {pair} differ only in case; write them alike")
    if absent and not labels and not pretrain_only:
        raise InputError(f"{table}: none of its {kind} has a file; it names {first_of(list(absent))}, the "
                         f"files are named {first_of(sorted(images))}")
    if labels and len({row["label"] for row in labels.values()}) < 2:
        raise InputError(f"{table}: fewer than two classes among the {len(labels)} rows that have a file; to "
                         "pre-train only, leave all labels empty")
    has_split = [bool(row["split"]) for row in labels.values()]
    if any(has_split) and not all(has_split):
        raise InputError(f"{table}: some lines have a split and others have none; fill in all or none")
    warnings += join_patients(labels | pretrain_only | absent, table)
    return labels, pretrain_only, absent, warnings


def check_no_label(row, kind):
    """InputError for a row without a label, unless it is a slide's with a patient, for pre-training only."""
    where, name = row["where"], row["name"]
    if kind == "crops":
        raise InputError(f"{where} has no label for {name!r}")
    if not row["patient"]:
        raise InputError(f"{where} has no label for {name!r}; for pre-training only, give its patient")
    if SPLIT_NAMES.get(row["split"], "train") != "train":
        raise InputError(f"{where} has split {row['split']} and no label for {name!r}: without a label it is "
                         "for pre-training only; remove the line, or add the label")


def join_patients(rows, table):
    """Renames, in place, patients of labels.csv with the same TCGA patient to one of their names.

    rows: {slide: row}. Returns a list of at most one warning.
    """
    names_of = same_patients((name, row["patient"]) for name, row in rows.items())
    patients = {row["patient"] for row in rows.values()}
    joined = {}
    for row in rows.values():
        names = names_of[row["patient"]] & patients
        row["patient"] = min(names)
        if len(names) > 1:
            joined[row["patient"]] = " = ".join(sorted(names))
    return named(list(joined.values()), f"{table}: {len(joined)} patients have several names, by the TCGA "
                 "names of their slides; each counts as one")


def alike(names):
    """Returns a text for each of the names that differs from an earlier one only in case."""
    first_with = {}
    pairs = [(first_with.setdefault(name.casefold(), name), name) for name in sorted(names)]
    return [f"{first!r} and {name!r}" for first, name in pairs if first != name]


def named(names, text):
    """Returns a list with the text and the first of the names, or [] without names."""
    return [f"{text}: {printable(first_of(names))}"] if names else []
