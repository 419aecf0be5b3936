"""Tests of cells.py and prior.py: readers of segmentation results, the detector's coordinates, python prior.py SLIDE..."""
import functools
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import cells as cells_py
import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage

import prior

SQUARE = [[10, 20], [14, 20], [14, 26], [10, 26], [10, 20]]  # its centroid is (12, 23)
ELL = [[0, 0], [4, 0], [4, 1], [1, 1], [1, 3], [0, 3]]  # two rectangles: (2, .5) of 4 and (.5, 2) of 2


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def feature(geometry, **more):
    return {"type": "Feature", "id": "ü \"{[", "geometry": geometry, "properties": {"objectType": "detection"}, **more}


def shape(kind, coordinates):
    return {"type": kind, "coordinates": coordinates}


def one_line(function, *arguments, **named):
    with pytest.raises(cells_py.InputError) as error:
        function(*arguments, **named)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


# ---------------------------------------------------------------- JSON

@pytest.fixture(params=[1, 7, 50, 1 << 20])
def window(request, monkeypatch):
    """Windows so small that every name, number and bracket is cut somewhere."""
    monkeypatch.setattr(cells_py, "WINDOW", request.param)


NUC = {"7": {"bbox": [[0, 0], [9, 9]], "centroid": [10.5, 20], "contour": SQUARE, "type": 1, "type_prob": 0.9},
       "12": {"bbox": [[0, 0], [9, 9]], "centroid": [1.25e1, 3], "contour": SQUARE, "type": None}}


@pytest.mark.parametrize("text", [
    json.dumps({"mag": 40, "nuc": NUC}), json.dumps({"nuc": NUC, "mag": 40.0}),
    json.dumps({"mag": 40, "nuc": NUC}, indent=3),
    "\ufeff" + json.dumps({"a": {"b": ["}"]}, "mag": 40, "nuc": NUC, "z": "\"nuc\":{\\"}).replace(": ", "\t:\r\n")])
def test_hovernet_in_slide_mode_is_converted_wherever_mag_stands(tmp_path, window, text):
    path = write(tmp_path / "s.json", text)
    assert cells_py.cell_format(path) == "hovernet"
    np.testing.assert_allclose(cells_py.read_cells(path, slide_mpp=0.5), [[5.25, 10], [6.25, 1.5]])  # a 20x slide
    np.testing.assert_allclose(cells_py.read_cells(path, slide_mpp=0.25), [[10.5, 20], [12.5, 3]])
    assert "um/px" in one_line(cells_py.read_cells, path)


