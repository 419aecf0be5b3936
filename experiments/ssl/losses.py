"""What the comparisons' losses share: the weighted sum, and the centres of those that have prototypes."""
from torch import nn

import dirl


class WeightedSum(nn.Module):
    """A weighted sum of losses; returns (sum, {name: L_name without gradient}), as dirl.DiRLLoss does.

    weight: {name: weight of L_name}. losses: {name: the dirl.DINOLoss of a head with prototypes}. A subclass
    has each(student, teacher, teacher_temp), which returns {name: L_name}.
    """

    def __init__(self, weight, losses):
        super().__init__()
        self.weight = weight
        self.losses = nn.ModuleDict(losses)

    def forward(self, student, teacher, teacher_temp=0.04):
        each = self.each(student, teacher, teacher_temp)
        total = sum(self.weight[name] * loss for name, loss in each.items())
        return total, {name: loss.detach() for name, loss in each.items()}

    def update_centers(self):
        for cross_entropy in self.losses.values():
            cross_entropy.update_center()


class PenalizedDINO(WeightedSum):
    """L_f + weight L_name, with L_name = penalty(*others) of a student that returns (logits of f, *others).

    The teacher returns the same; settings: those of dirl.DINOLoss.
    """

    def __init__(self, name, penalty, weight, *settings):
        super().__init__({"f": 1, name: weight}, {"f": dirl.DINOLoss(*settings)})
        self.name = name
        self.penalty = penalty

    def each(self, student, teacher, teacher_temp):
        logits, *others = student
        return {"f": self.losses["f"](logits, teacher[0], teacher_temp), self.name: self.penalty(*others)}
