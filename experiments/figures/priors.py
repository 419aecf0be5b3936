"""The cells of several segmenters on the same crops, and how far they agree (Table 7, Fig. 15 and 16).

    python -m experiments.figures.priors --data demo --prior builtin truth=datasets/demo/truth

A segmenter is a --prior of train.py or a folder with a file of cells for each slide. Writes a picture, and as
CSV how far each pair agrees: F1 of the nuclei within 3 um, the share of patches with the same P_c, its kappa.
What the priors are worth for training (Table 7): python -m experiments.study prior.
"""
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial import cKDTree
from sklearn.metrics import cohen_kappa_score
from torch.utils.data import Subset
from tqdm import tqdm

from common.errors import InputError, run_script
from common.files import print_table
from common.flags import whole
from data import spread
from experiments.figures import shared
from prior import bin_centroids
from wsi.cache import describe_cells, tile_info
from wsi.cell_files import match_files
from wsi.datasets import PRIORS
from wsi.look import Shown, cells_of_slide, close_up, draw_inset, draw_tile, inside_box
from wsi.slides import CROP, Slide
from wsi.splits import find_data

NEAR = 3.0  # um: two centroids at most this far apart may be the same nucleus


def arguments(argv):
    parser, add = shared.parser_of("figures.priors", "Cells of several segmenters on the same crops.")
    add("--prior", nargs="+", required=True, metavar="[NAME=]PRIOR",
        help=f"two or more: {', '.join(PRIORS[1:])}, or a folder with <slide>.json, .csv, ... in level-0 px")
    shared.add_data(add)
    add("--crops", type=whole(), default=500, help="largest number of crops to compare cells on")
    add("--show", type=whole(1, 20), default=3, help="how many crops to draw")
    add("--out", type=shared.png, default="runs/priors.png", help="the picture")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- agreement

def matched(a, b, near):
    """Returns the size of the largest one-to-one matching of points a (K, 2) and b (L, 2) within near px."""
    if not len(a) or not len(b):
        return 0
    pairs = cKDTree(a).sparse_distance_matrix(cKDTree(b), near, output_type="coo_matrix")
    graph = coo_matrix((np.ones(pairs.nnz), (pairs.row, pairs.col)), pairs.shape).tocsr()
    return int((maximum_bipartite_matching(graph) >= 0).sum())


def agreement(a, b, mpp):
    """Returns F1 of the nuclei, the share of patches with the same P_c, and Cohen's kappa of P_c.

    a, b: lists of cells (K, 2) in px of the same crops. F1 = 2 matches / (cells of a + cells of b), 1 without
    any cell; kappa is NaN where P_c is all one region.
    """
    matches = sum(matched(x, y, NEAR / mpp) for x, y in zip(a, b))
    total = sum(map(len, a)) + sum(map(len, b))
    p = torch.cat([bin_centroids(xy, CROP) for xy in a]).numpy()
    q = torch.cat([bin_centroids(xy, CROP) for xy in b]).numpy()
    kappa = cohen_kappa_score(p, q) if len(np.unique([p, q])) > 1 else float("nan")
    return 2 * matches / total if total else 1.0, float((p == q).mean()), float(kappa)


# ---------------------------------------------------------------- cells

def cells_from_folder(folder, found, name):
    """Returns the cells (K, 2) of a slide in level-0 px from <slide>.* in a folder; None without a file."""
    files = match_files(folder, found.images)[0].get(name)
    info = tile_info(found, name)
    if not files or info is None:
        return None
    return cells_of_slide(Slide(found.images[name], said_mpp=info["slide_mpp"]), files[0], workers=1)


def cells_of(value, crops, found, args):
    """Returns {(slide, x, y): cells (K, 2) in px of the crop} of one segmenter, for slides that it has."""
    if value in PRIORS:
        own = find_data(args.data, args.mpp, value, slide_mpp=args.slide_mpp)
        own_crops = shared.crops_of(own, sorted(set(crops.owner)), args)
        return {key: own_crops.cells(i) for i, key in enumerate(keys_of(own_crops))}
    if not Path(value).is_dir():
        raise InputError(f"--prior {value}: neither a folder nor one of {', '.join(PRIORS)}")
    cells = {}
    for name in tqdm(sorted(set(crops.owner)), "cells, slides", leave=False):
        xy = cells_from_folder(Path(value), found, name)
        if xy is None:
            continue
        side = tile_info(found, name)["side"]
        for key in keys_of(crops):
            if key[0] == name:
                cells[key] = (xy[inside_box(xy, key[1:], side)] - key[1:]) * (CROP / side)
    return cells


