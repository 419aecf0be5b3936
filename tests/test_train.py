"""python train.py for real at a tiny size: flags, resuming, full disks, damaged files, the probe."""
import errno
import io
import math
import os
import pickle
import re
import runpy
import shutil
import signal
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import Evil, arrays_of, refused, replace, rows_of, saved, times, tissue, write, write_table
from tiny_flags import CPU, FOLDER, SET, SMALL

import data
import dirl
import eval as eval_py
import train
from common import encoders
from common.encoders import MEAN, STD, load_encoder, normalize
from common.errors import InputError
from common.files import load_tensors, save_tensors
from common.log import Log
from common.watch import effective_rank
from experiments import benchmark, compare, curves
from wsi import cache
from wsi.splits import hashes_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("argv", [
    ["--batch", "0"], ["--lr", "nan"], ["--mpp", "nan"], ["--slide-mpp", "1e9"], ["--global-size", "100"],
    ["--warmup-epochs", "9", "--epochs", "9"], ["--max-steps", "0"], ["--local-scale", "0.5", "0.1"],
    ["--device", "gpu"], ["--accumulate", "3"], ["--data", ""], ["--data", "in/slides/good.png"],
    ["--data", "lung"]])
def test_bad_flags_are_reported_in_one_line(place, capsys, argv):
    says = "" if argv[0] == "--data" else argv[0]
    refused(capsys, train.main, ["--data", "in", "--mpp", "1", *argv], "train.py: ", says)


def test_a_folder_needs_its_um_per_px_and_slides(place, capsys):
    refused(capsys, train.main, ["--data", "in"], "--mpp")
    (place / "empty").mkdir()
    refused(capsys, train.main, ["--data", "empty", "--mpp", "1"], "empty: no slides in it")


def test_interrupted_equals_uninterrupted_end_to_end(place, folder, capsys, blank_figures):
    assert train.main([*FOLDER, "--run", "runs/whole"]) == 0
    assert train.main([*FOLDER, "--max-steps", "2"]) == 0
    assert "same command resumes" in capsys.readouterr().out

    def of_my_own(encoder, args):
        return train.build_dirl(encoder, args)
    refused(capsys, lambda argv: train.main(argv, build=of_my_own), FOLDER, "recipe build_dirl (now", "--run")
    whole, run = place / "runs" / "whole", place / "runs" / "tiny_set_vit_t4_dirl"
    with open(run / "log.csv", "a") as file:
        file.write("2,0,9.9,half a line that was never kep")  # as a kill leaves it
    assert train.main(FOLDER) == 0
    assert "Next: python eval.py" in capsys.readouterr().out
    assert (whole / "log.csv").read_text() == (run / "log.csv").read_text()
    kept = times(whole, "*.pt")
    assert train.main([*FOLDER, "--run", "runs/whole"]) == 0 and times(whole, "*.pt") == kept
    printed = capsys.readouterr().out
    assert "runs/whole had finished its 6 steps; nothing was trained. Next: python eval.py" in printed
    assert " --data 'tiny set' --slide-mpp 1.0 --tissue 0.3 --checkpoint runs/whole/encoder.pt\n" in printed
    assert "Wrote" not in printed and "resumed" not in printed
    a, b = (load_tensors(path / "checkpoint.pt") for path in (whole, run))
    assert a["step"] == b["step"] == 6
    for part in ("student", "teacher", "loss"):
        assert all(torch.equal(x, b[part][k]) for k, x in a[part].items())
    rows = rows_of(run / "log.csv")
    assert len(rows) == 6 and {f"loss_{head}" for head in ("c", "b", "cc", "bb", "cb", "bc")} <= set(rows[0])
    assert float(rows[0]["ln_out_dim"]) == pytest.approx(math.log(32), rel=1e-4)
    kept = load_tensors(run / "encoder.pt")
    assert all(torch.equal(x, b["teacher"][f"encoder.{name}"]) for name, x in kept["encoder"].items())
    trained_on = kept["trained_on"]
    train_and_val = {f"{c}_{i}" for c in ("glands", "nests") for i in range(3)}
    assert set(trained_on["images"]) == train_and_val
    refused(capsys, train.main, [*FOLDER, "--lr", "0.1"], "--lr 0.0005 (now 0.1)")

    test = [*SET, "--repeats", "2", "--epochs", "5", "--checkpoint", str(run)]
    assert eval_py.main(test) == 0
    printed = capsys.readouterr().out
    assert "slide accuracy" in printed and printed.count("warning: 4 training slides") == 1
    assert "try --standardize --mil-lr 0.002 --mil-weight-decay 0.005" in printed
    check_features_and_attention(place, run)
    written = times(run / "features")
    few = ["--standardize", "--mil-lr", "2e-3", "--mil-weight-decay", "5e-3"]
    assert eval_py.main([*test, *few]) == 0 and times(run / "features") == written  # not written twice
    assert "training slides" not in capsys.readouterr().out
    assert eval_py.main([*test, "--precision", "bf16"]) == 0  # other settings: recomputed
    assert all(written[path] != time for path, time in times(run / "features").items())


