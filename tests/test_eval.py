"""Evaluation: patches, measures, exports for other MIL code."""
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from synthetic import (
    arrays_of,
    make_chaoyang,
    make_mhist,
    patch,
    refused,
    replace,
    rows_of,
    times,
    untrained_run,
    write,
    write_table,
)
from tiny_flags import CPU, SET

import dirl
import eval as eval_py
from common import classify, export, metrics
from common.encoders import MEAN, STD, random_encoder, represent
from common.files import save_tensors
from common.metrics import area_under, auc, bootstrap, macro_f1
from wsi.cache import prepare_cells, ready_cells
from wsi.cells import read_cells
from wsi.datasets import evaluated_mpp
from wsi.splits import find_data

pytestmark = pytest.mark.usefixtures("alone", "blank_figures")

STATS = ((0.7, 0.5, 0.7), (0.2, 0.2, 0.2))  # of an encoder's pixels; not ImageNet's
TINY = [*CPU, "--folds", "2", "--epochs", "1", "--batch", "4"]


def run_folder(name="runs/tiny_vit_t4_dirl", seed=0):
    """A run with an encoder.pt that was never trained, normalized by other statistics than ImageNet's."""
    return untrained_run(name, data="tiny_set", seed=seed, stats=STATS)


def make_folder(root="given", per_class=8):
    """A folder of two classes: three quarters train, the rest test, two images a group."""
    rows = []
    for i in range(2 * per_class):
        label, split = i % 2, "train" if i < 1.5 * per_class else "test"
        patch(Path(root, f"im/{i}.png"), 2 * label, i)
        rows.append(f"im/{i}.png,{'ab'[label]},{split},group{label}_{i // 4}")
    write_table(Path(root, "labels.csv"), "image,label,split,group", rows)


# ---------------------------------------------------------------- patches: settings, layouts, folds

def test_flags_replace_the_papers_settings():
    changed = ["--lr", "0.5", "--milestones", "3", "--epochs", "4"]
    args = eval_py.patches_arguments(["--data", "chaoyang", *changed, *CPU])
    assert (args.lr, args.milestones, args.epochs, args.batch) == (0.5, [3], 4, 128)


def test_layouts():
    make_mhist()
    found = find_data("mhist")
    assert found.classes == ["HP", "SSA"]
    assert [row["label"] for row in found.labels.values()] == ["HP", "SSA"] * 5
    assert [row["split"] for row in found.labels.values()] == ["train"] * 6 + ["test"] * 4
    make_chaoyang()
    found = find_data("chaoyang")
    assert found.classes == ["normal", "serrated", "adenocarcinoma", "adenoma"]
    assert [row["label"] for row in found.labels.values()] == found.classes * 3
    assert len(found.split("test")) == 4
    make_folder()
    found = find_data("given")
    assert found.classes == ["a", "b"] and len(found.split("train")) == 12
    patients = [found.labels[f"im/{i}.png"]["patient"] for i in (0, 1, 2)]
    assert patients == ["group0_0", "group1_0", "group0_0"]


def test_folds_keep_groups_whole_and_are_stratified():
    rng = np.random.default_rng(0)
    of_group = rng.integers(0, 3, 60)  # the class of each group
    groups = rng.integers(0, 60, 600)
    labels = of_group[groups]
    names = np.array([f"g{g}" for g in groups])
    folds = classify.make_folds(labels, names, ["a", "b", "c"], 5, seed=3)
    assert sorted(np.concatenate([val for _, val in folds])) == list(range(600))
    for train, val in folds:
        assert not set(names[train]) & set(names[val]) and len(train) + len(val) == 600
        np.testing.assert_allclose(np.bincount(labels[val]) / len(val), np.bincount(labels) / 600, atol=0.08)
    again = classify.make_folds(labels, names, ["a", "b", "c"], 5, seed=3)
    other = classify.make_folds(labels, names, ["a", "b", "c"], 5, seed=4)
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(folds, again))
    assert not all(np.array_equal(a[1], b[1]) for a, b in zip(folds, other))
    alone = np.arange(600).astype(str)  # no groups: every class to within one image
    for _, val in classify.make_folds(labels, alone, ["a", "b", "c"], 5, seed=0):
        assert (abs(np.bincount(labels[val]) - np.bincount(labels) / 5) <= 1).all()


