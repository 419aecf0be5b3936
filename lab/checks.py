"""Checks for the exercises in dirl.ipynb: each takes the reader's answer and returns one line.

The line starts with "not yet" if the blank has not been filled in, with "no" and what is wrong, or with
"right". A wrong answer is compared with the usual mistakes, so that the line can name the one made.
"""
import math

import torch

import dirl
import prior

EASY = torch.tensor([1.0, 0, 0, 1, 1, 0])  # a P_c with both regions


def checked(compare):
    """Turns compare(answer), which returns None or what is wrong, into a check that returns a whole line."""
    def check(answer):
        try:
            wrong = compare(answer)
        except Blank:
            return "not yet: write your code at the comment, run that cell, then run this one again"
        except Exception as error:  # the reader's code may raise anything
            return f"no: your code raised {type(error).__name__}: {error}"
        return f"no: {wrong}" if wrong else f"right: {compare.__doc__}"
    return check


class Blank(Exception):
    """Raised where the reader has not written an answer yet."""


def filled(value):
    """Returns the value; raises Blank if it is None or ..., or a tuple that contains one of them."""
    values = value if isinstance(value, tuple) else (value,)
    if any(v is None or v is ... for v in values):
        raise Blank
    return value


def tensor_of(value, shape, name):
    """Returns the value as a float tensor; raises ValueError if its shape differs."""
    value = torch.as_tensor(value).float()
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it should be {tuple(shape)}")
    return value


