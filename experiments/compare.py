"""What the paper compares with: python -m experiments.compare --ssl NAME [--method M] [flags of train.py].

Trains by train.py's own loop and writes the same files to runs/<data>_<arch>_<method>_<ssl>/; eval.py takes
its encoder.pt as any other. The same command resumes.

    Table 3     --ssl esvit, --ssl selfpatch
    Table 6     --ssl dino --method baseline --arch vit_s --depth 13 [--heads 12 13]
    Table 8     --ssl byol, --ssl simclr (the paper: --batch 512), each --method baseline, cellback, dirl
    Table 9     --ssl imix
    Fig. 9      --ssl lsup
    controls    --ssl dino --heads 12 12: two heads on f; --depth 4: fewer blocks, for any method
"""
import argparse
import os
import runpy
import sys
from functools import cache
from pathlib import Path

import torch

from common.encoders import MAX_DEPTH, make_encoder, start_encoder
from common.errors import InputError, Parser, run_script
from common.flags import arguments as train_arguments
from common.flags import default_run
from experiments import auxiliary, blocks, byol_simclr, esvit, imix, selfpatch

BASELINES = {"esvit": esvit.build, "selfpatch": selfpatch.build, "imix": imix.build, "lsup": auxiliary.build}
BUILD = {"dino": None, "byol": byol_simclr.build, "simclr": byol_simclr.build, **BASELINES}


def arguments(argv):
    """train.py's flags with those of the comparison; InputError for what does not go together."""
    parser = Parser(
        prog="python -m experiments.compare", allow_abbrev=False,
        description="Pre-trains what the paper compares with; the same command again resumes.",
        epilog="All other flags are train.py's.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--ssl", default="dino", choices=list(BUILD),
        help="how it is trained; byol, simclr and dino take every --method, the others are baselines")
    add("--depth", type=int, help="blocks of the encoder instead of the --arch's own (Table 6: 13)")
    add("--heads", type=int, nargs="+", metavar="BLOCK",
        help="a DINO head after each of these blocks (Table 6, 13*: 12 13); for --ssl dino")
    add("--sup-weight", type=float, default=1.0, help="weight of L_sup beside DINO's loss; for --ssl lsup")
    own, rest = parser.parse_known_args(argv)
    if own.ssl in BASELINES or own.heads:
        rest = ["--method", "baseline", *rest]
    args = train_arguments(rest)
    check(own, args)
    if args.run == default_run(args):
        args.run += f"_{own.ssl}" + (f"_depth{own.depth}" if own.depth else "") + (
            f"_heads{'-'.join(map(str, own.heads))}" if own.heads else "")
    vars(args).update(vars(own), counts=own.ssl == "lsup")  # config.json gets them, and a resume compares
    if own.ssl in ("byol", "simclr"):
        args.freeze_last_layer = 0  # their heads have no prototypes
    return args


def check(own, args):
    """InputError for flags out of their range, or that do not go together."""
    if args.accumulate > 1 or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("--accumulate and torchrun: are for train.py; a comparison takes a batch at once")
    if own.depth is not None and not 1 <= own.depth <= MAX_DEPTH:
        raise InputError(f"--depth {own.depth}: has to lie between 1 and {MAX_DEPTH}")
    if (own.depth or own.heads) and args.arch == "vit_h":
        raise InputError("--arch vit_h: has blocks of two sizes; --depth and --heads need another one")
    if own.heads:
        depth = own.depth or len(make_encoder(args.arch).blocks)
        if own.ssl != "dino" or not all(1 <= block <= depth for block in own.heads):
            raise InputError(f"--heads {' '.join(map(str, own.heads))}: needs --ssl dino and blocks between "
                             f"1 and {depth}, which this encoder has")
    if args.method != "baseline" and (own.heads or own.ssl in BASELINES):
        what = "--heads" if own.heads else f"--ssl {own.ssl}"
        raise InputError(f"--method {args.method}: {what} is for --method baseline")
    if own.ssl in ("byol", "simclr") and args.empty_regions != "skip":
        raise InputError(f"--empty-regions {args.empty_regions}: --ssl {own.ssl} leaves absent regions out")
    if not 0 <= own.sup_weight <= 1e6:
        raise InputError(f"--sup-weight {own.sup_weight}: has to lie between 0 and 1e6")


@cache
def train_py():
    """What train.py defines, by name: it is a script that nothing imports, and is run up to its last line."""
    return runpy.run_path(str(Path(__file__).resolve().parents[1] / "train.py"))


def build(args):
    """Student, teacher and loss of a comparison, as train.py's build_models gives them; seeded."""
    if args.heads:
        return blocks.build(start_encoder(args), args)
    if args.ssl == "dino":
        return train_py()["build_models"](args)
    return BUILD[args.ssl](start_encoder(args), args)


def main(argv=None):
    torch.set_flush_denormal(True)  # denormal numbers are slow on a CPU
    return run_script("compare", lambda: train_py()["run_command"](arguments(argv), build),
                      "--batch or --local-crops", "run it again to go on")


if __name__ == "__main__":
    sys.exit(main())
