"""The detector of nuclei, and python -m wsi.segment: slides by regions, by any segmenter."""
import importlib.util
import json
import sys
import types
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from synthetic import arrays_of, discs, halve, refused, saved, times, write

from common import pool
from demo import slides as demo
from experiments.figures.priors import matched
from prior import downsample_factor, segment_nuclei
from wsi import segment
from wsi.label_images import label_centroids

NUCLEI = Path(__file__).resolve().parents[2] / "shared" / "data" / "nuclei"


def in_order(xy):
    """By rows from above."""
    return xy[np.lexsort(np.round(xy, 1).T)]


# ---------------------------------------------------------------- the detector

@pytest.mark.parametrize("mpp", [0.125, 0.25, 0.5, 0.8, 1.0])
def test_detector_finds_a_disc_where_it_is_with_px_i_from_i_to_i_plus_1(mpp):
    centres = np.array([[x, y] for y in range(20, 110, 20) for x in range(20, 110, 20)], float)
    found = in_order(segment_nuclei(discs(mpp, centres), mpp) * mpp)
    np.testing.assert_allclose(found, centres, atol=0.02)  # half a px would be 0.06 to 0.5
    assert downsample_factor(mpp) == {0.125: 4, 0.25: 2}.get(mpp, 1)


def test_detector_finds_nothing_on_white_and_refuses_what_is_no_image():
    assert len(segment_nuclei(np.full((300, 300, 3), 243, np.uint8), 0.5)) == 0
    with pytest.raises(ValueError, match="mpp"):
        segment_nuclei(np.zeros((4, 4, 3), np.uint8), 0)
    with pytest.raises(ValueError, match="uint8"):
        segment_nuclei(np.zeros((4, 4, 3)), 0.5)


def test_detector_on_the_synthetic_slides(rendered):
    for image, truth in rendered.values():
        found = segment_nuclei(image, demo.MPP)
        assert 2 * matched(found, truth, 3 / demo.MPP) / (len(found) + len(truth)) > 0.8


@pytest.mark.skipif(not NUCLEI.is_dir(), reason=f"needs {NUCLEI}, which is not in the repository")
@pytest.mark.parametrize("group, at_least", [("crchisto_", 0.62), ("monuseg_", 0.84)])
def test_detector_on_real_images(group, at_least):
    hits = found = marked = 0
    for path in sorted(NUCLEI.glob(group + "*.json")):
        truth = json.loads(path.read_text())
        xy = segment_nuclei(np.asarray(Image.open(path.with_suffix(".png")).convert("RGB")), truth["mpp"])
        hits += matched(xy, truth["centroids"], 3 / truth["mpp"])  # one to one
        found += len(xy)
        marked += len(truth["centroids"])
    assert 2 * hits / (found + marked) >= at_least


# ---------------------------------------------------------------- slides by regions

class FakeModel:
    """Replaces Cellpose's network: labels px that are dark in red, and records its arguments."""
    scales = []  # of each call, the px values that become 0 and 1
    areas = []  # of all nuclei, px

    def __init__(self, gpu=False):
        self.gpu = gpu

    def eval(self, x, channel_axis=None, normalize=True):
        assert x.dtype == np.uint8 and x.shape[channel_axis] == 3 and np.shape(normalize["lowhigh"]) == (3, 2)
        labels = ndimage.label(x[..., 0] < 180)[0]
        self.scales.append(np.array(normalize["lowhigh"]))
        self.areas.extend(np.bincount(labels.ravel())[1:])
        return labels, [], np.zeros(256)


@pytest.fixture
def cellpose(monkeypatch):
    package = types.ModuleType("cellpose")
    models = types.ModuleType("cellpose.models")
    package.models = models
    models.CellposeModel = FakeModel
    FakeModel.scales = []
    FakeModel.areas = []
    monkeypatch.setitem(sys.modules, "cellpose", package)
    monkeypatch.setitem(sys.modules, "cellpose.models", models)
    segment.load_segmenter.cache_clear()
    yield models
    segment.load_segmenter.cache_clear()


GRID = np.array([[x, y] for y in range(10, 200, 15) for x in range(70, 300, 15)], float)  # um; many on seams
CELLPOSE = ["--slide-mpp", "0.5", "--segmenter", "cellpose"]


@pytest.fixture(scope="module")
def picture():
    image = discs(0.5, GRID, 320, 215)
    image[:, :110] = 243
    return image


