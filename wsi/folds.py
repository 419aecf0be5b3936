"""Folds of a data set's slides: published ones, and those of eval.py --folds, as published splits."""
import re
from itertools import zip_longest
from pathlib import Path

import numpy as np

from common.classify import make_folds
from common.errors import InputError
from common.files import write_csv
from wsi.labels import SPLITS
from wsi.published import published_split
from wsi.splits import check_unseen


def fold_files(folder):
    """Returns {number: file} of the splits_<number>.csv in a folder; InputError if it has none."""
    files = {int(path.stem[7:]): path for path in Path(folder).glob("splits_*.csv")
             if re.fullmatch(r"splits_\d+", path.stem)}
    if not files:
        raise InputError(f"{folder}: has no splits_0.csv; give a folder of HIPT's or CLAM's splits/")
    return dict(sorted(files.items()))


def draw_folds(found, count, seed):
    """Returns the folder of count folds of the labelled slides, stratified by class, with whole patients.

    Fold k tests the k-th part of the slides and validates on the next one. The files, in CLAM's format, are
    datasets/<name>/folds_<count>_seed<seed>/splits_<k>.csv; once written, they are not changed.
    """
    folder = found.work / f"folds_{count}_seed{seed}"
    if all((folder / f"splits_{number}.csv").is_file() for number in range(count)):
        return folder
    names = np.array(sorted(found.labels))
    labels = np.array([found.classes.index(found.labels[name]["label"]) for name in names])
    patients = np.array([found.labels[name]["patient"] for name in names])
    parts = [part for _, part in make_folds(labels, patients, found.classes, count, seed)]
    if any(len(set(labels[part])) < len(found.classes) for part in parts):
        raise InputError(f"--folds {count}: a fold would test no slide of a class, because some patients "
                         "have many slides; use fewer folds or another --split-seed")
    for number, test in enumerate(parts):
        val = parts[(number + 1) % count]
        train = np.setdiff1d(np.arange(len(names)), np.concatenate([val, test]))
        columns = [names[part] for part in (train, val, test)]
        write_csv(folder / f"splits_{number}.csv", [SPLITS, *zip_longest(*columns, fillvalue="")])
    print(f"Wrote {folder}/: {count} folds of {len(names)} slides, by patient")
    return folder


def open_folds(found, count, seed, trained):
    """Returns {number: Data} of count folds of the labelled slides (draw_folds).

    trained: {encoder.pt: what it was trained on}. InputError if that includes one of the slides, since each
    is tested.
    """
    if found.kind != "slides" or not found.labels or found.split_file:
        raise InputError("--folds: needs slides with a labels.csv, and no --split FILE, which is divided "
                         "already")
    folder = draw_folds(found, count, seed)
    advice = ("and --folds tests all slides; take an encoder of another data set, or pre-train one for each "
              f"of {folder}/splits_<k>.csv (docs/data.md, Folds)")
    for path, trained_on in trained.items():
        check_unseen(found, found.split("train", "val", "test"), trained_on, path, advice)
    return {number: published_split(found, file) for number, file in fold_files(folder).items()}
