"""Tests of the experiment: bags, measures, and the script for real at a tiny size, stopped and gone on with."""
import csv
import json
import shutil

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from synthetic import one_line

import dirl
from common import measures
from common.classify import nearest
from common.encoders import load_encoder, normalize
from common.figures import draw_distribution
from common.files import file_stamp
from common.flags import arguments as train_arguments
from common.run import is_finished
from data import find_data
from experiments import claim, claim_table

TINY = ["--mpp", "0.5", "--batch", "8", "--out-dim", "16", "--disentangled-dim", "8", "--epochs", "2", "--global-size", "32",
        "--local-size", "16", "--local-crops", "1", "--probe-images", "24", "--workers", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """A folder of 3 classes x 10 source tiles x 2 crops, nuclei as dark discs, 6 source tiles of each to train."""
    folder = tmp_path_factory.mktemp("crops")
    rng, rows = np.random.default_rng(0), ["image,label,split,source_tile"]
    y, x = np.mgrid[:224, :224]
    for k in range(3):
        (folder / f"class{k}").mkdir()
        for tile in range(10):
            for copy in range(2):
                image = np.full((224, 224, 3), (235, 180 + 15 * k, 215), np.float64) + rng.normal(0, 6, (224, 224, 1))
                for cx, cy in rng.uniform(10, 150, (12, 2)):  # none on the right and below: both regions are there
                    image[(x - cx) ** 2 + (y - cy) ** 2 < 36] = (90, 50, 140)
                name = f"class{k}/{tile}_{copy}.png"
                Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / name)
                rows.append(f"{name},class{k},{'train' if tile < 6 else 'test'},{k}_{tile}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture
def place(tmp_path, crops, monkeypatch):
    """An empty folder to work in, with a copy of the crops as "c"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measures, "DRAWS", 50)
    monkeypatch.setattr(claim, "DSMIL_EPOCHS", 3)
    shutil.copytree(crops, tmp_path / "c")
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
    scores = nearest(features[:40], labels[:40], features[40:])
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for i in range(20):
        near = np.argsort(-(unit[:40] @ unit[40 + i]))[:20]
        np.testing.assert_allclose(scores[i], [(labels[near] == c).mean() for c in range(3)])


def statistics_of(scores, truth, groups, pair=None, classes=2):
    file = {"labels": truth, "classes": np.array([f"c{i}" for i in range(classes)]), "x": scores, "stamp": "",
            "groups": groups, "attention": np.tile(np.float32([0.4, 0.5, 2, 2.5]), (len(truth), 1))}
    return claim_table.statistics(file, claim_table.draws_of(groups), pair)


def test_statistics_are_means_over_folds_and_draws_take_whole_groups():
    truth, groups = np.array([0, 0, 1, 1] * 10), np.repeat(np.arange(20), 2)
    right, wrong = np.eye(2)[truth], np.eye(2)[1 - truth]
    out = statistics_of(np.stack([right, right, right, wrong]), truth, groups)
    assert out["accuracy, x"][0] == 0.75 and out["AUC, x"][0] == 0.75  # an ensemble of the four would have 1
    for index in claim_table.draws_of(groups)[1:]:
        count = np.bincount(index, minlength=40)
        assert (count[::2] == count[1::2]).all() and len(index) == 40
    rng = np.random.default_rng(0)
    scores = rng.random((1, 40, 2))
    out = statistics_of(scores, truth, groups)
    hits = (scores[0].argmax(1) == truth)
    np.testing.assert_allclose(out["accuracy, x"], [hits[index].mean() for index in claim_table.draws_of(groups)])
    assert len(out["accuracy, x"]) == 1 + measures.DRAWS and [out[name][3] for name in claim_table.BINS] == [0.25, 0.5, 0.25]
    assert out[claim_table.SPREAD][3] == pytest.approx(np.std([0.4, 0.5, 2, 2.5], ddof=1))


def test_a_pair_is_told_apart_by_the_ratio_of_its_two_scores():
    truth = np.array([0, 1, 0, 1, 2, 2])
    scores = np.array([[[.4, .3, .3], [.05, .1, .85], [.02, .01, .97], [.3, .6, .1], [0, 0, 1], [0, 0, 1]]])
    out = statistics_of(scores, truth, np.arange(6), ("c0", "c1"), 3)
    assert out["accuracy, x, c0 against c1"][0] == 1 and out["AUC, x, c0 against c1"][0] == 1


def test_cells_of_the_table():
    assert claim_table.cell([np.array([0.5, 0.4, 0.6])], 1) == "0.500 (0.405 to 0.595)" and claim_table.cell([[0.5]], 1) == "0.500"
    assert claim_table.cell([np.array([0.5, 0.4, 0.6]), np.array([0.7, 0.8, 0.6])], 2) == "0.600 ± 0.141 (0.600 to 0.600)"
    assert claim_table.cell([[0.5]], 3) == "0.500 [1 of 3 seeds]"


def test_fig_4_is_a_histogram_with_the_middle_bins_share():
    axis = Figure().subplots()
    values = np.float32([0.01, 0.5, 1, 2, 2.1, 40, 0.4, 1])
    draw_distribution(axis, {"a": values, "b": np.ones((3, 4), np.float32)}, {"a": "red"})
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a: 50.0%", "b: 100.0%"]
    heights = axis.patches[0].get_xy()[:, 1]
    assert heights[1:-1:2].sum() == pytest.approx(100) and heights.max() == pytest.approx(25)  # all drawn, what lies beyond at the ends
    assert axis.patches[0].get_edgecolor()[:3] == (1, 0, 0)


def test_arms_are_compared_with_their_own_baseline(place, capsys):
    out, scores = place / "runs" / "claim", np.eye(2)[[0, 1] * 10]
    for arm, level in (("baseline", 0.0), ("two_views", 4.0), ("baseline_two_views", 1.0)):
        folder = out / f"{arm}_seed0"
        folder.mkdir(parents=True)
        (folder / "encoder.pt").write_bytes(b"x")
        np.savez(folder / "claim.npz", stamp=file_stamp(folder / "encoder.pt"), classes=["a", "b"],
                 labels=[0, 1] * 10, groups=np.arange(20), attention=np.full((20, 196), level, np.float32),
                 **{"20-NN": scores[None]})
    assert claim.main(["show"]) == 0
    minus = capsys.readouterr().out.split("minus baseline, same seeds")[1]
    assert "two_views minus baseline_two_views" in minus
    line = next(line for line in minus.splitlines() if line.startswith("tokens with attention 0.5 to 2"))
    assert line.split("  ")[-1].strip() == "-1.000 (-1.000 to -1.000)"  # 0 against 1; the other baseline has 0 too
    np.savez(out / "baseline_seed0" / "claim.npz", stamp="", classes=["a", "b"], labels=[0, 1], groups=[0, 1],
             attention=np.zeros((2, 4)))
    assert claim.main(["show"]) == 2
    one_line(capsys, "an earlier version")


def test_the_experiment_runs_stops_goes_on_and_shows(place, capfd):
    argv = ["run", "--data", "c", "--arms", "baseline", "cellback", "random", "--folds", "2",
            "--bag-groups", "1", "--bag-seeds", "1", "--probe-epochs", "2", *TINY]
    assert claim.main([*argv, "--max-steps", "3"]) == 130
    out = place / "runs" / "claim"
    assert not (out / "baseline_seed0" / "claim.npz").exists() and not is_finished(out / "baseline_seed0")
    assert claim.main(argv) == 0
    written = {path: path.stat().st_mtime_ns for path in out.glob("*/claim.npz")}
    assert len(written) == 3 and is_finished(out / "baseline_seed0")
    (out / "baseline_seed0" / "checkpoint.pt").unlink()  # large, and not needed any more
    assert claim.main(argv) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written  # nothing is trained or measured twice
    argv[4:7] = ["random"]
    more = ["--tune-epochs", "1", "--tune-folds", "1", "--bag-groups", "2", "--bag-seeds", "0"]
    assert claim.main([*argv, *more]) == 0  # one measure more is added to those there
    capfd.readouterr()
    assert claim.main([*argv, "--epochs", "3"]) == 2 and "epochs 2 (now 3)" in capfd.readouterr().err

    with np.load(out / "baseline_seed0" / "claim.npz", allow_pickle=False) as file:
        rows = {name: file[name] for name in file.files}
    assert rows["attention"].shape == (24, 196) and rows["attention at 32 px"].shape == (24, 4)
    encoder, _ = load_encoder(out / "baseline_seed0" / "encoder.pt")
    found = find_data("c")
    first = next(name for name in found.images if found.labels[name]["split"] == "test")
    image = torch.from_numpy(np.array(Image.open(found.images[first]))).permute(2, 0, 1)[None].float()
    small = image[:, :, 3::7, 3::7]  # bilinear at a seventh takes the middle px of seven
    with torch.no_grad():
        want = encoder.last_attention(normalize(small / 255)).sum(2).mean(1)[0]
    np.testing.assert_allclose(rows["attention at 32 px"][0], want, rtol=2e-3)
    np.testing.assert_allclose(rows["attention"].sum(1), 196, rtol=1e-4)
    assert rows["logistic regression, 2 folds"].shape == (2, 24, 3) and rows["20-NN"].shape == (1, 24, 3)
    with np.load(out / "random_seed0" / "claim.npz", allow_pickle=False) as file:
        assert set(file.files) - set(rows) == {"fine-tuned 1 epochs, 1 of 2 folds"}  # and the bags are those that DSMIL had
        assert len(file["DSMIL on synthetic slides of 1, 1 seeds" + claim_table.BAGS]) == 12
        assert file["fine-tuned 1 epochs, 1 of 2 folds"].shape == (1, 24, 3)
    assert rows["DSMIL on synthetic slides of 1, 1 seeds"].shape == (1, 12, 3)
    assert np.bincount(rows["DSMIL on synthetic slides of 1, 1 seeds" + claim_table.BAGS]).tolist() == [4, 4, 4]
    right = rows["logistic regression, 2 folds"].argmax(2) == rows["labels"]
    assert right.mean() > 0.8  # the classes are tints: a random network tells them apart
    a, b = (json.loads((out / f"{arm}_seed0" / "config.json").read_text()) for arm in ("baseline", "cellback"))
    assert {name for name in a if a[name] != b[name]} == {"method"}

    pair = ["--pair", "class0", "class2"]
    assert claim.main(["show", "--overlay", "c", "--mpp", "0.5", "--crops", "2", *pair]) == 0
    said = capfd.readouterr().out
    assert "random, seed 0" in said and "curves on the probe" in said and "class0 against class2" in said
    assert "arm minus baseline" in said and "f_c" in said
    table = list(csv.DictReader(open(out / "claim.csv", encoding="utf-8")))
    assert {row["arm"] for row in table} == {"random", "baseline", "cellback"}
    value, = (float(row["value"]) for row in table
              if (row["arm"], row["measure"]) == ("baseline", "accuracy, logistic regression, 2 folds"))
    assert value == pytest.approx(right.mean(), abs=1e-4)
    for name in ("claim.png", "claim_overlay.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    points = claim_table.probe_curve(out / "cellback_seed0")
    assert list(points) == [2] and all(sum(p[:3]) == pytest.approx(1, abs=1e-3) for p in points.values())
    (out / "random_seed0" / "encoder.pt").write_bytes(b"another")
    assert claim.main(["show"]) == 0 and "left out" in capfd.readouterr().out


def test_the_loss_share_is_one_where_teacher_and_student_are_uniform(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"out_dim": 64, "disentangled_dim": 8}))
    (tmp_path / "log.csv").write_text(f"step,epoch,loss,loss_c,loss_cc\n0,0,9,9,9\n1,1,9,{np.log(64)},{np.log(8)}\n")
    assert claim_table.loss_shares(tmp_path) == {"c": pytest.approx(1), "cc": pytest.approx(1)}


def test_random_is_an_encoder_as_it_starts(place):
    argv = ["run", "--data", "c", "--arms", "random", "--folds", "2", "--bag-seeds", "0", "--seeds", "3", *TINY]
    assert claim.main(argv) == 0
    encoder, about = load_encoder(place / "runs/claim/random_seed3/encoder.pt")
    torch.manual_seed(3)
    want = dirl.vit_t().state_dict()
    assert about["step"] == 0 and all(torch.equal(v, want[k]) for k, v in encoder.state_dict().items())


@pytest.mark.parametrize("argv, says", [
    (["--method", "dirl"], "--arms"), (["--seed=3"], "--seeds"), (["--shuffle-prior"], "--shuffle-prior"), (["--batch", "37", "--bag-groups", "1"], "--batch 37"),
    (["--data", "gone"], "gone"), (["--lr", "50"], "--lr"), (["--bag-groups", "9"], "--bag-groups 9"), (["--bag-groups", "0"], "--bag-groups 0"),
    (["--folds", "50"], "--folds 50"), (["--folds", "1"], "--folds 1"), (["--tune-epochs", "-1"], "--tune-epochs -1")])
def test_bad_flags_are_reported_before_the_first_arm(place, capsys, argv, says):
    assert claim.main(["run", "--data", "c", *TINY, *argv]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not list(place.glob("runs/claim/*"))


def test_a_split_that_leaks_is_reported(place, capsys):
    lines = (place / "c" / "labels.csv").read_text().splitlines()
    lines[1] = lines[1].replace("train", "test")
    (place / "c" / "labels.csv").write_text("\n".join(lines))
    assert claim.main(["run", "--data", "c", *TINY, "--arms", "random"]) == 2
    one_line(capsys, "labels.csv", "'0_0' is in test and in train")


def test_a_failing_arm_is_named_and_the_others_go_on(place, capsys, monkeypatch):
    monkeypatch.setattr(claim, "pre_train", lambda flags, folder: 1)  # as train.py ends where the loss diverges
    argv = ["run", "--data", "c", *TINY, "--arms", "baseline", "random", "--folds", "2", "--bag-seeds", "0"]
    assert claim.main(argv) == 1
    assert "failed: runs/claim/baseline_seed0" in capsys.readouterr().err
    assert (place / "runs/claim/random_seed0/claim.npz").is_file()


@pytest.mark.parametrize("argv, says", [(["show", "--out", "nowhere"], "nowhere"), (["show", "--epochs", "3"], "--epochs")])
def test_bad_input_is_one_line_and_exit_2(place, capsys, argv, says):
    assert claim.main(argv) == 2
    error = capsys.readouterr().err
    assert says in error.splitlines()[-1] and "Traceback" not in error


def test_unknown_flags_are_reported_before_the_first_arm(place):
    with pytest.raises(SystemExit) as stop:
        claim.main(["run", "--data", "c", "--nonsense", "1"])
    assert stop.value.code == 2 and not (place / "runs").exists()


def test_arms_are_flags_that_train_takes(place):
    for arm, flags in claim_table.ARMS.items():
        args = train_arguments(["--data", "c", *TINY, *(flags or [])])
        assert args.method in dirl.METHODS, arm
