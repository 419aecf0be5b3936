"""The cell prior (section 3.2): cells of a slide, centroid map C, P_c, and a built-in nuclei detector for H&E.

Centroids are (K, 2) float64, x before y. "Level-0 px" are the pixels of a slide at full resolution.
"""
import csv
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage


class InputError(Exception):
    """Something the user gave is wrong; the message is one line with the file or flag and the way out."""


# ---------------------------------------------------------------- C and P_c

def centroid_map(centroids, size):
    """C (size, size) uint8: C[i, j] = 1 where a centroid lies in pixel (row i, column j).

    centroids (K, 2) as x, y in px of the crop; one at x = size, or below 0, is outside.
    """
    c_map = torch.zeros(size, size, dtype=torch.uint8)
    xy = torch.as_tensor(np.asarray(centroids, dtype=np.float64).reshape(-1, 2))
    xy = xy[((xy >= 0) & (xy < size)).all(1)].floor().long()
    c_map[xy[:, 1], xy[:, 0]] = 1
    return c_map


def downsample_prior(c_map, patch_size=16):
    """P_c: C_i = MaxPool(C_i) over every p x p patch. (.., H, W) to (.., n) float, row by row."""
    lead = c_map.shape[:-2]
    pooled = F.max_pool2d(c_map.reshape(-1, 1, *c_map.shape[-2:]).float(), patch_size)
    return pooled.view(*lead, -1)


def bin_centroids(centroids, size, patch_size=16):
    """The same P_c (n,) without drawing C: 1 for each p x p patch that holds a centroid."""
    grid = size // patch_size
    xy = torch.as_tensor(np.asarray(centroids, dtype=np.float64).reshape(-1, 2))
    xy = (xy[((xy >= 0) & (xy < grid * patch_size)).all(1)] // patch_size).long()
    prior = torch.zeros(grid * grid)
    prior[xy[:, 1] * grid + xy[:, 0]] = 1
    return prior


# ---------------------------------------------------------------- built-in detector

WORK_MPP = 0.5  # um/px: finer images are averaged down to this; nuclei of 3 um are still 6 px
SCALES = (1.5, 2.2)  # um: sigma of the inner Gaussians; a disc's best response is at radius / sqrt(2)
SURROUND = 4.0  # outer sigma / inner sigma
MIN_DISTANCE = 2.0  # um: no two seeds nearer than this
OTSU_SHARE, FLOOR = 0.5, 0.05  # a seed passes at this share of Otsu's threshold, and never under the floor

STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])  # H, E, rest (Ruifrok 2001)
HAEMATOXYLIN = np.linalg.inv(STAINS)[:, 0]
# Half deconvolution, half the red density: deconvolved alone is noisy where the stains differ from Ruifrok's.
NUCLEAR = ((HAEMATOXYLIN + [1, 0, 0]) / 2).astype(np.float32)
DENSITY = np.clip(-np.log((np.arange(256) + 1) / 245), 0, None).astype(np.float32)  # of a uint8 grey value


def nuclear_density(image):
    """uint8 RGB (H, W, 3) to the haematoxylin density (H, W) float32, cut to 0 to 2."""
    r, g, b = (weight * DENSITY[image[..., i]] for i, weight in enumerate(NUCLEAR))
    return np.clip(r + g + b, 0, 2)


def otsu(values, bins=256):
    """Otsu's threshold: the cut that leaves the largest variance between the two classes."""
    count, edges = np.histogram(values, bins)
    centre = (edges[1:] + edges[:-1]) / 2
    below, moment = np.cumsum(count), np.cumsum(count * centre)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (moment[-1] * below / below[-1] - moment) ** 2 / (below * (below[-1] - below))
    return centre[np.nanargmax(between[:-1])] if np.isfinite(between[:-1]).any() else centre[0]


def work_factor(mpp):
    """How many px a side are averaged into one working px; whole, so that regions of a slide share one grid."""
    return max(1, int(WORK_MPP / mpp + 0.25))


