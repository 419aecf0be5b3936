"""The demo: its synthetic slides and their truth, the augmentation's strength, and what eval.py compares."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from synthetic import rows_of, write_table

import data
import train
from common.encoders import MEAN, STD, normalize
from common.errors import InputError
from common.metrics import area_under
from common.report import for_reading, last_losses, print_results, side_by_side
from demo import slides as demo
from demo import truth

# ---------------------------------------------------------------- slides

def test_a_positive_slide_has_telling_tiles_and_a_negative_one_has_none():
    for seed in range(6):
        for label in demo.CLASSES:
            regions = demo.draw_regions(np.random.default_rng(seed), label)
            tiles = demo.kinds_of_tiles(regions)
            assert regions.shape == (demo.HEIGHT, demo.WIDTH) and len(tiles) == 24
            kinds = [kind for _, _, kind in tiles if kind != "glass"]
            share = kinds.count(demo.TELLING) / len(kinds)
            assert share == 0 if label == "negative" else 0.15 <= share <= 0.40


def test_the_kind_of_a_tile_is_what_fills_most_of_its_tissue():
    regions = np.zeros((demo.TILE, 4 * demo.TILE), np.uint8)
    nests, fat = demo.KINDS.index("nests"), demo.KINDS.index("fat")
    regions[:, 100: demo.TILE] = nests
    regions[:200, demo.TILE: 2 * demo.TILE] = fat  # more than half of this tile is glass
    regions[:, 2 * demo.TILE:] = fat
    regions[:240, 3 * demo.TILE:] = nests
    assert demo.kinds_of_tiles(regions) == [
        (0, 0, "nests"), (448, 0, "glass"), (896, 0, "fat"), (1344, 0, "nests")]


def test_the_truth_is_read_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "WIDTH", 3 * 448)
    monkeypatch.setattr(demo, "HEIGHT", 2 * 448)
    demo.make_demo(tmp_path, workers=1, patients={"train": 1})
    rows = rows_of(tmp_path / "labels.csv")
    assert [row["label"] for row in rows] == ["negative", "positive"]
    for i, row in enumerate(rows):
        image, nuclei, regions = demo.render(row["label"], [1, i])
        tiles = truth.read_truth(tmp_path, row["slide"])
        assert tiles == {(x, y): (kind, kind == "nests") for x, y, kind in demo.kinds_of_tiles(regions)}
        column, line = nuclei.astype(int).T
        assert (regions[line, column] > 0).mean() > 0.9  # on tissue, but for glands that its edge cuts
        dark = image[line, column].mean() < image[regions > 0].mean() - 40
        assert dark and len(nuclei) > 100
    (tmp_path / "truth" / f"{rows[0]['slide']}_tiles.csv").unlink()
    with pytest.raises(InputError, match="another version; delete"):
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


def test_jitter_scales_strength_and_probability():
    grey = torch.full((4000, 3, 1, 1), 0.5)
    draws = data.Draws(torch.Generator().manual_seed(0))
    out = data.random_jitter(grey, draws, jitter=0.5, greyscale=0)[:, 0, 0, 0]
    changed = (out - 0.5).abs() > 1e-6
    assert changed.float().mean().item() == pytest.approx(0.4, abs=0.03)  # half of DINO's 0.8
    assert 0.09 < (out - 0.5).abs().max() <= 0.1 + 1e-6  # brightness up to 0.2, of 0.5


class MeanColour(torch.nn.Module):
    """An "encoder" with one token, the image's mean colour."""

    def forward(self, images):
        return images.mean((2, 3))[:, None]


def contrast_of(crops, jitter):
    """The ratio that train.py prints at the start, for crops (N, 3, 224, 224) and this strength of jitter."""
    views = data.Augmentation(jitter=jitter, greyscale=0, solarize=0, blur=0, global_size=32)
    how = train.StepSettings(views, schedules=None, seed=0, device=torch.device("cpu"), bf16=False)
    return train.contrast_at_start(MeanColour(), [(crop, torch.zeros(0, 2)) for crop in crops], how)


def test_contrast_is_the_variance_between_crops_over_that_between_views():
    same = torch.full((60, 3, 224, 224), 130, dtype=torch.uint8)
    before = torch.get_rng_state()
    ratio = contrast_of(same, 0.5)
    assert torch.equal(before, torch.get_rng_state())  # training draws what it drew without it
    assert 0.25 < ratio < 1  # crops that do not differ: the mean of two views varies half as much as a view
    differ = torch.linspace(60, 200, 60).byte()[:, None, None, None].expand(60, 3, 224, 224)
    assert contrast_of(differ, 0.5) > 3 > contrast_of(differ, 1.0)


# ---------------------------------------------------------------- what eval.py compares

def test_area_under_is_scikit_learns(rng=np.random.default_rng(0)):
    for _ in range(5):
        answer, scores = rng.random(30) < 0.4, rng.integers(0, 6, 30) / 6
        assert area_under(answer, scores) == pytest.approx(roc_auc_score(answer, scores), abs=1e-12)


def test_networks_are_in_one_row_and_losses_next_to_ln_k(tmp_path):
    tables = {"start": [("a", "3", "0.3125", "x")], "DiRL": [("a", "1", "0.1", "z"), ("loss", "2", "", "y")]}
    lines = side_by_side(tables)
    assert lines == [["measure", "start", "start sd", "DiRL", "DiRL sd", "over"],
                     ["a", "3", "0.3125", "1", "0.1", "x"], ["loss", "", "", "2", "", "y"]]
    assert for_reading(lines) == [["measure", "start", "DiRL", "over"],
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


def test_the_truth_of_tiles_is_counted_by_hand(tmp_path):
    names, rng = ["a", "b", "c"], np.random.default_rng(0)
    found = SimpleNamespace(source=tmp_path, split=lambda part: names[:2] if part == "train" else names[2:])
    for name in names:
        kinds = ["fat"] * 20 + ["nests"] * 20
        write_table(tmp_path / "truth" / f"{name}_tiles.csv", "x,y,kind,telling",
                    [f"{i},0,{kind},{int(kind == 'nests')}" for i, kind in enumerate(kinds)])
        x = rng.normal(0, 0.01, (40, 2)) + np.repeat([[1, 0], [0, 1]], 20, 0)
        if name == "c":
            x[:4] = x[20:24]  # four tiles of fat that look like nests
        (tmp_path / "features").mkdir(exist_ok=True)
        coords = np.stack([np.arange(40), np.zeros(40, int)], 1)
        np.savez(tmp_path / "features" / f"{name}.npz", features=x, coords=coords)
    attention = {"c": np.stack([np.arange(40), -np.arange(40)])}  # two trainings: all right, all wrong
    rows = truth.check_with_truth(found, tmp_path, names, attention)
    assert rows[0][1] == "0.9000" and rows[1][1] == "0.5000"
    assert rows[1][2] == f"{math.sqrt(0.5):.4f}" and "1 positive" in rows[1][3]


@pytest.mark.parametrize("epochs, warmup", [("1", 0), ("10", 1)])
def test_the_demos_warm_up_fits_its_epochs(epochs, warmup):
    assert train.arguments(["--epochs", epochs]).warmup_epochs == warmup
