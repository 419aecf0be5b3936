"""Evenness alone: DINO, and a penalty on uneven attention; not in the paper.

If attention is as even as DiRL's and features are no better than DINO's, evenness is not the reason for
DiRL's. The penalty is the mean of (a_j - 1)^2 over the tokens of all the student's views, as DiRL's regions
are in all views; a_j is a token's aggregated attention in the last block, where it is measured.
"""
import torch
from torch import nn

import dirl
from train import Recipe


def unevenness(aggregated):
    """The mean of (a_j - 1)^2 over all tokens, 0 for even attention. aggregated: one (N_i, n_i) per size."""
    return torch.cat([a.flatten() for a in aggregated]).sub(1).square().mean()


class AttentiveDINO(dirl.DiRL):
    """DINO on f that also returns the aggregated attention of the last block."""

    def encode(self, images):
        """images (B, 3, H, W) -> T_L (B, n, d) and the aggregated attention (B, n)."""
        last = self.encoder.blocks[-1]
        x = self.encoder.blocks[:-1](self.encoder.embed(images))
        q, k, _ = last.attn.project(last.norm1(x))
        attention = last.attn.logits(q, k).float().softmax(-1)
        return self.encoder.norm(last(x)), dirl.aggregated_attention(attention)

    def forward(self, views, priors):
        """Returns the logits of f (V, B, K) and, per size of views, the aggregated attention (V_i B, n_i)."""
        encoded = [self.encode(x.flatten(0, 1)) for x in views]
        f = torch.cat([tokens.mean(1) for tokens, _ in encoded])  # (V B, d)
        logits = self.heads["f"](f).unflatten(0, (-1, views[0].shape[1]))
        return logits, [aggregated for _, aggregated in encoded]


class EvenLoss(nn.Module):
    """L_f + weight unevenness of an AttentiveDINO's outputs; (loss, {"f": L_f, "even": unevenness})."""

    def __init__(self, out_dim, weight, student_temp=0.1, center_momentum=0.9):
        super().__init__()
        self.weight = weight
        self.cross_entropy = dirl.DINOLoss(out_dim, student_temp, center_momentum)

    def forward(self, student, teacher, teacher_temp=0.04):
        logits, aggregated = student
        each = {"f": self.cross_entropy(logits, teacher[0], teacher_temp), "even": unevenness(aggregated)}
        return each["f"] + self.weight * each["even"], {name: loss.detach() for name, loss in each.items()}

    def update_centers(self):
        self.cross_entropy.update_center()


def build(encoder, args):
    """Returns the Recipe of --ssl evenness."""
    student = AttentiveDINO(encoder, "baseline", args.out_dim, norm_last_layer=args.norm_last_layer)
    student = student.to(args.device)
    loss = EvenLoss(args.out_dim, args.even_weight, args.student_temp, args.center_momentum).to(args.device)
    return Recipe(student, dirl.make_teacher(student), loss, ("f", "even"), {"f": loss.cross_entropy})
