"""The demo: its synthetic slides and their truth, the augmentation's strength, and what eval.py compares."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from synthetic import rows_of, write_table

import data
import train
from common.encoders import MEAN, STD, normalize
from common.errors import InputError
from common.figures import KIND_COLORS
from common.report import last_losses, print_results, side_by_side
from demo import slides as demo
from demo import truth

# ---------------------------------------------------------------- slides

@pytest.fixture(scope="module")
def pairs():
    """Small slides of 8 seeds, of both classes each: [{label: (image, nuclei, regions)}, ...]."""
    return [{label: demo.render(label, [3, seed], size=(4, 4)) for label in demo.CLASSES}
            for seed in range(8)]


def test_shares_of_a_tile_are_those_counted_px_by_px(pairs):
    regions = pairs[0]["positive"][2]
    tiles = demo.tiles_of(regions)
    assert [tile[:2] for tile in tiles] == [(x, y) for y in range(0, 896, 224) for x in range(0, 896, 224)]
    for x, y, shares in tiles:
        counts = dict.fromkeys(range(len(demo.KINDS)), 0)
        for kind in regions[y: y + 224, x: x + 224].ravel().tolist():
            counts[kind] += 1
        assert shares.tolist() == pytest.approx([n / 224 ** 2 for n in counts.values()], abs=1e-12)
        assert shares.sum() == pytest.approx(1, abs=1e-12)


def test_crops_hold_several_kinds(pairs):
    tiles = [shares for pair in pairs for _, _, shares in demo.tiles_of(pair["negative"][2])]
    assert np.mean([(shares[1:] > 0.05).sum() >= 3 for shares in tiles if shares[0] < 0.5]) > 0.8


def test_the_label_is_where_the_lymphocytes_are_and_nothing_else(pairs):
    """Of one seed: the same regions up to infiltration, and as many nuclei, in other places."""
    nests, telling = demo.KINDS.index("nests"), demo.KINDS.index("infiltrated nests")
    for pair in pairs:
        _, negative_nuclei, negative = pair["negative"]
        _, positive_nuclei, positive = pair["positive"]
        assert not (negative == telling).any()
        assert np.array_equal(np.where(positive == telling, nests, positive), negative)
        tumor = (negative == nests).sum()
        assert 0.2 <= tumor / (negative > 0).sum() <= 0.4
        assert 0.5 <= (positive == telling).sum() / tumor <= 1
        assert len(positive_nuclei) == pytest.approx(len(negative_nuclei), rel=0.02)
        negative_set, positive_set = (set(map(tuple, xy)) for xy in (negative_nuclei, positive_nuclei))
        assert 0.02 < len(positive_set - negative_set) / len(positive_set) < 0.35


def test_neither_mean_colour_nor_the_number_of_nuclei_tells_the_label(pairs):
    """Slides of different seeds differ far more than the classes do, and a classifier is at chance."""
    values = np.array([[[*image.mean((0, 1)), *image.std((0, 1)), len(nuclei)]
                        for image, nuclei, _ in (pair[label] for label in demo.CLASSES)] for pair in pairs])
    between_classes = np.abs(values[:, 1] - values[:, 0]).mean(0)
    assert (between_classes < 0.1 * values[:, 0].std(0)).all(), between_classes / values[:, 0].std(0)
    labels = np.tile([0, 1], len(pairs))
    for columns in (slice(0, 3), slice(0, 6), slice(6, 7)):
        x = values.reshape(-1, 7)[:, columns]
        groups = np.repeat(np.arange(len(pairs)), 2)
        model = make_pipeline(StandardScaler(), LogisticRegression())
        scores = cross_val_predict(model, x, labels, groups=groups, cv=GroupKFold(4),
                                   method="decision_function")
        assert 0.3 < roc_auc_score(labels, scores) < 0.7


def test_stains_differ_between_slides_and_one_seed_draws_one_slide(pairs):
    stroma = np.array([np.median(pair["negative"][0][pair["negative"][2] == 2], 0) for pair in pairs])
    assert (stroma.std(0) > 2).all()
    again = demo.render("positive", [3, 0], size=(4, 4))
    for first, second in zip(pairs[0]["positive"], again, strict=True):
        assert np.array_equal(first, second)
    assert not np.array_equal(pairs[1]["positive"][0], again[0])


def test_nuclei_are_dark_and_on_tissue(pairs):
    for pair in pairs:
        image, nuclei, regions = pair["positive"]
        column, line = nuclei.astype(int).T
        assert (regions[line, column] > 0).all() and len(nuclei) > 500
        assert image[line, column].mean() < image[regions > 0].mean() - 30


def test_crops_have_their_cells_and_shares(pairs):
    image, nuclei, regions = pairs[2]["positive"]
    crops = demo.cut_crops(image, nuclei, regions)
    kept = [tile for tile in demo.tiles_of(regions) if tile[2][0] <= 0.5]
    assert len(crops) == len(kept) > 0
    for (crop, cells, shares), (left, top, expected) in zip(crops, kept):
        assert crop.shape == (224, 224, 3) and np.array_equal(shares, expected)
        assert np.array_equal(crop, image[top: top + 224, left: left + 224])
        inside = [(x, y) for x, y in nuclei if left <= x < left + 224 and top <= y < top + 224]
        np.testing.assert_allclose(cells + (left, top), inside)


def test_the_truth_is_read_as_it_was_written(tmp_path):
    demo.make_demo(tmp_path, workers=1, patients={"train": 1}, size=(1, 2))
    rows = rows_of(tmp_path / "labels.csv")
    assert [row["label"] for row in rows] == ["negative", "positive"]
    assert [row["patient"] for row in rows] == ["train_negative_0", "train_positive_0"]
    for i, row in enumerate(rows):
        _, nuclei, regions = demo.render(row["label"], [1, i], size=(1, 2))
        tiles = truth.read_truth(tmp_path, row["slide"])
        assert list(tiles) == [(0, 0), (224, 0)]
        for x, y, expected in demo.tiles_of(regions):
            shares, telling = tiles[x, y]
            np.testing.assert_allclose(shares, expected, atol=1e-6)
            assert telling == (expected[demo.KINDS.index("infiltrated nests")] >= 0.1)
        assert len(rows_of(tmp_path / "truth" / f"{row['slide']}.csv")) == len(nuclei)


@pytest.mark.parametrize("header", ["x,y,kind,telling", None])
def test_a_demo_of_another_version_is_refused(tmp_path, header):
    demo.make_demo(tmp_path, workers=1, patients={"train": 1}, size=(1, 1))
    demo.make_demo(tmp_path, workers=1, patients={"train": 1}, size=(1, 1))  # kept
    path = tmp_path / "truth" / "demo_002_0_tiles.csv"
    path.unlink()
    if header:
        write_table(path, header, ["0,0,nests,0"])
    with pytest.raises(InputError, match="another version; delete the folder and run again"):
        demo.make_demo(tmp_path, workers=1, patients={"train": 1})


# ---------------------------------------------------------------- the augmentation's strength

def views(**strengths):
    crops = torch.randint(0, 256, (6, 3, 224, 224), generator=torch.Generator().manual_seed(1)).byte()
    return data.make_views(crops, torch.zeros(6, 0, 2), torch.Generator().manual_seed(0),
                           data.Augmentation(1, **strengths))[0]


def test_strengths_of_one_are_dinos_and_of_zero_are_none():
    dinos = views()
    assert all(map(torch.equal, dinos, views(jitter=1.0, greyscale=1.0, solarize=1.0, blur=1.0)))
    for name in ("jitter", "greyscale", "solarize", "blur"):
        assert not all(map(torch.equal, dinos, views(**{name: 0.0}))), name
    colours = torch.tensor([[200, 100, 150], [90, 20, 160]], dtype=torch.uint8)
    crops = colours[:, :, None, None].expand(2, 3, 224, 224)
    plain = data.make_views(crops, torch.zeros(2, 0, 2), torch.Generator().manual_seed(0),
                            data.Augmentation(1, jitter=0, greyscale=0, solarize=0, blur=0))[0]
    for group in plain:  # crops of one colour stay as they are
        want = normalize(colours[:, :, None, None].float() / 255, MEAN, STD).expand_as(group)
        torch.testing.assert_close(group, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("jitter, share, least, most", [
    (0.5, 0.4, 0.09, 0.1),  # half of DINO's 0.8; brightness up to 0.2, of 0.5
    (2, 0.8, 0.38, 0.4)])  # SimCLR's is stronger and not more frequent
def test_jitter_scales_strength_and_probability(jitter, share, least, most):
    grey = torch.full((4000, 3, 1, 1), 0.5)
    draws = data.Draws(torch.Generator().manual_seed(0))
    change = (data.random_jitter(grey, draws, jitter, greyscale=0)[:, 0, 0, 0] - 0.5).abs()
    assert (change > 1e-6).float().mean().item() == pytest.approx(share, abs=0.03)
    assert least < change.max() <= most + 1e-6


class MeanColour(torch.nn.Module):
    """An "encoder" with one token, the image's mean colour."""

    def forward(self, images):
        return images.mean((2, 3))[:, None]


