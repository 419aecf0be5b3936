"""Encoders of other programs, and where eval.py keeps the results of several encoders and data sets."""
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from synthetic import D, arrays_of, refused, rows_of, saved, tissue, write, write_table
from test_eval import TINY, make_folder, run_folder
from tiny_flags import CPU, SET

import eval as eval_py
from common.encoders import MEAN, STD, attention_of, normalize, open_encoder, random_encoder, save_encoder
from common.errors import InputError
from common.files import save_tensors
from experiments import table

pytestmark = pytest.mark.usefixtures("alone", "blank_figures")


# ---------------------------------------------------------------- weights of other programs

def class_token_file(path, seed=0, depth=4, **more):
    """Writes what DINO publishes, a ViT's state dict with a class token, of random weights; returns it."""
    state = random_encoder("vit_t4", seed, MEAN, STD, depth).state_dict()
    generator = torch.Generator().manual_seed(seed)
    state["cls_token"] = torch.randn(1, 1, D, generator=generator)
    state["pos_embed"] = torch.randn(1, 197, D, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, state | more)
    return state


def by_hand(state, images, depth=4, heads=2):
    """The class token (B, d) and the last attention (B, heads, n + 1, n + 1), step by step."""
    def norm(x, name):
        return F.layer_norm(x, (D,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])
    name = "patch_embed.proj"
    patches = F.conv2d(images, state[f"{name}.weight"], state[f"{name}.bias"], stride=16)
    patches = patches.flatten(2).transpose(1, 2)
    B = len(images)
    x = torch.cat([state["cls_token"].expand(B, 1, D), patches], 1) + state["pos_embed"]
    for block in range(depth):
        qkv = linear(norm(x, f"blocks.{block}.norm1"), f"blocks.{block}.attn.qkv")
        q, k, v = qkv.view(B, 197, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(2, 3) / (D / heads) ** 0.5).softmax(-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), f"blocks.{block}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"blocks.{block}.norm2"), f"blocks.{block}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{block}.mlp.fc2")
    return norm(x, "norm")[:, 0], attention


@torch.no_grad()
def test_the_class_token_of_other_programs_weights_is_f(tmp_path, capsys):
    images = torch.randint(0, 256, (2, 3, 224, 224)).byte()
    state = class_token_file(tmp_path / "dino small.pth")
    encoder, about = open_encoder(tmp_path / "dino small.pth", "vit_t4")
    token, attention = by_hand(state, normalize(images / 255, MEAN, STD))
    torch.testing.assert_close(encoder(normalize(images / 255, MEAN, STD)), token[:, None], atol=1e-4, rtol=0)
    among = attention[..., 1:, 1:]
    shares = among / among.sum(-1, keepdim=True)
    torch.testing.assert_close(attention_of(encoder, images), shares.sum(2).mean(1), atol=1e-3, rtol=0)
    row = attention[..., 0, 1:]
    row_seen = encoder.class_attention(normalize(images / 255, MEAN, STD))
    torch.testing.assert_close(row_seen, row / row.sum(-1, keepdim=True), atol=1e-5, rtol=0)
    assert (about["method"], about["arch"], about["data"]) == ("dino_small", "vit_t4", None)
    out = capsys.readouterr().out
    assert "ignored" not in out and "does not record what it was trained on" in out

    timms = random_encoder("vit_t4", 1, MEAN, STD)  # without a class token: f is the mean of the tokens
    save_tensors(tmp_path / "timm.pth", timms.state_dict())
    encoder, _ = open_encoder(tmp_path / "timm.pth", "vit_t4")
    assert torch.equal(encoder(images / 255), timms(images / 255))
    outside = state["pos_embed"][:, 1:]  # of the patches alone, as in DeiT III
    save_tensors(tmp_path / "deit3.pth", {"model": state | {"pos_embed": outside}})
    encoder, _ = open_encoder(tmp_path / "deit3.pth", "vit_t4")
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, D), outside], 1)
    token, _ = by_hand(state, images / 255)
    torch.testing.assert_close(encoder(images / 255)[:, 0], token, atol=1e-4, rtol=0)


