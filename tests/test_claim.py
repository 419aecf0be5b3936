"""The study of the claim: bags, measures, and the script for real at a tiny size, stopped and resumed."""
import hashlib
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from synthetic import SmallHead, arrays_of, refused, rows_of, saved, times, tissue, write, write_table

import dirl
import train
from common import metrics
from common.encoders import MEAN, STD, RegisterViT, inputs_of, load_encoder, normalize, random_encoder
from common.figures import draw_distribution
from common.files import file_stamp, load_tensors, read_json
from common.log import is_finished
from common.neighbors import nearest
from data import Crops
from experiments import lc25000, measures, show, study
from wsi.splits import find_data

pytestmark = pytest.mark.usefixtures("blank_figures")

TINY = ["--mpp", "0.5", "--batch", "8", "--out-dim", "16", "--disentangled-dim", "8", "--epochs", "2",
        "--global-size", "32", "--local-size", "16", "--local-crops", "1", "--probe-images", "24",
        "--workers", "1", "--device", "cpu"]
RUN = ["claim", "--data", "c", "--arch", "vit_t4", *TINY]


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """3 classes of 10 source tiles of 2 crops, nuclei as dark discs; 6 source tiles of each are to train."""
    folder, rng, rows = tmp_path_factory.mktemp("crops"), np.random.default_rng(0), []
    y, x = np.mgrid[:224, :224]
    for k in range(3):
        for tile in range(10):
            for copy in range(2):
                image = np.float64((235, 180 + 15 * k, 215)) + rng.normal(0, 6, (224, 224, 1))
                for cx, cy in rng.uniform(10, 150, (12, 2)):  # none on the right and below
                    image[(x - cx) ** 2 + (y - cy) ** 2 < 36] = (90, 50, 140)
                name, split = f"class{k}/{tile}_{copy}.png", "train" if tile < 6 else "test"
                saved(folder / name, array=image.clip(0, 255).astype(np.uint8))
                rows.append(f"{name},class{k},{split},{k}_{tile}")
    write_table(folder / "labels.csv", "image,label,split,source_tile", rows)
    return folder


