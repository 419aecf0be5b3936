"""The paper's claim on your own patches (4.1, 4.2): does DiRL de-sparsify attention, and does it help?

    python -m experiments.claim run --data FOLDER [flags of train.py]
    python -m experiments.claim show

run pre-trains every arm with every seed by train.py, with the same flags, into OUT/<arm>_seed<k>/, and
measures each on the test part of FOLDER/labels.csv (claim.npz: each test image's attention and scores). Stop
it whenever you like: the same command resumes. show prints the table and draws.
"""
import argparse
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import mil
import train
from common import encoders
from common.checkpoint import check_config
from common.classify import SETTINGS, fine_tune, fit_linear, make_folds, nearest
from common.encoders import attention_of, in_batches, represent
from common.errors import InputError, Parser, check_mpp, check_ranges, print_skipped, run_script
from common.files import atomic_write, file_stamp, stamp_of, write_json
from common.flags import RUNNING
from common.log import is_finished
from data import resample
from experiments import compare
from experiments.claim_table import ABOUT, ARMS, BAGS, COMPARED, read_measures, show
from wsi.cache import load_crops
from wsi.datasets import run_name
from wsi.slides import CROP
from wsi.splits import find_data

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "train.py"
DSMIL_EPOCHS = 200  # as Li et al. (A.1.2)


def arguments(argv):
    parser = Parser(
        prog="python -m experiments.claim",
        description="Pre-trains and measures the arms of an experiment, and shows them.")
    commands = parser.add_subparsers(dest="command", required=True)
    style = argparse.ArgumentDefaultsHelpFormatter
    run = commands.add_parser(
        "run", allow_abbrev=False, formatter_class=style, help="pre-trains and measures",
        epilog="All other flags are train.py's, the same for every arm: --mpp, --epochs, --batch, --arch, "
               "...")
    show = commands.add_parser("show", formatter_class=style,
                               help="prints the table and draws the bins, their course and the overlays")
    for command in (run, show):
        command.add_argument("--out", default="runs/claim",
                             help="folder of the experiment; another for other settings")
        command.add_argument("--pair", nargs=2, metavar="CLASS",
                             help="show: the accuracy and AUC of these two classes alone, by the same scores")
    add = run.add_argument
    add("--data", required=True,
        help="folder of patches with labels.csv: image,label,split[,patient or source_tile]")
    add("--arms", nargs="+", default=["random", "baseline", "cellback", "dirl", "shuffled"],
        choices=list(ARMS), metavar="ARM",
        help=f"{', '.join(ARMS)}; those from shuffled on are controls and comparisons (experiments.compare), "
             "and set their own flags")
    add("--seeds", type=int, nargs="+", default=[0],
        help="several tell an effect from luck; the first runs first")
    add("--folds", type=int, default=5, help="of the training part, for logistic regression and fine-tuning")
    add("--tune-epochs", type=int, default=0,
        help="of fine-tuning, as in eval.py patches (40 in the paper); 0 leaves it out")
    add("--tune-folds", type=int, default=5, help="folds that are fine-tuned; fewer if time is short")
    add("--bag-groups", type=int, default=4, help="source tiles in a synthetic slide for DSMIL")
    add("--bag-seeds", type=int, default=3, help="trainings of DSMIL; 0 leaves it out")
    add = show.add_argument
    add("--overlay", help="folder with slides or crops whose crops are shown with each arm's attention")
    add("--mpp", type=float, help="um/px of the overlay's crops (default: the encoders')")
    add("--slide-mpp", type=float, help="um/px of slides that record none")
    add("--crops", type=int, default=3, help="crops of the overlay")
    args, args.rest = parser.parse_known_args(argv)
    if args.command == "show":
        check_mpp(args.mpp, "--mpp")
        if args.rest or args.crops < 1:
            wrong = " ".join(args.rest) or "--crops below 1"
            raise InputError(f"{wrong}: not known to show; see python -m experiments.claim show --help")
        return args
    check_ranges(args, folds=(2, 1000), tune_epochs=(0, 1e4), tune_folds=(1, 1000), bag_groups=(1, 1e4),
                 bag_seeds=(0, 1000))
    said = {word.split("=")[0] for word in args.rest}
    for flag in {"--method", "--run", "--seed", "--probe", "--shuffle-prior"} & said:
        raise InputError(f"{flag}: the experiment sets it; use --arms, --seeds or --out")
    return args


