"""Attention over whole slides: of the encoder's tokens (4.2) and of DSMIL's instances (3.6).

    python -m experiments.figures.heatmap --checkpoint Baseline=RUN DiRL=RUN [--data demo] [--slide NAME]

Writes a picture, a CSV with a line per tile, and for each network a .geojson that QuPath opens (drag it onto
the open slide): tiles as annotations with their measurements, tokens of the two sparse bins as detections.
DSMIL is trained here on the training slides' features, which eval.py writes; without them its map is skipped.
"""
import re
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import mil
from common import classify
from common.bags import labelled, read_bags
from common.encoders import attention_of, in_batches
from common.errors import InputError, run_script
from common.export import feature, square, write_features
from common.figures import BINS, BRIGHTEST, HEAT, add_scale
from common.flags import between, whole
from experiments.figures import shared
from wsi.cache import tile_info, tile_side
from wsi.slides import Slide

SPARSE = {"attention 0 to 0.5": (68, 1, 84), "attention over 2": (253, 231, 37)}  # the ends of viridis
TOKENS = [f"tokens {interval}" for interval in BINS]


def arguments(argv):
    parser, add = shared.parser_of("figures.heatmap", "Heat maps of attention over a slide, and for QuPath.")
    shared.add_networks(add)
    add("--slide", help="name of the slide; default: the first of --part")
    add("--pixels", type=whole(50, 20_000), default=900,
        help="longer side of the slide's picture; more for print")
    add("--repeats", type=whole(0, 1000), default=3,
        help="DSMIL trainings, whose attention is averaged; 0: no DSMIL")
    add("--epochs", type=whole(), default=200, help="DSMIL epochs, as in eval.py")
    add("--mil-weight-decay", type=between(0, 10), default=5e-2,
        help="DSMIL's weight decay, as in eval.py; with few slides a high one evens out the attention")
    add("--standardize", action="store_true",
        help="standardise features before DSMIL, as eval.py does on the demo")
    add("--out", help="the picture; default: runs/heatmap_<slide>.png")
    args = parser.parse_args(argv)
    shared.check_flags(args)
    return args


# ---------------------------------------------------------------- from tiles to a picture

def stitch(values, corners, side, unit, shape):
    """Returns the values (N, n) of N tiles' n = g x g tokens as a picture (h, w), NaN outside of the tiles.

    corners (N, 2) as x, y and side: the tiles in level-0 px; unit: level-0 px that a px of the picture spans.
    A px takes the value of the token that its middle lies in. n = 1: one value per tile.
    """
    out = np.full(shape, np.nan, np.float32)
    grid = int(values.shape[1] ** 0.5)
    for tile, corner in zip(np.reshape(values, (-1, grid, grid)), corners):
        axes = []
        for low, size in zip(corner, shape[::-1]):  # x, then y
            first, end = (int(np.ceil(edge / unit - 0.5)) for edge in (low, low + side))
            px = np.arange(max(0, first), min(size, end))
            axes.append((px, np.clip((((px + 0.5) * unit - low) / side * grid).astype(int), 0, grid - 1)))
        (x, column), (y, row) = axes
        out[np.ix_(y, x)] = tile[np.ix_(row, column)]
    return out