def contrast_of(crops, jitter):
    """The ratio that train.py prints at the start, for crops (N, 3, 224, 224) and this strength of jitter."""
    views = data.Augmentation(jitter=jitter, greyscale=0, solarize=0, blur=0, global_size=32)
    settings = train.StepSettings(views, schedules=None, seed=0, device=torch.device("cpu"), bf16=False)
    return train.contrast_at_start(MeanColour(), [(crop, torch.zeros(0, 2)) for crop in crops], settings)


def test_contrast_is_the_variance_between_crops_over_that_between_views():
    same = torch.full((60, 3, 224, 224), 130, dtype=torch.uint8)
    before = torch.get_rng_state()
    ratio = contrast_of(same, 0.5)
    assert torch.equal(before, torch.get_rng_state())  # training draws what it drew without it
    assert 0.25 < ratio < 1  # crops that do not differ: the mean of two views varies half as much as a view
    differ = torch.linspace(60, 200, 60).byte()[:, None, None, None].expand(60, 3, 224, 224)
    assert contrast_of(differ, 0.5) > 3 > contrast_of(differ, 1.0)


# ---------------------------------------------------------------- what eval.py compares

def test_networks_are_in_one_row_and_losses_next_to_ln_k(tmp_path):
    tables = {"start": [("a", "3", "0.3125", "x")], "DiRL": [("a", "1", "0.1", "z"), ("loss", "2", "", "y")]}
    lines, shown = side_by_side(tables)
    assert lines == [["measure", "start", "start sd", "DiRL", "DiRL sd", "over"],
                     ["a", "3", "0.3125", "1", "0.1", "x"], ["loss", "", "", "2", "", "y"]]
    assert shown == [["measure", "start", "DiRL", "over"],
                     ["a", "3.000 ± 0.312", "1.000 ± 0.100", "x"], ["loss", "", "2.000", "y"]]
    assert last_losses(tmp_path) == []
    lines = [f"{values},{math.log(32)}" for values in ("0,0,9,9,9", "1,1,5,2,4", "2,1,5,3,4")]
    write_table(tmp_path / "log.csv", "step,epoch,loss,loss_c,loss_b,ln_out_dim,entropy_c,entropy_b",
                [f"{line},0.5,0.5" for line in lines])
    uniform = "uniform outputs: ln K = 3.4657"
    assert last_losses(tmp_path) == [("loss of f_c, last epoch", "2.5000", "", uniform),
                                     ("loss of f_b, last epoch", "4.0000", "", uniform)]
    write_table(tmp_path / "log.csv", "step,epoch,loss,loss_f,ln_out_dim", ["0,0,9,2,3"])  # SimCLR's
    assert last_losses(tmp_path) == [("loss of f, last epoch", "2.0000", "", "")]


