"""Published splits (Table 4) and eval.py --folds: whose patients are in two splits, what is trained on."""
import re
import shutil
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score
from synthetic import refused, replace, rows_of, slides_named, tcga, untrained_run, write_table
from tiny_flags import FOLDER, SET

import eval as eval_py
import train
from common.encoders import load_encoder
from common.errors import InputError
from common.files import read_json
from experiments import study
from wsi import splits
from wsi.datasets import run_name
from wsi.folders import find_folder
from wsi.folds import draw_folds, fold_files
from wsi.published import published_split, shared_patients
from wsi.splits import find_data

pytestmark = pytest.mark.usefixtures("blank_figures")

PARTS = ("train", "val", "test")
EVAL = [*SET, "--repeats", "1", "--epochs", "2"]


def write_split(path, **columns):
    """A published split: names of slides in columns of different lengths, and a column of row numbers."""
    longest = max(map(len, columns.values()))
    rows = [",".join([str(i)] + [names[i] if i < len(names) else "" for names in columns.values()])
            for i in range(longest)]
    return str(write_table(path, "," + ",".join(columns), rows))


# ---------------------------------------------------------------- published splits

@pytest.mark.parametrize("seed", range(5))
def test_shared_patients_are_counted_and_dropped_as_by_brute_force(place, capsys, seed):
    """Thirty patients with two slides each, which are divided whatever their patient."""
    tcga(place / "s", range(30))
    names = np.random.default_rng(seed).permutation(sorted(find_folder("s").images))
    columns = dict(zip(PARTS, (names[:36].tolist(), names[36:45].tolist(), names[45:55].tolist())))
    path = write_split(place / "p/splits_0.csv", **columns)
    splits_of = defaultdict(set)
    for split, of_split in columns.items():
        for name in of_split:
            splits_of[name[:12]].add(split)
    shared = {patient for patient, in_splits in splits_of.items() if len(in_splits) == 2}
    a, b, c = (list(splits_of.values()).count(set(pair)) for pair in combinations(PARTS, 2))
    counts = f"(train and val {a}, train and test {b}, val and test {c})"
    found = find_data("s", split=path)
    out = capsys.readouterr().out
    assert f"{path}: {len(shared)} patients have slides in two splits {counts}" in out and a and b and c
    assert f"skipped: {path}: does not list 5 of the 60 labelled slides" in out
    assert {split: found.split(split) for split in PARTS} == {k: sorted(v) for k, v in columns.items()}
    assert found.unlabelled() == [] and set(found.pretrain_only) == set(names[55:])
    assert set().union(*shared_patients(found).values()) == shared

    found = find_data("s", split=path, drop_shared=True)
    kept = {"train": [name for name in columns["train"] if splits_of[name[:12]] == {"train"}],
            "val": [name for name in columns["val"] if "test" not in splits_of[name[:12]]],
            "test": columns["test"]}
    assert {split: found.split(split) for split in PARTS} == {k: sorted(v) for k, v in kept.items()}
    dropped = 55 - sum(map(len, kept.values()))
    assert f"{dropped} slides of theirs are left out" in capsys.readouterr().out
    assert not any(shared_patients(found).values())
    assert not (place / "datasets/s/split.csv").exists()  # the data set's own split was not even drawn


def test_an_encoder_of_a_published_split_is_refused_only_for_what_the_split_does_not_share(place, capsys):
    """One patient (0) has a training and a test slide."""
    tcga(place / "s", range(6))
    names = sorted(find_folder("s").images)  # two of patient 0, two of patient 1, ...
    path = write_split(place / "p/splits_0.csv", train=names[:1] + names[4:6], val=names[2:4],
                       test=[names[1], *names[8:10]])
    found = find_data("s", split=path)
    test = found.split("test")
    own = splits.training_record(found, found.split("train", "val"))
    assert "TCGA-05-0000" in own["patients"]  # the record says what was trained on, whatever the split
    capsys.readouterr()
    splits.check_unseen(found, test, own, "encoder.pt")
    assert "trained on other slides of the patients of 1 of these 3 test slides" in capsys.readouterr().out
    for tested, count in ((names[1], 1), (names[8], 2)):  # the slide, and its patient's other one
        record = splits.training_record(find_folder("s"), [names[0], tested])
        with pytest.raises(InputError, match=f"trained on {count} of these 3 test .*{tested}"):
            splits.check_unseen(found, test, record, "encoder.pt")
    dropped = find_data("s", split=path, drop_shared=True)
    with pytest.raises(InputError, match=f"trained on 1 of these 3 .*{names[1]}"):
        splits.check_unseen(dropped, test, own, "encoder.pt")
    splits.check_unseen(dropped, test, splits.training_record(dropped, dropped.split("train", "val")), "e.pt")
    assert "warning: e.pt" not in capsys.readouterr().out


