"""Tests of the mathematics: eq. 1 to 9, P_c, views, DSMIL, schedules; brute force, by hand, invariants."""
import copy
import dataclasses
import inspect
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

import data
import dirl
import mil
import prior
import train
from common import optimization
from eval import patches_arguments, slides_arguments
from wsi.datasets import DATASETS

torch.set_num_threads(1)  # with tensors this small, threads would only wait for one another


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny(**kw):
    return dirl.VisionTransformer(64, 2, 2, img_size=64, **kw)


class SmallHead(dirl.DINOHead):
    def __init__(self, in_dim, out_dim, norm_last_layer=True):
        super().__init__(in_dim, out_dim, hidden_dim=64, bottleneck_dim=32, norm_last_layer=norm_last_layer)


@pytest.fixture
def small_heads(monkeypatch):
    monkeypatch.setattr(dirl, "DINOHead", SmallHead)


def random_prior(B, n):
    """Returns P_c (B, n) with both regions in every row."""
    p_c = (torch.rand(B, n) < 0.4).float()
    p_c[:, 0], p_c[:, 1] = 1, 0
    return p_c


# ---------------------------------------------------------------- encoder

@pytest.mark.parametrize("arch, d, heads, count", [  # the paper: 5 M, 22 M and, in Table 4, 16 M
    ("vit_t", 192, 3, 5_524_032), ("vit_s", 384, 6, 21_664_896), ("vit_h", 192, 3, 16_420_032)])
def test_parameter_counts_and_shapes(arch, d, heads, count):
    model = dirl.ARCHS[arch]().eval()
    assert sum(p.numel() for p in model.parameters()) == count
    assert 0.019 < model.pos_embed.std() < 0.021
    with torch.no_grad():
        assert model(torch.randn(2, 3, 224, 224)).shape == (2, 196, d)
        assert model(torch.randn(1, 3, 96, 96)).shape == (1, 36, d)
        assert model.last_attention(torch.randn(1, 3, 224, 224)).shape == (1, heads, 196, 196)


def test_attention_is_softmax_of_scaled_logits_head_by_head():
    attn, x = dirl.Attention(8, 2), torch.randn(1, 5, 8)
    qkv = x[0] @ attn.qkv.weight.T + attn.qkv.bias
    heads = []
    for h in range(2):
        q, k, v = (qkv[:, 8 * i + 4 * h: 8 * i + 4 * h + 4] for i in range(3))
        heads.append((q @ k.T / math.sqrt(4)).softmax(-1) @ v)
    want = torch.cat(heads, 1) @ attn.proj.weight.T + attn.proj.bias
    torch.testing.assert_close(attn(x)[0], want)
    with torch.autocast("cpu", torch.bfloat16):  # the plain formula of attend
        torch.testing.assert_close(attn(x)[0].float(), want, rtol=0.05, atol=0.02)


def test_eq1_2_encoder_and_its_last_attention_against_the_formulas():
    model, images = tiny().eval(), torch.randn(2, 3, 64, 64)
    patches = images.unfold(2, 16, 16).unfold(3, 16, 16)  # (B, 3, 4, 4, p, p)
    filters = model.patch_embed.proj
    tokens = torch.einsum("bcrsij,dcij->brsd", patches, filters.weight).flatten(1, 2) + filters.bias
    tokens = tokens + model.pos_embed
    for block in model.blocks:
        before = tokens
        tokens = tokens + block.attn(block.norm1(tokens))
        tokens = tokens + block.mlp(block.norm2(tokens))
    torch.testing.assert_close(model(images), model.norm(tokens), atol=1e-5, rtol=1e-4)
    q, k, _ = block.attn.project(block.norm1(before))
    attention = (q @ k.mT / math.sqrt(32)).softmax(-1)
    torch.testing.assert_close(model.last_attention(images), attention)


def test_aggregated_attention_is_the_mean_of_the_heads_column_sums():
    attention = torch.randn(2, 3, 5, 5).softmax(-1)
    aggregated = dirl.aggregated_attention(attention)
    for b in range(2):
        for j in range(5):
            received = sum(attention[b, h, i, j] for h in range(3) for i in range(5)) / 3
            torch.testing.assert_close(aggregated[b, j], received)
    torch.testing.assert_close(aggregated.sum(-1), torch.full((2,), 5.0))


def test_attention_bins_of_a_hand_made_case():
    assert dirl.attention_bins(torch.tensor([0.1, 0.5, 1.0, 2.0, 2.1])) == pytest.approx((0.2, 0.6, 0.2))


def test_an_image_that_is_no_whole_number_of_patches_is_refused():
    with pytest.raises(ValueError, match="patches of 16 x 16 px"):
        tiny()(torch.randn(1, 3, 65, 64))


def test_later_blocks_are_dropped_more_often():
    for encoder in (dirl.vit_t(4, drop_path=0.3), dirl.ViTH(drop_path=0.33)):
        rates = torch.tensor([block.drop_path.p for block in encoder.blocks if isinstance(block, dirl.Block)])
        torch.testing.assert_close(rates, torch.linspace(0, rates[-1], len(rates)))
        assert rates[-1] > 0.29


def test_drop_path_keeps_the_mean_and_is_off_in_eval():
    drop = dirl.DropPath(0.25)
    x = drop(torch.ones(40_000, 1))
    assert x.unique().tolist() == pytest.approx([0, 4 / 3])
    assert x.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(drop.eval()(torch.ones(4, 1)), torch.ones(4, 1))


# ---------------------------------------------------------------- eq. 3 to 8

def test_eq3_pool_against_loops():
    tokens, p_c = torch.randn(4, 9, 5), random_prior(4, 9)
    f_c, f_b = dirl.cell_back_pool(tokens, p_c)
    for b in range(4):
        cell = [tokens[b, i] for i in range(9) if p_c[b, i] == 1]
        back = [tokens[b, i] for i in range(9) if p_c[b, i] == 0]
        torch.testing.assert_close(f_c[b], sum(cell) / len(cell))
        torch.testing.assert_close(f_b[b], sum(back) / len(back))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_eq3_empty_region_is_zero_with_no_gradient(value):
    tokens, p_c = torch.randn(2, 9, 5, requires_grad=True), torch.full((2, 9), value)
    f = dirl.cell_back_pool(tokens, p_c)[0 if value == 0 else 1]
    assert torch.equal(f, torch.zeros(2, 5))
    f.square().sum().backward()
    assert torch.equal(tokens.grad, torch.zeros_like(tokens))
    has_cell, has_back = dirl.regions_present(p_c)
    assert has_cell.all() == (value == 1) and has_back.all() == (value == 0)


