"""Segments the cells of slides (3.2) with the built-in detector, Cellpose or HistomicsTK.

    python -m wsi.segment SLIDE... --segmenter cellpose

A slide is segmented region by region, each with a margin so that no cell is cut. Cells are written in level-0
px.
"""
import importlib
import os
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from common.errors import InputError, Parser, one_line, run_script
from common.files import atomic_write, check_writable, files_under, read_npz, stamp
from common.flags import MPP, add_max_gigapixels, whole
from common.pool import call, in_processes
from prior import DETECTOR, WORK_MPP, density_and_slopes, downsample_factor, segment_nuclei, thresholds_of
from wsi.datasets import add_data_flags
from wsi.folders import mpp_in_table
from wsi.label_images import label_centroids
from wsi.slides import MASK_MPP, Slide, file_identity, find_slides, slide_name, tissue_mask, tissue_shares

REGION = 2048  # side of a region, in px that the segmenter sees
MARGIN = 24.0  # um around a region: farther than the built-in detector sees, so that neighbours agree
SEAM = 1.0  # um: cells of two regions that are closer than this are one cell
INSTALL = {
    "cellpose": 'pip install "cellpose>=4"',
    "histomicstk": "pip install --no-deps histomicstk, then "
                   "pip install large-image ctk-cli girder-slicer-cli-web shapely scikit-image pandas"}


# ---------------------------------------------------------------- segmenters

@lru_cache
def load_segmenter(name):
    """Returns Cellpose's model (weights are downloaded once; on the GPU if there is one) or histomicstk.

    InputError if the package or the weights cannot be loaded.
    """
    try:
        module = importlib.import_module({"cellpose": "cellpose.models", "histomicstk": "histomicstk"}[name])
        if hasattr(module, "Cellpose"):
            raise ImportError("cellpose is older than version 4")
        return module.CellposeModel(gpu=True) if name == "cellpose" else module
    except ImportError as error:
        raise InputError(f"--segmenter {name}: {error}; {INSTALL[name]}") from None
    except Exception as error:  # the packages raise many types
        raise InputError(f"--segmenter {name}: cannot be loaded ({one_line(error)}); its weights are "
                         "downloaded on first use, or put them into ~/.cellpose/models/") from None


def segment_cellpose(image, mpp, sample=None):
    """Segments an image with Cellpose-SAM (as documented for cellpose 4.2); returns what segment_nuclei does.

    sample (N, 3): px of the slide that the image is a region of. Their 1st and 99th percentiles become 0 and
    1, so that all regions of a slide are normalised alike.
    """
    low, high = np.percentile(np.reshape(image if sample is None else sample, (-1, 3)), (1, 99), axis=0)
    scale = np.stack([low, np.maximum(high, low + 1)], 1)
    labels = load_segmenter("cellpose").eval(image, channel_axis=2, normalize={"lowhigh": scale})[0]
    return label_centroids(np.asarray(labels))


def segment_histomicstk(image, mpp, sample=None):
    """Segments an image with HistomicsTK (as documented for 1.4); returns what segment_nuclei does.

    Reinhard normalisation, colour deconvolution and Al-Kofahi's detection follow its NucleiDetection at 20x,
    except for a largest radius of 12, a least area of 25 and a search radius of 8 px: the defaults of 20, 80
    and 10 miss half of the nuclei that these find. sample (N, 3): px of the slide, for the normalisation.
    """
    htk = load_segmenter("histomicstk")
    process = htk.preprocessing
    pixels = np.reshape(image if sample is None else sample, (1, -1, 3))
    image = process.color_normalization.reinhard(
        image, (8.63234435, -0.11501964, 0.03868433), (0.57506023, 0.10403329, 0.01364062),
        *process.color_conversion.lab_mean_std(pixels))
    stains = [process.color_deconvolution.stain_color_map[name] for name in ("hematoxylin", "eosin", "null")]
    deconvolved = process.color_deconvolution.color_deconvolution(image, np.array(stains).T)
    nuclear = deconvolved.Stains[..., 0].astype(float)
    min_radius = 3 / mpp  # px
    max_radius = 6 / mpp
    min_area = 6.25 / mpp ** 2
    search_radius = 4 / mpp
    return label_centroids(htk.segmentation.nuclear.detect_nuclei_kofahi(
        nuclear, nuclear < 60, min_radius, max_radius, min_area, search_radius))


SEGMENTERS = {"builtin": segment_nuclei, "cellpose": segment_cellpose, "histomicstk": segment_histomicstk}


# ---------------------------------------------------------------- a slide by regions

def working_grid(slide, mpp):
    """Returns the level to read, the side of a working px in px of that level, in um, and in level-0 px."""
    level, down = slide.level_for(mpp)
    factor = downsample_factor(slide.mpp * down, mpp)
    return level, factor, slide.mpp * down * factor, down * factor


