"""Evaluation: patches, measures, exports for other MIL code."""
import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score
from synthetic import one_line

import dirl
import eval as eval_py
from common import classify, measures
from common.encoders import in_batches, normalize, random_encoder, represent
from common.files import save_tensors
from common.measures import auc, bootstrap, macro_f1
from data import find_data
from wsi.prepare import load_crops

CPU = ["--device", "cpu", "--workers", "1"]
TINY = [*CPU, "--folds", "2", "--epochs", "1", "--batch", "4"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test runs in a folder of its own; the bootstrap draws a few times only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measures, "DRAWS", 50)


def patch(path, label, seed, size=224):
    """A noisy image that is redder the higher its label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 60, (size, size, 3)) + [60 * label, 60, 60]
    Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(path)


def run_folder(name="runs/tiny_vit_t_dirl", seed=0):
    """A run with an encoder.pt that was never trained."""
    save_tensors(Path(name) / "encoder.pt", {
        "encoder": random_encoder("vit_t", seed).state_dict(), "arch": "vit_t", "method": "dirl", "data": "tiny",
        "mpp": 2.0, "step": 0, "trained_on": {"data": "tiny", "images": {}, "patients": []}})
    return Path(name)


def make_folder(root="given", per_class=8, groups=True):
    """A folder of two classes: three quarters train, the rest test, two images a source tile."""
    lines = ["image,label,split" + (",source_tile" if groups else "")]
    for i in range(2 * per_class):
        label, split = i % 2, "train" if i < 1.5 * per_class else "test"
        patch(Path(root, f"im/{i}.png"), 2 * label, i)
        lines.append(f"im/{i}.png,{'ab'[label]},{split}" + (f",tile{label}_{i // 4}" if groups else ""))
    Path(root, "labels.csv").write_text("\n".join(lines))


def make_mhist(lines=()):
    head = "Image Name,Majority Vote Label,Number of Annotators who Selected SSA (Out of 7),Partition"
    rows = []
    for i in range(10):
        patch(Path(f"datasets/mhist/images/MHIST_{i}.png"), i % 2, i)
        rows.append(f"MHIST_{i}.png,{('HP', 'SSA')[i % 2]},{(0, 7)[i % 2]},{'test' if i >= 6 else 'train'}")
    Path("datasets/mhist/annotations.csv").write_text("\n".join([head, *rows, *lines]))


def make_chaoyang():
    for part, count in (("train", 8), ("test", 4)):
        entries = [{"name": f"{part}/{i}.JPG", "label": i % 4} for i in range(count)]
        for i, entry in enumerate(entries):
            patch(Path("datasets/chaoyang", entry["name"]), i % 4, i, size=512)
        Path(f"datasets/chaoyang/{part}.json").write_text(json.dumps(entries))


# ---------------------------------------------------------------- patches: settings, layouts, folds

def test_settings_are_the_papers():
    paper = {"mhist": (3e-4, 1e-2, 128, 40, [20, 30]), "chaoyang": (1e-4, 1e-2, 128, 45, [20, 30, 40])}
    for data, want in (*paper.items(), ("some/folder", paper["mhist"])):
        args = eval_py.patches_arguments(["--data", data, *CPU])
        assert (args.lr, args.weight_decay, args.batch, args.epochs, args.milestones) == want and args.folds == 5
    args = eval_py.patches_arguments(["--data", "chaoyang", "--lr", "0.5", "--milestones", "3", "--epochs", "4", *CPU])
    assert (args.lr, args.milestones, args.epochs, args.batch) == (0.5, [3], 4, 128)


def test_layouts():
    make_mhist()
    found = find_data("mhist")
    assert found.classes == ["HP", "SSA"] and [row["label"] for row in found.labels.values()] == ["HP", "SSA"] * 5
    assert [row["split"] for row in found.labels.values()] == ["train"] * 6 + ["test"] * 4
    make_chaoyang()
    found = find_data("chaoyang")
    assert found.classes == ["normal", "serrated", "adenocarcinoma", "adenoma"]
    assert [row["label"] for row in found.labels.values()] == found.classes * 3 and len(found.split("test")) == 4
    paths = list(found.images.values())
    images, good, failed = load_crops(paths, 2)
    assert images.shape == (12, 3, 224, 224) and good == list(range(12)) and failed == []  # 512 px to 224
    whole = np.asarray(Image.open(paths[3]).resize((224, 224), Image.BICUBIC))
    assert np.array_equal(images[3].permute(1, 2, 0).numpy(), whole)
    make_folder()
    found = find_data("given")
    assert found.classes == ["a", "b"] and len(found.split("train")) == 12
    patients = [found.labels[f"im/{i}.png"]["patient"] for i in (0, 1, 2)]
    assert patients == ["tile0_0", "tile1_0", "tile0_0"]


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


def replace(path, old, new):
    Path(path).write_text(Path(path).read_text().replace(old, new))


MHIST, CHAOYANG, LABELS = "datasets/mhist/annotations.csv", "datasets/chaoyang/train.json", "given/labels.csv"


@pytest.mark.parametrize("data, spoil, says", [
    ("mhist", None, "datasets/mhist/ is not there"), ("nowhere", None, "nowhere"),
    ("mhist", lambda: Path(MHIST).unlink(), "annotations.csv"),
    ("mhist", lambda: Path("datasets/mhist/images/MHIST_3.png").unlink(), "no file of 'MHIST_3.png'"),
    ("mhist", lambda: make_mhist(["x.png,TA,1,train"]), "label 'TA' of x.png"),
    ("mhist", lambda: make_mhist(["x.png,HP,1,maybe"]), "Partition 'maybe'"),
    ("mhist", lambda: make_mhist(["MHIST_1.png,SSA,0,train"]), "names 'MHIST_1.png' a second time"),
    ("mhist", lambda: Path(MHIST).write_text("Image Name,Label\nMHIST_1.png,HP\n"), "Partition"),
    ("chaoyang", lambda: Path("datasets/chaoyang/test.json").unlink(), "test.json"),
    ("chaoyang", lambda: Path(CHAOYANG).write_text("[{"), "train.json: cannot be read as JSON"),
    ("chaoyang", lambda: Path(CHAOYANG).write_text('["a"]'), "train.json: entry 0"),
    ("chaoyang", lambda: replace(CHAOYANG, '"label": 3', '"label": 7'), "label 7"),
    ("given", lambda: Path(LABELS).unlink(), "is not there"),
    ("given", lambda: Path("given/im/2.png").unlink(), "no file of 'im/2.png'"),
    ("given", lambda: replace(LABELS, "im/2.png", "../x.png"), "outside the folder"),
    ("given", lambda: replace(LABELS, "b,test", "b,train"), "no test image of b")])
def test_bad_patches_are_reported_in_one_line(capsys, data, spoil, says):
    if spoil:
        {"mhist": make_mhist, "chaoyang": make_chaoyang, "given": lambda: make_folder(groups=False)}[data]()
        spoil()
    assert eval_py.main(["patches", *CPU, "--encoder", "pixels", "--data", data]) == 2
    one_line(capsys, says)


@pytest.mark.parametrize("argv", [["--folds", "20"], ["--folds", "1"], ["--lr", "-1"], ["--batch", "0"],
                                  ["--device", "gpu"], ["--encoder", "checkpoint"], ["--checkpoint", "gone.pt"],
                                  ["--checkpoint", "text.pt"], ["--checkpoint", "old.pt"]])
def test_bad_flags_are_reported_in_one_line(capsys, argv):
    make_folder(groups=False)
    Path("text.pt").write_text("no encoder")
    save_tensors("old.pt", {"encoder": {}, "arch": "vit_t"})  # does not say what it was trained on
    extra = [] if argv[0] in ("--encoder", "--checkpoint") else ["--encoder", "pixels"]
    assert eval_py.main(["patches", *CPU, "--data", "given", *extra, *argv]) == 2
    one_line(capsys, "no run in runs/" if argv[0] == "--encoder" else argv[1] if ".pt" in argv[1] else argv[0])


def test_an_encoder_that_saw_a_test_image_is_refused(capsys):
    make_folder()
    found = find_data("given")
    path = run_folder() / "encoder.pt"
    about = torch.load(path, weights_only=True)
    test = found.split("test")
    save_tensors(path, about | {"trained_on": {"data": "given", "images": {test[0]: 1}, "patients": []}})
    assert eval_py.main(["patches", "--data", "given", "--linear", *TINY]) == 2
    one_line(capsys, f"{path}: was trained on 1 of these 4 test images", test[0])


# ---------------------------------------------------------------- patches: training

def test_linear_mode_end_to_end_leaves_the_encoder_as_it_is(capsys):
    make_folder()
    run, frozen, found = run_folder(), random_encoder("vit_t", 0), find_data("given")
    images, _, _ = load_crops(list(found.images.values()), 1)
    with torch.no_grad():
        want = torch.stack([frozen(normalize(x[None].float() / 255))[0].mean(0) for x in images])
    got = in_batches(lambda x: represent(frozen, x), images, 5)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    before, labels = got.clone(), np.array([found.classes.index(row["label"]) for row in found.labels.values()])
    predict, loss, kept = classify.fit_linear(got.numpy(), labels, np.arange(8), np.arange(8, 12))
    assert torch.equal(got, before) and kept.startswith("C ") and predict(got.numpy()).shape == (16, 2) and loss > 0

    argv = ["patches", "--data", "given", "--linear", *TINY]
    assert eval_py.main(argv) == 0  # the checkpoint is the newest run
    out = capsys.readouterr().out
    assert "draws of 2 test groups" in out and f"Wrote {run}/patches.csv" in out
    table, scores = (list(csv.DictReader(open(run / name))) for name in ("patches.csv", "patches_predictions.csv"))
    assert [row["fold"] for row in table] == ["1", "2"] and {row["training"] for row in table} == {"linear"}
    assert table[0]["encoder"] == run.name and float(table[0]["accuracy"]) == 1  # red or not
    assert len(scores) == 4 and abs(float(scores[0]["score a"]) + float(scores[0]["score b"]) - 1) < 1e-3
    first = [(run / name).read_bytes() for name in ("patches.csv", "patches_predictions.csv")]
    assert eval_py.main(argv) == 0
    assert first == [(run / name).read_bytes() for name in ("patches.csv", "patches_predictions.csv")]


def test_baselines_stand_in_the_same_table():
    make_mhist()
    run = run_folder()
    argv = ["patches", "--linear", *TINY, "--checkpoint", str(run), "--encoder", "checkpoint", "random", "pixels"]
    assert eval_py.main(argv) == 0
    table = list(csv.DictReader(open(run / "patches.csv")))
    assert [row["encoder"] for row in table] == [run.name] * 2 + ["random vit_t"] * 2 + ["pixels"] * 2
    assert float(table[-1]["accuracy"]) == 1
    assert table[0]["val_loss"] == table[2]["val_loss"]  # the run's encoder is the random one of the same seed
    make_chaoyang()
    assert eval_py.main(["patches", "--data", "chaoyang", *TINY, "--checkpoint", str(run), "--encoder", "pixels"]) == 0
    table = list(csv.DictReader(open(run / "patches.csv")))
    assert [row["data"] for row in table] == ["mhist"] * 6 + ["chaoyang"] * 2  # the other data set's rows stay
    rows = list(csv.DictReader(open(run / "patches_predictions.csv")))
    assert rows[0]["score SSA"] and not rows[0]["score normal"] and rows[-1]["score adenoma"]
    assert eval_py.main(["patches", *TINY, "--encoder", "pixels"]) == 0  # no checkpoint: a folder of its own
    assert Path("runs/mhist_pixels/patches.csv").is_file()


def test_pixel_statistics_by_hand():
    image = torch.zeros(1, 3, 10, 10, dtype=torch.uint8)
    image[0, 0] = torch.arange(100).view(10, 10)
    image[0, 2] = 7
    got = classify.pixel_statistics(image)
    assert got.shape == (1, 21)
    np.testing.assert_allclose(got[0, :6], [49.5, 0, 7, np.arange(100).std(), 0, 0], rtol=1e-5)
    np.testing.assert_allclose(got[0, 6::3], [5, 25, 50, 74, 94], atol=1)


def test_fine_tuning_end_to_end_same_seed_same_result(capsys):
    make_mhist()
    Path("datasets/mhist/images/MHIST_9.png").write_bytes(b"broken")
    argv, run = ["patches", "--encoder", "random", *TINY, "--lr", "1e-4"], Path("runs/mhist_random")
    assert eval_py.main(argv) == 1  # the broken image is skipped, and reported
    out = capsys.readouterr().out
    assert "MHIST_9.png: cannot be read" in out and "1 files were skipped" in out and "epoch 1 of 1" in out
    names = ("patches.csv", "patches_predictions.csv")
    first = [(run / name).read_bytes() for name in names]
    assert len(list(csv.DictReader(open(run / names[1])))) == 3
    assert eval_py.main(argv) == 1
    assert first == [(run / name).read_bytes() for name in names]


def test_fine_tuning_trains_everything_and_keeps_the_best_epoch():
    encoder = dirl.VisionTransformer(64, 2, 2, img_size=32)
    start = {k: v.clone() for k, v in encoder.state_dict().items()}
    labels = np.arange(24) % 2
    images = (torch.randint(0, 60, (24, 3, 32, 32)) + torch.tensor(labels).view(-1, 1, 1, 1) * 120).to(torch.uint8)
    args = SimpleNamespace(device="cpu", lr=1e-3, weight_decay=1e-2, batch=8, epochs=6, milestones=[2, 4], bf16=False)

    def run(seed=1, **changed):
        settings = SimpleNamespace(**(vars(args) | changed))
        return classify.fine_tune(encoder, images, labels, np.arange(16), np.arange(16, 24), 2, settings, seed)
    predict, loss, kept = run()
    scores = predict(images[16:])
    assert all(torch.equal(v, start[k]) for k, v in encoder.state_dict().items())  # the given one is not touched
    assert loss == pytest.approx(F.nll_loss(torch.tensor(scores).log(), torch.tensor(labels[16:])).item(), rel=1e-4)
    assert (scores.argmax(1) == labels[16:]).all() and kept.endswith("of 6")
    np.testing.assert_array_equal(run()[0](images[16:]), scores)
    assert not np.array_equal(run(seed=2)[0](images[16:]), scores)
    _, still, kept = run(lr=0.0)
    assert kept == "epoch 1 of 6" and still > loss  # later epochs are no better: the first is kept
    with pytest.raises(FloatingPointError, match="--lr"):
        run(lr=1e30)


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


def test_auc_and_f1_of_hand_made_cases():
    scores = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]])
    assert auc(np.array([0, 1, 0, 1]), scores) == 0.75  # 3 of 4 pairs are in order
    truth = np.array([0, 1, 2, 2])
    scores = np.array([[0.8, 0.1, 0.1], [0.5, 0.4, 0.1], [0.1, 0.7, 0.2], [0.0, 0.3, 0.7]])
    # class 0: 3 of 3 pairs in order; class 1: 0.4 over 0.1 and 0.3, not 0.7, 2 of 3; class 2: 4 of 4
    assert auc(truth, scores) == pytest.approx((1 + 2 / 3 + 1) / 3)
    # said: 0, 0, 1, 2. F1: 2 / 3, 0, 2 / 3
    assert macro_f1(truth, scores) == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)


def test_bootstrap_draws_groups_and_repeats_with_its_seed(monkeypatch):
    monkeypatch.setattr(measures, "DRAWS", 200)
    rng = np.random.default_rng(0)
    truth = np.arange(200) % 2
    right = rng.random(200) < 0.8
    scores = np.stack([1 - (truth == right), truth == right], 1).astype(float)
    alone = bootstrap(truth, scores, np.arange(200))
    low, high = alone[0]
    p = right.mean()
    binomial = 2 * 1.96 * (p * (1 - p) / 200) ** 0.5
    assert low < p < high and high - low == pytest.approx(binomial, rel=0.25)
    assert np.array_equal(alone, bootstrap(truth, scores, np.arange(200)))
    copies = np.arange(200) // 2 % 10  # ten groups of twenty
    worse = np.where(copies < 8, truth, 1 - truth)  # two groups are wrong throughout
    scores = np.stack([1 - worse, worse], 1).astype(float)
    wide, narrow = (np.ptp(bootstrap(truth, scores, g)[0]) for g in (copies, np.arange(200)))
    assert wide > 2 * narrow


# ---------------------------------------------------------------- slides: exports

def slide_set(root="slides set"):
    """Two classes of four small plain images as slides, 1.0 um/px, one tile each at 2.0."""
    lines = ["slide,label,split"]
    Path(root, "slides").mkdir(parents=True)
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 50, (448, 448, 3)) + [150, 60 + 40 * (i % 2), 150]
        Image.fromarray(noise.astype(np.uint8)).save(Path(root, f"slides/s{i}.png"))
        lines.append(f"s{i},{('IDC', 'ILC / other')[i % 2]},{('train', 'train', 'val', 'test')[i // 2]}")
    Path(root, "labels.csv").write_text("\n".join(lines))
    return root


def test_exports_load_back_equal_and_are_made_once(capsys):
    run = run_folder()
    argv = ["slides", "--data", slide_set(), "--mpp", "2", "--slide-mpp", "1", *CPU, "--repeats", "2",
            "--epochs", "3", "--class-weights", "--overlays", "1", "--checkpoint", str(run)]
    assert eval_py.main([*argv, "--export", "clam", "csv"]) == 0
    out = capsys.readouterr().out
    assert "slide macro F1" in out and "clam/, csv/" in out
    assert list(csv.DictReader(open(run / "slides.csv")))[1].keys() == {"seed", "accuracy", "auc", "macro_f1"}
    index = list(csv.reader(open(run / "csv/slides_set/slides_set.csv")))
    assert index[0] == ["path", "label"] and index[2] == ["datasets/slides_set/ILC_other/s1.csv", "1"] and len(index) == 9
    for i in range(8):
        with np.load(run / f"features/s{i}.npz", allow_pickle=False) as file:
            features, coords = file["features"], file["coords"]
        tensor = torch.load(run / f"clam/pt_files/s{i}.pt", weights_only=True)
        assert tensor.dtype == torch.float32 and np.array_equal(tensor.numpy(), features)
        rows = np.loadtxt(run / "csv" / index[i + 1][0].removeprefix("datasets/"), delimiter=",", skiprows=1, ndmin=2)
        assert np.array_equal(rows.astype(np.float32), features)
    try:
        import h5py
    except ImportError:
        assert "pip install h5py" in out
    else:
        with h5py.File(run / "clam/h5_files/s7.h5") as file:
            assert np.array_equal(file["features"][:], features) and np.array_equal(file["coords"][:], coords)

    made = {path: path.stat().st_mtime_ns for kind in ("clam/pt_files", "csv/slides_set/IDC")
            for path in (run / kind).iterdir()}
    assert eval_py.main([*argv, "--export", "clam", "csv"]) == 0
    assert all(path.stat().st_mtime_ns == written for path, written in made.items())  # not made twice
    run_folder(seed=1)  # another encoder
    assert eval_py.main([*argv, "--export", "clam"]) == 0
    assert not torch.equal(torch.load(run / "clam/pt_files/s7.pt", weights_only=True), tensor)
    index = run / "csv/slides_set/IDC/s0.csv"
    assert index.stat().st_mtime_ns == made[index]  # not asked for


@pytest.mark.parametrize("argv, labels, says", [
    (["tokens"], None, "neither slides nor patches"), (["--export", "csv"], "", "--export csv"),
    ([], "s0,A,train\ns1,A,test\ns2,B,train\ns3,A,val\n", "no usable test slide of B"),
    ([], "s0,A,train\ns1,A,test\ns2,B,test\ns3,A,val\n", "no usable train slide of B")])
def test_bad_slide_input_is_reported_in_one_line(capsys, argv, labels, says):
    run, root = run_folder(), Path("s")
    (root / "slides").mkdir(parents=True)
    for i in range(4):
        (root / "slides" / f"s{i}.png").write_bytes(b"never read")
    if labels:
        (root / "labels.csv").write_text("slide,label,split\n" + labels)
    assert eval_py.main([*argv, "--data", "s", "--mpp", "2", *CPU, "--checkpoint", str(run)]) == 2
    one_line(capsys, says)