def test_eq4_masks_against_loops():
    p_c = random_prior(3, 7)
    p_c[1], p_c[2] = 0, 1  # no cell; nothing but cells
    m_self, m_cross = dirl.disentangle_masks(p_c)
    for b in range(3):
        for i in range(7):
            for j in range(7):
                same = bool(p_c[b, i] == p_c[b, j])
                assert m_self[b, i, j].item() == (0 if same else -math.inf)
                assert m_cross[b, i, j].item() == (0 if not same or i == j else -math.inf)


def test_eq6_7_block_against_one_token_at_a_time():
    block, tokens, p_c = dirl.DisentangleBlock(8, 2), torch.randn(2, 6, 8), random_prior(2, 6)
    got = block(tokens, p_c)
    for b in range(2):
        q, k, v = block.attn.project(block.norm1(tokens[b: b + 1]))
        for which in range(2):
            for i in range(6):
                js = [j for j in range(6) if (p_c[b, i] == p_c[b, j]).item() == (which == 0) or i == j]
                heads = [((q[0, h, i] @ k[0, h, js].T) / 2).softmax(-1) @ v[0, h, js] for h in range(2)]
                x = tokens[b, i] + block.attn.proj(torch.cat(heads))
                x = x + block.mlp(block.norm2(x))
                torch.testing.assert_close(got[which][b, i], x, atol=1e-5, rtol=1e-5)


def test_under_m_cross_tokens_attend_to_themselves_if_the_other_region_is_empty():
    block, tokens = dirl.DisentangleBlock(8, 2), torch.randn(1, 5, 8)
    whole = block(tokens, torch.ones(1, 5))[1]
    alone = torch.cat([block(tokens[:, i: i + 1], torch.ones(1, 1))[1] for i in range(5)], 1)
    torch.testing.assert_close(whole, alone)


def test_permuting_tokens_and_prior_together_changes_nothing():
    model = dirl.DiRL(tiny(), "dirl", 32, 16).eval()
    torch.nn.init.zeros_(model.encoder.pos_embed)
    images, p_c = torch.randn(2, 3, 64, 64), random_prior(2, 16)
    perm = torch.randperm(16)
    patches = images.unfold(2, 16, 16).unfold(3, 16, 16).flatten(2, 3)[:, :, perm]  # (B, 3, n, p, p)
    shuffled = patches.unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 64, 64)
    a, b = model.represent(images, p_c)[0], model.represent(shuffled, p_c[:, perm])[0]
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_eq8_pools_the_tokens_of_each_mask_by_region():
    model = dirl.DiRL(tiny(), "dirl", 16, 8).eval()
    images, p_c = torch.randn(3, 3, 64, 64), random_prior(3, 16)
    f, _ = model.represent(images, p_c)
    tokens = model.encoder(images)
    t_self, t_cross = model.disentangle(tokens, p_c)
    for name, pooled in (("c", tokens), ("b", tokens), ("cc", t_self), ("bb", t_self), ("cb", t_cross),
                         ("bc", t_cross)):
        for b in range(3):
            region = p_c[b] == (1 if name[0] == "c" else 0)
            torch.testing.assert_close(f[name][b], pooled[b, region].mean(0))


# ---------------------------------------------------------------- eq. 9

def dino_double_loop(student, teacher, center, s_temp, t_temp, present_s, present_t):
    """DINO's loss as it is defined: pair by pair, crop by crop."""
    terms = []
    for u in range(len(teacher)):
        for v in range(len(student)):
            for b in range(student.shape[1]):
                if u != v and present_t[u, b] and present_s[v, b]:
                    p = ((teacher[u, b] - center) / t_temp).softmax(-1)
                    terms.append(-(p * (student[v, b] / s_temp).log_softmax(-1)).sum())
    return sum(terms) / len(terms) if terms else student.sum() * 0


@pytest.mark.parametrize("V", [2, 5])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_loss_and_gradient_equal_the_double_loop(V, share):
    student, teacher = torch.randn(V, 3, 11, requires_grad=True), torch.randn(2, 3, 11)
    present_s, present_t = torch.rand(V, 3) < share, torch.rand(2, 3) < share
    loss = dirl.DINOLoss(11)
    loss.center.copy_(torch.randn(11))
    want = dino_double_loop(student, teacher, loss.center.clone(), 0.1, 0.04, present_s, present_t)
    want_grad, = torch.autograd.grad(want, student)
    got = loss(student, teacher, 0.04, present_s, present_t)
    got_grad, = torch.autograd.grad(got, student)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_grad, want_grad, atol=1e-5, rtol=1e-5)
    assert (got_grad[~present_s] == 0).all()


def test_center_sees_only_rows_that_count():
    loss, teacher = dirl.DINOLoss(4), torch.randn(2, 2, 4)
    present = torch.tensor([[True, False], [False, False]])
    loss(torch.randn(2, 2, 4), teacher, 0.04, present, present)
    assert (loss.center == 0).all()  # only update_center moves it
    loss.update_center()
    torch.testing.assert_close(loss.center, 0.1 * teacher[0, 0])
    before = loss.center.clone()
    loss(torch.randn(2, 2, 4), teacher, 0.04, present & False, present & False)
    loss.update_center()
    assert torch.equal(loss.center, before)


def test_center_moves_by_all_rows_of_a_step():
    """Shards of a batch, one after the other, move the centre as the whole batch does."""
    whole, shards = dirl.DINOLoss(4), dirl.DINOLoss(4)
    student, teacher = torch.randn(3, 6, 4), torch.randn(2, 6, 4)
    present = torch.tensor([1, 0, 1, 1, 0, 1]).bool().expand(3, 6)
    whole(student, teacher, 0.04, present, present[:2])
    for k in range(3):
        shard = slice(2 * k, 2 * k + 2)
        shards(student[:, shard], teacher[:, shard], 0.04, present[:, shard], present[:2, shard])
    assert not shards.center.any()
    whole.update_center()
    shards.update_center()
    torch.testing.assert_close(whole.center, 0.1 * teacher[present[:2]].mean(0))
    torch.testing.assert_close(shards.center, whole.center)


