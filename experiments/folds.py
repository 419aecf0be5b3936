"""HIPT's protocol (A.2, Table 4): DSMIL by published folds, mean and sd over them.

    python -m experiments.study folds --data lung --splits .../10foldcv_subtype/tcga_lung --checkpoint RUN

--splits is a folder as HIPT (mahmoodlab/HIPT, 2-Weakly-Supervised-Subtyping/splits) and CLAM publish it: a
splits_<k>.csv for each fold, with the columns train,val,test of slides' names. DSMIL is trained on the
features that eval.py wrote for the slides of a run.

The paper is "consistent with their data split for prior-guided pretraining and MIL training"; it leaves open
whether each fold has its own encoder. The folds overlap (lung: each tests 93 of 1,033 slides, all together
618), and what one fold tests, others train on: an encoder for all has seen test slides of nearly every fold
(HIPT's own has seen all of TCGA). Without that leak each fold has its own encoder:

    python train.py --data lung --arch vit_h --split FOLDER/splits_0.csv --run runs/hipt_0
    python eval.py --data lung --split FOLDER/splits_0.csv --checkpoint runs/hipt_0

for every fold, and then --checkpoint "DiRL-H=runs/hipt_{fold}". One encoder for all is refused where it has
seen test slides, unless --allow-seen is given; the table then says how many.

HIPT's folds divide slides, not patients: in each, patients have slides in two splits (lung: 12 to 19, of whom
4 to 12 are in train and in test). The table counts them; --drop-shared, here and in the commands above, takes
them out of training.
"""
import numpy as np
import torch
from tqdm import tqdm

from common.bags import SPLITS, DSMILSettings, labelled, read_bags
from common.crossval import score_fold
from common.encoders import check_device, features_folder, find_encoder, load_encoder
from common.errors import InputError
from common.files import print_table, write_csv
from common.flags import SEED, add_mil_optimizer, whole
from experiments.figures import shared
from experiments.table import sd_of
from wsi.folders import find_folder
from wsi.folds import fold_files
from wsi.published import published_split, shared_patients
from wsi.splits import check_classes, check_unseen, seen_images

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
    add("--seed", type=SEED, default=0, help="DSMIL seed; others show what is luck")
    add("--epochs", type=whole(1, 10 ** 6), default=200, help="DSMIL epochs (see eval.py)")
    add_mil_optimizer(add)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1 or cpu")
    add("--out", default="runs/folds.csv", help="the table, a row per fold")


def measure_fold(found, path, folder, args):
    """Returns accuracy, AUC and macro F1 on a fold's test slides, of DSMIL trained on its other slides.

    found: the fold (published_split); path, folder: the encoder.pt, and where its features are.
    """
    names = read_bags(folder, found.labels, path).keys()
    missing = sorted(found.labels.keys() - names)
    if missing:
        raise InputError(f"{folder}/features: lacks {len(missing)} slides ({missing[0]}, ..); "
                         f"python eval.py --data {args.data} --checkpoint {path}, or remove them")
    settings = DSMILSettings(range(args.seed, args.seed + 1), args.epochs, args.mil_lr,
                             args.mil_weight_decay, standardize=False, class_weights=False)
    return score_fold(labelled(found, names), folder, len(found.classes), settings, args.device,
                      workers=1)[0]


def measure_network(name, pattern, folds, args):
    """Returns a row of the table per fold; InputError if an encoder saw test slides, unless --allow-seen."""
    files = {}  # {fold: (encoder.pt, its other values)}
    for number, found in folds.items():  # all, before the first DSMIL is trained
        path = find_encoder(pattern.replace("{fold}", str(number)))
        _, about = load_encoder(path)
        if not args.allow_seen:
            check_unseen(found, found.split("test"), about["trained_on"], path, ADVICE)
        files[number] = path, about
    rows = []
    for number, found in tqdm(folds.items(), f"{name}, folds", leave=False):
        path, about = files[number]
        values = measure_fold(found, path, features_folder(path, about, found.name), args)
        counts = [len(found.split(split)) for split in SPLITS]
        seen, _ = seen_images(found, found.split("test"), about["trained_on"])
        shared_by = shared_patients(found)
        in_two_splits = set().union(*shared_by.values())
        rows.append((name, about["arch"], number, *values, *counts, len(seen), len(in_two_splits),
                     len(shared_by["train", "test"])))
    return rows


def run(args):
    """Measures the networks on the folds; returns 0."""
    check_device(args.device)
    found = find_folder(args.data)
    folds = {number: published_split(found, path, args.drop_shared)
             for number, path in fold_files(args.splits).items()}
    for fold in folds.values():
        check_classes(fold, fold.labels)
    table = [("network", "arch", "accuracy", "AUC", "macro F1", "folds", LEAKED, SHARED)]
    rows = [("network", "arch", "fold", "accuracy", "auc", "macro_f1", *SPLITS, LEAKED, SHARED, LEAKING)]
    for name, pattern in shared.named(args.checkpoint, "--checkpoint").items():
        measured = measure_network(name, pattern, folds, args)
        columns = list(zip(*measured))
        means = [f"{np.mean(column):.4f} ± {sd_of(column) or '(one fold)'}" for column in columns[3:6]]
        leaked = f"{sum(columns[9])} of {sum(columns[8])}"
        in_two_splits = f"{min(columns[10])} to {max(columns[10])} a fold"
        table.append((name, columns[1][0], *means, str(len(measured)), leaked, in_two_splits))
        for row in measured:
            values = [f"{value:.4f}" for value in row[3:6]]
            rows.append((*row[:3], *values, *row[6:]))
    print_table(table)
    write_csv(args.out, rows)
    print(f"Wrote {args.out}: {len(folds)} folds; above, mean and sd over them")
    return 0
