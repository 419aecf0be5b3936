"""DiRL in BYOL and in SimCLR (A.3, Table 8): their losses region by region, in place of DINO's.

Each representation of a method (f; f_c, f_b; all six) has its own projector, and eq. 9 adds up the losses. A
view without a region enters nothing of that region: neither batch norm's statistics nor positives nor
negatives. Shapes as in dirl.py: V views of B crops, U = 2 global ones; present is (V, B).

BYOL: Grill et al. 2020, google-deepmind/deepmind-research/byol; SimCLR: Chen et al. 2020, which the paper
takes from Li et al. 2021, binli123/dsmil-wsi/simclr. Their views, batch and momentum are in compare.DEFAULTS.
What differs from them:

- Optimiser, learning rate, decay, clipping: train.py's, as in all comparisons (BYOL: LARS, decay 1e-6;
  SimCLR: Adam, learning rate and decay 1e-5; neither clips).
- BYOL: a batch has train.py's 256 crops (theirs: 4,096); the loss is the mean of the two pairs (their sum);
  the target starts as a copy of the student (with other random weights); linear layers start as torch's
  (truncated normal); jitter multiplies brightness (adds to it).
- SimCLR: saturation varies by 0.4 (theirs: 0.8); one view is always blurred, the other in 1 of 10 cases (each
  in 1 of 2); pixels are normalised (they are not); all crops are trained on, and the last epoch is kept (nine
  tenths, and the epoch with the lowest loss on the others).
"""
import torch
import torch.nn.functional as F
from torch import nn

import dirl
from experiments.ssl.losses import WeightedSum
from train import Recipe

HIDDEN, PROJECTION = 4096, 256  # BYOL's projector and predictor; SimCLR's output is 256 as well
TEMPERATURE = 0.5  # SimCLR's


# ---------------------------------------------------------------- losses

def byol_loss(student, teacher, teacher_temp=None):
    """BYOL, eq. 2: the mean of 2 - 2 cos(prediction, target) over pairs of views; the target has no gradient.

    student: predictions (V, B, K) of all views, the U global ones first, and present (V, B); teacher:
    projections (U, B, K) of the global views, and present. Pairs are DINO's: every view with every other
    global one, where the region is present in both; 0 if there are none. BYOL adds up its two pairs. Neither
    this loss nor the next has a teacher's temperature.
    """
    prediction, present_s = student
    target, present_t = teacher
    p = F.normalize(prediction.float(), dim=-1)
    z = F.normalize(target.detach().float(), dim=-1)
    other = ~torch.eye(len(z), len(p), dtype=torch.bool, device=p.device)  # no view with itself
    pairs = other.unsqueeze(-1) & present_t.unsqueeze(1) & present_s.unsqueeze(0)  # (U, V, B)
    distance = 2 - 2 * torch.einsum("ubk,vbk->uvb", z, p)
    return (distance * pairs).sum() / pairs.sum().clamp(min=1)


def nt_xent_loss(student, teacher=None, teacher_temp=None):
    """SimCLR, eq. 1 (NT-Xent): the mean of -log(e^(s+/t) / (e^(s+/t) + sum of e^(s-/t))) over pairs of views.

    student: z (V, B, K), present (V, B). s is the cosine; a pair (+) is two different views of one crop, in
    both orders; its negatives (-) are all views of all other crops. Views without the region are in neither;
    the loss is 0 without any pair. With two views this is SimCLR's sum over all k but the anchor. SimCLR has
    no teacher.
    """
    z, present = student
    V, B = present.shape
    z = F.normalize(z.float(), dim=-1).flatten(0, 1)  # (V B, K)
    s = z @ z.t() / TEMPERATURE
    crop = torch.arange(B, device=z.device).repeat(V)
    negative = (crop.unsqueeze(1) != crop) & present.flatten()
    against = s.masked_fill(~negative, -1e9).logsumexp(-1).view(V, 1, B)  # no infinity: its gradient is NaN
    positive = s.view(V, B, V, B).diagonal(dim1=1, dim2=3)  # (V, V, B)
    pairs = present.unsqueeze(1) & present & ~torch.eye(V, dtype=torch.bool, device=z.device).unsqueeze(-1)
    return (F.softplus(against - positive) * pairs).sum() / pairs.sum().clamp(min=1)


