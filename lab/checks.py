"""Checks for the exercises in dirl.ipynb: each takes the reader's answer and returns one line.

The line starts with "not yet" if nothing has been written, with "no" and what is wrong, or with "right". A
wrong answer is compared with the usual mistakes: one is named only if it gives the reader's values in every
case that is tried. An error of a check itself is reported as such.
"""
import math
from functools import partial, wraps

import matplotlib.pyplot as plt
import torch

import dirl
import prior

WRITE = "write your code at the comment, end it with a return, run that cell, then run this one again"


class Blank(Exception):
    """Raised where the reader has not written an answer yet; its text, if any, says what is missing."""


class Wrong(Exception):
    """Raised with what is wrong about an answer."""


def checked(compare):
    """Turns compare(answer), which raises Blank or Wrong or returns None, into one that returns a line."""
    @wraps(compare)
    def check(answer):
        try:
            compare(answer)
        except Blank as blank:
            return f"not yet: {str(blank) or WRITE}"
        except Wrong as wrong:
            return f"no: {wrong}"
        except Exception as error:  # the reader's own errors arrive as Wrong
            return (f"this check itself failed ({type(error).__name__}: {error}); your answer may be right, "
                    "compare it with lab/solutions.py")
        return f"right: {compare.__doc__}"
    return check


# ---------------------------------------------------------------- the reader's values

def values_of(answer, cases):
    """Calls the answer on a copy of every case, {description: arguments}; returns {description: value}.

    Blank if it never returns anything; Wrong if it raises, or returns nothing in some cases only.
    """
    values = {}
    for case, arguments in cases.items():
        try:
            values[case] = answer(*[x.clone() if torch.is_tensor(x) else x for x in arguments])
        except Exception as error:  # the reader's code may raise anything
            raise Wrong(f"your code raised {type(error).__name__}: {error} ({case})") from None
    empty = [case for case, value in values.items() if is_empty(value)]
    if len(empty) == len(values):
        raise Blank
    if empty:
        raise Wrong(f"your code returns None for {empty[0]}; every branch needs a return")
    return values


def is_empty(value):
    """Returns whether a value is None or ..., or a sequence of nothing else."""
    if isinstance(value, (tuple, list)):
        return len(value) > 0 and all(is_empty(item) for item in value)
    return value is None or value is ...


def tensor_of(value, shape, name):
    """Returns the value as a float tensor; Wrong if it is none or has another shape."""
    try:
        value = torch.as_tensor(value).detach().float()
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"{name} is a {type(value).__name__}; a tensor is expected") from None
    if value.shape != tuple(shape):
        raise Wrong(f"{name} has shape {tuple(value.shape)}; it should be {tuple(shape)}")
    return value


def tensors_of(values, shape, names):
    """Returns several values as tensors of one shape; Wrong if their number differs."""
    if hasattr(values, "ndim") and values.ndim == len(shape) + 1:
        values = list(values)  # a stacked tensor or array unpacks as a tuple does
    if not isinstance(values, (tuple, list)) or len(values) != len(names):
        count = len(values) if isinstance(values, (tuple, list)) else 1
        raise Wrong(f"your code returns {count} value{'s' * (count != 1)}; return {', '.join(names)}")
    return [tensor_of(value, shape, name) for value, name in zip(values, names)]


def close(a, b):
    """Whether two tensors are equal up to rounding; infinities must match, NaN never does."""
    return torch.allclose(a, b, atol=1e-5, rtol=1e-4)


def judge(got, want, mistakes, otherwise):
    """Raises Wrong if got differs from want, lists of tensors.

    It says the first of mistakes, {what is wrong: the tensors that it gives}, that gives got, else otherwise.
    """
    if all(map(close, got, want)):
        return
    for wrong, values in mistakes.items():
        if all(map(close, got, values)):
            raise Wrong(wrong)
    raise Wrong(otherwise)


# ---------------------------------------------------------------- 1. C and P_c