def test_a_split_file_that_does_not_fit_is_refused_in_one_line(place, capsys):
    tcga(place / "s", range(4), slides_each=1)
    names = sorted(find_folder("s").images)

    def refuses(says, *, train, val, test):
        path = write_split(place / "p/splits_0.csv", train=train, val=val, test=test)
        with pytest.raises(InputError, match=f"p/splits_0.csv: {says}"):
            find_data("s", split=path)
    refuses(f"line 2: {names[0]} is listed twice", train=names, val=[], test=[f"{names[0]}.svs"])
    refuses("none of its 2 slides has a file and a label in s", train=["a"], val=[], test=["b"])
    survival = write_split(place / "p/splits_0.csv", train=names[:2], val=names[2:])  # as HIPT's for survival
    with pytest.raises(InputError, match="columns train,val,test"):
        find_data("s", split=survival)
    with pytest.raises(InputError, match="--drop-shared: is for a published split"):
        find_data("s", drop_shared=True)
    with pytest.raises(InputError, match="--split gone.csv: is not a file"):
        find_data("s", split="gone.csv")
    (place / "s/labels.csv").unlink()
    with pytest.raises(InputError, match="no slides with a labels.csv"):
        find_data("s", split=survival)


def test_runs_of_a_published_split_have_their_own_name():
    path = "splits/tcga_lung/splits_3.csv"
    assert run_name("lung", path) == "lung_tcga_lung_splits_3"
    assert run_name("lung", path, drop_shared=True) == "lung_tcga_lung_splits_3_unshared"
    own, published = (train.arguments(["--data", "lung", *flags]).run for flags in ([], ["--split", path]))
    assert own == "runs/lung_vit_t_dirl" and published == "runs/lung_tcga_lung_splits_3_vit_t_dirl"


def test_a_sweep_evaluates_by_the_split_that_it_trained_by(place):
    flags = ["--data", "in", "--mpp", "1", "--split", "p/splits_0.csv", "--drop-shared"]
    args = study.arguments(["fraction", *flags, "--values", "1", "--methods", "dirl"])
    _, (job,) = study.sweep_jobs(args)
    given = study.eval_flags(job, args)
    assert given[given.index("--split") + 1:][:2] == ["p/splits_0.csv", "--drop-shared"]
    mil = eval_py.slides_arguments(given[1:])
    assert (mil.mil_lr, mil.mil_weight_decay, mil.epochs, mil.repeats) == (2e-4, 5e-2, 200, 5)


def test_hipts_protocol_with_shared_patients_end_to_end(place, folder, capsys):
    """Two folds. p1 has slides in train and test of both, p2 in train and val of the first."""
    one = {"glands_0": "p1", "glands_3": "p1", "nests_0": "p2", "nests_2": "p2"}
    names = [f"{label}_{i}" for label in ("glands", "nests") for i in range(4)]
    rows = [f"{name},{name[:-2]},{one.get(name, name)}" for name in names]
    write_table(folder / "labels.csv", "slide,label,patient", rows)
    for k, val in ((0, 2), (1, 1)):
        write_split(place / f"hipt/splits_{k}.csv", train=["glands_0", f"glands_{3 - val}", "nests_0",
                                                            f"nests_{3 - val}"],
                    val=[f"glands_{val}", f"nests_{val}"], test=["glands_3", "nests_3"])
    for k in (0, 1):
        split = ["--split", f"hipt/splits_{k}.csv"]
        flags = ["--run", f"runs/hipt_{k}", "--method", "baseline", "--epochs", "2", "--max-steps", "4"]
        assert train.main([*FOLDER, *split, *flags]) == 0
        out = capsys.readouterr().out
        assert f"hipt/splits_{k}.csv: {2 - k} patients have slides in two splits" in out
        assert eval_py.main([*EVAL, *split, "--checkpoint", f"runs/hipt_{k}"]) == 0
        assert "patients of 1 of these 2 test slides" in capsys.readouterr().out
        assert rows_of(Path(f"runs/hipt_{k}/slides.csv"))
    assert not (place / "datasets/tiny_set/split.csv").exists()
    config = read_json("runs/hipt_0/config.json")
    trained_on = load_encoder("runs/hipt_0/encoder.pt")[1]["trained_on"]
    assert config["data"] == "tiny_set_hipt_splits_0" and trained_on["data"] == "tiny_set"
    assert sorted(trained_on["images"]) == names[:3] + names[4:7] and "p1" in trained_on["patients"]

    argv = ["folds", "--data", "tiny set", "--splits", "hipt", "--epochs", "2", "--device", "cpu",
            "--checkpoint", "own=runs/hipt_{fold}"]
    assert study.main(argv) == 0
    assert "own: DSMIL on the folds of hipt, trainings per fold: 1" in capsys.readouterr().out
    rows = rows_of(place / "runs/folds.csv")
    assert {row["test slides seen in pre-training"] for row in rows} == {"0"}
    assert [(row["patients in two splits"], row["patients in train and test"]) for row in rows] == [
        ("2", "1"), ("1", "1")]
    assert [(row["train"], row["val"], row["test"]) for row in rows] == [("4", "2", "2")] * 2
    refused(capsys, study.main, [*argv, "--drop-shared"], "runs/hipt_0", "on 1 of these 2", "glands_3")

    # Without the flag, the data set is what it was: its own split is drawn, and the encoder has seen it.
    assert train.main([*FOLDER, "--method", "baseline", "--max-steps", "1"]) == 0
    assert (place / "datasets/tiny_set/split.csv").is_file()
    own = find_data("tiny set")
    assert own.split_file is None and not any(shared_patients(own).values()) and len(own.labels) == 8
    assert set(own.split("test")) & trained_on["images"].keys()
    refused(capsys, eval_py.main, [*EVAL, "--checkpoint", "runs/hipt_0"], "was trained on")


