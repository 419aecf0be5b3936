"""A run's features for other MIL code (CLAM's and DSMIL's layouts), tiles and cells for QuPath."""
import json
import re
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

from common.files import atomic_write, save_tensors, write_csv


def read_features(path):
    """A slide's features (N, d) as a tensor."""
    with np.load(path, allow_pickle=False) as file:
        return torch.from_numpy(file["features"])


def is_newer(path, features):
    """Is the export there, and newer than the features that it is made from?"""
    return path.is_file() and path.stat().st_mtime_ns >= features.stat().st_mtime_ns


def coords_attributes(name, info):
    """The attributes of "coords" in an h5 file, by which CLAM and TRIDENT both cut the very tile again.

    Both read patch_size, and mean different things by it:

    CLAM: px at patch_level. It reads patch_size px at that level, from coords in level-0 px.
    TRIDENT: px at target_magnification. It reads patch_size x level0_magnification / target_magnification px
    of level 0; its heat maps and slide encoders take patch_size_level0, which is that product. Magnifications
    are whole numbers, 40 for 0.2525 um/px.

    A tile's side in level-0 px is right for both if the level is 0 and the two magnifications are the same:
    TRIDENT's encoders then scale the tile to their own input. Neither client reads mpp, the um/px that our
    encoder saw, and level0_mpp.
    """
    side, size = round(info["side"]), (info["width"], info["height"])
    magnification = max(1, round(10 / info["slide_mpp"]))
    return {"name": name, "patch_level": 0, "patch_size": side, "downsample": (1.0, 1.0), "level_dim": size,
            "downsampled_level_dim": size, "patch_size_level0": side, "overlap": 0, "level0_width": size[0],
            "level0_height": size[1], "level0_magnification": magnification,
            "target_magnification": magnification, "mpp": info["mpp"], "level0_mpp": info["slide_mpp"]}


def has_attributes(path, attributes):
    """Does "coords" of an h5 file have these attributes? Earlier versions wrote others."""
    with h5py.File(path) as file:
        kept = file["coords"].attrs
        return all(name in kept and np.array_equal(kept[name], value) for name, value in attributes.items())


def warn_of_numbers(names):
    """Warns if CLAM would read the slides' names as numbers: pandas does where a whole column looks so."""
    if names and all(re.fullmatch(r"\d+(\.\d+)?", name) for name in names):
        print(f"warning: --export clam: all slides are named by digits ({names[0]}), which CLAM reads as "
              "numbers: leading zeros are lost, and splits of unequal parts fail; rename the slides, with a "
              "letter in front")


def export_clam(found, folder, infos, out):
    """CLAM's layout: its features directory, dataset CSV and splits.

    pt_files/<slide>.pt, a tensor (N, d); h5_files/<slide>.h5, features and coords (level-0 px); with labels
    also dataset_csv/<data>.csv and splits/<data>/splits_0.csv and splits_0_bool.csv.
    infos: {slide: tile_info and "side", a tile's side in level-0 px} of those that have features in folder.
    """
    for name, info in tqdm(infos.items(), "clam, slides", leave=False):
        source = folder / f"{name}.npz"
        pt, h5 = out / "pt_files" / f"{name}.pt", out / "h5_files" / f"{name}.h5"
        if not is_newer(pt, source):
            save_tensors(pt, read_features(source))
        attributes = coords_attributes(name, info)
        if not (is_newer(h5, source) and has_attributes(h5, attributes)):
            with np.load(source, allow_pickle=False) as file, \
                    atomic_write(h5) as temp, h5py.File(temp, "w") as to:
                to["features"], to["coords"] = file["features"], file["coords"]
                to["coords"].attrs.update(attributes)
    rows = {name: found.labels[name] for name in sorted(infos) if name in found.labels}
    if not rows:
        return
    warn_of_numbers(list(rows))
    write_csv(out / "dataset_csv" / f"{found.name}.csv", [("case_id", "slide_id", "label")] + [
        (row["patient"], name, row["label"]) for name, row in rows.items()])
    parts = ("train", "val", "test")
    columns = [[name for name, row in rows.items() if row["split"] == part] for part in parts]
    lines = [[column[i] if i < len(column) else "" for column in columns]
             for i in range(max(map(len, columns)))]
    splits = out / "splits" / found.name
    write_csv(splits / "splits_0.csv", [("", *parts)] + [(i, *line) for i, line in enumerate(lines)])
    write_csv(splits / "splits_0_bool.csv", [("", *parts)] + [
        (name, *(row["split"] == part for part in parts)) for name, row in rows.items()])


def export_csv(found, folder, names, out):
    """DSMIL's bags, for its datasets/ folder.

    <data>/<class>/<slide>.csv has a row per crop and a column per feature; <data>/<data>.csv has each bag's
    path and the number of its class (in the order of the classes' names).
    """
    index = [("path", "label")]
    for name in tqdm(names, desc="csv, slides", leave=False):
        source, label = folder / f"{name}.npz", found.labels[name]["label"]
        path = Path(found.name, re.sub(r"[^\w.-]+", "_", label), f"{name}.csv")
        if not is_newer(out / path, source):
            rows = read_features(source).numpy()
            header = ",".join(map(str, range(rows.shape[1])))
            with atomic_write(out / path) as temp:  # nine digits give back every float32
                np.savetxt(temp, rows, "%.9g", ",", header=header, comments="")
        index.append((f"datasets/{path.as_posix()}", found.classes.index(label)))
    write_csv(out / found.name / f"{found.name}.csv", index)


# ---------------------------------------------------------------- QuPath

# QuPath's px are level-0 px that count from the corner of the picture it shows: level-0 px - Slide.bounds.

def square(corner, side):
    """The outline of a tile as GeoJSON's polygon: corner (2,) and side in QuPath's px."""
    return [np.round(corner + side * np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]), 2).tolist()]


def feature(kind, shape, coordinates, **properties):
    """An object of QuPath's GeoJSON, in its px; kind: annotation or detection."""
    return {"type": "Feature", "geometry": {"type": shape, "coordinates": coordinates},
            "properties": {"objectType": kind, **properties}}


def write_features(path, features):
    with atomic_write(path) as temp:
        temp.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")


def export_geojson(path, corners, info, cells):
    """Writes tiles and cells of a slide for QuPath (drag the file onto the open slide).

    corners (N, 2): the tiles' upper left corners, which become annotations; cells (K, 2) or None: detections;
    both in level-0 px, as the tiles' names are.
    """
    features = []
    for x, y in np.asarray(corners):
        outline = square(np.subtract((x, y), info["bounds"]), info["side"])
        features.append(feature("annotation", "Polygon", outline, name=f"tile {x},{y}"))
    places = [] if cells is None else np.round(cells - info["bounds"], 2).tolist()
    features += [feature("detection", "Point", place, name="cell") for place in places]
    write_features(path, features)
