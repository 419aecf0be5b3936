"""Data sets: folders and labels.csv, the split, cells reaching their crops, data.py check and look."""
import errno
import os
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import (
    halve,
    prepared,
    refused,
    replace,
    saved,
    slides_named,
    tcga,
    times,
    tissue,
    write,
    write_table,
)

import data
import train
from common import files, pool
from common.errors import DiskFull, InputError
from common.files import read_csv
from data import Crops
from prior import bin_centroids, segment_nuclei
from wsi import cache
from wsi.cache import describe_cells, prepare, ready_cells, tile_info
from wsi.cells import read_cells
from wsi.datasets import BRIGHT3, DATASETS
from wsi.splits import find_data

# ---------------------------------------------------------------- labels

@pytest.mark.parametrize("raw", [
    "\ufeffslide,label\r\ngood,A\r\nother,B\r\n", "Slide;Label\ngood;A\nother;B\n",
    "label,slide\nA,good.png\nB,other.png\n", "slide\tlabel\n\ngood \t A\n\nother\tB\n\n",
    '"slide","label"\n"good","A, of a kind"\n"other","B"\n'])
def test_labels_as_spreadsheets_write_them(place, raw):
    saved(place / "in" / "slides" / "other.png")
    write(place / "in" / "labels.csv", raw)
    assert set(find_data("in", mpp=1.0).labels) == {"good", "other"}


@pytest.mark.parametrize("text, says", [
    ("slide,label\nd,A\ne,B\n", "none of its slides has a file; it names d, e,"), ("slide,label\n", "no row"),
    ("slide,label\n\na,A\nb,B\nc,\n", "line 5 has no label"),
    ("slide,label\na,A\nb,B\nc,A\nc,A\n", "line 5 names 'c' a second time"),
    ("slide,label\n../a,A\nb,B\n", "no file of '../a'"),
    ("slide,label\na,A\nb,A\nc,A\n", "fewer than two classes"),
    ("", "slide,label"), ("slide,label,split\na,A,train\nb,B,\nc,B,test\n", "all or none"),
    ("slide,label,split\na,A,train\nb,B,maybe\nc,B,test\n", "maybe"),
    ("slide,label,patient,split\na,A,p,train\nb,B,q,test\nc,B,p,test\n", "'p' is in train"),
    ("slide,label\na,carcinoma, low grade\nb,B\nc,B\n", "line 2 has 3 fields"),
    ("slide,label,label\na,A,B\n", "two columns are named label"),
    ("slide,label,patient\na,A,p\nb,B,q\nc,,\n", "'c'; for pre-training only, give its patient"),
    ("slide,label,patient,split\na,A,p,train\nb,B,q,train\nc,,r,test\n", "line 4 has split test and no"),
    ("image,label,patient\nslides/a.svs,A,p\nslides/b.svs,,q\n", "line 3 has no label"),
    ("image,label\n../../x.png,A\n", "outside"),
    (b"\xff\xfes\x00l\x00i\x00d\x00e\x00", "UTF-8"), ('slide,label\n"a,A\nb,B', "")])
def test_bad_labels_are_reported_in_one_line(tmp_path, monkeypatch, capsys, text, says):
    monkeypatch.chdir(tmp_path)
    slides_named(tmp_path / "s", "abc")
    write(tmp_path / "s" / "labels.csv", text)
    refused(capsys, train.main, ["--data", "s", "--mpp", "1"], "s/", says)
    assert not Path("runs").exists()


def test_labels_of_slides_beside_ready_cut_crops_are_refused(place, capsys):
    saved(place / "c" / "crops" / "a.png")
    write(place / "c" / "labels.csv", "slide,label\na,A\n")
    refused(capsys, train.main, ["--data", "c", "--mpp", "1"], "c/labels.csv: labels slides", "image,label")


def test_two_slides_of_one_name_are_refused(tmp_path):
    write(tmp_path / "a.svs", "x")
    write(tmp_path / "a.tiff", "x")
    with pytest.raises(InputError, match="rename"):
        find_data(str(tmp_path), 1.0)