def check_features_and_attention(place, run):
    """What eval.py wrote of the run against the encoder called by hand."""
    encoder, _ = load_encoder(run / "encoder.pt")

    def tile(name):
        image = np.asarray(Image.open(place / f"datasets/tiny_set/crops/2um/{name}/0_0.jpg"))
        return normalize(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255, MEAN, STD)
    file = arrays_of(run / "features" / "nests_1.npz")
    assert file["features"].shape == (1, 64) and file["features"].dtype == np.float32
    assert file["coords"].tolist() == [[0, 0]] and file["coords"].dtype == np.int64
    with torch.no_grad():
        np.testing.assert_allclose(file["features"], encoder(tile("nests_1")).mean(1).numpy(), atol=1e-5)
        columns = encoder.last_attention(torch.cat([tile("glands_3"), tile("nests_3")])).sum(2).mean(1)
    results = {row["measure"]: float(row["mean"]) for row in rows_of(run / "results.csv")}
    middle = ((columns >= 0.5) & (columns <= 2)).float().mean().item()
    assert results["tokens with attention 0.5 to 2"] == pytest.approx(middle, abs=2e-3)
    for name in ("attention_distribution.png", "attention_overlay.png"):
        assert (run / name).read_bytes()[:4] == b"\x89PNG"


def test_a_changed_split_is_refused_and_eval_needs_no_cells(place, folder, capsys):
    argv, run = [*FOLDER, "--method", "baseline"], Path("runs/tiny_set_vit_t4_baseline")
    test = [*SET, "--repeats", "1", "--epochs", "2"]
    assert train.main([*argv, "--max-steps", "1"]) == 0
    moved = [("pnests0,train", "pnests0,test"), ("pnests3,test", "pnests3,train")]
    replace(folder / "labels.csv", *moved)
    leak = f"{run}/encoder.pt: was trained on 1 of these 2 test images"
    refused(capsys, eval_py.main, test, leak, "nests_0")
    refused(capsys, train.main, argv, "was started with other slides, patients or their files")
    replace(folder / "labels.csv", *((new, old) for old, new in moved))
    assert train.main(argv) == 0  # the split is as it was: the run is resumed
    assert eval_py.main([*test, "--prior", "hovernet"]) == 0  # features and DSMIL need no prior
    out = capsys.readouterr().out
    assert "drawn without P_c" in out and "slide AUC" in out and "patches with a cell" not in out
    assert (run / "attention_overlay.png").is_file() and not list(place.rglob("cells/**/*.npz"))


def test_the_baseline_looks_for_no_cells_and_keeps_slides_without_them(place, folder, monkeypatch, capsys):
    write(folder / "cells" / "glands_0.json", "broken")
    assert train.main([*FOLDER, "--max-steps", "1", "--method", "cellback"]) == 1
    assert "skipped: tiny set/cells/glands_0.json" in capsys.readouterr().out
    shutil.rmtree(place / "datasets" / "tiny_set" / "cells")
    for name in ("read_cells", "segment_nuclei", "segment_slides"):
        monkeypatch.setattr(cache, name, lambda *args, **kw: pytest.fail("cells are looked for"))
    assert train.main([*FOLDER, "--max-steps", "1", "--method", "baseline"]) == 0
    out = capsys.readouterr().out
    assert "cells" not in out and "6 crops of 6 slides" in out
    assert not (place / "datasets" / "tiny_set" / "cells").exists()
    runs = [place / "runs" / f"tiny_set_vit_t4_{method}" for method in ("cellback", "baseline")]
    trained_on = [load_tensors(run / "encoder.pt")["trained_on"]["images"] for run in runs]
    assert trained_on[1].keys() - trained_on[0].keys() == {"glands_0"}
    cellback, baseline = (rows_of(run / "log.csv")[0] for run in runs)
    assert cellback["cell_share"] and cellback["both_regions"]
    assert baseline["cell_share"] == baseline["both_regions"] == "" and baseline["loss_f"]


