"""The cell prior (section 3.2): centroid map C, P_c, the P_c of a view, and a built-in nucleus detector.

centroid_map and downsample_prior are 3.2 as written. Training bins a view's cells into P_c directly, with the
same result (view_prior). The detector replaces the paper's HoVer-Net or Cellpose, so that everything runs
without further packages.

Centroids are (K, 2), x before y; px i spans i to i + 1, so the centre of the first px is 0.5.
"""
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

# ---------------------------------------------------------------- 3.2 C and P_c

def points(centroids):
    """Returns centroids (K, 2) as a float64 tensor, [] as (0, 2); ValueError unless each is an x and a y."""
    return torch.as_tensor(np.asarray(centroids, dtype=np.float64).reshape(len(centroids), 2))


def centroid_map(centroids, size):
    """Returns C (size, size) uint8: C[i, j] = 1 where a centroid lies in pixel (row i, column j).

    centroids (K, 2) as x, y in px of the crop; those below 0, or at size and above, are outside.
    """
    c_map = torch.zeros(size, size, dtype=torch.uint8)
    xy = points(centroids)
    xy = xy[((xy >= 0) & (xy < size)).all(1)].floor().long()
    c_map[xy[:, 1], xy[:, 0]] = 1
    return c_map


def downsample_prior(c_map, patch_size=16):
    """Returns P_c: C max-pooled over each p x p patch, C (.., H, W) -> P_c (.., n) float, row by row.

    What is above 0 in C counts as 1. ValueError if H or W is no multiple of patch_size.
    """
    *lead, H, W = c_map.shape
    if H % patch_size or W % patch_size:
        raise ValueError(f"{H} x {W} px do not divide into patches of {patch_size} px")
    pooled = F.max_pool2d((c_map > 0).float().reshape(-1, 1, H, W), patch_size)
    return pooled.view(*lead, (H // patch_size) * (W // patch_size))


def bin_centroids(centroids, size, patch_size=16):
    """Returns the P_c (n,) of the two above without drawing C: 1 for each patch that holds a centroid.

    ValueError if size is no multiple of patch_size.
    """
    if size % patch_size:
        raise ValueError(f"{size} px do not divide into patches of {patch_size} px")
    grid = size // patch_size
    xy = points(centroids)
    xy = (xy[((xy >= 0) & (xy < size)).all(1)] // patch_size).long()
    prior = torch.zeros(grid * grid)
    prior[xy[:, 1] * grid + xy[:, 0]] = 1
    return prior


def view_prior(cells, boxes, flip, size, patch_size=16, counts=False):
    """Returns P_c (B, n) of views of size x size px, whose cells are cropped and flipped as the pixels are.

    cells (B, K, 2) in px of the crop, padded with NaN; boxes (B, 4) as left, top, width, height in px of the
    crop; flip (B,) bool, left to right. Cells are binned first and then the patches are flipped: a px and its
    mirror image lie in mirrored patches. counts: returns the number of cells per patch instead. ValueError if
    size is no multiple of patch_size.
    """
    if size % patch_size:
        raise ValueError(f"a view of {size} px does not divide into patches of {patch_size} px")
    grid = size // patch_size
    xy = (cells - boxes[:, None, :2]) / boxes[:, None, 2:] * size  # px of the view
    inside = ((xy >= 0) & (xy < size)).all(-1)  # false for NaN
    xy = (torch.where(inside.unsqueeze(-1), xy, 0) // patch_size).long()
    patch = torch.where(inside, xy[..., 1] * grid + xy[..., 0], grid * grid)  # last bin: cells outside
    prior = torch.zeros(len(cells), grid * grid + 1, device=cells.device)
    if counts:
        prior.scatter_add_(1, patch, torch.ones_like(patch, dtype=prior.dtype))
    else:
        prior.scatter_(1, patch, 1.0)
    prior = prior[:, :-1].view(-1, grid, grid)
    return torch.where(flip[:, None, None], prior.flip(-1), prior).flatten(1)


# ---------------------------------------------------------------- built-in detector

DETECTOR = 1  # version of the detector; raise it whenever a change alters what it finds
WORK_MPP = 0.5  # um/px: finer images are averaged down to 0.36 to 0.57; a nucleus of 3 um is then 5 to 8 px
SMOOTH = 1.9  # um: sigma of the density before its gradient is taken
GATHER = 0.9  # um: sigma of the convergence
MIN_DISTANCE = 1.5  # um between two seeds
TISSUE = 0.05  # minimum density of tissue: glass does not count in the estimates
EDGE_FLOOR = 0.03  # lower limits of edge and threshold: without them noise in glass becomes nuclei
THRESHOLD_FLOOR = 0.1

STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])  # H, E, DAB (Ruifrok 2001)
HAEMATOXYLIN = np.linalg.inv(STAINS)[:, 0].astype(np.float32)
# -ln(value / white) of a uint8 value, each plus 1 against ln 0; 244 and above is white.
DENSITY = np.clip(-np.log((np.arange(256) + 1) / 245), 0, None).astype(np.float32)


def downsample_factor(mpp, target=WORK_MPP):
    """Returns the side in px of the square that is averaged into one working px.

    A whole number, so that all regions of a slide share one grid.
    """
    return max(1, int(target / mpp + 0.25))  # rounded up from .75: at most 1.14 times the target


def smooth(values, sigma):
    """Gaussian filter of sigma px, cut off at 3 sigma so that the detector sees a finite neighbourhood."""
    return ndimage.gaussian_filter(values, sigma, truncate=3)


def slope(values, axis):
    """Returns the central difference per px."""
    return ndimage.correlate1d(values, [-0.5, 0, 0.5], axis)


def density_and_slopes(image, mpp):
    """Image, uint8 RGB (H, W, 3) at mpp um/px -> density, dy, dx, px.

    density (h, w): haematoxylin, clipped to 0 to 2 and smoothed, on the working px; dy, dx (h, w): its slopes
    per um; px: um per working px.
    """
    factor = downsample_factor(mpp)
    if factor > 1:
        image = np.asarray(Image.fromarray(image).reduce(factor))
    px = mpp * factor
    r, g, b = (weight * DENSITY[image[..., i]] for i, weight in enumerate(HAEMATOXYLIN))
    density = smooth(np.clip(r + g + b, 0, 2), SMOOTH / px)
    return density, slope(density, 0) / px, slope(density, 1) / px, px


def convergence(dy, dx, edge, px):
    """Returns -sigma (px) times the divergence of the slopes' smoothed direction (h, w).

    It is high where the slopes point inwards.
    Each slope is divided by sqrt(its length^2 + edge^2), with edge in density per um: of slopes steeper than
    edge only the direction counts, so pale and dark nuclei respond alike; flatter slopes fade out.
    """
    length = np.sqrt(dy * dy + dx * dx + edge * edge)
    sigma = GATHER / px
    return -sigma * (slope(smooth(dy / length, sigma), 0) + slope(smooth(dx / length, sigma), 1))


def otsu(values):
    """Returns Otsu's threshold: the centre, of 256 bins, that maximises the variance between the classes."""
    count, edges = np.histogram(values, 256)
    center = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(count)
    moment = np.cumsum(count * center)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (moment[-1] * below / below[-1] - moment) ** 2 / (below * (below[-1] - below))
    return center[np.nanargmax(between[:-1])] if np.isfinite(between[:-1]).any() else center[0]


def thresholds_of(fields):
    """Returns (edge, threshold) from density_and_slopes of several images.

    edge is the median slope in tissue; threshold is Otsu's threshold of convergence times density, over the
    tissue px where the slopes converge.
    """
    slopes = np.concatenate([np.hypot(dy, dx)[density > TISSUE] for density, dy, dx, _ in fields])
    edge = max(EDGE_FLOOR, float(np.median(slopes))) if len(slopes) else EDGE_FLOOR
    scores = np.concatenate([(convergence(dy, dx, edge, px) * density)[density > TISSUE]
                             for density, dy, dx, px in fields])
    scores = scores[scores > 0]
    threshold = float(otsu(scores)) if len(scores) else 0.0
    return edge, max(THRESHOLD_FLOOR, threshold)


def segment_nuclei(image, mpp, thresholds=None):
    """Finds the nuclei of an H&E image where haematoxylin's gradient converges (Kobatake and Hashimoto 1999).

    Image, uint8 RGB (H, W, 3) at mpp um/px -> centroids (K, 2) in px of the image. Seeds are local maxima of
    the convergence where convergence times density exceeds the threshold. thresholds: thresholds_of some
    regions of the slide that the image is a region of (default: of the image); once they are given, px
    farther than 15 um from a seed do not affect it, at up to 3 um/px. ValueError for another dtype or shape,
    or an mpp <= 0.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"segment_nuclei takes uint8 (H, W, 3), not {image.dtype} {image.shape}")
    if not (np.isfinite(mpp) and mpp > 0):
        raise ValueError(f"mpp is {mpp}: a um/px above 0 is needed")
    if image.size == 0:
        return np.zeros((0, 2))
    field = density_and_slopes(image, mpp)
    density, dy, dx, px = field
    edge, threshold = thresholds or thresholds_of([field])
    response = convergence(dy, dx, edge, px)
    radius = max(1, round(MIN_DISTANCE / px))
    peaks = response == ndimage.maximum_filter(response, 2 * radius + 1)
    peaks &= response * density > threshold
    labels, count = ndimage.label(peaks, np.ones((3, 3)))  # adjacent px of one plateau are one seed
    y, x = np.nonzero(peaks)
    index = labels[y, x] - 1
    size = np.bincount(index, minlength=count)
    seeds = np.stack([np.bincount(index, x) / size, np.bincount(index, y) / size], 1)
    return (seeds + 0.5) * downsample_factor(mpp)


if __name__ == "__main__":
    print("prior.py: to segment slides, run python -m wsi.segment SLIDE... (see --help)", file=sys.stderr)
    sys.exit(2)
