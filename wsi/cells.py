"""Readers of segmentation results (3.2): HoVer-Net, Cellpose, HistomicsTK, QuPath, tiatoolbox and tables.

Centroids are (K, 2) float64, x before y; px i spans i to i + 1, so the centre of the first px is 0.5.
"Level-0 px" are the pixels of a slide at full resolution.
"""
import gzip
import re
import sqlite3
import zipfile
import zlib
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path

import ijson
import numpy as np

from common.errors import InputError, one_line, printable
from common.files import open_bytes, read_csv
from wsi.label_images import TIFF, mask_cells

READERS = 2  # version of the readers; raise it when a file is read as other cells than before
BATCH = 1000  # outlines whose centroids are computed at once
LARGEST_NUCLEUS = 200  # px: 20 um at 0.1 um/px
QUPATH_OTHERS = (  # QuPath's object types other than cells, since 0.3 and in 0.2
    "annotation", "tile", "tmaCore", "tma_core", "root",
    "PathAnnotationObject", "PathTileObject", "TMACoreObject", "PathRootObject")
OTHERS = "annotations or others that are not cells"  # reasons to skip an object
NO_SHAPE = "without a geometry"
CHUNK = 8192  # bytes of JSON parsed at once: with more lists alive, garbage collection would double the time
BOM = b"\xef\xbb\xbf"
SQLITE = b"SQLite format 3\0"
JSON_KINDS = re.compile(rb"""
    (?P<hovernet> "nuc"\s*:\s*\{ ) |
    (?P<histomicstk> "elements"\s*:\s*\[ | "annotation"\s*:\s*\{ ) |
    (?P<geojson> "features"\s*:\s*\[ | "geometry"\s*: | "nucleusGeometry"\s*: | "type"\s*:\s*"Feature )
    """, re.VERBOSE)
PLACES = {  # where the nuclei are, as an ijson prefix; "" is a bare list
    "hovernet": ("nuc",),
    "histomicstk": ("elements", "annotation.elements", "item.elements", "item.annotation.elements"),
    "geojson": ("features", "")}


def cell_format(path):
    """Returns "hovernet", "histomicstk", "geojson", "cellpose", "tiatoolbox", "npz" or "csv".

    The format is recognised by the file's first megabyte, except that a CSV is recognised by its name (.csv,
    .tsv). JSON and CSV may be compressed by gzip. InputError for any other file.
    """
    path = Path(path)
    try:
        with open_bytes(path) as file:
            head = file.read(1 << 20)
    except (gzip.BadGzipFile, zlib.error, EOFError):
        raise InputError(f"{path}: is a corrupt gzip file; export it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); a file of cells is expected") from None
    if head.startswith((b"\x93NUMPY", b"\x89PNG", *TIFF)):
        return "cellpose"
    if head.startswith(SQLITE):
        return "tiatoolbox"
    if head.removeprefix(BOM).lstrip()[:1] in (b"{", b"["):
        found = JSON_KINDS.search(head)
        if found:
            return found.lastgroup
    elif head.startswith(b"PK"):
        return "npz"
    elif head and path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
        return "csv"
    problem = "not a known cell file" if head else "is empty"
    raise InputError(f"{path}: {problem}; use JSON of HoVer-Net or HistomicsTK, GeoJSON (CellViT's "
                     "--geojson), Cellpose's _cp_masks image, tiatoolbox's .db, or .csv or .npz with x and y")


def read_cells(path, slide_mpp=None, slide_size=None, power=None, bounds=(0, 0)):
    """Returns the cells of a slide from a segmentation result, (K, 2) float64 in level-0 px.

    The formats, and how each one's coordinates are converted: docs/data.md, Cells. Of the slide: slide_mpp,
    um/px of level 0; slide_size, its (width, height), to which Cellpose's masks are scaled; power, the
    objective power that it records (HoVer-Net); bounds, where QuPath's picture begins (GeoJSON). InputError
    if the file cannot be read.
    """
    path = Path(path)
    kind = cell_format(path)
    try:
        if kind == "cellpose":
            xy = mask_cells(path, slide_size)
        elif kind == "tiatoolbox":
            xy = store_cells(path)
        elif kind == "npz":
            xy = npz_cells(path)
        elif kind == "csv":
            xy = csv_cells(path)
        else:
            xy = json_cells(path, kind)
        if kind == "hovernet":
            xy = xy * hovernet_scale(path, power, slide_mpp)
        if kind == "geojson":
            xy = xy + bounds
    except InputError:
        raise
    except Exception as error:  # the readers raise many types for a broken file
        raise InputError(f"{path}: cells cannot be read ({one_line(error)}); export them again") from None
    if not np.isfinite(xy).all():
        raise InputError(f"{path}: a coordinate is not a finite number; export the cells again")
    return xy


