"""Fig. 12's outlines of the pathologist's regions, and Fig. 1: the attention of any picture."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from synthetic import refused, rows_of, saved, untrained_run, write
from test_encoders import by_hand, class_token_file

import dirl
from common.encoders import MEAN, STD, attention_of, normalize, random_encoder
from common.errors import InputError
from experiments.figures import attention, outlines, shared

SQUARE = [[10, 20], [110, 20], [110, 220], [10, 220], [10, 20]]


# ---------------------------------------------------------------- outlines (Fig. 12)

def annotation(name, kind="Polygon", coordinates=(SQUARE,), **more):
    properties = {"objectType": "annotation", "classification": {"name": name, "color": [1, 2, 3]}} | more
    return {"type": "Feature", "properties": properties,
            "geometry": {"type": kind, "coordinates": coordinates}}


def collection(*features):
    return json.dumps({"type": "FeatureCollection", "features": features})


def test_outlines_have_the_class_of_the_annotation_and_count_from_qupaths_corner(tmp_path, capsys):
    hole = [[30, 40], [50, 40], [50, 60], [30, 40]]
    path = write(tmp_path / "a.geojson", collection(
        annotation("Tumor: Positive", coordinates=[SQUARE, hole]), annotation("Immune cells"),
        annotation("Tumour-infiltrating", "MultiPolygon", [[SQUARE], [hole]]), annotation("NECROSIS"),
        annotation("Tumor", objectType="detection"), annotation("Stroma"), annotation("Stroma"),
        annotation("Tumor", "Point", [1, 2]), annotation("Tumor", classification=None)))
    found = outlines.read_outlines(path, (1000, -7))
    assert [region for region, _ in found] == [
        "tumour", "tumour", "lymphocytes", "tumour", "tumour", "necrosis"]
    for (_, got), ring in zip(found, (SQUARE, hole, SQUARE, SQUARE, hole, SQUARE)):
        np.testing.assert_allclose(got, np.add(ring, (1000, -7)))
    warned, = capsys.readouterr().out.splitlines()
    assert warned.startswith(f"warning: {path}: annotations that are not drawn: "
                             "Stroma (2), Tumor (1), no class (1);")
    older = annotation("Tumor") | {"id": "PathCellObject"}
    assert outlines.read_outlines(write(tmp_path / "b.geojson", collection(older)), (0, 0)) == []
    for broken in ('{"type": "Feature"}', '{"features": [3]}', '{"nuc": {}}', '{"features": [{"a": 1'):
        with pytest.raises(InputError, match="c.geojson: "):
            outlines.read_outlines(write(tmp_path / "c.geojson", broken), (0, 0))


def test_outlines_are_drawn_in_their_colors_on_crops_and_attention(folder, capsys, monkeypatch):
    run = str(untrained_run("runs/a"))
    write(Path("marked/nests_3.png - Series 0.geojson"), collection(
        annotation("Tumor"), annotation("Lymphocytes", coordinates=[np.add(SQUARE, 150).tolist()]),
        annotation("Necrosis", coordinates=[np.add(SQUARE, 600).tolist()])))  # not in the tile
    known = outlines.tile_info
    monkeypatch.setattr(outlines, "tile_info", lambda *slide: known(*slide) | {"bounds": (40, 60)})
    figures = []
    monkeypatch.setattr(shared, "save_both", lambda figure, *rest, **more: figures.append(figure))
    argv = ["overlay", "--data", "tiny set", "--mpp", "2", "--slide-mpp", "1", "--tissue", "0.3", "--workers",
            "1", "--device", "cpu", "--checkpoint", run, "--show", "nests_3/0_0", "--outlines"]
    assert attention.main([*argv, "marked"]) == 0
    crop, prior, heat, bars = figures[0].axes[:4]
    for axis in (crop, heat):
        drawn = [lines for lines in axis.collections if isinstance(lines, LineCollection)]
        assert [to_hex(lines.get_color()[0]) for lines in drawn] == ["#ffffff", "#32cd32"]
        for lines, shift in zip(drawn, (0, 150)):  # 1 um/px: a px of the crop is 2 of the slide's
            ring, = lines.get_segments()
            np.testing.assert_allclose(ring[:5], (np.add(SQUARE, (40, 60)) + shift) / 2)
        assert axis.get_xlim() == (0, 224) and axis.get_ylim() == (224, 0)
    assert not [lines for axis in (prior, bars) for lines in axis.collections
                if isinstance(lines, LineCollection)]
    capsys.readouterr()
    Path("empty").mkdir()
    assert attention.main([*argv, "empty"]) == 0
    out = capsys.readouterr().out
    assert "no GeoJSON is named after nests_3" in out and "no outline is in these crops" in out
    refused(capsys, attention.main, [*argv, "gone"], "--outlines gone", "a folder")


# ---------------------------------------------------------------- any picture (Fig. 1)

def test_views_are_of_the_middle_square(tmp_path):
    picture = np.zeros((100, 300, 3), np.uint8)
    picture[:, 100:200] = 200
    saved(tmp_path / "p.png", array=picture)
    views = attention.two_views(tmp_path / "p.png", 0)
    assert views.shape == (2, 3, 224, 224) and views.dtype == torch.uint8
    assert (views.amax((2, 3)) - views.amin((2, 3)) <= 1).all()  # of one colour
    saved(tmp_path / "p.png", array=np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    first = attention.two_views(tmp_path / "p.png", 1)
    assert torch.equal(first, attention.two_views(tmp_path / "p.png", 1))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, views)


@torch.no_grad()
def test_a_class_tokens_row_is_next_to_the_aggregated_attention(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = class_token_file(Path("dino.pth"))
    saved(Path("p.jpg"), array=np.random.default_rng(0).integers(0, 255, (80, 64, 3), np.uint8))
    argv = ["picture", "p.jpg", "--checkpoint", "DINO=dino.pth", f"Ours={untrained_run('runs/a')}",
            "--device", "cpu", "--seed", "3", "--out", "f.png"]
    assert attention.main([*argv, "--arch", "vit_t4"]) == 0
    assert Path("f.png").stat().st_size > 10_000
    views = attention.two_views(Path("p.jpg"), 3)
    _, by_block = by_hand(state, normalize(views / 255, MEAN, STD))
    row = by_block[..., 0, 1:]
    row = (row / row.sum(-1, keepdim=True)).mean(1) * 196  # an even share is 1
    among = by_block[..., 1:, 1:]
    columns = (among / among.sum(-1, keepdim=True)).sum(2).mean(1)
    ours = attention_of(random_encoder("vit_t4", 0, MEAN, STD), views)
    want = [(name, dirl.attention_bins(values[i])) for i in (0, 1) for name, values in (
        ("DINO: class token", row), ("DINO: aggregated", columns), ("Ours", ours))]
    rows = rows_of(Path("f.csv"))
    assert [row["network"] for row in rows] == [name for name, _ in want]
    for row, (_, bins) in zip(rows, want):
        assert [float(row[name]) for name in attention.BINS] == pytest.approx(bins, abs=0.011)
    refused(capsys, attention.main, argv, "dino.pth", "--arch")
    refused(capsys, attention.main, ["picture", "gone.png", *argv[2:], "--arch", "vit_t4"], "gone.png")
