"""What the comparisons share: the tokens of all views, and the weighted sum of their losses."""
from torch import nn

import dirl


def tokens_of(encoder, views):
    """views, one (V_i, B, 3, H, W) per size -> T_L of each size, (V_i, B, n_i, d)."""
    return [encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in views]


class WeightedSum(nn.Module):
    """A weighted sum of losses; returns (sum, {name: L_name without gradient}), as dirl.DiRLLoss does.

    weight: {name: weight of L_name}. terms: {name: function of (student[name], teacher[name], the teacher's
    temperature)}; a dirl.DINOLoss among them has prototypes, and with them a centre and an entropy.
    """

    def __init__(self, weight, terms):
        super().__init__()
        self.weight = weight
        self.terms = terms
        self.losses = nn.ModuleDict({name: term for name, term in terms.items()
                                     if isinstance(term, dirl.DINOLoss)})

    def forward(self, student, teacher, teacher_temp=0.04):
        each = {name: term(student[name], teacher[name], teacher_temp) for name, term in self.terms.items()}
        total = sum(self.weight[name] * loss for name, loss in each.items())
        return total, {name: loss.detach() for name, loss in each.items()}

    def update_centers(self):
        for cross_entropy in self.losses.values():
            cross_entropy.update_center()