# ---------------------------------------------------------------- run

def run(args):
    """Pre-trains and measures what is not done yet: 0, 130 if it was stopped, 1 if an arm failed."""
    common = ["--data", args.data, "--probe", args.data, *args.rest]
    jobs = [(arm, seed, Path(args.out) / f"{arm}_seed{seed}") for seed in args.seeds for arm in args.arms]
    flags = {folder: [*common, "--run", str(folder), "--seed", str(seed), *(ARMS[arm] or [])]
             for arm, seed, folder in jobs}
    settings = {folder: compare.arguments(flags[folder]) if is_compared(flags[folder]) else
                train.arguments(flags[folder]) for folder in flags}

    # Whatever is wrong with flags or labels is reported now, not after hours.
    shared, found = train.arguments(common), find_patches(args)
    make_protocol(list(found.labels.values()), found.classes, args)
    trained_on = round(shared.fraction * len(found.split("train", "val")))
    if trained_on < shared.batch:
        raise InputError(f"--batch {shared.batch}: there are only {trained_on} training crops; lower --batch")
    labels = stamp_of(found.labels)
    keep_settings(Path(args.out) / "settings.json", shared, labels)

    load, failed = cache(lambda: load_protocol(found, args, shared.workers)), []
    for arm, seed, folder in jobs:
        print(f"--- {folder}", flush=True)
        code = start(settings[folder], found.name) if ARMS[arm] is None else pre_train(flags[folder], folder)
        if code in (2, 130):
            return code
        if code:  # the others can still be compared
            failed.append(str(folder))
            continue
        try:
            measure(folder, measures(args, settings[folder]), load, labels, shared.device)
        except FloatingPointError as error:
            print(f"claim: {folder}: {error}", file=sys.stderr)
            failed.append(str(folder))
    if failed:
        print(f"claim: failed: {', '.join(failed)}; see above, and use other settings with another --out",
              file=sys.stderr)
    print(f"{len(jobs) - len(failed)} of {len(jobs)} runs in {args.out}/ are measured. "
          f"Next: python -m experiments.claim show --out {args.out}")
    return int(bool(failed))


def keep_settings(path, settings, labels):
    """Writes what all arms of a folder have in common; InputError if it was started with something else."""
    new = {k: v for k, v in vars(settings).items() if k not in (*RUNNING, "seed", "method")}
    new |= {"data": run_name(settings.data), "labels": labels}
    if path.is_file():
        check_config(path, new)
    write_json(path, new)


def is_compared(flags):
    """Is an arm of these flags trained by experiments.compare?"""
    return bool({*COMPARED} & {*flags})


def pre_train(flags, folder):
    """Runs train.py or experiments.compare: 0 if the run is finished, 130 if stopped, else its exit code."""
    if is_finished(folder) and (folder / "encoder.pt").is_file() and not (folder / "checkpoint.pt").is_file():
        return 0  # the checkpoint is large, and may be deleted when a run is done
    script = ["-m", "experiments.compare"] if is_compared(flags) else [TRAIN]
    process = subprocess.Popen([sys.executable, *script, *flags], env=os.environ | {"PYTHONPATH": str(ROOT)})
    forward = {number: signal.signal(number, lambda number, _: process.send_signal(number))
               for number in (signal.SIGINT, signal.SIGTERM)}  # train.py saves, and then ends
    try:
        code = process.wait()
    finally:
        for number, handler in forward.items():
            signal.signal(number, handler)
    if is_finished(folder) and code in (0, 1):  # 1: some images were skipped
        return 0
    return code or 130


