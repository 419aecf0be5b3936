"""What the analyses share: named checkpoints, crops and the choice of some, pictures with their numbers."""
import argparse
from pathlib import Path

import numpy as np
import torch

from common.encoders import check_device, find_encoder, open_encoder
from common.errors import InputError, Parser, print_skipped
from common.figures import save_figure
from common.files import read_json, write_csv
from common.flags import add_max_gigapixels, whole
from data import Crops, images_of, spread
from wsi.cache import file_mpp, prepare, prepare_tiles
from wsi.datasets import PRIORS, add_data_flags, evaluated_mpp
from wsi.splits import check_unseen, find_data

CANDIDATES = 100  # crops whose glass is measured, to choose those with little of it
GLASS = 210  # of 255: a pixel is glass if all its channels are brighter


# ---------------------------------------------------------------- flags

def parser_of(script, description, **more):
    """Returns the parser of python -m experiments.<script> and its add_argument."""
    parser = Parser(prog=f"python -m experiments.{script}", description=description, **more)
    return parser, parser.add_argument


def add_data(add):
    """Adds the flags of a script that shows a data set's crops."""
    add_data_flags(add, "--data", "--mpp", "--slide-mpp", "--tissue")
    add("--workers", type=whole(0, 1024), default=2, help="processes that cut missing tiles")
    add_max_gigapixels(add)


def add_checkpoints(add):
    """Adds the flags of a script that compares checkpoints."""
    add("--checkpoint", nargs="+", required=True, metavar="[NAME=]RUN",
        help="runs, or their encoder.pt, each with a name for the figure (default: the run's folder)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1 or cpu")


def add_networks(add):
    """Adds the flags of a script that compares checkpoints on the crops of a data set."""
    add_checkpoints(add)
    add_data(add)
    add("--prior", choices=PRIORS,
        help="whose cells P_c is drawn from; default: those that the runs learned from, and auto (see "
             "train.py) for baselines and on other data sets")
    add("--part", default="test", choices=["test", "val", "train"],
        help="split to take slides from; an encoder that was trained on a test slide is refused")


def png(text):
    """An argparse type: the name of a .png."""
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(
            f"{text}: the name of a .png is expected; the numbers go next to it, as .csv")
    return text


# ---------------------------------------------------------------- networks and crops

def named(texts, flag):
    """Returns {name: value} of [NAME=]VALUE texts; the default name is the last folder of the value."""
    out = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            value, path = text, Path(text).resolve()
            name = path.parent.name if path.name == "encoder.pt" else path.name
        if not name or name in out:
            raise InputError(f"{flag} {text}: the name {name!r} is empty or taken; write NAME={value}")
        out[name] = value
    return out


def load_networks(args, arch=None):
    """Returns {name: (encoder on --device, its file, the file's other values)} of --checkpoint.

    arch: of files that are no encoder.pt, see common.encoders.open_encoder.
    """
    check_device(args.device)
    out = {}
    for name, run in named(args.checkpoint, "--checkpoint").items():
        path = find_encoder(run)
        encoder, about = open_encoder(path, arch)
        out[name] = encoder.to(args.device), path, about
    return out


def prior_of(networks, found):
    """Returns the --prior of the runs that learned from the cells of this data set, "auto" without such runs.

    Prints a warning if it differs between them.
    """
    priors = []
    for _, path, about in networks.values():
        learned_from_cells = about["method"] in ("cellback", "dirl") or about.get("ssl") == "lsup"
        prior = read_json(path.parent / "config.json").get("prior")
        if learned_from_cells and about["trained_on"]["data"] == found.name and prior in PRIORS:
            priors.append(prior)
    if len(set(priors)) > 1:
        different = ", ".join(dict.fromkeys(priors))
        print(f"warning: the networks learned from different cells ({different}); P_c is drawn from those of "
              f"{priors[0]}; --prior takes others")
    return priors[0] if priors else "auto"


def open_all(args, with_cells=True):
    """Returns load_networks, the data set, and the names of its --part.

    with_cells: P_c is drawn, so without --prior the data set has the one of prior_of. Without labels
    args.part becomes "train", which is all. InputError if an encoder was trained on one of the test part.
    """
    networks = load_networks(args)
    trained_at = next(iter(networks.values()))[2]["mpp"]
    mpp = evaluated_mpp(args.data, args.mpp, trained_at)
    found = find_data(args.data, mpp, args.prior or "auto", slide_mpp=args.slide_mpp)
    if with_cells and not args.prior:
        found.prior = prior_of(networks, found)
    if found.kind == "crops" and not args.mpp:
        found.mpp = file_mpp(found, trained_at)
    if not found.labels:
        args.part = "train"
    names = found.split(args.part)
    if not names:
        raise InputError(f"--part {args.part}: {found.source} has no {found.kind} in it; take another part")
    if args.part == "test":
        for _, path, about in networks.values():
            check_unseen(found, names, about["trained_on"], path)
    return networks, found, names


def crops_of(found, names, args, with_cells=True):
    """Returns the Crops of these slides, with their cells or without; cuts those that are missing."""
    if with_cells:
        print_skipped(prepare(found, args.tissue, args.workers, args.max_gigapixels))
    elif found.kind == "slides":
        print_skipped(prepare_tiles(found, args.tissue, args.workers, args.max_gigapixels))
    crops = Crops(found, names, with_cells)
    if not len(crops):
        raise InputError(f"{found.source}: no crop of these {found.kind}; python data.py check --data "
                         f"{args.data} says what is missing")
    return crops


def choose_crops(crops, priors, count):
    """Returns the indices of up to count crops with both regions and little glass, evenly spread.

    Both regions: 20 to 80 % of P_c (N, n) have a cell, if any crop has. Little glass: at most 10 % of the
    pixels are bright, if count crops have. Up to CANDIDATES of the crops (image (3, H, H), ...) are read.
    """
    covered = np.asarray(priors.mean(1))
    mixed = np.flatnonzero((covered > 0.2) & (covered < 0.8))
    if not len(mixed):
        mixed = np.arange(len(priors))
    candidates = mixed[spread(len(mixed), max(count, CANDIDATES))]
    bright = images_of(crops, candidates).amin(1) > GLASS  # (N, H, H)
    glass = bright.float().mean((1, 2)).numpy()
    good = np.flatnonzero(glass <= 0.1)
    if len(good) < count:
        good = np.sort(np.argsort(glass, kind="stable")[:count])
    return candidates[good[spread(len(good), count)]].tolist()


# ---------------------------------------------------------------- what is written

def rounded(value):
    """Returns a float as text of six digits, another value unchanged."""
    return f"{value:.6g}" if isinstance(value, (float, np.floating)) else value


def save_both(figure, rows, path, dpi=130):
    """Writes a figure to path (.png) and its numbers to the .csv next to it; prints where."""
    path = Path(path)
    save_figure(figure, path, dpi)
    write_csv(path.with_suffix(".csv"), [map(rounded, row) for row in rows])
    print(f"Wrote {path} and, next to it, {path.with_suffix('.csv').name}.")
