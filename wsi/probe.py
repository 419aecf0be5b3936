"""The labelled images on which --probe watches a training."""
from pathlib import Path

import numpy as np
import torch

from common.errors import InputError, print_skipped
from wsi.cache import load_crops
from wsi.datasets import DATASETS
from wsi.splits import find_data


def read_probe(folder, count, seed):
    """Returns the training and the test split, each (images, labels) of at most count, and the class count.

    InputError if folder is not one of images with labels.csv, or if too few of its images can be read.
    """
    expected = "a folder of images with labels.csv (image,label,split) is expected"
    if folder not in DATASETS and not Path(folder).is_dir():
        raise InputError(f"--probe {folder}: is missing; {expected}")
    found = find_data(folder)
    if not found.labels or found.kind != "crops":
        raise InputError(f"--probe {folder}: {expected}")
    generator = torch.Generator().manual_seed(seed)
    sets = []
    for splits in (("train", "val"), ("test",)):
        names = [name for name, row in found.labels.items() if row["split"] in splits]
        order = torch.randperm(len(names), generator=generator)[:count].tolist()
        names = [names[i] for i in order]
        images, read, failed = load_crops([found.images[name] for name in names], 4)
        print_skipped(failed)
        if len(read) < 20:
            raise InputError(f"--probe {folder}: {len(read)} {splits[0]} images can be read; "
                             "at least 20 are needed")
        labels = [found.classes.index(found.labels[names[i]]["label"]) for i in read]
        sets.append((images, np.array(labels)))
    train, test = sets
    return train, test, len(found.classes)
