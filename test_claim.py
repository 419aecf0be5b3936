"""Tests of the experiment: bags, measures, and the script for real at a tiny size, stopped and gone on with."""
import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import claim
import dirl
import eval as eval_py
import patches
import train as train_py

TINY = ["--mpp", "0.5", "--batch", "8", "--out-dim", "16", "--disentangled-dim", "8", "--epochs", "2", "--global-size", "32",
        "--local-size", "16", "--local-crops", "1", "--probe-images", "24", "--workers", "1", "--device", "cpu"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder "c" of 3 classes x 10 source tiles x 2 crops, nuclei as dark discs, 6 source tiles of each to train."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(patches, "DRAWS", 50)
    monkeypatch.setattr(claim, "DSMIL_EPOCHS", 3)
    rng, rows = np.random.default_rng(0), ["image,label,split,source_tile"]
    y, x = np.mgrid[:224, :224]
    for k in range(3):
        for tile in range(10):
            for copy in range(2):
                image = np.full((224, 224, 3), (235, 180 + 15 * k, 215), np.float64) + rng.normal(0, 6, (224, 224, 1))
                for cx, cy in rng.uniform(10, 150, (12, 2)):  # none on the right and below: both regions are there
                    image[(x - cx) ** 2 + (y - cy) ** 2 < 36] = (90, 50, 140)
                name = f"class{k}/{tile}_{copy}.png"
                (tmp_path / "c" / f"class{k}").mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(tmp_path / "c" / name)
                rows.append(f"{name},class{k},{'train' if tile < 6 else 'test'},{k}_{tile}")
    (tmp_path / "c" / "labels.csv").write_text("\n".join(rows))
    return tmp_path


def test_bags_hold_whole_groups_of_one_class_and_no_tile_twice():
    rng = np.random.default_rng(0)
    groups = np.array([f"g{g}" for g in rng.integers(0, 40, 300)])
    labels = np.array([int(g[1:]) % 3 for g in groups])
    part = np.flatnonzero(rng.random(300) < 0.7)
    bags = claim.make_bags(part, labels, groups, 4, seed=1)
    taken = np.concatenate([index for index, _ in bags])
    assert len(taken) == len(set(taken)) and set(taken) <= set(part)
    for index, label in bags:
        names = set(groups[index])
        assert len(names) == 4 and set(labels[index]) == {label}
        assert set(index) == {i for i in part if groups[i] in names}  # whole
    for label in range(3):
        there = len({g for g, own in zip(groups[part], labels[part]) if own == label})
        assert sum(own == label for _, own in bags) == there // 4


def test_nearest_is_brute_force_by_cosine():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 5)), rng.integers(0, 3, 60)
    on = SimpleNamespace(train=np.arange(40), test=np.arange(40, 60), labels=labels)
    scores = claim.nearest(features, on)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for i in range(20):
        near = np.argsort(-(unit[:40] @ unit[40 + i]))[:20]
        np.testing.assert_allclose(scores[i], [(labels[near] == c).mean() for c in range(3)])


def test_scores_have_intervals_and_the_pair_is_read_off_the_same_scores():
    truth = np.array([0, 0, 1, 1] * 10)
    rows = claim.scored("x", truth, np.eye(2)[truth], np.arange(40))
    assert rows == [["accuracy, x", 1.0, 1.0, 1.0], ["AUC, x", 1.0, 1.0, 1.0]]
    wrong = claim.scored("x", truth, np.eye(2)[1 - truth], np.arange(40))
    assert wrong[0][1] == 0 and wrong[1][1] == 0
    assert claim.cell([(0.5, 0.4, 0.6)]) == "0.500 (0.400-0.600)" and claim.cell([(0.5, None, None)]) == "0.500"
    assert claim.cell([(0.5, 0, 1), (0.7, 0, 1)]) == "0.600 ± 0.141"


def test_empty_regions_count_or_not():
    """skip_empty=False is the loss with every region taken for present; where all are there, both are one."""
    torch.manual_seed(0)
    model = dirl.DiRL(dirl.vit_t(), "cellback", 16)
    logits = lambda: {name: (torch.randn(3, 4, 16), torch.rand(3, 4) < p) for name, p in (("c", 0.5), ("b", 1.1))}
    student, target = logits(), {name: (x[:2], p[:2]) for name, (x, p) in logits().items()}
    whole = lambda views: {name: (x, torch.ones_like(p)) for name, (x, p) in views.items()}
    counted, each = dirl.DiRLLoss(model, skip_empty=False)(student, target)
    want, want_each = dirl.DiRLLoss(model)(whole(student), whole(target))
    assert torch.equal(counted, want) and all(torch.equal(each[k], want_each[k]) for k in each)
    _, skipped = dirl.DiRLLoss(model)(student, target)
    assert torch.equal(skipped["b"], each["b"]) and not torch.equal(skipped["c"], each["c"])


