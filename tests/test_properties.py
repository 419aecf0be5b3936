"""What holds for any input: cell files, labels.csv and flags are read as they were written, or refused.

300 examples each; pytest --hypothesis-profile=long tests/test_properties.py takes 20,000.
"""
import contextlib
import io
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import train
from common.errors import InputError
from wsi.cells import read_cells
from wsi.folders import find_folder

FLOATS = st.floats(allow_subnormal=False)  # train.py flushes denormal numbers to 0
POINTS = st.lists(st.tuples(*[st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda v: round(v, 3))] * 2),
                  max_size=5)
NAMES = st.sampled_from([
    "nuc", "mag", "centroid", "type", "elements", "annotation", "center", "points", "features", "geometry",
    "coordinates", "properties", "objectType", "Polygon", "point", "Feature"])
PLAIN = st.none() | st.booleans() | st.integers() | FLOATS | st.text(max_size=5) | NAMES
ANYTHING = st.recursive(
    PLAIN, lambda part: st.lists(part, max_size=4) | st.dictionaries(NAMES, part, max_size=4), max_leaves=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("any")


# ---------------------------------------------------------------- cells

def hovernet(points):
    return json.dumps({"mag": None, "nuc": {str(3 * i): {"centroid": point, "bbox": [[0, 0], [9, 9]]}
                                            for i, point in enumerate(points)}})


def histomicstk(points):
    return json.dumps({"annotation": {"elements": [
        {"type": "point", "center": [*point, 0]} for point in points]}}, indent=1)


def geojson(points):
    return json.dumps({"type": "FeatureCollection", "features": [
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": point}} for point in points]})


def table(points):
    return "\ufeffY;other;X\n" + "".join(f"{y};t;{x}\n" for x, y in points)


LAYOUTS = st.sampled_from([
    (hovernet, "a.json"), (histomicstk, "a.json"), (geojson, "a.json"), (table, "a.csv")])


@given(points=POINTS, layout=LAYOUTS)
def test_cells_are_read_as_written(folder, points, layout):
    write, name = layout
    (folder / name).write_text(write(points))
    np.testing.assert_allclose(read_cells(folder / name), np.reshape(points, (-1, 2)), atol=1e-9)


@st.composite
def any_file(draw):
    """The name and bytes of a file: some JSON, some bytes behind a known start, or damaged cells."""
    kind = draw(st.sampled_from(["json", "bytes", "damaged"]))
    if kind == "json":
        return draw(st.sampled_from(["a.json", "a.geojson"])), json.dumps(draw(ANYTHING)).encode()
    if kind == "bytes":
        start = draw(st.sampled_from([b"", b"x,y\n", b"II*\0", b"PK\3\4", b"\x89PNG\r\n", b'{"nuc":{']))
        ending = draw(st.sampled_from([".json", ".csv", ".npz", "_cp_masks.png", "_cp_masks.tif"]))
        return "a" + ending, start + draw(st.binary(max_size=60))
    write, name = draw(LAYOUTS)
    raw = bytearray(write(draw(POINTS)).encode())
    for _ in range(draw(st.integers(1, 3))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return name, bytes(raw)


@given(file=any_file())
def test_any_file_gives_finite_cells_or_one_line_that_names_it(folder, file):
    path = folder / file[0]
    path.write_bytes(file[1])
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            xy = read_cells(path, 0.5, (100, 100))
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert xy.shape[1:] == (2,) and xy.dtype == np.float64 and np.isfinite(xy).all()


# ---------------------------------------------------------------- labels.csv

FIELD = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), max_size=8)
HEADS = ["slide,label,split", "slide,label,patient", "slide,label,mpp", "slide_id,label,case_id"]
PARTS = {"train": "train", "Val": "val", "TEST": "test", "validation": "val"}


@pytest.fixture(scope="module")
def slides(folder):
    for name in "abc":
        (folder / "in" / "slides").mkdir(parents=True, exist_ok=True)
        (folder / "in" / "slides" / f"{name}.svs").write_bytes(b"")
    return folder / "in"


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


def labels_of(slides, lines):
    """The labels of a folder with this labels.csv, or None where it is refused in one line that names it."""
    (slides / "labels.csv").write_text("\n".join(map(",".join, lines)), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return find_folder(str(slides), 2.0).labels
    except InputError as error:
        assert "labels.csv" in str(error) and "\n" not in str(error)


@given(rows=st.lists(st.tuples(FIELD | st.sampled_from("abc"), FIELD, FIELD), max_size=4),
       quote=st.sampled_from([quoted, str]), head=st.sampled_from(HEADS))
def test_any_labels_csv_is_read_or_refused(slides, rows, quote, head):
    labels = labels_of(slides, [[head], *(map(quote, row) for row in rows)])
    assert not labels or len({row["label"] for row in labels.values()}) > 1  # {}: for pre-training only


@given(rows=st.tuples(*[st.tuples(FIELD.map(str.strip).filter(bool), st.sampled_from(list(PARTS)))] * 3),
       order=st.permutations(["slide", "label", "split"]))
def test_labels_are_read_as_written(slides, rows, order):
    fields = [dict(zip(("slide", "label", "split"), (name, *row))) for name, row in zip("abc", rows)]
    labels = labels_of(slides, [order, *([quoted(row[name]) for name in order] for row in fields)])
    if len({label for label, _ in rows}) < 2:
        assert labels is None
    else:
        assert {name: (row["label"], row["split"]) for name, row in labels.items()} == {
            name: (label, PARTS[part]) for name, (label, part) in zip("abc", rows)}


# ---------------------------------------------------------------- flags

NUMBERS = [
    "--epochs", "--batch", "--local-crops", "--global-size", "--out-dim", "--lambda-1", "--lr", "--min-lr",
    "--weight-decay", "--clip", "--drop-path", "--momentum", "--student-temp", "--teacher-temp", "--seed",
    "--center-momentum", "--save-minutes", "--max-steps", "--fraction", "--tissue", "--mpp", "--slide-mpp",
    "--max-gigapixels", "--warmup-epochs", "--probe-images", "--workers"]


@given(flag=st.sampled_from(NUMBERS), value=st.integers() | FLOATS | st.text(max_size=4))
def test_any_value_of_a_flag_is_taken_or_refused(flag, value):
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            args = train.arguments([f"{flag}={value}"])
    except InputError as error:
        assert flag in str(error) and "\n" not in str(error)
    else:
        taken = getattr(args, flag[2:].replace("-", "_"))
        assert taken == type(taken)(value) and math.isfinite(taken)