def test_loss_is_the_teachers_entropy_and_the_divergence():
    torch.manual_seed(3)
    loss, student, teacher = dirl.DINOLoss(6), torch.randn(3, 2, 6), torch.randn(2, 2, 6)
    present = torch.tensor([[True, False], [True, True]])
    total = loss(student, teacher, 0.5, torch.ones(3, 2), present)
    q, log_p = (teacher / 0.5).softmax(-1), (student / 0.1).log_softmax(-1)
    pairs = [(q[u, b], log_p[v, b]) for u in range(2) for v in range(3) for b in range(2)
             if u != v and present[u, b]]
    entropy = sum(-(x * x.log()).sum() for x, _ in pairs) / len(pairs)
    divergence = sum((x * (x.log() - y)).sum() for x, y in pairs) / len(pairs)
    torch.testing.assert_close(loss.entropy, entropy)
    torch.testing.assert_close(total, entropy + divergence)


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_keep_their_digits_whatever_the_autocast(autocast):
    """Divided by the teacher's temperature, a logit is off by at most 0.01; in bf16 it would be 0.13."""
    head = dirl.DINOHead(24, 512)
    f = torch.randn(64, 24)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z = head.mlp(f)
        logits = head(f)
    with torch.no_grad():  # rows near a prototype, where rounding moves a cosine most
        head.mlp[-1].weight.zero_()
        head.mlp[-1].bias.copy_(head.last_layer.weight[7])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            near, z_near = head(f), head.mlp(f)
    weight = F.normalize(head.last_layer.weight.double(), dim=-1)
    for got, bottleneck in ((logits, z), (near, z_near)):
        want = F.normalize(bottleneck.double(), dim=-1) @ weight.T
        assert got.dtype == torch.float32
        assert ((got - want) / 0.04).abs().max() < 0.01
    assert near[:, 7].min() > 0.99


def test_the_loss_is_in_fp32_whatever_the_autocast():
    totals = []
    for autocast in (False, True):
        torch.manual_seed(0)
        loss_fn = dirl.DINOLoss(512)
        student = torch.randn(4, 8, 512, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_fn(student, torch.randn(2, 8, 512))
            loss_fn.update_center()
        loss.backward()
        totals.append((loss, student.grad, loss_fn.center))
    assert all(torch.equal(one, other) for one, other in zip(*totals))


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_the_last_layer_is_weight_normalised_with_its_gradient(norm_last_layer):
    head = dirl.DINOHead(8, 32, norm_last_layer=norm_last_layer).double()
    linear = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(256, 32, bias=False).double())
    norms = torch.ones(32, 1)
    if not norm_last_layer:
        norms = torch.nn.init.uniform_(head.last_norm)
    with torch.no_grad():
        linear.parametrizations.weight.original0.copy_(norms)  # g
        linear.parametrizations.weight.original1.copy_(head.last_layer.weight)  # v
    x = torch.randn(4, 8, dtype=torch.float64)
    grad = torch.randn(4, 32, dtype=torch.float64)
    got, want = head(x), linear(F.normalize(head.mlp(x), dim=-1))
    torch.testing.assert_close(got, want)
    got.backward(grad)
    want.backward(grad)
    torch.testing.assert_close(head.last_layer.weight.grad, linear.parametrizations.weight.original1.grad)


def test_eq9_weights_and_default_sizes(small_heads):
    model = dirl.DiRL(tiny(), "dirl")
    sizes = {name: head.last_layer.out_features for name, head in model.heads.items()}
    assert sizes == {"c": 65536, "b": 65536, "cc": 4096, "bb": 4096, "cb": 4096, "bc": 4096}
    model = dirl.DiRL(tiny(), "dirl", 32, 16)
    views = [torch.randn(2, 2, 3, 64, 64), torch.randn(3, 2, 3, 32, 32)]
    priors = [torch.stack([random_prior(2, 16)] * 2), torch.stack([random_prior(2, 4)] * 3)]
    student = model(views, priors)
    teacher = dirl.make_teacher(model)(views[:1], priors[:1])
    assert student["c"][0].shape == (5, 2, 32) and student["bc"][0].shape == (5, 2, 16)
    total, each = dirl.DiRLLoss(model)(student, teacher)
    want = (each["c"] + each["b"]) / 2 + 0.1 / 4 * (each["cc"] + each["bb"] + each["cb"] + each["bc"])
    torch.testing.assert_close(total.detach(), want)


def test_skip_empty_false_counts_every_region_as_present():
    model = dirl.DiRL(tiny(), "cellback", 16)
    student, target = {}, {}
    for name, share in (("c", 0.5), ("b", 1.0)):
        student[name] = torch.randn(3, 4, 16), torch.rand(3, 4) < share
        target[name] = torch.randn(2, 4, 16), torch.rand(2, 4) < share
    all_present = [{name: (x, torch.ones_like(p)) for name, (x, p) in views.items()}
                   for views in (student, target)]
    counted, each = dirl.DiRLLoss(model, skip_empty=False)(student, target)
    want, want_each = dirl.DiRLLoss(model)(*all_present)
    assert torch.equal(counted, want) and all(torch.equal(each[name], want_each[name]) for name in each)
    _, skipped = dirl.DiRLLoss(model)(student, target)
    assert torch.equal(skipped["b"], each["b"]) and not torch.equal(skipped["c"], each["c"])


@pytest.mark.parametrize("method, names", [
    ("baseline", "f"), ("cellback", "c b"), ("dirl", "c b cc bb cb bc")])
def test_methods_have_their_heads(small_heads, method, names):
    free = dirl.DiRL(tiny(), method, 32, 16, norm_last_layer=False)
    assert all(head.last_norm.requires_grad for head in free.heads.values())
    model = dirl.DiRL(tiny(), method, 32, 16)
    assert list(model.heads) == names.split() and hasattr(model, "disentangle") == (method == "dirl")


@pytest.mark.parametrize("value, absent", [(0.0, ("c", "cc", "cb")), (1.0, ("b", "bb", "bc"))])
def test_an_empty_region_has_no_gradient_and_no_nan(small_heads, value, absent):
    model = dirl.DiRL(tiny(), "dirl", 32, 16)
    views, priors = [torch.randn(2, 2, 3, 64, 64)], [torch.full((2, 2, 16), value)]
    total, each = dirl.DiRLLoss(model)(model(views, priors), dirl.make_teacher(model)(views, priors))
    total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    for name in absent:
        assert each[name] == 0
        assert all(p.grad is None or (p.grad == 0).all() for p in model.heads[name].parameters())
    assert any((p.grad != 0).any() for p in model.heads["b" if value == 0 else "c"].parameters())


