"""Tests of wsi/cells.py: readers of segmentation results."""
import gzip
import json
import pickle
import sqlite3
import tracemalloc
from contextlib import closing

import numpy as np
import pytest
import tifffile
from PIL import Image
from synthetic import Evil, prepared, write

from common.errors import InputError
from wsi import cells, label_images

SQUARE = [[10, 20], [14, 20], [14, 26], [10, 26], [10, 20]]  # its centroid is (12, 23)
ELL = [[0, 0], [4, 0], [4, 1], [1, 1], [1, 3], [0, 3]]  # two rectangles: (2, .5) of 4 and (.5, 2) of 2


def refused(path, **named):
    """The error of read_cells, which has to be one line that names the file."""
    with pytest.raises(InputError) as error:
        cells.read_cells(path, **named)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600 and path.name in message
    return message


# ---------------------------------------------------------------- JSON

@pytest.fixture(params=[1, 64, 8192])
def chunk(request, monkeypatch):
    """Chunks so small that names, numbers and brackets are cut."""
    monkeypatch.setattr(cells, "CHUNK", request.param)


NUC = {"7": {"bbox": [[0, 0], [9, 9]], "centroid": [10.5, 20], "contour": SQUARE, "type": 1},
       "12": {"bbox": [[0, 0], [9, 9]], "centroid": [1.25e1, 3], "contour": SQUARE, "type": None}}
ODD = {"a": {"mag": ["}"]}, "mag": 40, "nuc": NUC, "z": "\"nuc\":{\\"}


@pytest.mark.parametrize("text", [
    json.dumps({"mag": 40, "nuc": NUC}), json.dumps({"nuc": NUC, "mag": 40.0}),
    "\ufeff" + json.dumps(ODD).replace(": ", "\t:\r\n")])
def test_hovernet_in_slide_mode_is_converted_wherever_mag_stands(tmp_path, chunk, text):
    path = write(tmp_path / "s.json", text)
    assert cells.cell_format(path) == "hovernet"
    np.testing.assert_allclose(cells.read_cells(path, slide_mpp=0.5), [[5.25, 10], [6.25, 1.5]])
    np.testing.assert_allclose(cells.read_cells(path, slide_mpp=0.25), [[10.5, 20], [12.5, 3]])
    assert "um/px" in refused(path)


def test_hovernet_tile_mode_empty_and_ids_twice(tmp_path):
    path = write(tmp_path / "s.json", {"mag": None, "nuc": NUC})
    np.testing.assert_allclose(cells.read_cells(path, 0.5), [[10.5, 20], [12.5, 3]])
    assert cells.read_cells(write(path, '{"mag": null, "nuc": {}}')).shape == (0, 2)
    assert cells.read_cells(write(path, '{"nuc": { }, "mag": 40}'), 0.25).shape == (0, 2)
    twice = '{"nuc": {"1": {"centroid": [1, 2]}, "1": {"centroid": [3, 4]}}}'
    assert cells.read_cells(write(path, twice)).tolist() == [[1, 2], [3, 4]]


ELEMENTS = [{"type": "rectangle", "center": [5.5, 6, 0], "width": 3, "height": 3, "rotation": 0},
            {"type": "polyline", "points": [p + [0] for p in SQUARE[:4]], "closed": True, "group": "nuc"},
            {"type": "heatmap", "points": [[1, 2, 0, 9]]}, {"type": "rectanglegrid", "center": [1, 1, 0]},
            {"type": "arrow", "points": [[1, 2, 0], [3, 4, 0]]}, {"type": "point", "center": [7, 8, 0]}]


@pytest.mark.parametrize("wrap", [
    lambda e: {"name": "nuclei", "elements": e, "description": ""},
    lambda e: {"_id": 3, "annotation": {"name": "n", "attributes": {"a": {}}, "elements": e}},
    lambda e: [{"annotation": {"elements": e[:3]}}, {"annotation": {"elements": e[3:]}}],
    lambda e: [{"elements": []}, {"elements": e}]])
