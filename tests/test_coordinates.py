"""From the px of other programs to level-0 px and back, and the check of cells against their slide."""
import json
from pathlib import Path

import numpy as np
import pytest
from synthetic import prepared, saved, scn, svs, tissue, write, write_table

import data
from common.export import cells_of, sparse_tokens, tiles_of, write_features
from data import Crops
from experiments.figures import priors
from wsi import cache, check, sanity, slides
from wsi.cache import prepare, ready_cells, tile_info
from wsi.cells import read_cells
from wsi.slides import Slide

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TRUE = np.array([[30.5, 40], [200, 100.25], [90, 210]])  # level-0 px


# ---------------------------------------------------------------- HoVer-Net

def hovernet(path, xy, power, mag):
    """What HoVer-Net writes of cells (K, 2): its px are level-0 px x mag / the slide's objective power."""
    nuclei = {str(i): {"centroid": point} for i, point in enumerate((xy * mag / power).tolist())}
    return write(path, {"mag": mag, "nuc": nuclei})


@pytest.mark.parametrize("mpp, power, true_x", [
    (0.2525, 40, 80000), (0.2465, 40, 80000), (0.504, 20, 40000), (0.2325, 20, 40000)])
def test_hovernet_counts_from_the_recorded_power_whatever_the_um_per_px(tmp_path, mpp, power, true_x):
    path = write(tmp_path / "s.json", {"mag": 40, "nuc": {"1": {"centroid": [80000, 500]}}})
    want = [[true_x, 500 * power / 40]]
    np.testing.assert_allclose(read_cells(path, mpp, power=power), want)
    assert sanity.assumed_power(path, power, mpp) == ""
    np.testing.assert_allclose(read_cells(path, mpp), [[80000 * 10 / mpp / 40, 500 * 10 / mpp / 40]])
    assert f"no objective power: {10 / mpp:g}x is assumed" in sanity.assumed_power(path, None, mpp)
    tile_mode = write(tmp_path / "t.json", {"mag": None, "nuc": {"1": {"centroid": [8, 5]}}})
    assert sanity.assumed_power(tile_mode, None, mpp) == ""
    assert sanity.assumed_power(write_xy(tmp_path / "s.csv", [[8, 5]]), None, mpp) == ""


@pytest.mark.parametrize("mpp, power, mag", [
    (0.2525, 40, 40), (0.2465, 40, 20), (0.504, 20, 20), (0.2325, 20, 40)])
def test_hovernet_cells_of_a_slide_stay_where_they_are(place, capsys, mpp, power, mag):
    path = place / "in" / "slides" / "good.png"
    path.unlink()
    svs(path.with_suffix(".svs"), tissue(1024), f"Aperio|AppMag = {power}|MPP = {mpp}")
    hovernet(place / "in" / "cells" / "good.json", TRUE, power, mag)
    saved(place / "in" / "slides" / "other.png")
    for given in (None, 0.4):  # um/px in labels.csv, which moves no cell
        rows = [f"good,A,{given or ''}", "other,B,"]
        write_table(place / "in" / "labels.csv", "slide,label,mpp", rows)
        found, failed = prepared(mpp=1.0)
        info = tile_info(found, "good")
        assert failed == [] and info["power"] == power and info["slide_mpp"] == (given or mpp)
        np.testing.assert_allclose(ready_cells(found, "good"), TRUE[TRUE[:, 1].argsort()], rtol=1e-6)
    assert "no objective power" not in capsys.readouterr().out


def test_cells_that_an_older_version_converted_are_read_again(place, monkeypatch):
    path = place / "in" / "slides" / "good.png"
    path.unlink()
    svs(path.with_suffix(".svs"), tissue(300), "Aperio|AppMag = 40|MPP = 0.504")
    hovernet(place / "in" / "cells" / "good.json", TRUE, 40, 40)
    with monkeypatch.context() as older:
        older.setattr(cache, "READERS", cache.READERS - 1)
        found, _ = prepared(mpp=0.5, slide_mpp=None)
        assert ready_cells(found, "good") is not None
    kept = place / "datasets" / "in" / "cells" / "level0" / "auto" / "good.npz"
    np.savez(kept, x=TRUE[:, 0] * 0.5, y=TRUE[:, 1] * 0.5, source=np.load(kept)["source"])
    assert ready_cells(found, "good") is None
    tiles = place / "datasets" / "in" / "crops" / "0.5um" / "good.json"
    info = json.loads(tiles.read_text())
    tiles.write_text(json.dumps({name: info[name] for name in info if name not in ("power", "bounds")}))
    assert tile_info(found, "good") is None  # what it would lack: QuPath's corner and the power
    assert prepare(found, workers=1) == []
    np.testing.assert_allclose(ready_cells(found, "good"), TRUE[TRUE[:, 1].argsort()], rtol=1e-6)


# ---------------------------------------------------------------- QuPath's picture

