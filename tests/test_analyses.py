"""The paper's figures and tables: their mathematics, attention in its place, each script at a tiny size."""
import json
import shutil
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from synthetic import (
    SmallHead,
    arrays_of,
    refused,
    rows_of,
    saved,
    untrained_run,
    write,
    write_one_px,
    write_table,
)

import dirl
import eval as eval_py
import train
from common.bags import read_dsmils
from common.encoders import MEAN, STD, inputs_of, load_encoder, random_encoder
from common.errors import InputError
from common.figures import NETWORK_COLORS, network_colors
from common.files import file_stamp
from data import Crops, Draws, random_boxes
from experiments import study, table
from experiments.figures import attention, heatmap, priors, shared, tokens, views
from prior import STAINS, bin_centroids
from wsi.splits import find_data

WHERE = ["--data", "tiny", "--mpp", "2", "--slide-mpp", "1", "--tissue", "0.3", "--workers", "1"]
ON = [*WHERE, "--device", "cpu"]
ONE, OTHER = (f"runs/sweep_fraction_tiny/baseline_{value}_seed0" for value in ("0.5", "1"))
TWO = ["--checkpoint", f"First={ONE}", f"Second={OTHER}"]
RUN = {"data": "tiny", "arch": "vit_t4", "method": "dirl", "seed": 0, "fraction": 1.0}


SWEEP = ["fraction", "--values", "0.5", "1", "--methods", "baseline", "--repeats", "2", "--mil-epochs", "2",
         *ON, "--arch", "vit_t4", "--batch", "2", "--epochs", "1", "--out-dim", "8", "--global-size", "32",
         "--local-crops", "0"]