def test_with_drop_shared_no_test_patient_is_trained_on(place, folder, capsys):
    replace(folder / "labels.csv", ("pglands3", "pglands0"))  # in two splits, which its own split may not
    path = write_split(place / "hipt/splits_0.csv", train=["glands_0", "glands_1", "nests_0", "nests_1"],
                       val=["glands_2", "nests_2"], test=["glands_3", "nests_3"])
    flags = ["--split", path, "--drop-shared"]
    refused(capsys, train.main, FOLDER, "pglands0", "is in train and in test")
    assert train.main([*FOLDER, *flags, "--method", "baseline", "--max-steps", "1"]) == 0
    run = Path("runs/tiny_set_hipt_splits_0_unshared_vit_t4_baseline")
    assert "glands_0" not in load_encoder(run / "encoder.pt")[1]["trained_on"]["images"]
    capsys.readouterr()
    assert eval_py.main([*EVAL, *flags]) == 0  # finds the run by its name
    out = capsys.readouterr().out
    assert "1 slides of theirs are left out" in out and "was trained on other slides" not in out
    assert study.main(["folds", "--data", "tiny set", "--splits", "hipt", "--epochs", "2", "--device", "cpu",
                       "--drop-shared", "--checkpoint", str(run)]) == 0
    row, = rows_of(Path("runs/folds.csv"))
    assert (row["patients in two splits"], row["train"]) == ("0", "3")


# ---------------------------------------------------------------- eval.py --folds

@pytest.mark.parametrize("count", [3, 5, 10])
def test_folds_test_every_slide_once_and_keep_patients_whole(place, count):
    """Forty patients of three classes with one to four slides each."""
    rng = np.random.default_rng(count)
    rows = [f"s{i}_{k},{'ABC'[i % 3]},p{i}" for i in range(40) for k in range(rng.integers(1, 5))]
    slides_named(place / "s", [row.split(",")[0] for row in rows])
    write_table(place / "s/labels.csv", "slide,label,patient", rows)
    found = find_folder("s")
    folder = draw_folds(found, count, seed=1)
    tested = []
    validated = []
    for number, file in fold_files(folder).items():
        fold = published_split(found, file)
        patients = {split: {fold.labels[name]["patient"] for name in fold.split(split)} for split in PARTS}
        labels = {split: {fold.labels[name]["label"] for name in fold.split(split)} for split in PARTS}
        assert not any(shared_patients(fold).values())
        assert sum(map(len, patients.values())) == 40 and len(fold.labels) == len(rows)
        assert set(map(frozenset, labels.values())) == {frozenset("ABC")}
        tested += fold.split("test")
        validated += fold.split("val")
    assert sorted(tested) == sorted(validated) == sorted(found.labels) and number == count - 1
    before = {path: path.read_text() for path in folder.iterdir()}
    assert draw_folds(found, count, seed=1) == folder  # drawn once
    other = draw_folds(found, count, seed=2)
    assert any((other / path.name).read_text() != text for path, text in before.items())
    shutil.rmtree(folder)
    draw_folds(found, count, seed=1)
    assert before == {path: path.read_text() for path in folder.iterdir()}


