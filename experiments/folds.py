"""HIPT's protocol (A.2, Table 4): DSMIL by published folds, mean and sd over them.

    python -m experiments.study folds --data lung --splits .../10foldcv_subtype/tcga_lung --checkpoint RUN

--splits is a folder as HIPT (mahmoodlab/HIPT, 2-Weakly-Supervised-Subtyping/splits) and CLAM publish it: a
splits_<k>.csv for each fold, with the columns train,val,test of slides' names. DSMIL is trained on the
features that eval.py wrote for all slides of a run.

The paper is "consistent with their data split for prior-guided pretraining and MIL training"; it leaves open
whether each fold has its own encoder. The folds overlap (lung: 93 of 1,033 slides are tested ten times, 618
of them at all), and what one fold tests, others train on: an encoder for all has seen test slides of nearly
every fold (HIPT's own has seen all of TCGA). Without that leak each fold has its own encoder:

    python -m experiments.study folds --data lung --splits FOLDER --write-split 0
    python train.py --data lung --arch vit_h --run runs/hipt_0
    python eval.py --data lung --checkpoint runs/hipt_0

for every fold, and then --checkpoint "DiRL-H=runs/hipt_{fold}". One encoder for all is refused where it has
seen test slides, unless --allow-seen is given; the table then says how many.
"""
import re
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import mil
from common.bags import labelled, read_bags
from common.encoders import check_device, features_folder, find_encoder, load_encoder
from common.errors import InputError
from common.files import print_table, read_csv, write_csv
from common.flags import SEED, between, whole
from common.metrics import measures_of
from common.pool import call
from experiments.figures import shared
from experiments.table import sd_of
from wsi.folders import find_folder, slide_of
from wsi.splits import check_unseen, find_data

SPLITS = ("train", "val", "test")
LEAKED = "test slides seen in pre-training"


def add_flags(add):
    """Adds the flags of `experiments.study folds`."""
    add("--data", required=True, help="a data set's name or folder (see train.py)")
    add("--splits", required=True, help="folder with splits_0.csv, splits_1.csv, ... (train,val,test)")
    add("--checkpoint", nargs="+", metavar="[NAME=]RUN",
        help="runs with features/; {fold} in it is replaced by the fold's number, if each fold has its own "
             "encoder")
    add("--allow-seen", action="store_true",
        help="accepts encoders that were pre-trained on test slides of a fold, as HIPT's was; the table says "
             "how many")
    add("--write-split", type=int, metavar="FOLD",
        help="measures nothing, but makes this fold the data set's split.csv, by which train.py trains")
    add("--seed", type=SEED, default=0, help="DSMIL seed; others show what is luck")
    add("--epochs", type=whole(1, 10 ** 6), default=200, help="DSMIL epochs (see eval.py)")
    add("--mil-weight-decay", type=between(0, 10), default=5e-2, help="DSMIL weight decay (see eval.py)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1 or cpu")
    add("--out", default="runs/folds.csv", help="the table, a row per fold")


# ---------------------------------------------------------------- split files

def read_fold(path, found):
    """Returns {split: slides} of a split file. Slides that the data set lacks are skipped and counted.

    InputError for other columns, a slide in two splits, no validation slide, or a class without a slide in
    train or test.
    """
    columns, rows = read_csv(path)
    if not set(SPLITS) <= set(columns):
        raise InputError(f"{path}: its first line has to name the columns train,val,test")
    fold = {}
    every = []
    for split in SPLITS:
        names = [slide_of(row[split], found.labels) for _, row in rows if row.get(split)]
        fold[split] = [name for name in names if name in found.labels]
        every += names
    if len(set(every)) < len(every):
        raise InputError(f"{path}: {max(every, key=every.count)} is listed twice; a slide belongs to one "
                         "split")
    missing = len(set(every) - found.labels.keys())
    if missing:
        print(f"skipped: {path}: {missing} of {len(every)} slides are not in {found.source}")
    for split, names in fold.items():
        labels = {found.labels[name]["label"] for name in names}
        if not labels or split != "val" and len(labels) < len(found.classes):
            raise InputError(f"{path}: {found.source} lacks slides of a class in its {split} split; fetch "
                             "more slides, or remove the file")
    return fold


def read_folds(folder, found):
    """Returns {number: {split: slides}} of the splits_<number>.csv in a folder; InputError if none."""
    files = {int(path.stem[7:]): path for path in Path(folder).glob("splits_*.csv")
             if re.fullmatch(r"splits_\d+", path.stem)}
    if not files:
        raise InputError(f"--splits {folder}: has no splits_0.csv; give a folder of HIPT's or CLAM's splits/")
    return {number: read_fold(files[number], found) for number in sorted(files)}


