"""The comparisons of experiments/: each loss against its definition, and that each of them learns."""
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from synthetic import SmallHead, refused, rows_of, tissue
from test_processes import same_run
from tiny_flags import FOLDER

import dirl
import train
from common.encoders import RegisterViT, attention_of, load_encoder, random_encoder, save_encoder
from common.errors import InputError
from common.files import load_tensors, read_json
from common.watch import effective_rank
from data import Augmentation, make_views
from experiments import compare
from experiments.ssl import byol_simclr, esvit, evenness, heads, imix, lsup, selfpatch
from experiments.ssl.losses import WeightedSum
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
    same(byol_simclr.byol_loss((p, present), (z, present[:2])), sum(pairs) / len(pairs), p)


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
    same(byol_simclr.nt_xent_loss((z, present)), sum(terms) / len(terms), z)


@pytest.mark.parametrize("present", [torch.zeros(2, 3).bool(), torch.tensor([[1, 0, 0], [1, 0, 0]]).bool()])
def test_without_pairs_or_negatives_nothing_breaks(present):
    z = leaf(2, 3, 5)
    views = z, present
    for loss in (byol_simclr.nt_xent_loss(views), byol_simclr.byol_loss(views, views)):
        assert torch.autograd.grad(loss, z)[0].isfinite().all() and loss.isfinite()
    assert byol_simclr.nt_xent_loss(views) == 0


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


def test_batch_norm_sees_one_view_at_a_time():
    model, x = byol_simclr.RegionProjections(tiny(), "baseline", "byol"), torch.randn(2, 5, 3, 48, 48)
    x[1] *= 3  # views with unlike statistics
    prior = torch.ones(2, 5, 9)
    z, _ = model([x], [prior])["f"]
    for v in range(2):
        alone, _ = model([x[v: v + 1]], [prior[v: v + 1]])["f"]
        torch.testing.assert_close(z[v], alone[0])
    together, _ = model([x.flatten(0, 1)[None]], [prior.flatten(0, 1)[None]])["f"]
    assert (z.flatten(0, 1) - together[0]).abs().max() > 0.01


def test_byols_mlp_by_hand():
    mlp, x = byol_simclr.byol_mlp(6), torch.randn(5, 6)
    first, last = mlp[0], mlp[3]
    h = x @ first.weight.t() + first.bias
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(mlp(x), h.clamp(min=0) @ last.weight.t(), atol=1e-4, rtol=1e-4)  # no bias


def test_eq_9_weighs_the_regions():
    names = dirl.METHODS["dirl"]
    student, teacher = ({name: (leaf(2, 3, 4), torch.ones(2, 3).bool()) for name in names} for _ in range(2))
    weight = dirl.eq9_weights(names, 0.5, 0.025)
    total, each = WeightedSum(weight, dict.fromkeys(names, byol_simclr.byol_loss))(student, teacher)
    torch.testing.assert_close(total, 0.5 * (each["c"] + each["b"]) + 0.025 * sum(
        each[name] for name in dirl.DISENTANGLED))


# ---------------------------------------------------------------- EsViT, SelfPatch (Table 3), i-mix (Table 9)

def cross_entropy(student, teacher, center, t=0.04, s=0.1):
    """-<q, log p> of one pair of outputs (K,)."""
    return -(((teacher - center) / t).softmax(-1) * (student / s).log_softmax(-1)).sum()