def test_eval_folds_end_to_end(place, folder, capsys):
    """Eight slides, three folds: the mean, the sd and each fold's values from the predictions, by hand."""
    run = untrained_run(place / "runs/foreign", data="elsewhere")
    argv = [*EVAL, "--checkpoint", str(run), "--compare", "random"]
    refused(capsys, eval_py.main, [*argv, "--folds", "3", "--export", "clam"], "--export", "--folds")
    assert eval_py.main([*argv, "--folds", "3"]) == 0
    out = capsys.readouterr().out
    results = run / "on_tiny_set"
    rows = rows_of(results / "folds.csv")
    predictions = rows_of(results / "folds_predictions.csv")
    assert [(row["network"], row["fold"]) for row in rows] == [
        (name, k) for name in ("random start", "DiRL") for k in "012"]
    assert f"warning: {min(int(row['train']) for row in rows)} training slides" in out
    assert not (results / "results.csv").exists() and not (results / "slides.csv").exists()
    of_network = [row for row in predictions if row["network"] == "DiRL"]
    assert sorted(row["slide"] for row in of_network) == sorted(
        f"{label}_{i}" for label in ("glands", "nests") for i in range(4))
    for row in rows[3:]:
        tested = [p for p in of_network if p["fold"] == row["fold"]]
        assert sum(int(row[split]) for split in PARTS) == 8 and len(tested) == int(row["test"])
        truth = np.array([p["label"] == "nests" for p in tested])
        margin = np.array([float(p["score nests"]) - float(p["score glands"]) for p in tested])
        assert float(row["accuracy"]) == pytest.approx(((margin > 0) == truth).mean(), abs=1e-4)
        assert float(row["auc"]) == pytest.approx(roc_auc_score(truth, margin), abs=1e-4)
        f1 = f1_score(truth, margin > 0, average="macro", zero_division=0)
        assert float(row["macro_f1"]) == pytest.approx(f1, abs=1e-4)
    mean, sd = (re.findall(rf"^{name} +(\S+) +(\S+) +(\S+)$", out, re.MULTILINE)[1]
                for name in ("mean", "sd"))
    for column, got_mean, got_sd in zip(("accuracy", "auc", "macro_f1"), mean, sd):
        values = [float(row[column]) for row in rows[3:]]
        average = sum(values) / 3
        assert float(got_mean) == pytest.approx(average, abs=2e-4)
        assert float(got_sd) == pytest.approx((sum((v - average) ** 2 for v in values) / 2) ** 0.5, abs=2e-4)

    assert eval_py.main([*argv, "--folds", "4"]) == 0  # another question: its rows are added
    assert rows_of(results / "folds.csv")[:6] == rows and len(rows_of(results / "folds.csv")) == 14
    refused(capsys, eval_py.main, [*argv, "--folds", "5"], "--folds 5", "only 4 images of glands")
    refused(capsys, eval_py.main, [*argv, "--folds", "2"], "--folds")


def test_eval_folds_refuses_an_encoder_that_saw_a_slide_and_says_what_to_do(place, folder, capsys):
    assert train.main([*FOLDER, "--method", "baseline", "--max-steps", "1"]) == 0
    refused(capsys, eval_py.main, [*EVAL, "--folds", "3"], "was trained on 6 of these 8", "another data set",
            "datasets/tiny_set/folds_3_seed0/splits_<k>.csv")
    folds = Path("datasets/tiny_set/folds_3_seed0")
    for k in range(3):  # as the line says
        flags = ["--split", str(folds / f"splits_{k}.csv")]
        argv = [*FOLDER, *flags, "--method", "baseline", "--max-steps", "1", "--run", f"runs/fold_{k}"]
        assert train.main(argv) == 0
        assert eval_py.main([*EVAL, *flags, "--checkpoint", f"runs/fold_{k}"]) == 0
    capsys.readouterr()
    assert study.main(["folds", "--data", "tiny set", "--splits", str(folds), "--epochs", "2", "--device",
                       "cpu", "--checkpoint", "runs/fold_{fold}"]) == 0
    assert {row["test slides seen in pre-training"] for row in rows_of(Path("runs/folds.csv"))} == {"0"}