def test_bright_has_three_or_six_classes_and_is_tested_on_its_validation_part(place):
    folder = place / "datasets" / "bright"
    rows = [f"{label}{i},{label},{split}" for label in BRIGHT3
            for i, split in enumerate(("train", "train", "validation"))]
    slides_named(folder, [row.split(",")[0] for row in rows])
    write_table(folder / "labels.csv", "slide,label,split", rows)
    three, six = find_data("bright3"), find_data("bright6")
    assert three.classes == ["cancerous", "non-cancerous", "pre-cancerous"]
    assert six.classes == sorted(BRIGHT3)
    assert three.split("test") == six.split("test") == sorted(f"{label}2" for label in BRIGHT3)
    assert len(three.split("val")) == 3
    assert three.split("val") == six.split("val")  # one split, whichever came first
    assert three.mpp == 1.0 and three.work == six.work
    kinds = [three.labels[f"{label}0"]["label"] for label in ("PB", "UDH", "ADH", "FEA", "DCIS", "IC")]
    assert kinds == ["non-cancerous"] * 2 + ["pre-cancerous"] * 2 + ["cancerous"] * 2
    replace(folder / "labels.csv", ("IC2,IC", "IC2,invasive"))
    with pytest.raises(InputError, match="invasive"):
        find_data("bright6")


def test_partial_downloads_and_clams_columns_are_used(place, capsys):
    slides_named(place / "s", ["TCGA-01-0001-a", "TCGA-01-0002-b", "TCGA-01-0001-more", "TCGA-01-0009-more"])
    rows = ["TCGA-01-0001,TCGA-01-0001-a,A,test", "TCGA-01-0002,TCGA-01-0002-b,B,train"]
    rows += [f"TCGA-01-{i},TCGA-01-{i}-c,A,train" for i in (1003, 1004, 1005, 1006)]  # not here yet
    write(place / "s" / "labels.csv", "\n".join(["case_id,slide_id,label,split", *rows]))
    found = find_data("s")
    assert {name: row["patient"] for name, row in found.labels.items()} == {
        "TCGA-01-0001-a": "TCGA-01-0001", "TCGA-01-0002-b": "TCGA-01-0002"}
    assert found.unlabelled() == ["TCGA-01-0009-more"]  # and no slide of the test's patient
    assert found.split("train", "val", "test") == ["TCGA-01-0002-b", "TCGA-01-0001-a"]
    out = capsys.readouterr().out
    assert "4 of 6 rows have no file" in out and "TCGA-01-1003-c" in out and "TCGA-01-1006-c" not in out
    assert "2 of 4 slides have no row; they only pre-train" in out


# ---------------------------------------------------------------- the split

def test_split_is_by_patient_stratified_and_made_once(place):
    tcga(place / "s", range(40))
    first = find_data("s").labels
    assert find_data("s", split_seed=1).labels == first  # it stands in split.csv, and no seed changes it
    for part, count in (("test", 16), ("val", 12), ("train", 52)):  # 4 of 20 patients of a class, 3 of 16
        rows = [row for row in first.values() if row["split"] == part]
        assert len(rows) == count and sum(row["label"] == "A" for row in rows) == count / 2
    patients = {}
    for name, row in first.items():
        assert row["patient"] == name[:12] and patients.setdefault(name[:12], row["split"]) == row["split"]
    (place / "datasets" / "s" / "split.csv").unlink()
    assert find_data("s", split_seed=1).labels != first
    (place / "datasets" / "s" / "split.csv").unlink()
    assert find_data("s").labels == first


def test_new_slides_join_the_split_without_moving_an_old_one(place):
    tcga(place / "s", range(20))
    before = {name: row["split"] for name, row in find_data("s").labels.items()}
    tcga(place / "s", range(30), slides_each=3)  # more patients, and more slides of the old ones
    after = find_data("s").labels
    assert all(after[name]["split"] == split for name, split in before.items())
    assert len(after) == 90 and [len({row["patient"] for row in after.values() if row["split"] == part})
                                 for part in ("test", "val")] == [6, 4]
    tcga(place / "s", range(5, 30))  # some are gone
    assert all(row["split"] == after[name]["split"] for name, row in find_data("s").labels.items())


