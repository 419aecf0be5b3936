"""The comparisons of experiments/: each loss against its definition, and that each of them learns."""
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from synthetic import SmallHead, refused, rows_of, tissue
from test_train import FOLDER

import dirl
import train
from common.encoders import load_encoder
from common.files import load_tensors, read_json
from common.watch import effective_rank
from data import Augmentation, make_views
from experiments import benchmark, compare
from experiments.ssl import byol_simclr, esvit, heads, imix, lsup, selfpatch
from prior import bin_centroids, view_prior


def cos(a, b):
    return a @ b / (a.norm() * b.norm())


def same(loss, expected, *inputs):
    """Value and gradient of a loss against its definition."""
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(a, b)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


# ---------------------------------------------------------------- BYOL and SimCLR (Table 8)

PRESENT = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]]).bool()  # 3 views of 4 crops


@pytest.mark.parametrize("present", [PRESENT, torch.ones(3, 4).bool()])
def test_byol_is_the_mean_over_pairs_that_count(present):
    p, z = leaf(3, 4, 5), torch.randn(2, 4, 5)
    pairs = [2 - 2 * cos(p[v, b], z[u, b]) for u in range(2) for v in range(3) for b in range(4)
             if u != v and present[u, b] and present[v, b]]
    same(byol_simclr.byol_loss(p, z, present, present[:2]), sum(pairs) / len(pairs), p)


@pytest.mark.parametrize("present", [PRESENT, torch.ones(3, 4).bool(), torch.ones(2, 4).bool()])
def test_nt_xent_takes_absent_views_neither_as_positives_nor_as_negatives(present):
    V, terms = len(present), []
    z = leaf(V, 4, 5)
    places = [(v, b) for v in range(V) for b in range(4) if present[v, b]]
    for (v, b), (u, c) in itertools.product(places, places):
        if b == c and u != v:
            against = [(cos(z[v, b], z[place]) / 0.5).exp() for place in places if place[1] != b]
            positive = (cos(z[v, b], z[u, b]) / 0.5).exp()
            terms.append(-(positive / (positive + sum(against))).log())
    same(byol_simclr.nt_xent_loss(z, present), sum(terms) / len(terms), z)


def test_nt_xent_of_two_views_by_hand():
    """Two crops whose views are alike and at right angles: -log(e^2 / (e^2 + 2 e^0)), at temperature 1/2."""
    z = torch.eye(2).expand(2, 2, 2)
    loss = byol_simclr.nt_xent_loss(z, torch.ones(2, 2).bool())
    torch.testing.assert_close(loss, -(torch.e ** torch.tensor(2.) / (torch.e ** torch.tensor(2.) + 2)).log())


@pytest.mark.parametrize("present", [torch.zeros(2, 3).bool(), torch.tensor([[1, 0, 0], [1, 0, 0]]).bool()])
def test_without_pairs_or_negatives_nothing_breaks(present):
    z = leaf(2, 3, 5)
    for loss in (byol_simclr.nt_xent_loss(z, present), byol_simclr.byol_loss(z, z, present, present)):
        assert torch.autograd.grad(loss, z)[0].isfinite().all() and loss.isfinite()
    assert byol_simclr.nt_xent_loss(z, present) == 0


def tiny(**kw):
    return dirl.VisionTransformer(24, 3, 2, img_size=48, **kw)


@pytest.mark.parametrize("ssl", ["byol", "simclr"])
def test_crops_without_the_region_change_nothing(ssl):
    """Batch norm included: f_c is projected as if the crops without cells were not in the batch."""
    model, x = byol_simclr.RegionProjections(tiny(), "dirl", ssl), torch.randn(2, 5, 3, 48, 48)
    prior = (torch.rand(2, 5, 9) > 0.5).float()
    prior[:, :3, 0], prior[:, :3, 1], prior[:, 3:] = 1, 0, 0
    z, present = model([x], [prior])["c"]
    assert present[:, :3].all() and not present[:, 3:].any()
    torch.testing.assert_close(z[:, :3], model([x[:, :3]], [prior[:, :3]])["c"][0])