MHIST, CHAOYANG = Path("datasets/mhist/annotations.csv"), Path("datasets/chaoyang/train.json")
LABELS = Path("given/labels.csv")


def test_no_worker_process_is_taken_as_in_train(capsys):
    make_folder()
    flags = ["--device", "cpu", "--workers", "0"]
    assert eval_py.main(["patches", *flags, "--data", "given", "--encoder", "pixels", "--folds", "2"]) == 0
    assert eval_py.slides_arguments(flags).workers == 0
    refused(capsys, eval_py.main, ["--device", "cpu", "--workers", "-1"], "--workers: -1")


@pytest.mark.parametrize("data, spoil, says", [
    ("mhist", lambda: make_mhist(["x.png,TA,1,train"]), "label 'TA' of x.png"),
    ("mhist", lambda: make_mhist(["x.png,HP,1,maybe"]), "Partition 'maybe'"),
    ("mhist", lambda: write(MHIST, "Image Name,Label\nMHIST_1.png,HP\n"), "Partition"),
    ("chaoyang", lambda: write(CHAOYANG, "[{"), "train.json: cannot be read (JSONDecodeError"),
    ("chaoyang", lambda: write(CHAOYANG, ["a"]), "train.json: cannot be read (TypeError"),
    ("chaoyang", lambda: replace(CHAOYANG, ('"label": 3', '"label": 7')), "train.json: cannot be read"),
    ("given", LABELS.unlink, "labels.csv: is missing"),
    ("given", lambda: replace(LABELS, ("b,test", "b,train")), "no test image of b")])
def test_bad_patches_are_reported_in_one_line(capsys, data, spoil, says):
    {"mhist": make_mhist, "chaoyang": make_chaoyang, "given": make_folder}[data]()
    spoil()
    refused(capsys, eval_py.main, ["patches", *CPU, "--encoder", "pixels", "--data", data], says)


@pytest.mark.parametrize("argv, says", [
    (["--folds", "20"], "--folds"), (["--folds", "1"], "--folds"), (["--batch", "0"], "--batch"),
    (["--device", "gpu"], "--device"), (["--encoder", "checkpoint"], "no run in runs/"),
    (["--checkpoint", "gone.pt"], "gone.pt"), (["--checkpoint", "text.pt"], "text.pt"),
    (["--checkpoint", "old.pt"], "old.pt")])
def test_bad_flags_are_reported_in_one_line(capsys, argv, says):
    make_folder()
    write(Path("text.pt"), "no encoder")
    save_tensors("old.pt", {"encoder": {}, "arch": "vit_t"})  # does not say what it was trained on
    encoder = [] if says.endswith(".pt") else ["--encoder", "pixels"]
    refused(capsys, eval_py.main, ["patches", *CPU, "--data", "given", *encoder, *argv], says)


@pytest.mark.parametrize("arch", [[], ["--arch", "vit_t4"]])
def test_an_encoder_that_saw_a_test_image_is_refused(capsys, arch):
    make_folder()
    found = find_data("given")
    path = run_folder() / "encoder.pt"
    about = torch.load(path, weights_only=True)
    test = found.split("test")
    save_tensors(path, about | {"trained_on": {"data": "given", "images": {test[0]: 1}, "patients": []}})
    argv = ["patches", "--data", "given", "--linear", *TINY, "--checkpoint", str(path), *arch]
    says = f"{path}: was trained on 2 of these 4 test images"  # the image, and the other of its group
    refused(capsys, eval_py.main, argv, says, test[0])


# ---------------------------------------------------------------- patches: training

