"""The detector of nuclei, and python -m wsi.segment: slides by regions, by any segmenter."""
import functools
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial import cKDTree
from synthetic import discs

from prior import segment_nuclei
from wsi import cells as cells_py
from wsi import demo, segment

ROOT = Path(__file__).resolve().parents[1]
NUCLEI = ROOT.parent / "shared" / "data" / "nuclei"


# ---------------------------------------------------------------- the detector

@pytest.mark.parametrize("mpp", [0.125, 0.25, 0.5, 1.0])
def test_detector_finds_a_disc_where_it_is_with_px_i_from_i_to_i_plus_1(mpp):
    centres = np.array([[20, 40], [60, 40], [20, 80], [90, 90]], float)
    found = segment_nuclei(discs(mpp, centres), mpp) * mpp
    found = found[np.lexsort((found[:, 0], found[:, 1].round()))]
    np.testing.assert_allclose(found, centres, atol=0.02)  # half a px would be 0.06 to 0.5


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.8, 1.0])
def test_detector_finds_synthetic_nuclei_at_any_um_per_px(mpp):
    centres = np.array([[x, y] for x in range(15, 110, 18) for y in range(15, 110, 18)], float)
    found = segment_nuclei(discs(mpp, centres), mpp) * mpp
    distance = np.linalg.norm(found[:, None] - centres[None], axis=-1)
    assert len(found) == len(centres) and (distance.min(0) < 1.5).all()


def test_detector_finds_nothing_on_white_and_refuses_what_is_no_image():
    assert len(segment_nuclei(np.full((300, 300, 3), 243, np.uint8), 0.5)) == 0
    with pytest.raises(ValueError, match="mpp"):
        segment_nuclei(np.zeros((4, 4, 3), np.uint8), 0)
    with pytest.raises(ValueError, match="uint8"):
        segment_nuclei(np.zeros((4, 4, 3)), 0.5)


def matched(found, truth, near):
    """How many of the true nuclei are found within near px, one to one."""
    pairs = cKDTree(found).sparse_distance_matrix(cKDTree(truth), near, output_type="coo_matrix")
    graph = coo_matrix((np.ones(pairs.nnz), (pairs.row, pairs.col)), pairs.shape).tocsr()
    return (maximum_bipartite_matching(graph) >= 0).sum()


def test_detector_on_the_synthetic_slides(rendered):
    for image, truth in rendered.values():
        found = segment_nuclei(image, demo.MPP)
        assert 2 * matched(found, truth, 3 / demo.MPP) / (len(found) + len(truth)) > 0.8


@pytest.mark.skipif(not NUCLEI.is_dir(), reason=f"needs real images in {NUCLEI}, which are not in the repository")
@pytest.mark.parametrize("group, at_least", [("crchisto_", 0.62), ("monuseg_", 0.84)])
def test_detector_on_real_images(group, at_least):
    hits = found = marked = 0
    for path in sorted(NUCLEI.glob(group + "*.json")):
        truth = json.loads(path.read_text())
        xy = segment_nuclei(np.asarray(Image.open(path.with_suffix(".png")).convert("RGB")), truth["mpp"])
        hits += matched(xy, truth["centroids"], 3 / truth["mpp"])
        found, marked = found + len(xy), marked + len(truth["centroids"])
    assert 2 * hits / (found + marked) >= at_least


# ---------------------------------------------------------------- slides by regions

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
    segment.load_segmenter.cache_clear()
    yield models
    segment.load_segmenter.cache_clear()


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
    monkeypatch.setattr(segment, "REGION", SIDE)
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
    assert segment.main(["s.png", "--slide-mpp", "0.5", "--segmenter", "cellpose"]) == 0
    want = cells_py.label_centroids(ndimage.label(slide[..., 0] < 180)[0])
    got = cells("cells/cellpose/s.npz")
    assert len(want) == len(GRID)
    np.testing.assert_allclose(in_order(got), in_order(want), atol=1e-3)
    assert 15 <= len(FakeModel.calls) < 7 * 5  # regions of glass alone are left out
    assert all(np.array_equal(low_high, FakeModel.calls[0][1]) for _, low_high in FakeModel.calls)  # one scale a slide
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "1 of 1" in last and "cells/cellpose" in last and "train.py" in last and "--prior cellpose" in last


