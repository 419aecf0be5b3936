"""HIPT's protocol (A.2, Table 4): DSMIL by published folds, mean and sd over them.

    python -m experiments.folds --data lung --splits .../10foldcv_subtype/tcga_lung --checkpoint [NAME=]RUN

--splits is a folder as HIPT (mahmoodlab/HIPT, 2-Weakly-Supervised-Subtyping/splits) and CLAM publish it: a
splits_<k>.csv for each fold, with the columns train,val,test of slides' names. DSMIL is trained on the
features that eval.py wrote for all slides of a run.

The paper is "consistent with their data split for prior-guided pretraining and MIL training"; whether with an
encoder for each fold, it leaves open. The folds overlap (lung: 93 of 1,033 slides are tested ten times, 618
of them at all), and what one fold tests, others train on: an encoder for all has seen test slides of nearly
every fold (HIPT's own has seen all of TCGA). Without that leak each fold has an encoder of its own:

    python -m experiments.folds --data lung --splits FOLDER --write-split 0
    python train.py --data lung --arch vit_h --run runs/hipt_0
    python eval.py --data lung --checkpoint runs/hipt_0

for every fold, and then --checkpoint "DiRL-H=runs/hipt_{fold}". One encoder for all is refused where it has
seen test slides, unless --allow-seen is given; the table then says how many.
"""
import re
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import mil
from common.encoders import check_device, find_encoder, load_encoder
from common.errors import InputError, check_ranges, run_script
from common.files import print_table, read_csv, write_csv
from common.metrics import measures_of
from common.pool import call
from experiments.figures import shared
from experiments.table import sd_of
from wsi.folders import find_folder, slide_of
from wsi.splits import check_unseen, find_data

PARTS, SEEN = ("train", "val", "test"), "test slides seen in pre-training"


def arguments(argv):
    parser, add = shared.parser_of("folds", "DSMIL on the features of runs, by folds from split files.")
    add("--data", required=True, help="a data set's name or folder, as in train.py")
    add("--splits", required=True, help="folder with splits_0.csv, splits_1.csv, ... (train,val,test)")
    add("--checkpoint", nargs="+", metavar="[NAME=]RUN", help="runs with features/; {fold} in it stands for "
        "the fold's number, if each fold has an encoder of its own")
    add("--allow-seen", action="store_true",
        help="also encoders that were pre-trained on test slides of a fold, as HIPT's was; the table says so")
    add("--write-split", type=int, metavar="FOLD",
        help="measures nothing, but makes this fold the data set's split.csv, by which train.py trains")
    add("--seed", type=int, default=0, help="of DSMIL; another says what is luck")
    add("--epochs", type=int, default=200, help="of DSMIL, as in eval.py")
    add("--mil-weight-decay", type=float, default=5e-2, help="of DSMIL, as in eval.py")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1 or cpu")
    add("--out", default="runs/folds.csv", help="the table, a row for each fold")
    args = parser.parse_args(argv)
    check_device(args.device)
    check_ranges(args, epochs=(1, 1e6), mil_weight_decay=(0, 10), seed=(0, 2 ** 31))
    if args.write_split is None and not args.checkpoint:
        raise InputError("--checkpoint: the runs to measure are needed (or --write-split FOLD)")
    return args


def read_fold(path, found):
    """{part: slides} of a split file, without those that are not in the data set, whose number is printed.

    InputError for other columns, a slide in two places, no validation slide, or a class that training or test
    has no slide of.
    """
    columns, rows = read_csv(path)
    if not set(PARTS) <= set(columns):
        raise InputError(f"{path}: its first line has to name the columns train,val,test")
    named = {part: [slide_of(row[part], found.labels) for _, row in rows if row.get(part)] for part in PARTS}
    every = [name for names in named.values() for name in names]
    if len(set(every)) < len(every):
        raise InputError(f"{path}: {max(every, key=every.count)} stands there twice; a slide is of one part")
    fold = {part: [name for name in names if name in found.labels] for part, names in named.items()}
    missing = len(every) - sum(map(len, fold.values()))
    if missing:
        print(f"note: {path}: {missing} of {len(every)} slides are not in {found.source}, and are left out")
    for part, names in fold.items():
        there = {found.labels[name]["label"] for name in names}
        if not there or part != "val" and len(there) < len(found.classes):
            raise InputError(f"{path}: {found.source} has no slide of a class in its {part} part; fetch more "
                             "slides, or take the file out")
    return fold