def start(settings, data):
    """Writes encoder.pt of an untrained encoder, normalized as the other arms are; 0."""
    mean, std = encoders.MEAN, encoders.STD
    if settings.stats == "data":
        crops = train.training_crops(settings)
        mean, std = crops.mean, crops.std
    path = Path(settings.run) / "encoder.pt"
    if path.is_file():
        kept, _ = encoders.load_encoder(path)
        if (kept.mean, kept.std) == (mean, std):
            return 0
    encoder = encoders.random_encoder(settings.arch, settings.seed, mean, std, settings.depth)
    encoders.save_encoder(path, encoder, arch=settings.arch, depth=settings.depth, method="none", data=data,
                          mpp=settings.mpp, step=0, trained_on={"data": data, "images": {}, "patients": []})
    return 0


def measure(folder, functions, load, labels, device):
    """Adds the measures() of encoder.pt that a folder's claim.npz lacks; load() gives the images."""
    stamp = file_stamp(folder / "encoder.pt") + labels
    done = read_measures(folder / "claim.npz", stamp)
    todo = {name: function for name, function in functions.items() if name not in done}
    if not todo:
        return
    on, encoder = load(), encoders.load_encoder(folder / "encoder.pt")[0].to(device)
    for name, function in todo.items():
        done[name] = function(encoder, on)
        if name.startswith("DSMIL"):
            done[name + BAGS] = np.array([label for _, label in on.test_bags])
        about = dict(zip(ABOUT, (stamp, on.classes, on.labels[on.test], on.groups[on.test])))
        with atomic_write(folder / "claim.npz") as temp, open(temp, "wb") as file:
            np.savez(file, **about, **done)


# ---------------------------------------------------------------- what every arm is measured on

def find_patches(args):
    """The data set of --data: images, each with a label and a split."""
    found = find_data(args.data)
    if found.kind != "crops" or not found.labels:
        raise InputError(f"{args.data}/labels.csv: has no column image, or is not there; "
                         "labelled patches are needed")
    return found


def make_protocol(rows, classes, args):
    """Labels, groups, parts, folds and bags of the images: what every arm is measured on."""
    labels = np.array([classes.index(row["label"]) for row in rows])
    groups = np.array([row["patient"] for row in rows])
    is_test = np.array([row["split"] == "test" for row in rows])
    train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    if len(np.unique(labels[test])) < len(classes):
        raise InputError(f"{args.data}/labels.csv: a class has no test image; every class needs one")
    for part, indices in ("training", train), ("test", test):
        if len(indices) < 20:
            raise InputError(f"{args.data}/labels.csv: {len(indices)} {part} images; at least 20 are needed")
    folds = make_folds(labels[train], groups[train], classes, args.folds, 0)
    folds = [(train[a], train[b]) for a, b in folds]
    train_bags, test_bags = (make_bags(part, labels, groups, args.bag_groups, 0) for part in (train, test))
    for part, bags, least in (("training", train_bags, 5), ("test", test_bags, 1)):
        for c, name in enumerate(classes):
            if args.bag_seeds and [label for _, label in bags].count(c) < least:
                raise InputError(f"--bag-groups {args.bag_groups}: fewer than {least} {part} bags of {name}; "
                                 "lower it, or --bag-seeds 0")
    return SimpleNamespace(labels=labels, groups=groups, train=train, test=test, folds=folds, classes=classes,
                           train_bags=train_bags, test_bags=test_bags)


def load_protocol(found, args, workers):
    """make_protocol of the images that can be read, with the images (N, 3, CROP, CROP)."""
    images, good, failed = load_crops(list(found.images.values()), workers)
    print_skipped(failed)
    rows = [found.labels[name] for name in found.images]
    on = make_protocol([rows[i] for i in good], found.classes, args)
    on.images = images
    return on


def make_bags(indices, labels, groups, size, seed):
    """Synthetic slides: [(indices of the tiles, class), ...], each the tiles of size groups of one class.

    indices: of the images that may be used. No tile is in two slides; a class's last groups that do not fill
    one are left out.
    """
    rng, bags = np.random.default_rng(seed), []
    for label in np.unique(labels[indices]):
        of_class = indices[labels[indices] == label]
        names = rng.permutation(np.unique(groups[of_class]))
        for i in range(0, len(names) - size + 1, size):
            bags.append((of_class[np.isin(groups[of_class], names[i: i + size])], int(label)))
    return bags