def test_split_file_can_be_edited_and_is_checked(place, capsys):
    tcga(place / "s", range(10), slides_each=1)
    find_data("s")
    path = place / "datasets" / "s" / "split.csv"
    names, rows = read_csv(path)
    assert names == ["name", "patient", "split"] and len(rows) == 10
    text = path.read_text()
    path.write_text(text.replace(",train", ",test"))
    assert not find_data("s").split("train")
    path.write_text(text.replace(",train", ",holdout"))
    with pytest.raises(InputError, match="split.csv: line .*train, val, test"):
        find_data("s")
    tcga(place / "s", range(10))
    path.write_text("name,patient,split\nTCGA-05-0001-01Z-00-DX0,p,train\nTCGA-05-0001-01Z-00-DX1,p,test\n")
    with pytest.raises(InputError, match="'TCGA-05-0001' is in train and in test.*split.csv"):
        find_data("s")


def test_a_split_in_labels_csv_counts_and_only_validation_is_drawn(place):
    slides_named(place / "s", [f"s{i}" for i in range(12)])
    rows = [f"s{i},{'AB'[i % 2]},{'test' if i < 4 else 'train'}" for i in range(12)]
    write_table(place / "s" / "labels.csv", "slide,label,split", rows)
    found = find_data("s")
    assert found.split("test") == ["s0", "s1", "s2", "s3"] and len(found.split("val")) == 2
    assert found.split("train", "val")[:6] == found.split("train")
    replace(place / "s" / "labels.csv", ("s5,B,train", "s5,B,val"))
    assert find_data("s").split("val") == ["s5"]


# ---------------------------------------------------------------- tiles and cells

def test_cells_reach_their_crops(place, folder):
    found = find_data(str(folder), mpp=2.0, slide_mpp=1.0)
    assert prepare(found, 0.3, workers=1) == []
    xy = read_cells(place / "datasets" / "tiny_set" / "cells" / "builtin" / "glands_0.npz")
    crops = Crops(found, ["glands_0"])
    assert crops.corners.tolist() == [[0, 0]] and len(crops) == 1
    np.testing.assert_allclose(crops.cells(0), (xy / 2)[xy[:, 0].argsort()], atol=1e-3)
    image, cells = crops[0]
    assert image.shape == (3, 224, 224) and image.dtype == torch.uint8 and len(cells) > 50
    assert torch.equal(crops.priors()[0], bin_centroids(xy / 2, 224))
    made = times(place / "datasets")
    assert prepare(found, 0.3, workers=1) == [] and times(place / "datasets") == made  # nothing again
    with pytest.raises(InputError, match="--tissue 0.3"):
        prepare(found, 0.5, workers=1)


def test_a_moved_folder_is_used_and_a_replaced_slide_is_cut_again(place):
    found, failed = prepared()
    assert failed == []
    tile = place / "datasets" / "in" / "crops" / "1um" / "good" / "0_0.jpg"
    cells, written = Crops(found, ["good"]).cells(0), tile.stat().st_mtime_ns
    (place / "elsewhere").mkdir()
    (place / "in").rename(place / "elsewhere" / "in")
    moved, failed = prepared("elsewhere/in")
    assert failed == [] and tile.stat().st_mtime_ns == written
    saved(place / "elsewhere" / "in" / "slides" / "good.png", array=tissue(seed=5))
    assert tile_info(moved, "good") is None and len(Crops(moved, ["good"])) == 0  # the old one is not used
    assert prepare(moved, 0.5, workers=1) == [] and tile.stat().st_mtime_ns != written
    assert not np.array_equal(Crops(moved, ["good"]).cells(0), cells)