def test_histomicstk_bare_under_annotation_and_in_a_list(tmp_path, chunk, wrap):
    path = write(tmp_path / "s.json", wrap(ELEMENTS))
    assert cells.cell_format(path) == "histomicstk"
    np.testing.assert_allclose(cells.read_cells(path, 0.25), [[5.5, 6], [12, 23], [7, 8]])
    assert cells.read_cells(write(path, wrap([]))).shape == (0, 2)


def shape(kind, coordinates):
    return {"type": kind, "coordinates": coordinates}


def feature(geometry, **more):
    return {"type": "Feature", "id": "ü \"{[", "geometry": geometry, "properties": {"type": "cell"}, **more}


FEATURES = [
    feature(shape("Polygon", [SQUARE, [[11, 21], [12, 21], [12, 22]]])), feature(shape("Point", [3, 4])),
    feature(shape("MultiPoint", [[5, 6], [7, 8, 0]])), feature(shape("MultiPolygon", [[SQUARE, ELL], [ELL]])),
    feature(shape("Polygon", [ELL]), nucleusGeometry=shape("Polygon", [SQUARE])),
    feature(shape("Point", [0, 0]), properties={"nucleusGeometry": shape("Point", [9, 9])}),
    feature(shape("Point", [1, 1]), properties=None, nucleusGeometry=None)]
POINTS = [[12, 23], [3, 4], [5, 6], [7, 8], [12, 23], [1.5, 1], [12, 23], [9, 9], [1, 1]]


@pytest.mark.parametrize("wrap", [
    lambda f: f, lambda f: {"features": f, "crs": {"type": "name"}, "type": "FeatureCollection"}])
def test_geojson_collections_and_bare_lists(tmp_path, chunk, monkeypatch, wrap):
    monkeypatch.setattr(cells, "BATCH", 3)
    path = write(tmp_path / "s.geojson", wrap(FEATURES))
    assert cells.cell_format(path) == "geojson"
    np.testing.assert_allclose(cells.read_cells(path), POINTS)


def test_geojson_single_feature_and_empty_collection(tmp_path):
    for one, want in ((FEATURES[2], POINTS[2:4]), ({"type": "FeatureCollection", "features": []}, [])):
        found = cells.read_cells(write(tmp_path / "s.json", one))
        np.testing.assert_allclose(found, np.reshape(want, (-1, 2)))


