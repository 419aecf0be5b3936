"""The paper's data sets (A.1): um/px, epochs, classes; names of work folders and runs."""
import re
from pathlib import Path

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


def safe_name(folder):
    """The name of a folder's work and runs."""
    return re.sub(r"[^\w.-]+", "_", Path(folder).resolve().name)


def run_name(data):
    """The name of a data set (a key of DATASETS or a folder) in names of runs."""
    return data if data in DATASETS else safe_name(data)