# ---------------------------------------------------------------- JSON

class JsonSource:
    """An open JSON file for ijson, without its BOM and with null instead of NaN and Infinity.

    NaN and Infinity are not JSON, but QuPath before 0.5 and Python's json write them.
    """

    def __init__(self, file):
        self.file = file
        self.rest = b""
        if file.read(len(BOM)) != BOM:
            file.seek(0)

    def read(self, size):
        """Returns about size bytes, b"" at the end."""
        chunk = self.file.read(size)
        text = self.rest + chunk
        end = text.rfind(b",") + 1  # cutting after a comma splits no word
        if not chunk or not end:
            end = len(text)
        text, self.rest = text[:end], text[end:]
        if b"NaN" in text or b"Infinity" in text:
            text = re.sub(rb"NaN|-?Infinity", b"null", text)  # also within quotes, where it does no harm
        return text


def parse_json(function, path, *prefix):
    """Yields the results of one of ijson's functions (parse, items, kvitems) on the file."""
    with open_bytes(path) as file:
        yield from function(JsonSource(file), *prefix, use_float=True, buf_size=CHUNK)


def hovernet_mag(path):
    """Returns the magnification of HoVer-Net's px; None where "mag" is null or missing (tile mode)."""
    mag = next(parse_json(ijson.items, path, "mag"), None)  # HoVer-Net writes it before the nuclei
    if mag is not None and (type(mag) not in (int, float) or not 0 < mag < 1000):
        raise InputError(f"{path}: \"mag\" is {mag!r:.40}; a magnification such as 40, or null, is expected")
    return mag


def hovernet_scale(path, power, slide_mpp):
    """Returns level-0 px per px of HoVer-Net's centroids, 1 in tile mode.

    In slide mode HoVer-Net resamples the slide from its recorded objective power to "mag". If no power is
    recorded, 10 / slide_mpp is used instead, see wsi.sanity.assumed_power.
    """
    mag = hovernet_mag(path)
    if mag is None:
        return 1
    if power is None and slide_mpp is None:
        raise InputError(f"{path}: its cells are px at {mag:g}x; give the slide's um/px to convert them")
    return (power or 10 / slide_mpp) / mag


def find_place(path, kind):
    """Returns the first of PLACES[kind] where the file has a list (HoVer-Net: an object), or None."""
    start = "start_map" if kind == "hovernet" else "start_array"
    for prefix, event, _ in parse_json(ijson.parse, path):
        if event == start and prefix in PLACES[kind]:
            return prefix
    return None


def json_members(path, kind, place):
    """Yields the nuclei, elements or features one at a time, so that memory does not grow with the file."""
    if kind == "hovernet":
        for _, nucleus in parse_json(ijson.kvitems, path, "nuc"):
            yield nucleus
    elif place is not None:
        yield from parse_json(ijson.items, path, f"{place}.item".removeprefix("."))
    elif "Feature" in parse_json(ijson.items, path, "type"):  # a single feature, without a list
        yield from parse_json(ijson.items, path, "")


def json_cells(path, kind):
    """Returns the cells (K, 2) of a JSON file, in its px; prints the number of objects that are skipped."""
    place = find_place(path, kind)
    if kind == "geojson" and place is not None and is_by_class(path, place):
        return class_cells(path, place)
    counts = Counter()
    xy = centroids_of(cell_outlines(json_members(path, kind, place), kind, counts))
    count = counts.pop("all", 0)
    if counts:
        reasons = " and ".join(f"{number} {reason}" for reason, number in counts.items())
        print(printable(f"skipped: {path}: {counts.total()} of {count} objects, {reasons}"))
    if counts[OTHERS] == count > 0:
        raise InputError(f"{path}: its {count} objects are QuPath's annotations or tiles, not cells; "
                         "export the cells or detections")
    if not len(xy) and (count or place is None):
        raise InputError(f"{path}: looks like {kind}, but has no point and no outline of a cell; "
                         "export the cells again")
    return xy