def test_p_c_is_where_a_prior_is_above_0_and_every_view_size_needs_one(small_heads):
    model = dirl.DiRL(tiny(), "dirl", 16, 8)
    views = [torch.randn(2, 3, 3, 64, 64), torch.randn(1, 3, 3, 32, 32)]
    priors = [random_prior(6, 16).view(2, 3, 16), random_prior(3, 4).view(1, 3, 4)]
    want = model(views, priors)
    for scaled in ([255 * p for p in priors], [p.bool() for p in priors], [3 * p.int() for p in priors]):
        for name, (logits, present) in model(views, scaled).items():
            assert torch.equal(logits, want[name][0]) and torch.equal(present, want[name][1])
    with pytest.raises(ValueError):
        model(views, priors[:1])
    p = random_prior(2, 16)
    tokens = torch.randn(2, 16, 8)
    assert torch.equal(dirl.regions_present(p / 2)[1], dirl.regions_present(p)[1])
    for scaled in (255 * p, 3 * p.int(), p.bool(), p / 2):  # each piece by itself, for who copies it
        for got, want in zip(dirl.cell_back_pool(tokens, scaled) + dirl.disentangle_masks(scaled),
                             dirl.cell_back_pool(tokens, p) + dirl.disentangle_masks(p)):
            assert torch.equal(got, want)
    for wrong in (p.unsqueeze(-1), p[:1], p[:, :15]):  # (n, 1) as the paper writes it; a class token too many
        with pytest.raises(ValueError, match="for tokens of"):
            dirl.cell_back_pool(tokens, wrong)


def test_teacher_shares_no_storage_and_moves_by_momentum(small_heads):
    student = dirl.DiRL(tiny(), "dirl", 32, 16)
    teacher = dirl.make_teacher(student)
    held = {p.data_ptr() for p in student.parameters()}
    assert not held & {p.data_ptr() for p in teacher.parameters()}
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    before = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    dirl.update_teacher(student, teacher, 0.9)
    for old, new in zip(before, teacher.parameters()):
        torch.testing.assert_close(new, old + 0.1)


# ---------------------------------------------------------------- DSMIL

@pytest.mark.parametrize("C", [2, 3])
def test_dsmil_against_the_definition(C):
    model, bag = mil.DSMIL(10, C).requires_grad_(False), torch.randn(7, 10)
    scores, bag_scores, attention = model(bag)
    w, b = model.instance.weight, model.instance.bias
    q = torch.stack([model.query(x) for x in bag])
    rows = []
    for c in range(C):
        critical = max(range(7), key=lambda i: (w[c] @ bag[i] + b[c]).item())
        weights = torch.tensor([math.exp(q[i] @ q[critical] / math.sqrt(128)) for i in range(7)])
        weights = weights / weights.sum()
        torch.testing.assert_close(attention[:, c], weights, atol=1e-5, rtol=1e-5)
        rows.append(sum(weights[i] * bag[i] for i in range(7)))
    for c in range(C):
        want = sum((model.bag.weight[c, k] * rows[k]).sum() for k in range(C)) + model.bag.bias[c]
        torch.testing.assert_close(bag_scores[c], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores, bag @ w.T + b)
    perm = torch.randperm(7)
    torch.testing.assert_close(model(bag[perm])[1], bag_scores)
    both = (bag_scores.sigmoid() + scores.max(0).values.sigmoid()) / 2
    torch.testing.assert_close(mil.dsmil_predict(model, bag), both)


def test_dsmil_loss_by_hand():
    scores, bag = torch.tensor([[0.0, 1.0], [2.0, -1.0]]), torch.tensor([0.5, -0.5])
    bce = lambda x, y: math.log(1 + math.exp(-x if y else x))
    want = 0.5 * ((bce(0.5, 1) + bce(-0.5, 0)) / 2 + (bce(2.0, 1) + bce(1.0, 0)) / 2)
    assert mil.dsmil_loss(scores, bag, 0).item() == pytest.approx(want, rel=1e-5)


def test_class_weights_by_hand():
    weights = mil.class_weights([0, 0, 0, 1], 2)
    torch.testing.assert_close(weights, torch.tensor([4 / 6, 4 / 2]))
    for labels in ([0, 0], [0, 1, 2]):
        with pytest.raises(ValueError, match="each of 2 needs some"):
            mil.class_weights(labels, 2)
    scores, bag = torch.randn(5, 2), torch.randn(2)
    for label in (0, 1):
        weighted = mil.dsmil_loss(scores, bag, label, weights)
        torch.testing.assert_close(weighted, weights[label] * mil.dsmil_loss(scores, bag, label))
    bags = [(torch.randn(3, 8) + label, label) for label in (0, 0, 0, 1)]
    plain, ones, weighted = (mil.train_dsmil(bags, bags, 2, epochs=2, weights=given).instance.weight
                             for given in (None, torch.ones(2), weights))
    assert torch.equal(plain, ones) and not torch.equal(plain, weighted)


def test_dsmil_learns_from_one_telling_instance_and_repeats_with_its_seed():
    def bags(count):
        out = []
        for i in range(count):
            bag = torch.randn(12, 16)
            bag[0, i % 2] += 6
            out.append((bag, i % 2))
        return out
    train, val, test = bags(24), bags(8), bags(20)
    model = mil.train_dsmil(train, val, 2, epochs=30, lr=2e-3)
    right = sum(mil.dsmil_predict(model, x).argmax().item() == y for x, y in test)
    assert right >= 16
    once = mil.train_dsmil(train, val, 2, epochs=2, lr=2e-3)
    again = mil.train_dsmil(train, val, 2, epochs=2, lr=2e-3)
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), again.parameters()))