def write_geojson(path, attention, corners, side, bounds, of_tile):
    """Writes a slide's attention for QuPath: tiles as annotations, tokens of a sparse bin as detections.

    attention (N, n); corners (N, 2), side and bounds: the tiles and the corner of QuPath's picture in level-0
    px; of_tile: {measurement: (N,)}. QuPath (0.4 and later) reads measurements as an object.
    """
    grid = int(attention.shape[1] ** 0.5)
    features = []
    for k, corner in enumerate(corners):
        measured = {name: round(float(values[k]), 6) for name, values in of_tile.items()}
        features.append(feature("annotation", "Polygon", square(corner - bounds, side),
                                name=f"tile {corner[0]},{corner[1]}", measurements=measured))
        for name, sparse in zip(SPARSE, (attention[k] < 0.5, attention[k] > 2)):
            for token in np.flatnonzero(sparse):
                at = corner - bounds + np.array([token % grid, token // grid]) * side / grid
                features.append(feature(
                    "detection", "Polygon", square(at, side / grid),
                    classification={"name": name, "color": SPARSE[name]},
                    measurements={"aggregated attention": round(float(attention[k, token]), 4)}))
    write_features(path, features)


# ---------------------------------------------------------------- DSMIL

def dsmil_attention(found, encoder_path, folder, name, corners, args):
    """Returns DSMIL's attention (N,) to a slide's N tiles for its class; the mean of --repeats trainings.

    Trains on the training part, validates on the validation part. Without features it prints a line and
    returns None; InputError if they belong to other tiles than corners (N, 2). folder: of features/.
    """
    if not args.repeats or not found.labels:
        return None
    try:
        bags = read_bags(folder, dict.fromkeys([*found.split("train", "val"), name]), encoder_path)
    except InputError as error:
        print(f"skipped: DSMIL: {error}")
        return None
    train, val = (labelled(bags, found.split(part), found, args.device) for part in ("train", "val"))
    if name not in bags or not np.array_equal(bags[name]["coords"], corners) or not train or not val:
        raise InputError(f"{folder}/features: lacks {name} or has it with other tiles, or lacks all "
                         "training or all validation slides; "
                         f"python eval.py --checkpoint {encoder_path}")
    splits = {"train": train, "val": val, "slide": labelled(bags, [name], found, args.device)}
    if args.standardize:
        splits = classify.standardize(splits)
    features, label = splits["slide"][0]
    attention = []
    for seed in tqdm(range(args.repeats), "DSMIL", leave=False):
        model = mil.train_dsmil(splits["train"], splits["val"], len(found.classes), args.epochs,
                                seed=seed, weight_decay=args.mil_weight_decay)
        with torch.no_grad():
            attention.append(model(features)[2][:, label].cpu().numpy())
    return np.mean(attention, 0)


# ---------------------------------------------------------------- the picture

def draw(picture, maps, title):
    """Returns the slide next to each network's maps over it: {network: {title: (h, w) in even shares}}."""
    columns = 1 + max(map(len, maps.values()))
    height = 4 * picture.shape[0] / picture.shape[1]
    figure = Figure(figsize=(4 * columns, (height + 0.35) * len(maps) + 0.8), layout="constrained")
    axes = figure.subplots(len(maps), columns, squeeze=False)
    for line, (network, of_network) in zip(axes, maps.items()):
        for axis in line:
            axis.imshow(picture)
            axis.set_axis_off()
        line[0].set_title(title, fontsize=9)
        for axis, (map_title, values) in zip(line[1:], of_network.items()):
            shown = axis.imshow(values, HEAT, alpha=0.65, vmin=0, vmax=BRIGHTEST, interpolation="nearest")
            axis.set_title(f"{network}: {map_title}", fontsize=9)
    add_scale(figure, shown, "attention (even share: 1)", "max", ax=axes, location="bottom", shrink=0.4,
              aspect=30)
    return figure


def run(args):
    encoders, files, found, names = shared.open_all(args, with_cells=False)
    name = args.slide or names[0]
    if found.kind != "slides" or name not in names:
        raise InputError(f"--slide {name}: not a slide in the {args.part} part of {found.source}; see --part")
    crops = shared.crops_of(found, [name], args, with_cells=False)
    images = shared.images_of(crops, range(len(crops)))
    info = tile_info(found, name)
    side = tile_side(info)
    slide = Slide(found.images[name], said_mpp=info["slide_mpp"])
    picture, unit = slide.picture(max(info["width"], info["height"]) * slide.mpp / args.pixels)
    shape = picture.shape[:2]
    out = Path(args.out or f"runs/heatmap_{name}.png")
    maps = {}  # {network: {title: (h, w)}}
    for_qupath = {}  # {path: (attention, {measurement: (N,)})}
    rows = [("network", "x", "y", *TOKENS, "DSMIL")]
    for network, encoder in encoders.items():
        attention = in_batches(lambda x: attention_of(encoder, x), images, 64, network).numpy()
        low = (attention < 0.5).mean(1)
        high = (attention > 2).mean(1)
        of_tile = dict(zip(TOKENS, (low, 1 - low - high, high)))
        maps[network] = {"aggregated attention": stitch(attention, crops.corners, side, unit, shape)}
        instances = dsmil_attention(found, *files[network], name, crops.corners, args)
        if instances is not None:
            of_tile["DSMIL"] = instances
            maps[network]["DSMIL's attention"] = stitch(
                instances[:, None] * len(instances), crops.corners, side, unit, shape)
        path = out.with_name(f"{out.stem}_{re.sub(r'[^A-Za-z0-9.-]+', '_', network)}.geojson")
        for_qupath[path] = attention, of_tile
        rows += [(network, *corner, *values)
                 for corner, values in zip(crops.corners.tolist(), zip(*of_tile.values()))]
    label = "training slide (no labels)"
    if found.labels:
        label = f"{found.labels[name]['label']}, {args.part} part"
    shared.save_both(draw(picture, maps, f"{name}, {label}"), rows, out)
    for path, (attention, of_tile) in for_qupath.items():
        write_geojson(path, attention, crops.corners, side, slide.bounds, of_tile)
    print(f"For QuPath, next to it: {', '.join(path.name for path in for_qupath)}.")
    return 0


def main(argv=None):
    return run_script("heatmap", lambda: run(arguments(argv)), "--pixels")


if __name__ == "__main__":
    sys.exit(main())