def test_um_per_px_of_slide_and_crop_are_compared_and_several_stand_side_by_side(place):
    saved(place / "in" / "slides" / "good.png", array=tissue(500))
    fine, _ = prepared()
    made = times(place / "datasets")
    coarse, failed = prepared(mpp=2.0)
    assert failed == [] and len(crops := Crops(fine, ["good"])) == 4 and len(Crops(coarse, ["good"])) == 1
    xy = ready_cells(fine, "good")
    for i, corner in enumerate(crops.corners):  # against asking every cell
        inside = ((xy >= corner) & (xy < corner + 224)).all(1)
        own = (xy[inside] - corner).astype(np.float32)
        assert len(own) > 2 and sorted(crops.cells(i).tolist()) == sorted(own.tolist())
    assert made.items() <= times(place / "datasets").items()  # 10x beside 5x, the cells of both are the same
    other, failed = prepared(slide_mpp=2.0, mpp=2.0)  # the slide is said to be at another um/px than before
    assert failed == [] and tile_info(other, "good")["slide_mpp"] == 2.0 and len(Crops(other, ["good"])) == 4
    assert len(Crops(fine, ["good"])) == 0  # its cells are those of the other um/px now
    assert len(Crops(find_data("in", mpp=2.0), ["good"])) == 4  # nothing said: as it was cut


def test_a_replaced_file_of_cells_is_read_again_whatever_its_time(place):
    path = place / "in" / "cells" / "good.csv"
    for i, x in enumerate((20, 30)):
        write(path, f"x,y\n{x},30\n")
        os.utime(path, ns=(10 - i, 10 - i))  # the second is older, as cp -p and rsync leave it
        found, failed = prepared()
        assert failed == [] and Crops(found, ["good"]).cells(0).tolist() == [[x, 30]]


@pytest.mark.parametrize("name", ["good.json", "good_seg.npy", "good_cp_masks.png"])
def test_broken_cells_cost_their_slide_only(place, name):
    saved(place / "in" / "slides" / "other.png")
    write(place / "in" / "cells" / name, '{"nuc": {"1": {"type": 1}}}')
    found, failed = prepared()
    assert len(failed) == 1 and name in failed[0] and "\n" not in failed[0]
    assert Crops(found, found.split("train")).owner == ["other"]


def test_cells_far_out_and_cells_twice_are_no_harm(place):
    write(place / "in" / "cells" / "good.csv", "x,y\n-5,3\n1e12,4\n-1e300,1e300\n20,30\n20,30\n")
    found, failed = prepared()
    assert failed == []
    crops = Crops(found, ["good"])
    assert crops.cells(0).tolist() == [[20, 30], [20, 30]] and crops.priors().sum() == 1
    line = describe_cells(2, 1, crops.priors().mean().item(), 1.0)
    assert "\nwarning: tissue has" in line and "0.5%" in line and "40 per mm2" in line  # one of 196 patches
    assert "finer --mpp" in describe_cells(500, 1, 0.9, 1.0)
    assert "warning" not in describe_cells(500, 1, 0.6, 1.0)


def test_prior_of_a_segmenter_reads_its_files_and_no_others(place):
    saved(place / "in" / "slides" / "other.png")
    write(place / "in" / "cells" / "good.json", {"mag": 20, "nuc": {"1": {"centroid": [40, 60]}}})
    write(place / "in" / "cells" / "cellpose" / "good.csv", "x,y\n7,8\n")
    for prior, cells in (("hovernet", [[20, 30]]), ("cellpose", [[7, 8]]), ("auto", [[20, 30]])):
        found, failed = prepared(prior=prior)
        assert len(failed) == (prior != "auto")
        assert all("other.png" in line and prior in line for line in failed)
        assert Crops(found, ["good"]).cells(0).tolist() == cells
    found, failed = prepared(prior="builtin")
    assert failed == [] and len(Crops(found, ["good"]).cells(0)) > 10
    with pytest.raises(InputError, match="histomicstk"):
        prepared(prior="histomicstk")


def dies_on_killer(path, *rest, cut=cache.cut):
    if Path(path).stem == "killer":
        os._exit(9)  # as the kernel does when memory runs out
    return cut(path, *rest)


