"""The split of a data set by patient (A.1), and the check that no encoder is tested on its training data."""
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from common.errors import InputError, first_of, print_skipped
from common.files import read_csv, write_csv
from common.pool import call
from wsi.cache import load_crops
from wsi.folders import claim_work, find_folder
from wsi.labels import SPLIT_NAMES, named, same_patients, tcga_patient
from wsi.published import published_split, shared_patients

ADVICE = "use another encoder, or pre-train again with this split"


def find_data(data, mpp=None, prior="auto", split_seed=0, root="datasets", slide_mpp=None, split=None,
              drop_shared=False):
    """Returns the wsi.folders.Data of a name or a folder, with a split for every label.

    Splits that labels.csv leaves open are in datasets/<name>/split.csv, drawn once by patient with
    split_seed. split: the file of a published one, which is used instead (published_split). InputError if
    files are missing, or a patient is in two splits of the data set's own.
    """
    check_split_flags(split, drop_shared)
    found = claim_work(find_folder(data, mpp, prior, root, slide_mpp))
    if split:
        return published_split(found, split, drop_shared)
    rows = complete_split(found.labels, found.kind, found.work / "split.csv", split_seed)
    found.absent |= {name: row for name, row in rows.items() if name not in found.labels}
    split_of = {}
    for name, row in found.labels.items():
        other = split_of.setdefault(row["patient"], row["split"])
        if other != row["split"]:
            raise InputError(
                f"{found.source}: patient {row['patient']!r} is in {other} and in {row['split']} ({name}); "
                f"keep a patient in one split, in labels.csv or {found.work}/split.csv (delete it to draw a "
                "new split)")
    return found


def check_split_flags(split, drop_shared):
    """InputError for --drop-shared without --split, or a --split that is not a file."""
    if drop_shared and not split:
        raise InputError("--drop-shared: is for a published split; name its file with --split")
    if split and not Path(split).is_file():
        raise InputError(f"--split {split}: is not a file; name a CSV with the columns train,val,test")


def find_patches(data, split_seed=0, mpp=None, prior="auto"):
    """Returns a data set of labelled images; InputError if it has none, or a class has no test image."""
    folder = Path(data)
    if folder.is_dir() and not (folder / "labels.csv").is_file():
        raise InputError(f"{folder}/labels.csv: is missing; write it with the columns image,label[,split]")
    found = find_data(data, mpp, prior, split_seed)
    if found.kind != "crops":
        raise InputError(f"{found.source}/labels.csv: has no column image; patches are images, "
                         "for slides: python eval.py slides")
    present = {found.labels[name]["label"] for name in found.split("test")}
    missing = [label for label in found.classes if label not in present]
    if missing:
        raise InputError(f"{data}: no test image of {', '.join(missing)}; every class needs one")
    return found


def read_probe(data, count, seed):
    """Returns the training and the test images of --probe, each (images, labels), and the class count.

    At most count of each are drawn, by seed. InputError if too few can be read.
    """
    found, error = call(find_patches, (data,))
    if error:
        raise InputError("--probe: a folder of images with labels.csv (image,label,split) is expected; "
                         f"{error}")
    generator = torch.Generator().manual_seed(seed)
    sets = []
    for splits in (("train", "val"), ("test",)):
        names = [name for name, row in found.labels.items() if row["split"] in splits]
        order = torch.randperm(len(names), generator=generator)[:count].tolist()
        names = [names[i] for i in order]
        images, read, failed = load_crops([found.images[name] for name in names], 4)
        print_skipped(failed)
        if len(read) < 20:
            raise InputError(f"--probe {data}: {len(read)} {splits[0]} images can be read; 20 are needed")
        labels = [found.classes.index(found.labels[names[i]]["label"]) for i in read]
        sets.append((images, np.array(labels)))
    train, test = sets
    return train, test, len(found.classes)