def test_measurements_that_are_not_finite_do_not_matter(tmp_path, monkeypatch):
    """QuPath before 0.5 writes them as bare words; as a coordinate they are refused (below)."""
    values = {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": "NaN, NaN"}
    one = feature(shape("Point", [1, 2]), properties={"measurements": values})
    path = write(tmp_path / "s.json", [one] * 30)
    assert ": NaN" in path.read_text() and ": -Infinity" in path.read_text()
    for size in range(60, 80):  # so that chunks end in every letter of the words
        monkeypatch.setattr(cells, "CHUNK", size)
        assert cells.read_cells(path).tolist() == [[1, 2]] * 30


@pytest.mark.parametrize("kept, skipped, typed", [
    (("PathCellObject", "PathDetectionObject"),
     ("PathAnnotationObject", "PathTileObject", "TMACoreObject", "PathRootObject"),
     lambda kind: {"id": kind, "properties": {"isLocked": False}}),  # QuPath 0.2
    (("cell", "detection"), ("annotation", "tile", "tma_core", "root"),
     lambda kind: {"id": "x", "properties": {"object_type": kind, "isLocked": False}}),  # 0.3
    (("cell", "detection"), ("annotation", "tile", "tmaCore", "root"),
     lambda kind: {"id": "7f1c", "properties": {"objectType": kind}}),  # 0.4 on
    (("cell", "detection", "tumor"), ("annotation", "tile"), lambda kind: {"properties": {"type": kind}})])
def test_qupath_objects_that_are_no_cells_are_skipped(tmp_path, capsys, kept, skipped, typed):
    features = [feature(shape("Point", [x, 1]), **typed(kind)) for x, kind in enumerate(kept + skipped)]
    path = write(tmp_path / "s.geojson", features)
    assert cells.read_cells(path).tolist() == [[x, 1] for x in range(len(kept))]
    count = len(skipped)
    says = f"skipped: {path}: {count} of {len(features)} objects, {count} annotations or others"
    assert capsys.readouterr().out.startswith(says)
    assert "export the cells" in refused(write(path, features[len(kept):]))


@pytest.mark.parametrize("empty", [{"geometry": None}, {"geometry": shape("Polygon", [])}])
def test_a_feature_without_a_geometry_costs_itself(tmp_path, capsys, empty):
    features = [feature(shape("Point", [3, 4])), feature(None) | empty,
                feature(shape("Point", [0, 0]), properties={"objectType": "annotation"}),
                feature(None, nucleusGeometry=shape("Point", [5, 6]))]
    path = write(tmp_path / "s.geojson", features)
    assert cells.read_cells(path).tolist() == [[3, 4], [5, 6]]
    out = capsys.readouterr().out
    assert "2 of 4 objects, 1 without a geometry and 1 annotations" in out and out.count("\n") == 1


def cellvit(kind, cells_of):
    """A file of CellViT: an annotation for each class, of all its cells."""
    return [{"type": "Feature", "id": f"5d9a-{name}", "geometry": shape(kind, parts), "properties": {
        "objectType": "annotation", "classification": {"name": name, "color": [255, 0, 0]}}}
        for name, parts in cells_of.items()]


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: {"type": "FeatureCollection", "features": f}])
def test_cellvit_contours_and_centroids_of_each_class(tmp_path, chunk, wrap, capsys):
    ell = ELL + [ELL[0]]
    path = write(tmp_path / "cells.geojson",
                 wrap(cellvit("MultiPolygon", {"Neoplastic": [[SQUARE], [ell]], "Dead": [[SQUARE]]})))
    np.testing.assert_allclose(cells.read_cells(path), [[12, 23], [1.5, 1], [12, 23]])
    write(path, wrap(cellvit("MultiPoint", {"Neoplastic": [[1.5, 2], [3, 4]], "Dead": [[5, 6.25]]})))
    assert cells.read_cells(path).tolist() == [[1.5, 2], [3, 4], [5, 6.25]]
    assert capsys.readouterr().out == ""


def test_regions_of_a_class_are_not_cells(tmp_path):
    """QuPath writes them as CellViT does its cells; a pixel classifier leaves many specks beside them."""
    region = (np.array(SQUARE) * 100).tolist()
    regions = cellvit("MultiPolygon", {"Tumor": [[SQUARE]] * 50 + [[region]], "Stroma": [[region]]})
    assert "regions" in refused(write(tmp_path / "a.geojson", regions))
    path = write(tmp_path / "b.geojson", regions + [feature(shape("Point", [3, 4]), properties={
        "objectType": "detection"})])
    assert cells.read_cells(path).tolist() == [[3, 4]]  # cells beside annotations


def ring_centroid(ring):
    """One of several, so that the seams between them are tested too."""
    xy = cells.ring_centroids([[[7, 7]], ring, SQUARE])
    np.testing.assert_allclose(xy[[0, 2]], [(7, 7), (12, 23)])
    return xy[1]


