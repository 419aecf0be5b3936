"""python train.py for real at a tiny size: flags, resuming, full disks, damaged files, the probe."""
import csv
import errno
import math
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import one_line, saved, tissue

import dirl
import eval as eval_py
import train
from common.encoders import load_encoder, normalize
from common.files import load_tensors
from data import Crops, find_data
from prior import segment_nuclei
from wsi.prepare import prepare

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ["--mpp", "2", "--slide-mpp", "1", "--tissue", "0.3", "--batch", "2", "--epochs", "2", "--warmup-epochs", "1",
          "--out-dim", "32", "--disentangled-dim", "16", "--local-crops", "1", "--workers", "1", "--device", "cpu"]
SMALL = ["--data", "in", "--mpp", "1", "--slide-mpp", "1", "--batch", "1", "--epochs", "1", "--warmup-epochs", "0",
         "--out-dim", "8", "--disentangled-dim", "8", "--local-crops", "0", "--global-size", "32", "--workers", "1",
         "--device", "cpu", "--method", "baseline"]


@pytest.mark.parametrize("argv", [
    ["--batch", "0"], ["--epochs", "-1"], ["--lr", "nan"], ["--mpp", "nan"], ["--mpp", "0"], ["--slide-mpp", "1e9"],
    ["--tissue", "2"], ["--global-size", "100"], ["--local-size", "0"], ["--warmup-epochs", "9", "--epochs", "9"],
    ["--teacher-temp", "0"], ["--clip", "-1"], ["--seed", "-1"], ["--save-minutes", "nan"], ["--max-steps", "0"],
    ["--local-scale", "0.5", "0.1"], ["--device", "gpu"], ["--data", ""], ["--data", "in/slides/good.png"],
    ["--data", "nowhere"], ["--data", "lung"]])
def test_bad_flags_are_reported_in_one_line(place, capsys, argv):
    flags = argv if "--mpp" in argv else ["--mpp", "1", *argv]
    assert train.main(["--data", "in", *flags]) == 2
    one_line(capsys, "train.py: ", "" if argv[0] == "--data" else argv[0])


def test_a_folder_needs_its_um_per_px_and_slides(place, capsys):
    assert train.main(["--data", "in"]) == 2
    one_line(capsys, "--mpp")
    (place / "empty").mkdir()
    assert train.main(["--data", "empty", "--mpp", "1"]) == 2
    one_line(capsys, "empty: no slides in it")


def test_interrupted_equals_uninterrupted_end_to_end(place, folder, capsys):
    argv = ["--data", str(folder), *FOLDER]
    assert train.main([*argv, "--run", "runs/whole"]) == 0
    assert train.main([*argv, "--max-steps", "2"]) == 0
    assert "same command resumes" in capsys.readouterr().out
    whole, run = place / "runs" / "whole", place / "runs" / "tiny_set_vit_t_dirl"
    with open(run / "log.csv", "a") as file:
        file.write("2,0,9.9,half a line that was never kep")  # as a kill leaves it
    assert train.main(argv) == 0
    assert "Next: python eval.py" in capsys.readouterr().out
    assert (whole / "log.csv").read_text() == (run / "log.csv").read_text()
    a, b = (load_tensors(path / "checkpoint.pt") for path in (whole, run))
    assert a["step"] == b["step"] == 6
    for part in ("student", "teacher", "loss"):
        assert all(torch.equal(x, b[part][k]) for k, x in a[part].items())
    rows = list(csv.DictReader(open(run / "log.csv")))
    assert len(rows) == 6 and {f"loss_{head}" for head in ("c", "b", "cc", "bb", "cb", "bc")} <= set(rows[0])
    assert float(rows[0]["ln_out_dim"]) == pytest.approx(math.log(32), rel=1e-4)
    seen = load_tensors(run / "encoder.pt")["trained_on"]
    assert set(seen["images"]) == {f"{c}_{i}" for c in ("glands", "nests") for i in range(3)}  # train and val
    capsys.readouterr()
    assert train.main([*argv, "--lr", "0.1"]) == 2
    one_line(capsys, "--lr 0.0005 (now 0.1)")

    test = ["--data", str(folder), *FOLDER[:6], "--repeats", "2", "--epochs", "5", "--device", "cpu", "--workers", "1"]
    assert eval_py.main([*test, "--checkpoint", str(run)]) == 0
    assert "slide accuracy" in capsys.readouterr().out
    check_features_and_attention(place, run)
    written = (run / "features" / "nests_1.npz").stat().st_mtime_ns
    assert eval_py.main([*test, "--checkpoint", str(run)]) == 0
    assert (run / "features" / "nests_1.npz").stat().st_mtime_ns == written  # not made twice
    assert eval_py.main([*test, "--checkpoint", str(run), "--precision", "bf16"]) == 0
    assert (run / "features" / "nests_1.npz").stat().st_mtime_ns != written  # other settings: recomputed