def read_box(slide, level, factor, x, y, w, h):
    """Returns a box, given in working px, as uint8 RGB (h, w, 3), clipped at the slide's edge."""
    width, height = slide.handle.level_dimensions[level]
    w = min(w * factor, width - x * factor)
    h = min(h * factor, height - y * factor)
    return np.asarray(slide.read_level(level, x * factor, y * factor, w, h).reduce(factor))


def slide_regions(path, slide_mpp, segmenter, mpp):
    """Returns the arguments of segment_region for each region of a slide with tissue; boxes in working px.

    slide_mpp: um/px of level 0; mpp: um/px that the segmenter sees. InputError without tissue.
    """
    slide = Slide(path, said_mpp=slide_mpp)
    level, factor, px, down = working_grid(slide, mpp)
    picture, unit = slide.picture(MASK_MPP)
    x, y = (np.arange(0, n / factor + REGION, REGION) for n in slide.handle.level_dimensions[level])
    shares = tissue_shares(picture, unit * slide.mpp, x * down / unit, y * down / unit)
    boxes = [(i * REGION, j * REGION, REGION, REGION) for i, j in np.argwhere(shares.T > 0).tolist()]
    if not boxes:
        raise InputError(f"{path}: shows no tissue; remove it")
    spread = boxes[:: max(1, len(boxes) // 4)][:4]  # the stain is estimated once, from a few regions
    sample = [read_box(slide, level, factor, x, y, min(w, 1024), min(h, 1024)) for x, y, w, h in spread]
    if segmenter == "builtin":
        stain = thresholds_of([density_and_slopes(image, px) for image in sample])
    else:
        tissue = np.concatenate([image[tissue_mask(image, px)] for image in sample])
        stain = tissue[:: 1 + len(tissue) // 20_000] if len(tissue) > 1000 else None
    return [(path, slide_mpp, segmenter, mpp, stain, box) for box in boxes]


def segment_region(path, slide_mpp, segmenter, mpp, stain, box):
    """Returns the cells (K, 2), in level-0 px, with a centroid in the box or up to SEAM outside of it.

    mpp: um/px that the segmenter sees; stain: slide_regions' estimate for the whole slide. InputError if the
    segmenter fails.
    """
    slide = Slide(path, said_mpp=slide_mpp)
    level, factor, px, down = working_grid(slide, mpp)
    x, y, w, h = box
    margin = int(np.ceil(MARGIN / px))
    left = max(0, x - margin)
    top = max(0, y - margin)
    image = read_box(slide, level, factor, left, top, x + w + margin - left, y + h + margin - top)
    try:
        xy = SEGMENTERS[segmenter](image, px, stain) + [left, top]
    except (InputError, MemoryError):
        raise
    except Exception as error:  # the packages raise many types; the other slides are segmented nevertheless
        raise InputError(f"{path}: {segmenter} failed on it ({one_line(error)}); "
                         "segment it elsewhere") from None
    low = np.array([x, y]) - SEAM / px
    high = np.array([x + w, y + h]) + SEAM / px
    return xy[((xy >= low) & (xy < high)).all(1)] * down


def merge_seams(regions, near):
    """Joins the cells (K_i, 2) of regions; two of different regions, at most near px apart, become one."""
    xy = np.concatenate(regions)
    owner = np.repeat(np.arange(len(regions)), [len(cells) for cells in regions])
    pairs = cKDTree(xy).query_pairs(near, output_type="ndarray")
    doubled = pairs[owner[pairs[:, 0]] != owner[pairs[:, 1]]]
    return np.delete(xy, doubled.max(1, initial=0), axis=0)


def source_of(path, slide_mpp, segmenter="builtin", mpp=WORK_MPP):
    """Returns the stamp of an image's cells: of the image, its um/px, the segmenter and the um/px it sees."""
    version = DETECTOR if segmenter == "builtin" else None
    return stamp(segmenter=segmenter, version=version, mpp=mpp, slide_mpp=slide_mpp, **file_identity(path))


def save_cells(path, xy, source, **more):
    """Writes x and y (K,) float32 in level-0 px, sorted by y and then x, source (of source_of), and more."""
    xy = np.clip(xy, -1e9, 1e9)  # far beyond any slide, but within float32
    xy = xy[np.lexsort((xy[:, 0], xy[:, 1]))].astype(np.float32)
    with atomic_write(path) as temp, open(temp, "wb") as file:
        np.savez_compressed(file, x=xy[:, 0], y=xy[:, 1], source=source, **more)


def segment_slides(tasks, segmenter, folder, workers, mpp=WORK_MPP):
    """Segments slides by regions in several processes and writes <folder>/<segmenter>/<slide>.npz.

    tasks: [(path, um/px of level 0), ...]; mpp: um/px that the segmenter sees. A slide is written as soon as
    its last region is done. Returns {path: why it failed}.
    """
    failed = {}
    regions = []
    todo = [(path, slide_mpp, segmenter, mpp) for path, slide_mpp in tasks]
    for (path, *_), result, error in in_processes(slide_regions, todo, workers, "tissue, slides"):
        if error:
            failed[path] = error
        regions += result or []
    found = {}
    left = Counter(path for path, *_ in regions)
    slide_mpp = dict(tasks)
    for (path, *_, box), xy, error in in_processes(segment_region, regions, workers, f"{segmenter}, regions"):
        if error:
            failed[path] = error
        found.setdefault(path, {})[box] = xy
        left[path] -= 1
        if not left[path] and path not in failed:
            in_order = [xy for _, xy in sorted(found.pop(path).items())]
            cells = merge_seams(in_order, SEAM / slide_mpp[path])
            source = source_of(path, slide_mpp[path], segmenter, mpp)
            _, error = call(save_cells, (folder / segmenter / f"{slide_name(path)}.npz", cells, source))
            if error:
                failed[path] = error
    return failed


# ---------------------------------------------------------------- script

def arguments(argv):
    """Returns the flags as a dict, the arguments of segment."""
    parser = Parser(
        prog="python -m wsi.segment",
        description="Segments the cells of slides. If it is stopped, run it again to resume.")
    add = parser.add_argument
    add("slides", nargs="+", type=Path, metavar="SLIDE", help="slides, or folders of slides (subfolders too)")
    add("--segmenter", default="builtin", choices=list(SEGMENTERS),
        help="cellpose (slow without a GPU) and histomicstk have to be installed")
    add("--out", default="cells", type=Path,
        help="writes the cells to OUT/<segmenter>/<slide>.npz; use <data>/cells")
    add_data_flags(add, "--slide-mpp")
    add("--mpp", type=MPP, default=WORK_MPP,
        help="approximate um/px that the segmenter sees: whole px are averaged")
    add("--workers", type=whole(),
        help="processes; default: 1 for cellpose, since each holds its model, else one per core")
    add_max_gigapixels(add)
    return vars(parser.parse_args(argv))


def slides_in(folder):
    """Returns the slides under a folder (gdc-client makes subfolders), of a data set those under slides/.

    Images in crops/ and cells/ are not slides.
    """
    if (folder / "slides").is_dir():
        folder = folder / "slides"
    files = [path for path in files_under(folder)
             if path.relative_to(folder).parts[0] not in ("crops", "cells")]
    return find_slides(files).values()


def slides_by_name(paths):
    """Returns {name: file} of slides and folders of slides; InputError for no slide, or two of one name."""
    files = {}
    for given in paths:
        for path in slides_in(given) if given.is_dir() else [given]:
            other = files.setdefault(slide_name(path), path)
            if other != path:
                raise InputError(f"{path}: has the same name as {other}; rename one of them")
    if not files:
        raise InputError(f"{', '.join(map(str, paths))}: no slides in it; docs/data.md lists the formats")
    return files


def segment(slides, segmenter, out, slide_mpp, mpp, workers, max_gigapixels):
    """Segments each slide that has no cells yet, or those of other settings; returns 1 if a slide failed."""
    if workers is None:
        workers = 1 if segmenter == "cellpose" else os.cpu_count() or 1
    files = slides_by_name(slides)
    check_writable(out / segmenter)
    tasks = []
    failed = {}
    for name, path in files.items():
        slide, error = call(Slide, (path, slide_mpp, mpp_in_table(path), max_gigapixels))
        if error:
            failed[path] = error
            continue
        kept = read_npz(out / segmenter / f"{name}.npz", "source")
        if not kept or str(kept["source"]) != source_of(path, slide.mpp, segmenter, mpp):
            tasks.append((path, slide.mpp))
        slide = None  # a plain image would stay decoded in memory
    if tasks and segmenter != "builtin":
        load_segmenter(segmenter)  # reports a missing package, and downloads weights, before the work starts
    failed |= segment_slides(tasks, segmenter, out, workers, mpp)
    for error in failed.values():
        print("wsi.segment:", error, file=sys.stderr)
    print(f"{len(files) - len(failed)} of {len(files)} slides have cells in {out / segmenter}/*.npz. "
          f"Next, if {out}/ is <data>/cells/: python train.py --data <data> --prior {segmenter}")
    return int(bool(failed))


def main(argv=None):
    return run_script("wsi.segment", lambda: segment(**arguments(argv)),
                      again="finished slides are kept, run it again to resume")


if __name__ == "__main__":
    sys.exit(main())
