"""Exports: features in the layouts of CLAM's and DSMIL's code; tiles, cells and attention for QuPath."""
import json
import re
from itertools import zip_longest
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

from common.bags import SPLITS
from common.errors import InputError
from common.files import atomic_write, read_npz, save_tensors, write_csv


def is_newer(path, features):
    """Whether an export exists and is newer than the features file that it is made from."""
    return path.is_file() and path.stat().st_mtime_ns >= features.stat().st_mtime_ns


# ---------------------------------------------------------------- CLAM

def coords_attributes(name, info):
    """The attributes of "coords" in an h5 file with which CLAM and TRIDENT cut the same tile again.

    CLAM reads patch_size px of patch_level; TRIDENT patch_size x level0_magnification / target_magnification
    px of level 0, which is patch_size_level0, with whole magnifications (40 for 0.2525 um/px). A tile's side
    in level-0 px is right for both if the level is 0 and the magnifications are equal; TRIDENT's encoders
    then scale the tile to their input. Neither reads mpp, the um/px that our encoder saw, or level0_mpp.
    """
    side = round(info["side"])
    size = (info["width"], info["height"])
    magnification = max(1, round(10 / info["slide_mpp"]))
    return {"name": name, "patch_level": 0, "patch_size": side, "downsample": (1.0, 1.0), "level_dim": size,
            "downsampled_level_dim": size, "patch_size_level0": side, "overlap": 0, "level0_width": size[0],
            "level0_height": size[1], "level0_magnification": magnification,
            "target_magnification": magnification, "mpp": info["mpp"], "level0_mpp": info["slide_mpp"]}


def warn_of_numbers(names):
    """Warns if CLAM would read the slides' names as numbers: pandas does if all names in a column look so."""
    if all(re.fullmatch(r"\d+(\.\d+)?", name) for name in names):
        print(f"warning: --export clam: all slides are named by digits ({names[0]}), which CLAM reads as "
              "numbers: leading zeros are lost, and splits of unequal length fail; rename the slides, with a "
              "letter in front")


def export_clam(found, folder, infos, out):
    """Writes CLAM's layout: its features directory, dataset CSV and splits.

    pt_files/<slide>.pt, a tensor (N, d); h5_files/<slide>.h5, features and coords (level-0 px); with labels
    also dataset_csv/<data>.csv and splits/<data>/splits_0.csv and splits_0_bool.csv.
    infos: {slide: tile_info} of those that have features in folder.
    """
    for name, info in tqdm(infos.items(), "clam, slides", leave=False):
        source = folder / f"{name}.npz"
        pt = out / "pt_files" / f"{name}.pt"
        if not is_newer(pt, source):
            save_tensors(pt, torch.from_numpy(read_npz(source, "features")["features"]))
        h5 = out / "h5_files" / f"{name}.h5"
        if not is_newer(h5, source):
            bag = read_npz(source, "features", "coords")
            with atomic_write(h5) as temp, h5py.File(temp, "w") as file:
                file["features"] = bag["features"]
                file["coords"] = bag["coords"]
                file["coords"].attrs.update(coords_attributes(name, info))
    rows = {name: found.labels[name] for name in sorted(infos) if name in found.labels}
    if rows:
        warn_of_numbers(list(rows))
        write_clam_tables(found.name, rows, out)


def write_clam_tables(data, rows, out):
    """Writes CLAM's dataset CSV and splits of a data set; rows: {slide: {"label", "patient", "split"}}."""
    dataset = [("case_id", "slide_id", "label")]
    is_in = [("", *SPLITS)]
    for name, row in rows.items():
        dataset.append((row["patient"], name, row["label"]))
        is_in.append((name, *[row["split"] == split for split in SPLITS]))
    columns = [[name for name, row in rows.items() if row["split"] == split] for split in SPLITS]
    lines = [(i, *line) for i, line in enumerate(zip_longest(*columns, fillvalue=""))]
    write_csv(out / "dataset_csv" / f"{data}.csv", dataset)
    write_csv(out / "splits" / data / "splits_0.csv", [("", *SPLITS), *lines])
    write_csv(out / "splits" / data / "splits_0_bool.csv", is_in)


# ---------------------------------------------------------------- DSMIL