def check_features_and_attention(place, run):
    """What eval.py wrote of the run against the encoder called by hand."""
    encoder, _ = load_encoder(run / "encoder.pt")

    def tile(name):
        image = np.asarray(Image.open(place / f"datasets/tiny_set/crops/{name}/0_0.jpg"))
        return normalize(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255)
    with np.load(run / "features" / "nests_1.npz", allow_pickle=False) as file:
        assert file["features"].shape == (1, 192) and file["features"].dtype == np.float32
        assert file["coords"].tolist() == [[0, 0]] and file["coords"].dtype == np.int64
        features = file["features"]
    with torch.no_grad():
        np.testing.assert_allclose(features, encoder(tile("nests_1")).mean(1).numpy(), atol=1e-5)
        columns = encoder.last_attention(torch.cat([tile("glands_3"), tile("nests_3")])).sum(2).mean(1)
    results = {row["measure"]: float(row["mean"]) for row in csv.DictReader(open(run / "results.csv"))}
    middle = ((columns >= 0.5) & (columns <= 2)).float().mean().item()
    assert results["tokens with attention 0.5 to 2"] == pytest.approx(middle, abs=2e-3)
    for name in ("attention_distribution.png", "attention_overlay.png"):
        assert (run / name).read_bytes()[:4] == b"\x89PNG"


def test_eval_refuses_an_encoder_that_saw_a_test_slide_and_needs_no_cells(place, folder, capsys):
    argv = ["--data", str(folder), *FOLDER, "--method", "baseline", "--max-steps", "1"]
    assert train.main(argv) == 0
    run, labels = place / "runs" / "tiny_set_vit_t_baseline", folder / "labels.csv"
    test = ["--data", str(folder), *FOLDER[:6], "--repeats", "1", "--epochs", "2", "--device", "cpu", "--workers", "1"]
    text = labels.read_text()
    try:
        labels.write_text(text.replace("nests_0,nests,pnests0,train", "nests_0,nests,pnests0,test"))
        capsys.readouterr()
        assert eval_py.main(test) == 2
        one_line(capsys, f"{run.relative_to(place)}/encoder.pt: was trained on 1 of these 3 test images", "nests_0")
    finally:
        labels.write_text(text)
    assert train.main(argv[:-2]) == 0  # the split is as it was: the run is resumed
    for path in (place / "datasets" / "tiny_set" / "cells").rglob("*.npz"):
        path.unlink()
    assert eval_py.main([*test, "--prior", "hovernet"]) == 0  # features and DSMIL need no prior
    out = capsys.readouterr().out
    assert "drawn without P_c" in out and "slide AUC" in out and "patches with a cell" not in out
    assert (run / "attention_overlay.png").is_file() and not list(place.rglob("cells/**/*.npz"))


def test_a_changed_split_is_no_resumed_run(place, folder, capsys):
    argv = ["--data", str(folder), *FOLDER, "--method", "baseline"]
    assert train.main([*argv, "--max-steps", "1"]) == 0
    labels = folder / "labels.csv"
    text = labels.read_text()
    try:
        labels.write_text(text.replace("nests_0,nests,pnests0,train", "nests_0,nests,pnests0,test")
                          .replace("nests_3,nests,pnests3,test", "nests_3,nests,pnests3,train"))
        capsys.readouterr()
        assert train.main(argv) == 2
        one_line(capsys, "images 6 (stamp")
    finally:
        labels.write_text(text)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(place, folder, monkeypatch, capsys):
    argv = ["--data", str(folder), *FOLDER, "--method", "baseline"]
    assert train.main([*argv, "--max-steps", "2"]) == 0
    kept = (place / "runs/tiny_set_vit_t_baseline/checkpoint.pt").read_bytes()
    monkeypatch.setattr(dirl.DiRLLoss, "forward", lambda self, student, *rest: (
        student["f"][0].sum() * math.nan, {"f": torch.tensor(math.nan)}))
    handler = signal.getsignal(signal.SIGINT)
    assert train.main(argv) == 1 and signal.getsignal(signal.SIGINT) is handler
    assert "step 2" in capsys.readouterr().err
    assert (place / "runs/tiny_set_vit_t_baseline/checkpoint.pt").read_bytes() == kept