@pytest.fixture(scope="module")
def made(ten, tmp_path_factory):
    """"tiny": ten slides of two tiles; two runs by a study, resumed when they are finished."""
    here, steps = tmp_path_factory.mktemp("analyses"), []
    shutil.copytree(ten, here / "tiny")

    def run_eval(command):
        steps.append("eval")
        with pytest.MonkeyPatch.context() as blank:
            blank.setattr(Figure, "savefig", write_one_px)
            return SimpleNamespace(returncode=eval_py.main(command[2:]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(dirl, "DINOHead", SmallHead)
        patch.setattr(train, "main", lambda flags, main=train.main: steps.append("train") or main(flags))
        patch.setattr(study.subprocess, "run", run_eval)
        assert study.main(SWEEP) == 0 and steps == ["train", "eval"] * 2
        assert study.main(SWEEP) == 0 and steps[4:] == ["train", "train"]  # finished ones: they end at once
    return here


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def make_seen(here, slide):
    """elsewhere/seen: a run whose encoder "saw" a slide, with features as if it had made them."""
    run = untrained_run(here / "elsewhere/seen", data="tiny", images={slide: 1})
    (run / "features").mkdir(exist_ok=True)
    for path in (here / ONE / "features").glob("*.npz"):
        values = arrays_of(path) | {"encoder": np.array(file_stamp(run / "encoder.pt"))}
        np.savez(run / "features" / path.name, **values)
    return "elsewhere/seen"


# ---------------------------------------------------------------- tokens (Fig. 10, Table 10)

def gaussian(*mean_and_cov):
    return tuple(np.array(values, float) for values in mean_and_cov)


@pytest.mark.parametrize("q", [gaussian([1, 0.5], [[2, 0.6], [0.6, 1]]),
                               gaussian([0, 0], [[0.01, 0], [0, 4]]), gaussian([3, 3], np.eye(2))])
def test_jensen_shannon_equals_monte_carlo(q):
    p, rng, terms = gaussian([0, 0], [[1, 0.3], [0.3, 1.5]]), np.random.default_rng(0), []
    for own, other in ((p, q), (q, p)):
        x = rng.multivariate_normal(*own, 200_000)
        a, b = (np.exp(-0.5 * np.einsum("ni,ij,nj->n", x - m, np.linalg.inv(c), x - m))
                / (2 * np.pi * np.linalg.det(c) ** 0.5) for m, c in (own, other))
        terms.append(np.log2(a / ((a + b) / 2)).mean())
    assert tokens.jensen_shannon(p, q) == pytest.approx(np.mean(terms), abs=0.005)
    assert tokens.jensen_shannon(p, q) == pytest.approx(tokens.jensen_shannon(q, p), abs=1e-9)


def test_distances_by_hand():
    one = gaussian([0, 0], np.eye(2))
    assert tokens.jensen_shannon(one, one) == pytest.approx(0, abs=1e-9)
    assert tokens.jensen_shannon(one, gaussian([100, 0], np.eye(2))) == pytest.approx(1, abs=1e-9)
    assert tokens.bhattacharyya(one, gaussian([2, 0], np.eye(2))) == pytest.approx(4 / 8)
    wide = gaussian([0, 0], 4 * np.eye(2))  # mean of the covariances: 2.5 I
    assert tokens.bhattacharyya(one, wide) == pytest.approx(np.log(2.5 ** 2 / (1 * 16) ** 0.5) / 2)


def test_drawn_tokens_have_their_kind_and_are_the_encoders(monkeypatch):
    encoder, images = random_encoder("vit_t4", 0, MEAN, STD), torch.randint(0, 256, (3, 3, 224, 224)).byte()
    p_c = (torch.rand(3, 196) < 0.3).float()
    places = tokens.draw_places(p_c, 50, seed=1)
    assert p_c.flatten()[places["cell"]].all() and not p_c.flatten()[places["background"]].any()
    assert all(len(set(where)) == 50 for where in places.values())
    monkeypatch.setattr(tokens, "TSNE", lambda *_, **__: SimpleNamespace(fit_transform=lambda x: x))
    got = tokens.embed(encoder, images, places, SimpleNamespace(perplexity=30, seed=0))
    for kind, where in places.items():
        want = encoder(inputs_of(encoder, images)).flatten(0, 1)[where].detach()
        np.testing.assert_allclose(got[kind], want, atol=1e-5)
    with pytest.raises(InputError, match="--tokens 590"):
        tokens.draw_places(p_c, 590, seed=1)


# ---------------------------------------------------------------- priors (Fig. 15, 16)

def test_matching_equals_brute_force(rng=np.random.default_rng(0)):
    for _ in range(20):
        a, b = rng.uniform(0, 6, (4, 2)), rng.uniform(0, 6, (5, 2))
        near = np.hypot(*(a[:, None] - b).transpose(2, 0, 1)) <= 2
        best = max(sum(near[i, j] for i, j in enumerate(order)) for order in permutations(range(5), 4))
        assert priors.matched(a, b, 2) == best
    assert priors.matched(a, b[:0], 2) == 0


def test_agreement_by_hand():
    a = [np.array([[8., 8], [100, 100]]), np.zeros((0, 2))]
    b = [np.array([[9., 8], [120, 100], [100, 101.6]]), np.array([[8., 8]])]  # 1 px, none, 1.6 px, none
    f1, same, kappa = priors.agreement(a, b, 2.0)  # 3 um are 1.5 px
    assert f1 == pytest.approx(2 * 1 / (2 + 4)) and same == pytest.approx(390 / 392)
    chance = (2 * 4 + 390 * 388) / 392 ** 2
    assert kappa == pytest.approx((same - chance) / (1 - chance))
    assert priors.agreement(a[1:], a[1:], 2.0)[:2] == (1, 1)


# ---------------------------------------------------------------- views (Fig. 14), queries (Fig. 13)

def test_shares_of_regions_equal_brute_force(rng=np.random.default_rng(0)):
    cells = torch.tensor(rng.uniform(0, 224, (40, 9, 2)) * [1, 0.5], dtype=torch.float32)
    cells[::2, 3:] = float("nan")
    got = views.region_shares(cells, 0.1, 96, torch.Generator().manual_seed(5))
    boxes = random_boxes(40, 224, (0.1, 0.1), Draws(torch.Generator().manual_seed(5))).numpy()
    covers = [bin_centroids((xy[~np.isnan(xy[:, 0])] - box[:2]) / box[2:] * 96, 96).mean().item()
              for xy, box in zip(cells.numpy(), boxes)]
    want = [np.mean([0 < c < 1 for c in covers]), np.mean(np.equal(covers, 1)), np.mean(np.equal(covers, 0))]
    np.testing.assert_allclose(got, want)


def test_a_query_is_a_token_of_the_crop():
    assert attention.tokens_at(["0,0", "223.9,15", "17,32"], 14) == [0, 13, 29]
    assert attention.tokens_at(["2"], 14) == [3 * 14 + 3, 3 * 14 + 10, 10 * 14 + 3, 10 * 14 + 10]
    for wrong in (["224,0"], ["a"], ["1,2,3"], ["0"]):
        with pytest.raises(InputError, match="--query"):
            attention.tokens_at(wrong, 14)


# ---------------------------------------------------------------- crops to show, colours

def test_crops_to_show_have_both_regions_and_little_glass():
    images = torch.full((6, 3, 224, 224), 150, dtype=torch.uint8)
    images[[1, 3], :, :60] = 240  # glass in a quarter
    images[[0, 2], 0] = 240  # red, not glass
    priors = torch.zeros(6, 196)
    priors[:5, :98] = 1  # crop 5 has background alone
    crops = list(zip(images))
    assert shared.choose_crops(crops, priors, 9) == [0, 1, 2, 3, 4]  # too few without glass
    assert shared.choose_crops(crops, priors, 3) == [0, 2, 4]
    assert shared.choose_crops(crops, torch.zeros(6, 196), 2) == [0, 5]


def test_a_network_keeps_its_color():
    one = network_colors(["Baseline-T4", "demo_vit_t4_dirl", "random start", "other"])
    two = network_colors(["dirl", "dirl_two_views", "DINO"])
    assert one["demo_vit_t4_dirl"] == two["dirl"] == NETWORK_COLORS["dirl"]
    assert one["Baseline-T4"] == two["DINO"] == NETWORK_COLORS["baseline"]
    assert len(set(one.values())) == 4 and two["dirl_two_views"] not in NETWORK_COLORS.values()


# ---------------------------------------------------------------- heat maps

def test_stitching_equals_brute_force():
    corners, side, unit = np.array([[0, 0], [101, 33], [0, 101]]), 100.8, 7.3
    values = np.random.default_rng(0).random((3, 16))
    got = heatmap.stitch(values, corners, side, unit, (30, 26))
    for y in range(30):
        for x in range(26):
            at, want = np.array([x + 0.5, y + 0.5]) * unit, np.nan
            for corner, of_tile in zip(corners, values):
                column, row = np.floor((at - corner) / side * 4).astype(int)
                if 0 <= column < 4 and 0 <= row < 4:
                    want = of_tile[4 * row + column]
            np.testing.assert_allclose(got[y, x], want, rtol=1e-6)


class Dark(torch.nn.Module):
    """An "encoder" whose tokens all attend to the dark patches."""

    mean, std = MEAN, STD

    def __init__(self):
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(1))

    def last_attention(self, images):
        grey = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 16).flatten(1)  # (B, n)
        return (50.0 * (grey < -1)).softmax(-1)[:, None, None].expand(-1, 1, grey.shape[1], -1)