def test_linear_mode_and_baselines_are_in_the_same_table(capsys):
    make_folder()
    run, argv = run_folder(seed=1), ["patches", *TINY, "--seed", "1", "--encoder"]
    assert eval_py.main([*argv, "checkpoint", "random", "pixels", "--linear", "--data", "given"]) == 0
    out = capsys.readouterr().out  # the checkpoint is the newest run
    assert "draws of 2 test groups" in out and f"Wrote {run}/patches.csv" in out
    table = rows_of(run / "patches.csv")
    assert [row["encoder"] for row in table] == [run.name] * 2 + ["random vit_t4"] * 2 + ["pixels"] * 2
    assert [row["fold"] for row in table] == ["1", "2"] * 3
    assert {row["training"] for row in table} == {"linear"}
    assert float(table[0]["accuracy"]) == float(table[-1]["accuracy"]) == 1  # red or not
    assert table[0]["val_loss"] == table[2]["val_loss"]  # the run has the random encoder of the same seed
    assert table[0]["kept"].startswith("C ")
    scores = rows_of(run / "patches_predictions.csv")
    assert len(scores) == 4 * 3
    assert float(scores[0]["score a"]) + float(scores[0]["score b"]) == pytest.approx(1, abs=1e-3)
    make_chaoyang()
    assert eval_py.main([*argv, "pixels", "--data", "chaoyang", "--checkpoint", str(run)]) == 0
    table = rows_of(run / "patches.csv")
    assert [row["data"] for row in table] == ["given"] * 6 + ["chaoyang"] * 2  # rows are kept
    scores = rows_of(run / "patches_predictions.csv")
    assert scores[0]["score b"] and not scores[0]["score normal"] and scores[-1]["score adenoma"]
    assert eval_py.main([*argv, "pixels", "--data", "given"]) == 0  # no checkpoint: its own folder
    assert Path("runs/given_pixels/patches.csv").is_file()


def test_pixel_statistics_by_hand():
    image = torch.zeros(1, 3, 10, 10, dtype=torch.uint8)
    image[0, 0] = torch.arange(100).view(10, 10)
    image[0, 2] = 7
    got = classify.pixel_statistics(image)
    assert got.shape == (1, 21)
    np.testing.assert_allclose(got[0, :6], [49.5, 0, 7, np.arange(100).std(), 0, 0], rtol=1e-5)
    np.testing.assert_allclose(got[0, 6::3], [5, 25, 50, 74, 94], atol=1)


def test_features_are_standardized_by_all_tiles_of_the_training_slides():
    bags = {split: [(torch.randn(n, 3) + n, 0) for n in sizes]
            for split, sizes in (("train", (2, 9)), ("val", (5,)), ("test", (7,)))}
    tiles = torch.cat([features for features, _ in bags["train"]])
    got, statistics = classify.standardize(bags)
    torch.testing.assert_close(statistics, (tiles.mean(0), tiles.std(0)))
    torch.testing.assert_close(got["test"][0][0], (bags["test"][0][0] - tiles.mean(0)) / tiles.std(0))


def test_folds_are_reported_by_their_mean_their_sd_and_draws_of_groups(tmp_path, capsys):
    labels, folds = np.arange(60) % 2, np.random.default_rng(0).random((2, 40, 2))
    folds[0, :20] = np.eye(2)[labels[20: 40]]
    path, groups, test = tmp_path / "patches.csv", np.repeat(list("abcdef"), 10), np.arange(20, 60)
    patches = classify.Patches(labels, None, labels, groups, ["x", "y"], [([0], [1])] * 2, test)
    for training in ("linear", "fine-tuned"):
        key = {"data": "d", "encoder": "e", "training": training}
        mean = classify.report_folds([(scores, 0.5, "C 1") for scores in folds], patches, key, path, 0)
    np.testing.assert_allclose(mean, folds.mean(0))
    accuracies = (folds.argmax(2) == labels[test]).mean(1)
    (low, high), _ = bootstrap(labels[test], mean, groups[test])
    out = capsys.readouterr().out
    assert f" {accuracies.mean():.4f} ± {accuracies.std(ddof=1):.4f} " in out
    assert f" ({low:.4f} to {high:.4f}) " in out and len(rows_of(path)) == 4


