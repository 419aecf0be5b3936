"""Published splits: files of slides' names, as in CLAM and HIPT; the data set's own split is unchanged."""
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from common.errors import InputError
from common.files import read_csv
from wsi.labels import SPLITS, slide_of


def published_split(found, path, drop_shared=False):
    """Returns a copy of a wsi.folders.Data with the published split at path; slides not in it are not used.

    Patients with slides in two splits are counted and printed. drop_shared: their slides leave training, and
    validation if the others are tested, so that no patient is left in two splits. InputError if found is not
    of slides with labels, or none of them is in the file.
    """
    if found.kind != "slides" or not found.labels:
        raise InputError(f"{path}: is a split of slides; {found.source} has no slides with a labels.csv")
    split_of = read_published(path, found.labels)
    labels = {name: row | {"split": split_of[name]} for name, row in found.labels.items() if name in split_of}
    if not labels:
        raise InputError(f"{path}: none of its {len(split_of)} slides has a file and a label in "
                         f"{found.source}")
    missing = len(split_of) - len(labels)
    if missing:
        print(f"skipped: {path}: {missing} of {len(split_of)} slides are not in {found.source}")
    omitted = {name: row for name, row in found.labels.items() if name not in labels}
    if omitted:
        print(f"skipped: {path}: does not list {len(omitted)} of the {len(found.labels)} labelled slides")
    of_split = replace(found, labels=labels, pretrain_only=found.pretrain_only | omitted,
                       split_file=Path(path))

    shared = shared_patients(of_split)
    if any(shared.values()):
        counts = [f"{first} and {second} {len(patients)}" for (first, second), patients in shared.items()]
        done = "as published; --drop-shared takes their slides out of training"
        if drop_shared:
            slides = set()
            for (first, _), patients in shared.items():
                slides |= {name for name in of_split.split(first) if labels[name]["patient"] in patients}
            for name in slides:
                of_split.pretrain_only[name] = labels.pop(name)
            done = f"{len(slides)} slides of theirs are left out of the first of the two"
        print(f"warning: {path}: {len(set().union(*shared.values()))} patients have slides in two splits "
              f"({', '.join(counts)}); {done}")
    return of_split


def shared_patients(found):
    """Returns {(split, later split): patients with slides in both}; none in a data set's own split."""
    patients = {split: set() for split in SPLITS}
    for row in found.labels.values():
        patients[row["split"]].add(row["patient"])
    return {(first, second): patients[first] & patients[second] for first, second in combinations(SPLITS, 2)}


def read_published(path, labels):
    """Returns {slide: split} of a file with the columns train,val,test; labels: the known slides.

    InputError for other columns, or for a slide that is listed twice.
    """
    columns, rows = read_csv(path)
    if not set(SPLITS) <= set(columns):
        raise InputError(f"{path}: its first line has to name the columns train,val,test")
    split_of = {}
    for split in SPLITS:
        for line, row in rows:
            name = slide_of(row.get(split, ""), labels)
            if name in split_of:
                raise InputError(f"{path}: line {line}: {name} is listed twice; a slide belongs to one split")
            if name:
                split_of[name] = split
    return split_of