def test_one_dark_square_lights_up_in_place(tmp_path, monkeypatch):
    """It lies across four tiles, 128 x 96 px at 384,416 of level 0: 4 x 3 tokens of 32 px."""
    monkeypatch.chdir(tmp_path)
    image = np.empty((896, 1344, 3), np.uint8)
    image[:] = 245 * np.exp(-0.4 * STAINS[1])
    image[416: 512, 384: 512] = (60, 20, 70)
    saved(tmp_path / "in/slides/s.png", array=image)
    about = {"mpp": 2.0, "data": "in", "trained_on": {"data": "in"}}
    networks = {"it": (Dark(), tmp_path / "encoder.pt", about)}
    monkeypatch.setattr(shared, "load_networks", lambda args: networks)
    drawn, draw = [], heatmap.draw_maps
    monkeypatch.setattr(heatmap, "draw_maps", lambda *what: drawn.extend(what) or draw(*what))
    argv = ["--checkpoint", "it", "--data", "in", "--mpp", "2", "--slide-mpp", "1", "--part", "train",
            "--workers", "1", "--pixels", "672", "--out", "h.png"]
    assert heatmap.main(argv) == 0
    picture, maps, _ = drawn
    heat, dark = maps["it"]["aggregated attention"], picture.mean(2) < 100
    assert heat.shape == dark.shape == (448, 672) and dark.sum() == 64 * 48
    assert np.array_equal(heat > 2, dark) and not np.isnan(heat).any()
    features = json.loads(Path("h_it.geojson").read_text())["features"]
    hot = [np.array(f["geometry"]["coordinates"][0]) for f in features
           if f["properties"].get("classification", {}).get("name") == "attention over 2"]
    assert len(hot) == 12 and all(np.ptp(ring, 0).tolist() == [32, 32] for ring in hot)
    ring = np.concatenate(hot)
    assert ring.min(0).tolist() == [384, 416] and ring.max(0).tolist() == [512, 512]
    tiles = {tuple(f["geometry"]["coordinates"][0][0]): f["properties"]["measurements"] for f in features
             if f["properties"]["objectType"] == "annotation"}
    assert len(tiles) == 6 and tiles[896, 448]["tokens 0.5 to 2"] == 1
    assert tiles[0, 0]["tokens over 2"] == pytest.approx(2 / 196, rel=1e-3)


