"""Tests of what is done with an encoder: patches, exports for other MIL code, measures, class weights."""
import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import patches
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score

import dirl
import eval as eval_py
import mil

CPU = ["--device", "cpu", "--workers", "1"]
TINY = [*CPU, "--folds", "2", "--epochs", "1", "--batch", "4"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test runs in a folder of its own; the bootstrap draws a few times only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(patches, "DRAWS", 50)
    torch.manual_seed(0)


def patch(path, label, seed, size=224):
    """A noisy image that is redder the higher its label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 60, (size, size, 3)) + [60 * label, 60, 60]
    Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(path)


def run_folder(name="runs/tiny_vit_t_dirl", seed=0):
    """A run with an encoder.pt that was never trained."""
    Path(name).mkdir(parents=True, exist_ok=True)
    encoder = patches.random_encoder("vit_t", seed)
    torch.save({"encoder": encoder.state_dict(), "arch": "vit_t", "method": "dirl", "data": "tiny", "mpp": 2.0, "step": 0},
               Path(name) / "encoder.pt")
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
    rows = [f"MHIST_{i}.png,{('HP', 'SSA')[i % 2]},{(0, 7)[i % 2]},{'test' if i >= 6 else 'train'}" for i in range(10)]
    for i in range(10):
        patch(Path(f"datasets/mhist/images/MHIST_{i}.png"), i % 2, i)
    Path("datasets/mhist/annotations.csv").write_text("\n".join([head, *rows, *lines]))


def make_chaoyang():
    for part, count in (("train", 8), ("test", 4)):
        entries = [{"name": f"{part}/{i}.JPG", "label": i % 4} for i in range(count)]
        for i, entry in enumerate(entries):
            patch(Path("datasets/chaoyang", entry["name"]), i % 4, i, size=512)
        Path(f"datasets/chaoyang/{part}.json").write_text(json.dumps(entries))


def one_line(capsys, says):
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1, error


# ---------------------------------------------------------------- patches: settings, layouts, folds

def test_settings_are_the_papers():
    paper = {"mhist": (3e-4, 1e-2, 128, 40, [20, 30]), "chaoyang": (1e-4, 1e-2, 128, 45, [20, 30, 40])}
    for data, want in (*paper.items(), ("some/folder", paper["mhist"])):
        args = patches.arguments(["--data", data, *CPU])
        assert (args.lr, args.weight_decay, args.batch, args.epochs, args.milestones) == want and args.folds == 5
    args = patches.arguments(["--data", "chaoyang", "--lr", "0.5", "--milestones", "3", "--epochs", "4", *CPU])
    assert (args.lr, args.milestones, args.epochs, args.batch) == (0.5, [3], 4, 128)


def test_layouts():
    make_mhist()
    rows, classes = patches.find_patches("mhist")
    assert classes == ["HP", "SSA"] and [row["label"] for row in rows] == [0, 1] * 5
    assert [row["part"] for row in rows] == ["train"] * 6 + ["test"] * 4
    make_chaoyang()
    rows, classes = patches.find_patches("chaoyang")
    assert classes == ["normal", "serrated", "adenocarcinoma", "adenoma"] and [row["label"] for row in rows] == [0, 1, 2, 3] * 3
    assert sum(row["part"] == "test" for row in rows) == 4
    images, kept, failed = patches.load_images(rows, 2)
    assert images.shape == (12, 3, 224, 224) and kept == rows and failed == []  # 512 px to 224
    whole = np.asarray(Image.open(rows[3]["path"]).resize((224, 224), Image.BICUBIC))
    assert np.array_equal(images[3].permute(1, 2, 0).numpy(), whole)
    make_folder()
    rows, classes = patches.find_patches("given")
    assert classes == ["a", "b"] and sum(row["part"] == "train" for row in rows) == 12
    assert rows[0]["group"] == rows[2]["group"] == "tile0_0" != rows[1]["group"]


def test_folds_keep_groups_whole_and_are_stratified():
    rng = np.random.default_rng(0)
    of_group = rng.integers(0, 3, 60)  # the class of each group
    groups = rng.integers(0, 60, 600)
    labels = of_group[groups]
    names = np.array([f"g{g}" for g in groups])
    folds = patches.make_folds(labels, names, ["a", "b", "c"], 5, seed=3)
    assert sorted(np.concatenate([val for _, val in folds])) == list(range(600))
    for train, val in folds:
        assert not set(names[train]) & set(names[val]) and len(train) + len(val) == 600
        np.testing.assert_allclose(np.bincount(labels[val]) / len(val), np.bincount(labels) / 600, atol=0.08)
    again = patches.make_folds(labels, names, ["a", "b", "c"], 5, seed=3)
    other = patches.make_folds(labels, names, ["a", "b", "c"], 5, seed=4)
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(folds, again))
    assert not all(np.array_equal(a[1], b[1]) for a, b in zip(folds, other))
    alone = np.arange(600).astype(str)  # no groups: every class to within one image
    for _, val in patches.make_folds(labels, alone, ["a", "b", "c"], 5, seed=0):
        assert (abs(np.bincount(labels[val]) - np.bincount(labels) / 5) <= 1).all()


@pytest.mark.parametrize("spoil, argv, says", [
    (None, ["--data", "mhist"], "datasets/mhist/ is not there"), (None, ["--data", "nowhere"], "nowhere"),
    ("datasets/mhist/annotations.csv", ["--data", "mhist"], "annotations.csv"),
    ("datasets/mhist/images/MHIST_3.png", ["--data", "mhist"], "MHIST_3.png is not there"),
    ("label", ["--data", "mhist"], "label 'TA' of x.png"), ("part", ["--data", "mhist"], "Partition 'maybe'"),
    ("twice", ["--data", "mhist"], "MHIST_1.png a second time"), ("column", ["--data", "mhist"], "Partition"),
    ("datasets/chaoyang/test.json", ["--data", "chaoyang"], "test.json"),
    ("json", ["--data", "chaoyang"], "train.json: cannot be read as JSON"),
    ("entry", ["--data", "chaoyang"], "train.json: entry 0"), ("number", ["--data", "chaoyang"], "label 7"),
    ("given/labels.csv", ["--data", "given"], "labels.csv: is not there"), ("given/im/2.png", ["--data", "given"], "2.png is not there"),
    ("outside", ["--data", "given"], "outside the folder"), ("slides", ["--data", "given"], "no column image"),
    ("no test", ["--data", "given"], "no test image of b"),
    ("fine", ["--data", "given", "--folds", "20"], "--folds 20"), ("fine", ["--data", "given", "--folds", "1"], "--folds"),
    ("fine", ["--data", "given", "--lr", "-1"], "--lr"), ("fine", ["--data", "given", "--batch", "0"], "--batch"),
    ("fine", ["--data", "given", "--device", "gpu"], "--device"),
    ("fine", ["--data", "given", "--encoder", "checkpoint"], "no run in runs/"),
    ("fine", ["--data", "given", "--checkpoint", "gone.pt"], "gone.pt"), ("text", ["--data", "given", "--checkpoint", "x.pt"], "x.pt")])
def test_bad_input_is_told_in_one_line(capsys, spoil, argv, says):
    if spoil and argv[1] == "mhist":
        make_mhist({"label": ["x.png,TA,1,train"], "part": ["x.png,HP,1,maybe"], "twice": ["MHIST_1.png,HP,0,train"]}.get(spoil, []))
    elif spoil and argv[1] == "chaoyang":
        make_chaoyang()
    elif spoil:
        make_folder(groups=False)
    table = Path("given/labels.csv")
    if spoil and Path(spoil).is_file():
        Path(spoil).unlink()
    elif spoil == "column":
        Path("datasets/mhist/annotations.csv").write_text("Image Name,Label\nMHIST_1.png,HP\n")
    elif spoil in ("json", "entry", "number"):
        text = {"json": "[{", "entry": '["a"]', "number": '[{"name": "train/0.JPG", "label": 7}]'}[spoil]
        Path("datasets/chaoyang/train.json").write_text(text)
    elif spoil == "outside":
        table.write_text(table.read_text() + "\n../x.png,a,train")
    elif spoil == "slides":
        table.write_text("slide,label\na,A\nb,B\n")
    elif spoil == "no test":
        table.write_text(table.read_text().replace("b,test", "b,train"))
    elif spoil == "text":
        Path("x.pt").write_text("no encoder")
    extra = [] if "--encoder" in argv or "--checkpoint" in argv else ["--encoder", "pixels"]
    assert eval_py.main(["patches", *CPU, *extra, *argv]) == 2
    one_line(capsys, says)


# ---------------------------------------------------------------- patches: training

def test_linear_mode_end_to_end_leaves_the_encoder_as_it_is(capsys):
    make_folder()
    run = run_folder()
    frozen = patches.random_encoder("vit_t", 0)
    rows, _ = patches.find_patches("given")
    images, _, _ = patches.load_images(rows, 1)
    with torch.no_grad():
        want = torch.stack([frozen(eval_py.views.normalize(x[None].float() / 255))[0].mean(0) for x in images])
    got = patches.in_batches(lambda x: patches.represent(frozen, x), images, 5)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    before = got.clone()
    predict, loss, kept = patches.fit_linear(got.numpy(), np.array([row["label"] for row in rows]), np.arange(8), np.arange(8, 12))
    assert torch.equal(got, before) and kept.startswith("C ") and predict(got.numpy()).shape == (16, 2) and loss > 0

    argv = ["patches", "--data", "given", "--linear", *TINY]
    assert eval_py.main(argv) == 0  # the checkpoint is the newest run
    out = capsys.readouterr().out
    assert "95 %, 50 draws of 2 test groups" in out and f"Wrote {run}/patches.csv" in out
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
    assert eval_py.main(["patches", "--linear", *TINY, "--checkpoint", str(run), "--encoder", "checkpoint", "random", "pixels"]) == 0
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
    got = patches.pixel_statistics(image)
    assert got.shape == (1, 21)
    np.testing.assert_allclose(got[0, :6], [49.5, 0, 7, np.arange(100).std(), 0, 0], rtol=1e-5)
    np.testing.assert_allclose(got[0, 6::3], [5, 25, 50, 74, 94], atol=1)


def test_fine_tuning_end_to_end_same_seed_same_result(capsys):
    make_mhist()
    Path("datasets/mhist/images/MHIST_9.png").write_bytes(b"broken")
    argv, run = ["patches", "--encoder", "random", *TINY, "--lr", "1e-4"], Path("runs/mhist_random")
    assert eval_py.main(argv) == 1  # the broken image is passed over, and said
    out = capsys.readouterr().out
    assert "MHIST_9.png: cannot be read" in out and "1 images were passed over" in out and "epoch 1 of 1" in out
    names = ("patches.csv", "patches_predictions.csv")
    first = [(run / name).read_bytes() for name in names]
    assert len(list(csv.DictReader(open(run / names[1])))) == 3
    assert eval_py.main(argv) == 1
    assert first == [(run / name).read_bytes() for name in names]


def test_fine_tuning_trains_everything_and_keeps_the_best_epoch():
    torch.manual_seed(0)
    encoder = dirl.VisionTransformer(64, 2, 2, img_size=32)
    start = {k: v.clone() for k, v in encoder.state_dict().items()}
    labels = np.arange(24) % 2
    images = (torch.randint(0, 60, (24, 3, 32, 32)) + torch.tensor(labels).view(-1, 1, 1, 1) * 120).to(torch.uint8)
    args = SimpleNamespace(device="cpu", lr=1e-3, weight_decay=1e-2, batch=8, epochs=6, milestones=[2, 4], bf16=False)
    run = lambda seed=1, **kw: patches.fine_tune(encoder, images, labels, np.arange(16), np.arange(16, 24), 2,
                                                 SimpleNamespace(**(vars(args) | kw)), seed)
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
    out = patches.flip(x, torch.Generator().manual_seed(0))
    kinds = [next(k for k, dims in enumerate(((), (-1,), (-2,), (-1, -2))) if torch.equal(a, b.flip(dims))) for a, b in zip(out, x)]
    assert set(kinds) == {0, 1, 2, 3}
    assert torch.equal(out, patches.flip(x, torch.Generator().manual_seed(0)))


# ---------------------------------------------------------------- measures

def test_auc_is_scikit_learns(rng=np.random.default_rng(0)):
    for classes in (2, 3, 5):
        truth = np.r_[np.arange(classes), rng.integers(0, classes, 80)]
        for scores in (rng.random((len(truth), classes)), rng.integers(0, 4, (len(truth), classes)) / 4):  # the latter with ties
            one = roc_auc_score(truth, scores[:, 1] - scores[:, 0]) if classes == 2 else np.mean(
                [roc_auc_score(truth == c, scores[:, c]) for c in range(classes)])
            assert eval_py.auc(truth, scores) == pytest.approx(one, abs=1e-12)


def test_auc_and_f1_of_hand_made_cases():
    scores = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]])
    assert eval_py.auc(np.array([0, 1, 0, 1]), scores) == 0.75  # 3 of 4 pairs are in order
    truth = np.array([0, 1, 2, 2])
    scores = np.array([[0.8, 0.1, 0.1], [0.5, 0.4, 0.1], [0.1, 0.7, 0.2], [0.0, 0.3, 0.7]])
    # class 0: 3 of 3 pairs in order; class 1: 0.4 over 0.1 and 0.3, not 0.7, 2 of 3; class 2: 4 of 4
    assert eval_py.auc(truth, scores) == pytest.approx((1 + 2 / 3 + 1) / 3)
    # said: 0, 0, 1, 2. F1: 2 / 3, 0, 2 / 3
    assert eval_py.macro_f1(truth, scores) == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)


def test_bootstrap_draws_groups_and_repeats_with_its_seed(monkeypatch):
    monkeypatch.setattr(patches, "DRAWS", 200)
    rng = np.random.default_rng(0)
    truth = np.arange(200) % 2
    right = rng.random(200) < 0.8
    scores = np.stack([1 - (truth == right), truth == right], 1).astype(float)
    alone = patches.bootstrap(truth, scores, np.arange(200))
    low, high = alone[0]
    p = right.mean()
    assert low < p < high and high - low == pytest.approx(2 * 1.96 * (p * (1 - p) / 200) ** 0.5, rel=0.25)  # the binomial's width
    assert np.array_equal(alone, patches.bootstrap(truth, scores, np.arange(200)))
    copies = np.arange(200) // 2 % 10  # ten groups of twenty
    worse = np.where(copies < 8, truth, 1 - truth)  # two groups are wrong throughout
    scores = np.stack([1 - worse, worse], 1).astype(float)
    wide, narrow = (np.ptp(patches.bootstrap(truth, scores, g)[0]) for g in (copies, np.arange(200)))
    assert wide > 2 * narrow


# ---------------------------------------------------------------- slides: class weights, exports

def test_class_weights_by_hand():
    weights = mil.class_weights([0, 0, 0, 1], 2)
    torch.testing.assert_close(weights, torch.tensor([4 / 6, 4 / 2]))
    with pytest.raises(ValueError):
        mil.class_weights([0, 0], 2)
    scores, bag = torch.tensor([[0.3, -1.0], [2.0, 0.5]]), torch.tensor([0.2, -0.4])
    s = lambda v: 1 / (1 + np.exp(-v))
    bce = -(np.log(1 - s(0.2)) + np.log(s(-0.4))) / 2, -(np.log(1 - s(2.0)) + np.log(s(0.5))) / 2
    assert mil.dsmil_loss(scores, bag, 1).item() == pytest.approx(sum(bce) / 2, rel=1e-5)
    assert mil.dsmil_loss(scores, bag, 1, weights).item() == pytest.approx(2 * sum(bce) / 2, rel=1e-5)
    bags = [(torch.randn(3, 8) + label, label) for label in (0, 0, 0, 1)]
    seen = []
    for given in (None, torch.ones(2), weights):
        torch.manual_seed(0)
        log = []
        model = mil.train_dsmil(bags, bags, 2, epochs=2, weights=given, progress=lambda *row: log.append(row))
        seen.append((log, model.instance.weight))
    assert seen[0][0] == seen[1][0] and torch.equal(seen[0][1], seen[1][1])  # weights of 1 change nothing
    assert seen[0][0] != seen[2][0]


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
    run, argv = run_folder(), ["slides", "--data", slide_set(), "--mpp", "2", "--slide-mpp", "1", *CPU, "--repeats", "2", "--epochs", "3",
                               "--class-weights", "--overlays", "1"]
    argv += ["--checkpoint", str(run)]
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

    made = {path: path.stat().st_mtime_ns for kind in ("clam/pt_files", "csv/slides_set/IDC") for path in (run / kind).iterdir()}
    assert eval_py.main([*argv, "--export", "clam", "csv"]) == 0
    assert all(path.stat().st_mtime_ns == written for path, written in made.items())  # not made twice
    run_folder(seed=1)  # another encoder
    assert eval_py.main([*argv, "--export", "clam"]) == 0
    assert not torch.equal(torch.load(run / "clam/pt_files/s7.pt", weights_only=True), tensor)
    assert (run / "csv/slides_set/IDC/s0.csv").stat().st_mtime_ns == made[run / "csv/slides_set/IDC/s0.csv"]  # not asked for


@pytest.mark.parametrize("argv, labels, says", [
    (["tokens"], None, "neither slides nor patches"), (["--export", "csv"], "", "--export csv"),
    ([], "s0,A,train\ns1,A,test\ns2,B,train\ns3,A,val\n", "no usable test slide of B"),
    ([], "s0,A,train\ns1,A,test\ns2,B,test\ns3,A,val\n", "no usable train slide of B")])
def test_bad_slide_input_is_told_in_one_line(capsys, argv, labels, says):
    run, root = run_folder(), Path("s")
    (root / "slides").mkdir(parents=True)
    for i in range(4):
        (root / "slides" / f"s{i}.png").write_bytes(b"never read")
    if labels:
        (root / "labels.csv").write_text("slide,label,split\n" + labels)
    assert eval_py.main([*argv, "--data", "s", "--mpp", "2", *CPU, "--checkpoint", str(run)]) == 2
    one_line(capsys, says)


def test_the_script_hands_over_to_patches():
    script = Path(eval_py.__file__)
    out = subprocess.run([sys.executable, script, "patches", "--data", "nowhere"], capture_output=True, text=True)
    assert out.returncode == 2 and out.stderr == "eval.py: --data nowhere: neither a folder nor one of mhist, chaoyang\n"