def test_dsmil_training_against_its_loop():
    """Adam with betas (0.5, 0.9) and weight decay, batch 1; the rate falls by a cosine to 5e-6."""
    bags = [(torch.randn(5, 4) + k % 2, k % 2) for k in range(6)]
    got = mil.train_dsmil(bags, bags, 2, epochs=3, lr=0.1, weight_decay=0.01)
    torch.manual_seed(0)
    model = mil.DSMIL(4, 2)
    orders = [torch.randperm(6).tolist() for _ in range(3)]
    optimizer = torch.optim.Adam(model.parameters(), 0.1, (0.5, 0.9), weight_decay=0.01)
    states = []
    for epoch, order in enumerate(orders):
        optimizer.param_groups[0]["lr"] = 5e-6 + (0.1 - 5e-6) * (1 + math.cos(math.pi * epoch / 3)) / 2
        for i in order:
            optimizer.zero_grad()
            mil.dsmil_loss(*model(bags[i][0])[:2], bags[i][1]).backward()
            optimizer.step()
        loss = sum(mil.dsmil_loss(*model(x)[:2], y).item() for x, y in bags)
        states.append((loss, copy.deepcopy(model.state_dict())))
    for name, value in min(states, key=lambda state: state[0])[1].items():
        torch.testing.assert_close(got.state_dict()[name], value)


def test_dsmil_refuses_features_that_give_no_finite_loss():
    bag = torch.full((3, 4), float("nan")), 0
    with pytest.raises(FloatingPointError, match="no validation loss is finite"):
        mil.train_dsmil([bag], [bag], 2, epochs=2)


def test_dsmil_keeps_the_epoch_with_the_lowest_validation_loss():
    train = [(torch.randn(5, 8) + label, label) for label in (0, 1, 0, 1)]
    val = [(torch.randn(5, 8) - label, label) for label in (0, 1)]  # the contrary: training makes it worse
    losses = []
    model = mil.train_dsmil(train, val, 2, epochs=10, lr=2e-2,
                            progress=lambda epoch, loss, val_loss: losses.append(val_loss))
    assert losses[-1] > min(losses) + 0.1
    with torch.no_grad():
        kept = sum(mil.dsmil_loss(*model(x)[:2], y).item() for x, y in val) / 2
    assert kept == pytest.approx(min(losses), rel=1e-6)


# ---------------------------------------------------------------- P_c