# ---------------------------------------------------------------- the paper's table

def result(folder, accuracies, bins=None, **config):
    write(folder / "config.json", RUN | config)
    write_table(folder / "slides.csv", "seed,accuracy,auc,macro_f1",
                [f"{i},{a},{a + 0.05},0.5" for i, a in enumerate(accuracies)])
    if bins:
        write_table(folder / "results.csv", "measure,mean,sd,over",
                    [f"tokens with attention 0.5 to 2,{bins},,9 crops"])


def test_the_table_pools_seeds_tells_settings_apart_and_marks_the_best(tmp_path, capsys):
    result(tmp_path / "a", [0.8, 0.9], method="baseline", bins=0.6)
    result(tmp_path / "b", [0.9], bins=0.95)
    result(tmp_path / "deep" / "c", [0.7], seed=1)
    result(tmp_path / "d", [0.5], fraction=0.2)
    result(tmp_path / "e", [0.875], arch="vit_s", data="other_set")
    byol = {"ssl": "byol", "depth": None, "sup_weight": 1.0}  # compare.py's
    result(tmp_path / "f", [0.6], **byol)
    result(tmp_path / "g", [0.65], **byol | {"depth": 3})
    write_table(tmp_path / "b/patches.csv", "data,encoder,training,fold,accuracy,auc", [
        "mhist,b,fine-tuned,1,0.8,0.9", "mhist,b,fine-tuned,2,0.7,0.9", "mhist,random,fine-tuned,1,1,1"])
    assert table.main([str(tmp_path)]) == 0
    lines = (tmp_path / "table.md").read_text().replace("*", "!").splitlines()
    assert lines[0].startswith("|  | tiny accuracy | tiny AUC | mhist accuracy | mhist AUC | other_set accu")
    assert lines[2] == "| Baseline-T4 | !!0.850!! ± 0.071 | !!0.900!! ± 0.071 |  |  |  |  |"
    assert lines[3].startswith("| DiRL-T4 | 0.800 ± 0.141 | 0.850 ± 0.141 | !!0.750!! ± 0.071 | !!0.900!! ±")
    assert [line.split("|")[1].strip() for line in lines[4:7]] == [
        "DiRL-T4, BYOL", "DiRL-T4, BYOL, depth 3", "DiRL-T4, fraction 0.2"]
    assert lines[6].startswith("| DiRL-T4, fraction 0.2 | 0.500 | 0.550 |")
    assert lines[7] == "| DiRL-S |  |  |  |  | !!0.875!! | !!0.925!! |"
    assert "Baseline-T4,tiny,accuracy,0.8500,0.0707,2" in (tmp_path / "table.csv").read_text()
    assert table.main([str(tmp_path), "--measures", "accuracy", "middle"]) == 0
    assert "| Baseline-T4 | **0.850** ± 0.071 | 0.600 |" in (tmp_path / "table.md").read_text()
    refused(capsys, table.main, [str(tmp_path / "nothing")], "nothing", "eval.py")