@pytest.mark.parametrize("content, says", [
    ({}, "does not fit --arch"), ([], "holds no state dict"), ({"cls_token": torch.zeros(2)}, "does not fit"),
    ({"pos_embed": torch.zeros(1, 197, D), "cls_token": torch.zeros(1, 1, 9)}, "does not fit --arch")])
def test_a_file_that_is_no_encoder_is_refused(tmp_path, content, says):
    save_tensors(tmp_path / "w.pth", content)
    with pytest.raises(InputError, match=f"w.pth: {says}"):
        open_encoder(tmp_path / "w.pth", "vit_t4")


@pytest.mark.parametrize("name", ["blocks.0.ls1.gamma", "blocks.3.attn.q_norm.weight", "blocks.4.norm1.bias",
                                  "reg_token", "dist_token", "attn_pool.q.weight"])
def test_weights_that_make_other_features_are_refused(tmp_path, name):
    class_token_file(tmp_path / "w.pth", **{name: torch.ones(D)})
    with pytest.raises(InputError, match=f"w.pth: has {name}"):
        open_encoder(tmp_path / "w.pth", "vit_t4")


def test_the_mean_and_std_of_a_file_are_taken(tmp_path):
    own = random_encoder("vit_t4", 0, MEAN, STD).state_dict()
    scale = {"mean": [0.5, 0.6, 0.7], "std": [0.1, 0.2, 0.3]}
    for weights in (own, class_token_file(tmp_path / "w.pth")):
        save_tensors(tmp_path / "w.pth", {"encoder": weights, **scale})
        encoder, _ = open_encoder(tmp_path / "w.pth", "vit_t4")
        assert encoder.mean == (0.5, 0.6, 0.7) and encoder.std == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("scale", [{"mean": "x"}, {"mean": [1.0]}, {"std": None}, {"std": [0, 0, 0]},
                                   {"mean": [float("nan")] * 3}])
def test_a_damaged_mean_or_std_is_refused(tmp_path, scale):
    own = random_encoder("vit_t4", 0, MEAN, STD).state_dict()
    save_tensors(tmp_path / "w.pth", {"encoder": own, **scale})
    with pytest.raises(InputError, match="w.pth: its mean and std"):
        open_encoder(tmp_path / "w.pth", "vit_t4")


def test_imagenets_features_are_next_to_ours(folder, capsys):
    argv = ["slides", *SET, "--repeats", "2", "--epochs", "2", "--overlays", "1", "--checkpoint"]
    run = run_folder("runs/tiny_set_vit_t4_dirl")
    write(run / "config.json", {"data": "tiny_set", "arch": "vit_t4", "method": "dirl", "epochs": 9})
    assert eval_py.main([*argv, str(run)]) == 0
    ours = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    state = class_token_file(Path("elsewhere/dino.pth"))
    capsys.readouterr()
    more = ["--compare", str(run), "--export", "clam"]
    assert eval_py.main([*argv, "elsewhere/dino.pth", "--arch", "vit_t4", *more]) == 0
    assert "elsewhere/dino.pth: dino vit_t4, trained elsewhere" in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in ours.items())
    assert [path.name for path in Path("elsewhere").iterdir()] == ["dino.pth"]
    tile = np.array(Image.open("datasets/tiny_set/crops/2um/nests_3/0_0.jpg"))
    tile = normalize(torch.from_numpy(tile).permute(2, 0, 1)[None] / 255, MEAN, STD)
    features = arrays_of(Path("runs/tiny_set_dino/features/nests_3.npz"))["features"]
    np.testing.assert_allclose(features, by_hand(state, tile)[0], atol=1e-3)
    exported = torch.load("runs/tiny_set_dino/clam/pt_files/nests_3.pt", weights_only=True)
    assert np.array_equal(exported, features)  # not those of the network that comes first in the table

    make_folder()
    argv_patches = ["patches", "--data", "given", "--linear", *TINY, "--checkpoint"]
    assert eval_py.main([*argv_patches, "elsewhere/dino.pth", "--arch", "vit_t4"]) == 0
    assert {row["encoder"] for row in rows_of(Path("runs/given_dino/patches.csv"))} == {"given_dino"}
    assert table.main(["runs"]) == 0
    lines = Path("runs/table.md").read_text().replace("*", "").splitlines()
    assert lines[0] == "|  | given, linear accuracy | given, linear AUC | tiny_set accuracy | tiny_set AUC |"
    cells = {line.split("|")[1].strip(): [cell.strip() != "" for cell in line.split("|")[2:-1]]
             for line in lines[2:] if line}
    assert cells == {"DiRL-T4": [False, False, True, True], "dino-T4": [True] * 4}

    class_token_file(Path("another/dino.pth"), seed=1)
    argv_another = [*argv, "another/dino.pth", "--arch", "vit_t4"]
    refused(capsys, eval_py.main, argv_another, "rename", "another/dino.pth")
    refused(capsys, eval_py.main, [*argv, "elsewhere/dino.pth"], "not an encoder.pt", "--arch")
    refused(capsys, eval_py.main, [*argv, str(run), "--arch", "vit_s"], "--arch vit_s", "is a vit_t4")


