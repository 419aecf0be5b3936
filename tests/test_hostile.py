"""What would be wrong in silence, stop a run of many, or end in a traceback."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from synthetic import prepared, refused, saved, svs, tissue, write
from test_look import nuclei_slide
from tiny_flags import CPU, SMALL

import data
import eval as eval_py
import train
from common import files
from common.encoders import load_encoder
from common.errors import InputError, printable
from common.files import load_tensors, save_tensors
from data import Crops
from wsi.cache import prepare, tile_info
from wsi.folders import find_folder
from wsi.sanity import nucleus_size
from wsi.splits import find_data

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------- folders and labels.csv

@pytest.mark.parametrize("make", [
    lambda path: path.symlink_to("nowhere.csv"), lambda path: path.mkdir(), os.mkfifo,
    lambda path: write(path.with_name("Labels.CSV"), "slide,label\ngood,A\n")])
def test_a_labels_csv_that_is_no_file_of_that_name_is_refused(place, capsys, make):
    make(place / "in" / "labels.csv")
    refused(capsys, train.main, ["--data", "in", "--mpp", "1"], "rename or remove it")


def test_two_spellings_of_one_image_are_refused_by_line(place, capsys):
    saved(place / "p" / "a" / "0.png")
    write(place / "p" / "labels.csv", "image,label,split\na/0.png,A,train\na/./0.png,B,test\n")
    refused(capsys, eval_py.main, ["patches", "--data", "p"], "line 3 names 'a/0.png' a second time")


def test_a_dicom_series_is_one_slide_named_by_its_folder(tmp_path):
    for folder in ("p1/series", "p2/other"):
        for i in range(3):
            write(tmp_path / "slides" / folder / f"{i}.dcm", "x")
    saved(tmp_path / "slides" / "a.png")
    found = find_folder(str(tmp_path))
    assert {name: path.name for name, path in found.images.items()} == {
        "a": "a.png", "series": "0.dcm", "other": "0.dcm"}
    write(tmp_path / "slides" / "p3" / "series" / "0.dcm", "x")
    with pytest.raises(InputError, match="has the same name as"):
        find_folder(str(tmp_path))


def test_files_that_a_run_cannot_use_are_listed_and_the_others_go_on(place):
    write(place / "in" / "slides" / "postscript.png", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    found, failed = prepared()
    assert len(failed) == 1 and "postscript.png" in failed[0]
    assert len(Crops(found, ["good"])) == 1
    saved(place / "c" / "crops" / "a.png")
    os.mkfifo(place / "c" / "crops" / "b.png")
    assert list(find_data("c", 1.0).images) == ["a.png"]


def test_all_slides_without_um_per_px_are_the_reason_that_is_given(place, capsys):
    write(place / "in" / "labels.csv", "slide,label,split\ngood,A,train\nother,B,test\n")
    slides_folder = place / "in" / "slides"
    slides_folder.joinpath("other.svs").write_bytes(b"")
    refused(capsys, train.main, [*SMALL[:4], *CPU], "good.png: no um/px")


def test_names_are_printed_escaped(place, capsys):
    write(place / "in" / "slides" / "a\n\x1b[31mb.png", "no image")
    assert train.main(SMALL) == 1
    out = capsys.readouterr().out
    assert "a\\n\\x1b[31mb.png" in out and "\x1b[31m" not in out
    assert printable("ünïcödé №1\t") == "ünïcödé №1\\t"


def test_um_per_px_of_labels_csv_count_slide_by_slide(place, capsys):
    for name, mpp in (("a", 1.0), ("b", 0.5)):
        svs(place / "in" / "slides" / f"{name}.svs", tissue(500, 1), f"Aperio|MPP = {mpp}")
    table = place / "in" / "labels.csv"
    write(table, "slide,label,split,mpp\na,A,train,0.5\nb,B,train,\ngood,A,test,1.0\n")
    found, failed = prepared(slide_mpp=None)
    assert failed == [] and "openslide.mpp-x is 1 um/px, labels.csv's 0.5 is used" in capsys.readouterr().out
    made = {name: (tile_info(found, name)["slide_mpp"], tile_info(found, name)["mpp_source"])
            for name in found.images}
    assert made == {"a": (0.5, "labels.csv"), "b": (0.5, "openslide.mpp-x"), "good": (1.0, "labels.csv")}
    inside = Crops(found, ["a"]).cells(0)
    write(table, "slide,label,split,mpp\na,A,train,1\nb,B,train,0.5\ngood,A,test,1.0\n")
    found = find_data("in", mpp=1.0)
    assert tile_info(found, "a") is None and tile_info(found, "b") is None  # b: by labels.csv now
    assert prepare(found, 0.5, workers=1) == [] and tile_info(found, "a")["slide_mpp"] == 1.0
    assert len(Crops(found, ["a"])) == 4 and Crops(found, ["a"]).cells(0).shape != inside.shape
    for text in ("0", "x", "1e9", "nan"):
        write(table, f"slide,label,split,mpp\na,A,train,{text}\ngood,B,test,\n")
        refused(capsys, train.main, SMALL[:4], "line 2", f"mpp {text!r}")


def test_a_slide_of_too_many_px_is_skipped_and_the_limit_is_named(place):
    sparse = place / "in" / "slides" / "sparse.tif"
    tifffile.imwrite(sparse, iter([b""] * 62 * 62), shape=(10 ** 6, 10 ** 6, 3), dtype="uint8", bigtiff=True,
                     tile=(16384, 16384), compression="zlib", photometric="rgb")
    assert sparse.stat().st_size < 1e6
    found, failed = prepared()
    assert len(failed) == 1 and "sparse.tif" in failed[0] and "--max-gigapixels 40" in failed[0]


@pytest.mark.parametrize("diameter", [5, 8])
def test_size_of_nuclei_and_its_scale(diameter):
    image = nuclei_slide(240, diameter)
    assert nucleus_size([image], 0.5) == pytest.approx(diameter, rel=0.15)
    assert nucleus_size([image], 1.0) == 2 * nucleus_size([image], 0.5)  # at twice the um/px
    assert np.isnan(nucleus_size([np.full((99, 99, 3), 255, np.uint8)], 0.5))
    y, x = np.indices(image.shape[:2])
    ring = abs(np.hypot(y - 240, x - 240) - 150) < 3
    image[ring] = image[24, 24]  # a nucleus
    assert nucleus_size([image], 0.5) == pytest.approx(diameter, rel=0.15)  # as a gland's rim, no nucleus


def test_what_no_he_slide_looks_like_is_reported(place, capsys, blank_figures):
    def warned(array, mpp="0.5", name="a.png"):
        saved(place / name, array=array)
        assert data.main(["look", name, "--mpp", "1", "--slide-mpp", mpp, "--workers", "1"]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    image = np.full((900, 900, 3), 245, np.uint8)
    image[:480, :480] = nuclei_slide(240)
    assert warned(image) == []
    assert "its nuclei measure 14" in warned(image, "1.0")[0]
    grey = (image * 0.7).astype(np.uint8)
    assert "background is not white" in warned(grey)[0]
    green = image.copy()
    green[500:, :] = (90, 200, 90)  # as much green as pink, and more
    assert any("the colours of H&E" in line for line in warned(green))


# ---------------------------------------------------------------- our own files, damaged

def test_damaged_checkpoints_and_encoders_are_refused_by_name(place, capsys):
    assert train.main([*SMALL, "--max-steps", "1"]) == 0
    run = place / "runs" / "in_vit_t4_baseline"
    checkpoint, encoder = (load_tensors(run / name) for name in ("checkpoint.pt", "encoder.pt"))
    for change in ({"step": -3}, {"step": None}, {"student": {}}, {"teacher": 3}):
        save_tensors(run / "checkpoint.pt", checkpoint | change)
        refused(capsys, train.main, SMALL, "checkpoint.pt", "delete it")
    refused(capsys, eval_py.main, [*SMALL[:6], "--checkpoint", str(run / "checkpoint.pt")],
            "is what training resumes from; give the encoder.pt next to it")
    write(place / "w.safetensors", b"\0" * 64)
    refused(capsys, train.main, [*SMALL[:6], "--run", "r", "--init", "w.safetensors"], "safetensors.torch")
    weights = encoder["encoder"]
    nan = weights | {"norm.bias": weights["norm.bias"] * float("nan")}
    for change in ({"encoder": {}}, {"arch": "vit_s"}, {"encoder": nan}, {"arch": "vit_9"},
                   {"std": [0, 1, 1]}, {"mean": None}, {"std": [1]}):
        save_tensors(run / "encoder.pt", encoder | change)
        with pytest.raises(InputError, match="encoder.pt"):
            load_encoder(run / "encoder.pt")
    save_tensors(run / "encoder.pt", {name: value for name, value in encoder.items() if name != "method"})
    with pytest.raises(InputError, match="encoder.pt"):
        load_encoder(run / "encoder.pt")
    (run / "checkpoint.pt").unlink()
    for text in ("[]", "[" * 100_000, "", "{"):
        save_tensors(run / "checkpoint.pt", checkpoint)
        (run / "config.json").write_text(text)
        refused(capsys, train.main, SMALL, "config.json")


def test_what_can_be_made_again_is(place):
    found, _ = prepared()
    work = place / "datasets" / "in"
    info, npz = work / "crops" / "1um" / "good.json", work / "cells" / "builtin" / "good.npz"
    before = Crops(found, ["good"]).cells(0)
    broken = bytearray(npz.read_bytes())
    broken[len(broken) // 2] ^= 255
    for path, raw in ((info, b"{}"), (info, b"[1]"), (info, b"\xff"), (npz, b""), (npz, bytes(broken))):
        path.write_bytes(raw)
        assert len(Crops(found, ["good"])) == 0
        assert prepare(found, 0.5, workers=1) == []
        np.testing.assert_array_equal(Crops(found, ["good"]).cells(0), before)
    saved(info.with_suffix("") / "stray.jpg")
    assert len(Crops(found, ["good"])) == 1


def test_a_log_with_other_bytes_in_it_is_no_harm(place):
    saved(place / "in" / "slides" / "more.png", array=tissue(seed=3))
    assert train.main([*SMALL, "--max-steps", "1"]) == 0
    log = place / "runs" / "in_vit_t4_baseline" / "log.csv"
    with open(log, "ab") as file:
        file.write("²,0,1\n".encode() + b"\xff\x00\n")
    assert train.main(SMALL) == 0 and len(log.read_text().splitlines()) == 3


def test_temporary_files_of_dead_processes_are_removed(tmp_path):
    left = files.temp_path(tmp_path / "a")
    alive = left.with_name(left.name.replace(str(os.getpid()), "1"))
    dead = left.with_name(left.name.replace(str(os.getpid()), "4194305"))  # above the largest number
    elsewhere = dead.with_name(dead.name.replace("-", "x-"))  # of another machine
    dead.mkdir()
    for path in (alive, elsewhere):
        path.write_bytes(b"x")
    with files.atomic_write(tmp_path / "a") as temp:
        temp.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a", alive.name, elsewhere.name}


def test_a_run_in_use_is_refused(place, capsys):
    assert train.main([*SMALL, "--max-steps", "1"]) == 0
    code = ("import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
            "print(1, flush=True); input()")
    lock = place / "runs" / "in_vit_t4_baseline" / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    holder.stdout.readline()
    refused(capsys, train.main, SMALL, "another train.py")
    holder.kill()  # a dead process holds no lock
    holder.communicate()
    assert train.main(SMALL) == 0


# ---------------------------------------------------------------- terminals and memory

def test_training_outlives_its_terminal_and_hangup_saves(place):
    read, write_end = os.pipe()
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *SMALL, "--epochs", "500"],
                               stdout=write_end, stderr=write_end)
    os.close(write_end)
    os.read(read, 10)
    os.close(read)  # as `2>&1 | head` does
    log = place / "runs" / "in_vit_t4_baseline" / "log.csv"
    began = time.monotonic()
    while not (log.is_file() and len(log.read_text().splitlines()) > 2) and time.monotonic() - began < 100:
        time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 130
    step = load_tensors(log.with_name("checkpoint.pt"))["step"]
    assert step == len(log.read_text().splitlines()) - 1 > 1


def test_out_of_memory_names_the_flag(place, capsys, monkeypatch):
    def full(*args, **kw):
        return torch.empty(1 << 60)
    monkeypatch.setattr(train, "start_encoder", full)
    assert train.main(SMALL) == 1
    assert "lower --batch" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("device", ["meta", "mps"])
def test_devices_that_are_not_supported(place, capsys, device):
    refused(capsys, train.main, [*SMALL[:4], "--device", device], "cpu and cuda only")