def test_fine_tuning_end_to_end_same_seed_same_result(capsys):
    make_mhist()
    write(Path("datasets/mhist/images/MHIST_7.png"), "broken")
    argv = ["patches", "--encoder", "random", "--arch", "vit_t4", *TINY, "--lr", "1e-4"]
    run = Path("runs/mhist_random")
    assert eval_py.main(argv) == 1  # the broken image is skipped, and reported
    out = capsys.readouterr().out
    assert "MHIST_7.png: cannot be read" in out and "1 files were skipped" in out and "epoch 1 of 1" in out
    predicted = [(row["image"], row["label"]) for row in rows_of(run / "patches_predictions.csv")]
    assert predicted == [("MHIST_6.png", "HP"), ("MHIST_8.png", "HP"), ("MHIST_9.png", "SSA")]
    first = {path: path.read_bytes() for path in run.glob("*.csv")}
    assert eval_py.main(argv) == 1
    assert len(first) == 2 and all(path.read_bytes() == content for path, content in first.items())
    assert not list(run.glob("patches_folds/**/*.npz"))


def test_a_stopped_fine_tuning_resumes_after_its_last_fold_and_replaces_no_result(monkeypatch, capsys):
    make_mhist()
    argv = ["patches", "--encoder", "random", "--arch", "vit_t4", *TINY, "--lr", "1e-4"]
    run = Path("runs/mhist_random")
    assert eval_py.main(argv) == 0
    first = {path: path.read_bytes() for path in run.glob("*.csv")}
    fine_tune, seeds = classify.fine_tune, []

    def stopped(*args):
        seeds.append(args[7])
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return fine_tune(*args)
    monkeypatch.setattr(classify, "fine_tune", stopped)
    assert eval_py.main(argv) == 130
    assert {path: path.read_bytes() for path in run.glob("*.csv")} == first
    assert eval_py.main(argv) == 0 and seeds == [1, 2, 2]  # the first fold is not trained again
    assert {path: path.read_bytes() for path in run.glob("*.csv")} == first
    assert eval_py.main([*argv, "--lr", "2e-4"]) == 0 and seeds == [1, 2, 2, 1, 2]


def test_folds_that_were_kept_count_only_for_the_same_images_weights_and_settings(tmp_path):
    settings = classify.FineTuning(1e-3, 0.5, 8, 6, [2], "cpu", False)
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    labels = np.arange(4) % 2
    patches = classify.Patches(None, images, labels, None, list("ab"), [([0], [1])], np.arange(2, 4))
    encoder = random_encoder("vit_t4", 0, MEAN, STD)
    first = classify.content_stamp(encoder, patches, settings, 0)
    assert first == classify.content_stamp(encoder, dataclasses.replace(patches), settings, 0)
    others = [(encoder, dataclasses.replace(patches, images=images + 1), settings, 0),
              (encoder, dataclasses.replace(patches, labels=np.array([0, 1, 1, 0])), settings, 0),
              (encoder, dataclasses.replace(patches, folds=[([1], [0])]), settings, 0),
              (encoder, dataclasses.replace(patches, test=np.array([3])), settings, 0),
              (encoder, patches, dataclasses.replace(settings, lr=1e-4), 0), (encoder, patches, settings, 1),
              (random_encoder("vit_t4", 1, MEAN, STD), patches, settings, 0),
              (random_encoder("vit_t4", 0, STD, STD), patches, settings, 0)]
    assert len({classify.content_stamp(*other) for other in others} | {first}) == 9