def test_a_folder_of_crops_with_labels_trains_on_its_training_part(place, folder):
    rows = ["image,label,split,group"]
    for i, path in enumerate(sorted((folder / "slides").glob("*.png"))):
        saved(place / "c" / "kind" / path.name, array=np.asarray(Image.open(path).resize((224, 224))))
        rows.append(f"kind/{path.name},{path.stem[:5]},{'test' if i % 4 == 3 else 'train'},{i}")
    (place / "c" / "labels.csv").write_text("\n".join(rows))
    found = find_data("c", 2.0)
    assert prepare(found, workers=1) == []
    assert len(found.split("train", "val")) == 6 and len(found.split("test")) == 2
    crops = Crops(found, found.split("train"))
    whole = segment_nuclei(np.asarray(Image.open(crops.files[0])), 2.0)
    np.testing.assert_allclose(crops.cells(0), whole, atol=1e-3)


@pytest.mark.parametrize("blocked", ["datasets", "runs", "runs/in_vit_t_baseline"])
def test_an_output_that_cannot_be_written(place, capsys, blocked):
    (place / blocked).parent.mkdir(exist_ok=True)
    (place / blocked).write_text("a file where a folder has to be")
    assert train.main(SMALL) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: ") and blocked in error


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
    owner, name = {"tile": (Image.Image, "save"), "cells": (np, "savez_compressed"), "checkpoint": (torch, "save")}[what]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        assert train.main(SMALL) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.count("train.py:") == 1 and "No space left" in error
    assert not list(place.rglob("*.part"))
    assert train.main(SMALL) == 0  # with room again it goes on


def test_damaged_files_of_a_run_are_refused_and_nothing_is_executed(place, capsys):
    assert train.main(SMALL) == 0
    run = place / "runs" / "in_vit_t_baseline"
    kept = (run / "checkpoint.pt").read_bytes()

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {place}/owned",)
    for raw in (kept[: len(kept) // 2], b"", pickle.dumps(Evil())):
        (run / "checkpoint.pt").write_bytes(raw)
        assert train.main(SMALL) == 2
        assert "checkpoint.pt" in capsys.readouterr().err
        (run / "encoder.pt").write_bytes(raw)
        assert eval_py.main(["--data", "in", "--mpp", "1", "--slide-mpp", "1"]) == 2
        assert "encoder.pt" in capsys.readouterr().err
    assert not (place / "owned").exists()
    (run / "checkpoint.pt").write_bytes(kept)
    (run / "config.json").write_text("{")
    assert train.main(SMALL) == 2
    assert "config.json" in capsys.readouterr().err


def test_probe_writes_bins_and_neighbours_into_the_log(place, capsys):
    rows, test = ["image,label,split"], []
    for i in range(80):
        image = tissue(224, seed=i) if i % 2 else np.full((224, 224, 3), 200 + i % 7, np.uint8)
        saved(place / "probe" / f"{i}.png", array=image)
        rows.append(f"{i}.png,{'tissue' if i % 2 else 'glass'},{'test' if i % 4 > 1 else 'train'}")
        test += [torch.from_numpy(image).permute(2, 0, 1)] if i % 4 > 1 else []
    (place / "probe" / "labels.csv").write_text("\n".join(rows))
    assert train.main([*SMALL, "--probe", "probe", "--shuffle-prior"]) == 0
    assert "20-NN accuracy 1.000" in capsys.readouterr().out  # tissue against glass
    row = list(csv.DictReader(open(place / "runs" / "in_vit_t_baseline" / "log.csv")))[-1]
    encoder, _ = load_encoder(place / "runs" / "in_vit_t_baseline" / "encoder.pt")
    with torch.no_grad():
        columns = encoder.last_attention(normalize(torch.stack(test).float() / 255)).sum(2).mean(1)
    bins = {"0_to_0.5": columns < 0.5, "0.5_to_2": (columns >= 0.5) & (columns <= 2), "over_2": columns > 2}
    for name, there in bins.items():
        assert float(row[f"probe_{name}"]) == pytest.approx(there.float().mean().item(), abs=2e-3)
    assert float(row["probe_knn"]) == 1
    assert train.main([*SMALL, "--probe", "nowhere", "--run", "runs/b"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_the_scripts_help():
    for script, says in (("train.py", "--teacher-temp"), ("eval.py", "--repeats"), ("data.py", "manifest")):
        out = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
        assert out.returncode == 0 and says in out.stdout
