"""Readers of segmentation results (3.2): the cells of a slide by HoVer-Net, Cellpose, HistomicsTK, QuPath, or a table.

Centroids are (K, 2) float64, x before y; px i spans i to i + 1, so that the middle of the first px is 0.5. "Level-0
px" are the pixels of a slide at full resolution.
"""
import csv
import gc
import json
import pickle
import re
from collections import Counter
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
import orjson
from PIL import Image

from errors import InputError, one_line

WINDOW = 1 << 20  # characters of a JSON file that are held at once, or about
BAND = 256  # rows of a label image that are counted at once
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and big, both byte orders
JSON_KINDS = re.compile(rb'(?P<hovernet>"nuc"\s*:\s*\{)|(?P<histomicstk>"elements"\s*:\s*\[|"annotation"\s*:\s*\{)|'
                        rb'(?P<geojson>"features"\s*:\s*\[|"(?:nucleusG|g)eometry"\s*:|"type"\s*:\s*"Feature)')
LISTS = {"hovernet": r'"nuc"\s*:\s*\{', "histomicstk": r'"elements"\s*:\s*\[',
         "geojson": r'"features"\s*:\s*\[|\A\s*\['}  # where their nuclei stand


def cell_format(path):
    """"hovernet", "histomicstk", "geojson", "cellpose" or "table" (csv, npz), told by the file's first megabyte.

    A CSV has no mark of its own: it is one where its name ends in .csv or .tsv. InputError for all else.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 20)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); a file of cells is expected") from None
    if head.startswith((b"\x93NUMPY", b"\x89PNG", *TIFF)):
        return "cellpose"
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        found = JSON_KINDS.search(head)
        if found:
            return found.lastgroup
    elif head.startswith(b"PK") or head and path.suffix.lower() in (".csv", ".tsv"):
        return "table"
    raise InputError(f"{path}: {'no cell file that is known here' if head else 'is empty'}; JSON of HoVer-Net or "
                     "HistomicsTK, GeoJSON, Cellpose's _cp_masks image or _seg.npy, .csv or .npz with x and y are read")


def read_cells(path, slide_mpp=None, slide_size=None):
    """Cells of a slide from a segmentation result, (K, 2) float64 in level-0 px; the format is cell_format(path).

    HoVer-Net: with "mag" a number the centroids are px at that magnification and slide_mpp (um/px of level 0)
    converts them, x (10 / slide_mpp) / mag; with "mag" null (tile mode) they are taken as they are.
    HistomicsTK: point, rectangle, ellipse and circle by their center, polyline as a polygon; other elements (heat
    maps, arrows) are passed over. GeoJSON: each point and polygon is a cell, those of a MultiPoint or MultiPolygon
    too; nucleusGeometry counts before geometry; QuPath's annotations would count as well: export the cells alone.
    Cellpose: the centroid of each label, px i spanning i to i + 1; slide_size (width, height of level 0) scales the
    masks of a smaller copy of the slide. Table: x and y in level-0 px. InputError for what cannot be read.
    """
    path, kind = Path(path), cell_format(path)
    collecting = gc.isenabled()
    gc.disable()  # JSON makes tens of millions of small lists, none of them in a circle: a quarter of the time
    try:
        if kind in LISTS:
            xy = _json(path, kind, slide_mpp)
        else:
            xy = _cellpose(path, slide_size) if kind == "cellpose" else _table(path)
    except InputError:
        raise
    except Exception as error:  # whatever a broken file sets off in a reader
        way = "save Cellpose's _cp_masks image instead" if path.suffix == ".npy" else "write them anew"
        raise InputError(f"{path}: cells cannot be read ({one_line(error)}); {way}") from None
    finally:
        if collecting:
            gc.enable()
    if not np.isfinite(xy).all():
        raise InputError(f"{path}: a coordinate is not a finite number; write the cells anew")
    return xy


def json_items(path, lists):
    """Yields ("list", None) for each list that the pattern `lists` opens, ("member", value) for its members, one at a
    time, and at last ("rest", what else the file holds, the lists empty): a file of 1 GB takes a few MB.

    Most members of a window are decoded at once, by orjson: up to the last place that looks as the border between two
    members did. It was one if all before it is whole JSON; where it is not, the members are taken one by one."""
    decode, gap = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*").match
    name = re.compile(r'(?:"(?:[^"\\]|\\.)*"\s*:\s*)?').match  # a list may be an object, whose members have names
    text, at, rest = "", 0, ""  # the window, the place in it, what lies outside the lists
    border = None  # how two members meet, such as ', {"type":'; None: not seen yet in this window, "": used up

    def more():
        nonlocal text, at, border
        chunk = file.read(max(WINDOW, len(text) - at))  # a member longer than the window doubles it
        text, at, border = text[at:] + chunk, 0, None
        return chunk

    with open(path, encoding="utf-8-sig") as file:
        while True:
            start = re.compile(lists).search(text, at)
            if not start and more():
                continue
            rest += text[at: start.end() if start else len(text)]
            if not start:
                break
            at = start.end()
            yield "list", None
            while True:
                at = gap(text, at).end()
                if text[at: at + 1] in ("]", "}"):
                    break
                last, border = text.rfind(border, at) if border else -1, border and ""  # once a window
                with suppress(orjson.JSONDecodeError):
                    for member in orjson.loads(f"[{text[at: last]}]") if last > 0 else ():
                        at = last
                        yield "member", member
                if at == last:
                    continue
                try:
                    member, end = decode(text, name(text, at).end())
                except json.JSONDecodeError as error:
                    if not more():
                        raise ValueError(f"not whole JSON: {error.msg}") from None
                    continue
                if end == len(text) and more():  # a number may go on behind the window
                    continue
                if border is None and start.group().endswith("["):
                    border = text[end: gap(text, end).end() + 9]
                at = end
                yield "member", member
    yield "rest", json.loads(rest)


def _json(path, kind, slide_mpp):
    rings_of = {"hovernet": _nucleus, "histomicstk": _element, "geojson": _feature}[kind]
    xy, rings, count = [], [], Counter()
    for what, value in json_items(path, LISTS[kind]):
        if what == "rest" and kind == "geojson" and not count["list"] and value.get("type") == "Feature":
            what = "member"  # a single one, in no list
        count[what] += 1
        if what == "member":
            rings += rings_of(value)
            if len(rings) > 1000:  # so many at once: a loop over points in Python would take longer than the decoding
                xy.append(ring_centroids(rings))
                rings = []
    xy = np.concatenate([*xy, ring_centroids(rings)])
    if not len(xy) and (count["member"] or not count["list"]):
        raise InputError(f"{path}: looks like {kind}, but no point and no outline is in it; write the cells anew")
    mag = value.get("mag") if kind == "hovernet" else None
    if mag is None:
        return xy
    if type(mag) not in (int, float) or not 0 < mag < 1000:
        raise InputError(f"{path}: its \"mag\" is {mag!r:.40}; a magnification such as 40, or null, is expected")
    if slide_mpp is None:
        raise InputError(f"{path}: its cells are px at {mag:g}x; give the slide's um/px to convert them")
    return xy * (10 / slide_mpp / mag)


def _nucleus(nucleus):
    """The centroid of one of HoVer-Net's nuclei, as an outline of one point."""
    x, y = nucleus["centroid"]
    return [[(x, y)]]