def test_fine_tuning_trains_everything_and_keeps_the_best_epoch():
    encoder = dirl.VisionTransformer(64, 2, 2, img_size=32)
    start = {k: v.clone() for k, v in encoder.state_dict().items()}
    labels = np.arange(24) % 2
    noise = torch.randint(0, 60, (24, 3, 32, 32))
    images = (noise + torch.tensor(labels).view(-1, 1, 1, 1) * 120).to(torch.uint8)
    train, val = np.arange(16), np.arange(16, 24)

    def run(seed=1, lr=1e-3):
        settings = classify.FineTuning(lr, 0.5, batch=8, epochs=6, milestones=[2, 4], device="cpu",
                                       bf16=False)
        return classify.fine_tune(encoder, images, labels, train, val, 2, settings, seed)
    predict, loss, kept = run()
    scores = predict(images[16:])
    assert all(torch.equal(v, start[k]) for k, v in encoder.state_dict().items())  # it is unchanged
    want = F.nll_loss(torch.tensor(scores).log(), torch.tensor(labels[16:])).item()
    assert loss == pytest.approx(want, rel=1e-4)
    assert (scores.argmax(1) == labels[16:]).all() and kept == "epoch 6 of 6"
    np.testing.assert_array_equal(run()[0](images[16:]), scores)
    assert not np.array_equal(run(seed=2)[0](images[16:]), scores)
    _, still, kept = run(lr=0.0)
    assert kept == "epoch 1 of 6" and still > loss  # later epochs are no better: the first is kept
    with pytest.raises(FloatingPointError, match="--lr"):
        run(lr=1e30)
    torch.manual_seed(1)  # and now by hand
    head, generator = torch.nn.Linear(64, 2), torch.Generator().manual_seed(1)
    dirl.init_weights(head)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], weight_decay=0.5)
    for epoch in range(6):
        for index in torch.randperm(16, generator=generator).split(8):
            optimizer.param_groups[0]["lr"] = 1e-3 * 0.1 ** (epoch // 2)
            optimizer.zero_grad()
            f = represent(encoder, classify.flip(images[index], generator))
            F.cross_entropy(head(f), torch.tensor(labels[index])).backward()
            optimizer.step()
    want = head(represent(encoder, images[16:])).softmax(1)
    np.testing.assert_allclose(scores, want.detach(), rtol=1e-4)


def test_flips_are_flips_and_seeded():
    x = torch.randint(0, 256, (64, 3, 4, 4), dtype=torch.uint8)
    out = classify.flip(x, torch.Generator().manual_seed(0))
    ways = ((), (-1,), (-2,), (-1, -2))
    taken = {next(dims for dims in ways if torch.equal(a, b.flip(dims))) for a, b in zip(out, x)}
    assert taken == set(ways)
    assert torch.equal(out, classify.flip(x, torch.Generator().manual_seed(0)))


# ---------------------------------------------------------------- measures

def test_auc_is_scikit_learns(rng=np.random.default_rng(0)):
    for classes in (2, 3, 5):
        truth = np.r_[np.arange(classes), rng.integers(0, classes, 80)]
        ties = rng.integers(0, 4, (len(truth), classes)) / 4
        for scores in (rng.random((len(truth), classes)), ties):
            one = roc_auc_score(truth, scores[:, 1] - scores[:, 0]) if classes == 2 else np.mean(
                [roc_auc_score(truth == c, scores[:, c]) for c in range(classes)])
            assert auc(truth, scores) == pytest.approx(one, abs=1e-12)
            of_class_1 = roc_auc_score(truth == 1, scores[:, 1])
            assert area_under(truth == 1, scores[:, 1]) == pytest.approx(of_class_1, abs=1e-12)


def test_macro_f1_by_hand():
    scores = np.array([[0.8, 0.1, 0.1], [0.5, 0.4, 0.1], [0.1, 0.7, 0.2], [0.0, 0.3, 0.7]])  # 0, 0, 1, 2
    assert macro_f1(np.array([0, 1, 2, 2]), scores) == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)


def test_bootstrap_draws_groups_and_repeats_with_its_seed(monkeypatch):
    monkeypatch.setattr(metrics, "DRAWS", 200)
    rng = np.random.default_rng(0)
    truth = np.arange(200) % 2
    right = rng.random(200) < 0.8
    scores = np.stack([1 - (truth == right), truth == right], 1).astype(float)
    alone = bootstrap(truth, scores, np.arange(200))
    low, high = alone[0]
    p = right.mean()
    binomial = 2 * 1.96 * (p * (1 - p) / 200) ** 0.5
    assert low < p < high and high - low == pytest.approx(binomial, rel=0.25)
    draws = [right[index].mean() for index in metrics.bootstrap_indices(np.arange(200))]
    assert (low, high) == pytest.approx(np.quantile(draws, (0.025, 0.975)))
    assert bootstrap(np.array([0, 1, 1]), np.eye(2)[[0, 1, 1]], np.arange(3))[1].tolist() == [1, 1]
    assert np.array_equal(alone, bootstrap(truth, scores, np.arange(200)))
    copies = np.arange(200) // 2 % 10  # ten groups of twenty
    worse = np.where(copies < 8, truth, 1 - truth)  # two groups are wrong throughout
    scores = np.stack([1 - worse, worse], 1).astype(float)
    wide, narrow = (np.ptp(bootstrap(truth, scores, g)[0]) for g in (copies, np.arange(200)))
    assert wide > 2 * narrow