def test_encoders_of_two_data_sets_on_a_third_are_no_repeats(tmp_path):
    for name, data, method in (("a", "one", "dirl"), ("b", "two", "dirl"), ("c", "two", "baseline")):
        result(tmp_path / name, [0.8], data=data, method=method)
        write_table(tmp_path / name / "patches.csv", "data,encoder,training,fold,accuracy,auc",
                    [f"mhist,{name},fine-tuned,1,0.5,0.5"])
    result(tmp_path / "a/on_three", [0.6], data="three", pretrained_on="one")
    assert table.main([str(tmp_path), "--measures", "accuracy"]) == 0
    rows = {(row["network"], row["data"]): row["repeats"] for row in rows_of(tmp_path / "table.csv")}
    assert rows == dict.fromkeys([
        ("Baseline-T4", "two"), ("Baseline-T4", "mhist"), ("DiRL-T4, pretrained on one", "one"),
        ("DiRL-T4, pretrained on one", "mhist"), ("DiRL-T4, pretrained on one", "three"),
        ("DiRL-T4, pretrained on two", "two"), ("DiRL-T4, pretrained on two", "mhist")], "1")


def trained(folder, steps, **config):
    """A measured run of 16 epochs of 2 steps that trained for that many steps."""
    result(folder, [0.8], **{"epochs": 16, "crops": 40, "batch": 20} | config)
    write_table(folder / "log.csv", "step,epoch,loss", [f"{i},0,1" for i in range(steps)])


def test_settings_that_differ_between_rows_are_in_their_names(tmp_path, capsys):
    trained(tmp_path / "a", 6, method="baseline", epochs=3, bins=0.9996)
    trained(tmp_path / "b", 32, bins=0.4)
    trained(tmp_path / "c", 32, seed=1, bins=0.5)
    trained(tmp_path / "d", 9, method="cellback")
    trained(tmp_path / "elsewhere", 32, data="other", jitter=0.5)
    assert table.main([str(tmp_path), "--measures", "accuracy", "middle"]) == 0
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    names = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert names[2:] == ["| Baseline-T4, epochs 3", "| Cellback-T4, epochs 16, stopped at step 9",
                         "| DiRL-T4", "| DiRL-T4, epochs 16"]  # the first of them is alone on its data set
    assert "| Baseline-T4, epochs 3 | **0.800** | 1.000 |" in text  # the middle bin is never bold
    note = ("tokens with attention 0.5 to 2: a network that has learned nothing has 1.000, "
            "so 1.000 alone is no success")
    assert text.endswith(f"\n\n{note}\n")
    assert table.main([str(tmp_path)]) == 0
    assert "learned nothing" not in (tmp_path / "table.md").read_text()  # no middle bin is shown


def test_results_at_several_um_per_px_are_told_apart(tmp_path):
    result(tmp_path / "a", [0.8], data="one", mpp=2.0)
    result(tmp_path / "b", [0.5], data="one", method="dino", weights="x", measured_at=2.0)
    result(tmp_path / "c", [0.5], data="two", mpp=1.0)
    assert table.main([str(tmp_path), "--measures", "accuracy"]) == 0
    assert {row["network"] for row in rows_of(tmp_path / "table.csv")} == {"DiRL-T4", "dino-T4"}
    result(tmp_path / "a/on_one_1um", [0.6], data="one", mpp=2.0, measured_at=1.0)
    assert table.main([str(tmp_path), "--measures", "accuracy"]) == 0
    assert {row["network"] for row in rows_of(tmp_path / "table.csv")} == {
        "DiRL-T4, at 2 um/px", "DiRL-T4, at 1 um/px", "dino-T4, at 2 um/px", "DiRL-T4"}