@pytest.mark.parametrize("rows", [5, 4096])
def test_esvit_matches_each_token_to_the_most_similar(monkeypatch, rows):
    """The logits (.., 6) are z (.., 3) times prototypes (6, 3), whether multiplied at once or in shards."""
    monkeypatch.setattr(esvit, "ROWS", rows)
    z, prototypes = [leaf(2, 3, 4, 3), leaf(1, 3, 2, 3)], leaf(6, 3)
    tokens = [torch.randn(2, 3, 4, 5), torch.randn(1, 3, 2, 5)]
    z_t, prototypes_t, of_teacher = torch.randn(2, 3, 4, 3) / 10, torch.randn(6, 3), torch.randn(2, 3, 4, 5)
    module = esvit.RegionLoss(6)
    module.center.copy_(torch.randn(6) / 10)
    student, teacher = [x @ prototypes.t() for x in z], z_t @ prototypes_t.t()
    center, terms, entropies = module.center.clone(), [], []
    for v, (logits, f) in enumerate((x, y) for xs, ys in zip(student, tokens) for x, y in zip(xs, ys)):
        for u, b in itertools.product(range(2), range(3)):
            for x, y in zip(logits[b], f[b]) if u != v else ():
                best = teacher[u, b, max(range(4), key=lambda j: cos(y, of_teacher[u, b, j]))]
                terms.append(cross_entropy(x, best, center) / len(f[b]))
                q = ((best - center) / 0.04).softmax(-1)
                entropies.append(-(q * q.log()).sum() / len(f[b]))
    loss = module((z, prototypes, tokens), ([z_t], prototypes_t, [of_teacher]))
    same(loss, sum(terms) / (4 * 3), *z, prototypes)  # 4 pairs, 3 crops
    torch.testing.assert_close(module.entropy, sum(entropies) / (4 * 3))
    module.update_center()
    torch.testing.assert_close(module.center, 0.9 * center + 0.1 * teacher.mean((0, 1, 2)))


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_esvits_factors_multiply_to_the_heads_logits(norm_last_layer):
    head = dirl.DINOHead(24, 7, norm_last_layer=norm_last_layer)
    if not norm_last_layer:
        torch.nn.init.uniform_(head.last_norm, 1, 2)
    tokens = [torch.randn(2, 3, 4, 24), torch.randn(1, 3, 2, 24)]
    z, prototypes = esvit.logit_factors(head, tokens)
    for x, factor in zip(tokens, z):
        torch.testing.assert_close(factor @ prototypes.t(), head(x.flatten(0, 2)).unflatten(0, x.shape[:3]))


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
    torch.nn.init.uniform_(model.encoder.norm.weight, 0.1, 2)
    torch.nn.init.normal_(model.encoder.norm.bias)
    views = [torch.randn(2, 2, 3, 48, 48), torch.randn(1, 2, 3, 48, 48)]
    patches = model(views)["patch"]
    torch.testing.assert_close(patches[0][1], model.encoder(views[0][1]))  # what evaluation averages
    tokens = model.encoder.blocks(model.encoder.embed(views[0][1]))  # not yet normalised
    expected = model.aggregation(selfpatch.similar_neighbours(tokens)[0])  # (n, 4, d) of the first crop
    taught = selfpatch.teach_neighbours(model, views, None)["patch"]
    torch.testing.assert_close(taught[0][1, 0], model.encoder.norm(expected))
    assert len(taught) == 2


def test_selfpatch_centres_on_all_views_of_the_teacher():
    f_s, f_t, module = torch.randn(3, 3, 8), torch.randn(3, 3, 8), selfpatch.AggregateLoss(8)
    loss = module(f_s, (f_t[:2], f_t[2:]))
    pairs = [cross_entropy(f_s[v, b], f_t[u, b], 0) for u in range(2) for v in range(3) for b in range(3)
             if u != v]  # the targets are the two global views only
    torch.testing.assert_close(loss, sum(pairs) / len(pairs))
    module.update_center()
    torch.testing.assert_close(module.center, 0.1 * f_t.mean((0, 1)))