@pytest.mark.parametrize("properties, want", [
    ({}, (0, 0)), ({"openslide.bounds-x": "1500", "openslide.bounds-y": "900"}, (1500, 900)),
    ({"openslide.bounds-x": "-7", "openslide.bounds-y": "-12"}, (-7, -12)),
    ({"openslide.bounds-x": "unknown", "openslide.bounds-y": "3"}, (0, 3))])
def test_bounds_as_recorded(properties, want):
    assert slides.recorded_bounds(properties) == want


FILES = {
    "good.geojson": [{"type": "Feature", "properties": {"objectType": "cell"},
                      "geometry": {"type": "Point", "coordinates": point}} for point in TRUE.tolist()],
    "good.csv": "x,y\n" + "".join(f"{x},{y}\n" for x, y in TRUE.tolist()),
    "hovernet.json": {"mag": 20, "nuc": {str(i): {"centroid": p} for i, p in enumerate(TRUE.tolist())}},
    "histomicstk.json": {"elements": [{"type": "point", "center": [*p, 0]} for p in TRUE.tolist()]}}


@pytest.mark.parametrize("bounds", [(1500, 900), (-7, -12)])
@pytest.mark.parametrize("name", FILES)
def test_geojson_and_nothing_else_counts_from_the_corner_of_qupaths_picture(tmp_path, name, bounds):
    path = write(tmp_path / name, FILES[name])
    shift = bounds if name == "good.geojson" else (0, 0)
    np.testing.assert_allclose(read_cells(path, 0.5, power=20, bounds=bounds), TRUE + shift)


CORNER = (448, 224)  # of the scanned area, in level-0 px; at 0.5 um/px tiles begin there


@pytest.fixture
def leica(place):
    """in/slides/good.scn: 1,000 x 900 px at 0.5 um/px, tissue of 448 x 448 px at CORNER; QuPath's cells."""
    (place / "in" / "slides" / "good.png").unlink()
    scn(place / "in" / "slides" / "good.scn", tissue(448), CORNER, (1000, 900), 0.5, 20)
    write(place / "in" / "cells" / "good.geojson", FILES["good.geojson"])
    return place / "in"


def test_a_slide_with_bounds_from_qupath_and_back(leica, tmp_path):
    slide = Slide(leica / "slides" / "good.scn")
    assert (slide.bounds, slide.power, slide.mpp) == (CORNER, 20, 0.5)
    assert (np.asarray(slide.read_level(0, *CORNER, 448, 448)) == tissue(448)).all()
    found, failed = prepared(mpp=0.5, slide_mpp=None)
    info = tile_info(found, "good")
    assert failed == [] and info["bounds"] == list(CORNER) and info["tiles"] == 4
    xy = ready_cells(found, "good")
    crops = Crops(found, ["good"])
    np.testing.assert_allclose(xy[xy[:, 1].argsort()], TRUE[TRUE[:, 1].argsort()] + CORNER)
    assert sum(len(crops.cells(i)) for i in range(4)) == 3  # none was in a tile without the shift
    folder_cells = priors.cells_from_folder(leica / "cells", found, "good")
    np.testing.assert_allclose(folder_cells, TRUE + CORNER)

    out = tmp_path / "good.geojson"
    where = crops.corners, info["side"], slide.bounds
    write_features(out, tiles_of(*where) + cells_of(xy, slide.bounds))
    np.testing.assert_allclose(read_cells(out), xy - CORNER, atol=0.006)
    objects = json.loads(out.read_text())["features"]
    for corner, shape in zip(crops.corners, objects):
        first = shape["geometry"]["coordinates"][0][0]
        assert first == (corner - CORNER).tolist()
        assert shape["properties"]["name"] == "tile {},{}".format(*corner)
    token = sparse_tokens(np.full((4, 196), 3.0), *where)[15]["geometry"]["coordinates"][0]  # row 1, column 1
    assert token[0] == (crops.corners[0] - CORNER + 16).tolist()


# ---------------------------------------------------------------- cells against their slide

def write_xy(path, xy):
    return write(path, "x,y\n" + "".join(f"{x:.2f},{y:.2f}\n" for x, y in xy))


def test_places_of_cells_are_brute_force(tmp_path):
    image = np.full((160, 320, 3), 243, np.uint8)
    image[:, :160] = tissue(160)
    saved(tmp_path / "a.png", array=image)
    slide = Slide(tmp_path / "a.png", 8.0)
    rng = np.random.default_rng(0)
    mask = slides.tissue_mask(image, 8.0)
    xy = np.concatenate([rng.uniform(-100, 420, (500, 2)), [[0, 0], [319.99, 159.99], [320, 5], [5, 160]]])
    outside = on_glass = 0
    for x, y in xy:
        if not (0 <= x < 320 and 0 <= y < 160):
            outside += 1
        elif not mask[int(y), int(x)]:
            on_glass += 1
    assert outside > 100 and on_glass > 20
    side = round(sanity.SQUARE / 8)
    squares = [(x, y) for y in range(0, 160, side) for x in range(0, 320, side)
               if mask[y: y + side, x: x + side].sum() >= side ** 2 / 2]
    for cells in (xy, xy[xy[:, 0] < 70], np.zeros((0, 2))):
        empty = [not ((cells >= (x, y)) & (cells < (x + side, y + side))).all(1).any() for x, y in squares]
        assert sanity.places_of_cells(cells, slide)[2] == pytest.approx(np.mean(empty))
    np.testing.assert_allclose(sanity.places_of_cells(xy, slide)[:2], (outside / 504, on_glass / 504))
    assert sanity.places_of_cells(np.zeros((0, 2)), slide) == (0, 0, 1)
    assert sanity.where_cells_are_odd(0.03, 0.03, 0.2) == ""
    assert "9% of the cells lie outside" in sanity.where_cells_are_odd(0.09, 0, 0)
    assert "9% on its glass" in sanity.where_cells_are_odd(0, 0.09, 0)
    assert "40% of the tissue has no cell" in sanity.where_cells_are_odd(0, 0, 0.4)