@pytest.mark.parametrize("flags, cells", [
    ([], True), (["--method", "cellback"], True), (["--method", "baseline"], False),
    (["--ssl", "lsup"], True), (["--ssl", "imix"], False), (["--ssl", "byol", "--method", "dirl"], True),
    (["--ssl", "dino", "--heads", "4", "4"], False)])
def test_cells_are_for_methods_that_use_them(flags, cells):
    assert train.uses_cells(compare.arguments(["--arch", "vit_t4", *flags])) == cells


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(place, folder, monkeypatch, capsys):
    argv = [*FOLDER, "--method", "baseline"]
    assert train.main([*argv, "--max-steps", "2"]) == 0
    kept = (place / "runs/tiny_set_vit_t4_baseline/checkpoint.pt").read_bytes()
    monkeypatch.setattr(dirl, "view_cross_entropy", lambda student, *rest: student.sum() * math.nan)
    handler = signal.getsignal(signal.SIGINT)
    assert train.main(argv) == 1 and signal.getsignal(signal.SIGINT) is handler
    assert "step 2" in capsys.readouterr().err
    assert (place / "runs/tiny_set_vit_t4_baseline/checkpoint.pt").read_bytes() == kept


@pytest.mark.parametrize("blocked", ["datasets", "runs"])
def test_an_output_that_cannot_be_written(place, capsys, blocked):
    write(place / blocked, "a file where a folder has to be")
    assert train.main(SMALL) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: ") and blocked in error


class FullDisk(io.FileIO):
    """A file on a disk with room for ten more bytes."""

    def write(self, data):
        if self.tell() + len(data) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def no_room(*args, **kw):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_room_for_tensors(state, file, save=torch.save):
    assert not isinstance(file, (str, Path))  # given a path, torch hides a full disk
    with FullDisk(file.name, "wb") as full:
        save(state, full)


@pytest.mark.parametrize("owner, name, writer", [
    (Image.Image, "save", no_room), (np, "savez_compressed", no_room), (torch, "save", no_room_for_tensors),
    (Log, "open", lambda log, path: io.TextIOWrapper(FullDisk(path, "w")))],
    ids=["tile", "cells", "checkpoint", "log"])
def test_a_full_disk_loses_nothing_that_was_finished(place, capsys, monkeypatch, owner, name, writer):
    argv = [*SMALL, "--method", "cellback"]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, writer)
        assert train.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(r"train.py: (datasets|runs)/\S+: cannot be written \(No space left.*", error), error
    assert not list(place.rglob("*.part"))
    assert train.main(argv) == 0  # resumes when there is room