@pytest.mark.parametrize("slide_mpp, scale", [(0.5, 1), (0.1, 5)])
def test_builtin_by_regions_is_the_detector_of_the_whole_at_any_magnification(slide, slide_mpp, scale):
    Image.fromarray(slide.repeat(scale, 0).repeat(scale, 1)[: 427 * scale - 7]).save("b.png")
    assert segment.main(["b.png", "--slide-mpp", str(slide_mpp), "--workers", "1"]) == 0
    whole = np.asarray(Image.open("b.png"))
    tasks = segment.slide_regions(Path("b.png"), slide_mpp, "builtin", 0.5)
    want = segment_nuclei(whole, slide_mpp, tasks[0][4])
    want = want[want[:, 0] >= 100 * scale]  # regions of glass alone are left out
    got = cells("cells/builtin/b.npz")
    assert abs(len(got) - len(GRID)) < 20
    np.testing.assert_allclose(in_order(got), in_order(want), atol=2e-3 * scale)


def test_the_segmenter_sees_about_the_um_per_px_asked_for(slide, cellpose):
    Image.fromarray(slide.repeat(4, 0).repeat(4, 1)).save("s.png")  # 0.125 um/px
    assert segment.main(["s.png", "--slide-mpp", "0.125", "--segmenter", "cellpose", "--out", "o"]) == 0
    np.testing.assert_allclose(in_order(cells("o/cellpose/s.npz")) / 8, in_order(np.array(GRID, float)), atol=0.15)
    assert max(shape[1] for shape, _ in FakeModel.calls) == SIDE + 2 * 48  # 24 um of margin at 0.5 um/px
    FakeModel.calls = []
    assert segment.main(["s.png", "--slide-mpp", "0.125", "--segmenter", "cellpose", "--out", "p", "--mpp", "1"]) == 0
    np.testing.assert_allclose(in_order(cells("p/cellpose/s.npz")) / 8, in_order(np.array(GRID, float)), atol=0.15)
    assert max(shape[1] for shape, _ in FakeModel.calls) == SIDE + 2 * 24


def test_what_two_regions_see_a_little_apart_is_one_cell():
    left, right = np.array([[99.8, 10], [50, 50], [50.5, 50]]), np.array([[100.3, 10.2], [100.4, 40]])
    both = [left, right, np.zeros((0, 2)), np.array([[100.1, 10.1]])]
    assert segment.merge_seams(both, 2.0).tolist() == [[99.8, 10], [50, 50], [50.5, 50], [100.4, 40]]
    assert segment.merge_seams([np.zeros((0, 2))], 2.0).shape == (0, 2) and segment.merge_seams([left[:1]], 2.0).shape == (1, 2)


def test_a_broken_slide_is_listed_and_nothing_else_is_lost_or_done_twice(slide, capsys):
    os.mkdir("in")
    Image.fromarray(slide).save("in/good.png")
    Path("in/cut.png").write_bytes(Path("s.png").read_bytes()[:3000])
    Path("in/.hidden.png").write_bytes(b"")
    Path("in/notes.txt").write_text("no slide")
    Image.new("RGB", (300, 300), "white").save("in/white.png")
    argv = ["in", "gone.svs", "--slide-mpp", "0.5", "--workers", "2", "--out", "in/cells"]
    assert segment.main(argv) == 1
    told = capsys.readouterr()
    for name in ("cut.png", "white.png", "gone.svs"):
        assert sum(name in line for line in told.err.splitlines()) == 1
    assert "1 of 4 slides" in told.out and "Traceback" not in told.err
    assert sorted(p.name for p in Path("in/cells").rglob("*") if p.is_file()) == ["good.npz"]
    first = Path("in/cells/builtin/good.npz").stat().st_mtime_ns
    assert segment.main(argv + ["--workers", "1"]) == 1 and Path("in/cells/builtin/good.npz").stat().st_mtime_ns == first
    assert segment.main(["in/good.png", "--out", "in/cells"]) == 0  # nothing is left to do


