"""HIPT's protocol (A.2, Table 4): DSMIL by published folds, mean and sd over them.

    python -m experiments.study folds --data lung --splits .../10foldcv_subtype/tcga_lung --checkpoint RUN

--splits is a folder of splits_<k>.csv as HIPT and CLAM publish them; DSMIL is trained on the features that
eval.py wrote (docs/paper.md, Table 4, has all commands). HIPT's folds overlap, so that one encoder for all
has seen test slides of nearly every fold: without --allow-seen each needs its own, "DiRL-H=runs/hipt_{fold}".
They divide slides, not patients: the table counts those in two splits, and --drop-shared takes them out.
"""
from pathlib import Path

import torch

from common.bags import DSMILSettings, read_bags
from common.crossval import score_folds
from common.encoders import check_device, features_folder, find_encoder, load_encoder
from common.errors import InputError
from common.flags import SEED, add_mil_optimizer, whole
from experiments.figures import shared
from wsi.folders import find_folder
from wsi.folds import fold_files
from wsi.published import published_split, shared_patients
from wsi.splits import check_classes, check_unseen, records_of, seen_images

LEAKED = "test slides seen in pre-training"
SHARED = "patients in two splits"
LEAKING = "patients in train and test"
ADVICE = "pre-train for each fold (train.py --split), or give --allow-seen"


def add_flags(add):
    """Adds the flags of `experiments.study folds`."""
    add("--data", required=True, help="a data set's name or folder (see train.py)")
    add("--splits", required=True, help="folder with splits_0.csv, splits_1.csv, ... (train,val,test)")
    add("--checkpoint", nargs="+", metavar="[NAME=]RUN", required=True,
        help="runs with features/; {fold} in it is replaced by the fold's number, if each fold has its own "
             "encoder")
    add("--allow-seen", action="store_true",
        help="accepts encoders that were pre-trained on test slides of a fold, as HIPT's was; the table says "
             "how many")
    add("--drop-shared", action="store_true",
        help="takes slides of patients who are in two splits out of training, as the flag of train.py does")
    add("--seed", type=SEED, default=0, help="DSMIL seed; try others to see what is luck")
    add("--epochs", type=whole(1, 10 ** 6), default=200, help="DSMIL epochs (see eval.py)")
    add_mil_optimizer(add)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1 or cpu")
    add("--out", default="runs/folds.csv", help="the table, a row per fold")


def open_network(pattern, folds, args):
    """Returns {fold: the folder of its encoder's features/}, and {fold: {column of the table: what leaks}}.

    InputError if an encoder saw test slides, unless --allow-seen, or if features of slides are missing.
    """
    runs = {}
    leaks = {}
    for number, found in folds.items():
        path = find_encoder(pattern.replace("{fold}", str(number)))
        _, about = load_encoder(path)
        tested = found.split("test")
        if not args.allow_seen:
            check_unseen(found, tested, about["trained_on"], path, ADVICE)
        runs[number] = features_folder(path, about, found.name, found.mpp)
        missing = sorted(found.labels.keys() - read_bags(runs[number], found.labels, path).keys())
        if missing:
            raise InputError(f"{runs[number]}/features: lacks {len(missing)} slides ({missing[0]}, ..); "
                             f"python eval.py --data {args.data} --checkpoint {path}, or remove them")
        seen = set().union(*(seen_images(found, tested, one)[0] for one in records_of(about["trained_on"])))
        patients = shared_patients(found)
        leaks[number] = {LEAKED: len(seen), SHARED: len(set().union(*patients.values())),
                         LEAKING: len(patients["train", "test"])}
    return runs, leaks


def run(args):
    """Measures the networks on the folds; returns 0."""
    check_device(args.device)
    found = find_folder(args.data)
    folds = {number: published_split(found, path, args.drop_shared)
             for number, path in fold_files(args.splits).items()}
    for fold in folds.values():
        check_classes(fold, fold.labels)
    settings = DSMILSettings(range(args.seed, args.seed + 1), args.epochs, args.mil_lr,
                             args.mil_weight_decay, standardize=False, class_weights=False)
    networks = {}
    for name, pattern in shared.named(args.checkpoint, "--checkpoint").items():
        networks[name] = open_network(pattern, folds, args)  # all, before the first DSMIL is trained
    for name, (runs, leaks) in networks.items():
        score_folds(folds, runs, found.labels, settings, args.device, 1, name, Path(args.out), leaks)
    return 0