def write_split(found, folds, number, data):
    """Makes a fold the data set's split.csv; InputError if labels.csv has a column split."""
    if number not in folds:
        raise InputError(f"--write-split {number}: the folds are {', '.join(map(str, folds))}")
    if any(row["split"] for row in find_folder(data).labels.values()):
        raise InputError(f"{found.source}/labels.csv: has a column split, which takes precedence; remove it")
    path = found.work / "split.csv"
    earlier = found.work / "split_before_folds.csv"
    split_of = {name: split for split in SPLITS for name in folds[number][split]}
    if path.is_file() and not earlier.is_file():
        path.rename(earlier)
    write_csv(path, [("name", "patient", "split")] + [
        (name, found.labels[name]["patient"], split) for name, split in sorted(split_of.items())])
    print(f"Wrote {path}: fold {number}, {len(split_of)} slides (an earlier split is in {earlier.name}). "
          f"Next: python train.py --data {data} --run RUN")


# ---------------------------------------------------------------- DSMIL on the folds

def measure_fold(found, fold, path, folder, args):
    """Returns accuracy, AUC and macro F1 on a fold's test slides, of DSMIL trained on its other slides.

    path, folder: the encoder.pt, and where its features are.
    """
    names = [name for split in SPLITS for name in fold[split]]
    bags = read_bags(folder, names, path)
    missing = [name for name in names if name not in bags]
    if missing:
        raise InputError(f"{folder}/features: lacks {len(missing)} slides ({missing[0]}, ..); "
                         f"python eval.py --data {args.data} --checkpoint {path}, or remove them")
    train, val, test = (labelled(bags, fold[split], found, args.device) for split in SPLITS)
    model = mil.train_dsmil(train, val, len(found.classes), args.epochs, seed=args.seed,
                            weight_decay=args.mil_weight_decay)
    scores = torch.stack([mil.dsmil_predict(model, bag) for bag, _ in test]).cpu().numpy()
    return measures_of(np.array([label for _, label in test]), scores)


def measure_network(name, pattern, found, folds, args):
    """Returns a row of the table per fold; InputError if an encoder saw test slides, unless --allow-seen."""
    rows = []
    for number, fold in tqdm(folds.items(), f"{name}, folds", leave=False):
        path = find_encoder(pattern.replace("{fold}", str(number)))
        _, about = load_encoder(path)
        trained_on = about["trained_on"]
        errors = [call(check_unseen, (found, [slide], trained_on, path))[1] for slide in fold["test"]]
        leaked = [slide for slide, error in zip(fold["test"], errors) if error]
        if leaked and not args.allow_seen:
            raise InputError(f"{path}: was pre-trained on {len(leaked)} of the {len(fold['test'])} test "
                             f"slides of fold {number}, or on their patients ({leaked[0]}, ..); pre-train "
                             "for each fold (--write-split), or --allow-seen")
        values = measure_fold(found, fold, path, features_folder(path, about, found.name), args)
        counts = (len(fold[split]) for split in SPLITS)
        rows.append((name, about["arch"], number, *values, *counts, len(leaked)))
    return rows


def run(args):
    """Measures the networks on the folds, or writes one fold as the data set's split; returns 0."""
    check_device(args.device)
    if args.write_split is None and not args.checkpoint:
        raise InputError("--checkpoint: the runs to measure are needed (or --write-split FOLD)")
    found = find_data(args.data)
    if found.kind != "slides" or not found.labels:
        raise InputError(f"--data {args.data}: slides with labels.csv are needed")
    folds = read_folds(args.splits, found)
    if args.write_split is not None:
        write_split(found, folds, args.write_split, args.data)
        return 0
    table = [("network", "arch", "accuracy", "AUC", "macro F1", "folds", LEAKED)]
    rows = [("network", "arch", "fold", "accuracy", "auc", "macro_f1", *SPLITS, LEAKED)]
    for name, pattern in shared.named(args.checkpoint, "--checkpoint").items():
        measured = measure_network(name, pattern, found, folds, args)
        columns = list(zip(*measured))
        means = [f"{np.mean(column):.4f} ± {sd_of(column) or '(one fold)'}" for column in columns[3:6]]
        leaked = f"{sum(columns[9])} of {sum(columns[8])}"
        table.append((name, columns[1][0], *means, str(len(measured)), leaked))
        for row in measured:
            values = [f"{value:.4f}" for value in row[3:6]]
            rows.append((*row[:3], *values, *row[6:]))
    print_table(table)
    write_csv(args.out, rows)
    print(f"Wrote {args.out}: {len(folds)} folds; above, mean and sd over them")
    return 0