def test_imix_weighs_the_losses_against_both_crops():
    student, teacher, module = leaf(3, 4, 6), torch.randn(2, 4, 6) / 10, imix.MixLoss(6)
    share, partner = imix.draw_mix(4, "cpu")
    assert share.min() >= 0.5 and sorted(partner.tolist()) == [0, 1, 2, 3]
    terms = [share[b] * cross_entropy(student[v, b], teacher[u, b], 0)
             + (1 - share[b]) * cross_entropy(student[v, b], teacher[u, partner[b]], 0)
             for u in range(2) for v in range(3) for b in range(4) if u != v]
    same(module((student, share, partner), teacher), sum(terms) / len(terms), student)
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
    predicted = [torch.tensor([[[1., 2]]]), torch.tensor([[[0.]]])]
    loss = lsup.count_loss((predicted, [torch.tensor([[[1, 0]]]), torch.tensor([[[1]]])]))
    torch.testing.assert_close(loss, torch.tensor((0 + 4 + 1) / 3))


def test_heads_sit_after_their_blocks():
    encoder, x = tiny(), torch.randn(2, 3, 48, 48)
    f, present = heads.HeadsAfterBlocks(encoder, [2, 3, 3], 8).represent(x, None)
    assert list(f) == ["f1_block2", "f2_block3", "f3_block3"] and all(p.all() for p in present.values())
    torch.testing.assert_close(f["f3_block3"], encoder(x).mean(1))
    torch.testing.assert_close(f["f1_block2"], encoder.norm(encoder.blocks[:2](encoder.embed(x))).mean(1))


# ---------------------------------------------------------------- controls: registers, evenness

def test_registers_go_through_the_blocks_with_the_patches():
    plain, x = tiny(), torch.randn(2, 3, 48, 48)
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.3)
    encoder = RegisterViT(plain, 4)
    torch.nn.init.normal_(encoder.reg_token)
    for image, tokens, attention in zip(x, encoder(x), encoder.last_attention(x)):
        t = torch.cat([encoder.reg_token[0], plain.embed(image[None])[0]])  # four registers, nine patches
        for block in plain.blocks:
            q, k, v = block.attn.qkv(block.norm1(t)).view(13, 3, 2, 12).permute(1, 2, 0, 3)  # two heads of 12
            a = (q @ k.transpose(1, 2) / 12 ** 0.5).softmax(-1)
            t = t + block.attn.proj((a @ v).transpose(0, 1).flatten(1))
            t = t + block.mlp(block.norm2(t))
        torch.testing.assert_close(tokens, plain.norm(t[4:]), atol=1e-4, rtol=1e-4)
        for row in itertools.product(range(2), range(9)):
            head, i = row
            among = a[head, 4 + i, 4:]
            torch.testing.assert_close(attention[row], among / among.sum(), atol=1e-4, rtol=1e-4)
    assert (encoder(x) - plain(x)).abs().max() > 0.01  # the registers are seen


def test_an_untrained_networks_attention_is_even_with_registers_too():
    encoder = RegisterViT(random_encoder("vit_t4", 0, (0.5,) * 3, (0.2,) * 3), 4)
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    aggregated = attention_of(encoder, images)
    torch.testing.assert_close(aggregated, torch.ones(2, 196), atol=0.1, rtol=0)
    torch.testing.assert_close(aggregated.sum(1), torch.full((2,), 196.0))


@pytest.mark.parametrize("arch", ["vit_t4", "vit_h"])
def test_an_encoder_with_registers_is_kept_and_opened(tmp_path, arch):
    encoder = RegisterViT(random_encoder(arch, 0, (0.5,) * 3, (0.2,) * 3), 4).eval()
    torch.nn.init.normal_(encoder.reg_token)
    path, x = tmp_path / "encoder.pt", torch.randn(1, 3, 32, 48)
    about = {"arch": arch, "method": "baseline", "data": "x", "mpp": 1.0, "step": 1, "trained_on": {}}
    save_encoder(path, encoder, **about)
    opened, _ = load_encoder(path)
    assert torch.equal(opened(x), encoder(x)) and opened(x).shape == (1, 6, encoder.embed_dim)
    for damaged in (torch.ones(4), torch.ones(1, 4, 5)):
        torch.save(torch.load(path) | {"encoder": encoder.state_dict() | {"reg_token": damaged}}, path)
        with pytest.raises(InputError, match="weights are damaged"):
            load_encoder(path)


