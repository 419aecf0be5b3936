"""The cell prior (section 3.2): centroid map C, P_c, the P_c of a view, and a built-in detector of nuclei.

The detector is not the paper's HoVer-Net or Cellpose; with it everything runs with nothing else installed. C
and its max-pooling are 3.2 as written; training bins the cells of a view into P_c directly (view_prior).

Centroids are (K, 2) float64, x before y; px i spans i to i + 1, so the middle of the first px is 0.5.
"""
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

# ---------------------------------------------------------------- 3.2 C and P_c

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


def view_prior(cells, boxes, flip, size, patch_size=16, counts=False):
    """P_c (B, n) of views of size x size px: the cells go through the same crop and flip as the pixels.

    cells (B, K, 2) in px of the crop, NaN where a crop has fewer; boxes (B, 4) as left, top, width, height in
    px of the crop; flip (B,) bool, left to right. Cells are binned before the flip and the patches are
    mirrored, as a mirrored px lies in the mirrored patch. counts: how many cells lie in each patch instead,
    P_c = counts > 0.
    """
    grid = size // patch_size
    xy = (cells - boxes[:, None, :2]) / boxes[:, None, 2:] * size  # px of the view
    inside = ((xy >= 0) & (xy < size)).all(-1)  # false for NaN
    xy = (torch.where(inside.unsqueeze(-1), xy, 0) // patch_size).long()
    patch = torch.where(inside, xy[..., 1] * grid + xy[..., 0], grid * grid)  # one more bin for those outside
    prior = torch.zeros(len(cells), grid * grid + 1, device=cells.device)
    if counts:
        prior.scatter_add_(1, patch, torch.ones_like(patch, dtype=prior.dtype))
    else:
        prior.scatter_(1, patch, 1.0)
    prior = prior[:, :-1].view(-1, grid, grid)
    return torch.where(flip[:, None, None], prior.flip(-1), prior).flatten(1)


# ---------------------------------------------------------------- built-in detector

DETECTOR = 1  # its version: raise it with every change of what the detector finds
WORK_MPP = 0.5  # um/px: finer images are averaged down to this; nuclei of 3 um are still 6 px
SMOOTH, GATHER = 1.9, 0.9  # um: sigma of the density before its gradient is taken, and of the convergence
MIN_DISTANCE = 1.5  # um: no two seeds nearer than this
TISSUE = 0.05  # density: what is below is glass, which is left out of the estimates
EDGE_FLOOR, THRESHOLD_FLOOR = 0.03, 0.1  # least edge and threshold: glass and plain tissue stay empty

STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])  # H, E, rest (Ruifrok 2001)
HAEMATOXYLIN = np.linalg.inv(STAINS)[:, 0].astype(np.float32)
DENSITY = np.clip(-np.log((np.arange(256) + 1) / 245), 0, None).astype(np.float32)  # of a uint8 grey value


def downsample_factor(mpp, target=WORK_MPP):
    """How many px a side are averaged into a working px; whole, so that a slide's regions share one grid."""
    return max(1, int(target / mpp + 0.25))


def smooth(values, sigma):
    """Gaussian of that sigma in px, cut at 3 sigma, so that the detector looks at a finite neighbourhood."""
    return ndimage.gaussian_filter(values, sigma, truncate=3)


def slope(values, axis):
    """Central difference per px."""
    return ndimage.correlate1d(values, [-0.5, 0, 0.5], axis)


def density_and_slopes(image, mpp):
    """uint8 RGB (H, W, 3) at mpp um/px to haematoxylin density and its slopes.

    Gives the density (h, w) in working px, clipped to 0 to 2 and smoothed, its slopes in y and x per um, and
    the um of a working px.
    """
    factor = downsample_factor(mpp)
    if factor > 1:
        image = np.asarray(Image.fromarray(image).reduce(factor))
    px = mpp * factor
    r, g, b = (weight * DENSITY[image[..., i]] for i, weight in enumerate(HAEMATOXYLIN))
    density = smooth(np.clip(r + g + b, 0, 2), SMOOTH / px)
    return density, slope(density, 0) / px, slope(density, 1) / px, px


def convergence(dy, dx, edge, px):
    """How far the slopes point inwards from all sides: minus the divergence of their direction, smoothed.

    A slope is divided by sqrt(its length^2 + edge^2), edge in density per um: those steeper than edge count
    by direction alone, so that pale and dark nuclei respond alike, and those below fade out.
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


def thresholds_of(fields):
    """(edge, threshold) from density_and_slopes of some images.

    edge is the median slope of the tissue; threshold is Otsu's, of convergence times density over the
    tissue's px where the slopes converge.
    """
    slopes = np.concatenate([np.hypot(dy, dx)[density > TISSUE] for density, dy, dx, _ in fields])
    edge = max(EDGE_FLOOR, float(np.median(slopes))) if len(slopes) else EDGE_FLOOR
    scores = np.concatenate([(convergence(dy, dx, edge, px) * d)[d > TISSUE] for d, dy, dx, px in fields])
    scores = scores[scores > 0]
    return edge, max(THRESHOLD_FLOOR, float(otsu(scores)) if len(scores) else 0)


def estimate_thresholds(images, mpp):
    """(edge, threshold) for all regions of a slide, from a sample of them (uint8 RGB arrays at mpp um/px)."""
    return thresholds_of([density_and_slopes(image, mpp) for image in images])


def segment_nuclei(image, mpp, thresholds=None):
    """Nuclei of an H&E image: where haematoxylin's gradient converges (after Kobatake and Hashimoto 1999).

    image uint8 RGB (H, W, 3), mpp um/px, to centroids (K, 2) in px of the image, px i spanning i to i + 1.
    thresholds: estimate_thresholds of the slide that the image is a region of; None estimates them from the
    image itself. Seeds are the local maxima of the convergence where convergence times density exceeds the
    threshold; nothing farther than 15 um affects one. ValueError for another dtype or shape, or an mpp <= 0.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"segment_nuclei takes uint8 (H, W, 3), not {image.dtype} {image.shape}")
    if not (np.isfinite(mpp) and mpp > 0):
        raise ValueError(f"mpp is {mpp}: it has to be um/px, above 0")
    if image.size == 0:
        return np.zeros((0, 2))
    density, dy, dx, px = field = density_and_slopes(image, mpp)
    edge, threshold = thresholds or thresholds_of([field])
    response = convergence(dy, dx, edge, px)
    radius = max(1, round(MIN_DISTANCE / px))
    peaks = response == ndimage.maximum_filter(response, 2 * radius + 1)
    peaks &= response * density > threshold
    labels, count = ndimage.label(peaks, np.ones((3, 3)))  # a symmetric nucleus peaks in a plateau: one seed
    y, x = np.nonzero(peaks)
    which = labels[y, x] - 1
    size = np.bincount(which, minlength=count)
    seeds = np.stack([np.bincount(which, x) / size, np.bincount(which, y) / size], 1)
    return (seeds + 0.5) * downsample_factor(mpp)


if __name__ == "__main__":
    print("prior.py: slides are segmented by python -m wsi.segment SLIDE... (see --help)", file=sys.stderr)
    sys.exit(2)