@pytest.fixture
def slide(tmp_path, monkeypatch, picture):
    """s.png, a slide of 320 x 215 um at 0.5 um/px: glass on the left, nuclei on seams and off them."""
    monkeypatch.setattr(segment, "REGION", 100)
    monkeypatch.chdir(tmp_path)
    saved(Path("s.png"), array=picture)
    return picture


def cells(path):
    file = arrays_of(path)
    assert file["x"].dtype == file["y"].dtype == np.float32
    return in_order(np.stack([file["x"], file["y"]], 1))


def test_cellpose_by_regions_is_cellpose_of_the_whole(slide, cellpose, capsys):
    assert segment.main(["s.png", *CELLPOSE]) == 0
    whole = label_centroids(ndimage.label(slide[..., 0] < 180)[0])
    assert len(whole) == len(GRID)
    np.testing.assert_allclose(cells("cells/cellpose/s.npz"), in_order(whole), atol=1e-3)
    assert 15 <= len(FakeModel.scales) < 7 * 5  # regions of glass alone are skipped
    assert all(np.array_equal(scale, FakeModel.scales[0]) for scale in FakeModel.scales)  # one a slide
    last = capsys.readouterr().out.strip().splitlines()[-1]
    for says in ("1 of 1", "cells/cellpose", "train.py", "--prior cellpose"):
        assert says in last


@pytest.mark.parametrize("flags, mpp", [([], 0.5), (["--mpp", "1"], 1.0)])
def test_the_segmenter_sees_about_the_um_per_px_asked_for(slide, cellpose, flags, mpp):
    saved(Path("s.png"), array=slide.repeat(2, 0).repeat(2, 1))  # 0.25 um/px
    assert segment.main(["s.png", *CELLPOSE, "--slide-mpp", "0.25", *flags]) == 0
    np.testing.assert_allclose(cells("cells/cellpose/s.npz") * 0.25, GRID, atol=0.15)
    assert np.median(FakeModel.areas) == pytest.approx(np.pi * 3.5 ** 2 / mpp ** 2, rel=0.2)


def test_builtin_by_regions_is_the_detector_of_the_whole(tmp_path, rendered, monkeypatch):
    """No cell is lost or doubled on a seam or at a ragged edge."""
    monkeypatch.setattr(segment, "REGION", 301)
    image = rendered["nests"][0][:1100, 500:1700]
    twice = image.repeat(2, 0).repeat(2, 1)[:999, :1399]  # at 0.25 um/px two px are averaged
    for mpp, whole in ((1.0, image), (0.25, twice)):
        path = tmp_path / f"{mpp}.png"
        saved(path, array=whole)
        tasks = segment.slide_regions(path, mpp, "builtin", segment.WORK_MPP)
        assert len(tasks) >= 4
        regions = [segment.segment_region(*task) for task in tasks]
        got = segment.merge_seams(regions, segment.SEAM / mpp)
        want = segment_nuclei(whole, mpp, tasks[0][4])
        assert len(want) > 80
        np.testing.assert_allclose(in_order(got), in_order(want), atol=1e-6)


def test_what_two_regions_see_a_little_apart_is_one_cell():
    left = np.array([[99.8, 10], [50, 50], [50.5, 50]])
    right = np.array([[100.3, 10.2], [100.4, 40]])
    none = np.zeros((0, 2))
    merged = segment.merge_seams([left, right, none, np.array([[100.1, 10.1]])], 2.0)
    assert merged.tolist() == [[99.8, 10], [50, 50], [50.5, 50], [100.4, 40]]
    assert segment.merge_seams([none], 2.0).shape == (0, 2)
    assert segment.merge_seams([left[:1]], 2.0).shape == (1, 2)


