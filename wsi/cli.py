"""The commands of data.py: manifest, check, prepare, look."""
import os
from pathlib import Path

from common.errors import Parser, run_script
from common.pool import add_limits, add_shard, call
from wsi import check, gdc, look
from wsi.cache import run_shard
from wsi.datasets import DATASETS, PRIORS
from wsi.splits import complete_split, find_data


def arguments(argv):
    parser = Parser(prog="python data.py",
                    description="What is on disk and what is missing, before training.")
    commands = parser.add_subparsers(dest="command", required=True)
    manifest = commands.add_parser("manifest", help="asks the GDC for the slides of lung or brca; writes "
                                   "manifest.tsv, labels.csv and the split")
    manifest.add_argument("--data", required=True, choices=list(gdc.PROJECTS), help="which TCGA data set")
    gdc.add_arguments(manifest)
    checked = commands.add_parser("check", help="what is there, what is missing, where to get it")
    checked.add_argument("--md5", action="store_true",
                         help="compares with the manifest's md5 sums; reads every byte")
    prepared = commands.add_parser("prepare", help="cuts tiles and finds cells, as train.py does before it "
                                   "trains; for a machine without a GPU, or many machines")
    add_shard(prepared.add_argument)
    looked = commands.add_parser("look", help="a picture of a slide: thumbnail, tissue, tile grid, cells; "
                                 "or of all slides of a folder")
    looked.add_argument("slide", help="a slide or an image, a folder of DICOM files, or a folder of slides")
    looked.add_argument("--cells", help="a segmentation result of this slide; default: the built-in detector")
    looked.add_argument("--tile", nargs="+", metavar="X,Y",
                        help="shows the tiles that hold these points in level-0 px; default: three of them")
    looked.add_argument("--out", help="the picture (runs/look_<slide>.png, runs/look_<folder>.png)")
    for sub in (checked, prepared):
        sub.add_argument("--data", required=True, help=f"{', '.join(DATASETS)}, or a folder")
        sub.add_argument("--prior", default="auto", choices=PRIORS, help="whose cells, as in train.py")
    for sub in (looked, prepared):
        sub.add_argument("--tissue", type=float, default=0.5,
                         help="least share of tissue in a tile, as in train.py")
    for sub in (checked, looked, prepared):
        sub.add_argument("--mpp", type=float, help="um/px of the crops (2.0 is the paper's 5x)")
        sub.add_argument("--slide-mpp", type=float, help="um/px of slides that record none")
        sub.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes")
        add_limits(sub.add_argument)
    for sub in (manifest, checked, prepared):
        sub.add_argument("--root", default="datasets", help="folder of the data sets")
        sub.add_argument("--split-seed", type=int, default=0, help="seed of the split, when it is first made")
    return parser.parse_args(argv)


def run(args):
    if args.command == "look":
        return look.look(args)
    if args.command == "manifest":
        labels = {slide["slide"]: slide | {"split": ""} for slide in gdc.manifest(
            args.data, args.root, args.limit, args.server, args.timeout, args.force)}
        complete_split(labels, "slides", Path(args.root, args.data, "split.csv"), args.split_seed)
        return 0
    how = args.data, args.mpp, args.prior, args.split_seed, args.root, args.slide_mpp
    if args.command == "prepare":
        return run_shard(find_data(*how), args)
    return check.check(args, *call(find_data, how))


def main(argv=None):
    return run_script("data.py", lambda: run(arguments(argv)))
