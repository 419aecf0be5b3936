"""The paper's data sets (A.1): um/px, epochs, classes, where to get them, layouts; and the data flags."""
import argparse
import re
from pathlib import Path
from typing import NamedTuple

from common.flags import MPP, SEED, SHARE

SLIDES_LAYOUT = ("{0}/slides/ (in subfolders too), {0}/labels.csv: slide,label[,patient][,split][,mpp], "
                 "{0}/cells/<slide>.*")


class DataSet(NamedTuple):
    """What is known of a data set before its files are read; None where the paper has no value."""

    mpp: float  # um/px of the crops (A.1: 5x, BRIGHT 10x)
    epochs: int  # of pre-training (A.1.2)
    classes: tuple
    source: str  # where to get it
    layout: str = SLIDES_LAYOUT  # {0} is its folder
    folder: str = ""  # if it is not the data set's name
    prior: str = ""  # the paper's segmenter (4.1), which --prior auto looks for first


BRIGHT3 = {"PB": "non-cancerous", "UDH": "non-cancerous", "ADH": "pre-cancerous", "FEA": "pre-cancerous",
           "DCIS": "cancerous", "IC": "cancerous"}  # A.1
BRIGHT = ("research.ibm.com/haifa/Workshops/BRIGHT, after registering; labels PB, UDH, FEA, ADH, DCIS, IC, "
          "split train or validation (the paper tests on the official validation split); for bright3 and "
          "bright6")

DATASETS = {
    "demo": DataSet(1.0, 5, ("negative", "positive"), "drawn by python train.py; synthetic"),
    "lung": DataSet(2.0, 100, ("LUAD", "LUSC"), "the GDC: python data.py manifest --data lung; LUAD, LUSC",
                    prior="hovernet"),
    "brca": DataSet(2.0, 30, ("IDC", "ILC"), "the GDC: python data.py manifest --data brca; IDC, ILC",
                    prior="cellpose"),
    "paad": DataSet(
        2.0, 100, ("basal", "classical"),
        "slides from the GDC (project TCGA-PAAD, diagnostic slides, portal.gdc.cancer.gov); basal or "
        "classical per patient is in the supplement of TCGA's PAAD paper (Raphael et al. 2017), for "
        "labels.csv", prior="cellpose"),
    "bright3": DataSet(1.0, 50, tuple(sorted(set(BRIGHT3.values()))), BRIGHT, folder="bright",
                       prior="cellpose"),
    "bright6": DataSet(1.0, 50, tuple(sorted(BRIGHT3)), BRIGHT, folder="bright",  # the same slides
                       prior="cellpose"),
    "mhist": DataSet(
        None, None, ("HP", "SSA"), "bmirds.github.io/MHIST, after registering",
        "{0}/images/*.png, {0}/annotations.csv as distributed"),
    "chaoyang": DataSet(
        None, None, ("normal", "serrated", "adenocarcinoma", "adenoma"),
        "bupt-ai-cz.github.io/HSA-NRL, after registering",
        "{0}/train.json, {0}/test.json, images at the names in them"),
}
PATCH_SETS = ("mhist", "chaoyang")  # ready-cut images whose labels are not in a labels.csv
OWN = DataSet(None, None, (), "your own",
              SLIDES_LAYOUT + ", or crops/, or images with a labels.csv of image,label")

# train.py's defaults for the demo, which has to learn within minutes on two CPU cores; all other data sets
# start from the paper's settings. --stats data matters most: under ImageNet's mean all tissue is one pink,
# and f hardly differs between crops. 4 blocks, and views of 112 and 48 px, make steps cheap. A few
# hundred steps need a fast and sharp teacher, few outputs, and colour that varies less than in DINO, whose
# jitter drowns what differs. fp32 is faster than bf16 at this size.
DEMO = dict(arch="vit_t4", stats="data", batch=32, out_dim=256, disentangled_dim=64, local_crops=2,
            global_size=112, local_size=48, global_scale=(0.3, 1.0), local_scale=(0.05, 0.25), lr=4e-3,
            momentum=0.98, teacher_temp=0.03, jitter=0.7, greyscale=0.0, solarize=0.0, blur=0.3,
            precision="fp32")
