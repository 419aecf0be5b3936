"""L_sup (A.3, Fig. 9): DINO, and a linear layer that predicts from each token how many cells its patch has.

The paper states neither the form of L_sup nor its weight. Here it is the mean squared error over all tokens
of all the student's views, with the weight of --sup-weight (1). A view's counts come from prior.view_prior:
the cells go through its crop and flip, and P_c = counts > 0.
"""
import torch
import torch.nn.functional as F
from torch import nn

import dirl
from experiments.ssl.losses import WeightedSum, tokens_of
from train import Recipe


def count_loss(student, teacher=None, teacher_temp=None):
    """L_sup: the mean of (predicted - counts)^2 over all tokens, without a teacher.

    student: predicted and counts, each a list of (V_i, B, n_i) per size.
    """
    predicted, counts = student
    predicted = torch.cat([x.float().flatten() for x in predicted])
    counts = torch.cat([x.float().flatten() for x in counts])
    return F.mse_loss(predicted, counts)


class CellCounter(dirl.DiRL):
    """DINO on f, and a linear layer on every token."""

    def __init__(self, encoder, out_dim, norm_last_layer):
        super().__init__(encoder, "baseline", out_dim, norm_last_layer=norm_last_layer)
        self.counter = nn.Linear(encoder.embed_dim, 1)

    def forward(self, views, counts):
        """views: one (V_i, B, 3, H, W) per size; counts: the cells of their patches (V_i, B, n_i)."""
        tokens = tokens_of(self.encoder, views)
        f = torch.cat([t.mean(2) for t in tokens])  # (V, B, d)
        predicted = [self.counter(t).squeeze(-1) for t in tokens]
        return {"f": self.heads["f"](f), "sup": (predicted, counts)}


def build(encoder, args):
    """Returns the Recipe of --ssl lsup."""
    student = CellCounter(encoder, args.out_dim, args.norm_last_layer).to(args.device)
    dino = dirl.DINOLoss(args.out_dim, args.student_temp, args.center_momentum)
    loss = WeightedSum({"f": 1, "sup": args.sup_weight}, {"f": dino, "sup": count_loss}).to(args.device)
    return Recipe(student, dirl.make_teacher(student), loss, counts=True)
