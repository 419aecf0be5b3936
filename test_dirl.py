"""Tests of the mathematics: brute force, hand-made cases, invariants, gradients."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial import cKDTree

import dirl
import mil
import prior as prior_py


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
    found = (prior_py.segment_nuclei(discs(mpp, centres), mpp) + 0.5) * mpp
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
@pytest.mark.parametrize("group, at_least", [("crchisto_", 0.65), ("monuseg_", 0.80)])
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
