"""Tests of the mathematics: brute force, hand-made cases, invariants, gradients."""
import csv
import json
import math
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import demo
import numpy as np
import pytest
import slides as slides_py
import tifffile
import torch
import torch.nn.functional as F
import views as views_py
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial import cKDTree

import data as data_py
import dirl
import eval as eval_py
import mil
import prior as prior_py
import train as train_py


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny(**kw):
    return dirl.VisionTransformer(64, 2, 2, img_size=64, **kw)


def random_prior(B, n):
    prior = (torch.rand(B, n) < 0.4).float()
    prior[:, 0], prior[:, 1] = 1, 0
    return prior


# ---------------------------------------------------------------- encoder

@pytest.mark.parametrize("arch, d, heads, millions, exact", [
    ("vit_t", 192, 3, 5, 5_524_032), ("vit_s", 384, 6, 22, 21_664_896), ("vit_h", 192, 3, None, 16_420_032)])
def test_parameter_counts_and_shapes(arch, d, heads, millions, exact):
    model = dirl.ARCHS[arch]().eval()
    count = sum(p.numel() for p in model.parameters())
    assert count == exact
    if millions:
        assert abs(count / 1e6 - millions) < 0.6
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


def test_last_attention_rows_sum_to_one_and_columns_total_n():
    attention = tiny().eval().last_attention(torch.randn(3, 3, 64, 64))
    torch.testing.assert_close(attention.sum(-1), torch.ones(3, 2, 16))
    torch.testing.assert_close(dirl.aggregated_attention(attention).sum(-1), torch.full((3,), 16.0))


def test_attention_bins_of_a_hand_made_case():
    assert dirl.attention_bins(torch.tensor([0.1, 0.5, 1.0, 2.0, 2.1])) == pytest.approx((0.2, 0.6, 0.2))


def test_bad_image_size_is_told():
    with pytest.raises(ValueError, match="16 x 16 px patches"):
        tiny()(torch.randn(1, 3, 65, 64))


def test_drop_path_keeps_the_mean_and_is_off_in_eval():
    drop = dirl.DropPath(0.25)
    x = drop(torch.ones(40_000, 1))
    assert x.unique().tolist() == pytest.approx([0, 4 / 3])
    assert x.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(drop.eval()(torch.ones(4, 1)), torch.ones(4, 1))


# ---------------------------------------------------------------- eq. 3 to 8

def test_eq3_pool_against_loops():
    tokens, prior = torch.randn(4, 9, 5), random_prior(4, 9)
    f_c, f_b = dirl.cell_back_pool(tokens, prior)
    for b in range(4):
        cell = [tokens[b, i] for i in range(9) if prior[b, i] == 1]
        back = [tokens[b, i] for i in range(9) if prior[b, i] == 0]
        torch.testing.assert_close(f_c[b], sum(cell) / len(cell))
        torch.testing.assert_close(f_b[b], sum(back) / len(back))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_eq3_empty_region_is_zero_with_no_gradient(value):
    tokens, prior = torch.randn(2, 9, 5, requires_grad=True), torch.full((2, 9), value)
    f = dirl.cell_back_pool(tokens, prior)[0 if value == 0 else 1]
    assert torch.equal(f, torch.zeros(2, 5))
    f.square().sum().backward()
    assert torch.equal(tokens.grad, torch.zeros_like(tokens))
    has_cell, has_back = dirl.regions_present(prior)
    assert has_cell.all() == (value == 1) and has_back.all() == (value == 0)


def test_eq4_masks_against_loops():
    prior = random_prior(3, 7)
    m_self, m_cross = dirl.disentangle_masks(prior)
    for b in range(3):
        for i in range(7):
            for j in range(7):
                same = bool(prior[b, i] == prior[b, j])
                assert m_self[b, i, j].item() == (0 if same else -math.inf)
                assert m_cross[b, i, j].item() == (0 if not same or i == j else -math.inf)


@pytest.mark.parametrize("value", [0.0, 1.0, None])
def test_eq5_masked_rows_sum_to_one(value):
    prior = random_prior(2, 9) if value is None else torch.full((2, 9), value)
    for mask in dirl.disentangle_masks(prior):
        rows = (torch.randn(2, 9, 9) + mask).softmax(-1)
        torch.testing.assert_close(rows.sum(-1), torch.ones(2, 9))
        assert (rows[mask == -math.inf] == 0).all()


def test_eq6_7_block_against_one_token_at_a_time():
    block, tokens, prior = dirl.DisentangleBlock(8, 2), torch.randn(2, 6, 8), random_prior(2, 6)
    got = block(tokens, prior)
    for b in range(2):
        q, k, v = block.attn.project(block.norm1(tokens[b: b + 1]))
        for which in range(2):
            for i in range(6):
                seen = [j for j in range(6) if (prior[b, i] == prior[b, j]).item() == (which == 0) or i == j]
                heads = [((q[0, h, i] @ k[0, h, seen].T) / 2).softmax(-1) @ v[0, h, seen] for h in range(2)]
                x = tokens[b, i] + block.attn.proj(torch.cat(heads))
                x = x + block.mlp(block.norm2(x))
                torch.testing.assert_close(got[which][b, i], x, atol=1e-5, rtol=1e-5)


def test_the_block_takes_every_token_for_itself_where_cross_is_vacuous():
    block, tokens = dirl.DisentangleBlock(8, 2), torch.randn(1, 5, 8)
    whole = block(tokens, torch.ones(1, 5))[1]
    alone = torch.cat([block(tokens[:, i: i + 1], torch.ones(1, 1))[1] for i in range(5)], 1)
    torch.testing.assert_close(whole, alone)