# ---------------------------------------------------------------- models

def byol_mlp(in_dim):
    """BYOL's projector and predictor: linear, batch norm, ReLU, linear; (N, in_dim) -> (N, 256).

    Both networks normalise by the statistics of the batch, as in BYOL.
    """
    return nn.Sequential(nn.Linear(in_dim, HIDDEN), nn.BatchNorm1d(HIDDEN, track_running_stats=False),
                         nn.ReLU(), nn.Linear(HIDDEN, PROJECTION, bias=False))


def simclr_mlp(in_dim):
    """SimCLR's projector of Li et al.: linear, ReLU, linear; (N, in_dim) -> (N, 256)."""
    return nn.Sequential(nn.Linear(in_dim, in_dim), nn.ReLU(), nn.Linear(in_dim, PROJECTION))


class RegionProjections(dirl.DiRL):
    """DiRL's representations, each through a projector (BYOL: and a predictor) instead of DINO's head."""

    def __init__(self, encoder, method, ssl):
        super().__init__(encoder, method, out_dim=2, disentangled_dim=2)
        names = list(self.heads)
        mlp = byol_mlp if ssl == "byol" else simclr_mlp
        self.heads = nn.ModuleDict({name: mlp(encoder.embed_dim) for name in names})
        self.predictors = nn.ModuleDict({name: byol_mlp(PROJECTION) for name in names if ssl == "byol"})

    def forward(self, views, priors):
        """views (V_i, B, 3, H, W) and priors per size -> {name: (z (V, B, 256), present (V, B))}."""
        return self.project(views, priors, self.predictors)

    def project(self, views, priors, predictors):
        """forward with these predictors; {} stops at the projections.

        Batch norm sees one view at a time, as in BYOL, and of it only the rows whose region is present. A
        single row has no batch statistics and counts as absent.
        """
        B = views[0].shape[1]
        by_size = [self.represent(x.flatten(0, 1), p.flatten(0, 1)) for x, p in zip(views, priors)]
        projected = {}
        for name, projector in self.heads.items():
            f = torch.cat([f[name] for f, _ in by_size]).unflatten(0, (-1, B))  # (V, B, d)
            present = torch.cat([region[name] for _, region in by_size]).unflatten(0, (-1, B))  # (V, B)
            present = present & (present.sum(1, keepdim=True) > 1)
            z = torch.zeros(*present.shape, PROJECTION, device=f.device)
            for v in range(len(z)):
                if present[v].any():
                    rows = projector(f[v, present[v]])
                    if name in predictors:
                        rows = predictors[name](rows)
                    z[v, present[v]] = rows.float()
            projected[name] = z, present
        return projected


def teach_projections(teacher, views, priors):
    """Returns BYOL's target: the projections of the global views, without the predictors."""
    return teacher.project(views[:1], priors[:1], {})


def teach_nothing(teacher, views, priors):
    """SimCLR has no teacher."""
    return dict.fromkeys(teacher.heads)


def twin_of(student):
    """Returns SimCLR's "teacher", which shares the student's weights, since the loop saves the teacher."""
    twin = dirl.make_teacher(student)
    for shared, own in zip(twin.parameters(), student.parameters()):
        shared.data = own.data  # the moving average of a weight with itself leaves it unchanged
    return twin


def build(encoder, args):
    """Returns the Recipe of --ssl byol or simclr."""
    student = RegionProjections(encoder, args.method, args.ssl).to(args.device)
    weight = dirl.eq9_weights(student.heads, args.lambda_1, args.lambda_2)
    loss = WeightedSum(weight, dict.fromkeys(weight, byol_loss if args.ssl == "byol" else nt_xent_loss))
    if args.ssl == "byol":
        return Recipe(student, dirl.make_teacher(student), loss, teach_projections)
    return Recipe(student, twin_of(student), loss, teach_nothing)