def complete_split(labels, kind, path, seed):
    """Fills in the splits that labels.csv leaves open, in place: all of them, or slides' validation split.

    labels: {name: {"label", "patient", "split"}}. Names and patients in the split.csv at path keep their
    split; new ones are drawn (draw_split) and added to the file, which may be edited. Returns the file's
    rows, {} if labels.csv leaves nothing open.
    """
    given = {row["split"] for row in labels.values()}
    is_slides = kind == "slides"
    if "" in given:
        splits = ["test", "val"] if is_slides else ["test"]  # ready-cut crops are evaluated in folds
    elif given and "val" not in given and is_slides:
        splits = ["val"]
    else:
        return {}
    rows = read_split(path) if path.is_file() else {}
    undecided = {name: row for name, row in labels.items() if row["split"] in ("", "train")}
    names_of = same_patients((name, row["patient"]) for name, row in [*rows.items(), *labels.items()])
    kept = {}
    for row in rows.values():
        kept |= dict.fromkeys(names_of[row["patient"]], row["split"])
    kept |= {row["patient"]: rows[name]["split"] for name, row in undecided.items() if name in rows}
    split_of = draw_split(undecided, kept, splits, seed)
    for name, row in undecided.items():
        row["split"] = rows[name]["split"] if name in rows else split_of[row["patient"]]
    new = undecided.keys() - rows.keys()
    if new:
        rows |= {name: labels[name] for name in new}
        write_csv(path, [("name", "patient", "split")] + [
            (name, row["patient"], row["split"]) for name, row in sorted(rows.items())])
        print(f"Wrote {path}: the split of {len(new)} more {kind}, by patient; it may be edited.")
    elif seed:
        drawn = draw_split(undecided, {}, splits, seed)
        if any(drawn[row["patient"]] != row["split"] for row in undecided.values()):
            print(f"{path} keeps its split; --split-seed {seed} would draw another if the file were deleted")
    return rows


def read_split(path):
    """Returns the rows of a split.csv as {name: {"patient", "split"}}."""
    columns, lines = read_csv(path)
    if not {"name", "patient", "split"} <= set(columns):
        raise InputError(f"{path}: its first line has to name the columns name,patient,split")
    rows = {}
    for line, row in lines:
        name = row["name"]
        split = SPLIT_NAMES.get(row.get("split", "").lower())
        if not split or name in rows:
            raise InputError(f"{path}: line {line}: one of train, val, test is expected for {name!r}, once")
        rows[name] = {"patient": row.get("patient") or tcga_patient(name) or name, "split": split}
    return rows


def draw_split(rows, kept, splits, seed):
    """Returns {patient: split} of all patients in rows ({name: {"label", "patient"}}), drawn by class.

    Patients in kept ({patient: split}) keep their split. Of each class, a fifth of the patients goes to the
    first of splits and a fifth of the remaining ones to the second (at least one, if two are left); the
    others are for training.
    """
    rng = np.random.default_rng(seed)
    split_of = dict(kept)
    label_of = {}
    for name in sorted(rows):
        label_of.setdefault(rows[name]["patient"], rows[name]["label"])
    for label in sorted(set(label_of.values())):
        patients = sorted(patient for patient in label_of if label_of[patient] == label)
        undecided = [patient for patient in rng.permutation(patients).tolist() if patient not in split_of]
        left = len(patients)
        for split in splits:
            wanted = max(1, round(0.2 * left)) if left > 1 else 0
            present = sum(kept.get(patient) == split for patient in patients)
            for _ in range(min(wanted - present, len(undecided))):
                split_of[undecided.pop()] = split
            left -= wanted
        split_of |= dict.fromkeys(undecided, "train")
    return split_of


def check_classes(found, names):
    """InputError if names hold no training or no test slide of a class, or no validation slide at all."""
    for split in ("train", "val", "test"):
        present = {found.labels[name]["label"] for name in found.split(split) if name in names}
        missing = [label for label in found.classes if label not in present]
        if missing and (split != "val" or not present):
            where = found.split_file or f"{found.source}/labels.csv"
            raise InputError(f"{where}: no usable {split} slide of {', '.join(missing)}; add slides or "
                             "change the split")


def equal_in_two_splits(found, names):
    """Returns a list with a warning if slides of two splits, among names, are the same file, or []."""
    first_with = {}
    equal = []
    for name in filter(found.has_own_content, sorted(names)):
        content = found.content_of(name)
        first = first_with.setdefault(content, name)
        if content and found.labels[first]["split"] != found.labels[name]["split"]:
            equal.append(f"{first} = {name}")
    return named(equal, f"{found.source}: {len(equal)} slides are in two splits under two names, so eval.py "
                 "refuses what is trained on one and tested on the other; remove one of each")