# ---------------------------------------------------------------- slides: exports

def check_clam_tables(folder, names):
    """CLAM's dataset CSV has every slide; its splits have each once, in the data set's split."""
    table = rows_of(folder / "dataset_csv/tiny_set.csv")
    assert table[0] == {"case_id": "pglands0", "slide_id": "glands_0", "label": "glands"}
    assert [row["slide_id"] for row in table] == names
    split = rows_of(folder / "splits/tiny_set/splits_0.csv")
    columns = {name: [row[name] for row in split if row[name]] for name in ("train", "val", "test")}
    assert columns == {"train": ["glands_0", "glands_1", "nests_0", "nests_1"],
                       "val": ["glands_2", "nests_2"], "test": ["glands_3", "nests_3"]}
    flags = rows_of(folder / "splits/tiny_set/splits_0_bool.csv")
    assert flags[2] == {"": "glands_2", "train": "False", "val": "True", "test": "False"}


def test_exports_load_back_equal_and_are_written_once(folder, capsys):
    replace(folder / "labels.csv", (",nests,", ",ILC / other,"))
    run = run_folder()
    argv = ["slides", *SET, "--repeats", "2", "--epochs", "3", "--class-weights", "--overlays", "1",
            "--checkpoint", str(run)]
    assert eval_py.main([*argv, "--export", "clam", "csv", "geojson"]) == 0
    out = capsys.readouterr().out
    assert "slide macro F1" in out and "clam/, csv/, geojson/" in out
    assert rows_of(run / "slides.csv")[1].keys() == {"seed", "accuracy", "auc", "macro_f1"}
    index = rows_of(run / "csv/tiny_set/tiny_set.csv")
    names = [f"{label}_{i}" for label in ("glands", "nests") for i in range(4)]
    assert len(index) == 8
    assert index[5] == {"path": "datasets/tiny_set/ILC_other/nests_1.csv", "label": "0"}
    for name, row in zip(names, index):
        file = arrays_of(run / f"features/{name}.npz")
        tensor = torch.load(run / f"clam/pt_files/{name}.pt", weights_only=True)
        assert tensor.dtype == torch.float32 and np.array_equal(tensor.numpy(), file["features"])
        bag = run / "csv" / row["path"].removeprefix("datasets/")
        values = np.loadtxt(bag, np.float32, delimiter=",", skiprows=1, ndmin=2)
        assert np.array_equal(values, file["features"])
    with h5py.File(run / "clam/h5_files/nests_3.h5") as h5:
        assert all(np.array_equal(h5[name][:], file[name]) for name in ("features", "coords"))
        about = dict(h5["coords"].attrs)
    assert about["patch_level"] == 0 and about["patch_size"] == about["patch_size_level0"] == 448
    assert about["mpp"] == 2 and about["level0_width"] == 448
    check_clam_tables(run / "clam", names)
    found = find_data("tiny set", 2.0, slide_mpp=1.0)
    tiles = json.loads((run / "geojson/nests_3.geojson").read_text())["features"]
    assert tiles[0]["geometry"]["coordinates"] == [[[0, 0], [448, 0], [448, 448], [0, 448], [0, 0]]]
    assert prepare_cells(found, 1) == []
    assert eval_py.main([*argv, "--export", "geojson"]) == 0  # now with cells
    np.testing.assert_allclose(read_cells(run / "geojson/nests_3.geojson"), ready_cells(found, "nests_3"),
                               atol=0.006)

    written = times(run / "clam", "*_?.[hp]*"), times(run / "csv/tiny_set", "*_?.csv")
    assert eval_py.main([*argv, "--export", "clam", "csv"]) == 0
    assert written == (times(run / "clam", "*_?.[hp]*"), times(run / "csv/tiny_set", "*_?.csv"))  # not twice
    run_folder(seed=1)  # another encoder
    assert eval_py.main([*argv, "--export", "clam", "csv"]) == 0
    other = torch.load(run / "clam/pt_files/nests_3.pt", weights_only=True)
    with h5py.File(run / "clam/h5_files/nests_3.h5") as h5:
        assert np.array_equal(h5["features"][:], other) and not torch.equal(other, tensor)
    assert np.array_equal(np.loadtxt(bag, np.float32, delimiter=",", skiprows=1, ndmin=2), other)