def true_prior(cells, box, flip, counts=False):
    """Returns prior.view_prior of one view at 224 px: cells (K, 2) -> (196,)."""
    return prior.view_prior(cells[None], torch.tensor([box]), torch.tensor([flip]), 224, counts=counts)[0]


def turned(p_c, turn):
    """Applies a function to P_c as rows and columns (14, 14)."""
    return turn(p_c.view(14, 14)).reshape(-1)


def wrong_priors(cells, box, flip):
    """Returns {what is wrong: P_c} for the usual mistakes in one view."""
    left, top, w, h = box
    same = partial(true_prior, cells, box)
    x, y = ((cells - torch.tensor([left, top])) / torch.tensor([w, h]) * 224).T  # px of the view
    column = ((224 - x if flip else x) // 16).long()
    row = (y // 16).long()
    index = row * 14 + column
    int_column = ((224 - x if flip else x) / 16).trunc().long()  # as int() rounds
    int_row = (y / 16).trunc().long()
    inside = (int_column >= 0) & (int_column < 14) & (int_row >= 0) & (int_row < 14)
    mirrored_crop = (224 - cells[:, 0] - left) / w * 224 if flip else x
    return {
        "the prior of a flipped view is not flipped": same(False),
        "the prior is flipped where the view is not, and the other way round": same(not flip),
        "a flipped view is upside down in your prior; the flip is left to right":
            turned(same(False), lambda p: p.flip(0)) if flip else same(False),
        "every prior is upside down: row 0 is at the top": turned(same(flip), lambda p: p.flip(0)),
        "rows and columns are swapped: the index is row * 14 + column, and y determines the row":
            turned(same(flip), lambda p: p.T),
        "x and y of the cells are swapped: x belongs to left and width":
            true_prior(cells.flip(1), (top, left, h, w), flip),
        "the cells are not cropped: subtract left and top, and scale by 224 / width and 224 / height":
            true_prior(cells, (0.0, 0.0, 224.0, 224.0), flip),
        "left and top are subtracted, but the view is not scaled to 224 px":
            true_prior(cells, (left, top, 224.0, 224.0), flip),
        "the cells are scaled, but left and top are not subtracted first":
            true_prior(cells, (0.0, 0.0, w, h), flip),
        "P_c counts the cells of a patch; max-pooling returns 1 for one or more":
            true_prior(cells, box, flip, counts=True),
        "cells outside the view end up in other patches: skip those whose column or row is not in 0 to 13":
            marked(index[(index >= 0) & (index < 196)]),
        "a cell just outside the view lands in row or column 0, since int() rounds -0.5 to 0; test first "
        "whether 0 <= x < 224 and 0 <= y < 224":
            marked((14 * int_row + int_column)[inside]),
        "every view is flipped; flip only if flip is True": same(True),
        "cells outside the view are moved to its border; skip them":
            marked(row.clamp(0, 13) * 14 + column.clamp(0, 13)),
        "the flip mirrors the crop; it should mirror the view: 224 - x, after x was scaled to the view":
            prior.bin_centroids(torch.stack([mirrored_crop, y], 1), 224),
        "the flip of a scaled x is width - x; the view is 224 px wide: 224 - x":
            prior.bin_centroids(torch.stack([w - x if flip else x, y], 1), 224)}


def marked(patches):
    """Returns P_c (196,) with a 1 in these patches."""
    p_c = torch.zeros(196)
    p_c[patches] = 1
    return p_c


@checked
def view_prior(answer):
    """your P_c is prior.view_prior's, for 20 random crops, flips and sets of cells."""
    torch.manual_seed(0)
    views = {}
    for trial in range(20):
        flip = trial % 2 == 1
        w, h = (torch.rand(2) * 100 + 100).round().tolist()
        left = (224 - w) * torch.rand(1).item() // 1
        top = (224 - h) * torch.rand(1).item() // 1
        views[f"view {trial}: box {(left, top, w, h)}, flip {flip}"] = (
            torch.rand(40, 2) * 224, (left, top, w, h), flip)
    got = [tensor_of(value, (196,), "P_c") for value in values_of(answer, views).values()]
    want = [true_prior(*view) for view in views.values()]
    patches = [int((a != b).sum()) for a, b in zip(got, want)]  # that differ
    k = patches.index(max(patches))
    if patches[k]:
        draw_both(got[k], want[k], list(views)[k])
    mistakes = [wrong_priors(*view) for view in views.values()]
    judge(got, want, {wrong: [each[wrong] for each in mistakes] for wrong in mistakes[0]},
          f"{20 - patches.count(0)} of 20 views are wrong; in that drawn {patches[k]} of 196 patches differ")


def draw_both(got, want, title):
    """Draws the reader's P_c next to the right one."""
    figure, axes = plt.subplots(1, 2, figsize=(5.2, 2.9))
    for axis, p_c, name in zip(axes, (got, want), ("yours", "right")):
        axis.imshow(p_c.view(14, 14).numpy(), cmap="cividis", vmin=0, vmax=1)
        axis.set(title=name, xticks=[], yticks=[])
    figure.suptitle(title, fontsize=8)


# ---------------------------------------------------------------- 2. cell-back pooling

@checked
def pool(answer):
    """eq. 3, and no NaN where a region is empty, in f or in its gradient."""
    torch.manual_seed(0)
    tokens = torch.randn(2, 6, 5)
    p_c = torch.tensor([[1.0, 0, 0, 1, 0, 0], [0, 1, 1, 0, 1, 0]])  # 2 and 3 cells: no two divisors agree
    value = values_of(answer, {"a batch of two views": (tokens, p_c)})["a batch of two views"]
    got = tensors_of(value, (2, 5), ("f_c", "f_b"))
    want = list(dirl.cell_back_pool(tokens, p_c))
    counts = [region.sum(1, keepdim=True) for region in (p_c, 1 - p_c)]
    sums = [mean * count for mean, count in zip(want, counts)]
    judge(got, want, {
        "f_c and f_b are swapped: P_c is 1 for the patches with a cell": want[::-1],
        "the sums are divided by n; eq. 3 divides by |P_c|, the number of cell tokens of that view":
            [x / 6 for x in sums],
        "the sums are divided by the count of the whole batch; each view has its own |P_c|: sum over axis 1":
            [x / count.sum() for x, count in zip(sums, counts)],
        "these are the sums over the regions; eq. 3 divides them by |P_c| and |1 - P_c|": sums,
        "|P_c| + 1 divides the sums; to avoid 0 / 0 take max(|P_c|, 1), as clamp(min=1) does":
            [x / (count + 1) for x, count in zip(sums, counts)]},
        "f_c and f_b are not the means of their tokens")
    cases = {"no cell": (tokens, torch.zeros(2, 6)), "nothing but cells": (tokens, torch.ones(2, 6))}
    for (case, value), empty in zip(values_of(answer, cases).items(), (0, 1)):
        f = torch.stack(tensors_of(value, (2, 5), ("f_c", "f_b")))
        if not f.isfinite().all():
            bad = f[~f.isfinite()][0].item()
            raise Wrong(f"a view with {case} pools to {bad}; an empty region should pool to zeros")
        if not close(f[empty], torch.zeros(2, 5)):
            raise Wrong(f"a view with {case}: the empty region should pool to zeros")
        if not close(f[1 - empty], tokens.mean(1)):
            raise Wrong(f"a view with {case}: the other region is not the mean of all its tokens")
    mixed = torch.stack([torch.zeros(6), torch.ones(6)])
    case = "one view without a cell, one of nothing but cells"
    got = tensors_of(values_of(answer, {case: (tokens, mixed)})[case], (2, 5), ("f_c", "f_b"))
    if not all(map(close, got, dirl.cell_back_pool(tokens, mixed))):
        raise Wrong(f"a batch with {case}: decide for each view, not for the batch")
    leaf = tokens.clone().requires_grad_()
    empty = {"one empty region each": (leaf, torch.stack([torch.zeros(6), torch.ones(6)]))}
    pooled = values_of(answer, empty)["one empty region each"]
    total = sum(f.sum() for f in pooled)
    if not getattr(total, "requires_grad", False):
        raise Wrong("no gradient reaches the tokens, so an encoder would learn nothing: do not detach them")
    total.backward()
    if not leaf.grad.isfinite().all():
        raise Wrong("f is right, but the gradient of the tokens is NaN: 0 / 0 is still computed before it is "
                    "replaced; divide by max(|P_c|, 1) instead")


# ---------------------------------------------------------------- 3. masks

@checked
def masks(answer):
    """eq. 4; no row of either mask is all -inf, so softmax is defined everywhere."""
    priors = {"a view with both regions": torch.tensor([1.0, 0, 0, 1, 1, 0]),
              "a view of background only": torch.zeros(4)}
    values = values_of(answer, {case: (p_c,) for case, p_c in priors.items()})
    for (case, value), p_c in zip(values.items(), priors.values()):
        got = tensors_of(value, (len(p_c), len(p_c)), ("M_self", "M_cross"))
        compare_masks(case, got, [mask[0] for mask in dirl.disentangle_masks(p_c[None])])


def compare_masks(case, got, want):
    """Wrong if the two masks of one view are not those wanted."""
    for mask, name in zip(got, ("M_self", "M_cross")):
        if mask.isnan().any():
            raise Wrong(f"{name} has NaN: 0 x -inf is not a number, nor is -inf + inf, so masks cannot "
                        "be computed with -inf; choose between 0 and -inf instead (torch.where, masked_fill)")
        other = mask[(mask != 0) & (mask != -math.inf)]
        if len(other):
            raise Wrong(f"{name} has the value {other[0]:g}; only 0 and -inf are added to the logits")
    if all(map(torch.equal, got, want[::-1])):
        raise Wrong("M_self and M_cross are swapped")
    m_self, m_cross = got
    if torch.equal(m_self == 0, want[0] != 0):
        raise Wrong("M_self is inverted: 0 lets i attend to j, -inf does not")
    if not torch.equal(m_self, want[0]):
        raise Wrong(f"{case}: M_self(i, j) should be 0 exactly where P_c(i) = P_c(j)")
    if torch.equal(m_cross, want[1].clone().fill_diagonal_(-math.inf)):
        raise Wrong("M_cross lacks 'or i = j': the diagonal is 0 in both masks")
    if not torch.equal(m_cross, want[1]):
        raise Wrong(f"{case}: M_cross(i, j) should be 0 exactly where P_c(i) != P_c(j) or i = j")


@checked
def moved(answer):
    """a background token changes f_bb, f_cb and f_bc, but not f_cc."""
    if not isinstance(answer, dict) or set(answer) != set(dirl.DISENTANGLED):
        raise Wrong("set each of cc, bb, cb, bc to True or False")
    missing = [name for name, value in answer.items() if is_empty(value)]
    if missing:
        raise Blank(f"set {', '.join(missing)} to True or False, run that cell, then run this one again")
    why = {"cc": "under M_self a cell token attends to cells only, and f_cc is the mean of cell tokens",
           "bb": "f_bb is the mean of background tokens, and this is one of them",
           "cb": "under M_cross a cell token attends to background, and f_cb is the mean of cell tokens",
           "bc": "f_bc is the mean of background tokens, and this one attends to itself under M_cross"}
    for name, value in answer.items():
        if not isinstance(value, bool):
            raise Wrong(f"{name} is {value!r}; set it to True or False")
        if value != (name != "cc"):
            raise Wrong(f"f_{name}: {why[name]}")


# ---------------------------------------------------------------- 4. heads and loss

@checked
def uniform_loss(answer):
    """with the paper's numbers ln 65536 + 0.1 ln 4096 = 11.92."""
    paper = (65536, 4096, 0.5, 0.1 / 4)
    other = (32, 8, 1.0, 2.0)  # is the formula right, or only the number?
    values = values_of(answer, {"the paper's numbers": paper, f"the arguments {other}": other})
    got = [tensor_of(value, (), "the loss") for value in values.values()]

    def losses(terms_1, terms_2, log=math.log):
        return [torch.tensor(terms_1 * one * log(k) + terms_2 * two * log(small))
                for k, small, one, two in (paper, other)]
    want = losses(2, 4)
    if abs(got[0] - want[0]) < 0.01 and not close(got[1], want[1]):
        got[0] = want[0]  # 11.92 is the right number, rounded
    judge(got, want, {
        "use the natural logarithm, not base 2": losses(2, 4, math.log2),
        "use the natural logarithm, not base 10": losses(2, 4, math.log10),
        "eq. 9 has two terms under lambda_1 and four under lambda_2": losses(1, 1),
        "the sign: cross-entropy is -sum q log p, which is not negative": losses(-2, -4),
        f"right for the paper's numbers, but not for the arguments {other}: use the arguments":
            [want[0], got[1]]},
        f"{got[0]:.4g} for the paper's numbers; each head adds lambda * ln K, two heads of K outputs and "
        "four of the smaller K")


@checked
def loss(answer):
    """the same as dirl.DINOLoss, also where views lack the region."""
    torch.manual_seed(0)
    student = torch.randn(4, 3, 8)
    teacher = torch.randn(2, 3, 8)
    center = 0.3 * torch.randn(8)
    everywhere = torch.ones(4, 3, dtype=torch.bool)
    some = torch.rand(4, 3) < 0.6
    cases = {name: (student, teacher, center, present, present[:2])
             for name, present in (("all regions present", everywhere), ("some regions missing", some),
                                   ("no region present", ~everywhere))}
    for case, value in values_of(answer, cases).items():
        head = dirl.DINOLoss(8)
        head.center.copy_(center)
        want = head(student, teacher, 0.04, *cases[case][3:])
        if not close(tensor_of(value, (), "the loss"), want):
            raise Wrong(f"{case}: {float(value):.4f}, dirl.DINOLoss {want:.4f}")


def teacher_outputs(k, sharp, prototypes):
    """Returns outputs (16, k): row i has `sharp` on prototype i modulo `prototypes`, the rest evenly."""
    q = torch.full((16, k), (1 - sharp) / (k - 1))
    rows = torch.arange(16)
    q[rows, 3 + rows % prototypes] = sharp
    return q


@checked
def diagnosis(answer):
    """thirteen sets of outputs are told apart, among them noisy ones that are uniform only nearly."""
    torch.manual_seed(0)
    outputs = {}
    for k in (24, 64):
        outputs[f"{k} outputs, 16 prototypes in use"] = ("healthy", teacher_outputs(k, 0.97, 16))
        outputs[f"{k} outputs, 8 prototypes in use"] = ("healthy", teacher_outputs(k, 0.9, 8))
        outputs[f"{k} outputs, four prototypes in use"] = ("healthy", teacher_outputs(k, 0.97, 4))
        noisy = (0.15 * torch.randn(16, k)).softmax(-1)
        outputs[f"{k} outputs, uniform up to noise"] = ("uniform", noisy)
        outputs[f"{k} outputs, one prototype"] = ("same output", teacher_outputs(k, 0.95, 1))
        three = teacher_outputs(k, 0.95, 3).mean(0).expand(16, k)
        outputs[f"{k} outputs, the same three prototypes in all rows"] = ("same output", three)
    outputs["24 outputs, exactly uniform"] = ("uniform", torch.full((16, 24), 1 / 24))
    values = values_of(answer, {case: (q,) for case, (_, q) in outputs.items()})
    for case, (name, q) in outputs.items():
        if values[case] == name:
            continue
        each = entropy(q).mean()
        mean = entropy(q.mean(0))
        exact = values["24 outputs, exactly uniform"] == "uniform"  # but not the noisy ones
        hint = "; leave a margin, and do not compare floats with ==" if "noise" in case and exact else ""
        raise Wrong(f"{case}: each {each:.2f} ln K, mean {mean:.2f} ln K: {name!r}, not "
                    f"{values[case]!r}{hint}")


def entropy(q):
    """Returns -sum q ln q over the last axis, as a share of ln K."""
    return -(q * q.clamp(min=1e-12).log()).sum(-1) / math.log(q.shape[-1])


# ---------------------------------------------------------------- 5. attention

@checked
def aggregated(answer):
    """column sums, averaged over the heads: the n values of a crop sum to n."""
    torch.manual_seed(0)
    attention = (3 * torch.randn(2, 3, 5, 5)).softmax(-1)
    value = values_of(answer, {"two crops": (attention,)})["two crops"]
    got = tensor_of(value, (2, 5), "the map")
    want = dirl.aggregated_attention(attention)
    judge([got], [want], {
        "these are row sums, all 1 after softmax; section 4.2 sums a token's column": [torch.ones(2, 5)],
        "the heads are summed; take their mean, so that the n values sum to n": [3 * want],
        "this is the column's mean; section 4.2 takes its sum": [want / 5],
        "this is one head's; take the mean over the heads": [attention[:, 0].sum(-2)]},
        "not the column sums; attention is (B, heads, n, n) and its rows sum to 1")


@checked
def bins(answer):
    """the three shares sum to 1, and 0.5 and 2 themselves are in the middle bin."""
    values = torch.tensor([[0.1, 0.5, 1.0, 2.0, 2.1], [0.2, 0.3, 0.9, 0.9, 2.5]], dtype=torch.float64)
    value = values_of(answer, {"ten tokens": (values,)})["ten tokens"]
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    names = "the share of 0 to 0.5", "the share of 0.5 to 2", "the share over 2"
    got = torch.stack(tensors_of(value, (), names))
    want = torch.tensor(dirl.attention_bins(values))
    shares = ", ".join(f"{share:.2f}" for share in got)
    judge([got], [want], {
        "these are counts; return shares of all tokens": [want * values.numel()],
        "these are divided by the number of crops, len(values); divide by that of tokens, values.numel()":
            [want * values.shape[1]],
        "these are percentages; return shares, which sum to 1": [want * 100],
        "the shares are in another order; return 0 to 0.5, 0.5 to 2, over 2": [want.flip(0)]},
        f"{shares} for {values.tolist()}; each token belongs to one bin, and 0.5 and 2 themselves are in the "
        "middle one")


# ---------------------------------------------------------------- 6. DSMIL

@checked
def instance_attention(answer):
    """each class attends from its own critical instance, and its column sums to 1."""
    torch.manual_seed(0)
    q = 0.15 * torch.randn(7, 128)  # small, so that no softmax saturates, however it is scaled
    scores = torch.randn(7, 2)
    scores[0] = torch.tensor([9.0, 0])
    scores[4] = torch.tensor([0, 8.0])
    scores[2] = torch.tensor([-9.0, 1])
    scores[5] = torch.tensor([1, -9.0])
    value = values_of(answer, {"seven instances": (q, scores)})["seven instances"]
    got = tensor_of(value, (7, 2), "the attention")
    products = q @ q[scores.argmax(0)].T
    logits = products / math.sqrt(128)
    lowest = q @ q[scores.argmin(0)].T / math.sqrt(128)
    judge([got], [logits.softmax(0)], {
        "these are the logits; apply softmax over the N instances": [logits],
        "softmax is over the classes; it should be over the N instances": [logits.softmax(1)],
        "the division by sqrt(128) is missing": [products.softmax(0)],
        "the divisor is sqrt(N); it should be sqrt(128), the length of a query": [
            (products / math.sqrt(7)).softmax(0)],
        "the divisor is 128; it should be its square root": [(products / 128).softmax(0)],
        "the critical instance has the highest score of its class, not the lowest": [lowest.softmax(0)],
        "the classes' columns are swapped": [logits.softmax(0).flip(1)],
        "one critical instance serves both classes; each class has its own, argmax over axis 0": [
            logits[:, :1].softmax(0).expand(7, 2)]},
        "not softmax over the instances of q . q_critical / sqrt(128)")
