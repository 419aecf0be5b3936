"""The cells of several segmenters on the same crops, and how far they agree (Table 7, Fig. 15 and 16).

    python -m experiments.figures.priors --data demo --prior builtin truth=datasets/demo/truth

A segmenter is a --prior of train.py or a folder with a file of cells for each slide. Writes a picture and the
agreement of each pair as CSV: F1 of the nuclei within 3 um, and share and kappa of the patches' P_c. What the
priors are worth for training (Table 7): python -m experiments.study prior.
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
from tqdm import tqdm

from common.errors import InputError, run_script
from common.figures import spread
from common.files import print_table
from experiments.figures import shared
from prior import bin_centroids
from wsi.cache import describe_cells, tile_info, tile_side
from wsi.cell_files import files_by_name
from wsi.cells import read_cells
from wsi.datasets import DATASETS, PRIORS
from wsi.look import Shown, close_up, draw_inset, draw_tile
from wsi.slides import CROP, Slide
from wsi.splits import find_data

NEAR = 3.0  # um: two centroids nearer than this may be the same nucleus


def arguments(argv):
    parser, add = shared.parser_of("priors", "Cells of several segmenters on the same crops.")
    add("--prior", nargs="+", required=True, metavar="[NAME=]PRIOR",
        help=f"two or more: {', '.join(PRIORS[1:])}, or a folder with <slide>.json, .csv, ... in level-0 px")
    shared.add_data(add)
    add("--mpp", type=float, help="um/px of the crops (2.0 is 5x); default: the data set's")
    add("--crops", type=int, default=500, help="most crops whose cells are compared")
    add("--show", type=int, default=3, help="crops that are drawn")
    add("--out", default="runs/priors.png", help="the picture")
    args = parser.parse_args(argv)
    shared.check_flags(args, crops=(1, 1e9), show=(1, 20))
    if len(args.prior) < 2:
        raise InputError("--prior: two segmenters are needed to compare them")
    if args.mpp is None and args.data not in DATASETS:
        raise InputError("--mpp: a folder needs it (2.0 is 5x, 1.0 10x, 0.5 20x)")
    return args


# ---------------------------------------------------------------- agreement

def matched(a, b, near):
    """How many of the points a (K, 2) have one of b (L, 2) within near px, one to one, at most."""
    if not len(a) or not len(b):
        return 0
    pairs = cKDTree(a).sparse_distance_matrix(cKDTree(b), near, output_type="coo_matrix")
    graph = coo_matrix((np.ones(pairs.nnz), (pairs.row, pairs.col)), pairs.shape).tocsr()
    return int((maximum_bipartite_matching(graph) >= 0).sum())


def agreement(a, b, mpp):
    """F1 of the nuclei, share of patches with the same P_c, Cohen's kappa of these, over the same crops.

    a, b: lists of cells (K, 2) in px of each crop. F1 = 2 hits / (all of a + all of b), 1 without any cell;
    kappa is what the share exceeds chance by (1: all the same, 0: chance, NaN where P_c is all one region).
    """
    hits = sum(matched(x, y, NEAR / mpp) for x, y in zip(a, b))
    total = sum(map(len, a)) + sum(map(len, b))
    p, q = (torch.cat([bin_centroids(xy, CROP) for xy in cells]).numpy() for cells in (a, b))
    kappa = cohen_kappa_score(p, q) if len(np.unique([p, q])) > 1 else float("nan")
    return 2 * hits / total if total else 1.0, float((p == q).mean()), float(kappa)


# ---------------------------------------------------------------- cells

def cells_from_folder(folder, found, name):
    """Cells (K, 2) of a slide in level-0 px from <slide>.* in a folder; None if there is no file."""
    files = files_by_name(folder, found.images, name).get(name)
    info = tile_info(found, name)
    if not files or info is None:
        return None
    size = info["width"], info["height"]
    return read_cells(files[0], info["slide_mpp"], size, info["power"], info["bounds"])


def cells_of(value, crops, found, args):
    """{(slide, x, y): cells (K, 2) in px of the crop} by one segmenter, where it has cells."""
    if value in PRIORS:
        own = find_data(args.data, args.mpp, value, slide_mpp=args.slide_mpp)
        mine = shared.crops_of(own, sorted(set(crops.owner)), args)
        return {key: mine.cells(i) for i, key in enumerate(keys_of(mine))}
    if not Path(value).is_dir():
        raise InputError(f"--prior {value}: neither a folder nor one of {', '.join(PRIORS)}")
    out = {}
    for name in tqdm(sorted(set(crops.owner)), "cells, slides", leave=False):
        xy, info = cells_from_folder(Path(value), found, name), tile_info(found, name)
        for key in keys_of(crops) if xy is not None else ():
            if key[0] == name:
                inside = ((xy >= key[1:]) & (xy < np.add(key[1:], tile_side(info)))).all(1)
                out[key] = (xy[inside] - key[1:]) * (CROP / tile_side(info))
    return out


def keys_of(crops):
    """(slide, x, y) of each crop, its corner in level-0 px."""
    return [(name, *corner) for name, corner in zip(crops.owner, crops.corners.tolist())]


# ---------------------------------------------------------------- script

def draw(rows, names, mpp):
    """Fig. 15 and 16: a row for each crop; for each segmenter the crop with its P_c, and an inset with cells.

    rows: for each crop a list of wsi.look.Shown, one for each of the segmenters' names.
    """
    figure = Figure(figsize=(5.6 * len(names), 2.95 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 2 * len(names), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for line, row in zip(axes, rows):
        for k, (name, shown) in enumerate(zip(names, row)):
            draw_tile(line[2 * k], shown, mpp)
            count = draw_inset(line[2 * k + 1], shown, mpp)
            line[2 * k].set_title(f"{name}: {len(shown.cells)} cells, P_c in green", fontsize=9)
            line[2 * k + 1].set_title(f"the box: {count} cells", fontsize=9)
    return figure


def shown_crops(crops, found, cells, indices):
    """For each crop of the indices a list of wsi.look.Shown: its cells by each segmenter, with one inset.

    cells: {segmenter: [(K, 2) in px of each of these crops]}.
    """
    rows = []
    images = shared.images_of(crops, indices).permute(0, 2, 3, 1).numpy()
    for k, (i, image) in enumerate(zip(indices, images)):
        info = tile_info(found, crops.owner[i])
        side = tile_side(info)
        slide = Slide(found.images[crops.owner[i]], said_mpp=info["slide_mpp"])
        corner = np.array(crops.corners[i])
        level0 = [corner + of_crops[k] * (side / CROP) for of_crops in cells.values()]
        inset = close_up(slide, corner, side, np.concatenate(level0))
        rows.append([Shown(image, bin_centroids(of_crops[k], CROP), inset, xy, corner, side)
                     for of_crops, xy in zip(cells.values(), level0)])
    return rows


def run(args):
    segmenters = shared.named(args.prior, "--prior")
    found = find_data(args.data, args.mpp, slide_mpp=args.slide_mpp)
    if found.kind != "slides":
        raise InputError(f"--data {args.data}: holds crops; slides are compared here")
    crops = shared.crops_of(found, sorted(found.images), args, with_cells=False)
    of = {name: cells_of(value, crops, found, args) for name, value in segmenters.items()}
    common = [i for i, key in enumerate(keys_of(crops)) if all(key in cells for cells in of.values())]
    if not common:
        counts = ", ".join(f"{name} of {len(cells)}" for name, cells in of.items())
        raise InputError(f"--prior: no crop has the cells of all ({counts} crops); docs/data.md says where "
                         "cells go")
    chosen = [common[i] for i in spread(len(common), args.crops)]
    keys = keys_of(crops)
    cells = {name: [mine[keys[i]] for i in chosen] for name, mine in of.items()}
    rows = [("segmenter", "other", "F1 within 3 um", "P_c the same", "kappa of P_c", "crops")]
    for name, of_crops in cells.items():
        priors = torch.stack([bin_centroids(xy, CROP) for xy in of_crops])
        total, share = sum(map(len, of_crops)), priors.mean().item()
        print(f"{name}:", describe_cells(total, len(chosen), share, found.mpp))
    for a, b in combinations(cells, 2):
        values = agreement(cells[a], cells[b], found.mpp)
        rows.append((a, b, *(f"{v:.4f}" for v in values), str(len(chosen))))
    print_table(rows)
    mixed = shared.with_both_regions(priors)
    drawn = mixed[spread(len(mixed), args.show)].tolist()
    of_drawn = {name: [of_crops[i] for i in drawn] for name, of_crops in cells.items()}
    shown = shown_crops(crops, found, of_drawn, [chosen[i] for i in drawn])
    shared.save_both(draw(shown, list(cells), found.mpp), rows, args.out)
    return 0


def main(argv=None):
    return run_script("priors", lambda: run(arguments(argv)), "--crops")


if __name__ == "__main__":
    sys.exit(main())