def test_c_max_pooled_equals_direct_binning_and_loops():
    rng = np.random.default_rng(0)
    for size in (224, 96):
        xy = rng.uniform(-20, size + 20, (60, 2))
        xy[:4] = [[0, 0], [size, 5], [5, size], [np.nextafter(size, 0)] * 2]
        want = torch.zeros(size // 16, size // 16)
        for x, y in xy:
            if 0 <= x < size and 0 <= y < size:
                want[int(y // 16), int(x // 16)] = 1
        drawn = prior.downsample_prior(prior.centroid_map(xy, size))
        assert torch.equal(drawn, want.flatten())
        assert torch.equal(prior.bin_centroids(xy, size), want.flatten())
    assert prior.bin_centroids(np.zeros((0, 2)), 224).sum() == 0 == prior.bin_centroids([], 224).sum()
    for function in (prior.centroid_map, prior.bin_centroids):
        with pytest.raises(ValueError):  # x, y and a type, which would be read as other points
            function(np.ones((50, 3)), 224)


# ---------------------------------------------------------------- views

def random_box(rng, size, scale):
    """Returns left, top, width, height of DINO's random resized crop: ten tries, else the whole image."""
    for _ in range(10):
        area = rng.uniform(*scale) * size * size
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= size and 0 < h <= size:
            return rng.randint(0, size - w), rng.randint(0, size - h), w, h
    return 0, 0, size, size


def pillow_hue(image, turn):
    """Returns the image with its hue turned in HSV by a share of a circle."""
    h, s, v = image.convert("HSV").split()
    h = Image.fromarray((np.asarray(h).astype(int) + round(turn * 255)).astype(np.uint8))
    return Image.merge("HSV", (h, s, v)).convert("RGB")


def tissue_like(size=224, seed=0):
    """Returns a synthetic image of smooth colours, uint8 (size, size, 3)."""
    noise = np.random.default_rng(seed).standard_normal((size, size, 1))
    smooth = sum(ndimage.gaussian_filter(noise, (sigma, sigma, 0)) * sigma for sigma in (1.5, 6))
    return np.clip(smooth * [60, 90, 50] + [180, 130, 170], 0, 255).astype(np.uint8)


def as_batch(*arrays):
    return torch.stack([torch.from_numpy(a.copy()).permute(2, 0, 1) for a in arrays]).float() / 255


@pytest.mark.parametrize("box", [(0, 0, 224, 224), (31, 57, 150, 130), (10, 80, 100, 100)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_resampling_is_pillows_bilinear_crop(box, mirrored):
    image = tissue_like()
    left, top, w, h = box
    want = Image.fromarray(image).resize((224, 224), Image.BILINEAR, box=(left, top, left + w, top + h))
    want = np.asarray(ImageOps.mirror(want) if mirrored else want).astype(float)
    got = data.resample(as_batch(image), torch.tensor([box]).float(), torch.tensor([mirrored]), 224)[0] * 255
    difference = np.abs(got.permute(1, 2, 0).numpy() - want)[3:-3, 3:-3]  # Pillow's window ends at the box
    assert difference.max() <= 1.01


@pytest.mark.parametrize("size", [224, 96])
def test_c_drawn_in_the_view_and_max_pooled_is_the_binning_under_every_crop_and_flip(size):
    generator = torch.Generator().manual_seed(3)
    B = 40
    boxes = data.random_boxes(B, 224, (0.05, 1.0), data.Draws(generator))
    flip = torch.rand(B, generator=generator) < 0.5
    cells = torch.rand(B, 60, 2, generator=generator) * 240 - 8
    cells[:, 50:] = float("nan")
    cells[:, :5] = (cells[:, :5] / 16).round() * 16  # on boundaries of patches
    got = prior.view_prior(cells, boxes, flip, size)
    for b in range(B):
        xy = (cells[b, :50] - boxes[b, :2]) / boxes[b, 2:] * size
        c_map = prior.centroid_map(xy, size)
        c_map = c_map.flip(-1) if flip[b] else c_map
        assert torch.equal(prior.downsample_prior(c_map), got[b])


def jitter(image, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, grey=False, order=(0, 1, 2, 3)):
    x = as_batch(image)
    t = lambda v: torch.tensor([v])
    m = data.jitter_matrix(x.mean((2, 3)), t(brightness), t(contrast), t(saturation), t(hue), t(grey),
                           t(order))
    y = (m[0, :, :3] @ x[0].flatten(1) + m[0, :, 3:]).clamp(0, 1).view_as(x[0])
    return y.permute(1, 2, 0).numpy() * 255


@pytest.mark.parametrize("factor", [0.6, 0.85, 1.25])
def test_jitter_is_pillows_operation_by_operation(factor):
    image = (tissue_like() * 0.75).astype(np.uint8)  # so that nothing is clipped
    pil = Image.fromarray(image)
    for name, enhance in (("brightness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast),
                          ("saturation", ImageEnhance.Color)):
        want = np.asarray(enhance(pil).enhance(factor)).astype(float)
        assert np.abs(jitter(image, **{name: factor}) - want).max() <= 2, name
    assert np.abs(jitter(image, grey=True) - np.asarray(pil.convert("L"))[..., None]).max() <= 1
    both = ImageEnhance.Brightness(ImageEnhance.Contrast(pil).enhance(factor)).enhance(0.9)
    got = jitter(image, brightness=0.9, contrast=factor, order=(1, 3, 0, 2))
    assert np.abs(got - np.asarray(both).astype(float)).max() <= 3


@pytest.mark.parametrize("turn", [-0.1, 0.05, 0.1])
def test_hue_turns_as_pillows_does_and_keeps_the_luma(turn):
    image = (tissue_like() * 0.75).astype(np.uint8)
    got, want = jitter(image, hue=turn), np.asarray(pillow_hue(Image.fromarray(image), turn)).astype(float)
    luma = np.array(data.LUMA)
    assert np.abs(got @ luma - image @ luma).max() < 1
    moved = want.mean((0, 1)) - image.mean((0, 1))
    colour = lambda v: v - v.mean()
    a, b = colour(moved), colour(got.mean((0, 1)) - image.mean((0, 1)))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.8  # the same way round
    assert 0.4 < np.linalg.norm(b) / np.linalg.norm(a) < 2.5


def test_blur_is_a_gaussian_and_solarize_is_pillows():
    image = tissue_like()
    got = data.blur(as_batch(image, image), torch.tensor([0.7, 2.0]))
    for x, sigma in zip(got, (0.7, 2.0)):
        want = ndimage.gaussian_filter(image / 255, (sigma, sigma, 0), mode="nearest", radius=6)
        np.testing.assert_allclose(x.permute(1, 2, 0).numpy(), want, atol=1e-4)
    want = np.asarray(ImageOps.solarize(Image.fromarray(image)))
    got = data.solarize(as_batch(image))[0].permute(1, 2, 0).numpy() * 255
    np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_random_boxes_are_distributed_as_torchvisions(scale):
    boxes = data.random_boxes(4000, 224, scale, data.Draws(torch.Generator().manual_seed(0)))
    rng = random.Random(0)
    want = np.array([random_box(rng, 224, scale) for _ in range(4000)])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 224).all()
    assert torch.equal(boxes, boxes.round())
    np.testing.assert_allclose(boxes.mean(0).numpy(), want.mean(0), atol=4)
    np.testing.assert_allclose(boxes.std(0).numpy(), want.std(0), atol=3)


def test_views_have_dinos_shapes_and_repeat_with_their_seed():
    crops = (as_batch(tissue_like(), tissue_like(seed=1)) * 255).to(torch.uint8)
    cells = torch.rand(2, 30, 2) * 224
    make = lambda seed: data.make_views(crops, cells, torch.Generator().manual_seed(seed))
    x, priors = make(0)
    assert [tuple(v.shape) for v in x] == [(2, 2, 3, 224, 224), (8, 2, 3, 96, 96)]  # A.1.2: 196 and 36 tokens
    assert [tuple(p.shape) for p in priors] == [(2, 2, 196), (8, 2, 36)]
    assert all(torch.equal(a, b) for a, b in zip(x + priors, sum(make(0), [])))
    assert not torch.equal(x[0], make(1)[0][0])
    assert len(data.make_views(crops, cells, torch.Generator(), data.Augmentation(local_crops=0))[0]) == 1


def test_views_of_other_sizes_and_pixels_are_refused():
    uint8 = torch.zeros(2, 3, 224, 224, dtype=torch.uint8)
    cells = torch.zeros(2, 1, 2)
    for crops, xy in ((uint8 / 255, cells),  # as torchvision's ToTensor gives: would be black
                      (uint8[..., :160], cells), (uint8, cells[0])):
        with pytest.raises(ValueError, match="square uint8 crops"):
            data.make_views(crops, xy, torch.Generator())
    with pytest.raises(ValueError, match="100 px do not divide into patches of 16"):
        prior.bin_centroids([], 100)
    with pytest.raises(ValueError, match="64 x 100 px do not divide into patches of 16"):
        prior.downsample_prior(torch.zeros(64, 100))
    with pytest.raises(ValueError, match="100 px"):
        prior.view_prior(torch.zeros(1, 1, 2), torch.tensor([[0, 0, 50, 50]]), torch.tensor([False]), 100)


def test_views_are_in_fp32_under_autocast_and_take_other_patches():
    crops = (as_batch(tissue_like(), tissue_like(seed=1)) * 255).to(torch.uint8)
    cells = torch.rand(2, 5, 2) * 224
    settings = data.Augmentation(local_crops=1, patch_size=8, local_size=96)
    want, priors = data.make_views(crops, cells, torch.Generator().manual_seed(0), settings)
    assert [p.shape[-1] for p in priors] == [28 ** 2, 12 ** 2]
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = data.make_views(crops, cells, torch.Generator().manual_seed(0), settings)
    assert all(torch.equal(x, y) and x.dtype == torch.float32 for x, y in zip(got, want))


PLAIN = dict(jitter=0, greyscale=0, solarize=0, blur=0, mean=(0,) * 3, std=(1,) * 3)


def test_cells_go_through_the_crop_and_the_flip_of_their_view():
    """A crop that is white where its cells are: P_c is 1 where a patch is white, 0 where it is black."""
    crops = torch.zeros(32, 3, 224, 224, dtype=torch.uint8)
    crops[..., :112] = 255
    cells = torch.cartesian_prod(torch.arange(2., 112, 2), torch.arange(2., 224, 2)).expand(32, -1, -1)
    generator = torch.Generator().manual_seed(0)
    views, priors = data.make_views(crops, cells, generator, data.Augmentation(local_crops=2, **PLAIN))
    for x, p in zip(views, priors):
        white = F.avg_pool2d(x.flatten(0, 1), 16).mean(1).flatten(1)  # of each patch
        p = p.flatten(0, 1)
        assert (p[white > 0.99] == 1).all() and (p[white < 0.01] == 0).all()
        assert (white > 0.99).any() and (white < 0.01).any()
    left, right = views[0].flatten(0, 1).mean(1).chunk(2, -1)
    mirrored = (left.mean((1, 2)) < right.mean((1, 2))).float().mean()
    assert 0.3 < mirrored < 0.7  # of 64 views


def test_each_kind_of_view_has_dinos_probabilities(monkeypatch):
    shares, scales, sigmas = [], [], []
    boxes_of = data.random_boxes

    def apply_where(chosen, function, images, *values):
        shares.append((function.__name__, chosen.float().mean().item()))
        sigmas.extend(values)
        return images

    def random_boxes(count, size, scale, draws):
        scales.append(scale)
        return boxes_of(count, size, scale, draws)
    monkeypatch.setattr(data, "apply_where", apply_where)
    monkeypatch.setattr(data, "random_boxes", random_boxes)
    augmentation = data.Augmentation(local_crops=1, global_size=16, local_size=16)
    data.make_views(torch.zeros(2000, 3, 16, 16, dtype=torch.uint8), torch.zeros(2000, 1, 2),
                    torch.Generator().manual_seed(0), augmentation)
    want = [("blur", 1), ("solarize", 0), ("blur", 0.1), ("solarize", 0.2), ("blur", 0.5), ("solarize", 0)]
    assert [name for name, _ in shares] == [name for name, _ in want]
    np.testing.assert_allclose([share for _, share in shares], [share for _, share in want], atol=0.04)
    assert scales == [(0.4, 1.0), (0.4, 1.0), (0.05, 0.4)]
    assert all(0.1 <= s.min() < 0.12 and 1.98 < s.max() <= 2 for s in sigmas)


def test_jitter_is_drawn_as_dino_draws_it(monkeypatch):
    """With probability 0.8, strengths 0.4, 0.4, 0.2 and 0.1, in any order; a fifth of the views is grey."""
    drawn = []

    def jitter_matrix(mean, *values):
        drawn.extend(values)
        return torch.eye(3, 4).expand(len(mean), 3, 4)
    monkeypatch.setattr(data, "jitter_matrix", jitter_matrix)
    data.random_jitter(torch.zeros(4800, 3, 2, 2), data.Draws(torch.Generator().manual_seed(0)))
    *factors, hue, grey, order = drawn
    for value, strength in zip((*(factor - 1 for factor in factors), hue), (0.4, 0.4, 0.2, 0.1)):
        assert 0.78 < (value != 0).float().mean() < 0.82
        assert 0.97 * strength < value.max() <= strength and -strength <= value.min() < -0.97 * strength
    assert 0.18 < grey.float().mean() < 0.22
    counts = torch.unique(order, dim=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 140 and counts.max() < 260


# ---------------------------------------------------------------- schedules, clipping, order of the crops

def test_schedules_by_hand():
    assert optimization.cosine(1.0, 0.0, 5, 20, 10) == 0.5
    assert optimization.cosine(1.0, 0.0, 10, 20, 10) == 1.0
    assert optimization.cosine(1.0, 0.0, 15, 20, 10) == pytest.approx(0.5)
    assert optimization.cosine(0.996, 1, 20, 20) == pytest.approx(1)
    schedules = optimization.Schedules(
        steps=20, lr=1, min_lr=0, warmup_steps=10, weight_decay=0.04, weight_decay_end=0.4, momentum=0.996,
        teacher_temp=0.07, warmup_teacher_temp=0.04, warmup_temp_steps=10, frozen_steps=0)
    for step, want in ((0, (0, 0.04, 0.996, 0.04)), (5, (0.5, 0.092721, 0.996586, 0.055)),
                       (10, (1, 0.22, 0.998, 0.07)), (20, (0, 0.4, 1, 0.07))):
        assert schedules.at(step) == pytest.approx(want, abs=1e-6)  # lr, weight decay, momentum, temperature


def test_defaults_are_the_papers_and_dinos():
    args = train.arguments(["--data", "lung"])
    assert (args.batch, args.out_dim, args.disentangled_dim, args.epochs) == (256, 65536, 4096, 100)
    assert (args.lambda_1, args.lambda_2, args.lr, args.min_lr) == (0.5, 0.1 / 4, 5e-4, 1e-6)
    assert (args.momentum, args.teacher_temp, args.student_temp) == (0.996, 0.04, 0.1)
    assert (args.clip, args.drop_path, args.center_momentum, args.freeze_last_layer) == (3.0, 0.1, 0.9, 1)
    assert (args.warmup_epochs, args.weight_decay, args.weight_decay_end) == (10, 0.04, 0.4)
    assert (args.warmup_teacher_temp, args.warmup_teacher_temp_epochs) == (0.04, 0)
    assert args.norm_last_layer
    assert (args.jitter, args.greyscale, args.solarize, args.blur) == (1, 1, 1, 1)
    assert (args.stats, args.empty_regions) == ("imagenet", "skip")
    views = data.Augmentation()
    assert (args.local_crops, args.global_size, args.local_size) == (8, 224, 96)
    assert (views.local_crops, views.global_size, views.local_size) == (8, 224, 96)
    assert args.global_scale == views.global_scale == (0.4, 1.0)
    assert args.local_scale == views.local_scale == (0.05, 0.4)
    epochs = {d: train.arguments(["--data", d]).epochs for d in ("brca", "paad", "bright3", "bright6")}
    assert epochs == {"brca": 30, "paad": 100, "bright3": 50, "bright6": 50}
    assert [DATASETS[d].mpp for d in ("lung", "brca", "paad", "bright3")] == [2.0, 2.0, 2.0, 1.0]


def test_dsmil_and_fine_tuning_have_the_settings_of_a_1_2():
    default = {name: value.default for name, value in inspect.signature(mil.train_dsmil).parameters.items()}
    assert (default["lr"], default["weight_decay"]) == (2e-4, 5e-2)
    args = slides_arguments(["--data", "lung"])
    assert (args.mil_lr, args.mil_weight_decay) == (2e-4, 5e-2)
    assert default["epochs"] == args.epochs == 200  # Li et al.
    for name, lr, epochs, milestones in (("mhist", 3e-4, 40, [20, 30]), ("chaoyang", 1e-4, 45, [20, 30, 40]),
                                         ("some/folder", 3e-4, 40, [20, 30])):
        args = patches_arguments(["--data", name])
        assert (args.lr, args.epochs, args.milestones) == (lr, epochs, milestones)
        assert (args.weight_decay, args.batch, args.folds) == (1e-2, 128, 5)


@pytest.mark.parametrize("step", [5, 15])  # the last layers are frozen in the first epoch, of ten steps
def test_a_step_against_its_parts(small_heads, step):
    """Eq. 9 on a step's views; the student moves by AdamW, the teacher and the centres by their momenta."""
    args = train.arguments(["--data", "lung", "--out-dim", "32", "--disentangled-dim", "16", "--clip", "0.05",
                            "--global-size", "64", "--local-size", "32", "--local-crops", "2",
                            "--momentum", "0.9", "--lr", "0.5", "--precision", "fp32", "--device", "cpu"])
    settings = train.settings_of(args, 10, (0.5,) * 3, (0.2,) * 3)
    recipe = train.build_dirl(tiny(drop_path=0.1), args)
    by_hand = train.Recipe(*copy.deepcopy((recipe.student, recipe.teacher, recipe.loss)))
    images = torch.randint(256, (3, 3, 224, 224), dtype=torch.uint8)
    cells = torch.rand(3, 20, 2) * 224
    optimizer = optimization.build_optimizer(recipe.student)
    schedule, values = train.training_step(recipe, recipe.student, optimizer, images, cells, step, settings)

    views, priors = train.views_of_step(images, cells, step, settings, (0, 1), counts=False)
    teacher = by_hand.teacher(views[:1], priors[:1])
    loss, each = by_hand.loss(by_hand.student(views, priors), teacher, schedule.teacher_temp)
    torch.testing.assert_close(values[: 1 + len(each)], torch.stack([loss.detach(), *each.values()]))
    loss.backward()
    optimizer = torch.optim.AdamW([
        {"params": [p for p in by_hand.student.parameters() if (p.ndim > 1) == decays],
         "weight_decay": schedule.weight_decay * decays} for decays in (True, False)], schedule.lr)
    for name, p in by_hand.student.named_parameters():
        torch.nn.utils.clip_grad_norm_(p, 0.05)
        if step < 10 and "last_layer" in name:
            p.grad = None
    optimizer.step()
    for name, p in by_hand.student.named_parameters():
        torch.testing.assert_close(recipe.student.state_dict()[name], p.detach(), msg=name)
    moved = zip(recipe.teacher.parameters(), by_hand.teacher.parameters(), by_hand.student.parameters())
    for p, old, new in moved:
        torch.testing.assert_close(p, schedule.momentum * old + (1 - schedule.momentum) * new.detach())
    for name, (logits, present) in teacher.items():
        torch.testing.assert_close(recipe.loss.losses[name].center, 0.1 * logits[present].mean(0))


def test_a_runs_flags_are_its_schedules():
    args = train.arguments(["--data", "lung", "--device", "cpu", "--epochs", "20", "--batch", "64",
                            "--lr", "0.1", "--min-lr", "1e-5", "--warmup-epochs", "3",
                            "--weight-decay", "0.1", "--weight-decay-end", "0.2", "--momentum", "0.95",
                            "--teacher-temp", "0.05", "--warmup-teacher-temp", "0.03",
                            "--warmup-teacher-temp-epochs", "4", "--freeze-last-layer", "2"])
    want = optimization.Schedules(
        steps=200, lr=0.1 / 4, min_lr=1e-5, warmup_steps=30, weight_decay=0.1, weight_decay_end=0.2,
        momentum=0.95, teacher_temp=0.05, warmup_teacher_temp=0.03, warmup_temp_steps=40, frozen_steps=20)
    assert train.settings_of(args, 10, (0,) * 3, (1,) * 3).schedules == want


def test_a_batch_in_shards_has_the_gradient_of_the_whole(small_heads):
    """Of the baseline; a plain gradient step shows the gradient's scale, which AdamW would hide."""
    args = train.arguments(["--data", "lung", "--method", "baseline", "--out-dim", "32", "--clip", "0",
                            "--global-size", "64", "--local-crops", "0", "--batch", "64", "--device", "cpu",
                            "--precision", "fp32"])
    settings = train.settings_of(args, 10, (0.5,) * 3, (0.2,) * 3)
    start = train.build_dirl(tiny(), args)
    images = torch.randint(256, (4, 3, 224, 224), dtype=torch.uint8)
    students = []
    for shards in (1, 2):
        recipe = train.Recipe(*copy.deepcopy((start.student, start.teacher, start.loss)))
        p = list(recipe.student.parameters())
        optimizer = torch.optim.SGD([{"params": p[:1]}, {"params": p[1:]}], 1.0)
        train.training_step(recipe, recipe.student, optimizer, images, torch.zeros(4, 1, 2), 60,
                            dataclasses.replace(settings, accumulate=shards))
        students.append(torch.cat([(new - old).flatten() for new, old in zip(p, start.student.parameters())]))
    torch.testing.assert_close(*students, atol=1e-8, rtol=1e-3)
    assert students[0].abs().max() > 1e-5


def test_gradients_are_clipped_parameter_by_parameter():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    a.grad, b.grad = torch.tensor([30.0, 40.0]), torch.tensor([0.3, 0.4])
    optimization.clip_gradients([a, b], 3.0)
    torch.testing.assert_close(a.grad, torch.tensor([1.8, 2.4]))
    torch.testing.assert_close(b.grad, torch.tensor([0.3, 0.4]))


def test_an_epoch_draws_no_crop_twice_and_resumes_in_the_middle():
    whole = list(optimization.batches(10, 3, 0, 9, seed=1))
    assert whole[4:] == list(optimization.batches(10, 3, 4, 9, seed=1))
    for epoch in range(3):
        drawn = sum(whole[3 * epoch: 3 * epoch + 3], [])
        assert len(set(drawn)) == 9
    assert whole[:3] != whole[3:6]