PRIORS = ("auto", "builtin", "hovernet", "cellpose", "histomicstk")
NO_CELLS = "none"  # a prior that no flag names: crops without their cells, for the baseline


def folder_of(data, root):
    """Returns the folder of a data set: a key of DATASETS under root, or the path itself."""
    known = DATASETS.get(data)
    return Path(root) / (known.folder or data) if known else Path(data)


def safe_name(folder):
    """Returns the name that a folder has in datasets/ and runs/."""
    return re.sub(r"[^\w.-]+", "_", Path(folder).resolve().name)


def run_name(data, split=None, drop_shared=False):
    """Returns the name of a data set in names of runs; with a published split, that of both.

    data: a key of DATASETS or a folder. lung with HIPT's tcga_lung/splits_0.csv: lung_tcga_lung_splits_0.
    """
    name = data if data in DATASETS else safe_name(data)
    if split:
        path = Path(split).resolve()
        name = f"{name}_{safe_name(path.parent)}_{safe_name(path.with_suffix(''))}"
    return f"{name}_unshared" if drop_shared else name


def split_flags(split, drop_shared):
    """Returns --split and --drop-shared as a command line has them, [] if they are not given."""
    flags = ["--split", str(split)] if split else []
    return flags + ["--drop-shared"] if drop_shared else flags


def cutting_flags(data, mpp, slide_mpp, tissue):
    """Returns --mpp, --slide-mpp and --tissue as eval.py needs them after train.py, [] for its defaults."""
    flags = ["--mpp", str(mpp)] if mpp and data in DATASETS and mpp != DATASETS[data].mpp else []
    flags += ["--slide-mpp", str(slide_mpp)] if slide_mpp else []
    return flags if tissue == DATA_FLAGS["--tissue"]["default"] else [*flags, "--tissue", str(tissue)]


def evaluated_mpp(data, mpp, trained_at):
    """Returns the um/px to evaluate an encoder at: --mpp, else a known data set's, else trained_at.

    Prints a warning if a known data set's um/px is not trained_at, the one that the encoder was trained at.
    """
    if mpp is not None or data not in DATASETS:
        return mpp or trained_at
    mpp = DATASETS[data].mpp
    if mpp and trained_at and mpp != trained_at:
        print(f"warning: --data {data} is cut at {mpp:g} um/px, but the encoder was trained at "
              f"{trained_at:g}; --mpp {trained_at:g} takes the encoder's")
    return mpp


DATA_FLAGS = {
    "--data": dict(default="demo", help=f"{', '.join(DATASETS)}, or a folder with slides or crops"),
    "--mpp": dict(
        type=MPP, help="um/px of the crops, of ready-cut ones in their files; 2.0 is 5x, 1.0 10x, 0.5 20x; "
                       "needed to train on a folder; default: the data set's or a trained encoder's, 2.0 for "
                       "data.py look"),
    "--slide-mpp": dict(type=MPP, help="um/px of slides and images that record none"),
    "--tissue": dict(
        type=SHARE, default=0.5, help="minimum share of tissue in a tile; lower it for thin biopsies"),
    "--prior": dict(
        default="auto", choices=PRIORS,
        help="whose cells P_c is made from (Table 7): files in cells/<prior>/ or cells/; auto takes the "
             "paper's (lung: hovernet; brca, paad, bright: cellpose), else other files in cells/, else the "
             "built-in detector's"),
    "--split-seed": dict(
        type=SEED, default=0,
        help="seed of the split when it is first drawn; afterwards datasets/<data>/split.csv counts"),
    "--split": dict(
        metavar="FILE", help="a published split, a CSV with the columns train,val,test as in CLAM and HIPT; "
                             "the data set's own split is neither used nor changed"),
    "--drop-shared": dict(
        action="store_true",
        help="with --split: leaves slides of patients who are in two splits out of the earlier one, so that "
             "no test patient is seen; without the flag they are counted, and the split is as published"),
}


def add_data_flags(add, *names, required=False):
    """Adds the flags of DATA_FLAGS, all or the named ones; required: --data has no default."""
    for name in names or DATA_FLAGS:
        flag = DATA_FLAGS[name]
        if required and name == "--data":
            flag = flag | {"required": True, "default": argparse.SUPPRESS}
        add(name, **flag)
