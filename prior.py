"""The cell prior (section 3.2): centroid map C, P_c, a built-in detector of nuclei; segmenting slides.

Centroids are (K, 2) float64, x before y; px i spans i to i + 1, so that the middle of the first px is 0.5. "Level-0
px" are the pixels of a slide at full resolution.

    python prior.py SLIDE... --segmenter cellpose    the cells of slides, by another package or the built-in detector
"""
import argparse
import importlib
import os
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree

import slides
from cells import cell_format, label_centroids, read_cells  # noqa: F401, some for those who import prior
from errors import InputError, exit_code, one_line

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


def work_factor(mpp, target=WORK_MPP):
    """How many px a side are averaged into one working px; whole, so that regions of a slide share one grid."""
    return max(1, int(target / mpp + 0.25))


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

    image uint8 RGB (H, W, 3), mpp um/px, to centroids (K, 2) in px of the image, px i spanning i to i + 1.
    parameters: what adapt() gave for the slide that the image is a region of; None adapts to the image itself.
    Seeds are the local maxima of the convergence where convergence times density passes the threshold; nothing farther
    than 15 um has a part in one. Raises ValueError for another dtype or shape, or an mpp that is not positive.
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
    return (seeds + 0.5) * work_factor(mpp)


# ---------------------------------------------------------------- segmenting slides: python prior.py SLIDE...

REGION = 2048  # px of the segmenter's: a region's side
MARGIN = 24.0  # um around a region: more than the built-in detector sees, so that seams agree
SEAM = 1.0  # um: what two regions find nearer than this on their seam is one cell
INSTALL = {"cellpose": 'pip install "cellpose>=4"', "histomicstk": "pip install --no-deps histomicstk, then "
           "pip install large-image ctk-cli girder-slicer-cli-web shapely scikit-image pandas"}


@lru_cache
def kit(segmenter):
    """Cellpose's model (with its own weights, which it downloads once; on the GPU if there is one), or histomicstk."""
    try:
        module = importlib.import_module({"cellpose": "cellpose.models", "histomicstk": "histomicstk"}[segmenter])
        if hasattr(module, "Cellpose"):
            raise ImportError("cellpose is older than version 4")
        return module.CellposeModel(gpu=True) if segmenter == "cellpose" else module
    except ImportError as error:
        raise InputError(f"--segmenter {segmenter}: {error}; {INSTALL[segmenter]}") from None
    except Exception as error:
        raise InputError(f"--segmenter {segmenter}: cannot be loaded ({one_line(error)}); it fetches its weights once, "
                         "or put them into ~/.cellpose/models/") from None


def segment_cellpose(image, mpp, sample=None):
    """Cells by Cellpose-SAM (as documented for cellpose 4.2), centroids as segment_nuclei gives them.

    sample (N, 3): px of the slide that the image is a region of; their 1st and 99th percentiles become 0 and 1.
    """
    low, high = np.percentile(np.reshape(image if sample is None else sample, (-1, 3)), (1, 99), axis=0)
    scale = np.stack([low, np.maximum(high, low + 1)], 1)
    labels = kit("cellpose").eval(image, channel_axis=2, normalize={"lowhigh": scale})[0]
    return label_centroids([(0, 0, np.asarray(labels))])


def segment_histomicstk(image, mpp, sample=None):
    """Nuclei by HistomicsTK (as documented for 1.4), centroids as segment_nuclei gives them: Reinhard normalisation,
    colour deconvolution and Al-Kofahi's detection, as its NucleiDetection does them at 20x, but for a largest radius of
    12, a least area of 25 and a search radius of 8 px: its 20, 80 and 10 lose half of the nuclei that these find.

    sample (N, 3): px of the slide that the image is a region of, for the normalisation.
    """
    htk, lengths = kit("histomicstk"), (3 / mpp, 6 / mpp, 6.25 / mpp ** 2, 4 / mpp)
    process, pixels = htk.preprocessing, np.reshape(image if sample is None else sample, (1, -1, 3))
    image = process.color_normalization.reinhard(image, (8.63234435, -0.11501964, 0.03868433), (
        0.57506023, 0.10403329, 0.01364062), *process.color_conversion.lab_mean_std(pixels))
    stains = [process.color_deconvolution.stain_color_map[name] for name in ("hematoxylin", "eosin", "null")]
    stain = process.color_deconvolution.color_deconvolution(image, np.array(stains).T).Stains[..., 0].astype(float)
    return label_centroids([(0, 0, htk.segmentation.nuclear.detect_nuclei_kofahi(stain, stain < 60, *lengths))])


SEGMENTERS = {"builtin": segment_nuclei, "cellpose": segment_cellpose, "histomicstk": segment_histomicstk}


def working_grid(slide, mpp):
    """(level that is read, its px a side that are averaged into one working px, um and level-0 px of a working px)."""
    level, down = slide.level_for(mpp)
    factor = work_factor(slide.mpp * down, mpp)
    return level, factor, slide.mpp * down * factor, down * factor


def read_box(slide, level, factor, x, y, w, h):
    """A box in working px as uint8 RGB (h, w, 3)."""
    width, height = slide.handle.level_dimensions[level]
    w, h = min(w * factor, width - x * factor), min(h * factor, height - y * factor)
    return np.asarray(slide.read_level(level, x * factor, y * factor, w, h).reduce(factor))


