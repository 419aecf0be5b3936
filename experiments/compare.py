"""What the paper compares with: python -m experiments.compare --ssl NAME [--method M] [flags of train.py].

Runs train.py's own loop with another recipe and writes the same files to runs/<data>_<arch>_<method>_<ssl>/;
eval.py takes its encoder.pt like any other. The same command resumes.

    Table 3     --ssl esvit, --ssl selfpatch
    Table 6     --ssl dino --method baseline --arch vit_s --depth 13 [--heads 12 13]
    Table 8     --ssl byol, --ssl simclr (the paper: --batch 512), each --method baseline, cellback, dirl
    Table 9     --ssl imix
    Fig. 9      --ssl lsup
    controls    --ssl dino --heads 12 12: two heads on f; --depth 4: fewer blocks, for any method
"""
import os
import sys

import torch

import train
from common.errors import InputError, run_script
from common.flags import between, whole
from experiments.ssl import byol_simclr, esvit, heads, imix, lsup, selfpatch

BASELINES = {"esvit": esvit.build, "selfpatch": selfpatch.build, "imix": imix.build, "lsup": lsup.build}
BUILD = {"dino": train.build_dirl, "byol": byol_simclr.build, "simclr": byol_simclr.build, **BASELINES}


def argument_parser():
    """Returns train.py's parser with the flags of a comparison added."""
    parser = train.argument_parser("python -m experiments.compare")
    add = parser.add_argument_group("comparison").add_argument
    add("--ssl", default="dino", choices=list(BUILD),
        help="self-supervised loss; byol, simclr and dino take every --method, the others are baselines")
    add("--heads", type=whole(), nargs="+", metavar="BLOCK",
        help="a DINO head after each of these blocks (Table 6, 13*: 12 13); for --ssl dino")
    add("--sup-weight", type=between(0, 1e6), default=1.0,
        help="weight of L_sup, which is added to DINO's loss; for --ssl lsup")
    return parser


def arguments(argv):
    """Returns the flags of a comparison; InputError where two clash."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argument_parser()
    known, _ = parser.parse_known_args(argv)
    if known.ssl in BASELINES or known.heads:
        parser.set_defaults(method="baseline")
    args = train.parse(parser, argv)
    check(args)
    if not known.run:
        depth = f"_depth{args.depth}" if args.depth else ""
        heads = "_heads" + "-".join(map(str, args.heads)) if args.heads else ""
        args.run = f"{train.default_run(args)}_{args.ssl}{depth}{heads}"
    return args


def check(args):
    """InputError for flags that clash."""
    if args.accumulate > 1 or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("--accumulate and torchrun: work with train.py only; a comparison needs its batch "
                         "whole")
    if args.heads and args.arch == "vit_h":
        raise InputError("--heads: --arch vit_h has blocks of two sizes; use another --arch")
    if args.heads:
        depth = len(train.start_encoder(args, train.MEAN, train.STD).blocks)
        if args.ssl != "dino" or max(args.heads) > depth:
            raise InputError(f"--heads {' '.join(map(str, args.heads))}: needs --ssl dino, and blocks "
                             f"between 1 and {depth} of this encoder")
    if args.method != "baseline" and (args.heads or args.ssl in BASELINES):
        what = "--heads" if args.heads else f"--ssl {args.ssl}"
        raise InputError(f"--method {args.method}: {what} needs --method baseline")
    if args.ssl in ("byol", "simclr") and args.empty_regions != "skip":
        raise InputError(f"--empty-regions {args.empty_regions}: --ssl {args.ssl} always skips absent "
                         "regions")


def build(encoder, args):
    """Returns the train.Recipe of a comparison."""
    return heads.build(encoder, args) if args.heads else BUILD[args.ssl](encoder, args)


def main(argv=None):
    torch.set_flush_denormal(True)  # denormal numbers are slow on a CPU
    return run_script("compare", lambda: train.train(arguments(argv), build), "--batch or --local-crops",
                      "the same command resumes")


if __name__ == "__main__":
    sys.exit(main())
