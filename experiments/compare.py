"""What the paper compares with: python -m experiments.compare --ssl NAME [--method M] [flags of train.py].

Runs train.py's own loop with another recipe and writes the same files to runs/<data>_<arch>_<method>_<ssl>/;
eval.py takes its encoder.pt like any other. The same command resumes. --accumulate and torchrun work as with
train.py, except for BYOL and SimCLR. docs/paper.md has the commands of Tables 3, 6, 8 and 9 and of Fig. 9.

Controls, not in the paper: --ssl dino --heads 12 12: two heads on f; --depth 4: fewer blocks, for any method;
--ssl registers: four more tokens; --ssl evenness: a penalty on uneven attention.
"""
import sys

import train
from common.distributed import processes
from common.encoders import MEAN, STD, RegisterViT
from common.errors import InputError
from common.flags import between, whole, words_of
from experiments.ssl import byol_simclr, esvit, evenness, heads, imix, lsup, selfpatch

REGISTERS = 4  # those of Darcet et al. (2024)


def build_registers(encoder, args):
    """Returns the Recipe of --ssl registers; a seed's encoder and head start as the baseline's."""
    return train.build_dirl(RegisterViT(encoder, REGISTERS), args)


BASELINES = {"esvit": esvit.build, "selfpatch": selfpatch.build, "imix": imix.build, "lsup": lsup.build,
             "registers": build_registers, "evenness": evenness.build}
BUILD = {"dino": train.build_dirl, "byol": byol_simclr.build, "simclr": byol_simclr.build, **BASELINES}
WHOLE_BATCH = {"byol": "batch norm", "simclr": "its negatives"}  # what needs all crops of a batch

# What replaces train.py's defaults; flags on the command line, and --data demo's defaults, come first.
DEFAULTS = {
    "byol": {
        "epochs": 20,  # Table 8's caption
        "local_crops": 0,  # two views of
        "global_scale": (0.08, 1.0),  # byol/utils/dataset.py; their colours are those of DINO's global views
        "momentum": 0.97},  # byol/configs/byol.py: 0.97 for 40 epochs, 0.99 for 100 and 300, 0.996 for 1000
    "simclr": {
        "epochs": 20,  # Table 8's caption; dsmil-wsi/simclr/config.yaml as well
        "batch": 512,  # A.1.2
        "local_crops": 0,  # two views of
        "global_scale": (0.08, 1.0),  # torchvision's RandomResizedCrop in simclr/data_aug/dataset_wrapper.py,
        "jitter": 2.0,  # which jitters by 0.8, 0.8, 0.8, 0.2
        "solarize": 0.0},  # and solarises nothing
    "selfpatch": {"global_scale": (0.25, 1.0), "local_scale": (0.05, 0.25)},  # main_selfpatch.py
}


def argument_parser():
    """Returns train.py's parser with the flags of a comparison added."""
    parser = train.argument_parser("python -m experiments.compare")
    for ssl, own in DEFAULTS.items():
        parser.epilog += f"; --ssl {ssl} these: {words_of(own)}"
    add = parser.add_argument_group("comparison").add_argument
    add("--ssl", default="dino", choices=list(BUILD),
        help="self-supervised loss; byol, simclr and dino take every --method, the others are baselines")
    add("--heads", type=whole(), nargs="+", metavar="BLOCK",
        help="a DINO head after each of these blocks (Table 6, 13*: 12 13); for --ssl dino")
    add("--sup-weight", type=between(0, 1e6), default=1.0,
        help="weight of L_sup, which is added to DINO's loss; for --ssl lsup")
    add("--even-weight", type=between(0, 1e6), default=10.0,
        help="weight of the penalty on uneven attention, which is added to DINO's loss; for --ssl evenness")
    return parser


def arguments(argv):
    """Returns the flags of a comparison; InputError where two clash."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argument_parser()
    known, _ = parser.parse_known_args(argv)
    if known.ssl in BASELINES or known.heads:
        parser.set_defaults(method="baseline")
    parser.set_defaults(**DEFAULTS.get(known.ssl, {}))
    args = train.arguments(argv, parser)
    check(args)
    if not known.run:
        depth = f"_depth{args.depth}" if args.depth else ""
        heads = "_heads" + "-".join(map(str, args.heads)) if args.heads else ""
        args.run = f"{train.default_run(args)}_{args.ssl}{depth}{heads}"
    return args


def check(args):
    """InputError for flags that clash."""
    if args.ssl in WHOLE_BATCH and (args.accumulate > 1 or processes() > 1):
        raise InputError(f"--accumulate and torchrun: --ssl {args.ssl} needs its batch whole, for "
                         f"{WHOLE_BATCH[args.ssl]}")
    if args.heads and args.arch == "vit_h":
        raise InputError("--heads: --arch vit_h has blocks of two sizes; use another --arch")
    if args.heads:
        depth = len(train.start_encoder(args, MEAN, STD).blocks)
        if args.ssl != "dino" or max(args.heads) != depth:  # blocks after the last head would not learn
            raise InputError(f"--heads {' '.join(map(str, args.heads))}: needs --ssl dino, and as its last "
                             f"block {depth}, the last of this encoder")
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
    return train.main(argv, "compare", arguments, build)


if __name__ == "__main__":
    sys.exit(main())