# ---------------------------------------------------------------- folds (Table 4)

SEEN = "test slides seen in pre-training"


def write_splits(folder, count=2):
    for k in range(count):
        parts = {"train": [0, 1 + k], "val": [2 - k], "test": [3]}
        columns = [[f"{label}_{i}.svs" for label in ("glands", "nests") for i in numbers] + [""] * 2
                   for numbers in parts.values()]
        rows = [f"{i}," + ",".join(column[i] for column in columns) for i in range(4)]
        write_table(folder / f"splits_{k}.csv", ",train,val,test", rows + ["4,TCGA-elsewhere,,"])
    write_table(folder / "splits_0_bool.csv", "x", ["y"])


def test_folds_by_published_split_files(here, capsys):
    write_splits(here / "splits")
    argv = ["folds", "--data", "tiny", "--splits", "splits", "--epochs", "2", "--device", "cpu"]
    assert study.main([*argv, *TWO]) == 0
    out, rows = capsys.readouterr().out, rows_of(here / "runs/folds.csv")
    assert "1 of 9 slides are not in tiny" in out and {row[SEEN] for row in rows} == {"0"}
    assert [(row["network"], row["fold"], row["test"]) for row in rows] == [
        (name, fold, "2") for name in ("First", "Second") for fold in "01"]
    shutil.copytree(here / ONE, here / "elsewhere/fold_0")
    refused(capsys, study.main, [*argv, "--checkpoint", "own=elsewhere/fold_{fold}"], "elsewhere/fold_1")
    argv += ["--checkpoint", make_seen(here, "nests_3")]
    refused(capsys, study.main, argv, "1 of these 2 test images", "--allow-seen")
    assert study.main([*argv, "--allow-seen"]) == 0
    assert [row[SEEN] for row in rows_of(here / "runs/folds.csv")][-2:] == ["1", "1"]


# ---------------------------------------------------------------- each script at a tiny size

def wrote(path, rows):
    """Checks that the picture exists, with this many rows next to it."""
    assert path.stat().st_size > 10_000 and len(rows_of(path.with_suffix(".csv"))) == rows


def test_attention_scripts(here, capsys):
    assert attention.main(["distribution", *ON, *TWO]) == 0
    wrote(here / "runs/attention_distribution.png", 2)
    row = rows_of(here / "runs/attention_distribution.csv")[0]
    assert row["0.5 to 2"] == "1" and "a network that has learned nothing" in capsys.readouterr().out
    assert sum(float(row[bin]) for bin in attention.BINS) == pytest.approx(1, abs=1e-5)
    assert attention.main(["overlay", *ON, *TWO, "--crops", "2", "--out", "o.png"]) == 0
    wrote(here / "o.png", 4)
    shown = ["--show", "nests_3/0_0", "--out", "q.png"]
    assert attention.main(["query", *ON, *TWO, *shown, "--query", "0,0", "100,60"]) == 0
    wrote(here / "q.png", 2 * 2 * 196)
    rows = rows_of(here / "q.csv")
    encoder, _ = load_encoder(f"{ONE}/encoder.pt")
    crop = Crops(find_data("tiny", 2, slide_mpp=1), ["nests_3"])[0][0]
    with torch.no_grad():
        weights = encoder.last_attention(inputs_of(encoder, crop[None]))[0]  # (heads, n, n)
    want = 196 * weights[:, 3 * 14 + 6].mean(0)  # of 100,60
    got = [float(row["attention times n"]) for row in rows[196: 2 * 196]]
    assert [(row["query x"], row["query y"]) for row in rows[195: 197]] == [("0", "0"), ("96", "48")]
    np.testing.assert_allclose(got, want, rtol=1e-4)
    refused(capsys, attention.main, ["query", *ON, *TWO, "--show", "0_0"], "--show 0_0", "one is needed")
    refused(capsys, attention.main, ["query", *ON, *TWO, "--out", "q.csv"], "--out: q.csv", ".png")
    overlay = ["overlay", *ON, "--checkpoint"]
    refused(capsys, attention.main, [*overlay, f"x={ONE}", f"x={OTHER}"], "NAME=")
    refused(capsys, attention.main, [*overlay, make_seen(here, "nests_3")], "was trained on 1 of")