def test_the_experiment_runs_stops_goes_on_and_shows(place, capsys):
    argv = ["run", "--data", "c", "--arms", "baseline", "cellback", "random", "--folds", "2", "--tune-epochs", "1",
            "--tune-folds", "1", "--pair", "class0", "class2", "--bag-groups", "1", "--bag-seeds", "1", *TINY]
    assert claim.main([*argv, "--max-steps", "3"]) == 0
    out = place / "runs" / "claim"
    assert not (out / "baseline_seed0" / "claim.json").exists()
    assert not claim.finished(out / "baseline_seed0")
    assert claim.main(argv) == 0
    assert "goes on at step 3" in capsys.readouterr().out
    written = {path: path.stat().st_mtime_ns for path in out.glob("*/claim.json")}
    assert len(written) == 3 and claim.finished(out / "baseline_seed0")
    assert claim.main(argv) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written  # nothing is measured twice

    rows = {name: values for name, *values in json.loads((out / "baseline_seed0" / "claim.json").read_text())["measures"]}
    assert sum(rows[name][0] for name in claim.BINS) == pytest.approx(1)
    for name in ("20-NN", "logistic regression", "fine-tuned", "20-NN, class0 against class2", "DSMIL, 12 synthetic slides"):
        for what in ("accuracy", "AUC"):
            value, low, high = rows[f"{what}, {name}"]
            assert 0 <= low <= value <= high <= 1
    assert rows["accuracy, logistic regression"][0] > 0.8  # the classes are tints: a random network tells them apart
    same = {arm: json.loads((out / f"{arm}_seed0" / "config.json").read_text()) for arm in ("baseline", "cellback")}
    assert {k for k in same["cellback"] if same["cellback"][k] != same["baseline"][k]} == {"method"}

    assert claim.main(["show", "--overlay", "c", "--mpp", "0.5", "--crops", "2"]) == 0
    said = capsys.readouterr().out
    assert "random, 1 seed" in said and "course on the probe" in said
    table = list(csv.reader(open(out / "claim.csv", encoding="utf-8")))
    assert table[0][1:] == [f"{arm}, 1 seed" for arm in ("random", "baseline", "cellback")]
    assert [row[0] for row in table if row[0].startswith("last epoch's loss")] == [
        f"last epoch's loss of {f} / ln K" for f in ("f", "f_c", "f_b")]
    for name in ("claim.png", "claim_overlay.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    points = claim.course(out / "cellback_seed0")
    assert [p[0] for p in points] == [1, 2] and all(sum(p[1:4]) == pytest.approx(1, abs=1e-3) for p in points)


def test_the_loss_share_is_one_where_teacher_and_student_are_uniform(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"out_dim": 64, "disentangled_dim": 8}))
    (tmp_path / "log.csv").write_text(f"step,epoch,loss,loss_c,loss_cc\n0,0,9,9,9\n1,1,9,{np.log(64)},{np.log(8)}\n")
    assert claim.loss_shares(tmp_path) == {"c": pytest.approx(1), "cc": pytest.approx(1)}


def test_random_is_an_encoder_as_it_starts(place):
    argv = ["run", "--data", "c", "--arms", "random", "--folds", "2", "--bag-seeds", "0", "--seeds", "3", *TINY]
    assert claim.main(argv) == 0
    encoder, about = eval_py.load_encoder(place / "runs/claim/random_seed3/encoder.pt")
    torch.manual_seed(3)
    want = dirl.vit_t().state_dict()
    assert about["step"] == 0 and all(torch.equal(v, want[k]) for k, v in encoder.state_dict().items())


@pytest.mark.parametrize("argv, says", [
    (["run", "--data", "c", "--method", "dirl"], "--arms"), (["run", "--data", "c", "--seed=3"], "--seeds"),
    (["run", "--data", "gone", *TINY], "gone"), (["run", "--data", "c", *TINY, "--lr", "50"], "--lr"),
    (["run", "--data", "c", *TINY, "--arms", "random", "--pair", "class0", "lung"], "--pair lung"),
    (["run", "--data", "c", *TINY, "--arms", "random", "--bag-groups", "9"], "--bag-groups 9"),
    (["run", "--data", "c", *TINY, "--arms", "random", "--folds", "50"], "--folds 50"),
    (["show", "--out", "nowhere"], "nowhere"), (["show", "--epochs", "3"], "--epochs")])
def test_bad_input_is_one_line_and_exit_2(place, capsys, argv, says):
    assert claim.main(argv) == 2
    error = capsys.readouterr().err
    assert says in error.splitlines()[-1] and "Traceback" not in error


def test_unknown_flags_are_told_before_the_first_arm(place):
    with pytest.raises(SystemExit) as stop:
        claim.main(["run", "--data", "c", "--nonsense", "1"])
    assert stop.value.code == 2 and not (place / "runs").exists()


def test_arms_are_flags_that_train_takes(place):
    for arm, flags in claim.ARMS.items():
        args = train_py.arguments(["--data", "c", *TINY, *(flags or [])])
        assert args.method in dirl.METHODS, arm