def test_damaged_files_of_a_run_are_refused_and_nothing_is_executed(place, capsys):
    assert train.main(SMALL) == 0
    run = place / "runs" / "in_vit_t4_baseline"
    kept = (run / "checkpoint.pt").read_bytes()
    for raw in (kept[: len(kept) // 2], pickle.dumps(Evil(place / "owned"))):
        (run / "checkpoint.pt").write_bytes(raw)
        refused(capsys, train.main, SMALL, "checkpoint.pt")
        (run / "encoder.pt").write_bytes(raw)
        refused(capsys, eval_py.main, SMALL[:6], "encoder.pt")
    assert not (place / "owned").exists()


def test_probe_writes_bins_and_neighbours_into_the_log(place, capsys):
    rows, test = [], []
    for i in range(80):
        image = tissue(224, seed=i) if i % 2 else np.full((224, 224, 3), 200 + i % 7, np.uint8)
        saved(place / "probe" / f"{i}.png", array=image)
        rows.append(f"{i}.png,{'tissue' if i % 4 in (0, 3) else 'glass'},{'test' if i % 4 > 1 else 'train'}")
        test += [torch.from_numpy(image).permute(2, 0, 1)] if i % 4 > 1 else []
    write_table(place / "probe" / "labels.csv", "image,label,split", rows)
    assert train.main([*SMALL, "--probe", "probe", "--shuffle-prior"]) == 0
    printed = capsys.readouterr().out
    # Tissue is told from glass, and called what the training images say: the wrong names of the test images.
    assert "100.0% (as in an untrained network), 20-NN accuracy 0.000" in printed
    row = rows_of(place / "runs" / "in_vit_t4_baseline" / "log.csv")[-1]
    encoder, _ = load_encoder(place / "runs" / "in_vit_t4_baseline" / "encoder.pt")
    with torch.no_grad():
        columns = encoder.last_attention(normalize(torch.stack(test).float() / 255, MEAN, STD)).sum(2).mean(1)
    bins = {"0_to_0.5": columns < 0.5, "0.5_to_2": (columns >= 0.5) & (columns <= 2), "over_2": columns > 2}
    for name, inside in bins.items():
        assert float(row[f"probe_{name}"]) == pytest.approx(inside.float().mean().item(), abs=2e-3)
    assert float(row["probe_knn"]) == 0
    refused(capsys, train.main, [*SMALL, "--probe", "nowhere", "--run", "runs/b"], "nowhere")


def test_prior_as_a_script_names_its_successor(capsys):
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "prior.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and "python -m wsi.segment" in error


def test_flags_reach_the_encoder_the_heads_the_loss_and_the_views():
    args = train.arguments(["--data", "lung", "--arch", "vit_t4", *CPU, *"""
        --drop-path 0.3 --out-dim 8 --disentangled-dim 4 --no-norm-last-layer --lambda-1 3 --lambda-2 0.2
        --student-temp 0.2 --center-momentum 0.7 --empty-regions zeros --local-crops 3 --global-scale 0.3 0.9
        --local-scale 0.1 0.2 --global-size 64 --local-size 32 --jitter 0.1 --greyscale 0.2 --solarize 0.3
        --blur 0.4 --clip 2""".split()])
    recipe = train.build_dirl(train.start_encoder(args, MEAN, STD), args)
    assert recipe.student.encoder.blocks[-1].drop_path.p == pytest.approx(0.3)
    assert all(head.last_norm is not None for head in recipe.student.heads.values())
    assert recipe.loss.weight == dirl.eq9_weights(recipe.student.heads, 3, 0.2) and not recipe.loss.skip_empty
    assert {(x.student_temp, x.center_momentum) for x in recipe.loss.losses.values()} == {(0.2, 0.7)}
    settings = train.settings_of(args, 1, MEAN, STD)
    views = data.Augmentation(3, [0.3, 0.9], [0.1, 0.2], 64, 32, 0.1, 0.2, 0.3, 0.4)
    assert settings.augmentation == views and settings.clip == 2


def test_a_seed_has_its_own_start_and_with_each_step_its_own_views_drop_path_and_order():
    images, drawn = torch.randint(256, (2, 3, 224, 224)).byte(), []
    for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1)):  # an epoch has one step
        args = train.arguments([*SMALL, "--batch", "30", "--seed", str(seed)])
        settings = train.settings_of(args, 1, MEAN, STD)
        (views,), _ = train.views_of_step(images, torch.zeros(2, 0, 2), step, settings, (0, 1), False)
        drop_path, start = torch.initial_seed(), train.start_encoder(args, MEAN, STD).pos_embed.sum().item()
        order = next(iter(train.loader_of(range(30), args, step, 2).batch_sampler))
        drawn.append((start, views.sum().item(), drop_path, tuple(order)))
    assert [len(set(values)) for values in zip(*drawn)] == [2, 4, 4, 4]


# ---------------------------------------------------------------- warnings and the log

def entropy_curve(place, capsys, *flags):
    """Trains a tiny baseline with these flags; its log's rows and what was printed."""
    for i in range(4):
        saved(place / "in" / "slides" / f"{i}.png", array=tissue(448, seed=i))
    argv = [*SMALL, "--batch", "4", "--epochs", "3", "--out-dim", "64", "--precision", "fp32"]
    capsys.readouterr()
    assert train.main([*argv, *flags]) == 0
    return rows_of(place / "runs" / "in_vit_t4_baseline" / "log.csv"), capsys.readouterr()