def seeds(image, mpp):
    """Candidates for nuclei: centroids (K, 2) in px of the image and their responses (K,).

    The local maxima, over space and scale, of the Gaussian differences of the haematoxylin density.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"segment_nuclei takes uint8 (H, W, 3), not {image.dtype} {image.shape}")
    if not (np.isfinite(mpp) and mpp > 0):
        raise ValueError(f"mpp is {mpp}: it has to be um/px, above 0")
    if min(image.shape[:2]) == 0:
        return np.zeros((0, 2)), np.zeros(0)
    factor = work_factor(mpp)
    if factor > 1:
        image = np.asarray(Image.fromarray(image).reduce(factor))
    px = mpp * factor  # um a working px
    density = nuclear_density(image)
    response = np.full(density.shape, -np.inf, np.float32)
    for sigma in SCALES:
        inner = ndimage.gaussian_filter(density, sigma / px, truncate=3)
        outer = ndimage.gaussian_filter(density, sigma * SURROUND / px, truncate=3)
        np.maximum(response, inner - outer, out=response)
    radius = max(1, round(MIN_DISTANCE / px))
    peaks = (response == ndimage.maximum_filter(response, 2 * radius + 1)) & (response > FLOOR)
    labels, count = ndimage.label(peaks, np.ones((3, 3)))  # a symmetric nucleus peaks in a plateau: one seed
    y, x = np.nonzero(peaks)
    which = labels[y, x] - 1
    size = np.bincount(which, minlength=count)
    xy, strength = np.stack([np.bincount(which, x) / size, np.bincount(which, y) / size], 1), np.bincount(which, response[y, x]) / size
    return (xy + 0.5) * factor - 0.5, strength


def adapt(images, mpp):
    """The response that a seed has to reach: a share of Otsu's threshold of all seeds of some images of a slide."""
    strength = np.concatenate([seeds(image, mpp)[1] for image in images])
    return max(FLOOR, OTSU_SHARE * otsu(strength)) if len(strength) else FLOOR


def segment_nuclei(image, mpp, threshold=None):
    """Nuclei of an H&E image by multi-scale Gaussian differences (after Al-Kofahi et al. 2009).

    image uint8 RGB (H, W, 3), mpp um/px, to centroids (K, 2) in px of the image. threshold: what adapt() gave for
    the slide that the image is a region of; None adapts to the image itself.
    Raises ValueError for another dtype or shape, or an mpp that is not positive.
    """
    xy, strength = seeds(image, mpp)
    if threshold is None:
        threshold = max(FLOOR, OTSU_SHARE * otsu(strength)) if len(strength) else FLOOR
    return xy[strength >= threshold]


# ---------------------------------------------------------------- readers

def read_cells(path, slide_mpp=None):
    """Cells of a slide from a segmentation result, (K, 2) float64 in level-0 px.

    HoVer-Net JSON: in slide mode ("mag" a number) the coordinates are px at that magnification and
    slide_mpp (um/px of level 0) converts them, x (10 / slide_mpp) / mag; in tile mode ("mag" null) they are
    taken as they are. CSV or npz with x and y: level-0 px. InputError, with the file's name, otherwise.
    """
    path = Path(path)
    try:
        kind = path.suffix.lower()
        if kind == ".json":
            xy = _hovernet(path, slide_mpp)
        elif kind == ".csv":
            xy = _table(path)
        elif kind == ".npz":
            with np.load(path, allow_pickle=False) as file:
                xy = np.stack([file["x"], file["y"]], 1)
        else:
            raise InputError(f"{path}: not a cell file that is known here (HoVer-Net .json, .csv or .npz with x, y)")
        xy = np.asarray(xy, dtype=np.float64).reshape(-1, 2)
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RecursionError, EOFError) as error:
        raise InputError(f"{path}: cells cannot be read ({type(error).__name__}: {error}); write them anew") from None
    if not np.isfinite(xy).all():
        raise InputError(f"{path}: a coordinate is not a finite number; write the cells anew")
    return xy


def _hovernet(path, slide_mpp):
    with open(path, encoding="utf-8-sig") as file:
        data = json.load(file)
    if not isinstance(data, dict) or not isinstance(data.get("nuc"), dict):
        raise InputError(f"{path}: no \"nuc\" of nuclei in it; HoVer-Net's JSON is expected")
    xy = np.array([nucleus["centroid"] for nucleus in data["nuc"].values()], dtype=np.float64).reshape(-1, 2)
    if data.get("mag") is None:
        return xy
    if slide_mpp is None:
        raise InputError(f"{path}: its cells are px at {data['mag']}x; give the slide's um/px to convert them")
    return xy * (10 / slide_mpp / float(data["mag"]))


def _table(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        head = file.readline()
        file.seek(0)
        rows = csv.DictReader(file, delimiter=";" if head.count(";") > head.count(",") else ",")
        names = {(name or "").strip().lower(): name for name in rows.fieldnames or []}
        if not {"x", "y"} <= set(names):
            raise InputError(f"{path}: no columns x and y in its first line; name them")
        return np.array([(float(row[names["x"]]), float(row[names["y"]])) for row in rows]).reshape(-1, 2)
