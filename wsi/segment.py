"""The cells of slides (3.2), by the built-in detector, Cellpose or HistomicsTK.

    python -m wsi.segment SLIDE... --segmenter cellpose

A slide is segmented by regions, each with a margin so that no cell is cut; cells are written in level-0 px.
"""
import argparse
import importlib
import os
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from common.errors import InputError, Parser, one_line, run_script
from common.files import atomic_write
from common.flags import MPP, add_max_gigapixels, whole
from common.pool import call, in_processes
from prior import DETECTOR, WORK_MPP, downsample_factor, estimate_thresholds, segment_nuclei
from wsi.cells import label_centroids
from wsi.datasets import add_data_flags
from wsi.slides import (
    MASK_MPP,
    SLIDE_TYPES,
    Slide,
    file_identity,
    find_slides,
    slide_name,
    tissue_mask,
    tissue_shares,
)

REGION = 2048  # a region's side, in px that the segmenter sees
MARGIN = 24.0  # um around a region: more than the built-in detector sees, so that seams agree
SEAM = 1.0  # um: cells of two regions that are nearer than this at the seam are one
INSTALL = {
    "cellpose": 'pip install "cellpose>=4"',
    "histomicstk": "pip install --no-deps histomicstk, then "
                   "pip install large-image ctk-cli girder-slicer-cli-web shapely scikit-image pandas"}


# ---------------------------------------------------------------- segmenters

@lru_cache
def load_segmenter(name):
    """Cellpose's model (with its own weights, which it downloads once; on the GPU if any), or histomicstk."""
    try:
        module = importlib.import_module({"cellpose": "cellpose.models", "histomicstk": "histomicstk"}[name])
        if hasattr(module, "Cellpose"):
            raise ImportError("cellpose is older than version 4")
        return module.CellposeModel(gpu=True) if name == "cellpose" else module
    except ImportError as error:
        raise InputError(f"--segmenter {name}: {error}; {INSTALL[name]}") from None
    except Exception as error:  # another package's
        raise InputError(f"--segmenter {name}: cannot be loaded ({one_line(error)}); it downloads its "
                         "weights once, or put them into ~/.cellpose/models/") from None


def segment_cellpose(image, mpp, sample=None):
    """Cells by Cellpose-SAM (as documented for cellpose 4.2), centroids as segment_nuclei gives them.

    sample (N, 3): px of the slide that the image is a region of; their 1st and 99th percentiles become 0
    and 1, so that all regions of a slide are normalised alike.
    """
    low, high = np.percentile(np.reshape(image if sample is None else sample, (-1, 3)), (1, 99), axis=0)
    scale = np.stack([low, np.maximum(high, low + 1)], 1)
    labels = load_segmenter("cellpose").eval(image, channel_axis=2, normalize={"lowhigh": scale})[0]
    return label_centroids(np.asarray(labels))


def segment_histomicstk(image, mpp, sample=None):
    """Nuclei by HistomicsTK (as documented for 1.4), centroids as segment_nuclei gives them.

    Reinhard normalisation, colour deconvolution and Al-Kofahi's detection, as its NucleiDetection does them
    at 20x, but with a largest radius of 12, a least area of 25 and a search radius of 8 px: its own 20, 80
    and 10 lose half of the nuclei that these find. sample (N, 3): px of the slide, for the normalisation.
    """
    htk = load_segmenter("histomicstk")
    process, pixels = htk.preprocessing, np.reshape(image if sample is None else sample, (1, -1, 3))
    image = process.color_normalization.reinhard(
        image, (8.63234435, -0.11501964, 0.03868433), (0.57506023, 0.10403329, 0.01364062),
        *process.color_conversion.lab_mean_std(pixels))
    stains = [process.color_deconvolution.stain_color_map[name] for name in ("hematoxylin", "eosin", "null")]
    deconvolved = process.color_deconvolution.color_deconvolution(image, np.array(stains).T)
    nuclear = deconvolved.Stains[..., 0].astype(float)
    min_radius, max_radius, min_area, search = 3 / mpp, 6 / mpp, 6.25 / mpp ** 2, 4 / mpp  # px
    return label_centroids(htk.segmentation.nuclear.detect_nuclei_kofahi(
        nuclear, nuclear < 60, min_radius, max_radius, min_area, search))


SEGMENTERS = {"builtin": segment_nuclei, "cellpose": segment_cellpose, "histomicstk": segment_histomicstk}


# ---------------------------------------------------------------- a slide by regions