def _element(element):
    """Outlines (lists of points) of an element of a HistomicsTK annotation; [] for kinds that are no cells."""
    if element["type"] == "polyline":
        return [element["points"]]
    return [[element["center"]]] if element["type"] in ("point", "rectangle", "ellipse", "circle") else []


def _feature(feature):
    """Outlines (lists of points) of a GeoJSON feature, of the nucleus before the cell."""
    nucleus = feature.get("nucleusGeometry") or (feature.get("properties") or {}).get("nucleusGeometry")
    shape = nucleus or feature["geometry"]
    kind, xy = shape["type"], shape["coordinates"]
    if kind in ("Point", "MultiPoint"):
        return [[point] for point in ([xy] if kind == "Point" else xy)]
    if kind in ("Polygon", "MultiPolygon"):
        return [rings[0] for rings in ([xy] if kind == "Polygon" else xy)]
    raise ValueError(f"a feature is a {kind}: export the cells alone")


def ring_centroids(rings):
    """Area centroids (K, 2) of polygons, each a list of points [x, y, ..]; a point is its own, and a polygon without
    area or that crosses itself has the mean of its points."""
    if not rings:
        return np.zeros((0, 2))
    flat, count = list(chain.from_iterable(chain.from_iterable(rings))), np.array([len(ring) for ring in rings])
    if len(flat) != 2 * count.sum():  # some have a z
        flat = [value for ring in rings for x, y, *_ in ring for value in (x, y)]
    point = np.array(flat).reshape(-1, 2)
    if point.dtype.kind not in "iuf" or not count.all():
        raise ValueError("a coordinate is no number" if count.all() else "an outline has no point")
    start = np.cumsum(count) - count
    with np.errstate(all="ignore"):  # read_cells tells what is not finite
        point = point.astype(np.float64)
        origin = point[start]  # the sums are taken from here: far from 0 they would lose their digits
        x, y = (point - origin.repeat(count, 0)).T
        last = np.ones(len(x), bool)  # the next point of the last is the first, which lies in the origin
        last[:-1] = False
        last[start[1:] - 1] = True
        after_x, after_y = (np.where(last, 0, np.roll(v, -1)) for v in (x, y))
        cross = x * after_y - after_x * y
        total = lambda v: np.add.reduceat(v, start)
        area, flat_x, flat_y = total(cross), total((x + after_x) * cross), total((y + after_y) * cross)
        xy = np.stack([flat_x, flat_y], 1) / (3 * area[:, None])
        low, high = (np.stack([f.reduceat(v, start) for v in (x, y)], 1) for f in (np.minimum, np.maximum))
        good = (np.abs(area) > 1e-6) & ((low <= xy) & (xy <= high)).all(1)
        return origin + np.where(good[:, None], xy, np.stack([total(x), total(y)], 1) / count[:, None])


