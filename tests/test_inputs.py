"""Hostile input: each costs its own slide at most, or ends a command with one line and exit code 2."""
import errno
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import slides as slides_py
import tifffile
import torch
import views as views_py
from errors import InputError
from PIL import Image

import data as data_py
import eval as eval_py
import prior as prior_py
import train as train_py


def tissue(side=256, seed=0):
    """Synthetic: pink ground with dark nuclei, uint8 (side, side, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    density = np.full((side, side), 0.0)
    for cx, cy in rng.uniform(0, side, (60, 2)):
        density = np.maximum(density, np.hypot(x - cx, y - cy) < 4)
    return (245 * np.exp(-(density[..., None] * prior_py.STAINS[0] + 0.3 * prior_py.STAINS[1]))).astype(np.uint8)


def png_that_claims(width, height):
    """A PNG header of a picture of that size with next to nothing in it."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"0" * 1000)) + chunk(b"IEND", b""))


def svs(path, image, description):
    tifffile.imwrite(path, image, tile=(256, 256), compression="zlib", photometric="rgb", metadata=None, description=description)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncated_svs(path):
    svs(path, tissue(900), "Aperio|AppMag = 10|MPP = 1.0")
    halve(path)


def broken_tile(path):
    """Whole but for bytes in the middle: it opens, and reading fails."""
    svs(path, tissue(900), "Aperio|AppMag = 10|MPP = 1.0")
    whole = bytearray(path.read_bytes())
    whole[2000: 2400] = b"\xff" * 400
    path.write_bytes(whole)


def saved(path, mode=None, array=None, **options):
    image = Image.fromarray(tissue() if array is None else array)
    (image.convert(mode) if mode else image).save(path, **options)


def wrong_header(path):
    saved(path, format="JPEG")
    path.write_bytes(b"\x00\x01\x02\x03" + path.read_bytes()[4:])