def test_permuting_tokens_and_prior_together_changes_nothing():
    model = dirl.DiRL(tiny(), "dirl", 32, 16).eval()
    torch.nn.init.zeros_(model.encoder.pos_embed)
    images, prior = torch.randn(2, 3, 64, 64), random_prior(2, 16)
    perm = torch.randperm(16)
    patches = images.unfold(2, 16, 16).unfold(3, 16, 16).flatten(2, 3)[:, :, perm]  # (B, 3, n, p, p)
    shuffled = patches.unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 64, 64)
    a, b = model.represent(images, prior), model.represent(shuffled, prior[:, perm])
    for name in a:
        torch.testing.assert_close(a[name][0], b[name][0], atol=1e-5, rtol=1e-4)


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
    torch.testing.assert_close(loss.center, 0.1 * teacher[0, 0])
    before = loss.center.clone()
    loss(torch.randn(2, 2, 4), teacher, 0.04, present & False, present & False)
    assert torch.equal(loss.center, before)


def test_eq9_weights_and_default_sizes():
    model = dirl.DiRL(tiny(), "dirl")
    sizes = {name: head.last_layer.out_features for name, head in model.heads.items()}
    assert sizes == {"c": 65536, "b": 65536, "cc": 4096, "bb": 4096, "cb": 4096, "bc": 4096}
    model = dirl.DiRL(tiny(), "dirl", 32, 16)
    views, priors = [torch.randn(2, 2, 3, 64, 64), torch.randn(3, 2, 3, 32, 32)], [
        torch.stack([random_prior(2, 16)] * 2), torch.stack([random_prior(2, 4)] * 3)]
    student = model(views, priors)
    teacher = dirl.make_teacher(model)(views[:1], priors[:1])
    assert student["c"][0].shape == (5, 2, 32) and student["bc"][0].shape == (5, 2, 16)
    total, each = dirl.DiRLLoss(model)(student, teacher)
    want = (each["c"] + each["b"]) / 2 + 0.1 / 4 * (each["cc"] + each["bb"] + each["cb"] + each["bc"])
    torch.testing.assert_close(total.detach(), want)


@pytest.mark.parametrize("method, names", [
    ("baseline", "f"), ("cellback", "c b"), ("dirl", "c b cc bb cb bc")])
def test_methods_have_their_heads(method, names):
    model = dirl.DiRL(tiny(), method, 32, 16)
    assert list(model.heads) == names.split() and hasattr(model, "disentangle") == (method == "dirl")


@pytest.mark.parametrize("value, absent", [(0.0, ("c", "cc", "cb")), (1.0, ("b", "bb", "bc"))])
def test_no_gradient_and_no_nan_from_a_region_that_is_not_there(value, absent):
    model = dirl.DiRL(tiny(), "dirl", 32, 16)
    views, priors = [torch.randn(2, 2, 3, 64, 64)], [torch.full((2, 2, 16), value)]
    total, each = dirl.DiRLLoss(model)(model(views, priors), dirl.make_teacher(model)(views, priors))
    total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    for name in absent:
        assert each[name] == 0
        assert all(p.grad is None or (p.grad == 0).all() for p in model.heads[name].parameters())
    assert any((p.grad != 0).any() for p in model.heads["b" if value == 0 else "c"].parameters())


def test_head_outputs_are_cosines():
    head = dirl.DINOHead(8, 32)
    logits = head(torch.randn(4, 8))
    z, w = F.normalize(head.mlp(torch.ones(1, 8)), dim=-1), head.last_layer.weight
    torch.testing.assert_close(head(torch.ones(1, 8))[0, 3], z[0] @ w[3] / w[3].norm())
    assert logits.abs().max() <= 1 + 1e-5


def test_teacher_shares_no_storage_and_moves_by_momentum():
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