def test_unevenness_is_the_mean_square_of_what_tokens_have_above_an_even_share():
    logits = leaf(2, 3, 4, 4), leaf(2, 3, 2, 2)  # of two crops, three heads, four tokens and two
    penalty = evenness.unevenness([dirl.aggregated_attention(x.softmax(-1)) for x in logits])
    terms = []
    for x in logits:
        a = x.softmax(-1)
        n = a.shape[-1]
        for b, j in itertools.product(range(2), range(n)):
            drawn = sum(a[b, head, i, j] for head in range(3) for i in range(n)) / 3
            terms.append((drawn - 1) ** 2)
    same(penalty, sum(terms) / 12, *logits)
    one = torch.zeros(1, 5)
    one[0, 2] = 5  # all attention on one of five tokens: (16 + 4 x 1) / 5
    assert evenness.unevenness([torch.ones(3, 5)]) == 0 and evenness.unevenness([one]) == 4


def test_the_penalty_takes_the_attention_that_is_measured_and_is_added_to_dinos_loss():
    model = evenness.AttentiveDINO(tiny(), "baseline", 8).eval()
    for p in model.encoder.parameters():
        torch.nn.init.normal_(p, std=0.3)
    views = [torch.randn(2, 3, 3, 48, 48), torch.randn(1, 3, 3, 32, 32)]
    priors = [torch.ones(2, 3, 9), torch.ones(1, 3, 4)]
    student = model(views, priors)
    logits, aggregated = student.values()
    for x, a in zip(views, aggregated):
        want = dirl.aggregated_attention(model.encoder.last_attention(x.flatten(0, 1)))
        torch.testing.assert_close(a, want)
    plain, _ = dirl.DiRL.forward(model, views, priors)["f"]
    torch.testing.assert_close(logits, plain)
    penalized = WeightedSum({"f": 1, "even": 3}, {"f": dirl.DINOLoss(8), "even": evenness.unevenness})
    loss, each = penalized(student, {"f": logits[:2], "even": None})
    torch.testing.assert_close(each["f"], dirl.DINOLoss(8)(logits, logits[:2]))
    torch.testing.assert_close(loss, each["f"] + 3 * each["even"])
    assert each["even"] == evenness.unevenness(aggregated) > 0


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


WEIGHTS = {"esvit": [0.5, 0.5], "selfpatch": [1, 0.1], "imix": [1], "lsup": [1, 2], "registers": [1],
           "evenness": [1, 3], "heads": [0.5, 0.5]}


@pytest.mark.parametrize("ssl, method", CASES)
def test_it_learns_and_does_not_collapse(steps, monkeypatch, ssl, method):
    monkeypatch.setattr(dirl, "DINOHead", SmallHead)
    monkeypatch.setattr(byol_simclr, "HIDDEN", 128)
    args = SimpleNamespace(ssl=ssl, method=method, device="cpu", out_dim=64, disentangled_dim=32,
                           norm_last_layer=True, student_temp=0.12, center_momentum=0.3, lambda_1=0.5,
                           lambda_2=0.025, sup_weight=2, even_weight=3, heads=[2, 3],
                           empty_regions="skip")
    build = heads.build if ssl == "heads" else compare.BUILD[ssl]
    recipe = build(tiny(), args)
    student, teacher = recipe.student, recipe.teacher
    optimizer, fits = torch.optim.AdamW(student.parameters(), 2e-3), []
    for step in range(18):
        views, priors = steps[ssl == "lsup"][step % 6]
        with torch.no_grad():
            target = recipe.teach(teacher, views, priors)
        loss, each = recipe.loss(student(views, priors), target, 0.04)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dirl.update_teacher(student, teacher, 0.96)
        recipe.loss.update_centers()
        entropy = sum(module.entropy for module in recipe.loss.losses.values())
        fits.append(float(sum(each.values()) - entropy))  # KL(q || p), if the loss has a q
    assert tuple(each) == tuple(recipe.loss.weight) and set(recipe.loss.losses) <= set(each)
    eq_9 = dirl.eq9_weights(dirl.METHODS[method], 0.5, 0.025).values()
    assert list(recipe.loss.weight.values()) == WEIGHTS.get(ssl, list(eq_9))
    assert {(x.student_temp, x.center_momentum) for x in recipe.loss.losses.values()} <= {(0.12, 0.3)}
    assert all(p.grad is not None for p in student.parameters())  # torchrun waits for each of them
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
    (["--ssl", "dino", "--depth", "4", "--heads", "2", "3"], "block 4"),
    (["--ssl", "byol", "--accumulate", "2"], "batch norm"),
    (["--ssl", "simclr", "--accumulate", "2"], "negatives"),
    (["--ssl", "dino", "--arch", "vit_h", "--depth", "13"], "--arch vit_h"),
    (["--ssl", "dino", "--arch", "vit_h", "--heads", "12"], "--arch vit_h"),
    (["--ssl", "lsup", "--sup-weight", "nan"], "--sup-weight"),
    (["--ssl", "byol", "--empty-regions", "zeros"], "--empty-regions")])
