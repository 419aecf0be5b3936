"""The paper's data sets (A.1): um/px, epochs, classes; names of work folders and runs."""
import re
from pathlib import Path

DATASETS = {  # name: um/px of the crops (A.1: 5x, BRIGHT 10x), epochs of pre-training (A.1.2)
    "demo": (2.0, 16), "lung": (2.0, 100), "brca": (2.0, 30), "paad": (2.0, 100),
    "bright3": (1.0, 50), "bright6": (1.0, 50),
    "mhist": (None, None), "chaoyang": (None, None)}  # images as they are, for fine-tuning only
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