def test_dsmil_loss_by_hand():
    scores, bag = torch.tensor([[0.0, 1.0], [2.0, -1.0]]), torch.tensor([0.5, -0.5])
    bce = lambda x, y: math.log(1 + math.exp(-x if y else x))
    want = 0.5 * ((bce(0.5, 1) + bce(-0.5, 0)) / 2 + (bce(2.0, 1) + bce(1.0, 0)) / 2)
    assert mil.dsmil_loss(scores, bag, 0).item() == pytest.approx(want, rel=1e-5)


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
    again = mil.train_dsmil(train, val, 2, epochs=30, lr=2e-3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


# ---------------------------------------------------------------- prior

def test_c_max_pooled_equals_direct_binning_and_loops():
    rng = np.random.default_rng(0)
    for size in (224, 96):
        xy = rng.uniform(-20, size + 20, (60, 2))
        xy[:4] = [[0, 0], [size, 5], [5, size], [np.nextafter(size, 0)] * 2]
        want = torch.zeros(size // 16, size // 16)
        for x, y in xy:
            if 0 <= x < size and 0 <= y < size:
                want[int(y // 16), int(x // 16)] = 1
        drawn = prior_py.downsample_prior(prior_py.centroid_map(xy, size))
        assert torch.equal(drawn, want.flatten()) and torch.equal(prior_py.bin_centroids(xy, size), want.flatten())
    assert prior_py.bin_centroids(np.zeros((0, 2)), 224).sum() == 0


def discs(mpp, centres_um, side_um=120, radius_um=3.5):
    """Synthetic nuclei: haematoxylin discs of that radius on an eosin ground, by Beer-Lambert."""
    y, x = np.mgrid[0: side_um / mpp, 0: side_um / mpp]
    inside = np.zeros(x.shape)
    for cx, cy in centres_um:
        inside = np.maximum(inside, (np.hypot(x + .5 - cx / mpp, y + .5 - cy / mpp) < radius_um / mpp) * 1.0)
    density = inside[..., None] * prior_py.STAINS[0] * 1.0 + 0.25 * prior_py.STAINS[1]
    return (245 * np.exp(-density)).astype(np.uint8)


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.8, 1.0])
def test_detector_finds_synthetic_nuclei_at_any_um_per_px(mpp):
    centres = np.array([[x, y] for x in range(15, 110, 18) for y in range(15, 110, 18)], float)
    found = prior_py.segment_nuclei(discs(mpp, centres), mpp) * mpp
    distance = np.linalg.norm(found[:, None] - centres[None], axis=-1)
    assert len(found) == len(centres) and (distance.min(0) < 1.5).all()


def test_detector_finds_nothing_on_white_and_refuses_what_is_no_image():
    assert len(prior_py.segment_nuclei(np.full((300, 300, 3), 243, np.uint8), 0.5)) == 0
    with pytest.raises(ValueError, match="mpp"):
        prior_py.segment_nuclei(np.zeros((4, 4, 3), np.uint8), 0)
    with pytest.raises(ValueError, match="uint8"):
        prior_py.segment_nuclei(np.zeros((4, 4, 3)), 0.5)


def nuclei_f1(group):
    """F1 of the detector over a group of the real images: within 3 um, one to one."""
    hits = found = marked = 0
    for path in sorted(NUCLEI.glob(group + "*.json")):
        truth = json.loads(path.read_text())
        xy = prior_py.segment_nuclei(np.asarray(Image.open(path.with_suffix(".png")).convert("RGB")), truth["mpp"])
        near = cKDTree(xy).sparse_distance_matrix(cKDTree(truth["centroids"]), 3 / truth["mpp"], output_type="coo_matrix")
        graph = coo_matrix((np.ones(near.nnz), (near.row, near.col)), near.shape).tocsr()
        hits += (maximum_bipartite_matching(graph) >= 0).sum()
        found, marked = found + len(xy), marked + len(truth["centroids"])
    return 2 * hits / (found + marked)


NUCLEI = Path(__file__).resolve().parent.parent / "shared" / "data" / "nuclei"


@pytest.mark.skipif(not NUCLEI.is_dir(), reason="the real images of ../shared/data/nuclei are not here")
@pytest.mark.parametrize("group, at_least", [("crchisto_", 0.62), ("monuseg_", 0.84)])
def test_detector_on_real_images(group, at_least):
    assert nuclei_f1(group) >= at_least


def test_read_hovernet_slide_and_tile_mode(tmp_path):
    path = tmp_path / "s.json"
    nuc = {"3": {"centroid": [10.0, 20.0], "bbox": [[1, 2], [3, 4]]}, "9": {"centroid": [1.5, 2]}}
    path.write_text(json.dumps({"mag": 40, "nuc": nuc}))
    np.testing.assert_allclose(prior_py.read_cells(path, slide_mpp=0.5), [[5, 10], [0.75, 1]])  # a 20x slide
    with pytest.raises(prior_py.InputError, match="um/px"):
        prior_py.read_cells(path)
    path.write_text(json.dumps({"mag": None, "nuc": nuc}))
    np.testing.assert_allclose(prior_py.read_cells(path), [[10, 20], [1.5, 2]])
    path.write_text('{"mag": null, "nuc": {}}')
    assert prior_py.read_cells(path).shape == (0, 2)


def test_read_tables(tmp_path):
    (tmp_path / "a.csv").write_bytes("\ufeffid;X;y\r\n1;2.5;3\r\n".encode())
    np.testing.assert_allclose(prior_py.read_cells(tmp_path / "a.csv"), [[2.5, 3]])
    np.savez(tmp_path / "a.npz", x=[1, 2], y=[3, 4])
    np.testing.assert_allclose(prior_py.read_cells(tmp_path / "a.npz"), [[1, 3], [2, 4]])


@pytest.mark.parametrize("name, text", [
    ("a.json", ""), ("a.json", "[]"), ("a.json", '{"nuc": {"1": {}}}'), ("a.json", '{"nuc": {"1": {"centroid": ["a", 1]}}}'),
    ("a.json", '{"mag": null, "nuc": {"1": {"centroid": [NaN, 1]}}}'), ("a.csv", "u,v\n1,2\n"), ("a.csv", "x,y\n1,b\n"),
    ("a.csv", "x,y\n1\n"), ("a.npz", "no zip"), ("a.txt", "x,y\n"), ("a.json", "[" * 100_000)])
def test_bad_cell_files_are_named_in_one_line(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(prior_py.InputError) as error:
        prior_py.read_cells(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- views

def random_box(rng, size, scale):
    """Left, top, width, height of DINO's random resized crop: ten tries, else the whole image."""
    for _ in range(10):
        area, aspect = rng.uniform(*scale) * size * size, math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= size and 0 < h <= size:
            return rng.randint(0, size - w), rng.randint(0, size - h), w, h
    return 0, 0, size, size


def pillow_hue(image, turn):
    """Hue turned in HSV by that share of a circle."""
    h, s, v = image.convert("HSV").split()
    h = Image.fromarray((np.asarray(h).astype(int) + round(turn * 255)).astype(np.uint8))
    return Image.merge("HSV", (h, s, v)).convert("RGB")


def pillow_view(image, rng, size, scale, blur, solarize):
    """One view as DINO's own pipeline makes it, an image at a time: the reference and the yardstick."""
    left, top, w, h = random_box(rng, image.width, scale)
    view = image.crop((left, top, left + w, top + h)).resize((size, size), Image.BICUBIC)
    if rng.random() < 0.5:
        view = ImageOps.mirror(view)
    if rng.random() < 0.8:
        steps = [lambda x: ImageEnhance.Brightness(x).enhance(rng.uniform(0.6, 1.4)),
                 lambda x: ImageEnhance.Contrast(x).enhance(rng.uniform(0.6, 1.4)),
                 lambda x: ImageEnhance.Color(x).enhance(rng.uniform(0.8, 1.2)),
                 lambda x: pillow_hue(x, rng.uniform(-0.1, 0.1))]
        for step in rng.sample(steps, 4):
            view = step(view)
    if rng.random() < 0.2:
        view = view.convert("L").convert("RGB")
    if rng.random() < blur:
        view = view.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2)))
    if rng.random() < solarize:
        view = ImageOps.solarize(view)
    x = torch.from_numpy(np.asarray(view).copy()).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(views_py.MEAN)[:, None, None]) / torch.tensor(views_py.STD)[:, None, None]


