"""The commands of data.py: manifest, check, prepare, look."""
import os
import shlex
from pathlib import Path

from common.errors import Parser, exit_code_of, print_skipped, run_script
from common.flags import add_max_gigapixels, add_shard, whole
from common.pool import call
from wsi.cache import keep_shard, prepare, warn_of_cell_files
from wsi.check import check
from wsi.datasets import add_data_flags
from wsi.gdc import PROJECTS, manifest
from wsi.look import Cutting, look
from wsi.splits import complete_split, find_data


def arguments(argv):
    parser = Parser(prog="python data.py", description="Lists, checks, shows and prepares data sets.")
    commands = parser.add_subparsers(dest="command", required=True)

    listed = commands.add_parser("manifest", help="asks the GDC for the slides of lung or brca; writes "
                                 "manifest.tsv, labels.csv and the split")
    add = listed.add_argument
    add("--data", required=True, choices=list(PROJECTS), help="which TCGA data set")
    add("--limit", type=whole(2), help="at most N slides, the same number of each class", metavar="N")
    add("--force", action="store_true", help="overwrites a labels.csv that differs")
    add_data_flags(add, "--split-seed")

    checked = commands.add_parser("check", help="reports what exists, what is missing, and where to get it")
    add_data_flags(checked.add_argument, "--data", "--mpp", "--slide-mpp", "--prior", "--split-seed",
                   required=True)
    checked.add_argument("--md5", action="store_true",
                         help="compares slides with the manifest's md5 sums; reads every byte")

    prepared = commands.add_parser("prepare", help="cuts tiles and finds cells, as train.py does before it "
                                   "trains; for a machine without a GPU, or many machines")
    add_data_flags(prepared.add_argument, required=True)
    add_shard(prepared.add_argument)

    looked = commands.add_parser("look", help="draws a slide: thumbnail, tissue, tile grid, cells; or all "
                                 "slides of a folder")
    add = looked.add_argument
    add("slide", help="a slide or an image (of a DICOM series any file), or a folder of slides")
    add_data_flags(add, "--mpp", "--slide-mpp", "--tissue")
    add("--cells", help="a segmentation result of this slide; default: the built-in detector")
    add("--tile", nargs="+", metavar="X,Y",
        help="shows the tiles that hold these points in level-0 px; default: three tiles")
    add("--out", help="the picture; default: runs/look_<slide>.png or runs/look_<folder>.png")

    for command in (listed, checked, prepared):
        command.add_argument("--root", default="datasets", help="folder of the data sets")
    for command in (checked, prepared, looked):
        command.add_argument("--workers", type=whole(0, 1024), default=min(8, os.cpu_count() or 1),
                             help="processes that read files")
        add_max_gigapixels(command.add_argument)
    return parser.parse_args(argv)


def run(argv):
    """Runs the command of a command line; returns the exit code."""
    args = arguments(argv)
    if args.command == "look":
        cutting = Cutting(args.mpp or 2.0, args.slide_mpp, args.tissue, args.workers, args.max_gigapixels)
        return look(Path(args.slide), cutting, args.cells, args.tile, args.out)
    if args.command == "manifest":
        slides = manifest(args.data, args.root, args.limit, args.force)
        labels = {slide["slide"]: slide | {"split": ""} for slide in slides}
        complete_split(labels, "slides", Path(args.root, args.data, "split.csv"), args.split_seed)
        return 0
    how = args.data, args.mpp, args.prior, args.split_seed, args.root, args.slide_mpp
    if args.command == "check":
        found, error = call(find_data, how)
        return check(args.data, args.root, found, error, args.md5, args.workers, args.max_gigapixels)
    found = find_data(*how, args.split, args.drop_shared)
    warn_of_cell_files(found)  # before the other shards' slides are taken out
    keep_shard(found, args.shard)
    failed = []
    if found.images:
        failed = prepare(found, args.tissue, args.workers, args.max_gigapixels)
    print_skipped(failed)
    print(f"Prepared {len(found.images) - len(failed)} {found.kind} in {found.work}/. "
          f"Next: python train.py --data {shlex.quote(args.data)} with the same flags")
    return exit_code_of(failed)


def main(argv=None):
    return run_script("data.py", lambda: run(argv))