def close(a, b):
    """Whether two tensors are equal up to rounding; infinities must match, NaN never does."""
    return torch.allclose(a, b, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- 1. C and P_c

@checked
def view_prior(answer):
    """your P_c is prior.view_prior's, for 20 random crops, flips and sets of cells."""
    torch.manual_seed(0)
    for trial in range(20):
        cells = torch.rand(40, 2) * 224
        flip = trial % 2 == 1
        w, h = (torch.rand(2) * 100 + 100).round().tolist()
        left, top = ((224 - side) * torch.rand(1).item() // 1 for side in (w, h))
        box = (left, top, w, h)

        def truth(cells=cells, box=box, flip=flip):
            return prior.view_prior(cells[None], torch.tensor([box]), torch.tensor([flip]), 224)[0]
        got = tensor_of(filled(answer(cells.clone(), box, flip)), (196,), "P_c")
        if torch.equal(got, truth()):
            continue
        if got.max() > 1:
            return "P_c counts the cells of a patch; max-pooling returns 1 for one or more"
        if flip and torch.equal(got, truth(flip=False)):
            return "the crop is right, but the prior of a flipped view is not flipped"
        if torch.equal(got, truth(cells.flip(1), (top, left, h, w))):
            return "x and y are swapped: the patch's index is row * 14 + column, and y determines the row"
        if torch.equal(got, truth(box=(0, 0, 224, 224))):
            return "the cells are not cropped: subtract left and top, and scale to 224 px"
        return f"trial {trial} (box {box}, flip {flip}): {int((got != truth()).sum())} of 196 patches differ"


# ---------------------------------------------------------------- 2. cell-back pooling

@checked
def pool(answer):
    """eq. 3, and no NaN where a region is empty."""
    torch.manual_seed(0)
    tokens = torch.randn(2, 6, 5)
    p_c = torch.stack([EASY, 1 - EASY])
    f_c, f_b = filled(answer(tokens, p_c))
    f_c = tensor_of(f_c, (2, 5), "f_c")
    f_b = tensor_of(f_b, (2, 5), "f_b")
    want_c, want_b = dirl.cell_back_pool(tokens, p_c)
    if close(f_c, want_b) and close(f_b, want_c):
        return "f_c and f_b are swapped: P_c is 1 for the patches with a cell"
    if close(f_c, want_c * 3 / 6):
        return "the sum is divided by n; eq. 3 divides by |P_c|, the number of cell tokens"
    if close(f_c, want_c * 3):
        return "this is the sum over the region; eq. 3 divides it by |P_c|"
    if not close(f_c, want_c):
        return "f_c is not the mean of its tokens"
    if not close(f_b, want_b):
        return "f_b is not the mean of its tokens"
    for value, name in ((0.0, "no cell"), (1.0, "nothing but cells")):
        f = torch.stack(list(answer(tokens, torch.full((2, 6), value))))
        if not f.isfinite().all():
            bad = f[~f.isfinite()][0].item()
            return f"a view with {name} pools to {bad}; an empty region should pool to zeros"
        if not close(f[0 if value == 0 else 1], torch.zeros(2, 5)):
            return f"a view with {name}: the empty region should pool to zeros"


# ---------------------------------------------------------------- 3. masks

@checked
def masks(answer):
    """eq. 4; no row of either mask is all -inf, so softmax is defined everywhere."""
    m_self, m_cross = filled(answer(EASY))
    got = tensor_of(m_self, (6, 6), "M_self"), tensor_of(m_cross, (6, 6), "M_cross")
    want = [m[0] for m in dirl.disentangle_masks(EASY[None])]
    for m, name in zip(got, ("M_self", "M_cross")):
        if not ((m == 0) | (m == -math.inf)).all():
            other = m[(m != 0) & (m != -math.inf)][0].item()
            return f"{name} has the value {other:g}; only 0 and -inf are added to the logits"
    if all(torch.equal(g, w) for g, w in zip(got, reversed(want))):
        return "M_self and M_cross are swapped"
    if torch.equal(got[0] == 0, want[0] != 0):
        return "M_self is inverted: 0 lets i attend to j, -inf does not"
    if not torch.equal(got[0], want[0]):
        return "M_self(i, j) should be 0 exactly where P_c(i) = P_c(j)"
    if torch.equal(got[1], want[1].clone().fill_diagonal_(-math.inf)):
        return "M_cross lacks 'or i = j': the diagonal is 0 in both masks"
    if not torch.equal(got[1], want[1]):
        return "M_cross(i, j) should be 0 exactly where P_c(i) != P_c(j) or i = j"


@checked
def moved(answer):
    """a background token changes f_bb, f_cb and f_bc, but not f_cc."""
    filled(tuple(answer.values()))
    if set(answer) != set(dirl.DISENTANGLED) or not all(isinstance(v, bool) for v in answer.values()):
        return "set each of cc, bb, cb, bc to True or False"
    why = {"cc": "under M_self a cell token attends to cells only, and f_cc is the mean of cell tokens",
           "bb": "f_bb is the mean of background tokens, and this is one of them",
           "cb": "under M_cross a cell token attends to background, and f_cb is the mean of cell tokens",
           "bc": "f_bc is the mean of background tokens, and this one attends to itself under M_cross"}
    for name, value in answer.items():
        if value != (name != "cc"):
            return f"f_{name}: {why[name]}"


# ---------------------------------------------------------------- 4. heads and loss

@checked
def uniform_loss(answer):
    """with the paper's numbers ln 65536 + 0.1 ln 4096 = 11.92."""
    k, k_small = 65536, 4096
    lambda_1 = 0.5
    lambda_2 = 0.1 / 4
    got = float(filled(answer(k, k_small, lambda_1, lambda_2)))
    want = 2 * lambda_1 * math.log(k) + 4 * lambda_2 * math.log(k_small)
    other = float(answer(32, 8, 1.0, 1.0))  # is the formula right, or only the number?
    other_want = 2 * math.log(32) + 4 * math.log(8)
    if math.isclose(got, want, rel_tol=1e-4) and math.isclose(other, other_want, rel_tol=1e-4):
        return None
    for base, name in ((2, "2"), (10, "10")):
        if math.isclose(got, want / math.log(base), rel_tol=1e-4):
            return f"use the natural logarithm, not base {name}"
    if math.isclose(got, lambda_1 * math.log(k) + lambda_2 * math.log(k_small), rel_tol=1e-4):
        return "eq. 9 has two terms under lambda_1 and four under lambda_2"
    if math.isclose(got, -want, rel_tol=1e-4):
        return "the sign: cross-entropy is -sum q log p, which is not negative"
    return f"{got:.4g}; each head adds lambda * ln K, two heads of K outputs and four of the smaller K"


@checked
def diagnosis(answer):
    """you use the entropy of single outputs and of their mean; one alone cannot tell the three apart."""
    k = 16
    sharp = 0.97
    peaked = torch.full((16, k), (1 - sharp) / (k - 1))
    healthy = peaked.clone()
    healthy[range(16), range(16)] = sharp
    one = peaked.clone()
    one[:, 3] = sharp
    uniform = torch.full((16, k), 1 / k)
    for q, name in ((healthy, "healthy"), (uniform, "uniform"), (one, "one prototype")):
        got = filled(answer(q))
        if got == name:
            continue
        each = entropy(q).mean().item()
        mean = entropy(q.mean(0)).item()
        return (f"outputs with entropy {each:.2f} on average, whose mean has entropy {mean:.2f} "
                f"(ln K = {math.log(k):.2f}), are {name!r}, not {got!r}")


def entropy(q):
    """Returns -sum q ln q over the last axis."""
    return -(q * q.clamp(min=1e-12).log()).sum(-1)


# ---------------------------------------------------------------- 5. attention

@checked
def aggregated(answer):
    """column sums, averaged over the heads: the n values of a crop sum to n."""
    torch.manual_seed(0)
    attention = (3 * torch.randn(2, 3, 5, 5)).softmax(-1)
    got = tensor_of(filled(answer(attention)), (2, 5), "the map")
    want = dirl.aggregated_attention(attention)
    if close(got, torch.ones(2, 5)):
        return "these are row sums, all 1 after softmax; section 4.2 sums a token's column"
    if close(got, 3 * want):
        return "the heads are summed; take their mean, so that the n values sum to n"
    if close(got, want / 5):
        return "this is the column's mean; section 4.2 takes its sum"
    if not close(got, want):
        return "not the column sums; attention is (B, heads, n, n) and its rows sum to 1"


@checked
def bins(answer):
    """the three shares sum to 1, and 0.5 and 2 themselves are in the middle bin."""
    values = torch.tensor([[0.1, 0.5, 1.0, 2.0, 2.1], [0.2, 0.9, 0.9, 0.9, 2.5]], dtype=torch.float64)
    got = [float(v) for v in filled(answer(values))]
    want = dirl.attention_bins(values)
    if len(got) != 3:
        return f"{len(got)} numbers; return three shares: below 0.5, 0.5 to 2, over 2"
    if all(math.isclose(g, w * values.numel(), rel_tol=1e-4) for g, w in zip(got, want)):
        return "these are counts; return shares of all tokens"
    if not math.isclose(sum(got), 1, rel_tol=1e-4):
        return f"the shares sum to {sum(got):.2f}, not to 1: each token belongs to one bin"
    if not all(math.isclose(g, w, rel_tol=1e-4) for g, w in zip(got, want)):
        shares = ", ".join(f"{g:.2f}" for g in got)
        return f"{shares} for {values.tolist()}; 0.5 and 2 themselves are in the middle bin"


# ---------------------------------------------------------------- 6. DSMIL

@checked
def instance_attention(answer):
    """each class attends from its own critical instance, and its column sums to 1."""
    torch.manual_seed(0)
    q = torch.randn(7, 128)
    scores = torch.randn(7, 2)
    scores[0] = torch.tensor([9.0, -9])
    scores[4] = torch.tensor([-9.0, 9])
    got = tensor_of(filled(answer(q, scores)), (7, 2), "the attention")
    logits = q @ q[scores.argmax(0)].T / math.sqrt(128)
    if close(got, logits):
        return "these are the logits; apply softmax over the N instances"
    if close(got, logits.softmax(1)):
        return "softmax is over the classes; it should be over the N instances"
    if close(got, (logits * math.sqrt(128)).softmax(0)):
        return "the division by sqrt(128) is missing"
    if close(got, (q @ q[scores.argmin(0)].T / math.sqrt(128)).softmax(0)):
        return "the critical instance is the one with the highest score of the class, not the lowest"
    if not close(got, logits.softmax(0)):
        return "not softmax over the instances of q . q_critical / sqrt(128)"
