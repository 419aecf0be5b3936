"""Attention over whole slides: of the encoder's tokens (4.2) and of DSMIL's instances (3.6).

    python -m experiments.figures.heatmap --checkpoint Baseline=RUN DiRL=RUN [--data demo] [--slide NAME]

Writes a picture, a CSV with a line per tile, and for each network a .geojson that QuPath opens (drag it onto
the open slide): tiles as annotations with their measurements, tokens of the two sparse bins as detections.
DSMIL's map is the mean over the DSMILs that eval.py kept of the network; without them it is skipped.
"""
import re
import sys
from pathlib import Path

import numpy as np

from common.bags import read_bags, read_dsmils
from common.encoders import attention_of, features_folder, in_batches, results_folder
from common.errors import InputError, run_script
from common.export import sparse_tokens, tiles_of, write_features
from common.figures import BINS, draw_maps, stitch
from common.flags import whole
from experiments.figures import shared
from wsi.crops import picture_of
from wsi.datasets import run_name

TOKENS = [f"tokens {interval}" for interval in BINS]


def arguments(argv):
    parser, add = shared.parser_of("figures.heatmap", "Heat maps of attention over a slide, and for QuPath.")
    shared.add_networks(add)
    add("--slide", help="name of the slide; default: the first of --part")
    add("--pixels", type=whole(50, 20_000), default=900,
        help="longer side of the slide's picture; more for print")
    add("--out", type=shared.png, help="the picture; default: runs/heatmap_<slide>.png")
    return parser.parse_args(argv)


def dsmil_attention(found, data, path, about, name, corners):
    """Returns the mean attention (N,) of the DSMILs that eval.py kept to a slide's N tiles for its class.

    path, about: of load_encoder; data: the name of the data set in runs. Without labels, or without DSMILs or
    features of this encoder, it is None. InputError if the features are those of other tiles than corners
    (N, 2).
    """
    if not found.labels:
        return None
    folder = features_folder(path, about, found.name, found.mpp)
    try:
        kept = read_dsmils(results_folder(path, about, data, found.mpp), path, "cpu")
        bag = read_bags(folder, [name], path)[name]
    except InputError as error:
        print(f"skipped: DSMIL: {error}")
        return None
    label = found.labels[name]["label"]
    if not np.array_equal(bag["coords"], corners) or label not in kept.classes:
        raise InputError(f"{folder}/features/{name}.npz: has other tiles, or DSMIL other classes than now; "
                         f"run eval.py again with --checkpoint {path}")
    return kept.apply(bag["features"])[1][:, kept.classes.index(label)]


def run(args):
    networks, found, names = shared.open_all(args, with_cells=False)
    name = args.slide or names[0]
    if found.kind != "slides" or name not in names:
        raise InputError(f"--slide {name}: not a slide in the {args.part} part of {found.source}; see --part")
    crops = shared.crops_of(found, [name], args, with_cells=False)
    images = shared.images_of(crops, range(len(crops)))
    picture = picture_of(found, name, args.pixels)
    places = crops.corners, picture.side, picture.unit, picture.pixels.shape[:2]
    where = crops.corners, picture.side, picture.bounds
    out = Path(args.out or f"runs/heatmap_{name}.png")
    maps = {}  # {network: {title: (h, w)}}
    rows = [("network", "x", "y", *TOKENS, "DSMIL")]
    for network, (encoder, *file) in networks.items():
        attention = in_batches(lambda x: attention_of(encoder, x), images, 64, network).numpy()
        low = (attention < 0.5).mean(1)
        high = (attention > 2).mean(1)
        of_tile = dict(zip(TOKENS, (low, 1 - low - high, high)))
        maps[network] = {"aggregated attention": stitch(attention, *places)}
        instances = dsmil_attention(found, run_name(args.data), *file, name, crops.corners)
        if instances is not None:
            of_tile["DSMIL"] = instances
            maps[network]["DSMIL's attention"] = stitch(instances[:, None] * len(instances), *places)
        path = out.with_name(f"{out.stem}_{re.sub(r'[^A-Za-z0-9.-]+', '_', network)}.geojson")
        write_features(path, tiles_of(*where, of_tile=of_tile) + sparse_tokens(attention, *where))
        print(f"Wrote {path} for QuPath.")
        rows += [(network, *corner, *values)
                 for corner, values in zip(crops.corners.tolist(), zip(*of_tile.values()))]
    label = "training slide (no labels)"
    if found.labels:
        label = f"{found.labels[name]['label']}, {args.part} part"
    shared.save_both(draw_maps(picture.pixels, maps, f"{name}, {label}"), rows, out)
    return 0


def main(argv=None):
    return run_script("heatmap", lambda: run(arguments(argv)), "--pixels")


if __name__ == "__main__":
    sys.exit(main())