def warn_of_untestable(found):
    """Prints a line if no encoder that is trained on these slides can be evaluated on them."""
    for line in equal_in_two_splits(found, found.labels):
        print("warning:", line)
    if found.kind == "slides" and not found.labels:
        print(f"{found.source}: no labels: all slides are trained on, none is left for testing")
    elif found.kind == "slides":
        _, error = call(check_classes, (found, found.images))
        if error:
            print(f"warning: {error}; eval.py will refuse the encoder")


# ---------------------------------------------------------------- what an encoder was trained on

def training_record(found, names):
    """Returns the data set, images and patients of an encoder's training, as plain values for encoder.pt."""
    hashes = {name: found.content_of(name) for name in names}
    names_of = found.names_of_patients()
    rows = found.labels | found.pretrain_only
    patients = set()
    for name in names:
        patient = rows[name]["patient"] if name in rows else tcga_patient(name) or name
        patients |= names_of.get(patient, {patient})
    return {"data": found.name, "images": hashes, "patients": sorted(patients)}


def records_of(trained_on):
    """Returns an encoder's training_record, and those of the weights that it started from (--init)."""
    return [trained_on] + (records_of(trained_on["init"]) if "init" in trained_on else [])


def hashes_of(trained_on):
    """Returns the hashes of the images in all records_of an encoder's training."""
    return set().union(*(record["images"].values() for record in records_of(trained_on)))


def seen_images(found, names, trained_on):
    """Returns which of these images an encoder saw in training, and which it saw another image of.

    trained_on: the encoder's training_record. Seen are images that it was trained on, under this name or
    another, or on another image of their patient; those of patients whom a published split has in two splits
    are the second list. Slides are the same if their file hashes are, others if also their names are
    (Data.has_own_content). A patient's name counts within one data set (check_unseen warns of it in others),
    a TCGA patient's in all.
    """
    same_data = trained_on["data"] == found.name
    names_of = found.names_of_patients()
    rows = found.absent | found.pretrain_only | found.labels
    images = trained_on["images"]
    hashes = set(images.values()) - {""}
    named_hashes = {(PurePosixPath(name).name, content) for name, content in images.items()}
    patients = set(trained_on["patients"]) | set(map(tcga_patient, images))
    if same_data:  # labels.csv may name more patients now than when the encoder was trained
        patients |= {rows[name]["patient"] for name in images if name in rows}
    else:
        patients = set(filter(tcga_patient, patients))
    accepted = set().union(*shared_patients(found).values())
    seen, shared = [], []
    for name in names:
        content = found.content_of(name)
        same_image = content in hashes
        if not found.has_own_content(name):
            same_image = not same_data and (PurePosixPath(name).name, content) in named_hashes
        same_name = same_data and name in images
        patient = found.labels[name]["patient"]
        same_patient = bool(patients & names_of[patient])
        if same_image or same_name or (same_patient and patient not in accepted):
            seen.append(name)
        elif same_patient:
            shared.append(name)
    return seen, shared


def check_unseen(found, names, trained_on, path, advice=ADVICE):
    """InputError if the encoder at path has seen one of these images (seen_images), with advice.

    Also if it was trained on a slide of this data set whose patient is unknown, since it may be a test
    patient. All records_of its training count. Prints how many images are of patients whom a published split
    has in two splits.
    """
    if "init" in trained_on:
        check_unseen(found, names, trained_on["init"], path, advice)
    seen, shared = seen_images(found, names, trained_on)
    if seen:
        raise InputError(f"{path}: was trained on {len(seen)} of these {len(names)} test images or their "
                         f"patients ({first_of(seen)}); {advice}")
    if shared:
        print(f"warning: {path}: was trained on other slides of the patients of {len(shared)} of these "
              f"{len(names)} test slides, as {found.split_file} has it")
    patients = sorted({found.labels[name]["patient"] for name in names} & set(trained_on["patients"]))
    if trained_on["data"] != found.name and patients:
        print(f"warning: {path}: was trained on {trained_on['data']}, which has {len(patients)} of these "
              f"patients' names, too ({first_of(patients)}): if they are the same, {advice}")
    images = trained_on["images"]
    rows = found.absent | found.pretrain_only | found.labels
    unknown = [name for name in images if name in trained_on["patients"] and name not in rows]
    if trained_on["data"] == found.name and found.kind == "slides" and names and unknown:
        raise InputError(f"{path}: was trained on {len(unknown)} slides without a row in labels.csv "
                         f"({first_of(unknown)}), perhaps of test patients; add rows with their patient and "
                         "an empty label, or pre-train again")