@pytest.mark.parametrize("share, says", [("0.9995", True), ("1.0000", True), ("0.9994", False)])
def test_a_middle_bin_of_1_is_commented_where_it_is_printed(tmp_path, capsys, share, says):
    rows = [("tokens with attention 0.5 to 2", share, "", "9 crops")]
    other = [("tokens with attention 0.5 to 2", "0.5", "", "9 crops")]
    for tables in ({"DiRL": rows}, {"DiRL": other, "random start": rows}):
        print_results(tables, tmp_path / "compared.csv")
        assert ("a network that has learned nothing has 1.000" in capsys.readouterr().out) == says
    assert "learned nothing" not in (tmp_path / "compared.csv").read_text()


def written_truth(folder, name, shares, features):
    """Writes a slide's features, and the truth of its tiles: their shares of fat and infiltrated nests."""
    lines = []
    for i, (fat, nests) in enumerate(shares):
        values = {"fat": fat, "infiltrated nests": nests, "glass": 1 - fat - nests}
        lines.append(",".join(map(str, [i, 0, int(nests >= 0.5), *(values.get(k, 0) for k in demo.KINDS)])))
    write_table(folder / "truth" / f"{name}_tiles.csv", ",".join(demo.TILE_COLUMNS), lines)
    (folder / "features").mkdir(exist_ok=True)
    coords = np.stack([np.arange(len(shares)), np.zeros(len(shares), int)], 1)
    np.savez(folder / "features" / f"{name}.npz", features=features, coords=coords)


