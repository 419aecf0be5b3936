"""The pathologist's outlines of regions (Fig. 12), from GeoJSON as QuPath exports annotations."""
from collections import Counter

import numpy as np

from common.errors import InputError, one_line, printable
from wsi.cache import tile_info
from wsi.cell_files import match_files
from wsi.cells import cell_format, find_place, json_members
from wsi.slides import CROP

# Words in the name of a class, in lower case; QuPath's own classes are Tumor, Immune cells and Necrosis.
REGIONS = {"tumor": "tumour", "tumour": "tumour", "lymph": "lymphocytes", "immune": "lymphocytes",
           "necro": "necrosis"}
CELLS = ("cell", "detection", "PathCellObject", "PathDetectionObject")  # QuPath's types since 0.3 and in 0.2


def rings_of(geometry):
    """Returns the outlines of a GeoJSON geometry, holes too: lists of points; [] if it is no polygon."""
    if geometry["type"] == "Polygon":
        return geometry["coordinates"]
    if geometry["type"] == "MultiPolygon":
        return [ring for rings in geometry["coordinates"] for ring in rings]
    return []


def read_outlines(path, bounds):
    """Returns [(region, its outline (K, 2) in level-0 px), ...] of a GeoJSON; region: of REGIONS.

    bounds: where QuPath's picture of the slide begins, in level-0 px. Cells are ignored; annotations of other
    classes, and without an outline, are named in a warning. InputError if the file cannot be read.
    """
    outlines = []
    others = Counter()
    if cell_format(path) != "geojson":
        raise InputError(f"{path}: is not GeoJSON; export the annotations of QuPath as GeoJSON")
    try:
        for feature in json_members(path, "geojson", find_place(path, "geojson")):
            properties = feature.get("properties") or {}
            kinds = (properties.get("objectType"), properties.get("object_type"), feature.get("id"))
            if any(kind in CELLS for kind in kinds):
                continue
            classification = properties.get("classification") or {}
            name = classification.get("name") or "no class"
            region = next((region for word, region in REGIONS.items() if word in name.lower()), None)
            rings = rings_of(feature["geometry"])
            if region is None or not rings:
                others[name] += 1
                continue
            outlines += [(region, np.array(ring, np.float64)[:, :2] + bounds) for ring in rings]
    except Exception as error:  # ijson raises many types for a broken file
        raise InputError(f"{path}: outlines cannot be read ({one_line(error)}); export them again") from None
    if others:
        names = ", ".join(f"{name} ({number})" for name, number in others.items())
        print(printable(f"warning: {path}: annotations that are not drawn: {names}; only polygons whose "
                        f"class names one of {', '.join(REGIONS)} are drawn"))
    return outlines


def outlines_of(folder, found, crops, chosen):
    """Returns for each of the chosen crops [(region, its outline (K, 2) in px of the crop), ...].

    folder: with a GeoJSON for each slide, named after it.
    """
    if not folder.is_dir():
        raise InputError(f"--outlines {folder}: a folder with <slide>.geojson is expected")
    if found.kind != "slides":
        raise InputError(f"--outlines {folder}: {found.source} holds ready-cut crops; slides are needed")
    files, _ = match_files(folder, found.images)
    of_slide = {}
    for name in dict.fromkeys(crops.owner[i] for i in chosen):
        if name in files:
            of_slide[name] = read_outlines(files[name][0], tile_info(found, name)["bounds"])
        else:
            print(printable(f"warning: --outlines {folder}: no GeoJSON is named after {name}"))
    of_crops = []
    for i in chosen:
        name = crops.owner[i]
        scale = CROP / tile_info(found, name)["side"]
        of_crops.append([])
        for region, outline in of_slide.get(name, []):
            xy = (outline - crops.corners[i]) * scale
            if (xy.max(0) > 0).all() and (xy.min(0) < CROP).all():
                of_crops[-1].append((region, xy))
    if not any(of_crops):
        print(f"warning: --outlines {folder}: no outline is in these crops; --show names others")
    return of_crops
