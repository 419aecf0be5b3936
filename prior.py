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
SMOOTH, GATHER = 1.9, 0.9  # um: sigma of the density before its gradient is taken, and of the convergence after
MIN_DISTANCE = 1.5  # um: no two seeds nearer than this
TISSUE = 0.05  # density: what is below is glass, which has no say in adapt()
EDGE_FLOOR, THRESHOLD_FLOOR = 0.03, 0.1  # the least that adapt() returns: glass and plain tissue stay empty

STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])  # H, E, rest (Ruifrok 2001)
HAEMATOXYLIN = np.linalg.inv(STAINS)[:, 0].astype(np.float32)
DENSITY = np.clip(-np.log((np.arange(256) + 1) / 245), 0, None).astype(np.float32)  # of a uint8 grey value


def work_factor(mpp):
    """How many px a side are averaged into one working px; whole, so that regions of a slide share one grid."""
    return max(1, int(WORK_MPP / mpp + 0.25))


def smooth(values, sigma):
    """Gaussian of that sigma in px, cut at 3 sigma, so that the detector looks at a finite neighbourhood."""
    return ndimage.gaussian_filter(values, sigma, truncate=3)


def slope(values, axis):
    """Central difference a px."""
    return ndimage.correlate1d(values, [-0.5, 0, 0.5], axis)


def density_and_slopes(image, mpp):
    """uint8 RGB (H, W, 3) at mpp um/px to the haematoxylin density, cut to 0 to 2 and smoothed, and its slopes.

    Gives the density (h, w) at work_factor(mpp), its slopes in y and x a um, and the um of a working px.
    """
    factor = work_factor(mpp)
    if factor > 1:
        image = np.asarray(Image.fromarray(image).reduce(factor))
    px = mpp * factor
    r, g, b = (weight * DENSITY[image[..., i]] for i, weight in enumerate(HAEMATOXYLIN))
    density = smooth(np.clip(r + g + b, 0, 2), SMOOTH / px)
    return density, slope(density, 0) / px, slope(density, 1) / px, px


def convergence(dy, dx, edge, px):
    """How far the slopes point inwards from all sides: minus the divergence of their direction, smoothed.

    A slope is divided by sqrt(its length^2 + edge^2), edge in density a um: those steeper than edge count by
    direction alone, so that pale and dark nuclei answer alike, and those below fade out.
    """
    length, sigma = np.sqrt(dy * dy + dx * dx + edge * edge), GATHER / px
    return -sigma * (slope(smooth(dy / length, sigma), 0) + slope(smooth(dx / length, sigma), 1))


def otsu(values, bins=256):
    """Otsu's threshold: the cut that leaves the largest variance between the two classes."""
    count, edges = np.histogram(values, bins)
    centre = (edges[1:] + edges[:-1]) / 2
    below, moment = np.cumsum(count), np.cumsum(count * centre)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (moment[-1] * below / below[-1] - moment) ** 2 / (below * (below[-1] - below))
    return centre[np.nanargmax(between[:-1])] if np.isfinite(between[:-1]).any() else centre[0]


def adapt_to(fields):
    """(edge, threshold) of what density_and_slopes gave for some images: edge is the median slope of the tissue,
    threshold is Otsu's over the tissue's px where the slopes converge, of convergence times density."""
    slopes = np.concatenate([np.hypot(dy, dx)[density > TISSUE] for density, dy, dx, _ in fields])
    edge = max(EDGE_FLOOR, float(np.median(slopes))) if len(slopes) else EDGE_FLOOR
    scores = np.concatenate([(convergence(dy, dx, edge, px) * d)[d > TISSUE] for d, dy, dx, px in fields])
    scores = scores[scores > 0]
    return edge, max(THRESHOLD_FLOOR, float(otsu(scores)) if len(scores) else 0)


def adapt(images, mpp):
    """(edge, threshold) for the regions of a slide, from a sample of them (uint8 RGB arrays at mpp um/px)."""
    return adapt_to([density_and_slopes(image, mpp) for image in images])


def segment_nuclei(image, mpp, parameters=None):
    """Nuclei of an H&E image: where the gradient of haematoxylin converges (after Kobatake and Hashimoto 1999).

    image uint8 RGB (H, W, 3), mpp um/px, to centroids (K, 2) in px of the image. parameters: what adapt() gave
    for the slide that the image is a region of; None adapts to the image itself. Seeds are the local maxima of the
    convergence where convergence times density passes the threshold; nothing farther than 15 um has a part in one.
    Raises ValueError for another dtype or shape, or an mpp that is not positive.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"segment_nuclei takes uint8 (H, W, 3), not {image.dtype} {image.shape}")
    if not (np.isfinite(mpp) and mpp > 0):
        raise ValueError(f"mpp is {mpp}: it has to be um/px, above 0")
    if image.size == 0:
        return np.zeros((0, 2))
    density, dy, dx, px = field = density_and_slopes(image, mpp)
    edge, threshold = parameters or adapt_to([field])
    response = convergence(dy, dx, edge, px)
    radius = max(1, round(MIN_DISTANCE / px))
    peaks = response == ndimage.maximum_filter(response, 2 * radius + 1)
    peaks &= response * density > threshold
    labels, count = ndimage.label(peaks, np.ones((3, 3)))  # a symmetric nucleus peaks in a plateau: one seed
    y, x = np.nonzero(peaks)
    which = labels[y, x] - 1
    size = np.bincount(which, minlength=count)
    seeds = np.stack([np.bincount(which, x) / size, np.bincount(which, y) / size], 1)
    return (seeds + 0.5) * work_factor(mpp) - 0.5


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
