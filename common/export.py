"""A run's features for other MIL code: CLAM's and DSMIL's layouts."""
import re
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.files import atomic_write, save_tensors, write_csv


def read_features(path):
    """A slide's features (N, d) as a tensor."""
    with np.load(path, allow_pickle=False) as file:
        return torch.from_numpy(file["features"])


def is_newer(path, features):
    """Is the export there, and newer than the features that it is made from?"""
    return path.is_file() and path.stat().st_mtime_ns >= features.stat().st_mtime_ns


def export_clam(folder, names, out):
    """CLAM's layout: pt_files/<slide>.pt, a tensor (N, d), and h5_files/<slide>.h5, features and coords.

    The .h5 files need h5py, which nothing else here needs; without it they are left out, with a line.
    """
    try:
        import h5py
    except ImportError:
        h5py = None
    for name in tqdm(names, desc="clam, slides", leave=False):
        source = folder / f"{name}.npz"
        pt, h5 = out / "pt_files" / f"{name}.pt", out / "h5_files" / f"{name}.h5"
        if not is_newer(pt, source):
            save_tensors(pt, read_features(source))
        if h5py and not is_newer(h5, source):
            with np.load(source, allow_pickle=False) as file, \
                    atomic_write(h5) as temp, h5py.File(temp, "w") as to:
                to["features"], to["coords"] = file["features"], file["coords"]
    if not h5py:
        print(f"{out}/h5_files is left out: pip install h5py, then run the same command again")


def export_csv(found, folder, names, out):
    """DSMIL's bags, for its datasets/ folder.

    <data>/<class>/<slide>.csv has a row per crop and a column per feature; <data>/<data>.csv has each bag's
    path and the number of its class (in the order of the classes' names).
    """
    index = [("path", "label")]
    for name in tqdm(names, desc="csv, slides", leave=False):
        source, label = folder / f"{name}.npz", found.labels[name]["label"]
        path = Path(found.name, re.sub(r"[^\w.-]+", "_", label), f"{name}.csv")
        if not is_newer(out / path, source):
            rows = read_features(source).numpy()
            header = ",".join(map(str, range(rows.shape[1])))
            with atomic_write(out / path) as temp:  # nine digits give back every float32
                np.savetxt(temp, rows, "%.9g", ",", header=header, comments="")
        index.append((f"datasets/{path.as_posix()}", found.classes.index(label)))
    write_csv(out / found.name / f"{found.name}.csv", index)