def test_captions_say_where_crops_are_of_training_and_have_no_labels(here, capsys, monkeypatch):
    (here / "plain").mkdir()
    for name in ("nests_3", "glands_3"):
        (here / f"plain/{name}.png").symlink_to(here / f"tiny/slides/{name}.png")
    titles = []
    monkeypatch.setattr(shared, "save_both", lambda figure, *rest: titles.append(figure.axes[0].get_title()))
    for folder in ("tiny", "plain"):
        flags = ["--data", folder, *ON[2:], "--checkpoint", ONE]
        assert attention.main(["distribution", *flags]) == 0
        assert heatmap.main([*flags, "--slide", "nests_3"]) == 0
    assert titles == ["tiny, 8 test crops", "nests_3, nests, test part",
                      "plain, 4 train crops", "nests_3, training slide (no labels)"]
    refused(capsys, heatmap.main, [*flags, "--slide", "gone"], "not a slide in the train part")
    shutil.copytree(here / ONE, here / "runs/copy")
    assert eval_py.main(["--data", "plain", *ON[2:], "--checkpoint", "runs/copy"]) == 0
    rows = rows_of(here / "runs/copy/on_plain/results.csv")
    over = {row["over"] for row in rows if row["measure"].startswith("tokens")}
    assert over == {"4 train crops"}


def run_with_prior(here, name, prior, method="dirl", data="tiny"):
    """elsewhere/<name>: a run that learned from the cells of a segmenter, but from no image."""
    run = untrained_run(here / "elsewhere" / name, method, data, ssl=None)
    write(run / "config.json", {"prior": prior, "method": method, "data": data})
    return f"elsewhere/{name}"