def cell_outlines(members, kind, counts):
    """Yields the outlines of the members' cells.

    counts: a Counter, to which the number of members is added as "all" and that of skipped ones by reason.
    """
    for member in members:
        counts["all"] += 1
        if kind == "geojson" and not is_cell(member):
            counts[OTHERS] += 1
        elif kind == "geojson" and not cell_shape(member):
            counts[NO_SHAPE] += 1
        else:
            yield from OUTLINES[kind](member)


def centroids_of(outlines):
    """Returns the centroids (K, 2) of an iterable of outlines, without keeping the outlines in memory."""
    xy = [np.zeros((0, 2))]
    outlines = map(np.array, outlines)  # thousands of lists kept alive would start garbage collection often
    while batch := list(islice(outlines, BATCH)):
        xy.append(ring_centroids(batch))
    return np.concatenate(xy)


def element_outlines(element):
    """Returns the outlines (lists of points) of a HistomicsTK element; [] if it is not a cell."""
    if element["type"] == "polyline":
        return [element["points"]]
    if element["type"] in ("point", "rectangle", "ellipse", "circle"):
        return [[element["center"]]]
    return []


def is_cell(feature):
    """Returns whether a GeoJSON feature is a cell or detection of QuPath's, or has no QuPath type at all.

    QuPath writes the type as objectType (0.4 on), object_type (0.3) or the id (0.2), and also reads "type".
    """
    properties = feature.get("properties") or {}
    types = [properties.get(name) for name in ("objectType", "object_type", "type")]
    return not any(name in QUPATH_OTHERS for name in [*types, feature.get("id")])


def cell_shape(feature):
    """Returns the geometry of a GeoJSON feature, preferably of its nucleus; None if it is empty."""
    properties = feature.get("properties") or {}
    shape = feature.get("nucleusGeometry") or properties.get("nucleusGeometry") or feature.get("geometry")
    return shape if shape and shape["coordinates"] else None


def feature_outlines(feature):
    """Returns the outlines (lists of points) of a GeoJSON feature, preferably of its nucleus."""
    shape = cell_shape(feature)
    kind = shape["type"]
    coordinates = shape["coordinates"]
    if kind == "Point":
        return [[coordinates]]
    if kind == "MultiPoint":
        return [[point] for point in coordinates]
    if kind == "Polygon":
        return [coordinates[0]]  # the other rings are holes
    if kind == "MultiPolygon":
        return [rings[0] for rings in coordinates]
    raise ValueError(f"a feature is a {kind}: export the cells alone")


def is_by_class(path, place):
    """Returns whether each feature is an annotation of many points or polygons, a class's cells (CellViT)."""
    item = f"{place}.item".removeprefix(".")
    has_annotations = False
    for prefix, _, value in parse_json(ijson.parse, path):
        if prefix == f"{item}.geometry.type" and value not in ("MultiPoint", "MultiPolygon"):
            return False
        if prefix == f"{item}.properties.objectType":
            if value != "annotation":
                return False
            has_annotations = True
    return has_annotations


def class_cells(path, place):
    """Returns the cells (K, 2) of a file that is_by_class, reading one polygon or point at a time.

    QuPath writes regions of a class in the same way: InputError if most of the area is in polygons larger
    than a nucleus.
    """
    coordinates = f"{place}.item.geometry.coordinates.item".removeprefix(".")
    area = Counter()

    def outlines():
        for shape in parse_json(ijson.items, path, coordinates):
            outline = shape[0] if isinstance(shape[0], list) else [shape]  # a polygon's outer ring; a point
            width, height = np.ptp(np.array(outline)[:, :2], axis=0).tolist()
            kind = "regions" if max(width, height) > LARGEST_NUCLEUS else "nuclei"
            area[kind] += width * height
            yield outline
    xy = centroids_of(outlines())
    if area["regions"] > area["nuclei"]:
        raise InputError(f"{path}: its annotations are regions, not cells; export the cells or detections")
    return xy