def test_a_broken_slide_is_listed_and_nothing_else_is_lost_or_done_twice(slide, capsys, monkeypatch):
    saved(Path("in/good.png"), array=slide)
    saved(Path("in/cut.png"), array=slide)
    halve(Path("in/cut.png"))
    saved(Path("in/white.png"), array=np.full_like(slide, 255))
    write(Path("in/.hidden.png"), "")
    write(Path("in/notes.txt"), "no slide")
    argv = ["in", "gone.svs", "--slide-mpp", "0.5", "--workers", "2", "--out", "in/cells"]
    with monkeypatch.context() as forked:  # spares four imports of torch
        forked.setattr(pool, "get_context", lambda _: get_context("fork"))
        assert segment.main(argv) == 1
    output = capsys.readouterr()
    for name in ("cut.png", "white.png", "gone.svs"):
        assert sum(name in line for line in output.err.splitlines()) == 1
    assert "1 of 4 slides" in output.out and "Traceback" not in output.err
    written = times(Path("in/cells"))
    assert [path.name for path in written] == ["good.npz"]
    assert segment.main([*argv, "--workers", "1"]) == 1 and times(Path("in/cells")) == written
    again = ["in/good.png", "--out", "in/cells", "--workers", "2", "--slide-mpp"]
    assert segment.main([*again, "0.5"]) == 0 and times(Path("in/cells")) == written  # nothing is left to do
    one = pool.pool_of(1)  # spawned, as for users
    monkeypatch.setattr(pool, "pool_of", lambda workers: one)
    assert segment.main([*again, "0.4"]) == 0 and times(Path("in/cells")) != written  # at other um/px


def test_a_region_that_fails_costs_its_slide_alone(slide, cellpose, capsys, monkeypatch):
    saved(Path("t.png"), array=slide[::-1])
    real = FakeModel.eval

    def fails_once(self, x, **named):
        result = real(self, x, **named)
        if len(self.scales) == 3:
            raise RuntimeError("CUDA error\nof two lines")
        return result
    monkeypatch.setattr(FakeModel, "eval", fails_once)
    assert segment.main(["s.png", "t.png", *CELLPOSE]) == 1
    error = capsys.readouterr().err
    assert "CUDA error of two lines" in error and "s.png" in error
    assert [path.name for path in Path("cells/cellpose").iterdir()] == ["t.npz"]


def test_slides_in_gdc_clients_folders_are_found_and_crops_and_cells_are_not(slide):
    for name in ("lung/slides/d3b07384/a.png", "lung/slides/b.png", "lung/crops/2um/c/0_0.jpg",
                 "flat/e/a.png", "flat/b.png", "flat/crops/2um/c/0_0.jpg", "flat/cells/b_cp_masks.png"):
        saved(Path(name), array=slide)
    write(Path("lung/slides/d3b07384/logs/a.svs.parcel"), "no slide")
    for folder in ("lung", "lung/slides", "flat"):
        found = segment.slides_by_name([Path(folder)])
        assert sorted(found) == ["a", "b"] and found["a"].parent.name in ("d3b07384", "e")
    assert segment.main(["lung", "--slide-mpp", "0.5", "--workers", "1", "--out", "lung/cells"]) == 0
    assert [path.name for path in times(Path("lung/cells"))] == ["a.npz", "b.npz"]


@pytest.mark.parametrize("argv, says", [
    (["s.png", "--segmenter", "hovernet"], "invalid choice"), (["s.png", "--mpp", "0"], "--mpp: 0"),
    (["s.png", "--slide-mpp", "nan"], "--slide-mpp: nan"), (["s.png", "--workers", "0"], "--workers: 0"),
    (["s.png", "a/s.png"], "rename"), (["empty"], "no slide")])
def test_bad_flags_end_with_2(slide, capsys, argv, says):
    Path("empty").mkdir()
    refused(capsys, segment.main, argv, "wsi.segment: ", says)
    assert not Path("cells").exists()


def test_a_segmenter_that_cannot_be_loaded_is_reported_before_the_work(slide, cellpose, capsys, monkeypatch):
    argv = ["s.png", *CELLPOSE]
    monkeypatch.setattr(cellpose, "CellposeModel", lambda gpu: open("/gone/cpsam"))
    refused(capsys, segment.main, argv, "~/.cellpose/models")
    cellpose.Cellpose = None
    refused(capsys, segment.main, argv, "older than version 4")
    monkeypatch.setitem(sys.modules, "cellpose.models", None)
    refused(capsys, segment.main, argv, "pip install")


@pytest.mark.skipif(not importlib.util.find_spec("histomicstk"), reason="HistomicsTK is not installed")
def test_histomicstk_by_regions(slide):
    segment.load_segmenter.cache_clear()
    argv = ["s.png", "--slide-mpp", "0.5", "--segmenter", "histomicstk", "--workers", "1"]
    assert segment.main(argv) == 0
    found = cells("cells/histomicstk/s.npz") * 0.5
    near = np.linalg.norm(found[:, None] - GRID[None], axis=-1)
    assert len(found) == len(GRID) and (near.min(0) < 1).all()