def test_ring_centroids_by_hand():
    np.testing.assert_allclose(ring_centroid(SQUARE), (12, 23))
    np.testing.assert_allclose(ring_centroid(SQUARE[:4][::-1]), (12, 23))  # open, and the other way round
    np.testing.assert_allclose(ring_centroid(ELL), (1.5, 1))
    far = np.array([1.5e6, 3e6])
    np.testing.assert_allclose(ring_centroid(ELL + far) - far, (1.5, 1), atol=1e-6)
    np.testing.assert_allclose(ring_centroid([[1, 1], [3, 3], [5, 5]]), (3, 3))
    np.testing.assert_allclose(ring_centroid([[4, 2]]), (4, 2))
    x, y = ring_centroid([[0, 0], [10, 10], [10, 0], [0, 10.5]])  # a bow tie
    assert 0 <= x <= 10 and 0 <= y <= 10.5
    turn = np.linspace(0, 2 * np.pi, 200)
    ellipse = np.stack([50 + 8 * np.cos(turn), 70 + 6 * np.sin(turn)], 1)
    np.testing.assert_allclose(ring_centroid(ellipse), (50, 70))


@pytest.mark.parametrize("before, member, after", [
    ('{"mag": null, "nuc": {', '"1": ' + json.dumps({"centroid": [3.5, 2], "contour": SQUARE * 4}), "}}"),
    ('{"features": [', json.dumps(feature(shape("Polygon", [SQUARE * 4]))), "]}"),
    ('[{"geometry": {"type": "MultiPolygon", "coordinates": [', json.dumps([SQUARE * 5]),
     ']}, "properties": {"objectType": "annotation"}}]')])