# ---------------------------------------------------------------- measures

def measures(args, settings):
    """{measure: function of (encoder, protocol)} of what is measured on every arm.

    Attention is (T, n), aggregated, of each test image, at CROP px and at the global views' size; the others
    are scores (R, T, C) of R folds or trainings, DSMIL's of test bags.
    """
    device, bf16 = settings.device, encoders.use_bf16(settings.precision, settings.device)

    def attention(encoder, on, size=CROP):
        whole, flip = torch.tensor([[0., 0, CROP, CROP]]), torch.zeros(1)

        def aggregated(x):
            if size != CROP:
                x = resample(x.float(), whole.expand(len(x), 4), flip.expand(len(x)), size)
            return attention_of(encoder, x)
        return in_batches(aggregated, on.images[on.test], 64, "attention").numpy()

    def features(encoder, on):
        if getattr(on, "of", None) is not encoder:  # once for three measures
            f = in_batches(lambda x: represent(encoder, x, bf16), on.images, 64, "features")
            on.of, on.features = encoder, f.numpy()
        return on.features

    def neighbours(encoder, on):
        f = features(encoder, on)
        return nearest(f[on.train], on.labels[on.train], f[on.test], len(on.classes))[None]

    def logistic(encoder, on):
        f = features(encoder, on)
        return np.stack([fit_linear(f, on.labels, *fold)[0](f[on.test]) for fold in on.folds])

    out = {"attention": attention, "20-NN": neighbours, f"logistic regression, {args.folds} folds": logistic}
    if settings.global_size != CROP:  # the encoder has never seen CROP px, so also as views are resampled
        out[f"attention at {settings.global_size} px"] = lambda encoder, on: attention(
            encoder, on, settings.global_size)
    if args.bag_seeds:
        name = f"DSMIL on synthetic slides of {args.bag_groups}, {args.bag_seeds} seeds"
        out[name] = lambda encoder, on: on_bags(features(encoder, on), on, args.bag_seeds)
    if args.tune_epochs:
        folds = min(args.folds, args.tune_folds)
        name = f"fine-tuned {args.tune_epochs} epochs, {folds} of {args.folds} folds"
        out[name] = lambda encoder, on: fine_tuned(
            encoder, on, args.tune_epochs, folds, settings.seed, device, bf16)
    return out


def fine_tuned(encoder, on, epochs, folds, seed, device, bf16):
    """The whole encoder fine-tuned (A.1.2) at MHIST's settings, with scaled milestones: (folds, T, C)."""
    mhist = SETTINGS["mhist"]
    scaled = [round(m * epochs / mhist["epochs"]) for m in mhist["milestones"]]
    settings = SimpleNamespace(**mhist | {"epochs": epochs, "milestones": [m for m in scaled if m > 0]},
                               device=device, bf16=bf16)
    out = []
    for k, fold in enumerate(on.folds[:folds], 1):
        predict, _, _ = fine_tune(encoder, on.images, on.labels, *fold, len(on.classes), settings, seed,
                                  f"fine-tuning, fold {k}")
        out.append(predict(on.images[on.test]))
    return np.stack(out)


def on_bags(features, on, seeds):
    """DSMIL's scores (seeds, bags, C) of the test bags; every fifth training bag validates."""
    tiles, classes = torch.from_numpy(features), len(on.classes)
    bags = [(tiles[index], label) for index, label in on.train_bags]
    train, val = [bag for i, bag in enumerate(bags) if i % 5], bags[::5]
    out = []
    for seed in range(seeds):
        model = mil.train_dsmil(train, val, classes, DSMIL_EPOCHS, seed=seed)
        out.append(torch.stack([mil.dsmil_predict(model, tiles[index]) for index, _ in on.test_bags]).numpy())
    return np.stack(out)


def main(argv=None):
    def command():
        args = arguments(argv)
        return run(args) if args.command == "run" else show(args)
    return run_script("claim", command)


if __name__ == "__main__":
    sys.exit(main())
