"""The lab: its notebook runs in order (here without Jupyter), its checks tell right from wrong."""
import base64
import contextlib
import inspect
import io
import json
import math
import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from synthetic import refused

import dirl
from lab import checks, record, small, solutions

PATH = Path(__file__).resolve().parents[1] / "lab" / "dirl.ipynb"
CODE = [cell for cell in json.loads(PATH.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
CELLS = ["".join(cell["source"]) for cell in CODE]
CHECKS = [source for source in CELLS if source.startswith('print("Exercise')]
STORE = "pip install nbconvert ipykernel; jupyter nbconvert --to notebook --execute --inplace lab/dirl.ipynb"


def run_cell(source, names, title):
    """Executes a cell in the namespace; returns what it printed and the number of its figures."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, title, "exec"), names)
    figures = plt.get_fignums()
    for number in figures:
        plt.figure(number).canvas.draw()
    plt.close("all")
    return printed.getvalue(), len(figures)


@pytest.fixture(scope="module")
def lab():
    """The notebook run from lab/ with the blanks left blank: its names, and what each cell printed."""
    patch = pytest.MonkeyPatch()
    patch.chdir(PATH.parent)
    drawn = [small.crops_of(24), small.crops_of(25)]

    def crops_of(slide):
        return drawn[slide % 2][:3 if slide >= 1000 else None]  # 25 is looked at, others only differ
    patch.setattr(small, "crops_of", crops_of)
    matplotlib.use("agg")
    names, printed, pictures = {"__name__": "__main__"}, [], 0
    for number, source in enumerate(CELLS, 1):
        text, figures = run_cell(source, names, f"cell {number}")
        printed.append(text)
        pictures += figures
        if number == 1:
            names.update(SLIDES=6, STEPS=2, EPOCHS=2)  # enough to run every line
    patch.undo()
    return names, printed, pictures


def test_every_cell_runs_and_every_exercise_waits(lab):
    names, printed, pictures = lab
    assert pictures >= 9 and len(CHECKS) == 9
    for source, text in zip(CELLS, printed):
        if source in CHECKS:
            assert ": not yet" in text, text


@pytest.mark.parametrize("source", CHECKS, ids=lambda source: source[7:18])
def test_the_solution_passes(lab, source):
    text, _ = run_cell(source, {**lab[0], **vars(solutions)}, "check")
    assert ": right: " in text, text


def with_prior(change):
    """A wrong view_prior: the right one, called with what change(cells, box, flip) returns."""
    return lambda cells, box, flip: solutions.my_view_prior(*change(cells, box, flip))


def turned_prior(turn):
    """A wrong view_prior: the right one's rows and columns (14, 14), turned."""
    return lambda cells, box, flip: turn(solutions.my_view_prior(cells, box, flip).view(14, 14)).flatten()


def upside_down_when_flipped(cells, box, flip):
    p_c = solutions.my_view_prior(cells, box, False).view(14, 14)
    return (p_c.flip(0) if flip else p_c).flatten()


def counted(cells, box, flip):
    left, top, width, height = box
    x = (cells[:, 0] - left) / width * 224
    y = (cells[:, 1] - top) / height * 224
    p_c = torch.zeros(196)
    for column, row in zip(((224 - x if flip else x) // 16).tolist(), (y // 16).tolist()):
        if 0 <= column < 14 and 0 <= row < 14:
            p_c[int(row * 14 + column)] += 1
    return p_c


def outside_kept(place, divide=torch.floor_divide):
    """A wrong view_prior that does not skip cells outside the view: place(column, row) of all of them."""
    def view_prior(cells, box, flip):
        x, y = ((cells - torch.tensor(box[:2])) / torch.tensor(box[2:]) * 224).T
        column, row = place(divide(224 - x if flip else x, 16), divide(y, 16))
        index = (row * 14 + column).long()
        p_c = torch.zeros(196)
        p_c[index[(index >= 0) & (index < 196)]] = 1
        return p_c
    return view_prior


def flipped_by(flip_x):
    """A wrong view_prior with another flip: flip_x(x in the view, x of the cells, left, width)."""
    def view_prior(cells, box, flip):
        left, top, width, height = box
        if flip:
            x = flip_x((cells[:, 0] - left) / width * 224, cells[:, 0], left, width)
            cells = torch.stack([x / 224 * width + left, cells[:, 1]], 1)
        return solutions.my_view_prior(cells, box, False)
    return view_prior


def inside_the_grid(column, row):
    inside = (column >= 0) & (column < 14) & (row >= 0) & (row < 14)
    return column[inside], row[inside]


def truncated(px, side):
    return (px / side).trunc()  # as int() does


def without_lower_half(cells, box, flip):
    p_c = solutions.my_view_prior(cells, box, flip)
    p_c[90:] = 0
    return p_c


def in_one_branch(cells, box, flip):
    if flip:
        return solutions.my_view_prior(cells, box, flip)


def pooled(divide):
    """Eq. 3 with another divisor than |P_c|: divide(region (B, n, 1))."""
    def pool(tokens, p_c):
        regions = p_c.unsqueeze(-1), (1 - p_c).unsqueeze(-1)
        return tuple((region * tokens).sum(1) / divide(region) for region in regions)
    return pool


def zero_where_nan(tokens, p_c):
    return tuple(f.nan_to_num() for f in pooled(lambda region: region.sum(1))(tokens, p_c))


def decided_for_the_batch(tokens, p_c):
    """f_b of a view of nothing but cells is its mean if another view has no cell."""
    f_c, f_b = solutions.my_pool(tokens, p_c)
    return f_c, tokens.mean(1) if (p_c.sum(1) == 0).any() else f_b


def no_diagonal(p_c):
    m_self, m_cross = solutions.my_masks(p_c)
    return m_self, m_cross.fill_diagonal_(-math.inf)


def finite(p_c):
    return tuple(m.clamp(min=-100) for m in solutions.my_masks(p_c))


def zero_times_inf(p_c):
    different = (p_c[:, None] != p_c[None]).float()
    return different * -math.inf, (1 - different) * -math.inf


def scores_of(q, scores, dim=0, scale=math.sqrt(128)):
    return (q @ q[scores.argmax(0)].T / scale).softmax(dim)


def one_critical(q, scores):
    critical = q[scores.argmax() // scores.shape[1]]
    return (q @ critical / math.sqrt(128)).softmax(0)[:, None].expand(scores.shape)


def compared_exactly(q):
    if (q == 1 / q.shape[1]).all():
        return "uniform"
    return solutions.my_diagnosis(q) if solutions.my_diagnosis(q) != "uniform" else "healthy"


def by_mean_alone(q):
    if checks.entropy(q).mean() > 0.9:
        return "uniform"
    return "same output" if checks.entropy(q.mean(0)) < 0.3 else "healthy"


def without_present(student, teacher, center, present_s, present_t):
    head = dirl.DINOLoss(len(center))
    head.center.copy_(center)
    return head(student, teacher)


@pytest.mark.parametrize("check, answer, says", [
    ("view_prior", with_prior(lambda cells, box, flip: (cells, box, False)), "not flipped"),
    ("view_prior", with_prior(lambda cells, box, flip: (cells, box, not flip)), "the other way round"),
    ("view_prior", with_prior(lambda cells, box, flip: (cells, (0, 0, 224, 224), flip)), "not cropped"),
    ("view_prior", with_prior(lambda cells, box, flip: (cells, (*box[:2], 224, 224), flip)), "not scaled"),
    ("view_prior", with_prior(lambda cells, box, flip: (cells, (0, 0, *box[2:]), flip)), "not subtracted"),
    ("view_prior", with_prior(lambda cells, box, flip: (
        cells.flip(1), (box[1], box[0], box[3], box[2]), flip)), "x and y"),
    ("view_prior", turned_prior(lambda p_c: p_c.flip(0)), "every prior is upside down"),
    ("view_prior", upside_down_when_flipped, "a flipped view is upside down"),
    ("view_prior", turned_prior(lambda p_c: p_c.T), "rows and columns are swapped"),
    ("view_prior", counted, "counts"),
    ("view_prior", outside_kept(lambda column, row: (column, row)), "end up in other patches"),
    ("view_prior", outside_kept(inside_the_grid, truncated), "int() rounds"),
    ("view_prior", with_prior(lambda cells, box, flip: (cells, box, True)), "every view is flipped"),
    ("view_prior", outside_kept(lambda column, row: (column.clamp(0, 13), row.clamp(0, 13))), "its border"),
    ("view_prior", flipped_by(lambda x, cells, left, width: (224 - cells - left) / width * 224), "the crop"),
    ("view_prior", flipped_by(lambda x, cells, left, width: width - x), "224 px wide"),
    ("view_prior", without_lower_half, "patches differ"),
    ("view_prior", in_one_branch, "flip False; every branch needs a return"),
    ("view_prior", lambda cells, box, flip: torch.zeros(14, 14), "shape"),
    ("view_prior", lambda cells, box, flip: "P_c", "a tensor is expected"),
    ("pool", lambda tokens, p_c: solutions.my_pool(tokens, 1 - p_c), "swapped"),
    ("pool", pooled(lambda region: region.shape[1]), "divided by n"),
    ("pool", pooled(lambda region: region.sum()), "count of the whole batch"),
    ("pool", pooled(lambda region: 1), "sums over the regions"),
    ("pool", pooled(lambda region: region.sum(1)), "no cell pools to nan"),
    ("pool", pooled(lambda region: region.sum(1) + 1), "|P_c| + 1"),
    ("pool", pooled(lambda region: region.sum(1) + 0.5), "are not the means"),
    ("pool", lambda tokens, p_c: solutions.my_pool(tokens, p_c)[0], "returns 1 value; return f_c, f_b"),
    ("pool", lambda tokens, p_c: (solutions.my_pool(tokens, p_c)[0], None), "f_b is a NoneType"),
    ("pool", lambda tokens, p_c: tokens @ tokens, "your code raised RuntimeError"),
    ("pool", lambda tokens, p_c: solutions.my_pool(tokens.detach(), p_c), "no gradient reaches"),
    ("pool", zero_where_nan, "the gradient of the tokens is NaN"),
    ("pool", decided_for_the_batch, "decide for each view"),
    ("masks", no_diagonal, "or i = j"),
    ("masks", finite, "-100"),
    ("masks", zero_times_inf, "0 x -inf is not a number"),
    ("masks", lambda p_c: solutions.my_masks(p_c)[::-1], "swapped"),
    ("masks", lambda p_c: (torch.zeros(len(p_c), len(p_c)), solutions.my_masks(p_c)[1]), "M_self(i, j)"),
    ("masks", lambda p_c: (solutions.my_masks(p_c)[0], torch.zeros(len(p_c), len(p_c))), "M_cross(i, j)"),
    ("moved", dict(cc=True, bb=True, cb=True, bc=True), "f_cc: "),
    ("moved", dict(cc=False, bb=True, cb=False, bc=True), "f_cb: "),
    ("moved", dict(cc=False, bb=True, cb=1, bc=True), "True or False"),
    ("moved", None, "set each of"),
    ("uniform_loss", lambda k, small, one, two: 2 * one * math.log2(k) + 4 * two * math.log2(small),
     "base 2"),
    ("uniform_loss", lambda k, small, one, two: one * math.log(k) + two * math.log(small), "two terms"),
    ("uniform_loss", lambda k, small, one, two: -2 * one * math.log(k) - 4 * two * math.log(small), "sign"),
    ("uniform_loss", lambda *given: math.log(given[0]), "each head"),
    ("uniform_loss", lambda *given: 11.92, "use the arguments"),
    ("loss", without_present, "some regions missing"),
    ("diagnosis", lambda q: "healthy", "'uniform'"),
    ("diagnosis", lambda q: "uniform" if checks.entropy(q.mean(0)) > 0.3 else "same output", "'healthy'"),
    ("diagnosis", by_mean_alone, "same three prototypes"),
    ("diagnosis", lambda q: "same output" if checks.entropy(q.mean(0)) < 0.55 else solutions.my_diagnosis(q),
     "four prototypes in use"),
    ("diagnosis", compared_exactly, "up to noise"),
    ("aggregated", lambda attention: attention.sum(-1).mean(1), "row sums"),
    ("aggregated", lambda attention: attention.sum((1, 2)), "heads are summed"),
    ("aggregated", lambda attention: attention.mean((1, 2)), "mean"),
    ("aggregated", lambda attention: attention[:, 0].sum(-2), "one head's"),
    ("aggregated", lambda attention: attention[..., 0, :].mean(1), "not the column sums"),
    ("bins", lambda v: ((v <= 0.5).float().mean(), 0.6, (v > 2).float().mean()), "one bin"),
    ("bins", lambda v: ((v <= 0.5).float().mean(), (v > 0.5).float().mean(), 0), "themselves"),
    ("bins", lambda v: ((v < 0.5).sum(), ((v >= 0.5) & (v <= 2)).sum(), (v > 2).sum()), "counts"),
    ("bins", lambda v: tuple(len(v[0]) * share for share in solutions.my_bins(v)), "number of crops"),
    ("bins", lambda v: tuple(100 * share for share in solutions.my_bins(v)), "percentages"),
    ("bins", lambda v: solutions.my_bins(v)[::-1], "another order"),
    ("bins", lambda v: (0.2, 0.8), "returns 2 values"),
    ("bins", lambda v: ((v < 0.5).float().mean(1), 0.6, 0.2), "the share of 0 to 0.5 has shape (2,)"),
    ("instance_attention", lambda q, scores: scores_of(q, scores, dim=1), "over the classes"),
    ("instance_attention", lambda q, scores: scores_of(q, scores, scale=1), "sqrt(128) is missing"),
    ("instance_attention", lambda q, scores: scores_of(q, scores, scale=math.sqrt(7)), "sqrt(N)"),
    ("instance_attention", lambda q, scores: scores_of(q, scores, scale=128), "its square root"),
    ("instance_attention", lambda q, scores: scores_of(q, -scores), "lowest"),
    ("instance_attention", one_critical, "both classes"),
    ("instance_attention", lambda q, scores: solutions.my_attention(q, scores.flip(1)), "are swapped"),
    ("instance_attention", lambda q, scores: q @ q[scores.argmax(0)].T / math.sqrt(128), "logits"),
    ("instance_attention", lambda q, scores: scores.softmax(0), "not softmax"),
])
def test_a_wrong_answer_is_told_what_is_wrong(check, answer, says):
    line = getattr(checks, check)(answer)
    plt.close("all")
    assert line.startswith("no: ") and says in line, line


def test_a_blank_is_no_wrong_answer():
    assert checks.pool(lambda tokens, p_c: None).startswith("not yet: write")
    assert checks.pool(lambda tokens, p_c: (..., ...)).startswith("not yet: write")
    assert checks.moved(dict(cc=False, bb=..., cb=True, bc=...)).startswith("not yet: set bb, bc")


def test_a_wrong_prior_is_drawn_next_to_the_right_one():
    assert checks.view_prior(without_lower_half).startswith("no: 20 of 20 views are wrong")
    yours, right = plt.gcf().axes
    difference = right.images[0].get_array() - yours.images[0].get_array()
    assert difference.sum() > 5 and not difference.flatten()[:90].any()
    plt.close("all")
    checks.view_prior(solutions.my_view_prior)
    assert not plt.get_fignums()


def test_an_answer_may_change_its_arguments():
    def pool(tokens, p_c):
        f = solutions.my_pool(tokens, p_c)
        tokens.zero_()
        return f
    assert checks.pool(pool).startswith("right")


def test_stacked_values_are_several_values():
    assert checks.pool(lambda tokens, p_c: torch.stack(solutions.my_pool(tokens, p_c))).startswith("right")
    assert checks.bins(lambda v: torch.tensor(solutions.my_bins(v)).numpy()).startswith("right")


def test_an_error_of_a_check_is_not_the_readers(monkeypatch):
    monkeypatch.setattr(dirl, "cell_back_pool", None)
    line = checks.pool(solutions.my_pool)
    assert line.startswith("this check itself failed (TypeError") and "may be right" in line


def test_the_first_cell_finds_the_project_from_its_root(monkeypatch):
    monkeypatch.chdir(PATH.parents[1])
    names = {}
    run_cell(CELLS[0], names, "cell 1")
    assert names["root"] == PATH.parents[1]


def test_outputs_are_stored_and_small():
    assert PATH.stat().st_size < 2e6
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    pictures = [output["data"]["image/png"] for output in outputs if "data" in output]
    assert len(pictures) >= 9 and all(base64.b64decode(png).startswith(b"\x89PNG") for png in pictures)


def test_stored_sources_are_the_sources_now(lab):
    """What cells printed with inspect.getsource is today's code."""
    compared = 0
    for cell, source in zip(CODE, CELLS):
        stored = "".join(text for output in cell["outputs"] for text in output.get("text", []))
        for name in re.findall(r"inspect\.getsource\(([\w.]+)\)", source):
            assert inspect.getsource(eval(name, lab[0])) in stored, f"{name} has changed: {STORE}"
            compared += 1
    assert compared >= 8


def test_an_exercise_comes_before_the_code_that_answers_it():
    answers = {"view_prior": "prior.view_prior", "pool": "dirl.cell_back_pool",
               "masks": "dirl.disentangle_masks", "moved": "dirl.DisentangleBlock",
               "aggregated": "dirl.aggregated_attention", "bins": "dirl.attention_bins",
               "instance_attention": "mil.DSMIL.forward"}
    printed = {}  # {name: number of the cell}
    exercises = {}
    for number, source in enumerate(CELLS):
        printed |= dict.fromkeys(re.findall(r"inspect\.getsource\(([\w.]+)\)", source), number)
        exercises |= dict.fromkeys(re.findall(r'"Exercise \w+:", checks\.(\w+)', source), number)
    assert len(exercises) == 9
    for exercise, name in answers.items():
        assert exercises[exercise] < printed[name], exercise
    assert exercises["uniform_loss"] < next(k for k, source in enumerate(CELLS) if "plain_loss" in source)


def test_the_plain_loss_is_the_projects(lab):
    assert any("plain_loss: right" in text for text in lab[1])


def test_small_encoders_load_and_their_command_trains():
    assert small.ENCODERS.stat().st_size < 5e6
    images = torch.randint(0, 256, (4, 3, 224, 224), dtype=torch.uint8)
    crops = [(image, torch.rand(20, 2) * 224) for image in images]
    shuffled = small.shuffled_priors(crops, 0)
    assert any(not torch.equal(before[1], after[1]) for before, after in zip(crops, shuffled))
    for name in small.METHODS:
        losses = []
        encoder = small.train(name, crops, 2, batch=2,
                              report=lambda step, loss: losses.append(loss))
        assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
        assert encoder.state_dict().keys() == small.load(name).state_dict().keys()


def test_the_lab_trains_the_networks_that_are_named(monkeypatch, tmp_path, capsys):
    crops = [(torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8), torch.rand(9, 2)) for _ in range(16)]
    monkeypatch.setattr(small, "training_crops", lambda slides: crops)
    monkeypatch.setattr(small, "ENCODERS", tmp_path / "encoders.pt")
    monkeypatch.setattr(small, "STEPS", 1)
    assert small.main(["DINO"]) == 0 and small.main(["DiRL"]) == 0
    assert small.load("DINO").embed_dim == small.load("DiRL").embed_dim == 48
    refused(capsys, small.main, ["BYOL"], "BYOL: is none of DINO")


# ---------------------------------------------------------------- recordings

@pytest.fixture
def study(tmp_path):
    """A folder of two measured runs on 30 test crops of 4 tokens, as experiments.study claim leaves them."""
    generator = np.random.default_rng(0)
    for arm in ("baseline", "dirl"):
        folder = tmp_path / "study" / f"{arm}_seed1"
        folder.mkdir(parents=True)
        scores = np.zeros((1, 30, 2))
        scores[0, :, 0] = 1  # all are predicted to be of class 0
        labels = np.array([0] * 24 + [1] * 6)
        np.savez(folder / "claim.npz", attention=generator.random((30, 4), np.float32), labels=labels,
                 **{"20-NN": scores})
        (folder / "log.csv").write_text("step,probe_0_to_0.5,probe_0.5_to_2,probe_over_2,probe_knn\n"
                                        "0,,,,\n9,0.1,0.7,0.2,0.6\n19,0.2,0.6,0.2,0.8\n")
    return tmp_path / "study"


def test_runs_are_recorded_and_loaded(study, tmp_path, capsys):
    path = tmp_path / "recorded.npz"
    assert record.main([f"weaker=colour={study}"], path) == 2  # the folder is colour=...
    assert record.main([f"weaker colour={study}"], path) == 0
    assert "2 runs, 30 of 30 test crops" in capsys.readouterr().out
    dino, ours = record.load(path)
    assert (dino.setting, dino.network, dino.seed) == ("weaker colour", "DINO", 1)
    assert ours.network == "DiRL" and math.isclose(ours.accuracy, 24 / 30, rel_tol=1e-6)
    assert np.allclose(ours.curve, [[10, 0.7, 0.6], [20, 0.6, 0.8]])
    attention = np.load(study / "dirl_seed1" / "claim.npz")["attention"]
    assert np.allclose(ours.attention, attention, atol=1e-3)


def test_many_recordings_keep_fewer_crops(study, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "BYTES", 2 * 2 * 4 * 10)
    assert record.main([f"a={study}"], tmp_path / "recorded.npz") == 0
    dino, ours = record.load(tmp_path / "recorded.npz")
    assert len(dino.attention) == len(ours.attention) == 10
    first = np.load(study / "dirl_seed1" / "claim.npz")["attention"][[0, -1]]
    assert np.allclose(ours.attention[[0, -1]], first, atol=1e-3)  # evenly spread


@pytest.mark.parametrize("study_flag, says", [("runs", "SETTING=FOLDER"), ("a=nowhere", "nowhere: has no")])
def test_record_says_what_is_wrong(study_flag, says, tmp_path, capsys):
    assert record.main([study_flag], tmp_path / "recorded.npz") == 2
    assert says in capsys.readouterr().err


def test_the_recordings_of_the_lab_are_small():
    runs = record.load()
    assert record.RECORDED.stat().st_size < 0.2e6 * len(runs)
    for run in runs:
        assert run.attention.shape[1] == 196
        assert torch.allclose(run.attention.sum(1), torch.tensor(196.0), rtol=2e-3)