BROKEN = {  # name: how it is made; each is passed over and listed
    "truncated.svs": truncated_svs,
    "broken tile.svs": broken_tile,
    "zero.svs": lambda p: p.write_bytes(b""),
    "text.svs": lambda p: p.write_text("slide,label\n"),
    "page.tiff": lambda p: p.write_text("<html>404 not found</html>"),
    "zero.jpg": lambda p: p.write_bytes(b""),
    "header.jpg": wrong_header,
    "cut.png": lambda p: (saved(p), halve(p)),
    "cut.jpg": lambda p: (saved(p, format="JPEG"), halve(p)),
    "bomb.png": lambda p: p.write_bytes(png_that_claims(100_000, 100_000)),
    "no pixels.png": lambda p: p.write_bytes(png_that_claims(300, 300)),
    "tiny.png": lambda p: saved(p, array=tissue(40)),
    "line.png": lambda p: saved(p, array=tissue(2000)[:3]),
    "white.png": lambda p: saved(p, array=np.full((300, 300, 3), 244, np.uint8)),
    "black.png": lambda p: saved(p, array=np.zeros((300, 300, 3), np.uint8)),
    "grey.png": lambda p: saved(p, "L"),
    "bits.png": lambda p: saved(p, "1"),
    "sixteen bits.png": lambda p: Image.fromarray(tissue()[..., 0].astype(np.uint16) * 257).save(p),
    "five channels.tif": lambda p: tifffile.imwrite(p, np.zeros((300, 300, 5), np.uint8), photometric="minisblack", planarconfig="contig"),
    "floats.tif": lambda p: tifffile.imwrite(p, np.full((300, 300), np.nan, np.float32)),
    "invisible.png": lambda p: saved(p, array=np.dstack([tissue(), np.zeros((256, 256), np.uint8)])),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder with in/slides/good.png, a slide of one tile at 1.0 um/px."""
    here = tmp_path / "here"
    (here / "in" / "slides").mkdir(parents=True)
    monkeypatch.chdir(here)
    saved(here / "in" / "slides" / "good.png")
    return here


def outside(place):
    """Whatever lies beside the working folder: nothing may be written there."""
    return sorted(p.name for p in place.parent.iterdir() if p != place)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_slide_is_passed_over_and_listed_by_name(place, name):
    BROKEN[name](place / "in" / "slides" / name)
    found = data_py.find_data("in", mpp=1.0)
    failed = data_py.prepare(found, 1.0, 0.5, workers=1)
    assert len(failed) == 1 and name in failed[0] and "\n" not in failed[0]
    assert len(data_py.Crops(found, found.split("train"))) == 1
    assert not [p for p in place.rglob("*part*")] and not outside(place)


@pytest.mark.parametrize("name, make", {
    "cmyk.jpg": lambda p: saved(p, "CMYK", format="JPEG"), "palette.png": lambda p: saved(p, "P"),
    "alpha.png": lambda p: saved(p, "RGBA"), "progressive.jpg": lambda p: saved(p, format="JPEG", progressive=True, quality=95),
    "  spaces and ünïcödé №1 .png": saved, "semi;colon,comma.png": saved, "%s %d {x}.png": saved, "-rf.png": saved,
}.items())
def test_odd_slides_that_are_whole_are_used(place, name, make):
    make(place / "in" / "slides" / name)
    found = data_py.find_data("in", mpp=1.0)
    assert data_py.prepare(found, 1.0, 0.5, workers=1) == []
    crops = data_py.Crops(found, found.split("train"))
    assert len(crops) == 2 and crops[0][0].shape == crops[1][0].shape == (3, 224, 224) and len(crops.cells(1)) > 10


def test_folders_and_links_that_are_no_slides_are_left_alone(place):
    slides = place / "in" / "slides"
    (slides / "folder.svs").mkdir()
    (slides / "loop.svs").symlink_to(slides / "loop.svs")
    (slides / "circle").symlink_to(slides)
    (slides / "nowhere.svs").symlink_to(place / "gone.svs")
    (slides / ".hidden.png").write_bytes(b"x")
    (slides / "a.svs.partial").write_bytes(b"x")
    found = data_py.find_data("in", mpp=1.0)
    assert list(found.images) == ["good"]
    assert data_py.prepare(found, 1.0, 0.5, workers=1) == []


@pytest.mark.parametrize("description, says", [
    ("Aperio|AppMag = 10|MPP = 0", None), ("Aperio|AppMag = 10|MPP = 1000000", None), ("Aperio|AppMag = 10|MPP = unknown", None),
    ("Aperio|AppMag = 10|MPP = 1.0", None), ("Aperio|AppMag = 40|MPP = 1.0", "1 is taken"),
    ("Aperio|AppMag = 0|MPP = 0", "--slide-mpp"), ("Aperio|AppMag = nan|MPP = nan", "--slide-mpp"),
    ("Aperio|AppMag = -10|MPP = -1", "--slide-mpp"), ("Aperio", "--slide-mpp")])
def test_um_per_px_as_slides_record_it(place, capsys, description, says):
    (place / "in" / "slides" / "good.png").unlink()
    svs(place / "in" / "slides" / "a.svs", tissue(300), description)
    found = data_py.find_data("in", mpp=1.0)
    if says == "--slide-mpp":
        with pytest.raises(InputError, match=says) as error:
            data_py.prepare(found, None, 0.5, workers=1)
        assert "a.svs" in str(error.value)
    else:
        failed = data_py.prepare(found, None, 0.5, workers=1)
        assert failed == [] and (says or "") in capsys.readouterr().out
        assert data_py.tile_info(found, "a")["slide_mpp"] == 1.0


# ---------------------------------------------------------------- cells

@pytest.mark.parametrize("name, text", {
    "good.json": '{"nuc": {"1": {"type": 1}}}', "good.csv": "x,y\n1,b\n", "good.npz": "no zip", "good_seg.npy": "no pickle",
    "good.geojson": '{"type": "FeatureCollection"', "good_cp_masks.png": "no png"}.items())
def test_broken_cells_cost_their_slide_only(place, name, text):
    saved(place / "in" / "slides" / "other.png")
    (place / "in" / "cells").mkdir()
    (place / "in" / "cells" / name).write_text(text)
    found = data_py.find_data("in", mpp=1.0)
    failed = data_py.prepare(found, 1.0, 0.5, workers=1)
    assert len(failed) == 1 and name in failed[0] and "\n" not in failed[0]
    assert data_py.Crops(found, found.split("train")).owner == ["other"]


def test_cells_far_out_and_cells_twice_are_no_harm(place):
    (place / "in" / "cells").mkdir()
    (place / "in" / "cells" / "good.csv").write_text("x,y\n-5,3\n1e12,4\n-1e300,1e300\n20,30\n20,30\n")
    found = data_py.find_data("in", mpp=1.0)
    assert data_py.prepare(found, 1.0, 0.5, workers=1) == []
    crops = data_py.Crops(found, ["good"])
    assert crops.cells(0).tolist() == [[20, 30], [20, 30]] and crops.priors().sum() == 1


def test_prior_of_a_segmenter_reads_its_files_and_no_others(place):
    saved(place / "in" / "slides" / "other.png")
    (place / "in" / "cells" / "cellpose").mkdir(parents=True)
    (place / "in" / "cells" / "good.json").write_text('{"mag": 20, "nuc": {"1": {"centroid": [40, 60]}}}')
    (place / "in" / "cells" / "cellpose" / "good.csv").write_text("x,y\n7,8\n")
    for which, cells in (("hovernet", [[20, 30]]), ("cellpose", [[7, 8]]), ("auto", [[20, 30]])):
        found = data_py.find_data("in", mpp=1.0, prior=which)
        failed = data_py.prepare(found, 1.0, 0.5, workers=1)
        assert len(failed) == (which != "auto") and all("other.png" in line and which in line for line in failed)
        assert data_py.Crops(found, ["good"]).cells(0).tolist() == cells
    found = data_py.find_data("in", mpp=1.0, prior="builtin")
    assert data_py.prepare(found, 1.0, 0.5, workers=1) == [] and len(data_py.Crops(found, ["good"]).cells(0)) > 10
    with pytest.raises(InputError, match="histomicstk"):
        data_py.prepare(data_py.find_data("in", mpp=1.0, prior="histomicstk"), 1.0, 0.5, workers=1)


def test_a_prior_of_one_region_only_is_warned_of(place, capsys):
    (place / "in" / "cells").mkdir()
    (place / "in" / "cells" / "good.csv").write_text("x,y\n20,30\n")
    found = data_py.find_data("in", mpp=1.0)
    data_py.prepare(found, 1.0, 0.5, workers=1)
    line = data_py.describe_prior(data_py.Crops(found, ["good"]), 1.0)
    assert "Warning" in line and "0.5%" in line  # one of 196
    assert "20 per mm2" in line  # one in 224 um squared


# ---------------------------------------------------------------- labels

@pytest.mark.parametrize("raw", [
    "\ufeffslide,label\r\ngood,A\r\nother,B\r\n", "Slide;Label\ngood;A\nother;B\n", "label,slide\nA,good.png\nB,other.png\n",
    "slide,label\n\ngood , A\n\nother,B\n\n", '"slide","label"\n"good","A, of a kind"\n"other","B"\n'])
def test_labels_as_spreadsheets_write_them(place, raw):
    saved(place / "in" / "slides" / "other.png")
    (place / "in" / "labels.csv").write_bytes(raw.encode())
    assert set(data_py.find_data("in", mpp=1.0).labels) == {"good", "other"}


@pytest.mark.parametrize("raw", [
    b"\xff\xfes\x00l\x00i\x00d\x00e\x00", b"\x00" * 50, b"slide,label\n../good,A\nother,B\n", b"slide,label\n/etc/passwd,A\nother,B\n",
    b"slide,label\ngood,A\nother,A\n", b"slide\tlabel\ngood\tA\n", b"slide,label\ngood,A\ngood,B\nother,B\n", b'slide,label\n"good,A\nother,B\n',
    b"slide,label,split\ngood,A,train\nother,B,holdout\n", b"image,label\n../../x.png,A\n"])
def test_hostile_labels_are_one_line_and_exit_2(place, capsys, raw):
    saved(place / "in" / "slides" / "other.png")
    (place / "in" / "labels.csv").write_bytes(raw)
    assert train_py.main(["--data", "in", "--mpp", "1"]) == 2
    error = capsys.readouterr().err
    assert "in/labels.csv" in error and error.count("\n") == 1 and not (place / "runs").exists()


# ---------------------------------------------------------------- flags, outputs, files of ours

@pytest.mark.parametrize("argv", [
    ["--batch", "0"], ["--epochs", "-1"], ["--lr", "nan"], ["--lr", "inf"], ["--fraction", "nan"], ["--mpp", "nan"], ["--mpp", "-1"],
    ["--slide-mpp", "1e9"], ["--tissue", "2"], ["--global-size", "100"], ["--local-size", "0"], ["--warmup-epochs", "9", "--epochs", "9"],
    ["--momentum", "1.5"], ["--teacher-temp", "0"], ["--clip", "-1"], ["--data", ""], ["--data", "in/slides/good.png"]])
def test_flags_out_of_range(place, capsys, argv):
    assert train_py.main(["--data", "in", *argv] if "--mpp" in argv else ["--data", "in", "--mpp", "1", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py:") and error.count("\n") == 1


SMALL = ["--data", "in", "--mpp", "1", "--slide-mpp", "1", "--batch", "1", "--epochs", "1", "--warmup-epochs", "0", "--out-dim", "8",
         "--disentangled-dim", "8", "--local-crops", "0", "--global-size", "32", "--workers", "1", "--device", "cpu", "--method", "baseline"]


@pytest.mark.parametrize("blocked", ["datasets", "runs", "runs/in_vit_t_baseline"])
def test_an_output_that_cannot_be_written(place, capsys, blocked):
    (place / blocked).parent.mkdir(exist_ok=True)
    (place / blocked).write_text("a file where a folder has to be")
    assert train_py.main(SMALL) == 2
    error = capsys.readouterr().err
    assert blocked in error and error.count("\n") == 1


@pytest.mark.parametrize("what", ["tile", "cells", "checkpoint"])
def test_a_full_disk_loses_nothing_that_was_finished(place, capsys, monkeypatch, what):
    torch_save = torch.save

    def full(*args, **kw):
        if what != "checkpoint":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open("/dev/full", "wb") as file:  # torch has other errors for a path than for a file
            torch_save(args[0], "/dev/full" if isinstance(args[1], (str, Path)) else file)
    if what == "checkpoint" and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    where = {"tile": (Image.Image, "save"), "cells": (np, "savez_compressed"), "checkpoint": (torch, "save")}[what]
    with monkeypatch.context() as patch:
        patch.setattr(*where, full)
        assert train_py.main(SMALL) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.count("train.py:") == 1 and "No space left" in error
    assert not [p for p in place.rglob("*.part")]
    assert train_py.main(SMALL) == 0  # with room again it goes on


def test_files_of_ours_that_were_spoilt(place, capsys):
    assert train_py.main(SMALL) == 0
    run = place / "runs" / "in_vit_t_baseline"
    kept = (run / "checkpoint.pt").read_bytes()

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {place}/owned",)
    for raw in (kept[: len(kept) // 2], b"", pickle.dumps(Evil())):
        (run / "checkpoint.pt").write_bytes(raw)
        assert train_py.main(SMALL) == 2
        assert "checkpoint.pt" in capsys.readouterr().err
        (run / "encoder.pt").write_bytes(raw)
        assert eval_py.main(["--data", "in", "--mpp", "1", "--slide-mpp", "1"]) == 2
        assert "encoder.pt" in capsys.readouterr().err
    assert not (place / "owned").exists()
    (run / "checkpoint.pt").write_bytes(kept)
    (run / "config.json").write_text("{")
    assert train_py.main(SMALL) == 2
    assert "config.json" in capsys.readouterr().err


def test_a_worker_that_is_killed_costs_its_own_slide(place, monkeypatch):
    saved(place / "in" / "slides" / "killer.png")
    monkeypatch.setattr(data_py, "cut_tiles", dies_on_killer)
    found = data_py.find_data("in", mpp=1.0)
    failed = data_py.prepare(found, 1.0, 0.5, workers=2)
    assert len(failed) == 1 and "killer.png" in failed[0]
    assert data_py.tile_info(found, "good")["tiles"] == 1


def dies_on_killer(path, *rest):
    if Path(path).stem == "killer":
        os._exit(9)  # as the kernel does when memory runs out
    return slides_py.cut_tiles(path, *rest)


def test_tiles_of_another_run_are_never_mixed(place):
    found = data_py.find_data("in", mpp=1.0)
    assert data_py.prepare(found, 1.0, 0.5, workers=1) == []
    with pytest.raises(InputError, match="--mpp 1"):
        data_py.prepare(data_py.find_data("in", mpp=0.8), 1.0, 0.5, workers=1)
    (place / "elsewhere").mkdir()
    (place / "in").rename(place / "elsewhere" / "in")
    with pytest.raises(InputError, match="rename"):
        data_py.prepare(data_py.find_data("elsewhere/in", mpp=1.0), 1.0, 0.5, workers=1)


# ---------------------------------------------------------------- data.py check, look, BRIGHT, crops with cells of their own

def test_check_says_what_lies_there_and_what_is_missing(place, capsys):
    assert data_py.main(["check", "--data", "lung"]) == 1
    out = capsys.readouterr().out
    assert "missing: datasets/lung/" in out and "manifest --data lung" in out and "datasets/lung/slides/" in out
    saved(place / "in" / "slides" / "other.png")
    (place / "in" / "slides" / "late.svs.partial").write_bytes(b"x")
    (place / "in" / "slides" / "zero.svs").write_bytes(b"")
    (place / "in" / "labels.csv").write_text("slide,label,patient,split\ngood,A,p,train\nother,B,q,test\nzero,B,r,train\n")
    (place / "in" / "cells").mkdir()
    (place / "in" / "cells" / "good.json").write_text('{"mag": null, "nuc": {}}')
    assert data_py.main(["check", "--data", "in", "--slide-mpp", "1", "--workers", "1"]) == 1
    out = capsys.readouterr().out
    for says in ("slides: 3", "um/px recorded by: --slide-mpp 2", "tiles cut: 0 of 3", "test: 1 slides of 1 patients", "A 1", "hovernet 1",
                 "none yet 2", "zero.svs", "late.svs", "2 to look at"):
        assert says in out, says


@pytest.mark.parametrize("name", ["demo", "brca", "paad", "bright3", "bright6", "mhist", "chaoyang"])
def test_check_of_every_data_set_says_where_it_is_to_be_had(place, capsys, name):
    assert data_py.main(["check", "--data", name]) == 1
    out = capsys.readouterr().out
    assert "expected: datasets/" in out and "missing: datasets/" in out


def test_look_draws_a_slide_and_counts(place, capsys):
    saved(place / "big.png", array=tissue(500))
    assert data_py.main(["look", "big.png", "--mpp", "1", "--slide-mpp", "1", "--workers", "1"]) == 0
    assert "4 tiles at 1 um/px" in capsys.readouterr().out
    assert Image.open("look_big.png").size[0] > 1000
    assert data_py.main(["look", "big.png", "--mpp", "1"]) == 2
    assert data_py.main(["look", "nothing.svs"]) == 2


def test_bright_has_three_or_six_classes_and_is_tested_on_its_validation_part(place):
    folder = place / "datasets" / "bright"
    (folder / "slides").mkdir(parents=True)
    rows = ["slide,label,split"]
    for label in data_py.BRIGHT3:
        for i, split in enumerate(("train", "train", "validation")):
            (folder / "slides" / f"{label}{i}.svs").write_bytes(b"x")
            rows.append(f"{label}{i},{label},{split}")
    (folder / "labels.csv").write_text("\n".join(rows))
    three, six = (data_py.find_data(name) for name in ("bright3", "bright6"))
    assert three.classes == ["cancerous", "non-cancerous", "pre-cancerous"] and six.classes == sorted(data_py.BRIGHT3)
    assert three.split("test") == six.split("test") == sorted(f"{label}2" for label in data_py.BRIGHT3)
    assert len(three.split("val")) == 3 and len(three.split("train")) == 9  # one of four slides of each class
    assert three.mpp == 1.0 and three.work == six.work
    assert {three.labels[n]["label"] for n in ("PB0", "UDH0")} == {"non-cancerous"}
    (folder / "labels.csv").write_text("\n".join(rows).replace("IC2,IC", "IC2,invasive"))
    with pytest.raises(InputError, match="invasive"):
        data_py.find_data("bright6")


def test_crops_take_cells_of_their_own_in_their_own_pixels(place):
    (place / "c" / "crops").mkdir(parents=True)
    (place / "c" / "cells").mkdir()
    for name in ("a", "b"):
        saved(place / "c" / "crops" / f"{name}.png", array=tissue(448))
    saved(place / "c" / "crops" / "cut.png")
    halve(place / "c" / "crops" / "cut.png")
    (place / "c" / "cells" / "a.json").write_text('{"mag": null, "nuc": {"1": {"centroid": [100, 40]}}}')
    found = data_py.find_data("c", mpp=1.0)
    failed = data_py.prepare(found, workers=1)
    assert len(failed) == 1 and "cut.png" in failed[0]
    crops = data_py.Crops(found, found.split("train"))
    assert crops.owner == ["a.png", "b.png"] and crops.cells(0).tolist() == [[50, 20]] and len(crops.cells(1)) > 10
    saved(place / "c" / "crops" / "new.png", array=tissue(448))  # added later: found, and the others are not done again
    found = data_py.find_data("c", mpp=1.0)
    assert len(data_py.prepare(found, workers=1)) == 1 and len(data_py.Crops(found, found.split("train"))) == 3


# ---------------------------------------------------------------- controls and the probe

def test_shuffled_prior_keeps_the_share_of_cell_patches_and_their_cells():
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 224, (80, 2))
    moved = data_py.shuffle_places(xy, np.random.default_rng(1))
    before, after = prior_py.bin_centroids(xy, 224), prior_py.bin_centroids(moved, 224)
    assert before.sum() == after.sum() and not torch.equal(before, after)
    np.testing.assert_allclose(moved % 16, xy % 16)
    counts = [np.sort(np.unique(v[:, 1] // 16 * 14 + v[:, 0] // 16, return_counts=True)[1]) for v in (xy, moved)]
    np.testing.assert_array_equal(*counts)
    assert data_py.shuffle_places(np.zeros((0, 2)), rng).shape == (0, 2)


def test_cells_of_crops_are_found_anew_where_their_file_or_the_magnification_changed(place):
    (place / "mine" / "crops").mkdir(parents=True)
    for i in range(2):
        saved(place / "mine" / "crops" / f"{i}.png", array=tissue(224, seed=i))

    def cells(mpp):
        found = data_py.find_data("mine", mpp)
        assert data_py.prepare(found, workers=1) == []
        return data_py.Crops(found, ["0.png", "1.png"]).cells
    image = np.asarray(Image.open(place / "mine" / "crops" / "0.png"))
    for mpp in (0.5, 1.0):
        np.testing.assert_allclose(cells(mpp)(0), prior_py.segment_nuclei(image, mpp), atol=1e-3)
    kept = place / "datasets" / "mine" / "cells" / "crops_auto.npz"
    written = kept.stat().st_mtime_ns
    detected = cells(1.0)(1)
    assert kept.stat().st_mtime_ns == written  # not found twice
    (place / "mine" / "cells").mkdir()
    (place / "mine" / "cells" / "0.csv").write_text("x,y\n7,9\n")
    assert cells(1.0)(0).tolist() == [[7, 9]]
    np.testing.assert_array_equal(cells(1.0)(1), detected)
    (place / "mine" / "cells" / "0.csv").write_text("x,y\n8,9\n")
    os.utime(place / "mine" / "cells" / "0.csv", ns=(1, 1))
    assert cells(1.0)(0).tolist() == [[8, 9]]


def test_probe_writes_bins_and_neighbours_into_the_log(place, capsys):
    (place / "probe").mkdir()
    rows = ["image,label,split"]
    for i in range(80):
        image = tissue(224, seed=i) if i % 2 else np.full((224, 224, 3), 200 + i % 7, np.uint8)
        saved(place / "probe" / f"{i}.png", array=image)
        rows.append(f"{i}.png,{'tissue' if i % 2 else 'glass'},{'test' if i % 4 > 1 else 'train'}")
    (place / "probe" / "labels.csv").write_text("\n".join(rows))
    assert train_py.main([*SMALL, "--probe", "probe", "--shuffle-prior"]) == 0
    assert "20-NN accuracy 1.000" in capsys.readouterr().out  # tissue against glass
    row = (place / "runs" / "in_vit_t_baseline" / "log.csv").read_text().splitlines()
    named = dict(zip(row[0].split(","), row[-1].split(",")))
    encoder, _ = eval_py.load_encoder(place / "runs" / "in_vit_t_baseline" / "encoder.pt")
    test = torch.from_numpy(np.stack([np.asarray(Image.open(place / "probe" / f"{i}.png")) for i in range(80) if i % 4 > 1])).permute(0, 3, 1, 2)
    with torch.no_grad():
        columns = encoder.last_attention(views_py.normalize(test.float() / 255)).sum(2).mean(1)
    for name, there in (("0_to_0.5", columns < 0.5), ("over_2", columns > 2)):
        assert float(named[f"probe_{name}"]) == pytest.approx(there.float().mean().item(), abs=2e-3)
    assert float(named["probe_0.5_to_2"]) == pytest.approx(((columns >= 0.5) & (columns <= 2)).float().mean().item(), abs=2e-3)
    assert float(named["probe_knn"]) == 1
    assert train_py.main([*SMALL, "--probe", "nowhere", "--run", "runs/b"]) == 2
    assert "nowhere" in capsys.readouterr().err