def test_a_region_that_fails_costs_its_slide_alone(slide, cellpose, capsys, monkeypatch):
    Image.fromarray(slide[::-1]).save("t.png")
    real = FakeModel.eval

    def fails_once(self, x, **named):
        if len(self.calls) == 3:
            self.calls.append(None)
            raise RuntimeError("CUDA error\nof two lines")
        return real(self, x, **named)
    monkeypatch.setattr(FakeModel, "eval", fails_once)
    assert segment.main(["s.png", "t.png", "--slide-mpp", "0.5", "--segmenter", "cellpose"]) == 1
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
        code = segment.main(argv)
    except SystemExit as error:
        code = error.code
    assert code == 2 and says in capsys.readouterr().err.splitlines()[-1] and not Path("cells").exists()


@pytest.mark.parametrize("segmenter, module", [("cellpose", "cellpose.models"), ("histomicstk", "histomicstk")])
def test_a_package_that_is_missing_is_told_before_the_work(slide, capsys, monkeypatch, segmenter, module):
    monkeypatch.setitem(sys.modules, module, None)
    segment.load_segmenter.cache_clear()
    assert segment.main(["s.png", "--slide-mpp", "0.5", "--segmenter", segmenter]) == 2
    assert "pip install" in capsys.readouterr().err


def test_cellpose_3_and_weights_that_cannot_be_had_are_told(slide, cellpose, capsys, monkeypatch):
    monkeypatch.setattr(cellpose, "CellposeModel", lambda gpu: open("/gone/cpsam"))
    assert segment.main(["s.png", "--slide-mpp", "0.5", "--segmenter", "cellpose"]) == 2
    assert "~/.cellpose/models" in capsys.readouterr().err
    cellpose.Cellpose = None
    assert segment.main(["s.png", "--slide-mpp", "0.5", "--segmenter", "cellpose"]) == 2
    assert "older than version 4" in capsys.readouterr().err


def test_the_script_reports_a_broken_slide_in_one_line_and_the_old_call_names_the_new(tmp_path):
    (tmp_path / "bad.svs").write_text("no slide")

    def run(*argv):
        return subprocess.run([sys.executable, *argv, str(tmp_path / "bad.svs")], capture_output=True, text=True, cwd=ROOT)
    done = run("-m", "wsi.segment")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "bad.svs" in done.stderr.splitlines()[-1]
    old = run("prior.py")
    assert old.returncode == 2 and old.stderr.count("\n") == 1 and "python -m wsi.segment" in old.stderr


def test_no_cell_is_lost_or_doubled_on_a_seam(tmp_path, rendered, monkeypatch):
    monkeypatch.setattr(segment, "REGION", 301)
    image = rendered["nests"][0][:1100, 500:1700]
    twice = image.repeat(2, 0).repeat(2, 1)[:1000, :1400]  # at 0.25 um/px two px are averaged
    for mpp, whole in ((1.0, image), (0.25, twice)):
        path = tmp_path / f"{mpp}.png"
        Image.fromarray(whole).save(path)
        tasks = segment.slide_regions(path, mpp, "builtin", segment.WORK_MPP)
        assert len(tasks) >= 4
        parts = [segment.segment_region(*task) for task in tasks]
        want = segment_nuclei(whole, mpp, tasks[0][4])
        assert len(want) > 300
        np.testing.assert_allclose(in_order(segment.merge_seams(parts, segment.SEAM / mpp)), in_order(want), atol=1e-6)


@pytest.mark.skipif(not importlib.util.find_spec("histomicstk"), reason="HistomicsTK is not installed")
def test_histomicstk_by_regions(slide):
    segment.load_segmenter.cache_clear()
    assert segment.main(["s.png", "--slide-mpp", "0.5", "--segmenter", "histomicstk", "--workers", "1"]) == 0
    found = in_order(cells("cells/histomicstk/s.npz")) * 0.5
    near = np.linalg.norm(found[:, None] - np.array(GRID)[None], axis=-1)
    assert len(found) == len(GRID) and (near.min(0) < 1).all()

