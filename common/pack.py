"""All crops of a data set in one memory-mapped file, so that training decodes no JPEG."""
import os

import numpy as np
import torch
from tqdm import tqdm

from common.files import atomic_write, read_json, stamp_of, write_json

VERSION = 2  # of what is packed: raise it where the same files give other images


class Packed(torch.utils.data.Dataset):
    """Crops (data.Crops) whose images come from a memory map, uint8 (N, 3, H, W), made where it is not there.

    path.json says what files the map at path was made from; a map of others is made again.
    """

    def __init__(self, crops, path):
        about = [(str(file), os.stat(file)) for file in crops.files]
        files = [(file, status.st_size, status.st_mtime_ns) for file, status in about]
        self.crops, source = crops, stamp_of([VERSION, files])
        if not path.is_file() or read_json(path.with_suffix(".json")).get("source") != source:
            self.write(path)
            write_json(path.with_suffix(".json"), {"source": source})
        self.images = np.load(path, mmap_mode="r", allow_pickle=False)

    def write(self, path):
        path.with_suffix(".json").unlink(missing_ok=True)
        shape = len(self.crops), *self.crops[0][0].shape
        with atomic_write(path) as temp:
            images = np.lib.format.open_memmap(temp, "w+", np.uint8, shape)
            for i in tqdm(range(len(images)), f"{path}, {np.prod(shape) / 2 ** 30:.1f} GiB", leave=False):
                images[i] = self.crops[i][0]
            images.flush()

    def __len__(self):
        return len(self.crops)

    def __getitem__(self, i):
        return torch.from_numpy(self.images[i].copy()), torch.from_numpy(self.crops.cells(i))