def working_grid(slide, mpp):
    """Level to read, its px a side in one working px, and a working px in um and in level-0 px."""
    level, down = slide.level_for(mpp)
    factor = downsample_factor(slide.mpp * down, mpp)
    return level, factor, slide.mpp * down * factor, down * factor


def read_box(slide, level, factor, x, y, w, h):
    """A box in working px as uint8 RGB (h, w, 3), clipped at the slide's edge."""
    width, height = slide.handle.level_dimensions[level]
    w, h = min(w * factor, width - x * factor), min(h * factor, height - y * factor)
    return np.asarray(slide.read_level(level, x * factor, y * factor, w, h).reduce(factor))


def slide_regions(path, slide_mpp, segmenter, mpp):
    """The regions of a slide that hold tissue, as arguments of segment_region; boxes in working px.

    slide_mpp: um/px of level 0; mpp: um/px that the segmenter sees.
    """
    slide = Slide(path, said_mpp=slide_mpp)
    level, factor, px, down = working_grid(slide, mpp)
    picture, unit = slide.picture(MASK_MPP)
    x, y = (np.arange(0, n / factor + REGION, REGION) for n in slide.handle.level_dimensions[level])
    shares = tissue_shares(picture, unit * slide.mpp, x * down / unit, y * down / unit)
    boxes = [(i * REGION, j * REGION, REGION, REGION) for i, j in np.argwhere(shares.T > 0).tolist()]
    if not boxes:
        raise InputError(f"{path}: no tissue in it; take it out")
    spread = boxes[:: max(1, len(boxes) // 4)][:4]  # the stain is estimated once, from a few regions
    sample = [read_box(slide, level, factor, x, y, min(w, 1024), min(h, 1024)) for x, y, w, h in spread]
    if segmenter == "builtin":
        stain = estimate_thresholds(sample, px)
    else:
        tissue = np.concatenate([image[tissue_mask(image, px)] for image in sample])
        stain = tissue[:: 1 + len(tissue) // 20_000] if len(tissue) > 1000 else None
    return [(path, slide_mpp, segmenter, mpp, stain, box) for box in boxes]


def segment_region(path, slide_mpp, segmenter, mpp, stain, box):
    """Cells (K, 2), level-0 px, whose centroid lies in the box or up to SEAM beside it, for merge_seams.

    mpp: um/px that the segmenter sees; stain: what slide_regions estimated for the whole slide.
    """
    slide, (x, y, w, h) = Slide(path, said_mpp=slide_mpp), box
    level, factor, px, down = working_grid(slide, mpp)
    margin = int(np.ceil(MARGIN / px))
    left, top = max(0, x - margin), max(0, y - margin)
    image = read_box(slide, level, factor, left, top, x + w + margin - left, y + h + margin - top)
    try:
        xy = SEGMENTERS[segmenter](image, px, stain) + [left, top]
    except (InputError, MemoryError):
        raise
    except Exception as error:  # another package's: this slide is listed, the others go on
        raise InputError(f"{path}: {segmenter} failed on it ({one_line(error)}); "
                         "segment it elsewhere") from None
    low, high = np.array([x, y]) - SEAM / px, np.array([x + w, y + h]) + SEAM / px
    return xy[((xy >= low) & (xy < high)).all(1)] * down


def merge_seams(regions, near):
    """The cells (K, 2) of a slide from those of its regions, each (K_i, 2).

    Two cells that different regions found within near px of each other are one.
    """
    xy, owner = np.concatenate(regions), np.repeat(np.arange(len(regions)), [len(r) for r in regions])
    pairs = cKDTree(xy).query_pairs(near, output_type="ndarray")
    doubled = pairs[owner[pairs[:, 0]] != owner[pairs[:, 1]]]
    return np.delete(xy, doubled.max(1, initial=0), axis=0)


def source_of(path, slide_mpp, segmenter="builtin", mpp=WORK_MPP):
    """What cells are made from, as text: the segmenter and the um/px it sees, the image and its um/px."""
    version = f" {DETECTOR}" if segmenter == "builtin" else ""
    image = "{file_name} {file_bytes} {file_hash} pixels {pixels}".format_map(file_identity(path))
    return f"{segmenter}{version} at {mpp} um/px; {image} at {slide_mpp} um/px"


def save_cells(path, xy, source, **more):
    """Writes x and y (K,) float32 in level-0 px, sorted by y then x, and source: what they were made from.

    more: other values to keep with them.
    """
    xy = np.clip(xy, -1e9, 1e9)  # far beyond any slide; float32 has a limit
    xy = xy[np.lexsort((xy[:, 0], xy[:, 1]))].astype(np.float32)
    with atomic_write(path) as temp, open(temp, "wb") as file:
        np.savez_compressed(file, x=xy[:, 0], y=xy[:, 1], source=source, **more)


def segment_slides(tasks, segmenter, folder, workers, mpp=WORK_MPP):
    """Segments slides by regions over several processes and writes <folder>/<segmenter>/<slide>.npz.

    tasks: [(path, um/px of level 0), ...]; mpp: um/px that the segmenter sees. A slide is written as soon as
    its last region is done. Returns {path: why it failed}.
    """
    failed, found, regions = {}, {}, []
    todo = [(path, slide_mpp, segmenter, mpp) for path, slide_mpp in tasks]
    for (path, *_), result, error in in_processes(slide_regions, todo, workers, "tissue, slides"):
        if error:
            failed[path] = error
        regions += result or []
    left, slide_mpp = Counter(path for path, *_ in regions), dict(tasks)
    for (path, *_, box), xy, error in in_processes(segment_region, regions, workers, f"{segmenter}, regions"):
        if error:
            failed[path] = error
        found.setdefault(path, {})[box] = xy
        left[path] -= 1
        if not left[path] and path not in failed:
            parts, px = [xy for _, xy in sorted(found.pop(path).items())], slide_mpp[path]
            file, cells = folder / segmenter / f"{slide_name(path)}.npz", merge_seams(parts, SEAM / px)
            _, error = call(save_cells, (file, cells, source_of(path, px, segmenter, mpp)))
            failed |= {path: error} if error else {}
    return failed


# ---------------------------------------------------------------- script

def arguments(argv):
    parser = Parser(
        prog="python -m wsi.segment", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Finds the cells of slides; run it again to continue with the rest.")
    add = parser.add_argument
    add("slides", nargs="+", type=Path, metavar="SLIDE", help="slides, or folders of slides")
    add("--segmenter", default="builtin", choices=list(SEGMENTERS),
        help="cellpose (slow without a GPU) and histomicstk are packages to install")
    add("--out", default="cells", type=Path, help="cells go to OUT/<segmenter>/<slide>.npz; use <data>/cells")
    add_data_flags(add, "--slide-mpp")
    add("--mpp", type=MPP, default=WORK_MPP,
        help="approximate um/px that the segmenter sees: whole px are averaged")
    add("--workers", type=whole(),
        help="processes (1 for cellpose, as each of them holds its model, else one per core)")
    add_max_gigapixels(add)
    args = parser.parse_args(argv)
    if args.workers is None:
        args.workers = 1 if args.segmenter == "cellpose" else os.cpu_count() or 1
    return args


def um_per_px(path, slide_mpp, gigapixels):
    """um/px of a slide's level 0; InputError if it has none or too many px."""
    return Slide(path, slide_mpp, gigapixels=gigapixels).mpp


def segment(args):
    """Writes the cells of each slide that has none yet; 1 if a slide failed, else 0."""
    folder, files = args.out / args.segmenter, {}
    for given in args.slides:
        for path in find_slides(given.iterdir()).values() if given.is_dir() else [given]:
            other = files.setdefault(slide_name(path), path)
            if other != path:
                raise InputError(f"{path}: has the name of {other}; rename one of the two")
    if not files:
        named = ", ".join(map(str, args.slides))
        raise InputError(f"{named}: no slides in it ({' '.join(sorted(SLIDE_TYPES))})")
    tasks, failed = [], {}
    for path in [path for name, path in files.items() if not (folder / f"{name}.npz").is_file()]:
        mpp, failed[path] = call(um_per_px, (path, args.slide_mpp, args.max_gigapixels))
        tasks += [(path, mpp)] if mpp else []
    failed = {path: error for path, error in failed.items() if error}
    if tasks and args.segmenter != "builtin":
        load_segmenter(args.segmenter)  # a missing package is reported, and weights fetched, before the work
    failed |= segment_slides(tasks, args.segmenter, args.out, args.workers, args.mpp)
    for error in failed.values():
        print("wsi.segment:", error, file=sys.stderr)
    print(f"{len(files) - len(failed)} of {len(files)} slides have their cells in {folder}/*.npz. "
          f"Next, if {args.out}/ is <data>/cells/: python train.py --data <data> --prior {args.segmenter}")
    return int(bool(failed))


def main(argv=None):
    return run_script("wsi.segment", lambda: segment(arguments(argv)),
                      again="finished slides stay, run it again to go on")


if __name__ == "__main__":
    sys.exit(main())