def test_uniform_outputs_are_reported_once_with_the_flag_to_change(place, capsys):
    rows, printed = entropy_curve(place, capsys, "--teacher-temp", "10")
    assert all(float(row["entropy_f"]) > 0.98 for row in rows)
    warnings = [line for line in (printed.out + printed.err).splitlines() if "warning: " in line]
    assert len(warnings) == 1 and "step 4" in warnings[0] and "of head f have been uniform" in warnings[0]
    assert "Lower --teacher-temp" in warnings[0] and "--jitter" in warnings[0]


def test_outputs_on_one_prototype_are_reported_once_with_the_flag_to_change(place, capsys):
    rows, printed = entropy_curve(place, capsys, "--teacher-temp", "0.0002", "--seed", "1")
    assert all(float(row["entropy_f"]) < 0.02 for row in rows)
    warnings = [line for line in (printed.out + printed.err).splitlines() if "one prototype" in line]
    assert len(warnings) == 1 and "Raise --teacher-temp" in warnings[0]


def test_log_holds_entropy_divergence_and_rank(place, capsys):
    flags = ["--warmup-teacher-temp", "0.02", "--warmup-teacher-temp-epochs", "2", "--save-every", "2",
             "--no-norm-last-layer"]
    rows, printed = entropy_curve(place, capsys, *flags)
    for row in rows:
        loss, entropy, kl = (float(row[name]) for name in ("loss_f", "entropy_f", "kl_f"))
        assert loss == pytest.approx((entropy + kl) * math.log(64), rel=1e-4)
        assert 0 < entropy < 1 and kl > -1e-6
    per_epoch = len(rows) // 3
    temps = [float(row["teacher_temp"]) for row in rows]
    wanted = [min(0.04, 0.02 + 0.01 * i / per_epoch) for i in range(len(rows))]
    np.testing.assert_allclose(temps, wanted, rtol=1e-5)
    assert [bool(row["rank"]) for row in rows] == [(i + 1) % per_epoch == 0 for i in range(len(rows))]
    run = place / "runs" / "in_vit_t4_baseline"
    assert {path.name for path in run.glob("encoder*")} == {"encoder.pt", "encoder_2.pt"}
    assert load_encoder(run / "encoder_2.pt")[1]["step"] == 2 * per_epoch
    assert "H" in printed.err and "KL" in printed.err
    assert curves.smoothed(np.array([1.0, 3, 5, 7]), 2).tolist() == [1, 2, 4, 6]
    assert curves.main([str(run), str(run)]) == 0 and (run / "curves.png").stat().st_size > 10_000
    refused(capsys, curves.main, ["nothing"], "nothing: no log.csv")


def test_effective_rank():
    eye = torch.eye(5)
    assert effective_rank(torch.cat([eye, -eye])) == pytest.approx(5)
    assert effective_rank(torch.arange(9.)[:, None] * eye[0]) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.ones(9, 5)) == 0


def test_init_takes_weights_in_timms_and_dinos_names(tmp_path, capsys):
    torch.manual_seed(1)
    ours, images = dirl.vit_t().eval(), torch.randn(2, 3, 224, 224)
    plain = {**ours.state_dict(), "head.weight": torch.zeros(3, 192)}
    save_tensors(tmp_path / "timm.pth", plain)
    of_dino = {f"module.backbone.{name}": value for name, value in plain.items()}
    save_tensors(tmp_path / "dino.pth", {"student": {}, "teacher": of_dino})
    save_tensors(tmp_path / "compiled.pth", {f"_orig_mod.{name}": value for name, value in plain.items()})
    for name in ("timm.pth", "dino.pth", "compiled.pth"):
        encoder = dirl.vit_t().eval()
        encoders.init_encoder(encoder, tmp_path / name)
        assert torch.equal(encoder(images), ours(images))
        tensors = len(ours.state_dict())
        assert capsys.readouterr().out.strip().endswith(f"took {tensors} tensors, ignored head.weight")
    with pytest.raises(InputError, match="another size"):
        encoders.init_encoder(dirl.vit_s(), tmp_path / "timm.pth")
    save_tensors(tmp_path / "half.pth", {"norm.weight": torch.ones(192)})
    with pytest.raises(InputError, match="weights are missing"):
        encoders.init_encoder(dirl.vit_t(), tmp_path / "half.pth")