def export_csv(found, folder, names, out):
    """Writes the bags of slides for the datasets/ folder of DSMIL's code.

    <data>/<class>/<slide>.csv has a row per crop and a column per feature; <data>/<data>.csv has each bag's
    path and the number of its class (in the order of the classes' names).
    """
    index = [("path", "label")]
    for name in tqdm(names, desc="csv, slides", leave=False):
        source = folder / f"{name}.npz"
        label = found.labels[name]["label"]
        path = Path(found.name, re.sub(r"[^\w.-]+", "_", label), f"{name}.csv")
        if not is_newer(out / path, source):
            features = read_npz(source, "features")["features"]
            header = ",".join(map(str, range(features.shape[1])))
            with atomic_write(out / path) as temp:  # nine digits keep every float32 exactly
                np.savetxt(temp, features, "%.9g", ",", header=header, comments="")
        index.append((f"datasets/{path.as_posix()}", found.classes.index(label)))
    write_csv(out / found.name / f"{found.name}.csv", index)


# ---------------------------------------------------------------- QuPath

# QuPath's px are level-0 px from the upper left corner of the picture that it shows (Slide.bounds).

SPARSE = {"attention 0 to 0.5": (68, 1, 84), "attention over 2": (253, 231, 37)}  # the ends of viridis


def square(corner, side):
    """The outline of a tile as GeoJSON's polygon: corner (2,) and side in QuPath's px."""
    return [np.round(corner + side * np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]), 2).tolist()]


def feature(kind, shape, coordinates, **properties):
    """An object of QuPath's GeoJSON, in its px; kind: annotation, detection or tile."""
    return {"type": "Feature", "geometry": {"type": shape, "coordinates": coordinates},
            "properties": {"objectType": kind, **properties}}


def write_features(path, features):
    """Writes objects (feature) as a GeoJSON file, to be dragged onto the open slide."""
    with atomic_write(path) as temp:
        temp.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")


def tiles_of(corners, side, bounds, kind="annotation", of_tile=None):
    """Returns a slide's tiles as objects; corners (N, 2), side and bounds in level-0 px, as in their names.

    kind: annotation, or tile, a detection without a class: measurement maps colour only detections. of_tile:
    {measurement: (N,)}, which QuPath reads as an object since 0.4.
    """
    features = []
    for k, (x, y) in enumerate(corners):
        measured = {name: float(f"{values[k]:.6g}") for name, values in (of_tile or {}).items()}
        outline = square(np.subtract((x, y), bounds), side)
        features.append(feature(kind, "Polygon", outline, name=f"tile {x},{y}", measurements=measured))
    return features


def cells_of(cells, bounds):
    """Returns cells (K, 2) in level-0 px, or None, as objects."""
    places = [] if cells is None else np.round(cells - bounds, 2).tolist()
    return [feature("detection", "Point", place, name="cell") for place in places]


def sparse_tokens(attention, corners, side, bounds):
    """Returns the tokens whose aggregated attention (N, n) is in a sparse bin as objects; see tiles_of."""
    grid = int(attention.shape[1] ** 0.5)
    features = []
    for name, sparse in zip(SPARSE, (attention < 0.5, attention > 2)):
        for tile, token in np.argwhere(sparse):
            at = corners[tile] - bounds + np.array([token % grid, token // grid]) * side / grid
            features.append(feature(
                "detection", "Polygon", square(at, side / grid),
                classification={"name": name, "color": SPARSE[name]},
                measurements={"aggregated attention": round(float(attention[tile, token]), 4)}))
    return features


# ---------------------------------------------------------------- all of --export

def check_export(kinds, found):
    """InputError if a data set lacks what --export needs."""
    if kinds and found.kind == "crops":
        raise InputError(f"--export: {found.source} holds crops and no slides; leave the flag out")
    if "csv" in kinds and not found.labels:
        raise InputError(f"--export csv: DSMIL's bags have labels; write {found.source}/labels.csv "
                         "(slide,label) or use --export clam")


def export_slides(kinds, found, features, infos, read, run):
    """Writes what --export asks for, of slides that have features in a folder, to a run.

    infos: {slide: tile_info}; read(slide): its cells (K, 2) in level-0 px, or None.
    """
    if "clam" in kinds:
        export_clam(found, features, infos, run / "clam")
    if "csv" in kinds:
        export_csv(found, features, [name for name in infos if name in found.labels], run / "csv")
    if "geojson" in kinds:
        for name, info in tqdm(infos.items(), "geojson, slides", leave=False):
            corners = read_npz(features / f"{name}.npz", "coords")["coords"]
            tiles = tiles_of(corners, info["side"], info["bounds"])
            write_features(run / "geojson" / f"{name}.geojson", tiles + cells_of(read(name), info["bounds"]))
