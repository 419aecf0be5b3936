"""DSMILs that eval.py keeps, and eval.py predict on slides without labels."""
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from synthetic import arrays_of, refused, rows_of, untrained_run, write, write_one_px
from test_encoders import class_token_file

import eval as eval_py
import mil
from common import networks
from common.bags import DSMILSettings, read_bags, train_each, warn_of_few_slides, write_bag
from common.encoders import results_folder
from common.errors import InputError
from common.files import file_stamp, save_tensors

HOW = ["--slide-mpp", "1", "--tissue", "0.3", "--device", "cpu", "--workers", "1"]
RUN = Path("runs/labelled_vit_t4_dirl")
MEASURE = ["--data", "labelled", "--mpp", "2", *HOW, "--overlays", "1", "--epochs", "3", "--checkpoint",
           str(RUN)]
NEW = ["predict", "--data", "new", *HOW, "--checkpoint", str(RUN)]


@pytest.fixture(scope="module")
def made(ten, tmp_path_factory):
    """A run that eval.py measured on "labelled"; "new" holds its test slides alone, without labels."""
    place = tmp_path_factory.mktemp("predict")
    shutil.copytree(ten, place / "labelled")
    shutil.copytree(ten / "slides", place / "new", ignore=shutil.ignore_patterns("*_[012].png"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(Figure, "savefig", write_one_px)
        untrained_run(RUN, data="labelled", mpp=2.0)
        assert eval_py.main([*MEASURE, "--repeats", "2", "--standardize"]) == 0
    return place


@pytest.fixture
def measured(made, tmp_path, monkeypatch):
    """A copy of what was made, to work in."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "copy"))
    Path("datasets/labelled/source.json").unlink()  # as the message asks for of a copy


def test_slides_that_eval_has_not_seen_have_the_scores_of_the_table(measured, capsys):
    write(Path("new/broken.png"), "no image")
    assert eval_py.main(NEW) == 1
    out = capsys.readouterr().out
    assert "skipped: new/broken.png" in out and "1 files were skipped" in out
    folder = RUN / "on_new/predicted"
    assert f"Wrote {folder}/predictions.csv" in out and "QuPath" in out and "trained on" not in out
    table = {row["slide"]: row for row in rows_of(RUN / "predictions.csv")}
    got = {row["slide"]: row for row in rows_of(folder / "predictions.csv")}
    assert got.keys() == table.keys() == {f"{label}_{i}" for label in ("glands", "nests") for i in (3, 4)}
    for name, row in got.items():
        scores = {label: row[label] for label in ("glands", "nests")}
        assert scores == {label: table[name][label] for label in scores}  # to every printed digit
        assert row["predicted"] == max(scores, key=lambda label: float(scores[label]))
        assert row["tiles"] == "2" and (folder / f"{name}.png").stat().st_size > 10_000

    name = "nests_4"
    features = torch.from_numpy(arrays_of(RUN / f"on_new/features/{name}.npz")["features"])
    attention = []
    for seed in (0, 1):
        file = torch.load(RUN / f"dsmil_{seed}.pt", weights_only=True)
        assert file["classes"] == ["glands", "nests"] and file["in_dim"] == 64 and file["mpp"] == 2
        assert file["encoder"] == file_stamp(RUN / "encoder.pt")
        model = mil.DSMIL(64, 2)
        model.load_state_dict(file["dsmil"])
        attention.append(model((features - file["mean"]) / file["sd"])[2].detach().numpy())
    tiles = json.loads((folder / f"{name}.geojson").read_text())["features"]
    measured = [tile["properties"]["measurements"] for tile in tiles]
    of_nests = [values["DSMIL's attention for nests, even share 1"] for values in measured]
    np.testing.assert_allclose(of_nests, 2 * np.mean(attention, 0)[:, 1], rtol=1e-5)
    assert tiles[1]["geometry"]["coordinates"][0][0] == [448, 0]
    assert {tile["properties"]["objectType"] for tile in tiles} == {"tile"}


@pytest.mark.usefixtures("blank_figures")
def test_predicting_changes_no_result_and_names_what_was_trained_on(measured, capsys):
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    argv = ["predict", "--data", "labelled", *HOW, "--checkpoint", str(RUN)]
    assert eval_py.main(argv) == 0
    out = capsys.readouterr().out
    assert "warning: 6 of these slides are ones that DSMIL was trained on (glands_0, ..)" in out
    assert "the encoder was trained on" not in out
    assert {path: path.read_bytes() for path in before} == before
    table = {row["slide"]: row["nests"] for row in rows_of(RUN / "predictions.csv")}
    got = {row["slide"]: row["nests"] for row in rows_of(RUN / "predicted/predictions.csv")}
    assert len(got) == 10 and table.items() <= got.items()
    info = json.loads(Path("datasets/labelled/crops/2um/nests_0.json").read_text())
    untrained_run(RUN, data="labelled", images={"nests_0": info["file_hash"]})
    assert eval_py.main([*MEASURE, "--repeats", "1", "--seed", "4"]) == 0
    assert [path.name for path in RUN.glob("dsmil_*")] == ["dsmil_4.pt"]  # and none of before
    assert torch.load(RUN / "dsmil_4.pt", weights_only=True)["mean"] is None
    assert eval_py.main(argv) == 0
    assert "warning: 1 of these slides are ones that the encoder was trained on (nests_0" in (
        capsys.readouterr().out)


@pytest.mark.usefixtures("blank_figures")
def test_results_at_another_um_px_have_their_own_folder_and_predict_takes_dsmils_tissue(measured, capsys):
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    argv = [*MEASURE, "--mpp", "1", "--tissue", "0.2", "--repeats", "1"]
    assert eval_py.main(argv) == 0
    assert {path: path.read_bytes() for path in before} == before
    at_1 = RUN / "on_labelled_1um"
    assert (at_1 / "features/nests_4.npz").is_file()
    config = json.loads((at_1 / "config.json").read_text())
    assert config["data"] == "labelled" and config["measured_at"] == 1
    out = capsys.readouterr().out
    assert out.endswith(f"--checkpoint {RUN}/encoder.pt --dsmil {at_1}\n")
    argv = ["predict", "--data", "new", "--slide-mpp", "1", "--device", "cpu", "--workers", "1"]
    assert eval_py.main([*argv, "--checkpoint", str(RUN), "--dsmil", str(at_1)]) == 0
    assert "tiles at 1 um/px with 0.2 tissue or more" in capsys.readouterr().out
    tiles = json.loads(Path("datasets/new/crops/1um/nests_4.json").read_text())
    assert tiles["tissue"] == 0.2 and (RUN / "on_new_1um/predicted/nests_4.png").is_file()


@pytest.mark.usefixtures("blank_figures")
def test_a_picture_that_does_not_fit_into_memory_costs_its_own_slide(measured, monkeypatch, capsys):
    draw = eval_py.picture_of

    def full(found, name, pixels):
        if name == "nests_3":
            raise MemoryError
        return draw(found, name, pixels)
    monkeypatch.setattr(eval_py, "picture_of", full)
    assert eval_py.main(NEW) == 1
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped:")]
    assert skipped == ["skipped: nests_3: out of memory while reading it"]
    assert not (RUN / "on_new/predicted/nests_3.png").exists()
    assert len(rows_of(RUN / "on_new/predicted/predictions.csv")) == 4


@pytest.mark.usefixtures("blank_figures")
def test_dsmils_that_do_not_fit_are_refused_in_one_line(measured, capsys):
    kept = RUN / "dsmil_1.pt"
    for other, says in (({"classes": ["a", "b"]}, "has other classes"), ({"in_dim": 7}, "is no DSMIL"),
                        ({"mean": 3}, "is no DSMIL"), ({"encoder": "0"}, "was trained on features of")):
        good = torch.load(kept, weights_only=True)
        save_tensors(kept, good | other)
        refused(capsys, eval_py.main, NEW, f"{kept}: {says}", "eval.py")
        save_tensors(kept, good)
    class_token_file(Path("elsewhere/dino.pth"))
    weights = ["--checkpoint", "elsewhere/dino.pth", "--arch", "vit_t4"]
    refused(capsys, eval_py.main, [*NEW[:-2], *weights], "--dsmil: name the folder")
    refused(capsys, eval_py.main, [*NEW[:-2], *weights, "--dsmil", str(RUN)], "another encoder than")
    assert eval_py.main([*MEASURE[:-2], *weights, "--repeats", "1"]) == 0
    refused(capsys, eval_py.main, [*MEASURE[:-2], *weights, "--mpp", "1"], "at another um/px; rename")
    assert eval_py.main([*NEW[:-2], *weights, "--dsmil", "runs/labelled_dino"]) == 0
    assert len(rows_of(Path("runs/new_dino/predicted/predictions.csv"))) == 4
    untrained_run(RUN, data="labelled", seed=1)  # trained again since
    refused(capsys, eval_py.main, NEW, "dsmil_0.pt", f"another encoder than {RUN}/encoder.pt")
    for path in RUN.glob("dsmil_*"):
        path.unlink()
    refused(capsys, eval_py.main, NEW, f"{RUN}: has no dsmil_<seed>.pt; first: python eval.py")
    refused(capsys, eval_py.main, ["predict"], "--data", "predict --help")


def test_the_command_to_predict_names_where_the_dsmils_are():
    start = "python eval.py predict --data FOLDER --checkpoint r/encoder.pt"
    path, about = Path("r/encoder.pt"), {"data": "bright3"}
    for data, arch, more in ("bright3", None, ""), ("bright6", "vit_s", " --arch vit_s --dsmil r/on_bright6"):
        network = SimpleNamespace(about=about, path=path, folder=results_folder(path, about, data))
        assert networks.next_command(network, arch) == start + more
    about = {"data": None, "method": "w"}
    network = SimpleNamespace(about=about, path=Path("w.pth"), folder=Path("runs/lung_w"))
    assert networks.next_command(network, "vit_s").endswith(
        "w.pth --arch vit_s --dsmil runs/lung_w")


def test_dsmil_is_trained_with_the_settings(tmp_path):
    """The weights, to the bit, of mil.train_dsmil called with the same values; the result can be pickled."""
    bags = {split: [(torch.randn(5, 8), label) for label in (0, 0, 1)] for split in ("train", "val", "test")}
    slides = []
    for split, of_split in bags.items():
        for i, (features, label) in enumerate(of_split):
            write_bag(tmp_path, f"{split}{i}", features.numpy(), np.zeros((5, 2)), "stamp")
            slides.append((f"{split}{i}", split, label))
    settings = DSMILSettings(range(3, 5), epochs=2, lr=1e-2, weight_decay=1e-3, standardize=False,
                             class_weights=True)
    trained = dict(train_each([tmp_path], tuple(slides), 2, settings, "cpu", workers=1))[tmp_path]
    assert list(trained) == [3, 4]
    trained = pickle.loads(pickle.dumps(trained))
    for seed, (arrays, _, scores, attention) in trained.items():
        same = mil.train_dsmil(bags["train"], bags["val"], 2, epochs=2, lr=1e-2, weight_decay=1e-3, seed=seed,
                               weights=mil.class_weights([0, 0, 1], 2))
        assert all(map(np.array_equal, arrays.values(), same.state_dict().values()))
        for (features, label), row, weights in zip(bags["test"], scores, attention):
            assert np.array_equal(row, mil.dsmil_predict(same, features))
            assert np.array_equal(weights, same(features)[2].detach()[:, label])
    with pytest.raises(InputError, match="train0.npz: was made from another encoder"):
        read_bags(tmp_path, ["train0"], __file__)


@pytest.mark.parametrize("change", [{}, {"lr": 2e-4}, {"weight_decay": 5e-2}, {"standardize": False}])
def test_few_slides_are_warned_of_unless_every_setting_is_for_few(capsys, change):
    for_few = {"lr": 2e-3, "weight_decay": 5e-3, "standardize": True}
    settings = DSMILSettings(range(1), epochs=1, class_weights=False, **(for_few | change))
    warn_of_few_slides(99, settings)
    assert capsys.readouterr().out.startswith("warning: 99 training slides") == bool(change)
    warn_of_few_slides(100, settings)
    assert capsys.readouterr().out == ""