def _cellpose(path, slide_size):
    blocks = _label_blocks(path)
    size = next(blocks)
    scale = np.array(slide_size or size) / size
    if min(scale) < 1 or not 0.99 <= scale[0] / scale[1] <= 1.01:
        raise InputError(f"{path}: masks of {size[0]} x {size[1]} px for a slide of {slide_size[0]} x {slide_size[1]}; "
                         "masks of the whole slide are needed, at its size or of a smaller copy")
    return label_centroids(blocks) * scale


def _label_blocks(path):
    """Yields (width, height) of Cellpose's label image, then its blocks for label_centroids."""
    with open(path, "rb") as file:
        head = file.read(4)
    if head == b"\x93NUM":
        masks = _seg_masks(path)
        height, width = masks.shape
        yield width, height
        yield 0, 0, masks
        return
    if head in TIFF:
        import tifffile  # strip by strip: a slide's masks are several GB
        with tifffile.TiffFile(path) as tiff:
            page, series = tiff.pages[0], tiff.series[0]
            if series.ndim != 2 or series.dtype.kind not in "iu":
                raise ValueError(f"an image {series.shape} of {series.dtype}, where a label image is needed")
            if page.compression in (1, 8, 32946) and page.dtype.itemsize > 1:  # none, zlib; the rest is left to Pillow
                yield page.shape[::-1]
                for block, where, (_, height, width, _) in page.segments(maxworkers=1):
                    if block is not None:
                        yield where[2], where[3], block[0, :height, :width, 0]
                return
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # a whole slide is no decompression bomb
    try:
        image = Image.open(path)
        image.load()
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    with image:
        if image.mode not in ("L", "I", "I;16", "I;16B"):
            raise ValueError(f"an image of mode {image.mode}, where a label image is needed")
        if image.mode == "L" and [value for _, value in image.getcolors(2) or ()] == [0, 255]:
            raise ValueError("a mask of 0 and 255, where a label image is needed")
        yield image.size
        for top in range(0, image.height, BAND):
            yield top, 0, np.asarray(image.crop((0, top, image.width, min(top + BAND, image.height))))