def slide_regions(path, slide_mpp, segmenter, mpp):
    """The regions of a slide that hold tissue, as segment_region takes them; their boxes are in working px."""
    slide = slides.Slide(path, slide_mpp)
    level, factor, px, down = working_grid(slide, mpp)
    (picture, unit), size = slide.picture(slides.MASK_MPP), REGION
    x, y = (np.arange(0, n / factor + size, size) for n in slide.handle.level_dimensions[level])
    shares = slides.tissue_shares(picture, unit * slide.mpp, x * down / unit, y * down / unit)
    boxes = [(i * size, j * size, size, size) for i, j in np.argwhere(shares.T > 0).tolist()]
    if not boxes:
        raise InputError(f"{path}: no tissue in it; take it out")
    spread = boxes[:: max(1, len(boxes) // 4)][:4]  # the stain is judged once a slide, on a few of its regions
    sample = [read_box(slide, level, factor, x, y, min(w, 1024), min(h, 1024)) for x, y, w, h in spread]
    if segmenter == "builtin":
        parameters = adapt(sample, px)
    else:
        tissue = np.concatenate([image[slides.tissue_mask(image, px)] for image in sample])
        parameters = tissue[:: 1 + len(tissue) // 20_000] if len(tissue) > 1000 else None
    return [(path, slide_mpp, segmenter, mpp, parameters, box) for box in boxes]


def segment_region(path, slide_mpp, segmenter, mpp, parameters, box):
    """Cells (K, 2), level-0 px, whose centroid lies in the box or up to SEAM beside it, for one_each.

    It is read with a margin, so that no cell is cut; mpp is the um/px that the segmenter is to see.
    """
    slide, (x, y, w, h) = slides.Slide(path, slide_mpp), box
    level, factor, px, down = working_grid(slide, mpp)
    margin = int(np.ceil(MARGIN / px))
    left, top = max(0, x - margin), max(0, y - margin)
    image = read_box(slide, level, factor, left, top, x + w + margin - left, y + h + margin - top)
    try:
        xy = SEGMENTERS[segmenter](image, px, parameters) + [left, top]
    except (InputError, MemoryError):
        raise
    except Exception as error:  # another package's: this slide is listed, the others go on
        raise InputError(f"{path}: {segmenter} failed on it ({one_line(error)}); segment it elsewhere") from None
    low, high = np.array([x, y]) - SEAM / px, np.array([x + w, y + h]) + SEAM / px
    return xy[((xy >= low) & (xy < high)).all(1)] * down


def one_each(regions, near):
    """The cells (K, 2) of a slide from those of its regions (K_i, 2): what two of them found within near is one."""
    xy, owner = np.concatenate(regions), np.repeat(np.arange(len(regions)), [len(r) for r in regions])
    pairs = cKDTree(xy).query_pairs(near, output_type="ndarray")
    return np.delete(xy, pairs[owner[pairs[:, 0]] != owner[pairs[:, 1]]].max(1, initial=0), axis=0)


def arguments(argv):
    def um_per_px(text):
        if not 0.05 <= float(text) <= 20:
            raise argparse.ArgumentTypeError(f"{text}: um/px between 0.05 and 20 is expected (0.5 is 20x)")
        return float(text)

    parser = argparse.ArgumentParser(prog="prior.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description="Finds the cells of slides; run it again to go on with what is left.")
    add = parser.add_argument
    add("slides", nargs="+", type=Path, metavar="SLIDE", help="slides, or folders of slides")
    add("--segmenter", default="builtin", choices=list(SEGMENTERS), help="cellpose (slow without a GPU) and "
        "histomicstk are packages to be installed")
    add("--out", default="cells", type=Path, help="cells go to OUT/<segmenter>/<slide>.npz; make it <data>/cells")
    add("--slide-mpp", type=um_per_px, help="um/px of slides that record none")
    add("--mpp", type=um_per_px, default=WORK_MPP, help="um/px that the segmenter sees, about: whole px are averaged")
    add("--workers", type=int, help="processes (1 for cellpose, whose model each of them holds, else one a core)")
    args = parser.parse_args(argv)
    if args.workers is None:
        args.workers = 1 if args.segmenter == "cellpose" else os.cpu_count() or 1
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: 1 or more is expected")
    return args


def segment_slides(args):
    """Writes the cells of each slide that has none yet; gives 1 where one was passed over, else 0."""
    import data  # which imports this module
    folder, files = args.out / args.segmenter, {}
    for given in args.slides:
        for path in data.by_stem(given, data.SLIDE_TYPES, given.iterdir()).values() if given.is_dir() else [given]:
            if files.setdefault(path.stem, path) != path:
                raise InputError(f"{path}: has the name of {files[path.stem]}; rename one of the two")
    if not files:
        raise InputError(f"{', '.join(map(str, args.slides))}: no slides in it ({' '.join(sorted(data.SLIDE_TYPES))})")
    tasks = [(path, args.slide_mpp) for name, path in files.items()
             if not (folder / f"{name}.npz").is_file()]
    if tasks and args.segmenter != "builtin":
        kit(args.segmenter)  # what is missing is told, and fetched, before the work begins
    failed = data.segment_all(tasks, args.segmenter, args.out, args.workers, args.mpp)
    for error in failed.values():
        print("prior.py:", error, file=sys.stderr)
    print(f"{len(files) - len(failed)} of {len(files)} slides have their cells in {folder}/*.npz; next, {args.out}/ "
          f"being <data>/cells/: python train.py --data <data> --prior {args.segmenter}")
    return int(bool(failed))


def main(argv=None):
    return exit_code("prior.py", lambda: segment_slides(arguments(argv)), again="finished slides stay, run it again to go on")


if __name__ == "__main__":
    import prior  # as data.py does, so that the module is there once and not as __main__ too
    sys.exit(prior.main())