WRONG = {"exchanged": lambda xy: xy[:, ::-1], "twice": lambda xy: 2 * xy, "um": lambda xy: 0.25 * xy}


@pytest.fixture
def oblong(place):
    """in/slides/good.png: 600 x 300 px of tissue at 0.25 um/px, 200 px of glass to its left and above it."""
    image = np.full((500, 800, 3), 243, np.uint8)
    image[200:, 200:] = np.concatenate([tissue(300), tissue(300, seed=1)], 1)
    saved(place / "in" / "slides" / "good.png", array=image)
    return np.random.default_rng(0).uniform((210, 210), (800, 500), (300, 2))


FLAGS = ["--data", "in", "--slide-mpp", "0.25", "--workers", "1"]


def warned(text):
    """Returns the warnings on good.csv, of which there is one at most."""
    lines = [line for line in text.splitlines() if "good.csv" in line and "% of the cells" in line]
    assert len(lines) <= 1
    return lines


@pytest.mark.parametrize("how", WRONG)
def test_cells_that_do_not_fit_their_slide_are_reported(oblong, capsys, blank_figures, how):
    file = write_xy(Path("in/cells/good.csv"), oblong)
    for xy, count in ((oblong, 0), (WRONG[how](oblong), 1)):
        write_xy(file, xy)
        data.main(["check", *FLAGS])
        first = warned(capsys.readouterr().out)
        _, failed = prepared(mpp=0.25, slide_mpp=0.25)
        then = warned(capsys.readouterr().out)
        assert failed == [] and len(first) == len(then) == count
        assert all(line.startswith("warning: in/slides/good.png: ") for line in then)
        _, failed = prepared(mpp=0.25, slide_mpp=0.25)
        assert failed == [] and warned(capsys.readouterr().out) == []  # read once, reported once
        argv = ["look", "in/slides/good.png", "--cells", str(file), "--mpp", "0.25", *FLAGS[2:]]
        assert data.main([*argv, "--tissue", "0.3"]) == 0
        assert len(warned(capsys.readouterr().out)) == count


def test_check_does_not_read_again_what_was_read(oblong, capsys, monkeypatch):
    write_xy(Path("in/cells/good.csv"), oblong * 2)
    found, failed = prepared(mpp=0.25, slide_mpp=0.25)
    assert failed == []
    capsys.readouterr()
    monkeypatch.setattr(check, "read_slide_cells", None)
    argv = [*FLAGS, "--mpp", "0.25"]
    assert data.main(["check", *argv]) == 1 and len(warned(capsys.readouterr().out)) == 1


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs {SHARED}, which is not in the repository")
def test_true_cells_of_real_images_are_not_reported():
    files = sorted((SHARED / "nuclei").glob("*.json"))
    assert len(files) == 35
    for file in files:
        truth = json.loads(file.read_text())
        slide = Slide(file.with_suffix(".png"), truth["mpp"])
        shares = sanity.places_of_cells(np.array(truth["centroids"], float), slide)
        assert sanity.where_cells_are_odd(*shares) == "", shares


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs {SHARED}, which is not in the repository")
def test_wrong_cells_of_a_real_slide_are_reported(tmp_path):
    path = SHARED / "slides" / "cmu-1-small-region.svs"
    slide = Slide(path)
    other = Slide(SHARED / "slides" / "gallery-06.tiff", 0.5)
    assert cache.segment_slides([(path, slide.mpp)], "builtin", tmp_path, 1) == {}
    xy = read_cells(tmp_path / "builtin" / "cmu-1-small-region.npz")
    assert sanity.where_cells_are_odd(*sanity.places_of_cells(xy, slide)) == ""
    part = xy[xy[:, 0] < slide.width * 0.3]
    assert "of the tissue has no cell" in sanity.where_cells_are_odd(*sanity.places_of_cells(part, slide))
    wrong = [(xy[:, ::-1], slide), (xy * 2, slide), (xy / 2, slide), (xy * slide.mpp, slide), (xy, other)]
    for places, on in wrong:
        assert sanity.where_cells_are_odd(*sanity.places_of_cells(places, on))