@pytest.fixture
def here(tmp_path, crops, monkeypatch):
    """An empty folder to work in, with a copy of the crops as "c"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dirl, "DINOHead", SmallHead)
    monkeypatch.setattr(metrics, "DRAWS", 50)
    monkeypatch.setattr(measures, "DSMIL_EPOCHS", 3)
    shutil.copytree(crops, tmp_path / "c")
    return tmp_path


def test_bags_hold_whole_groups_of_one_class_and_no_tile_twice():
    rng = np.random.default_rng(0)
    groups = np.array([f"g{g}" for g in rng.integers(0, 40, 300)])
    labels = np.array([int(g[1:]) % 3 for g in groups])
    part = np.flatnonzero(rng.random(300) < 0.7)
    bags = measures.make_bags(part, labels, groups, 4, seed=1)
    taken = np.concatenate([index for index, _ in bags])
    assert len(taken) == len(set(taken)) and set(taken) <= set(part)
    for index, label in bags:
        names = set(groups[index])
        assert len(names) == 4 and set(labels[index]) == {label}
        assert set(index) == {i for i in part if groups[i] in names}  # whole
    for label in range(3):
        there = len({g for g, own in zip(groups[part], labels[part]) if own == label})
        assert sum(own == label for _, own in bags) == there // 4


def test_nearest_is_brute_force_by_cosine():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 5)), rng.integers(0, 3, 60)
    scores = nearest(features[:40], labels[:40], features[40:], 4)  # of class 3 there is none
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for i in range(20):
        near = np.argsort(-(unit[:40] @ unit[40 + i]))[:20]
        np.testing.assert_allclose(scores[i], [(labels[near] == c).mean() for c in range(4)])


def statistics_of(scores, truth, groups, pair=None, classes=2):
    file = {"labels": truth, "classes": np.array([f"c{i}" for i in range(classes)]), "x": scores, "stamp": "",
            "groups": groups, "attention": np.tile(np.float32([0.4, 0.5, 2, 2.5]), (len(truth), 1))}
    return measures.statistics(file, measures.draws_of(groups), pair)


def test_statistics_are_means_over_folds_and_draws_take_whole_groups():
    truth, groups = np.array([0, 0, 1, 1] * 10), np.repeat(np.arange(20), 2)
    right, wrong = np.eye(2)[truth], np.eye(2)[1 - truth]
    out = statistics_of(np.stack([right, right, right, wrong]), truth, groups)
    assert out["accuracy, x"][0] == 0.75 and out["AUC, x"][0] == 0.75  # an ensemble of the four would have 1
    for index in measures.draws_of(groups)[1:]:
        count = np.bincount(index, minlength=40)
        assert (count[::2] == count[1::2]).all() and len(index) == 40
    rng = np.random.default_rng(0)
    scores = rng.random((1, 40, 2))
    out = statistics_of(scores, truth, groups)
    hits = (scores[0].argmax(1) == truth)
    want = [hits[index].mean() for index in measures.draws_of(groups)]
    np.testing.assert_allclose(out["accuracy, x"], want)
    assert len(want) == 1 + metrics.DRAWS
    assert [out[name][3] for name in measures.BINS] == [0.25, 0.5, 0.25]
    assert out[measures.SPREAD][3] == pytest.approx(np.std([0.4, 0.5, 2, 2.5], ddof=1))


def test_a_pair_is_told_apart_by_the_ratio_of_its_two_scores():
    truth = np.array([0, 1, 0, 1, 2, 2])
    scores = np.array([[[.4, .3, .3], [.05, .1, .85], [.02, .01, .97], [.3, .6, .1], [0, 0, 1], [0, 0, 1]]])
    out = statistics_of(scores, truth, np.arange(6), ("c0", "c1"), 3)
    assert out["accuracy, x, c0 against c1"][0] == 1 and out["AUC, x, c0 against c1"][0] == 1


def test_a_patch_is_white_if_it_has_no_cell_and_is_nearly_as_green_as_the_brightest():
    green = torch.tensor([[240., 212, 210], [240, 100, 30], [0, 0, 0]])  # 0.88 x 240 = 211.2
    images = torch.stack([255 - green, green, 255 - green]).kron(torch.ones(1, 16, 16)).to(torch.uint8)[None]
    priors = np.zeros((1, 9))
    priors[0, [3, 4]] = 1
    names = [measures.KINDS[kind] for kind in measures.kinds_of(images, priors)[0]]
    assert names == ["white", "white", "background", "cell", "cell"] + 4 * ["background"]


def test_norms_are_of_the_patches_tokens_before_the_closing_layer_norm():
    plain = random_encoder("vit_t4", 0, MEAN, STD)
    patches = SimpleNamespace(images=torch.randint(0, 256, (3, 3, 64, 48), dtype=torch.uint8),
                              test=[2, 0], kinds=np.zeros((2, 12)))
    for encoder in (plain, RegisterViT(plain, 4)):
        found = measures.norms(encoder, None, patches)
        for norms, i in zip(found, patches.test):
            tokens = encoder.embed(inputs_of(encoder, patches.images[i: i + 1]))
            for block in encoder.blocks:
                tokens = block(tokens)
            want = [sum(x * x for x in token.tolist()) ** 0.5 for token in tokens[0, -12:]]
            np.testing.assert_allclose(norms, want, rtol=1e-4)


def test_what_registers_draw():
    encoder = RegisterViT(random_encoder("vit_t4", 0, MEAN, STD), 3)
    torch.nn.init.normal_(encoder.reg_token)
    patches = SimpleNamespace(images=torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8), test=[0, 1])
    last, (share, _) = encoder.blocks[-1], measures.on_registers(encoder, None, patches)
    tokens = encoder.blocks[:-1](encoder.embed(inputs_of(encoder, patches.images[:1])))
    q, k, _ = last.attn.qkv(last.norm1(tokens))[0].view(9, 3, 2, 32).unbind(1)  # 3 registers, 6 patches
    drawn = [(q[i, head] @ k[:, head].t() / 32 ** 0.5).softmax(-1)[:3].sum().item()
             for head in range(2) for i in range(3, 9)]
    assert share == pytest.approx(sum(drawn) / 12, rel=1e-4)


def test_where_attention_goes_is_a_mean_over_patches():
    file = {"attention": np.array([[3., 1, 0], [2, 2, 1]]), "norms": np.array([[5., 6, 7], [8, 9, 1]]),
            "kinds": np.array([[0, 1, 1], [0, 0, -1]]), "on registers": np.array([0.2, 0.6])}
    out = measures.place_statistics(file, [np.array([0, 1]), np.array([1, 1]), np.array([0, 0])])
    assert list(out) == ["even shares on cell patches", "even shares on background patches",
                         "norm of tokens on cell patches", "norm of tokens on background patches",
                         "share of attention on registers"]
    np.testing.assert_allclose(out["even shares on cell patches"], [7 / 3, 2, 3])
    np.testing.assert_allclose(out["norm of tokens on background patches"], [6.5, np.nan, 6.5])
    np.testing.assert_allclose(out["share of attention on registers"], [0.4, 0.6, 0.2])


def test_probes_are_compared_at_equal_steps_and_seeds():
    curves = {("baseline", 0): {4: (0, 0.5, 0, 0.7), 8: (0, 0.4, 0, 0.8)}, ("baseline", 1): {},
              ("dirl", 0): {4: (0, 0.9, 0, 0.75), 6: (0, 1, 0, 1)}, ("dirl", 1): {4: (0, 0.7, 0, 0.6)}}
    assert show.by_steps(curves, 1) == {
        "4 steps": [{"baseline": (0.5,), "dirl": (0.9,)}, {"dirl": (0.7,)}],
        "6 steps": [{"dirl": (1,)}, {}], "8 steps": [{"baseline": (0.4,)}, {}]}
    minus = show.minus_baseline(curves, {})
    assert minus.keys() == {("dirl", 0), ("dirl", 1)} and not minus["dirl", 1]
    assert minus["dirl", 0].keys() == {4} and minus["dirl", 0][4][1::2] == pytest.approx([0.4, 0.05])


def test_the_map_has_a_line_per_measured_run():
    axis, curve = Figure().subplots(), {4: (0, 0.5, 0, 0.7), 8: (0, 0.4, 0, 0.8)}
    start = {"accuracy, 20-NN": [0.6], show.MIDDLE: [1]}
    curves = {("random", 0): {}, ("dirl", 0): curve, ("dirl", 1): {4: (0, 0.9, 0, 0.75)}, ("dirl", 2): curve}
    runs = {("random", 0): start, ("dirl", 0): {}, ("dirl", 1): {}}  # the run of seed 2 is still training
    show.draw_map(axis, runs, curves, {"random": "grey", "dirl": "red"})
    drawn = [line.get_xydata().tolist() for line in axis.get_lines()]
    assert drawn == [[[0.6, 100]], [[0.7, 50], [0.8, 40]], [[0.8, 40]], [[0.75, 90]], [[0.75, 90]]]
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["random (all test images)", "dirl"]


def test_cells_of_the_table():
    a, b = np.array([0.5, 0.4, 0.6]), np.array([0.7, 0.8, 0.6])
    assert show.cell([a], 1) == "0.500 (0.405 to 0.595)"
    assert show.cell([a, b], 2) == "0.600 ± 0.141 (0.600 to 0.600)"
    assert show.cell([[0.5]], 3) == "0.500 [1 of 3 seeds]"


def test_fig_4_is_a_histogram_with_the_middle_bins_share():
    axis = Figure().subplots()
    values = np.float32([0.01, 0.5, 1, 2, 2.1, 40, 0.4, 1])
    draw_distribution(axis, {"a": values, "b": np.ones((3, 4), np.float32)}, {"a": "red"})
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a: 50.0%", "b: 100.0%"]
    heights = axis.patches[0].get_xy()[:, 1]
    assert heights[1:-1:2].sum() == pytest.approx(100)  # all are drawn, those beyond the axis at its ends
    assert heights.max() == pytest.approx(25)
    assert axis.patches[0].get_edgecolor()[:3] == (1, 0, 0)


def test_arms_are_compared_with_their_own_baseline(here, capsys):
    out, scores = here / "runs" / "claim", np.eye(2)[[0, 1] * 10]
    for arm, level in (("baseline", 0.0), ("two_views", 4.0), ("baseline_two_views", 1.0)):
        folder = out / f"{arm}_seed0"
        encoder = write(folder / "encoder.pt", "x")
        attention = np.full((20, 196), level, np.float32)
        np.savez(folder / "claim.npz", stamp=file_stamp(encoder), classes=["a", "b"], labels=[0, 1] * 10,
                 groups=np.arange(20), attention=attention, **{"20-NN": scores[None]})
    rows = ["0,0,1,,,,", "1,0,1,0,0.5,0.5,0.75"]
    write_table(out / "baseline_seed1" / "log.csv", f"step,epoch,loss,{','.join(show.PROBED)}", rows)
    assert study.main(["show"]) == 0
    printed = capsys.readouterr().out
    assert ("not measured yet: baseline, seed 1 (2 steps trained); two_views, seed 1 (0 steps trained); "
            "baseline_two_views, seed 1 (0 steps trained)") in printed
    assert "probe: 20-NN accuracy  2 steps\nbaseline               0.750 [1 of 2 seeds]" in printed
    assert ["baseline", "1", "probe at 2 steps: 20-NN accuracy", "0.75", "", ""] in [
        list(row.values()) for row in rows_of(out / "claim.csv")]
    minus = printed.split("minus baseline, same seeds")[1]
    assert "two_views minus baseline_two_views" in minus
    line = next(line for line in minus.splitlines() if line.startswith("tokens with attention 0.5 to 2"))
    assert line.split("  ")[-1].strip() == "-1.000 (-1.000 to -1.000)"  # 0 against 1; the other has 0 too
    write(out / "baseline_seed0" / "claim.npz", "x")
    refused(capsys, study.main, ["show"], "baseline_seed0/claim.npz: cannot be read")
    write(out / "other_seed0" / "claim.npz", "x")
    refused(capsys, study.main, ["show"], "other_seed0: is no arm")


def test_the_study_runs_stops_resumes_and_shows(here, capfd):
    argv = [*RUN, "--folds", "2", "--bag-groups", "1", "--bag-seeds", "1", "--probe-epochs", "2"]
    three = [*argv, "--arms", "baseline", "cellback", "random"]
    assert study.main([*three, "--max-steps", "3"]) == 130
    out = here / "runs" / "claim"
    assert not (out / "baseline_seed0" / "claim.npz").exists() and not is_finished(out / "baseline_seed0")
    assert {arm for arm, _ in show.find_runs(out, list(study.ARMS))} == {"baseline", "cellback", "random"}
    assert study.main(three) == 0
    made = times(out, "claim.npz")
    assert len(made) == 3 and is_finished(out / "baseline_seed0")
    (out / "baseline_seed0" / "checkpoint.pt").unlink()  # large, and not needed any more
    assert study.main(three) == 0
    assert times(out, "claim.npz") == made  # nothing is trained or measured twice
    more = ["--tune-epochs", "1", "--tune-folds", "1", "--bag-groups", "2", "--bag-seeds", "0"]
    assert study.main([*argv, "--arms", "random", *more]) == 0  # one measure more is added to those there
    capfd.readouterr()
    assert study.main([*three, "--epochs", "3"]) == 2 and "epochs 2 (now 3)" in capfd.readouterr().err
    a, b = (read_json(out / f"{arm}_seed0" / "config.json") for arm in ("baseline", "cellback"))
    assert {name for name in a if a[name] != b[name]} == {"method", "places"}  # places: of the cells

    right = check_measures(out)
    pair = ["--pair", "class0", "class2"]
    assert study.main(["show", *pair]) == 0
    printed = capfd.readouterr().out
    for words in ("random, seed 0", "a network that has learned nothing has 1.000", "probe: 20-NN accuracy",
                  "class0 against class2", "arm minus baseline", "f_c", "even shares on white patches"):
        assert words in printed
    rows = rows_of(out / "claim.csv")
    assert {row["arm"] for row in rows} == {"random", "baseline", "cellback"}
    measure = ("baseline", "accuracy, logistic regression, 2 folds")
    value, = (float(row["value"]) for row in rows if (row["arm"], row["measure"]) == measure)
    assert value == pytest.approx(right.mean(), abs=1e-4)
    assert (out / "claim.png").read_bytes()[:4] == b"\x89PNG"
    points = show.probe_curve(out / "cellback_seed0")
    assert list(points) == [8] and all(sum(p[:3]) == pytest.approx(1, abs=1e-3) for p in points.values())
    write(out / "random_seed0" / "encoder.pt", "another")
    assert study.main(["show"]) == 0 and "skipped: " in capfd.readouterr().out


def test_every_arm_is_normalized_by_the_same_statistics(here, capfd):
    argv = [*RUN, "--folds", "2", "--bag-seeds", "0", "--stats", "data", "--epochs", "1", "--arms"]
    assert study.main([*argv, "random", "baseline", "registers"]) == 0
    out = here / "runs" / "claim"
    measured = arrays_of(out / "registers_seed0" / "claim.npz")
    assert measured["on registers"] == pytest.approx(4 / 200, abs=0.002)  # hardly trained: even
    np.testing.assert_allclose(measured["attention"].sum(1), 196, rtol=1e-4)
    random, baseline = (load_tensors(out / f"{arm}_seed0" / "encoder.pt") for arm in ("random", "baseline"))
    images = [np.array(Image.open(image)) for image in here.glob("c/class*/[0-5]_*.png")]  # those to train
    pixels = np.stack(images).reshape(-1, 3) / 255
    np.testing.assert_allclose((random["mean"], random["std"]), (pixels.mean(0), pixels.std(0)), atol=1e-4)
    assert (random["mean"], random["std"]) == (baseline["mean"], baseline["std"])


def check_measures(out):
    """What is in claim.npz; gives where the folds of the logistic regression of the baseline are right."""
    rows, random = (arrays_of(out / f"{arm}_seed0" / "claim.npz") for arm in ("baseline", "random"))
    found = find_data("c", 0.5)
    first = next(name for name in found.images if found.labels[name]["split"] == "test")
    image = torch.from_numpy(np.array(Image.open(found.images[first]))).permute(2, 0, 1)[None].float()
    small = image[:, :, 3::7, 3::7]  # bilinear at a seventh takes the middle px of seven
    encoder, _ = load_encoder(out / "baseline_seed0" / "encoder.pt")
    with torch.no_grad():
        want = encoder.last_attention(normalize(small / 255, MEAN, STD)).sum(2).mean(1)[0]
    assert rows["attention"].shape == (24, 196) and rows["attention at 32 px"].shape == (24, 4)
    np.testing.assert_allclose(rows["attention at 32 px"][0], want, rtol=2e-3)
    np.testing.assert_allclose(rows["attention"].sum(1), 196, rtol=1e-4)
    assert rows["20-NN"].shape == (1, 24, 3)
    has_cell = Crops(found, [name for name in found.images if found.labels[name]["split"] == "test"]).priors()
    assert np.array_equal(rows["kinds"] == 0, has_cell == 1) and np.bincount(rows["kinds"].flat).min() > 100
    bags, tuned = "DSMIL on synthetic slides of 1, 1 seeds", "fine-tuned 1 epochs, 1 of 2 folds"
    assert rows[bags].shape == (1, 12, 3)
    assert np.bincount(rows[bags + measures.BAGS]).tolist() == [4, 4, 4]
    assert random.keys() - rows.keys() == {tuned} and random[tuned].shape == (1, 24, 3)
    assert len(random[bags + measures.BAGS]) == 12  # those that DSMIL had, not those of more
    scores = rows["logistic regression, 2 folds"]
    right = scores.argmax(2) == rows["labels"]
    assert scores.shape == (2, 24, 3) and right.mean() > 0.8  # tints: a random network tells them apart
    return right


def test_the_loss_share_is_one_where_teacher_and_student_are_uniform(tmp_path):
    write(tmp_path / "config.json", {"out_dim": 64, "disentangled_dim": 8})
    rows = ["0,0,9,9,9,1,1,2", f"1,1,9,{np.log(64)},{np.log(8)},1,1,2"]  # loss_f has no centre, as SimCLR's
    write_table(tmp_path / "log.csv", "step,epoch,loss,loss_c,loss_cc,entropy_c,entropy_cc,loss_f", rows)
    assert show.loss_shares(tmp_path) == {"f_c": pytest.approx([1]), "f_cc": pytest.approx([1])}


@pytest.mark.parametrize("argv, says", [
    ([*RUN, "--seed=3"], "--seeds"), ([*RUN, "--data", "gone"], "gone"), ([*RUN, "--lr", "50"], "--lr"),
    ([*RUN, "--batch", "37", "--bag-groups", "1"], "--batch 37"),
    ([*RUN, "--bag-groups", "9"], "--bag-groups 9"), ([*RUN, "--folds", "50"], "--folds 50"),
    ([*RUN, "--folds", "1"], "--folds: 1"),
    (["show", "--out", "nowhere"], "nowhere"), (["show", "--epochs", "3"], "--epochs")])
def test_bad_flags_are_reported_before_the_first_arm(here, capsys, argv, says):
    refused(capsys, study.main, argv, says)
    assert not list(here.glob("runs/claim/*"))


def test_a_failing_arm_is_named_and_the_others_are_measured(here, capsys, monkeypatch):
    monkeypatch.setattr(train, "main", lambda flags: 1)  # as where the loss diverges
    argv = [*RUN, "--arms", "baseline", "random", "--folds", "2", "--bag-seeds", "0", "--seeds", "3"]
    assert study.main(argv) == 1
    assert "failed: runs/claim/baseline_seed3" in capsys.readouterr().err
    assert (here / "runs/claim/random_seed3/claim.npz").is_file()
    encoder, about = load_encoder(here / "runs/claim/random_seed3/encoder.pt")
    torch.manual_seed(3)
    want = dirl.ARCHS["vit_t4"]().state_dict()  # as it starts
    assert about["step"] == 0 and (encoder.mean, encoder.std) == (MEAN, STD)
    assert all(torch.equal(v, want[k]) for k, v in encoder.state_dict().items())


def test_arms_are_flags_that_train_takes(here):
    for arm, flags in study.ARMS.items():
        args = study.script_of(flags).arguments(["--data", "c", *TINY, *flags])
        ours = arm in ("shuffled", "lambda_2_0.25", "two_views", "zeros") or arm.endswith("dirl")
        method = "dirl" if ours or arm == "random" else "cellback" if arm.endswith("cellback") else "baseline"
        assert args.method == method, arm


def test_an_arm_whose_own_batch_is_too_large_is_refused_before_any_is_trained(here, capsys):
    batch = RUN.index("--batch")
    argv = [*RUN[:batch], *RUN[batch + 2:], "--bag-seeds", "0", "--arms", "random", "simclr"]
    refused(capsys, study.main, argv, "--batch 512: there are only 36 training crops")
    assert not (here / "runs").exists()


# ---------------------------------------------------------------- LC25000

def test_lc25000_in_our_layout(tmp_path, capsys, monkeypatch):
    rows = lc25000.labels()
    assert len(rows) == 3031 and [row[2] for row in rows].count("test") == 592
    parts = {}
    for image, label, split, tile in rows:
        assert image.startswith(label) and parts.setdefault(tile, split) == split  # a tile is in one part
    lines = ["image,label,split,source_tile", *(",".join(row) for row in rows), ""]
    digest = hashlib.sha256("\r\n".join(lines).encode()).hexdigest()
    assert digest.startswith("a4bcc6922452e8d6")  # the labels.csv that the results were made with
    refused(capsys, lc25000.main, [str(tmp_path)], "3031 of 3031 images are missing")
    monkeypatch.setattr(lc25000, "labels", lambda: rows[:2])
    for image, *_ in rows[:2]:
        saved(tmp_path / "from" / image, array=tissue(768), format="JPEG")
    assert lc25000.main([str(tmp_path / "from"), "--out", str(tmp_path / "to")]) == 0
    assert (tmp_path / "to/labels.csv").read_bytes() == "\r\n".join([*lines[:3], ""]).encode()
    assert Image.open(tmp_path / "to" / rows[0][0]).size == (224, 224)