@pytest.mark.parametrize("slide_mpp", [0.2525, 0.2465, 0.504, 0.499, 0.2325, 0.25, 1.0, 3.1, 20.0])
@pytest.mark.parametrize("mpp", [2.0, 1.0, 0.5])
def test_clam_and_trident_cut_our_tiles(slide_mpp, mpp):
    """By each one's own formula, written from its source; our tile is 224 px at mpp, side px at level 0."""
    info = {"side": 224 * mpp / slide_mpp, "width": 9000, "height": 7000, "slide_mpp": slide_mpp, "mpp": mpp}
    at = export.coords_attributes("s", info)

    # CLAM, dataset_h5.py: read_region(coord, patch_level, (patch_size, patch_size)).
    level_downsamples = [1.0, 4.0, 16.0]
    clam = at["patch_size"] * level_downsamples[at["patch_level"]]

    # TRIDENT, WSIPatcher: um/px are 10 / magnification, the side is patch_size times their ratio. Where an
    # attribute is missing it reads the file as CLAM's (read_coords_legacy).
    source, target = 10 / at["level0_magnification"], 10 / at["target_magnification"]
    trident = round(at["patch_size"] * (target / source))
    # TRIDENT, coords_to_h5: what patch_size_level0 means to its heat maps and slide encoders.
    level0 = at["patch_size"] * at["level0_magnification"] // at["target_magnification"]

    assert clam == trident == level0 == at["patch_size_level0"]
    assert abs(clam - info["side"]) <= 0.5 and type(at["patch_size"]) is int
    assert at["overlap"] == 0 and (at["level0_mpp"], at["mpp"]) == (slide_mpp, mpp)


@pytest.mark.parametrize("names, warned", [(["007", "12"], True), (["1.5"], True), (["007", "a12"], False)])
def test_slides_named_by_digits_are_named_at_clams_export(tmp_path, capsys, names, warned):
    info = {"side": 448.0, "width": 900, "height": 700, "slide_mpp": 1.0, "mpp": 2.0}
    for name in names:
        np.savez(tmp_path / f"{name}.npz", features=np.ones((1, 3)), coords=np.zeros((1, 2), int))
    labels = {name: {"label": "A", "patient": name, "split": "train"} for name in names}
    found = SimpleNamespace(name="d", labels=labels)
    export.export_clam(found, tmp_path, dict.fromkeys(names, info), tmp_path / "clam")
    out = capsys.readouterr().out
    assert out.count("\n") == warned and (names[0] in out and "with a letter in front" in out) == warned


@pytest.mark.parametrize("data, mpp, trained_at, evaluated, warned", [
    ("lung", None, 2.0, 2.0, False), ("lung", None, 1.0, 2.0, True), ("lung", 1.0, 1.0, 1.0, False),
    ("folder", None, 1.0, 1.0, False), ("folder", 0.5, 1.0, 0.5, False), ("mhist", None, 1.0, None, False)])
def test_an_encoder_is_evaluated_at_its_um_px_or_with_a_warning(data, mpp, trained_at, evaluated, warned,
                                                                capsys):
    assert evaluated_mpp(data, mpp, trained_at) == evaluated
    assert ("--mpp 1 takes the encoder's" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("argv, labels, says", [
    (["tokens"], None, "is not slides, predict or patches"), (["--export", "csv"], None, "--export csv"),
    ([], ["s0,A,train", "s1,A,test", "s2,B,train", "s3,A,val"], "no usable test slide of B"),
    ([], ["s0,A,train", "s1,A,test", "s2,B,test", "s3,A,val"], "no usable train slide of B")])
def test_bad_slide_input_is_reported_in_one_line(capsys, argv, labels, says):
    run = run_folder()
    for i in range(4):
        write(Path(f"s/slides/s{i}.png"), "never read")
    if labels:
        write_table(Path("s/labels.csv"), "slide,label,split", labels)
    refused(capsys, eval_py.main, [*argv, "--data", "s", "--mpp", "2", *CPU, "--checkpoint", str(run)], says)