def test_eq_9_weighs_the_regions():
    names = dirl.METHODS["dirl"]
    student, teacher = ({name: (leaf(2, 3, 4), torch.ones(2, 3).bool()) for name in names} for _ in range(2))
    total, each = byol_simclr.Eq9Loss(names, 0.5, 0.025)(student, teacher)
    torch.testing.assert_close(total, 0.5 * (each["c"] + each["b"]) + 0.025 * sum(
        each[name] for name in dirl.DISENTANGLED))


# ---------------------------------------------------------------- EsViT, SelfPatch (Table 3), i-mix (Table 9)

def cross_entropy(student, teacher, center, t=0.04, s=0.1):
    """-<q, log p> of one pair of outputs (K,)."""
    return -(((teacher - center) / t).softmax(-1) * (student / s).log_softmax(-1)).sum()


def test_esvit_matches_each_token_to_the_most_similar():
    student, tokens = [leaf(2, 3, 4, 6), leaf(1, 3, 2, 6)], [torch.randn(2, 3, 4, 5), torch.randn(1, 3, 2, 5)]
    teacher, of_teacher, module = torch.randn(2, 3, 4, 6) / 10, torch.randn(2, 3, 4, 5), esvit.RegionLoss(6)
    module.center.copy_(torch.randn(6) / 10)
    center, terms = module.center.clone(), []
    for v, (logits, f) in enumerate((x, y) for xs, ys in zip(student, tokens) for x, y in zip(xs, ys)):
        for u, b in itertools.product(range(2), range(3)):
            for x, y in zip(logits[b], f[b]) if u != v else ():
                best = max(range(4), key=lambda j: cos(y, of_teacher[u, b, j]))
                terms.append(cross_entropy(x, teacher[u, b, best], center) / len(f[b]))
    same(module(student, teacher, tokens, of_teacher), sum(terms) / (4 * 3), *student)  # 4 pairs, 3 crops
    module.update_center()
    torch.testing.assert_close(module.center, 0.9 * center + 0.1 * teacher.mean((0, 1, 2)))


def test_selfpatch_takes_the_most_similar_of_eight_neighbours():
    around = selfpatch.neighbours_of(4)
    assert set(around[5].tolist()) == {0, 1, 2, 4, 6, 8, 9, 10}
    assert set(around[0].tolist()) == {15, 12, 13, 3, 1, 7, 4, 5}  # over the border
    tokens = torch.randn(2, 16, 6)
    found = selfpatch.similar_neighbours(tokens)
    for b, i in itertools.product(range(2), range(16)):
        best = sorted(around[i].tolist(), key=lambda j: -cos(tokens[b, i], tokens[b, j]))[:4]
        torch.testing.assert_close(found[b, i], tokens[b, best])


def test_selfpatch_compares_each_view_with_itself():
    shapes = (2, 3, 4, 6), (1, 3, 2, 6)
    student, teacher = [leaf(*shape) for shape in shapes], [torch.randn(shape) for shape in shapes]
    module = selfpatch.PatchLoss(6)
    views = [torch.stack([cross_entropy(x, y, 0) for x, y in zip(s.flatten(0, 1), t.flatten(0, 1))]).mean()
             for a, b in zip(student, teacher) for s, t in zip(a, b)]
    same(module(student, teacher), sum(views) / 3, *student)
    rows = torch.cat([t.flatten(0, 2) for t in teacher])
    module.update_center()
    torch.testing.assert_close(module.center, 0.1 * rows.mean(0))


def test_selfpatch_teacher_aggregates_neighbours_and_sees_all_views():
    model = selfpatch.SelfPatch(tiny(), 16, 8).eval()
    model.heads["patch"] = torch.nn.Identity()
    views = [torch.randn(2, 2, 3, 48, 48), torch.randn(1, 2, 3, 48, 48)]
    tokens = model.encoder(views[0][1])
    torch.testing.assert_close(model(views)[1][0][1], model.aggregation.norm(tokens))
    expected = model.aggregation(selfpatch.similar_neighbours(tokens)[0])  # (n, 4, d) of the first crop
    taught = selfpatch.teach_neighbours(model, views, None)[1]
    torch.testing.assert_close(taught[0][1, 0], expected)
    assert len(taught) == 2