# ---------------------------------------------------------------- several data sets, several encoders

@pytest.fixture
def bright():
    """datasets/bright: a slide of each of BRIGHT's classes for training, validation and test."""
    rows = []
    for i, label in enumerate(("PB", "UDH", "FEA", "ADH", "DCIS", "IC")):
        for split in ("train", "valid", "test"):
            name = f"{label}_{split}"
            saved(Path(f"datasets/bright/slides/{name}.png"), array=tissue(224, seed=len(rows)) - 10 * i)
            rows.append(f"{name},{label},{split}")
    write_table(Path("datasets/bright/labels.csv"), "slide,label,split", rows)


def test_one_pretraining_serves_both_tasks_of_bright(bright, capsys):
    run = Path("runs/bright3_vit_t4_dirl")
    about = {"arch": "vit_t4", "method": "dirl", "data": "bright3", "mpp": 1.0,
             "trained_on": {"data": "bright", "images": {}, "patients": []}}
    save_encoder(run / "encoder.pt", random_encoder("vit_t4", 0, MEAN, STD), step=60, **about)
    save_encoder(run / "encoder_2.pt", random_encoder("vit_t4", 1, MEAN, STD), step=40, **about)
    write(run / "config.json", {"data": "bright3", "arch": "vit_t4", "method": "dirl", "seed": 0})
    argv = ["--slide-mpp", "1", "--tissue", "0.1", *CPU, "--repeats", "2", "--epochs", "1", "--overlays", "1"]
    assert eval_py.main(["--data", "bright3", *argv]) == 0
    first = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file()}
    assert eval_py.main(["--data", "bright6", *argv, "--checkpoint", str(run), "--compare", "random"]) == 0
    for name in ("encoder_2.pt", "encoder.pt"):
        assert eval_py.main(["--data", "bright3", *argv, "--checkpoint", str(run / name)]) == 0
        now = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file()}
        assert first.items() <= now.items()  # features, too: both tasks have the same slides
        first = now
    scores = {name: rows_of(run / name / "predictions.csv")[0] for name in (".", "on_bright6", "encoder_2")}
    assert [len(row) - 2 for row in scores.values()] == [3, 6, 3] and scores["."] != scores["encoder_2"]
    assert {path.parent.parent.name for path in run.rglob("features/*.npz")} == {
        "bright3_vit_t4_dirl", "random_start", "encoder_2"}
    tables = {path.parent.relative_to(run).as_posix() for path in run.rglob("slides.csv")}
    assert tables == {".", "encoder_2", "on_bright6", "on_bright6/random_start"}

    assert table.main(["runs", "--measures", "accuracy", "middle"]) == 0
    lines = Path("runs/table.md").read_text().replace("*", "").splitlines()
    assert lines[0].count("bright3 accuracy") == lines[0].count("bright6 accuracy") == 1
    labels = [line.split("|")[1].strip() for line in lines[2:] if line.startswith("|")]
    assert labels == ["DiRL-T4", "DiRL-T4, checkpoint encoder_2"]
    rows = {(row["network"], row["data"], row["measure"]): row for row in rows_of(Path("runs/table.csv"))}
    for data, folder in (("bright3", run), ("bright6", run / "on_bright6")):
        accuracies = [float(row["accuracy"]) for row in rows_of(folder / "slides.csv")]
        row = rows["DiRL-T4", data, "accuracy"]
        assert float(row["mean"]) == pytest.approx(np.mean(accuracies), abs=1e-4) and row["repeats"] == "2"