def label_centroids(blocks):
    """Centroids (K, 2) of the labels of an image, px i spanning i to i + 1; 0 is background, labels may have gaps.

    blocks: (top, left, labels (h, w)) one after the other, so that the image need not be held whole.
    """
    def added(parts):
        label, *sums = (np.concatenate(part) for part in zip(*parts))
        label, which = np.unique(label, return_inverse=True)
        return label, *(np.bincount(which, v, len(label)) for v in sums)

    parts = [(np.zeros(0, np.uint64), *np.zeros((3, 0)))]
    for top, left, block in blocks:
        for row in range(0, len(block), BAND):
            y, x = np.nonzero(block[row: row + BAND] > 0)
            label = block[row + y, x].astype(np.uint64)
            parts.append(added([(label, np.ones(len(x)), x + left + 0.5, y + row + top + 0.5)]))
            if len(parts) > 1000:
                parts = [added(parts)]
    _, count, x, y = added(parts)
    return np.stack([x / count, y / count], 1)


class Stored:
    """Stands for numpy's arrays, types and scalars while a _seg.npy is unpickled: it keeps what it is given."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state):
        self.state = state


class SegUnpickler(pickle.Unpickler):
    """Imports and calls nothing: the names that numpy pickles arrays with become Stored, any other is refused."""

    def find_class(self, module, name):
        if f"{module}.{name}".replace("._core.", ".core.") in (
                "numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar"):
            return Stored
        raise pickle.UnpicklingError(f"a pickle can run any program, and this one asks for {module}.{name}")


def _seg_masks(path):
    """The label image "masks" of a _seg.npy, which is a pickled dict in an array of one item."""
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        if not header(file)[2].hasobject:
            raise ValueError("no pickled dict, as Cellpose's _seg.npy is")
        _, shape, dtype, by_column, data = SegUnpickler(file).load().state[4][0]["masks"].state
    code = dtype.state[1].strip("|") + dtype.arguments[0]
    if not re.fullmatch("[<>=]?[iu][1248]", code) or type(data) is not bytes:
        raise ValueError("its masks are no whole numbers")
    return np.frombuffer(data, code).reshape(shape, order="F" if by_column else "C")


def _table(path):
    """CSV with columns x and y, or npz with arrays of these names."""
    with open(path, "rb") as file:
        if file.read(2) == b"PK":
            with np.load(path, allow_pickle=False) as arrays:
                x, y = arrays["x"], arrays["y"]
            if x.ndim != 1 or x.shape != y.shape or {x.dtype.kind, y.dtype.kind} - set("iuf"):
                raise ValueError(f"x is {x.dtype} {x.shape}, y {y.dtype} {y.shape}: two rows of numbers are needed")
            return np.stack([x, y], 1).astype(np.float64)
    with open(path, encoding="utf-8-sig", newline="") as file:
        head = file.readline()
        file.seek(0)
        rows = csv.reader(file, delimiter=max(",;\t", key=head.count))
        names = [name.strip().lower() for name in next(rows, [])]
        if names.count("x") != 1 or names.count("y") != 1:
            raise InputError(f"{path}: its first line has to name one column x and one y (level-0 px); rename them")
        x, y = names.index("x"), names.index("y")
        return np.array([(float(row[x]), float(row[y])) for row in rows if row]).reshape(-1, 2)