def test_imix_weighs_the_losses_against_both_crops():
    student, teacher, module = leaf(3, 4, 6), torch.randn(2, 4, 6) / 10, imix.MixLoss(6)
    share, partner = imix.draw_mix(4, "cpu")
    assert share.min() >= 0.5 and sorted(partner.tolist()) == [0, 1, 2, 3]
    terms = [share[b] * cross_entropy(student[v, b], teacher[u, b], 0)
             + (1 - share[b]) * cross_entropy(student[v, b], teacher[u, partner[b]], 0)
             for u in range(2) for v in range(3) for b in range(4) if u != v]
    same(module(student, teacher, share, partner), sum(terms) / len(terms), student)
    x = torch.randn(2, 4, 3, 5, 5)
    for b in range(4):
        torch.testing.assert_close(imix.mix(x, share, partner)[1, b],
                                   share[b] * x[1, b] + (1 - share[b]) * x[1, partner[b]])


# ---------------------------------------------------------------- L_sup (Fig. 9), heads (Table 6)

def test_counts_go_through_the_views_geometry():
    cells = torch.tensor([[[1., 1], [3, 9], [20, 5], [40, 40], [50, 1]], [[5, 5]] + 4 * [[float("nan")] * 2]])
    boxes, flip = torch.tensor([[0., 0, 48, 48], [0, 0, 24, 24]]), torch.tensor([True, False])
    counts, prior = (view_prior(cells, boxes, flip, 48, counts=wanted) for wanted in (True, False))
    assert counts[0].view(3, 3).tolist() == [[0, 1, 2], [0, 0, 0], [1, 0, 0]]  # mirrored
    assert counts[1].sum() == 1 and torch.equal(prior, (counts > 0).float())
    whole = view_prior(cells[:1], boxes[:1], torch.tensor([False]), 48, counts=True)
    assert torch.equal((whole[0] > 0).float(), bin_centroids(cells[0], 48))
    torch.testing.assert_close(lsup.count_loss([torch.tensor([[[1., 2]]]), torch.tensor([[[0.]]])],
                                                    [torch.tensor([[[1, 0]]]), torch.tensor([[[1]]])]),
                               torch.tensor((0 + 4 + 1) / 3))


def test_heads_sit_after_their_blocks():
    encoder, x = tiny(), torch.randn(2, 3, 48, 48)
    f, present = heads.HeadsAfterBlocks(encoder, [2, 3, 3], 8).represent(x, None)
    assert list(f) == ["f1_block2", "f2_block3", "f3_block3"] and all(p.all() for p in present.values())
    torch.testing.assert_close(f["f3_block3"], encoder(x).mean(1))
    torch.testing.assert_close(f["f1_block2"], encoder.norm(encoder.blocks[:2](encoder.embed(x))).mean(1))


# ---------------------------------------------------------------- each learns

@pytest.fixture(scope="module")
def steps():
    """The views of six steps over twelve crops of tissue at 48 and 32 px, with P_c or with counts."""
    crops = torch.stack([torch.from_numpy(tissue(224, seed)).permute(2, 0, 1) for seed in range(12)])
    crops = (crops * torch.linspace(0.4, 1, 12).view(-1, 1, 1, 1)).to(torch.uint8)  # told apart at this size
    cells, out = torch.rand(12, 40, 2) * 224, {}
    for counts in (False, True):
        how = Augmentation(1, (0.4, 1), (0.2, 0.4), 48, 32, 0.2, 0, 0, 0)
        out[counts] = [make_views(crops, cells, torch.Generator().manual_seed(step), how, counts=counts)
                       for step in range(6)]
    return out


CASES = [("byol", m) for m in dirl.METHODS] + [("simclr", m) for m in dirl.METHODS] + [
    (ssl, "baseline") for ssl in (*compare.BASELINES, "heads")]