def read_folds(folder, found):
    """{number: {part: slides}} of the splits_<number>.csv in a folder; InputError without one."""
    files = {int(path.stem[7:]): path for path in Path(folder).glob("splits_*.csv")
             if re.fullmatch(r"splits_\d+", path.stem)}
    if not files:
        raise InputError(f"--splits {folder}: has no splits_0.csv; take a folder of HIPT's or CLAM's splits/")
    return {number: read_fold(files[number], found) for number in sorted(files)}


def write_split(found, fold, number, data):
    """Makes a fold the data set's split.csv; InputError where labels.csv has a split of its own."""
    if any(row["split"] for row in find_folder(data).labels.values()):
        raise InputError(f"{found.source}/labels.csv: has a column split, which counts; take it out")
    path, own = found.work / "split.csv", found.work / "split_before_folds.csv"
    part_of = {name: part for part in PARTS for name in fold[part]}
    if path.is_file() and not own.is_file():
        path.rename(own)
    write_csv(path, [("name", "patient", "split")] + [
        (name, found.labels[name]["patient"], part) for name, part in sorted(part_of.items())])
    print(f"Wrote {path}: fold {number}, {len(part_of)} slides (an earlier split is in {own.name}). "
          f"Next: python train.py --data {data} --run RUN")


def measure_fold(found, fold, path, args):
    """(accuracy, AUC, macro F1) on a fold's test slides of DSMIL trained and validated on its others."""
    names = [name for part in PARTS for name in fold[part]]
    bags = shared.read_bags(path.parent, names, path)
    lacking = [name for name in names if name not in bags]
    if lacking:
        raise InputError(f"{path.parent}/features: {len(lacking)} slides are not in it ({lacking[0]}, ..); "
                         f"python eval.py --data {args.data} --checkpoint {path.parent}, or take them out")
    sets = {part: shared.labelled(bags, fold[part], found, args.device) for part in PARTS}
    model = mil.train_dsmil(sets["train"], sets["val"], len(found.classes), args.epochs, seed=args.seed,
                            weight_decay=args.mil_weight_decay)
    scores = torch.stack([mil.dsmil_predict(model, x) for x, _ in sets["test"]]).cpu().numpy()
    return measures_of(np.array([label for _, label in sets["test"]]), scores)


def measure_network(name, pattern, found, folds, args):
    """Rows of the table, a fold each; InputError if an encoder saw test slides, without --allow-seen."""
    rows = []
    for number, fold in tqdm(folds.items(), f"{name}, folds", leave=False):
        path = find_encoder(pattern.replace("{fold}", str(number)))
        about = load_encoder(path)[1]
        seen = [slide for slide in fold["test"]
                if call(check_unseen, (found, [slide], about["trained_on"], path))[1]]
        if seen and not args.allow_seen:
            raise InputError(f"{path}: was pre-trained on {len(seen)} of the {len(fold['test'])} test slides "
                             f"of fold {number}, or on their patients ({seen[0]}, ..); pre-train for each "
                             "fold (--write-split), or --allow-seen")
        values = measure_fold(found, fold, path, args)
        rows.append((name, about["arch"], number, *values, *(len(fold[part]) for part in PARTS), len(seen)))
    return rows


def run(args):
    found = find_data(args.data)
    if found.kind != "slides" or not found.labels:
        raise InputError(f"--data {args.data}: slides with labels.csv are needed")
    folds = read_folds(args.splits, found)
    if args.write_split is not None:
        if args.write_split not in folds:
            raise InputError(f"--write-split {args.write_split}: the folds are {', '.join(map(str, folds))}")
        write_split(found, folds[args.write_split], args.write_split, args.data)
        return 0
    rows, table = [], [("network", "arch", "accuracy", "AUC", "macro F1", "folds", SEEN)]
    for name, pattern in shared.named(args.checkpoint, "--checkpoint").items():
        mine = measure_network(name, pattern, found, folds, args)
        columns = list(zip(*mine))
        means = [f"{np.mean(v):.4f} ± {sd_of(v) or '(one fold)'}" for v in columns[3:6]]
        table.append((name, mine[0][1], *means, str(len(mine)), f"{sum(columns[9])} of {sum(columns[8])}"))
        rows += [(*row[:3], *(f"{v:.4f}" for v in row[3:6]), *row[6:]) for row in mine]
    print_table(table)
    write_csv(args.out, [("network", "arch", "fold", "accuracy", "auc", "macro_f1", *PARTS, SEEN), *rows])
    print(f"Wrote {args.out}: {len(folds)} folds; above, mean and sd over them")
    return 0


def main(argv=None):
    return run_script("folds", lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