def test_memory_does_not_grow_with_the_file(tmp_path, before, member, after):
    peaks = []
    for count in (1_000, 4_000):
        path = write(tmp_path / "s.json", before + ", ".join([member] * count) + after)
        tracemalloc.start()
        assert len(cells.read_cells(path)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert path.stat().st_size > 8e5
    assert peaks[1] < peaks[0] + 4_000 * 16 * 2.5, "more than the centroids (16 bytes each)"


# ---------------------------------------------------------------- label images

LABELS = np.zeros((60, 80), np.int64)
LABELS[10:14, 20:30], LABELS[40:41, 70:71], LABELS[50:60, 0:5] = 3, 40_000, 7  # with gaps
CENTRES = [[25, 12], [2.5, 55], [70.5, 40.5]]


def save_by_pillow(path, labels, **options):
    Image.fromarray(labels).save(path, **options)


@pytest.mark.parametrize("name, kind, save, options", [
    ("s_cp_masks.png", np.uint16, save_by_pillow, {}),
    ("s_cp_masks.tif", np.uint32, tifffile.imwrite, dict(compression="zlib", rowsperstrip=7)),
    ("s_cp_masks.tiff", np.uint32, tifffile.imwrite, dict(tile=(16, 32), bigtiff=True)),
    ("s_cp_masks.tif", np.int32, tifffile.imwrite, dict(byteorder=">")),
    ("s_cp_masks.tif", np.uint16, save_by_pillow, dict(compression="tiff_lzw"))])
def test_cellpose_masks_of_16_and_32_bit(tmp_path, monkeypatch, name, kind, save, options):
    path = tmp_path / name
    save(path, LABELS.astype(kind), **options)
    monkeypatch.setattr(label_images, "BAND", 9)
    assert cells.cell_format(path) == "cellpose"
    np.testing.assert_allclose(cells.read_cells(path), CENTRES)
    np.testing.assert_allclose(cells.read_cells(path, slide_size=(80, 60)), CENTRES)
    scaled = cells.read_cells(path, slide_size=(321, 240))
    np.testing.assert_allclose(scaled, np.multiply(CENTRES, [321 / 80, 4]))
    for size in ((160, 60), (160, 117), (40, 30)):  # another shape; 1 % is allowed; larger than the slide
        assert "80 x 60" in refused(path, slide_size=size)


def test_labels_below_0_are_background_and_no_label_is_no_cell(tmp_path):
    np.testing.assert_allclose(label_images.label_centroids(LABELS - (LABELS == 0)), CENTRES)
    assert label_images.label_centroids(LABELS[:0]).shape == (0, 2)
    for kind in (np.uint8, np.uint16):
        tifffile.imwrite(tmp_path / "e_cp_masks.tif", np.zeros((50, 40), kind), compression="zlib")
        assert cells.read_cells(tmp_path / "e_cp_masks.tif").shape == (0, 2)


def test_a_pickled_seg_npy_is_refused_without_being_executed(tmp_path):
    mark = tmp_path / "mark"
    path = tmp_path / "s_seg.npy"
    np.save(path, {"masks": LABELS, "evil": Evil(mark)})
    assert cells.cell_format(path) == "cellpose"
    message = refused(path)
    assert not mark.exists()
    assert "pickle" in message and "--save_tif" in message and "s_cp_masks.tif" in message
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()  # it would have


def test_images_that_are_no_label_images_are_refused(tmp_path):
    mask = Image.fromarray((LABELS > 0).astype(np.uint8) * 255)
    for image in (Image.new("RGB", (9, 9)), Image.new("P", (9, 9)), mask):
        for path in (tmp_path / "s_cp_masks.tif", tmp_path / "s_cp_masks.png"):
            image.save(path)
            assert "label image" in refused(path)
    Image.new("F", (9, 9)).save(tmp_path / "f_cp_masks.tif")
    assert "label image" in refused(tmp_path / "f_cp_masks.tif")
    tifffile.imwrite(tmp_path / "z_cp_masks.tif", np.zeros((3, 9, 9), np.uint16), photometric="minisblack")
    assert "label image" in refused(tmp_path / "z_cp_masks.tif")


def many_cells(count):
    """A label image of that many round cells of 9 px in a square grid, numbered row by row."""
    grid = int(np.ceil(count ** 0.5))
    y, x = np.mgrid[:16, :16] - 8
    cell = x ** 2 + y ** 2 < 20
    numbers = np.arange(1, grid ** 2 + 1).reshape(grid, grid)
    return np.kron(np.where(numbers <= count, numbers, 0), cell)


@pytest.mark.parametrize("overflow", [lambda labels: labels % 256, lambda labels: np.minimum(labels, 255)])
@pytest.mark.parametrize("count", [300, 805, 5000])
def test_masks_of_more_cells_than_8_bits_number_are_refused(tmp_path, overflow, count):
    labels = many_cells(count)
    path = tmp_path / "s_cp_masks.png"
    save_by_pillow(path, labels.astype(np.uint16))
    assert len(cells.read_cells(path)) == count
    save_by_pillow(path, overflow(labels).astype(np.uint8))
    assert all(word in refused(path) for word in ("wrap at 255", "16 bits"))


def test_masks_of_more_cells_than_16_bits_number_are_refused(tmp_path):
    labels = np.kron(np.arange(1, 264 ** 2 + 1).reshape(264, 264), np.pad(np.ones((2, 2), int), 1))
    tifffile.imwrite(tmp_path / "s_cp_masks.tif", (labels % 65536).astype(np.uint16))
    assert "wrap at 65535" in refused(tmp_path / "s_cp_masks.tif")


@pytest.mark.parametrize("kind, count", [(np.uint8, 255), (np.uint16, 805)])
def test_labels_in_two_pieces_are_no_reason_to_refuse(tmp_path, kind, count):
    labels = many_cells(count)
    labels[:, 8::16][labels[:, 8::16] % 7 == 0] = 0  # one in seven is cut in two
    y, x = np.nonzero(labels == 255)
    labels[y[-4:], x[-4:]] = 3  # a piece of another cell, far from its own
    labels[0:2, 30:200] = 4  # a fold
    path = tmp_path / "s_cp_masks.png"
    save_by_pillow(path, labels.astype(kind))
    assert len(cells.read_cells(path)) == count


# ---------------------------------------------------------------- tables

@pytest.mark.parametrize("name, text", [
    ("a.csv", "id;Y;type;X\r\n1;3;t;2.5\r\n2;5;t;4\r\n"), ("a.tsv", "X\ty\n2.5\t3\n\n4\t5"),
    ("a.CSV", "\ufeff\"x\",\"name\",\"y\"\n\"2.5\",\"a,\nb\",\"3\"\n4,c,5\n")])
def test_tables(tmp_path, name, text):
    path = write(tmp_path / name, text)
    assert cells.cell_format(path) == "csv"
    np.testing.assert_allclose(cells.read_cells(path, 0.25, (10, 10)), [[2.5, 3], [4, 5]])


def test_npz_and_a_table_without_rows(tmp_path):
    path = tmp_path / "a.npz"
    mark = tmp_path / "mark"
    np.savez(path, x=np.array([1, 2], np.int32), y=np.array([3, 4.5], np.float32), other=["x"])
    np.testing.assert_allclose(cells.read_cells(path), [[1, 3], [2, 4.5]])
    assert cells.cell_format(path) == "npz"
    assert cells.read_cells(write(tmp_path / "a.csv", "x,y\n")).shape == (0, 2)
    for bad in (dict(x=["1"], y=["2"]), dict(x=[1], y=[1, 2]), dict(x=[1]), dict(x=[[1]], y=[[2]]),
                dict(x=np.array([Evil(mark)]), y=[1]), dict(x=[np.nan], y=[1])):
        np.savez(path, **bad)
        refused(path)
    assert not mark.exists()  # nothing was executed


# ---------------------------------------------------------------- tiatoolbox

def annotation_store(path, rows):
    """Writes rows (cx, cy, area) as tiatoolbox's SQLiteStore does, which keeps a point without geometry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as store, store:
        store.execute("CREATE TABLE metadata (key TEXT UNIQUE, value TEXT)")
        store.execute("CREATE TABLE annotations(id INTEGER PRIMARY KEY, key TEXT UNIQUE, objtype TEXT, "
                      "cx FLOAT NOT NULL, cy FLOAT NOT NULL, geometry BLOB, properties TEXT, "
                      "area FLOAT NOT NULL)")
        for i, (x, y, area) in enumerate(rows):
            store.execute("INSERT INTO annotations VALUES (NULL, ?, 'Polygon', ?, ?, ?, '{}', ?)",
                          (f"key {i}", x, y, b"x" if area else None, area))
    return path


def test_tiatoolboxs_store_has_centroids_in_level_0_px(tmp_path):
    path = annotation_store(tmp_path / "a slide.db", [(2.5, 3, 80), (700, 41.25, 0), (-4, 9, 60)])
    before = path.read_bytes()
    assert cells.cell_format(path) == "tiatoolbox"
    xy = cells.read_cells(path, 0.25, (10, 10), power=40, bounds=(5, 5))  # which change nothing
    assert xy.tolist() == [[2.5, 3], [700, 41.25], [-4, 9]]
    assert [file.name for file in tmp_path.iterdir()] == ["a slide.db"] and path.read_bytes() == before
    assert cells.read_cells(annotation_store(tmp_path / "b.db", [])).shape == (0, 2)
    tiles = annotation_store(tmp_path / "c.db", [(100, 100, 224 ** 2)] * 3 + [(1, 1, 99)])
    assert "regions, not cells" in refused(tiles)
    refused(annotation_store(tmp_path / "d.db", [("west", 3, 80)]))
    for cut in (path.read_bytes()[:5000], path.read_bytes()[:40]):
        refused(write(tmp_path / "e.db", cut))


def test_a_store_in_other_px_than_the_slides_is_warned_of(place, capsys):
    for scale, warned in ((1, 0), (4, 1)):  # good.png is 256 px wide
        path = place / f"in/cells/{'hovernet/' * (scale > 1)}good.db"
        annotation_store(path, [(x * scale, x * scale, 40) for x in range(20, 250, 10)])
        prepared(prior="hovernet" if scale > 1 else "auto")
        assert ("of the cells lie outside of the slide" in capsys.readouterr().out) == warned


# ---------------------------------------------------------------- gzip

@pytest.mark.parametrize("name, content", [
    ("s.json.gz", {"mag": None, "nuc": {"1": {"centroid": [2.5, 3]}}}),
    ("s.geojson.gz", FEATURES[1]), ("S.CSV.GZ", "x,y\n1,2\n"), ("s.tsv.gz", "x\ty\n1\t2\n")])
def test_gzip_is_read_as_the_file_in_it(tmp_path, name, content):
    plain = write(tmp_path / name[:-3], content)
    packed = write(tmp_path / name, gzip.compress(plain.read_bytes()))
    assert cells.cell_format(packed) == cells.cell_format(plain)
    assert cells.read_cells(packed).tolist() == cells.read_cells(plain).tolist() != []
    for damaged in (packed.read_bytes()[:-9], packed.read_bytes()[:12], b"\x1f\x8bno"):
        refused(write(packed, damaged))
    refused(write(packed, gzip.compress(b"\x93NUMPY")))


# ---------------------------------------------------------------- what cannot be read

HOVERNET = ['{}', '{"centroid": ["1", "2"]}', '{"centroid": [1]}', '{"centroid": [NaN, 1]}',
            '{"centroid": [1e999, 1]}']
HISTOMICSTK = ['{"center": [1, 2, 0]}', '{"type": "heatmap"}', '{"type": "polyline", "points": []}',
               '{"type": "polyline", "points": [[NaN, 2], [3, 4], [5, 9]]}']
GEOJSON = ['null', '{"type": "LineString", "coordinates": [[0, 0], [1, 1]]}',
           '{"type": "MultiPoint", "coordinates": []}']


@pytest.mark.parametrize("text", [
    "", " ", "[]", '{"annotation": {"name": "x"}}', '{"type": "FeatureCollection", "features": null}',
    '{"type": "Feature"}', '{"features": [3]}', '[{"nuc": {"1": {"centroid": [1, 2]}}}]',
    '{"nuc": {"1": {"centroid": [1, 2]}}', '{"nuc": {"1": {"centroid": [1, 2]}}} {}',
    *('{"mag": %s, "nuc": {}}' % mag for mag in ('"40"', "0", "true", "1e9")),
    *('{"nuc": {"1": %s}}' % nucleus for nucleus in HOVERNET),
    *('{"elements": [%s]}' % element for element in HISTOMICSTK),
    *('{"features": [{"type": "Feature", "geometry": %s}]}' % geometry for geometry in GEOJSON)])
def test_bad_json_is_refused_in_one_line(tmp_path, text):
    refused(write(tmp_path / "a.json", text), slide_mpp=0.5)


@pytest.mark.parametrize("name, content", [
    ("a.csv", "x,y\n1\n"), ("a.csv", "x,y\n1,inf\n"), ("a.csv", "centroid x µm,centroid y µm\n1,2\n"),
    ("a.csv", "x;y\n1,5;2,5\n"), ("a.csv", "x,y\n\"" + "1" * 200_000), ("a.txt", "x,y\n"),
    ("a.csv", "x,y,µ\n1,2,3".encode("latin-1")), ("a.npz", "PK\x03\x04"), ("a.bin", bytes(range(256))),
    ("a.json", '{"nuc": {"1": {"centroid": [1, 2], "type": "über"}}}'.encode("latin-1")),
    ("a.tif", b"II*\0"), ("a.png", b"\x89PNG\r\n\x1a\n")])
def test_bad_tables_and_other_bytes_are_refused_in_one_line(tmp_path, name, content):
    refused(write(tmp_path / name, content), slide_mpp=0.5, slide_size=(9, 9))


def test_folders_and_missing_files_are_refused_in_one_line(tmp_path):
    refused(tmp_path)
    refused(tmp_path / "gone.json")