@pytest.mark.parametrize("ssl, method", CASES)
def test_it_learns_and_does_not_collapse(steps, monkeypatch, ssl, method):
    monkeypatch.setattr(dirl, "DINOHead", SmallHead)
    monkeypatch.setattr(byol_simclr, "HIDDEN", 128)
    args = SimpleNamespace(ssl=ssl, method=method, device="cpu", out_dim=64, disentangled_dim=32,
                           norm_last_layer=True, student_temp=0.1, center_momentum=0.3, lambda_1=0.5,
                           lambda_2=0.025, sup_weight=1, heads=[2, 3])
    build = heads.build if ssl == "heads" else compare.BUILD[ssl]
    recipe = build(tiny(), args)
    student, teacher = recipe.student, recipe.teacher
    optimizer, fits = torch.optim.AdamW(student.parameters(), 1e-3), []
    for step in range(36):
        views, priors = steps[ssl == "lsup"][step % 6]
        with torch.no_grad():
            target = recipe.teach(teacher, views, priors)
        loss, each = recipe.loss(student(views, priors), target, 0.04)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dirl.update_teacher(student, teacher, 0.96)
        recipe.loss.update_centers()
        entropy = sum(module.entropy for module in recipe.dino.values())
        fits.append(float(sum(each.values()) - entropy))  # KL(q || p), if the loss has a q
    assert tuple(each) == recipe.names and set(recipe.dino) <= set(each)
    assert sum(fits[-6:]) < 0.9 * sum(fits[:6])
    f = F.normalize(teacher.encoder(views[0][0]).mean(1), dim=-1)
    assert effective_rank(f) > 1.5 and (f @ f.t()).min() < 0.9
    if ssl == "simclr":  # what is saved is what is trained
        for a, b in zip(teacher.encoder.parameters(), student.encoder.parameters()):
            assert a.data_ptr() == b.data_ptr() and not a.requires_grad


# ---------------------------------------------------------------- the script

SIZES = [*FOLDER, "--global-size", "64", "--local-size", "32", "--precision", "fp32"]
SHORT = [*SIZES, "--depth", "2"]


@pytest.mark.parametrize("argv, says", [
    (["--ssl", "imix", "--method", "dirl"], "--method dirl"), (["--ssl", "byol", "--heads", "2"], "--heads"),
    (["--ssl", "dino", "--heads", "2", "13"], "--heads"), (["--ssl", "dino", "--depth", "0"], "--depth"),
    (["--ssl", "dino", "--arch", "vit_h", "--depth", "13"], "--arch vit_h"),
    (["--ssl", "dino", "--arch", "vit_h", "--heads", "12"], "--arch vit_h"),
    (["--ssl", "lsup", "--sup-weight", "nan"], "--sup-weight"),
    (["--ssl", "byol", "--empty-regions", "zeros"], "--empty-regions")])
def test_flags_that_do_not_go_together(place, capsys, argv, says):
    refused(capsys, compare.main, argv, "compare: ", says)


def test_a_stopped_comparison_resumes_exactly(place, folder, capsys):
    byol = ["--ssl", "byol", "--method", "cellback", *SHORT]
    assert compare.main([*byol, "--run", "runs/whole"]) == 0
    assert compare.main([*byol, "--max-steps", "2"]) == 0 and compare.main(byol) == 0
    whole, run = Path("runs/whole"), Path("runs/tiny_set_vit_t4_cellback_byol_depth2")
    assert (whole / "log.csv").read_text() == (run / "log.csv").read_text()
    a, b = (load_tensors(path / "checkpoint.pt") for path in (whole, run))
    for part in ("student", "teacher"):
        assert all(torch.equal(x, b[part][k]) for k, x in a[part].items())
    row = rows_of(run / "log.csv")[-1]
    assert float(row["loss_c"]) >= 0 and not any(name.startswith(("entropy", "kl")) for name in row)
    encoder, about = load_encoder(run / "encoder.pt")
    assert len(encoder.blocks) == read_json(run / "config.json")["depth"] == 2 and about["ssl"] == "byol"
    own = ["--run", str(run), "--ssl", "simclr", "--method", "cellback", *SHORT]
    refused(capsys, compare.main, own, "--ssl byol (now simclr)")
    own = ["--run", str(run), "--method", "cellback", *SIZES]
    refused(capsys, train.main, own, "--ssl byol (now dino)")


def test_every_comparison_goes_through_the_loop(place, folder, capsys):
    for argv in (["--ssl", "simclr"], ["--ssl", "lsup"], ["--ssl", "dino", "--heads", "1", "2"]):
        assert compare.main([*argv, *SHORT, "--max-steps", "1", "--run", "runs/one"]) == 0
        (Path("runs/one") / "checkpoint.pt").unlink()
        load_encoder("runs/one/encoder.pt")
    assert benchmark.main([*SHORT, "--steps", "1"]) == 0
    assert "student's heads" in capsys.readouterr().out