def tissue_like(size=224, seed=0):
    """Synthetic: discs of haematoxylin on eosin of uneven strength."""
    rng = np.random.default_rng(seed)
    image = discs(0.5, rng.uniform(0, size / 2, (40, 2)), side_um=size / 2).astype(float)
    return np.clip(image + 12 * ndimage.gaussian_filter(rng.standard_normal((size, size, 1)), (2, 2, 0)) * 4, 0, 255).astype(np.uint8)


def as_batch(*arrays):
    return torch.stack([torch.from_numpy(a.copy()).permute(2, 0, 1) for a in arrays]).float() / 255


@pytest.mark.parametrize("box", [(0, 0, 224, 224), (31, 57, 150, 130), (10, 80, 100, 100)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_resampling_is_pillows_bilinear_crop(box, mirrored):
    image = tissue_like()
    left, top, w, h = box
    want = Image.fromarray(image).resize((224, 224), Image.BILINEAR, box=(left, top, left + w, top + h))
    want = np.asarray(ImageOps.mirror(want) if mirrored else want).astype(float)
    got = views_py.resample(as_batch(image), torch.tensor([box]).float(), torch.tensor([mirrored]), 224)[0] * 255
    difference = np.abs(got.permute(1, 2, 0).numpy() - want)[3:-3, 3:-3]  # Pillow's window ends at the box
    assert difference.max() <= 1.01


@pytest.mark.parametrize("size", [224, 96])
def test_c_drawn_in_the_view_and_max_pooled_is_the_binning_under_every_crop_and_flip(size):
    generator = torch.Generator().manual_seed(3)
    B = 40
    boxes = views_py.random_boxes(B, 224, (0.05, 1.0), generator)
    flip = torch.rand(B, generator=generator) < 0.5
    cells = torch.rand(B, 60, 2, generator=generator) * 240 - 8
    cells[:, 50:] = float("nan")
    cells[:, :5] = (cells[:, :5] / 16).round() * 16  # on boundaries of patches
    got = views_py.view_prior(cells, boxes, flip, size)
    for b in range(B):
        xy = (cells[b, :50] - boxes[b, :2]) / boxes[b, 2:] * size
        c_map = prior_py.centroid_map(xy, size)
        c_map = c_map.flip(-1) if flip[b] else c_map
        assert torch.equal(prior_py.downsample_prior(c_map), got[b])


def jitter(image, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, grey=False, order=(0, 1, 2, 3)):
    x = as_batch(image)
    t = lambda v: torch.tensor([v])
    m = views_py.jitter_matrix(x.mean((2, 3)), t(brightness), t(contrast), t(saturation), t(hue), t(grey), t(order))
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
    both = np.asarray(ImageEnhance.Brightness(ImageEnhance.Contrast(pil).enhance(factor)).enhance(0.9)).astype(float)
    assert np.abs(jitter(image, brightness=0.9, contrast=factor, order=(1, 3, 0, 2)) - both).max() <= 3


@pytest.mark.parametrize("turn", [-0.1, 0.05, 0.1])
def test_hue_turns_as_pillows_does_and_keeps_the_luma(turn):
    image = (tissue_like() * 0.75).astype(np.uint8)
    got, want = jitter(image, hue=turn), np.asarray(pillow_hue(Image.fromarray(image), turn)).astype(float)
    luma = np.array(views_py.GREY)
    assert np.abs(got @ luma - image @ luma).max() < 1
    moved = want.mean((0, 1)) - image.mean((0, 1))
    colour = lambda v: v - v.mean()
    a, b = colour(moved), colour(got.mean((0, 1)) - image.mean((0, 1)))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.8  # the same way round
    assert 0.4 < np.linalg.norm(b) / np.linalg.norm(a) < 2.5


def test_blur_is_a_gaussian_and_solarize_is_pillows():
    image = tissue_like()
    got = views_py.blur(as_batch(image, image), torch.tensor([0.7, 2.0]))
    for x, sigma in zip(got, (0.7, 2.0)):
        want = ndimage.gaussian_filter(image / 255, (sigma, sigma, 0), mode="nearest", radius=6)
        np.testing.assert_allclose(x.permute(1, 2, 0).numpy(), want, atol=1e-4)
    want = np.asarray(ImageOps.solarize(Image.fromarray(image)))
    np.testing.assert_allclose(views_py.solarize(as_batch(image))[0].permute(1, 2, 0).numpy() * 255, want, atol=1e-3)


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_random_boxes_are_distributed_as_torchvisions(scale):
    boxes = views_py.random_boxes(4000, 224, scale, torch.Generator().manual_seed(0))
    rng = random.Random(0)
    want = np.array([random_box(rng, 224, scale) for _ in range(4000)])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 224).all()
    assert torch.equal(boxes, boxes.round())
    np.testing.assert_allclose(boxes.mean(0).numpy(), want.mean(0), atol=4)
    np.testing.assert_allclose(boxes.std(0).numpy(), want.std(0), atol=3)


def test_views_have_dinos_shapes_and_repeat_with_their_seed():
    crops = (as_batch(tissue_like(), tissue_like(seed=1)) * 255).to(torch.uint8)
    cells = torch.rand(2, 30, 2) * 224
    make = lambda seed: views_py.make_views(crops, cells, torch.Generator().manual_seed(seed))
    x, priors = make(0)
    assert [tuple(v.shape) for v in x] == [(2, 2, 3, 224, 224), (8, 2, 3, 96, 96)]  # A.1.2: 196 and 36 tokens
    assert [tuple(p.shape) for p in priors] == [(2, 2, 196), (8, 2, 36)]
    assert all(torch.equal(a, b) for a, b in zip(x + priors, sum(make(0), [])))
    assert not torch.equal(x[0], make(1)[0][0])
    assert len(views_py.make_views(crops, cells, torch.Generator(), local_crops=0)[0]) == 1


def benchmark():
    """Images a second of DINO's Pillow pipeline and of make_views at 2 + 8 views, one thread, interleaved."""
    torch.set_num_threads(1)
    arrays = [tissue_like(seed=i) for i in range(16)]
    crops, cells = (as_batch(*arrays) * 255).to(torch.uint8), torch.rand(16, 60, 2) * 224
    generator, rng, speed = torch.Generator().manual_seed(0), random.Random(0), {"pillow": [], "batched": []}
    kinds = [(views_py.GLOBAL_1, 224, (0.4, 1)), (views_py.GLOBAL_2, 224, (0.4, 1))] + [(views_py.LOCAL, 96, (0.05, 0.4))] * 8
    for _ in range(7):
        start = time.perf_counter()
        for array in arrays:
            image = Image.fromarray(array)
            for kind, size, scale in kinds:
                pillow_view(image, rng, size, scale, kind["blur"], kind["solarize"])
        middle = time.perf_counter()
        views_py.make_views(crops, cells, generator)
        speed["pillow"].append(16 / (middle - start))
        speed["batched"].append(16 / (time.perf_counter() - middle))
    pillow, batched = (float(np.median(speed[k])) for k in speed)
    print(f"2 + 8 views, one thread: Pillow {pillow:.0f}, batched {batched:.0f} images a second, {batched / pillow:.2f} times")


# ---------------------------------------------------------------- slides and data

@pytest.mark.parametrize("properties, mpp", [
    ({"openslide.mpp-x": "0.25", "openslide.objective-power": "20"}, 0.25), ({"openslide.objective-power": "40"}, 0.25),
    ({"aperio.AppMag": "20.0"}, 0.5), ({"openslide.mpp-x": "0", "aperio.AppMag": "40"}, 0.25),
    ({"aperio.MPP": "0.5", "openslide.mpp-x": "unknown"}, 0.5), ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26"}, 0.25),
    ({"tiff.XResolution": "20000", "tiff.ResolutionUnit": "centimeter"}, 0.5), ({"tiff.XResolution": "72"}, None),
    ({"openslide.mpp-x": "1000000"}, None), ({"openslide.mpp-x": "unknown"}, None), ({}, None)])
def test_um_per_px_of_a_slide(properties, mpp):
    assert slides_py.recorded_mpp(properties)[0] == mpp


def test_um_per_px_that_contradicts_the_power_is_warned_of_and_oblong_px_are_refused():
    assert slides_py.recorded_mpp({"aperio.MPP": "0.25", "aperio.AppMag": "40"})[2] == ""
    assert "0.25 is taken" in slides_py.recorded_mpp({"aperio.MPP": "0.25", "aperio.AppMag": "20"})[2]
    with pytest.raises(ValueError, match="not square"):
        slides_py.recorded_mpp({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"})


@pytest.fixture(scope="session")
def rendered():
    """One synthetic slide of each class, as an array, and its nuclei."""
    return {label: demo.render(label, [7, i]) for i, label in enumerate(demo.CLASSES)}


def pyramid(path, image, mpp, levels=(1, 2, 4)):
    """A tiled slide with levels and its um/px, as Aperio writes it."""
    with tifffile.TiffWriter(path) as file:
        for k in levels:
            small = np.asarray(Image.fromarray(image).reduce(k)) if k > 1 else image
            file.write(small, tile=(256, 256), compression="zlib", photometric="rgb", metadata=None,
                       description=f"Aperio|AppMag = {10 / mpp:g}|MPP = {mpp:g}", subfiletype=0 if k == 1 else 1)


def test_tiles_lie_where_their_names_say_at_any_target(tmp_path):
    y, x = np.mgrid[0:1400, 0:1900]
    image = np.stack([x / 1900 * 120 + 100, np.full(x.shape, 60), y / 1400 * 120 + 100], -1).astype(np.uint8)  # magenta
    pyramid(tmp_path / "a.svs", image, 0.5)
    for mpp in (0.5, 1.0, 1.37):
        assert slides_py.cut_tiles(tmp_path / "a.svs", tmp_path / "crops", mpp, None, 0.5) == ""
        side = 224 * mpp / 0.5
        files = list((tmp_path / "crops" / "a").glob("*.jpg"))
        assert len(files) == int(1900 / side) * int(1400 / side)
        for path in files:
            left, top = (int(v) for v in path.stem.split("_"))
            tile = np.asarray(Image.open(path)).astype(float)
            assert tile.shape == (224, 224, 3)
            assert abs(tile[..., 0].mean() - ((left + side / 2) / 1900 * 120 + 100)) < 1.5
            assert abs(tile[..., 2].mean() - ((top + side / 2) / 1400 * 120 + 100)) < 1.5


def test_levels_that_are_not_whole_fractions_and_tiles_over_many_blocks(tmp_path, monkeypatch):
    y, x = np.mgrid[0:1403, 0:1901]
    image = np.stack([x / 1901 * 120 + 100, np.full(x.shape, 60), y / 1403 * 120 + 100], -1).astype(np.uint8)
    pyramid(tmp_path / "a.svs", image, 0.5)
    slide = slides_py.Slide(tmp_path / "a.svs")
    assert slide.level_for(1.0)[0] == 1 and slide.level_for(1.0)[1] != 2  # 1901 px over 951, 1403 over 702
    read = {}
    for block in (2560, 300):
        monkeypatch.setattr(slides_py, "BLOCK", block)
        slides_py.cut_tiles(tmp_path / "a.svs", tmp_path / str(block), 1.0, None, 0.5)
        read[block] = {p.name: np.asarray(Image.open(p)).astype(int) for p in (tmp_path / str(block) / "a").glob("*.jpg")}
    assert len(read[300]) == 4 * 3 and read[300].keys() == read[2560].keys()
    assert all(np.abs(read[300][name] - tile).max() <= 6 for name, tile in read[2560].items())
    for name, tile in read[300].items():
        left, top = (int(v) for v in name[:-4].split("_"))
        assert abs(tile[..., 0].mean() - ((left + 224) / 1901 * 120 + 100)) < 1.5
        assert abs(tile[..., 2].mean() - ((top + 224) / 1403 * 120 + 100)) < 1.5


def test_tissue_is_found_and_white_dust_and_ink_are_not():
    stain = lambda h, e: 245 * np.exp(-(h * prior_py.STAINS[0] + e * prior_py.STAINS[1]))
    colours = {"dark": stain(0.8, 0.6), "pale": stain(0.03, 0.12), "white": (243, 243, 243), "dust": (190, 190, 192),
               "blue ink": (40, 60, 170), "green ink": (30, 120, 70), "black ink": (25, 25, 30), "red ink": (215, 30, 45)}
    for name, colour in colours.items():
        mask = slides_py.tissue_mask(np.full((40, 40, 3), colour, np.float64).round().astype(np.uint8), 8.0)
        assert mask.all() if name in ("dark", "pale") else not mask.any(), name


def test_no_cell_is_lost_or_doubled_on_a_seam(tmp_path, rendered, monkeypatch):
    image = rendered["nests"][0][:1100, 500:1700]
    for mpp, name in ((1.0, "a.png"), (0.25, "b.png")):  # at 0.25 um/px two px are averaged
        Image.fromarray(image if mpp == 1 else image.repeat(2, 0).repeat(2, 1)[:1000, :1400]).save(tmp_path / name)
        whole = np.asarray(Image.open(tmp_path / name))
        monkeypatch.setattr(prior_py, "REGION", 301)
        tasks = prior_py.slide_regions(tmp_path / name, mpp, "builtin", prior_py.WORK_MPP)
        assert len(tasks) >= 4
        got = prior_py.one_each([prior_py.segment_region(*task) for task in tasks], prior_py.SEAM / mpp)
        want = prior_py.segment_nuclei(whole, mpp, tasks[0][4])
        sort = lambda xy: xy[np.lexsort(xy.T)]
        assert len(want) > 300
        np.testing.assert_allclose(sort(got), sort(want), atol=1e-6)


def test_detector_on_the_synthetic_slides(rendered):
    for image, truth in rendered.values():
        found = prior_py.segment_nuclei(image, demo.MPP)
        near = cKDTree(found).sparse_distance_matrix(cKDTree(truth), 3 / demo.MPP, output_type="coo_matrix")
        hits = (maximum_bipartite_matching(coo_matrix((np.ones(near.nnz), (near.row, near.col)), near.shape).tocsr()) >= 0).sum()
        assert 2 * hits / (len(found) + len(truth)) > 0.8


@pytest.fixture(scope="session")
def folder(tmp_path_factory, rendered):
    """A folder of eight small plain images of both classes, as slides at 1.0 um/px, with labels.csv."""
    root = tmp_path_factory.mktemp("given") / "tiny set"
    (root / "slides").mkdir(parents=True)
    rows = ["slide,label,patient,split"]
    for label, (image, _) in rendered.items():
        for i, split in enumerate(("train", "train", "val", "test")):
            name = f"{label}_{i}"
            Image.fromarray(image[600: 1048, 700 + 300 * i: 1148 + 300 * i]).save(root / "slides" / f"{name}.png")
            rows.append(f"{name},{label},p{label}{i},{split}")
    (root / "labels.csv").write_text("\n".join(rows))
    return root


def test_cells_reach_their_crops(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = data_py.find_data(str(folder), mpp=2.0, slide_mpp=1.0)
    (tmp_path / "x").mkdir()
    assert data_py.prepare(found, 1.0, 0.3, workers=1) == []
    xy = prior_py.read_cells(tmp_path / "datasets" / "tiny_set" / "cells" / "builtin" / "glands_0.npz")
    crops = data_py.Crops(found, ["glands_0"])
    assert crops.corners.tolist() == [[0, 0]] and len(crops) == 1
    np.testing.assert_allclose(crops.cells(0), xy / 2, atol=1e-3)
    image, cells = crops[0]
    assert image.shape == (3, 224, 224) and image.dtype == torch.uint8 and len(cells) > 50
    assert torch.equal(crops.priors()[0], prior_py.bin_centroids(xy / 2, 224))
    made = (tmp_path / "datasets/tiny_set/crops/glands_0.json").stat().st_mtime_ns
    assert data_py.prepare(found, 1.0, 0.3, workers=1) == []  # nothing is done again
    assert (tmp_path / "datasets/tiny_set/crops/glands_0.json").stat().st_mtime_ns == made
    with pytest.raises(prior_py.InputError, match="--tissue 0.3"):
        data_py.prepare(found, 1.0, 0.5, workers=1)


def test_broken_slides_are_passed_over_and_listed(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").write_bytes((folder / "slides" / "nests_0.png").read_bytes())
    (tmp_path / "in" / "cut.png").write_bytes((folder / "slides" / "nests_0.png").read_bytes()[:5000])
    (tmp_path / "in" / "text.svs").write_text("no slide")
    (tmp_path / "in" / "empty.tiff").write_bytes(b"")
    Image.new("RGB", (500, 500), "white").save(tmp_path / "in" / "white.png")
    found = data_py.find_data("in", mpp=1.0)
    failed = data_py.prepare(found, 1.0, 0.5, workers=2)
    assert len(failed) == 4 and all("\n" not in line for line in failed)
    for name in ("cut.png", "text.svs", "empty.tiff", "white.png"):
        assert sum(name in line for line in failed) == 1
    assert len(data_py.Crops(found, found.split("train"))) == 4
    left = sorted(p.name for p in (tmp_path / "datasets" / "in").rglob("*") if "part" in p.name)
    assert left == []


def test_split_is_by_patient_stratified_seeded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s" / "slides").mkdir(parents=True)
    rows = ["slide,label"]
    for i in range(40):
        name = f"TCGA-05-{i // 2:04d}-01Z-00-DX{i % 2}"
        (tmp_path / "s" / "slides" / f"{name}.svs").write_bytes(b"x")
        rows.append(f"{name},{'AB'[i // 2 % 2]}")
    (tmp_path / "s" / "labels.csv").write_text("\n".join(rows))
    a, b, c = (data_py.find_data("s", 1.0, seed=seed).labels for seed in (0, 0, 1))
    assert a == b != c
    for part, count in (("test", 8), ("val", 8), ("train", 24)):
        rows = [row for row in a.values() if row["split"] == part]
        assert len(rows) == count and {row["label"] for row in rows} == {"A", "B"}
    held = {}
    for name, row in a.items():
        assert row["patient"] == name[:12] and held.setdefault(name[:12], row["split"]) == row["split"]


@pytest.mark.parametrize("text, says", [
    ("slide,label\na,A\nb,B\n", "c.svs"), ("slide,label\na,A\nb,B\nc,\n", "no label"), ("slide,label\na,A\nb,B\nc,A\nc,A\n", "second time"),
    ("slide,label\na,A\nb,B\nc,A\nd,A\n", "no file"), ("slide,label\na,A\nb,A\nc,A\n", "two classes"), ("", "slide,label"),
    ("slide,kind\na,A\n", "slide,label"), ("slide,label\n", "no row"), ("slide,label,split\na,A,train\nb,B,\nc,B,test\n", "all or none"),
    ("slide,label,split\na,A,train\nb,B,maybe\nc,B,test\n", "maybe"),
    ("slide,label,patient,split\na,A,p,train\nb,B,q,test\nc,B,p,test\n", "'p' is in train")])
def test_bad_labels_are_told_in_one_line(tmp_path, monkeypatch, capsys, text, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s" / "slides").mkdir(parents=True)
    for name in "abc":
        (tmp_path / "s" / "slides" / f"{name}.svs").write_bytes(b"x")
    (tmp_path / "s" / "labels.csv").write_text(text)
    assert train_py.main(["--data", "s", "--mpp", "1"]) == 2
    error = capsys.readouterr().err
    assert says in error and "s/" in error and error.count("\n") == 1


@pytest.mark.parametrize("argv, says", [
    (["--data", "nowhere"], "nowhere"), (["--data", "lung"], "datasets/lung/slides/"), (["--data", "s"], "--mpp"),
    (["--data", "s", "--mpp", "0"], "--mpp"), (["--data", "s", "--mpp", "1"], "no slides"), (["--fraction", "0"], "--fraction"),
    (["--device", "cuda"], "--device"), (["--device", "gpu"], "--device gpu"), (["--seed", "-1"], "--seed -1"), (["--local-scale", "0.5", "0.1"], "--local-scale")])
def test_bad_flags_are_told_in_one_line(tmp_path, monkeypatch, capsys, argv, says):
    if argv == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s").mkdir()
    assert train_py.main(argv) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_two_slides_of_one_name_and_paths_out_of_the_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.svs", "a.tiff"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(prior_py.InputError, match="rename"):
        data_py.find_data(str(tmp_path), 1.0)
    (tmp_path / "labels.csv").write_text("image,label\n../x.png,A\n")
    with pytest.raises(prior_py.InputError, match="outside"):
        data_py.find_data(str(tmp_path), 1.0)


# ---------------------------------------------------------------- scripts

SMALL = ["--mpp", "2", "--slide-mpp", "1", "--tissue", "0.3"]
TRAIN = [*SMALL, "--batch", "2", "--epochs", "2", "--warmup-epochs", "1", "--out-dim", "32", "--disentangled-dim", "16",
         "--local-crops", "1", "--workers", "1", "--device", "cpu"]


def test_schedules_by_hand():
    assert train_py.cosine(1.0, 0.0, 5, 20, 10) == 0.5 and train_py.cosine(1.0, 0.0, 10, 20, 10) == 1.0
    assert train_py.cosine(1.0, 0.0, 15, 20, 10) == pytest.approx(0.5) and train_py.cosine(0.996, 1, 20, 20) == pytest.approx(1)


def test_defaults_are_the_papers_and_dinos(monkeypatch):
    args = train_py.arguments(["--data", "lung"])
    assert (args.batch, args.out_dim, args.disentangled_dim, args.epochs) == (256, 65536, 4096, 100)
    assert (args.lambda_1, args.lambda_2, args.lr, args.min_lr) == (0.5, 0.1 / 4, 5e-4, 1e-6)
    assert (args.momentum, args.teacher_temp, args.student_temp, args.clip, args.drop_path) == (0.996, 0.04, 0.1, 3.0, 0.1)
    assert [train_py.arguments(["--data", d]).epochs for d in ("brca", "paad", "bright3", "bright6")] == [30, 100, 50, 50]
    assert [data_py.DATASETS[d][0] for d in ("lung", "brca", "paad", "bright3")] == [2.0, 2.0, 2.0, 1.0]


def test_gradients_are_clipped_parameter_by_parameter():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    a.grad, b.grad = torch.tensor([30.0, 40.0]), torch.tensor([0.3, 0.4])
    train_py.clip_gradients([a, b], 3.0)
    torch.testing.assert_close(a.grad, torch.tensor([1.8, 2.4]))
    torch.testing.assert_close(b.grad, torch.tensor([0.3, 0.4]))


def test_every_epoch_sees_every_crop_once_and_goes_on_in_the_middle():
    whole = list(train_py.batches(10, 3, 0, 9, seed=1))
    assert whole[4:] == list(train_py.batches(10, 3, 4, 9, seed=1))
    for epoch in range(3):
        seen = sum(whole[3 * epoch: 3 * epoch + 3], [])
        assert len(set(seen)) == 9
    assert whole[:3] != whole[3:6]


def test_train_and_eval_end_to_end_interrupted_equals_uninterrupted(tmp_path, folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--data", str(folder), *TRAIN]
    assert train_py.main([*argv, "--run", "runs/whole"]) == 0
    assert train_py.main([*argv, "--max-steps", "2"]) == 0
    assert "same command goes on" in capsys.readouterr().out
    run = tmp_path / "runs" / "tiny_set_vit_t_dirl"
    with open(run / "log.csv", "a") as file:
        file.write("2,0,9.9,half a line that was never kep")  # as a kill leaves it
    assert train_py.main(argv) == 0
    assert "Next: python eval.py" in capsys.readouterr().out
    assert (tmp_path / "runs/whole/log.csv").read_text() == (run / "log.csv").read_text()
    a, b = (train_py.load(path / "checkpoint.pt") for path in (tmp_path / "runs/whole", run))
    assert a["step"] == b["step"] == 6
    for part in ("student", "teacher", "loss"):
        assert all(torch.equal(x, b[part][k]) for k, x in a[part].items())
    rows = list(csv.DictReader(open(run / "log.csv")))
    assert len(rows) == 6 and {"loss_c", "loss_b", "loss_cc", "loss_bb", "loss_cb", "loss_bc", "both_regions"} <= set(rows[0])
    assert float(rows[0]["ln_out_dim"]) == pytest.approx(math.log(32), rel=1e-4)
    assert len(list(csv.reader(open(run / "split.csv")))) == 9
    assert train_py.main([*argv, "--lr", "0.1"]) == 2
    assert "--lr" in capsys.readouterr().err

    test = ["--data", str(folder), *SMALL, "--repeats", "2", "--epochs", "5", "--device", "cpu", "--workers", "1"]
    assert eval_py.main([*test, "--checkpoint", str(run)]) == 0
    assert "slide accuracy" in capsys.readouterr().out
    with np.load(run / "features" / "nests_1.npz", allow_pickle=False) as file:
        assert file["features"].shape == (1, 192) and file["features"].dtype == np.float32
        assert file["coords"].tolist() == [[0, 0]] and file["coords"].dtype == np.int64
        features = file["features"]
    encoder, _ = eval_py.load_encoder(run / "encoder.pt")
    image = np.asarray(Image.open(tmp_path / "datasets/tiny_set/crops/nests_1/0_0.jpg"))
    with torch.no_grad():
        want = encoder(views_py.normalize(as_batch(image))).mean(1)
    np.testing.assert_allclose(features, want.numpy(), atol=1e-5)
    results = {row["measure"]: float(row["mean"]) for row in csv.DictReader(open(run / "results.csv"))}
    with torch.no_grad():
        columns = encoder.last_attention(views_py.normalize(torch.cat([as_batch(np.asarray(Image.open(
            tmp_path / f"datasets/tiny_set/crops/{name}_3/0_0.jpg"))) for name in demo.CLASSES]))).sum(2).mean(1)
    assert results["tokens with attention 0.5 to 2"] == pytest.approx(((columns >= 0.5) & (columns <= 2)).float().mean().item(), abs=2e-3)
    assert all((run / name).read_bytes()[:4] == b"\x89PNG" for name in ("attention_distribution.png", "attention_overlay.png"))
    written = (run / "features" / "nests_1.npz").stat().st_mtime_ns
    assert eval_py.main([*test, "--checkpoint", str(run)]) == 0
    assert (run / "features" / "nests_1.npz").stat().st_mtime_ns == written  # not made twice


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(tmp_path, folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--data", str(folder), *TRAIN, "--method", "baseline"]
    assert train_py.main([*argv, "--max-steps", "2"]) == 0
    kept = (tmp_path / "runs/tiny_set_vit_t_baseline/checkpoint.pt").read_bytes()
    monkeypatch.setattr(dirl.DiRLLoss, "forward", lambda self, s, *rest: (s["f"][0].sum() * math.nan, {"f": torch.tensor(math.nan)}))
    handler = signal.getsignal(signal.SIGINT)
    assert train_py.main(argv) == 1 and signal.getsignal(signal.SIGINT) is handler  # claim.py goes on, and can be stopped
    assert "step 2" in capsys.readouterr().err
    assert (tmp_path / "runs/tiny_set_vit_t_baseline/checkpoint.pt").read_bytes() == kept


def test_a_folder_of_crops_with_labels_trains_on_its_training_part(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c" / "kind").mkdir(parents=True)
    rows = ["image,label,split,group"]
    for i, path in enumerate(sorted((folder / "slides").glob("*.png"))):
        Image.open(path).resize((224, 224)).save(tmp_path / "c" / "kind" / path.name)
        rows.append(f"kind/{path.name},{path.stem[:5]},{'test' if i % 4 == 3 else 'train'},{i}")
    (tmp_path / "c" / "labels.csv").write_text("\n".join(rows))
    found = data_py.find_data("c", 2.0)
    assert data_py.prepare(found, workers=1) == []
    assert len(found.split("train")) + len(found.split("val")) == 6 and len(found.split("test")) == 2
    crops = data_py.Crops(found, found.split("train"))
    whole = prior_py.segment_nuclei(np.asarray(Image.open(crops.files[0])), 2.0)
    np.testing.assert_allclose(crops.cells(0), whole, atol=1e-3)


def test_the_demo_is_written_as_slides_that_openslide_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "WIDTH", 700)
    monkeypatch.setattr(demo, "HEIGHT", 600)
    (tmp_path / "slides").mkdir()
    (tmp_path / "truth").mkdir()
    demo.write_slide(tmp_path, "a", "glands", [0, 0])
    slide = slides_py.Slide(tmp_path / "slides" / "a.svs")
    assert (slide.width, slide.height, slide.mpp) == (700, 600, demo.MPP)
    truth = prior_py.read_cells(tmp_path / "truth" / "a.csv")
    image, nuclei = demo.render("glands", [0, 0])
    np.testing.assert_allclose(truth, nuclei, atol=0.006)
    assert np.array_equal(np.asarray(slide.read_level(0, 0, 0, 700, 600)), image)


def test_the_readmes_line_anchors_point_at_what_they_name():
    here = Path(__file__).resolve().parent
    links = re.findall(r"\[`(\w+)\.(\w+)`\]\((\w+\.py)#L(\d+)\)", (here / "README.md").read_text())
    assert len(links) >= 20
    for module, name, file, line in links:
        assert file == module + ".py"
        assert re.match(rf"(class|def) {name}\b", (here / file).read_text().splitlines()[int(line) - 1]), (name, line)


def test_scripts_say_what_they_do():
    for script in ("train.py", "eval.py"):
        out = subprocess.run([sys.executable, Path(__file__).with_name(script), "--help"], capture_output=True, text=True)
        assert out.returncode == 0 and "--data" in out.stdout


if __name__ == "__main__":
    benchmark()