def test_flags_that_do_not_go_together(place, capsys, argv, says):
    refused(capsys, compare.main, argv, "compare: ", says)


def test_a_comparison_has_its_originals_settings_unless_flags_say_otherwise():
    def settings(*argv):
        args = compare.arguments(["--data", "lung", *argv])
        return (args.epochs, args.batch, args.local_crops, tuple(args.global_scale), tuple(args.local_scale),
                args.momentum, args.jitter, args.solarize)
    paper = 100, 256, 8, (0.4, 1.0), (0.05, 0.4), 0.996, 1.0, 1.0
    for ssl in ("dino", "esvit", "imix", "lsup"):
        assert settings("--ssl", ssl) == paper
    assert settings("--ssl", "byol") == (20, 256, 0, (0.08, 1.0), (0.05, 0.4), 0.97, 1.0, 1.0)
    assert settings("--ssl", "simclr") == (20, 512, 0, (0.08, 1.0), (0.05, 0.4), 0.996, 2.0, 0.0)
    assert settings("--ssl", "selfpatch") == (100, 256, 8, (0.25, 1.0), (0.05, 0.25), 0.996, 1.0, 1.0)
    given = ["--epochs", "100", "--batch", "256", "--local-crops", "8", "--global-scale", "0.4", "1",
             "--momentum", "0.996", "--jitter", "1", "--solarize", "1"]
    assert settings("--ssl", "byol", *given) == settings("--ssl", "simclr", *given) == paper
    demo = compare.arguments(["--data", "demo", "--ssl", "simclr"])
    assert (demo.batch, demo.jitter, demo.momentum) == (32, 0.7, 0.98)


SHARDS = [*SHORT, "--drop-path", "0", "--max-steps", "4"]  # of three an epoch


@pytest.mark.parametrize("argv", [["esvit"], ["selfpatch"], ["lsup"], ["dino", "--heads", "1", "2"],
                                  ["registers"], ["evenness"]])
def test_a_batch_in_shards_is_the_batch(place, folder, argv):
    """DiRL averages a region's loss shard by shard, which differs if the counts do."""
    argv = ["--ssl", *argv, *SHARDS]
    assert compare.main([*argv, "--run", "runs/one"]) == 0
    assert compare.main([*argv, "--run", "runs/shards", "--accumulate", "2"]) == 0
    same_run(place / "runs" / "one", place / "runs" / "shards")


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


def test_imix_takes_a_batch_in_shards(place, folder):
    """The other comparisons go through the loop above, and in test_paper.py."""
    assert compare.main(["--ssl", "imix", "--accumulate", "2", *SHORT, "--max-steps", "1"]) == 0