OUTLINES = {"hovernet": lambda nucleus: [[nucleus["centroid"]]],  # an outline of one point
            "histomicstk": element_outlines, "geojson": feature_outlines}


def ring_centroids(rings):
    """Returns the centroids (K, 2) of polygons, each a list or array of points [x, y, ..], closed or not.

    The mean of its points is returned for a single point, a polygon without area, and one that crosses itself
    so that its centroid is outside its bounding box. ValueError if a ring has no point or a coordinate is not
    a number.
    """
    count = np.array([len(ring) for ring in rings])
    if not count.all():
        raise ValueError("an outline has no point")
    points = np.concatenate([np.asarray(ring)[:, :2] for ring in rings])
    if points.dtype.kind not in "iuf" or points.shape[1] != 2:
        raise ValueError("a point is not two numbers")
    start = np.cumsum(count) - count
    after = np.arange(1, len(points) + 1)
    after[start + count - 1] = start  # the last point of a ring is followed by its first
    with np.errstate(all="ignore"):  # read_cells refuses coordinates that are not finite
        origin = points[start].astype(np.float64)
        point = points - origin.repeat(count, 0)  # far from 0 the sums would lose their digits
        following = point[after]
        cross = point[:, 0] * following[:, 1] - following[:, 0] * point[:, 1]
        area = np.add.reduceat(cross, start)[:, None]  # twice the signed area
        centroid = np.add.reduceat((point + following) * cross[:, None], start) / (3 * area)
        mean = np.add.reduceat(point, start) / count[:, None]
        low = np.minimum.reduceat(point, start)
        high = np.maximum.reduceat(point, start)
        inside = ((low <= centroid) & (centroid <= high)).all(1, keepdims=True)
        return origin + np.where(inside & (np.abs(area) > 1e-6), centroid, mean)


# ---------------------------------------------------------------- tables

def store_cells(path):
    """Returns the cells (K, 2) of an annotation store, the SQLite file of tiatoolbox.

    It keeps each annotation's centroid, cx and cy, in px of the slide's baseline, which is level 0: since its
    version 2 tiatoolbox scales the nuclei of a whole slide to it. InputError if most of the area is in
    annotations larger than a nucleus, as it is in stores of regions or tiles.
    """
    address = f"{path.resolve().as_uri()}?mode=ro&immutable=1"  # creates no files next to it
    with closing(sqlite3.connect(address, uri=True)) as store:
        store.execute("PRAGMA trusted_schema = OFF")
        rows = store.execute("SELECT cx, cy, area FROM annotations")
        x, y, area = np.fromiter(rows, np.dtype((np.float64, 3))).T
    if area[area > LARGEST_NUCLEUS ** 2].sum() > area.sum() / 2:
        raise InputError(f"{path}: its annotations are regions, not cells; use the store of a nucleus "
                         "segmentor or detector")
    return np.stack([x, y], 1)


def npz_cells(path):
    """Returns the cells (K, 2) of an npz with arrays x and y."""
    if not zipfile.is_zipfile(path):
        raise ValueError("not a whole npz file")
    with np.load(path, allow_pickle=False) as arrays:
        x = arrays["x"]
        y = arrays["y"]
    if x.ndim != 1 or x.shape != y.shape or {x.dtype.kind, y.dtype.kind} - set("iuf"):
        raise ValueError(f"x is {x.dtype} {x.shape}, y {y.dtype} {y.shape}: rows of numbers are needed")
    return np.stack([x, y], 1).astype(np.float64)


def csv_cells(path):
    """Returns the cells (K, 2) of a CSV; InputError without columns x and y, or if one is not a number."""
    names, rows = read_csv(path, only=("x", "y"))
    if "x" not in names or "y" not in names:
        raise InputError(f"{path}: its first line has to name columns x and y (level-0 px); rename them")
    xy = np.zeros((len(rows), 2))
    for i, (line, row) in enumerate(rows):
        try:
            xy[i] = float(row["x"]), float(row["y"])
        except (KeyError, ValueError):
            raise InputError(f"{path}: line {line}: x and y have to be numbers; correct them") from None
    return xy