def test_weights_of_init_bring_their_training_slides_and_their_mean_and_std(place, folder, capsys):
    """A run on a copy of the slides that starts from a run that saw a test slide may not be tested on it."""
    first = ["--data", "in", *SMALL[2:], "--max-steps", "1", "--run", "runs/first"]
    shutil.copy(folder / "slides" / "nests_3.png", place / "in" / "slides" / "good.png")
    assert train.main([*first, "--stats", "data"]) == 0
    argv = [*FOLDER, "--method", "baseline", "--max-steps", "1", "--run", "runs/second"]
    assert train.main([*argv, "--init", "runs/first/encoder.pt"]) == 0
    assert "another mean and std; --stats init takes them" in capsys.readouterr().out
    test = [*SET, "--checkpoint", "runs/second"]
    refused(capsys, eval_py.main, test, "runs/second/encoder.pt: was trained on 1 of these 2 test", "nests_3")
    argv[-1] = "runs/third"
    assert train.main([*argv, "--init", "runs/first/encoder.pt", "--stats", "init"]) == 0
    assert "another mean and std" not in capsys.readouterr().out
    before, after = (load_tensors(f"runs/{run}/encoder.pt") for run in ("first", "third"))
    assert before["mean"] == after["mean"] and after["trained_on"]["init"] == before["trained_on"]
    assert hashes_of(after["trained_on"]) > hashes_of(before["trained_on"])
    save_tensors(place / "w.pth", before["encoder"])
    refused(capsys, train.main, [*argv, "--stats", "init", "--init", "w.pth"], "w.pth has none")
    refused(capsys, train.main, [*argv, "--stats", "init"], "no file has none")
    argv[-1] = "runs/fourth"
    assert train.main([*argv, "--init", "w.pth"]) == 0
    assert "w.pth: does not record what it was trained on" in capsys.readouterr().out