def test_a_worker_that_is_killed_costs_its_own_slide(place, monkeypatch):
    saved(place / "in" / "slides" / "killer.png")
    monkeypatch.setattr(cache, "cut", dies_on_killer)
    monkeypatch.setattr(pool, "get_context", lambda _: get_context("fork"))  # spares two imports of torch
    found = find_data("in", mpp=1.0, slide_mpp=1.0)
    failed = prepare(found, 0.5, workers=2)
    assert len(failed) == 1 and "killer.png" in failed[0]
    assert tile_info(found, "good")["tiles"] == 1


def disk_is_full_on_killer(path, *rest, cut=cache.cut):
    if Path(path).stem == "killer":
        raise files.not_written(path, OSError(errno.ENOSPC, ""))
    return cut(path, *rest)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_ends_the_work_on_all_slides_and_no_other_error_does(place, monkeypatch, workers):
    """None of the slides after the one that found the disk full is cut, but for those in flight."""
    for name in ("killer", *(f"later_{i}" for i in range(8))):
        saved(place / "in" / "slides" / f"{name}.png")
    monkeypatch.setattr(cache, "cut", disk_is_full_on_killer)
    monkeypatch.setattr(pool, "get_context", lambda _: get_context("fork"))
    found = find_data("in", mpp=1.0, slide_mpp=1.0)
    with pytest.raises(DiskFull, match="killer.png.*free disk space"):
        prepare(found, 0.5, workers=workers)
    assert tile_info(found, "good")["tiles"] == 1
    assert tile_info(found, "later_7") is None
    no_name = files.not_written("a", OSError(errno.ENAMETOOLONG, ""))
    assert type(no_name) is InputError and "too long" in str(no_name)


def wait_and_write(path):
    time.sleep(0.1)
    path.touch()


def test_an_error_of_the_caller_begins_no_further_task(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "get_context", lambda _: get_context("fork"))
    work = pool.in_processes(wait_and_write, [(tmp_path / str(i),) for i in range(20)], 2, "files")
    next(work)
    work.close()
    assert 1 <= len(list(tmp_path.iterdir())) < 10


# ---------------------------------------------------------------- ready-cut crops

def test_crops_take_cells_of_their_own_in_their_own_pixels(place):
    for name in ("a", "b", "cut"):
        saved(place / "c" / "crops" / f"{name}.png", array=tissue(448))
    halve(place / "c" / "crops" / "cut.png")
    write(place / "c" / "cells" / "a.json", {"mag": None, "nuc": {"1": {"centroid": [100, 40]}}})
    found, failed = prepared("c")
    assert len(failed) == 1 and "cut.png" in failed[0]
    crops = Crops(found, found.split("train"))
    assert crops.owner == ["a.png", "b.png"]
    assert crops.cells(0).tolist() == [[50, 20]] and len(crops.cells(1)) > 10
    saved(place / "c" / "crops" / "new.png", array=tissue(448))  # added later
    found, failed = prepared("c")
    assert len(failed) == 1 and len(Crops(found, found.split("train"))) == 3
    with pytest.raises(InputError, match="--mpp"):
        prepared("c", mpp=None)


def test_cells_of_crops_are_recomputed_where_what_they_were_made_from_changed(place):
    for i in range(2):
        saved(place / "c" / "crops" / f"{i}.png", array=tissue(224, seed=i))

    def cells(mpp):
        found, failed = prepared("c", mpp)
        assert failed == []
        return Crops(found, ["0.png", "1.png"]).cells
    image = np.asarray(Image.open(place / "c" / "crops" / "0.png"))
    for mpp in (0.5, 1.0):
        np.testing.assert_allclose(cells(mpp)(0), segment_nuclei(image, mpp), atol=1e-3)
    kept = place / "datasets" / "c" / "cells" / "crops_auto.npz"
    written, detected = kept.stat().st_mtime_ns, cells(1.0)(1)
    assert kept.stat().st_mtime_ns == written  # not found twice
    for x in (7, 8):
        given = write(place / "c" / "cells" / "0.csv", f"x,y\n{x},9\n")
        os.utime(given, ns=(x, x))  # older than what was made: another file all the same
        assert cells(1.0)(0).tolist() == [[x, 9]]
    np.testing.assert_array_equal(cells(1.0)(1), detected)
    saved(place / "c" / "crops" / "1.png", array=tissue(224, seed=7))
    assert not np.array_equal(cells(1.0)(1), detected)
    kept.write_bytes(kept.read_bytes()[:100])
    assert len(cells(1.0)(1)) > 10