@pytest.mark.parametrize("size", [1, 40, 300, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
def test_members_decoded_many_at_once_are_those_of_json(tmp_path, monkeypatch, size, indent):
    """Inner lists and texts look as the border between two members: a wrong cut must never be taken for one."""
    monkeypatch.setattr(cells_py, "WINDOW", size)
    features = [{"type": "Feature", "id": i, "inner": [{"type": "Feature", "id": k} for k in range(i % 4)],
                 "text": ', {"type": "Feature", "id": 1}' * (i % 3) + '"\\' * (i % 5), "geometry": None} for i in range(60)]
    path = write(tmp_path / "s.json", json.dumps({"features": features, "type": "FeatureCollection"}, indent=indent))
    items = list(cells_py.json_items(path, cells_py.LISTS["geojson"]))
    assert [value for what, value in items if what == "member"] == features
    assert items[0] == ("list", None) and items[-1] == ("rest", {"features": [], "type": "FeatureCollection"})


def test_many_members_are_decoded_by_one_call(tmp_path, monkeypatch):
    """The quick way is really taken: a thousand features in one window are one call."""
    calls = []
    monkeypatch.setattr(cells_py.orjson, "loads", lambda text, load=cells_py.orjson.loads: calls.append(1) or load(text))
    features = [{"type": "Feature", "geometry": {"type": "Point", "coordinates": [i, 2 * i]}} for i in range(1000)]
    path = write(tmp_path / "s.json", {"type": "FeatureCollection", "features": features})
    assert cells_py.read_cells(path).tolist() == [[i, 2 * i] for i in range(1000)]
    assert len(calls) == 1


def test_hovernet_tile_mode_empty_and_ids_twice(tmp_path, window):
    path = write(tmp_path / "s.json", {"mag": None, "nuc": NUC})
    np.testing.assert_allclose(cells_py.read_cells(path, 0.5), [[10.5, 20], [12.5, 3]])
    assert cells_py.read_cells(write(path, '{"mag": null, "nuc": {}}')).shape == (0, 2)
    assert cells_py.read_cells(write(path, '{"nuc": { }, "mag": 40}'), 0.25).shape == (0, 2)
    twice = '{"nuc": {"1": {"centroid": [1, 2]}, "1": {"centroid": [3, 4]}}}'
    assert cells_py.read_cells(write(path, twice)).tolist() == [[1, 2], [3, 4]]


ELEMENTS = [{"type": "rectangle", "center": [5.5, 6, 0], "width": 3, "height": 3, "rotation": 0},
            {"type": "polyline", "points": [p + [0] for p in SQUARE[:4]], "closed": True, "group": "nuc"},
            {"type": "heatmap", "points": [[1, 2, 0, 9]]}, {"type": "arrow", "points": [[1, 2, 0], [3, 4, 0]]},
            {"type": "rectanglegrid", "center": [1, 1, 0]}, {"type": "point", "center": [7, 8, 0]}]


@pytest.mark.parametrize("wrap", [
    lambda e: {"elements": e}, lambda e: {"name": "nuclei", "elements": e, "description": ""},
    lambda e: {"_id": 3, "annotation": {"name": "n", "attributes": {"a": {}}, "elements": e}},
    lambda e: [{"annotation": {"elements": e[:3]}}, {"annotation": {"elements": e[3:]}}],
    lambda e: [{"elements": []}, {"elements": e}]])
def test_histomicstk_bare_under_annotation_and_in_a_list(tmp_path, window, wrap):
    path = write(tmp_path / "s.json", wrap(ELEMENTS))
    assert cells_py.cell_format(path) == "histomicstk"
    np.testing.assert_allclose(cells_py.read_cells(path, 0.25), [[5.5, 6], [12, 23], [7, 8]])
    assert cells_py.read_cells(write(path, wrap([]))).shape == (0, 2)


FEATURES = [feature(shape("Polygon", [SQUARE, [[11, 21], [12, 21], [12, 22]]])), feature(shape("Point", [3, 4])),
            feature(shape("MultiPoint", [[5, 6], [7, 8, 0]])), feature(shape("MultiPolygon", [[SQUARE], [ELL]])),
            feature(shape("Polygon", [ELL]), nucleusGeometry=shape("Polygon", [SQUARE])),
            feature(shape("Point", [0, 0]), properties={"nucleusGeometry": shape("Point", [9, 9])}),
            feature(shape("Point", [1, 1]), properties=None, nucleusGeometry=None)]
POINTS = [[12, 23], [3, 4], [5, 6], [7, 8], [12, 23], [1.5, 1], [12, 23], [9, 9], [1, 1]]


@pytest.mark.parametrize("wrap", [lambda f: {"type": "FeatureCollection", "features": f}, lambda f: f,
                                  lambda f: {"features": f, "crs": {"type": "name"}, "type": "FeatureCollection"}])
def test_geojson_collections_and_bare_lists(tmp_path, window, wrap):
    path = write(tmp_path / "s.geojson", wrap(FEATURES))
    assert cells_py.cell_format(path) == "geojson"
    np.testing.assert_allclose(cells_py.read_cells(path), POINTS)


def test_geojson_single_feature_and_empty_collection(tmp_path, window):
    for one, want in zip((FEATURES[0], FEATURES[2], FEATURES[5]), (POINTS[:1], POINTS[2:4], POINTS[7:8])):
        np.testing.assert_allclose(cells_py.read_cells(write(tmp_path / "s.json", one)), want)
    assert cells_py.read_cells(write(tmp_path / "s.json", {"type": "FeatureCollection", "features": []})).shape == (0, 2)


def ring_centroid(ring):
    """One of several, so that the seams between them are tried too."""
    xy = cells_py.ring_centroids([[[7, 7]], ring, SQUARE])
    np.testing.assert_allclose(xy[[0, 2]], [(7, 7), (12, 23)])
    return tuple(xy[1])


def test_ring_centroids_by_hand():
    np.testing.assert_allclose(ring_centroid(SQUARE), (12, 23))
    np.testing.assert_allclose(ring_centroid(SQUARE[:4][::-1]), (12, 23))  # open, and the other way round
    np.testing.assert_allclose(ring_centroid(ELL), (1.5, 1))
    far = np.array(ELL) + [1.5e6, 3e6]
    np.testing.assert_allclose(np.subtract(ring_centroid(far.tolist()), [1.5e6, 3e6]), (1.5, 1), atol=1e-6)
    np.testing.assert_allclose(ring_centroid([[1, 1], [3, 3], [5, 5]]), (3, 3))
    np.testing.assert_allclose(ring_centroid([[4, 2]]), (4, 2))
    x, y = ring_centroid([[0, 0], [10, 10], [10, 0], [0, 10.5]])  # a bow tie
    assert 0 <= x <= 10 and 0 <= y <= 10.5
    turn = np.linspace(0, 2 * np.pi, 200)
    ellipse = np.stack([50 + 8 * np.cos(turn), 70 + 6 * np.sin(turn)], 1)
    np.testing.assert_allclose(ring_centroid(ellipse.tolist()), (50, 70))


def test_a_large_json_is_read_a_nucleus_at_a_time(tmp_path):
    ring = [[i, i + 1] for i in range(20)]
    nucleus = json.dumps({"bbox": [[0, 0], [9, 9]], "centroid": [123.456, 7.5], "contour": ring, "type": 1})
    path = tmp_path / "s.json"
    with open(path, "w") as file:
        file.write('{"mag": 40, "nuc": {' + ", ".join(f'"{i}": {nucleus}' for i in range(40_000)) + "}}")
    size = path.stat().st_size
    assert len(cells_py.read_cells(path, 0.25)) == 40_000
    with open(path, "w") as file:
        file.write('{"mag": 40, "nuc": {' + ", ".join(f'"{i}": {nucleus}' for i in range(10_000)) + "}}")
    tracemalloc.start()
    cells_py.read_cells(path, 0.25)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 1e7 and peak < 6e6


# ---------------------------------------------------------------- label images

LABELS = np.zeros((60, 80), np.int64)
LABELS[10:14, 20:30], LABELS[40:41, 70:71], LABELS[50:60, 0:5] = 3, 40_000, 7  # with gaps
CENTRES = [[25, 12], [2.5, 55], [70.5, 40.5]]


@pytest.mark.parametrize("name, save", [
    ("s_cp_masks.png", lambda path: Image.fromarray(LABELS.astype(np.uint16)).save(path)),
    ("s_cp_masks.tif", lambda path: tifffile.imwrite(path, LABELS.astype(np.uint16), compression="zlib")),
    ("s_cp_masks.tif", lambda path: tifffile.imwrite(path, LABELS.astype(np.uint32), compression=8, rowsperstrip=7)),
    ("s_cp_masks.tiff", lambda path: tifffile.imwrite(path, LABELS.astype(np.uint32), tile=(16, 32), bigtiff=True)),
    ("s_cp_masks.tif", lambda path: tifffile.imwrite(path, LABELS.astype(np.int32), byteorder=">")),
    ("s_cp_masks.tif", lambda path: Image.fromarray(LABELS.astype(np.uint16)).save(path, compression="tiff_lzw")),
    ("s_cp_masks.tif", lambda path: Image.fromarray(LABELS.astype(np.int32)).save(path, compression="tiff_lzw"))])
def test_cellpose_masks_of_16_and_32_bit(tmp_path, monkeypatch, name, save):
    save(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's limit stops no mask, and is put back
    monkeypatch.setattr(cells_py, "BAND", 9)
    assert cells_py.cell_format(tmp_path / name) == "cellpose"
    np.testing.assert_allclose(cells_py.read_cells(tmp_path / name), CENTRES)
    assert Image.MAX_IMAGE_PIXELS == 1000
    np.testing.assert_allclose(cells_py.read_cells(tmp_path / name, slide_size=(80, 60)), CENTRES)
    scaled = cells_py.read_cells(tmp_path / name, slide_size=(321, 240))
    np.testing.assert_allclose(scaled, np.multiply(CENTRES, [321 / 80, 4]))
    for size in ((160, 60), (160, 117), (40, 30)):  # another shape; 1 % is forgiven; larger than the slide
        assert "80 x 60" in one_line(cells_py.read_cells, tmp_path / name, slide_size=size)


def test_labels_that_blocks_cut_and_no_label_at_all(tmp_path):
    blocks = [(0, 0, LABELS[:12]), (12, 0, LABELS[12:, :22]), (12, 22, LABELS[12:, 22:])] * 1
    np.testing.assert_allclose(cells_py.label_centroids(blocks), CENTRES)
    many = [(i, 0, LABELS[i: i + 1]) for i in range(60)] + [(0, 0, LABELS[:0])] * 2000
    np.testing.assert_allclose(cells_py.label_centroids(many), CENTRES)
    tifffile.imwrite(tmp_path / "e_cp_masks.tif", np.zeros((50, 40), np.uint16), compression="zlib")
    assert cells_py.read_cells(tmp_path / "e_cp_masks.tif").shape == (0, 2)


def seg(**more):
    """What Cellpose's save puts into _seg.npy, in short."""
    return {"outlines": LABELS.astype(np.uint16), "masks": LABELS.astype(np.uint32), "chan_choose": [0, 0],
            "ismanual": np.zeros(3, bool), "filename": "/a/b.png", "flows": [np.zeros((1, 2, 2, 3), np.uint8), []],
            "diameter": np.float64(17.5), "est": np.nan, **more}


def save_pickled(path, value, protocol):
    """As np.save writes an object, by any protocol."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(pickle.dumps(np.array(value, dtype=object), protocol=protocol))


@pytest.mark.parametrize("change", [
    lambda m: m, np.asfortranarray, lambda m: m.astype(">u2"), lambda m: m.astype(np.int64)])
def test_cellpose_seg_npy(tmp_path, change):
    path = tmp_path / "s_seg.npy"
    np.save(path, seg(masks=change(LABELS.astype(np.uint16))))
    assert cells_py.cell_format(path) == "cellpose"
    np.testing.assert_allclose(cells_py.read_cells(path), CENTRES)
    np.testing.assert_allclose(cells_py.read_cells(path, slide_size=(160, 120)), np.multiply(CENTRES, 2))


@pytest.mark.parametrize("old, new", [(b"numpy._core", b"numpy.core"), (b"numpy.core", b"numpy._core")])
def test_cellpose_seg_npy_of_numpy_1_and_2(tmp_path, old, new):
    path = tmp_path / "s_seg.npy"
    save_pickled(path, seg(), 3)  # numpy 1 pickles by protocol 3, which names modules as plain text
    path.write_bytes(path.read_bytes().replace(old, new))
    assert new in path.read_bytes()
    np.testing.assert_allclose(cells_py.read_cells(path), CENTRES)


class Evil:
    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
@pytest.mark.parametrize("where", ["dict", "masks", "beside", "array", "in masks"])
@pytest.mark.parametrize("call", ["system", "eval", "open", "numpy"])
def test_a_malicious_pickle_does_nothing_and_is_refused(tmp_path, protocol, where, call):
    mark, path = tmp_path / "mark", tmp_path / "s_seg.npy"
    evil = {"system": Evil(os.system, f"touch {mark}"), "eval": Evil(eval, f"open({str(mark)!r}, 'w')"),
            "open": Evil(open, str(mark), "w"), "numpy": Evil(np.savetxt, str(mark), [1.0])}[call]
    value = {"dict": evil, "masks": seg(masks=evil), "beside": seg(extra=evil),
             "array": seg(extra=np.array([evil, None])),
             "in masks": seg(masks=np.array([[evil, 1], [1, 0]], dtype=object))}[where]
    save_pickled(path, value, protocol)
    message = one_line(cells_py.read_cells, path)
    assert not mark.exists() and "_cp_masks" in message and "s_seg.npy" in message
    if protocol in (3, 4):
        assert "a pickle can run any program, and this one asks for" in message
    pickle.loads(pickle.dumps(evil))  # it would have
    assert mark.exists()


@pytest.mark.parametrize("value", [
    {"masks": np.array([[1, 0], [None, "x"]], dtype=object)}, {"masks": LABELS.astype(float)}, {"masks": LABELS[None]},
    {"masks": [[1, 2]]}, {"mask": LABELS}, [LABELS], {"masks": Path("x")}, LABELS, {"masks": np.zeros((4, 4), "V2")}])
def test_seg_npy_without_a_label_image_is_refused(tmp_path, value):
    np.save(tmp_path / "s_seg.npy", value)
    assert "_cp_masks" in one_line(cells_py.read_cells, tmp_path / "s_seg.npy")


def test_images_that_are_no_label_images_are_refused(tmp_path):
    for i, image in enumerate([Image.new("RGB", (9, 9)), Image.new("P", (9, 9)), Image.new("F", (9, 9)),
                               Image.fromarray((LABELS > 0).astype(np.uint8) * 255)]):
        for ending in (".tif", ".png") if image.mode != "F" else (".tif",):
            image.save(tmp_path / f"{i}_cp_masks{ending}")
            assert "label image" in one_line(cells_py.read_cells, tmp_path / f"{i}_cp_masks{ending}")
    tifffile.imwrite(tmp_path / "z_cp_masks.tif", np.zeros((3, 9, 9), np.uint16), photometric="minisblack")
    assert "label image" in one_line(cells_py.read_cells, tmp_path / "z_cp_masks.tif")


# ---------------------------------------------------------------- tables

@pytest.mark.parametrize("name, text", [
    ("a.csv", "x,y\n2.5,3\n4,5\n"), ("a.csv", "id;Y;type;X\r\n1;3;t;2.5\r\n2;5;t;4\r\n"),
    ("a.tsv", "X\ty\n2.5\t3\n\n4\t5"),
    ("a.CSV", "\ufeff\"x\",\"name\",\"y\"\n\"2.5\",\"a,\nb\",\"3\"\n4,c,5\n"), ("a.csv", " x , y \n 2.5 , 3 \n4,5")])
def test_tables(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode("utf-8"))
    assert cells_py.cell_format(tmp_path / name) == "table"
    np.testing.assert_allclose(cells_py.read_cells(tmp_path / name, 0.25, (10, 10)), [[2.5, 3], [4, 5]])


def test_npz_and_a_table_without_rows(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([1, 2], np.int32), y=np.array([3, 4.5], np.float32), other=["x"])
    np.testing.assert_allclose(cells_py.read_cells(tmp_path / "a.npz"), [[1, 3], [2, 4.5]])
    assert cells_py.cell_format(tmp_path / "a.npz") == "table"
    assert cells_py.read_cells(write(tmp_path / "a.csv", "x,y\n")).shape == (0, 2)
    for bad in (dict(x=["1"], y=["2"]), dict(x=[1], y=[1, 2]), dict(x=[1]), dict(x=[[1]], y=[[2]]),
                dict(x=[True], y=[True]), dict(x=np.array([{}]), y=[1]), dict(x=[np.nan], y=[1])):
        np.savez(tmp_path / "a.npz", **bad)
        one_line(cells_py.read_cells, tmp_path / "a.npz")


# ---------------------------------------------------------------- what cannot be read

NUCLEI = ['{}', '5', '{"centroid": ["1", "2"]}', '{"centroid": [1]}', '{"centroid": [1, 2, 3]}',
          '{"centroid": [NaN, 1]}', '{"centroid": [1e999, 1]}', '{"centroid": [null, 1]}',
          '{"centroid": [%s, 1]}' % ("9" * 400), '{"centroid": [1, 2]']
ONES = ['{"type": "rectangle"}', '{"center": [1, 2, 0]}', '{"type": "point", "center": ["1", "2"]}',
        '{"type": "heatmap"}', '{"type": "polyline", "points": []}',
        '{"type": "polyline", "points": [["1", "2"], ["3", "4"]]}',
        '{"type": "polyline", "points": [[NaN, 2], [3, 4], [5, 9]]}']
SHAPES = ['null', '3', '{"type": "LineString", "coordinates": [[0, 0], [1, 1]]}',
          '{"type": "Polygon", "coordinates": []}', '{"type": "MultiPoint", "coordinates": []}',
          '{"type": "Point", "coordinates": [1]}', '{"type": "Point"}']


@pytest.mark.parametrize("text", [
    "", " ", "[]", "{}", "null", "\ufeff", "[1, 2]", '{"nuc": null}', '{"nuc": []}', '{"annotation": {"name": "x"}}',
    '[{"nuc": {"1": {"centroid": [1, 2]}}}]', '{"type": "FeatureCollection"}', '{"type": "Feature"}',
    '{"features": [3]}', '{"type": "FeatureCollection", "features": null}',
    '{"type": "Feature", "geometry": null}',
    '{"nuc": {"1": {"centroid": [1, 2]}}', '{"nuc": {"1": {"centroid": [1, 2]}}, "mag": 4',
    '{"nuc": {"1": {"centroid": [1, 2]}]}', '{"nuc": {"1": {"centroid": [1, 2]}}} {}',
    '{"nuc": {"1" {"centroid": [1, 2]}}}',
    *('{"mag": %s, "nuc": {"1": {"centroid": [1, 2]}}}' % m for m in ('"40"', "0", "-4", "true", "NaN", "[4]", "1e9")),
    *('{"nuc": {"1": %s}}' % nucleus for nucleus in NUCLEI), *('{"elements": [%s]}' % one for one in ONES),
    *('{"features": [{"type": "Feature", "geometry": %s}]}' % shape for shape in SHAPES)])
def test_bad_json_is_told_in_one_line(tmp_path, window, text):
    assert "a.json" in one_line(cells_py.read_cells, write(tmp_path / "a.json", text), slide_mpp=0.5)


@pytest.mark.parametrize("name, text", [
    ("a.csv", ""), ("a.csv", "u,v\n1,2\n"), ("a.csv", "x,y\n1,b\n"), ("a.csv", "x,y\n1\n"), ("a.csv", "x,y\n1,inf\n"),
    ("a.csv", "centroid x µm,centroid y µm\n1,2\n"), ("a.csv", "x,y,X\n1,2,3\n"), ("a.csv", "1,2\n3,4\n"),
    ("a.csv", "x;y\n1,5;2,5\n"), ("a.csv", "x,y\n\"" + "1" * 200_000), ("a.txt", "x,y\n"), ("a.npz", "no zip"),
    ("a.npz", "PK\x03\x04"), ("a.npy", "\x93NUMPY")])
def test_bad_tables_are_told_in_one_line(tmp_path, name, text):
    assert name in one_line(cells_py.read_cells, write(tmp_path / name, text), slide_mpp=0.5, slide_size=(9, 9))


def test_other_bytes_folders_and_missing_files_are_told_in_one_line(tmp_path):
    good = json.dumps({"nuc": {"1": {"centroid": [1, 2], "type": "über"}}}, ensure_ascii=False)
    table = "x,y,µ\n1,2,3"
    for name, data in {
            "a.json": good.encode("utf-16"), "b.json": good.encode("latin-1"), "c.csv": table.encode("latin-1"),
            "d.csv": table.encode("utf-16"), "e.tif": b"II*\0", "f.png": b"\x89PNG\r\n\x1a\n", "h.npy": b"\x93NUMPY",
            "g_seg.npy": b"\x93NUMPY\1\0", "i.bin": bytes(range(256)), "j.csv": b"x,y\n\0,\0"}.items():
        (tmp_path / name).write_bytes(data)
        assert name in one_line(cells_py.read_cells, tmp_path / name)
    whole = tmp_path / "whole_cp_masks.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (200, 200)).astype(np.uint16)).save(whole)
    cut = tmp_path / "cut_cp_masks.png"
    cut.write_bytes(whole.read_bytes()[:1000])
    assert "cut_cp_masks.png" in one_line(cells_py.read_cells, cut)
    assert str(tmp_path) in one_line(cells_py.read_cells, tmp_path)
    assert "gone.json" in one_line(cells_py.read_cells, tmp_path / "gone.json")


@pytest.mark.parametrize("start", ["", '{"nuc": {"1": ', '{"nuc": {"1": {"centroid": ', '{"elements": [',
                                   '[{"type": "Feature", "a": ', '{"type": "Feature", "geometry": '])
@pytest.mark.parametrize("deep", ["[", '{"a":'])
def test_deep_nesting_is_one_line(tmp_path, start, deep):
    path = tmp_path / "deep.json"
    path.write_text(start + deep * (10_000_000 if deep == "[" else 200_000))
    assert "deep.json" in one_line(cells_py.read_cells, path)


# ---------------------------------------------------------------- the detector

def discs(mpp, centres_um, width_um=120, height_um=120, radius_um=3.5):
    """Synthetic nuclei: haematoxylin discs on an eosin ground, by Beer-Lambert; px i spans i to i + 1."""
    y, x = np.mgrid[0: round(height_um / mpp), 0: round(width_um / mpp)] + 0.5
    inside = np.zeros(x.shape, bool)
    for cx, cy in centres_um:
        inside |= (x * mpp - cx) ** 2 + (y * mpp - cy) ** 2 < radius_um ** 2
    return (245 * np.exp(-(inside[..., None] * prior.STAINS[0] + 0.25 * prior.STAINS[1]))).astype(np.uint8)


@pytest.mark.parametrize("mpp", [0.125, 0.25, 0.5, 1.0])
def test_detector_finds_a_disc_where_it_is_with_px_i_from_i_to_i_plus_1(mpp):
    centres = np.array([[20, 40], [60, 40], [20, 80], [90, 90]], float)
    found = prior.segment_nuclei(discs(mpp, centres), mpp) * mpp
    found = found[np.lexsort((found[:, 0], found[:, 1].round()))]
    np.testing.assert_allclose(found, centres, atol=0.02)  # half a px would be 0.06 to 0.5


# ---------------------------------------------------------------- python prior.py

class FakeModel:
    """Stands where Cellpose's network is: labels what is dark in red, and keeps how it was called."""
    calls = []

    def __init__(self, gpu=False):
        self.gpu = gpu

    def eval(self, x, channel_axis=None, normalize=True):
        assert x.dtype == np.uint8 and x.shape[channel_axis] == 3 and np.shape(normalize["lowhigh"]) == (3, 2)
        self.calls.append((x.shape, np.array(normalize["lowhigh"])))
        return ndimage.label(x[..., 0] < 180)[0], [], np.zeros(256)


@pytest.fixture
def cellpose(monkeypatch):
    package, models = types.ModuleType("cellpose"), types.ModuleType("cellpose.models")
    package.models, models.CellposeModel, FakeModel.calls = models, FakeModel, []
    monkeypatch.setitem(sys.modules, "cellpose", package)
    monkeypatch.setitem(sys.modules, "cellpose.models", models)
    prior.kit.cache_clear()
    yield models
    prior.kit.cache_clear()


SIDE = 100  # px of a region in these tests
GRID = [[x, y] for x in range(70, 300, 15) for y in range(10, 200, 15)]  # um; at 0.5 um/px many lie on seams


@functools.cache
def rendered():
    image = discs(0.5, GRID, 320, 215)
    image[:, :110] = 243
    return image


@pytest.fixture
def slide(tmp_path, monkeypatch):
    """A plain image as a slide of 320 x 215 um at 0.5 um/px: glass on the left, nuclei on seams and off them."""
    monkeypatch.setattr(prior, "REGION", SIDE)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(rendered()).save("s.png")
    return rendered().copy()


def cells(path):
    with np.load(path) as file:
        assert file["x"].dtype == file["y"].dtype == np.float32
        return np.stack([file["x"], file["y"]], 1)


def in_order(xy):
    return xy[np.lexsort(np.round(xy, 1).T)]


def test_cellpose_by_regions_is_cellpose_of_the_whole(slide, cellpose, capsys):
    assert prior.main(["s.png", "--slide-mpp", "0.5", "--segmenter", "cellpose"]) == 0
    want = cells_py.label_centroids([(0, 0, ndimage.label(slide[..., 0] < 180)[0])])
    got = cells("cells/cellpose/s.npz")
    assert len(want) == len(GRID)
    np.testing.assert_allclose(in_order(got), in_order(want), atol=1e-3)
    assert 15 <= len(FakeModel.calls) < 7 * 5  # regions of glass alone are left out
    assert all(np.array_equal(low_high, FakeModel.calls[0][1]) for _, low_high in FakeModel.calls)  # one scale a slide
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "1 of 1" in last and "cells/cellpose" in last and "train.py" in last and "--prior cellpose" in last


@pytest.mark.parametrize("slide_mpp, scale", [(0.5, 1), (0.25, 2), (0.1, 5)])
def test_builtin_by_regions_is_the_detector_of_the_whole_at_any_magnification(slide, slide_mpp, scale):
    Image.fromarray(slide.repeat(scale, 0).repeat(scale, 1)[: 427 * scale - 7]).save("b.png")
    assert prior.main(["b.png", "--slide-mpp", str(slide_mpp), "--workers", "1"]) == 0
    whole = np.asarray(Image.open("b.png"))
    tasks = prior.slide_regions(Path("b.png"), slide_mpp, "builtin", 0.5)
    want = prior.segment_nuclei(whole, slide_mpp, tasks[0][4])
    want = want[want[:, 0] >= 100 * scale]  # regions of glass alone are left out
    got = cells("cells/builtin/b.npz")
    assert abs(len(got) - len(GRID)) < 20
    np.testing.assert_allclose(in_order(got), in_order(want), atol=2e-3 * scale)


def test_the_segmenter_sees_about_the_um_per_px_asked_for(slide, cellpose):
    Image.fromarray(slide.repeat(4, 0).repeat(4, 1)).save("s.png")  # 0.125 um/px
    assert prior.main(["s.png", "--slide-mpp", "0.125", "--segmenter", "cellpose", "--out", "o"]) == 0
    np.testing.assert_allclose(in_order(cells("o/cellpose/s.npz")) / 8, in_order(np.array(GRID, float)), atol=0.15)
    assert max(shape[1] for shape, _ in FakeModel.calls) == SIDE + 2 * 48  # 24 um of margin at 0.5 um/px
    FakeModel.calls = []
    assert prior.main(["s.png", "--slide-mpp", "0.125", "--segmenter", "cellpose", "--out", "p", "--mpp", "1"]) == 0
    np.testing.assert_allclose(in_order(cells("p/cellpose/s.npz")) / 8, in_order(np.array(GRID, float)), atol=0.15)
    assert max(shape[1] for shape, _ in FakeModel.calls) == SIDE + 2 * 24


def test_what_two_regions_see_a_little_apart_is_one_cell():
    left, right = np.array([[99.8, 10], [50, 50], [50.5, 50]]), np.array([[100.3, 10.2], [100.4, 40]])
    both = [left, right, np.zeros((0, 2)), np.array([[100.1, 10.1]])]
    assert prior.one_each(both, 2.0).tolist() == [[99.8, 10], [50, 50], [50.5, 50], [100.4, 40]]
    assert prior.one_each([np.zeros((0, 2))], 2.0).shape == (0, 2) and prior.one_each([left[:1]], 2.0).shape == (1, 2)


def test_a_broken_slide_is_listed_and_nothing_else_is_lost_or_done_twice(slide, capsys):
    os.mkdir("in")
    Image.fromarray(slide).save("in/good.png")
    Path("in/cut.png").write_bytes(Path("s.png").read_bytes()[:3000])
    Path("in/.hidden.png").write_bytes(b"")
    Path("in/notes.txt").write_text("no slide")
    Image.new("RGB", (300, 300), "white").save("in/white.png")
    argv = ["in", "gone.svs", "--slide-mpp", "0.5", "--workers", "2", "--out", "in/cells"]
    assert prior.main(argv) == 1
    told = capsys.readouterr()
    for name in ("cut.png", "white.png", "gone.svs"):
        assert sum(name in line for line in told.err.splitlines()) == 1
    assert "1 of 4 slides" in told.out and "Traceback" not in told.err
    assert sorted(p.name for p in Path("in/cells").rglob("*") if p.is_file()) == ["good.npz"]
    first = Path("in/cells/builtin/good.npz").stat().st_mtime_ns
    assert prior.main(argv + ["--workers", "1"]) == 1 and Path("in/cells/builtin/good.npz").stat().st_mtime_ns == first
    assert prior.main(["in/good.png", "--out", "in/cells"]) == 0  # nothing is left to do


def test_a_region_that_fails_costs_its_slide_alone(slide, cellpose, capsys, monkeypatch):
    Image.fromarray(slide[::-1]).save("t.png")
    real = FakeModel.eval

    def fails_once(self, x, **named):
        if len(self.calls) == 3:
            self.calls.append(None)
            raise RuntimeError("CUDA error\nof two lines")
        return real(self, x, **named)
    monkeypatch.setattr(FakeModel, "eval", fails_once)
    assert prior.main(["s.png", "t.png", "--slide-mpp", "0.5", "--segmenter", "cellpose"]) == 1
    told = capsys.readouterr().err
    assert "CUDA error of two lines" in told and "s.png" in told
    assert [p.name for p in Path("cells/cellpose").iterdir()] == ["t.npz"]


@pytest.mark.parametrize("argv, says", [
    ([], "SLIDE"), (["s.png", "--segmenter", "hovernet"], "invalid choice"), (["s.png", "--mpp", "0"], "um/px"),
    (["s.png", "--slide-mpp", "nan"], "um/px"), (["s.png", "--mpp", "x"], "--mpp"),
    (["s.png", "--workers", "0"], "--workers 0"), (["s.png", "a/s.png"], "rename"), (["empty"], "no slide")])
def test_bad_flags_end_with_2(tmp_path, slide, capsys, argv, says):
    (tmp_path / "empty").mkdir()
    try:
        code = prior.main(argv)
    except SystemExit as error:
        code = error.code
    assert code == 2 and says in capsys.readouterr().err.splitlines()[-1] and not Path("cells").exists()


@pytest.mark.parametrize("segmenter, module", [("cellpose", "cellpose.models"), ("histomicstk", "histomicstk")])
def test_a_package_that_is_missing_is_told_before_the_work(slide, capsys, monkeypatch, segmenter, module):
    monkeypatch.setitem(sys.modules, module, None)
    prior.kit.cache_clear()
    assert prior.main(["s.png", "--slide-mpp", "0.5", "--segmenter", segmenter]) == 2
    assert "pip install" in capsys.readouterr().err


def test_cellpose_3_and_weights_that_cannot_be_had_are_told(slide, cellpose, capsys, monkeypatch):
    monkeypatch.setattr(cellpose, "CellposeModel", lambda gpu: open("/gone/cpsam"))
    assert prior.main(["s.png", "--slide-mpp", "0.5", "--segmenter", "cellpose"]) == 2
    assert "~/.cellpose/models" in capsys.readouterr().err
    cellpose.Cellpose = None
    assert prior.main(["s.png", "--slide-mpp", "0.5", "--segmenter", "cellpose"]) == 2
    assert "older than version 4" in capsys.readouterr().err


def test_the_script_tells_a_broken_slide_in_one_line(tmp_path):
    (tmp_path / "bad.svs").write_text("no slide")
    argv = [sys.executable, Path(prior.__file__), "bad.svs"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "bad.svs" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(not importlib.util.find_spec("histomicstk"), reason="HistomicsTK is not installed")
def test_histomicstk_by_regions(slide):
    prior.kit.cache_clear()
    assert prior.main(["s.png", "--slide-mpp", "0.5", "--segmenter", "histomicstk", "--workers", "1"]) == 0
    found = in_order(cells("cells/histomicstk/s.npz")) * 0.5
    near = np.linalg.norm(found[:, None] - np.array(GRID)[None], axis=-1)
    assert len(found) == len(GRID) and (near.min(0) < 1).all()