def dinos_checkpoint(ours, **more):
    """What main_dino.py of facebookresearch/dino saves after an epoch."""
    backbone = {**ours.state_dict(), "cls_token": torch.zeros(1, 1, 192)}
    backbone["pos_embed"] = torch.cat([torch.ones(1, 1, 192), backbone["pos_embed"]], 1)
    teacher = {f"backbone.{name}": value for name, value in backbone.items()}
    teacher |= {"head.mlp.0.weight": torch.zeros(2, 192), "head.last_layer.weight_g": torch.ones(4, 1)}
    student = {f"module.{name}": torch.zeros_like(value) for name, value in teacher.items()}
    weight = torch.nn.Parameter(torch.zeros(3))
    args = Namespace(arch="vit_tiny", patch_size=16, global_crops_scale=(0.4, 1.0), use_fp16=True, lr=5e-4,
                     data_path="/data", dist_url="env://", gpu=0)
    return {"student": student, "teacher": teacher, "optimizer": torch.optim.AdamW([weight]).state_dict(),
            "epoch": 100, "args": args, "dino_loss": {"center": torch.zeros(1, 4)},
            "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0}, **more}


def test_init_takes_dinos_full_checkpoint_and_runs_no_code_of_it(tmp_path, capsys):
    ours, images = dirl.vit_t().eval(), torch.randn(2, 3, 224, 224)
    torch.save(dinos_checkpoint(ours), tmp_path / "checkpoint.pth")
    encoder = dirl.vit_t().eval()
    encoders.init_encoder(encoder, tmp_path / "checkpoint.pth")
    assert torch.equal(encoder(images), ours(images))
    assert "ignored cls_token, head.last_layer.weight_g, head.mlp.0.weight" in capsys.readouterr().out
    for hidden in ({"args": Evil(tmp_path / "made")}, {"args": Namespace(lr=Evil(tmp_path / "made"))}):
        torch.save(dinos_checkpoint(ours, **hidden), tmp_path / "evil.pth")
        with pytest.raises(InputError, match="evil.pth: holds a Python object .*mkdir.*state dict alone"):
            encoders.init_encoder(encoder, tmp_path / "evil.pth")
    assert not (tmp_path / "made").exists()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 5303\n"


@pytest.mark.parametrize("flag, content, says", [
    ("--init", None, "w.pth: is missing"), ("--init", "text", "w.pth: cannot be loaded"),
    ("--init", POINTER, "w.pth: is a Git LFS pointer: run git lfs pull"),
    ("--init", {}, "w.pth: does not fit --arch"),
    ("--probe", None, "w.pth: neither a folder"), ("--probe", POINTER, "w.pth: neither a folder"),
    ("--checkpoint", None, "--checkpoint w.pth: is missing"),
    ("--split", None, "--split w.pth: is not a file"), ("--checkpoint", {}, "is not an encoder.pt"),
    ("--checkpoint", POINTER, "w.pth: is a Git LFS pointer: run git lfs pull")])
def test_a_bad_file_is_refused_before_slides_are_prepared(place, capsys, flag, content, says):
    if isinstance(content, dict):
        save_tensors(place / "w.pth", content)
    elif content:
        write(place / "w.pth", content)
    main, argv = (eval_py.main, SMALL[:6]) if flag in ("--checkpoint", "--split") else (train.main, SMALL)
    refused(capsys, main, [*argv, flag, "w.pth"], says)
    refused(capsys, train.main, [*SMALL, "--probe", "in"], "in/labels.csv: is missing")
    assert not (place / "datasets").exists() and not (place / "runs").exists()


def test_positions_of_another_grid_are_interpolated():
    y, x = torch.meshgrid(torch.linspace(0, 1, 7), torch.linspace(0, 1, 7), indexing="ij")
    small = torch.stack([x, y], -1).view(1, 49, 2)
    fitted = encoders.fit_positions(small, torch.zeros(1, 196, 2)).view(14, 14, 2)
    assert fitted[0, 0].max() < 0.1 and fitted[-1, -1].min() > 0.9
    torch.testing.assert_close(fitted[..., 0], fitted[..., 1].T)


def test_pixels_are_normalised_by_the_crops_own_statistics(place, capsys):
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    mean, std = encoders.stats_of_crops(images)
    x = normalize(images / 255, mean, std)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=2e-3, rtol=0)
    entropy_curve(place, capsys, "--stats", "data", "--max-steps", "2")
    run = place / "runs" / "in_vit_t4_baseline"
    encoder, about = load_encoder(run / "encoder.pt")
    assert about["mean"] == list(encoder.mean) != list(encoders.MEAN)
    torch.testing.assert_close(encoders.represent(encoder, images), encoder(normalize(
        images / 255, encoder.mean, encoder.std)).mean(1))


def test_a_run_from_init_starts_at_these_weights(place, capsys):
    save_tensors(place / "w.pth", dirl.ARCHS["vit_t4"]().state_dict())
    entropy_curve(place, capsys, "--init", "w.pth", "--lr", "0", "--min-lr", "0")
    encoder, _ = load_encoder(place / "runs" / "in_vit_t4_baseline" / "encoder.pt")
    for name, value in load_tensors(place / "w.pth").items():
        torch.testing.assert_close(encoder.state_dict()[name], value, rtol=1e-6, atol=1e-6)


def test_benchmark_times_the_sections_of_a_step_and_writes_no_run(place, capsys):
    saved(place / "in" / "slides" / "more.png", array=tissue(448))
    assert benchmark.main([*SMALL, "--batch", "2", "--steps", "2"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out[out.index("ms a step"):].splitlines()[1:-1]]
    assert len(rows) == 9 and "student's heads" in out and all(float(row[-2]) > 0 for row in rows)
    assert sum(float(row[-1].rstrip("%")) for row in rows) == pytest.approx(100, abs=25)  # medians
    assert "crops a second, peak memory" in out and not (place / "runs").exists()
    argv = [*SMALL, "--batch", "2", "--accumulate", "2"]  # which it would not time
    refused(capsys, benchmark.main, argv, "--accumulate")


@pytest.mark.parametrize("script", [train, benchmark])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_benchmark_multiplies_as_training_does(place, monkeypatch, script, precision):
    flags = SimpleNamespace(allow_tf32=None)  # of torch, which is not to keep them
    monkeypatch.setattr(torch.backends.cuda, "matmul", flags)
    steps = "--steps" if script is benchmark else "--max-steps"
    assert script.main([*SMALL, "--precision", precision, steps, "1"]) == 0
    assert flags.allow_tf32 == (precision == "bf16")
