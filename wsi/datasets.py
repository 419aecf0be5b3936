"""The paper's data sets (A.1): um/px, epochs, classes, layouts, where to get them; their flags."""
import re
from pathlib import Path

from common.flags import MPP, SEED, SHARE

DATASETS = {  # name: um/px of the crops (A.1: 5x, BRIGHT 10x), epochs of pre-training (A.1.2)
    "demo": (2.0, 16), "lung": (2.0, 100), "brca": (2.0, 30), "paad": (2.0, 100),
    "bright3": (1.0, 50), "bright6": (1.0, 50),
    "mhist": (None, None), "chaoyang": (None, None)}  # images as they are, for fine-tuning only
# The demo has to learn within minutes on two CPU cores; everything else starts from the paper's settings.
# --stats data is what lets it: with ImageNet's mean all tissue is one pink, and f hardly differs between
# crops. Views of 64 px at the scale that crops have in eval.py make steps cheap. Some hundred steps are few:
# hence a fast and sharp teacher and a centre that follows at once; the last layers stay frozen, so that the
# outputs cannot all become the same; colour varies less than in DINO, which drowns what differs.
DEMO = dict(arch="vit_t4", stats="data", batch=32, out_dim=1024, disentangled_dim=256, local_crops=0,
            global_size=64, global_scale=(0.1, 0.5), lr=4e-3, momentum=0.99, teacher_temp=0.02,
            center_momentum=0.3, freeze_last_layer=100, drop_path=0.0, jitter=0.7, greyscale=0.0,
            solarize=0.0, blur=0.3)
FOLDERS = {"bright3": "bright", "bright6": "bright"}  # both sub-tasks are on the same slides, with six labels
BRIGHT3 = {"PB": "non-cancerous", "UDH": "non-cancerous", "ADH": "pre-cancerous", "FEA": "pre-cancerous",
           "DCIS": "cancerous", "IC": "cancerous"}  # A.1
CLASSES = {"mhist": ["HP", "SSA"], "chaoyang": ["normal", "serrated", "adenocarcinoma", "adenoma"]}
PRIORS = ("auto", "builtin", "hovernet", "cellpose", "histomicstk")

SLIDES_LAYOUT = ("{0}/slides/ (in subfolders too), {0}/labels.csv: slide,label[,patient][,split][,mpp], "
                 "{0}/cells/<slide>.*")
WHERE = {  # where to get a data set, and its layout
    "demo": ("made by python train.py; synthetic", SLIDES_LAYOUT),
    "lung": ("the GDC: python data.py manifest --data lung; LUAD, LUSC", SLIDES_LAYOUT),
    "brca": ("the GDC: python data.py manifest --data brca; IDC, ILC", SLIDES_LAYOUT),
    "paad": ("slides from the GDC (project TCGA-PAAD, diagnostic slides, portal.gdc.cancer.gov); basal or "
             "classical per patient is in the supplement of TCGA's PAAD paper (Raphael et al. 2017), for "
             "labels.csv", SLIDES_LAYOUT),
    "bright": ("research.ibm.com/haifa/Workshops/BRIGHT, after registering; labels PB, UDH, FEA, ADH, DCIS, "
               "IC, split train or validation (the paper tests on the official validation part); for bright3 "
               "and bright6", SLIDES_LAYOUT),
    "mhist": ("bmirds.github.io/MHIST, after registering",
              "{0}/images/*.png, {0}/annotations.csv as it comes"),
    "chaoyang": ("bupt-ai-cz.github.io/HSA-NRL, after registering",
                 "{0}/train.json, {0}/test.json, images at the names in them"),
}
OWN = ("your own", SLIDES_LAYOUT + ", or crops/, or images with a labels.csv of image,label")


def safe_name(folder):
    """The name of a folder's work and runs."""
    return re.sub(r"[^\w.-]+", "_", Path(folder).resolve().name)


def run_name(data):
    """The name of a data set (a key of DATASETS or a folder) in names of runs."""
    return data if data in DATASETS else safe_name(data)


def add_data_flags(add, default="demo"):
    """The flags that name a data set and say how its slides become crops."""
    add("--data", default=default, help=f"{', '.join(DATASETS)}, or a folder with slides or crops")
    add("--mpp", type=MPP,
        help="um/px of the crops, of ready-cut ones in their files; 2.0 is 5x, 1.0 10x, 0.5 20x; a folder "
             "needs it")
    add("--slide-mpp", type=MPP, help="um/px of slides and images that record none")
    add("--tissue", type=SHARE, default=0.5,
        help="least share of tissue in a tile; lower it for thin biopsies")
    add("--prior", default="auto", choices=PRIORS,
        help="whose cells P_c is made from (Table 7): files in cells/<prior>/ or cells/; auto takes your own "
             "if there are any, else the built-in detector's")
    add("--split-seed", type=SEED, default=0,
        help="seed of the split when it is first made; afterwards datasets/<data>/split.csv counts")