def test_the_truth_of_tiles_is_counted_by_hand(tmp_path):
    names, rng = ["a", "b", "c"], np.random.default_rng(0)
    found = SimpleNamespace(source=tmp_path, split=lambda part: names[:2] if part == "train" else names[2:])
    for name in names:
        shares = np.repeat([[0.9, 0.1], [0.2, 0.8]], 20, 0)
        x = rng.normal(0, 0.01, (40, 2)) + np.repeat([[1, 0], [0, 1]], 20, 0)
        if name == "c":
            x[:4] = x[20:24]  # four tiles of fat that look like nests
        written_truth(tmp_path, name, shares, x)
    attention = {"c": np.stack([np.arange(40), -np.arange(40)])}  # two trainings: all right, all wrong
    rows = {row[0]: row[1:] for row in truth.check_with_truth(found, tmp_path, names, attention)}
    assert rows["kind of a tile, 20-NN"][0] == "0.9000"
    value, sd, over = rows["telling tiles by DSMIL's attention, AUC"]
    assert value == "0.5000" and sd == f"{math.sqrt(0.5):.4f}" and "1 positive" in over


def test_r2_is_one_where_features_hold_the_shares_and_zero_where_they_hold_nothing(tmp_path):
    """Fat is in the features, linearly, among columns of very different sizes; nests are not."""
    names, rng = ["a", "b", "c"], np.random.default_rng(0)
    found = SimpleNamespace(source=tmp_path, split=lambda part: names[:2] if part == "train" else names[2:])
    for name in names:
        shares = rng.uniform(0, 0.5, (300, 2))
        written_truth(tmp_path, name, shares, np.stack([1e4 * shares[:, 0] + 7e5, rng.normal(size=300)], 1))
    attention = {"c": np.zeros((1, 300))}
    rows = {row[0]: float(row[1]) for row in truth.check_with_truth(found, tmp_path, names, attention)}
    assert rows["share of fat, R2"] > 0.999
    assert abs(rows["share of infiltrated nests, R2"]) < 0.05
    each = [value for name, value in rows.items() if name.startswith("share of ")]
    assert len(each) == len(demo.KINDS)
    assert rows["shares of kinds in a tile, R2, mean"] == pytest.approx(np.mean(each), abs=1e-4)


def test_r2_is_that_of_the_formula():
    """By the normal equations, with the alpha of the least error when one tile is left out."""
    rng = np.random.default_rng(1)
    x, queries = rng.normal(3, [1, 10, 0.1], (40, 3)), rng.normal(3, [1, 10, 0.1], (9, 3))
    y = x @ rng.normal(size=(3, 2)) + rng.normal(0, 3, (40, 2))
    mean, sd = x.mean(0), x.std(0)
    z = (x - mean) / sd

    def fitted(z, y, alpha):
        center = z.mean(0)
        centered = z - center
        weights = np.linalg.solve(centered.T @ centered + alpha * np.eye(3), centered.T @ (y - y.mean(0)))
        return lambda query: (query - center) @ weights + y.mean(0)
    errors = []
    for alpha in truth.ALPHAS:
        left_out = [fitted(np.delete(z, i, 0), np.delete(y, i, 0), alpha)(z[i]) - y[i] for i in range(40)]
        errors.append(np.mean(np.square(left_out)))
    best = fitted(z, y, truth.ALPHAS[np.argmin(errors)])
    assert 0 < np.argmin(errors) < len(truth.ALPHAS) - 1
    np.testing.assert_allclose(truth.predict_shares(x, y, queries), best((queries - mean) / sd), atol=1e-8)


@pytest.mark.parametrize("epochs, warmup", [("1", 0), ("10", 1)])
def test_the_demos_warm_up_fits_its_epochs(epochs, warmup):
    assert train.arguments(["--epochs", epochs]).warmup_epochs == warmup


def test_each_kind_has_a_color_in_the_pictures():
    assert tuple(KIND_COLORS) == demo.KINDS and len(set(KIND_COLORS.values())) == len(demo.KINDS)