def test_shuffled_prior_keeps_the_share_of_cell_patches_and_their_cells():
    xy = np.random.default_rng(0).uniform(0, 224, (80, 2))
    outside = np.array([[-5., 9], [224, 30], [50, 300]])
    moved = data.shuffle_places(np.concatenate([outside, xy]), np.random.default_rng(1))
    np.testing.assert_array_equal(moved[:3], outside)
    moved = moved[3:]
    before, after = bin_centroids(xy, 224), bin_centroids(moved, 224)
    assert before.sum() == after.sum() and not torch.equal(before, after)
    np.testing.assert_allclose(moved % 16, xy % 16)
    counts = [np.unique(v // 16, axis=0, return_counts=True)[1] for v in (xy, moved)]
    np.testing.assert_array_equal(*map(np.sort, counts))
    assert data.shuffle_places(np.zeros((0, 2)), np.random.default_rng(0)).shape == (0, 2)


# ---------------------------------------------------------------- data.py check, look

def test_check_says_what_is_there_and_what_to_look_at(place, capsys):
    saved(place / "in" / "slides" / "other.png")
    write(place / "in" / "slides" / "late.svs.partial", "x")
    write(place / "in" / "slides" / "zero.svs", "")
    rows = ["good,A,p,train", "other,B,q,test", "zero,B,r,train"]
    write_table(place / "in" / "labels.csv", "slide,label,patient,split", rows)
    write(place / "in" / "cells" / "good.json", {"mag": None, "nuc": {}})
    flags = ["--mpp", "1", "--slide-mpp", "1", "--workers", "1"]
    assert data.main(["check", "--data", "in", *flags]) == 1
    out = capsys.readouterr().out
    for says in ("slides: 3", "um/px by: --slide-mpp 2", "tiles cut at 1 um/px: 0 of 3", "A 1 of 1 patients",
                 "hovernet 1", "cannot be used: 1", "none yet 2", "zero.svs", "late.svs", "no usable val ",
                 "no usable train image of B", "no usable test image of A", "no cell, so that it",
                 "1 slides are in two splits under two names", ": good = other\n",
                 "warnings: 7"):
        assert says in out, says


@pytest.mark.parametrize("name", DATASETS)
def test_check_of_every_data_set_says_where_to_get_it(place, capsys, name):
    assert data.main(["check", "--data", name]) == 1
    out = capsys.readouterr().out
    assert "expected: datasets/" in out and "is missing; see the two lines above" in out
    assert "data.py check" not in out  # the reader has just run it
    assert name != "lung" or "manifest --data lung" in out and "datasets/lung/slides/" in out


def test_look_draws_a_slide_and_counts(place, capsys):
    saved(place / "big.png", array=tissue(500))
    assert data.main(["look", "big.png", "--mpp", "1", "--slide-mpp", "1", "--workers", "1"]) == 0
    assert "4 tiles at 1 um/px" in capsys.readouterr().out
    assert Image.open("runs/look_big.png").size[0] > 1000
    flags = ["look", "big.png", "--mpp", "1", "--slide-mpp", "1", "--workers", "1"]
    for point in ("1,2,3", "a,b", "499,10"):
        refused(capsys, data.main, [*flags, "--tile", "10,300", point], f"--tile {point}")
    refused(capsys, data.main, ["look", "big.png", "--mpp", "1"], "big.png: no um/px", "--slide-mpp")
    assert data.main(["look", "nothing.svs"]) == 2