def keys_of(crops):
    """Returns (slide, x, y) of each crop; x, y: its corner in level-0 px."""
    return [(name, *corner) for name, corner in zip(crops.owner, crops.corners.tolist())]


# ---------------------------------------------------------------- script

def draw(rows, names, mpp):
    """Returns Fig. 15 and 16, a row per crop: for each segmenter the crop with its P_c, and its inset.

    names: the segmenters; rows: for each crop a list of wsi.look.Shown, one per segmenter.
    """
    figure = Figure(figsize=(5.6 * len(names), 2.95 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 2 * len(names), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for line, row in zip(axes, rows):
        for k, (name, shown) in enumerate(zip(names, row)):
            draw_tile(line[2 * k], shown, mpp)
            count = draw_inset(line[2 * k + 1], shown, mpp)
            line[2 * k].set_title(f"{name}: {len(shown.cells)} cells, P_c outlined", fontsize=9)
            line[2 * k + 1].set_title(f"the box: {count} cells", fontsize=9)
    return figure


def shown_crops(crops, found, cells, compared, drawn):
    """Returns for each crop to draw a list of wsi.look.Shown, one per segmenter, with the same inset.

    cells: {segmenter: [(K, 2) in px of each compared crop]}; compared: Subset of crops; drawn: indices in it.
    """
    rows = []
    images = shared.images_of(compared, drawn).permute(0, 2, 3, 1).numpy()
    for k, image in zip(drawn, images):
        i = compared.indices[k]
        info = tile_info(found, crops.owner[i])
        side = info["side"]
        slide = Slide(found.images[crops.owner[i]], said_mpp=info["slide_mpp"])
        corner = np.array(crops.corners[i])
        level0 = [corner + of_crops[k] * (side / CROP) for of_crops in cells.values()]
        inset = close_up(slide, corner, side, np.concatenate(level0))
        rows.append([Shown(image, bin_centroids(of_crops[k], CROP), xy, corner, side, *inset)
                     for of_crops, xy in zip(cells.values(), level0)])
    return rows


def run(args):
    segmenters = shared.named(args.prior, "--prior")
    if len(segmenters) < 2:
        raise InputError("--prior: two segmenters are needed to compare them")
    found = find_data(args.data, args.mpp, slide_mpp=args.slide_mpp)
    if found.kind != "slides":
        raise InputError(f"--data {args.data}: holds crops; slides are compared here")
    crops = shared.crops_of(found, sorted(found.images), args, with_cells=False)
    keys = keys_of(crops)
    by_key = {name: cells_of(value, crops, found, args) for name, value in segmenters.items()}
    keys_of_all = set.intersection(*map(set, by_key.values()))
    indices = [i for i, key in enumerate(keys) if key in keys_of_all]
    if not indices:
        counts = ", ".join(f"{name} of {len(cells)}" for name, cells in by_key.items())
        raise InputError(f"--prior: no crop has the cells of all ({counts} crops); docs/data.md says where "
                         "cells go")
    compared = Subset(crops, [indices[k] for k in spread(len(indices), args.crops)])
    cells = {}  # {segmenter: [(K, 2) in px of each compared crop]}
    for name, of_segmenter in by_key.items():
        cells[name] = [of_segmenter[keys[i]] for i in compared.indices]
        priors = torch.stack([bin_centroids(xy, CROP) for xy in cells[name]])
        total = sum(map(len, cells[name]))
        print(f"{name}:", describe_cells(total, len(compared), priors.mean().item(), found.mpp))
    rows = [("segmenter", "other", "F1 within 3 um", "P_c the same", "kappa of P_c", "crops")]
    for a, b in combinations(cells, 2):
        values = agreement(cells[a], cells[b], found.mpp)
        rows.append((a, b, *(f"{v:.4f}" for v in values), str(len(compared))))
    print_table(rows)
    drawn = shared.choose_crops(compared, priors, args.show)
    shown = shown_crops(crops, found, cells, compared, drawn)
    shared.save_both(draw(shown, list(cells), found.mpp), rows, args.out)
    return 0


def main(argv=None):
    return run_script("priors", lambda: run(arguments(argv)), "--crops")


if __name__ == "__main__":
    sys.exit(main())