def test_figures_draw_the_cells_that_their_runs_learned_from(here, capsys):
    own = run_with_prior(here, "own", "cellpose")
    plain = run_with_prior(here, "plain", "builtin", method="baseline")
    other = run_with_prior(here, "other", "builtin")
    elsewhere = run_with_prior(here, "elsewhere", "builtin", data="more")
    for file in (here / "tiny/slides").glob("*.png"):
        write_table(here / f"tiny/cells/cellpose/{file.stem}.csv", "x,y", ["100,100"])

    def opened(command, *flags):
        args = attention.arguments([command, *ON, *flags])
        _, found, names = shared.open_all(args, command != "distribution")
        return found, shared.crops_of(found, names, args)
    found, crops = opened("overlay", "--checkpoint", plain, elsewhere, own)
    first = [i for i, (x, y) in enumerate(crops.corners.tolist()) if x < 100]
    want = torch.zeros(196)
    want[int(100 / 2 // 16) * 14 + int(100 / 2 // 16)] = 1  # 1 um/px: a crop's px are 2 of the slide's
    assert found.prior == "cellpose" and first and "learned from" not in capsys.readouterr().out
    assert all(torch.equal(crops.priors()[i], want) for i in first)
    assert opened("overlay", "--checkpoint", plain, elsewhere)[0].prior == "auto"
    assert opened("overlay", "--checkpoint", own, "--prior", "builtin")[0].prior == "builtin"
    capsys.readouterr()
    found, _ = opened("query", "--checkpoint", other, own)
    assert found.prior == "builtin"
    assert "(builtin, cellpose); P_c is drawn from those of builtin" in capsys.readouterr().out
    opened("distribution", "--checkpoint", other, own)
    assert "learned from" not in capsys.readouterr().out
    shutil.rmtree(here / "tiny/cells")


def test_heatmap_tokens_and_views_scripts(here, capsys):
    argv = [*ON, *TWO, "--slide", "nests_4", "--out", "h.png"]
    assert heatmap.main(argv) == 0
    wrote(here / "h.png", 4)  # two tiles, two networks
    assert "skipped" not in capsys.readouterr().out
    dsmils = read_dsmils(here / ONE, here / ONE / "encoder.pt", "cpu")  # of the study's eval.py
    _, of_classes = dsmils.apply(arrays_of(here / ONE / "features/nests_4.npz")["features"])
    got = [float(row["DSMIL"]) for row in rows_of(here / "h.csv")[:2]]
    np.testing.assert_allclose(got, of_classes[:, dsmils.classes.index("nests")], rtol=1e-4)
    assert {path.name for path in here.glob("h_*.geojson")} == {"h_First.geojson", "h_Second.geojson"}
    refused(capsys, heatmap.main, [*argv[:-4], "--slide", "nests_0"], "not a slide in the test part")
    argv = [*ON, "--checkpoint", make_seen(here, "glands_0"), "--slide", "nests_4", "--out", "g.png"]
    assert heatmap.main(argv) == 0  # eval.py has not measured it
    assert "skipped: DSMIL: elsewhere/seen: has no dsmil_<seed>.pt; first: python eval.py" in (
        capsys.readouterr().out)
    assert list(rows_of(here / "g.csv")[0])[-1] == "DSMIL" and not rows_of(here / "g.csv")[0]["DSMIL"]
    assert tokens.main([*ON, *TWO, "--tokens", "60", "--perplexity", "10", "--out", "t.png"]) == 0
    wrote(here / "t.png", 2)
    assert all(0 <= float(row["Jensen-Shannon"]) <= 1 for row in rows_of(here / "t.csv"))
    assert views.main([*ON[:2], *ON[4:], "--local-crops", "2", "--show", "1", "--out", "v.png"]) == 0
    wrote(here / "v.png", 2 * 2 * len(views.SCALES))
    for row in rows_of(here / "v.csv"):
        assert sum(float(value) for value in list(row.values())[4:]) == pytest.approx(1, abs=1e-5)


def test_priors_script(here, capsys):
    for file in (here / "tiny/slides").glob("*.png"):
        write_table(here / f"mine/{file.stem}.csv", "x,y", ["100,100", "300,200"])
    folders = ["mine=mine", "same=datasets/tiny/cells/builtin"]
    assert priors.main([*WHERE, "--prior", "builtin", *folders, "--show", "1", "--out", "p.png"]) == 0
    wrote(here / "p.png", 3)
    f1 = {(row["segmenter"], row["other"]): float(row["F1 within 3 um"]) for row in rows_of(here / "p.csv")}
    assert f1["builtin", "mine"] < 0.1 and f1["builtin", "same"] == 1
    refused(capsys, priors.main, [*WHERE, "--prior", "builtin", "gone"], "--prior gone")


def test_fig_6_trains_for_50_epochs_but_on_the_demo(here):
    def epochs(*flags):
        _, jobs = study.sweep_jobs(study.arguments(["fraction", *flags]))
        return {job.settings.epochs for job in jobs}
    assert epochs("--data", "lung") == epochs("--data", "tiny", "--mpp", "2") == {50}
    assert epochs("--data", "lung", "--epochs", "3") == {3} and epochs("--data", "demo") == {5}


def test_sweep_script(here, capsys):
    rows = rows_of(here / "runs/sweep_fraction_tiny/sweep.csv")
    assert {(row["fraction"], row["measure"], row["repeats"]) for row in rows} >= {
        ("0.5", "accuracy", "2"), ("1", "auc", "2"), ("1", "middle", "1")}
    assert (here / "runs/sweep_fraction_tiny/sweep.png").stat().st_size > 10_000
    refused(capsys, study.main, [*SWEEP, "--seed", "1"], "--seed: the study sets it")
    _, jobs = study.sweep_jobs(study.arguments(["prior", *ON, "--values", "cellpose", "hovernet"]))
    assert " ".join(job.folder.name.removesuffix("_seed0") for job in jobs) == (
        "baseline cellback_cellpose cellback_hovernet dirl_cellpose dirl_hovernet")
