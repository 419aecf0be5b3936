"""Evenness alone: DINO, and a penalty on uneven attention; not in the paper.

If attention is then as even as DiRL's and features are DINO's, evenness alone does not improve features. The
penalty is the mean of (a_j - 1)^2 over the tokens of all views; a_j is a token's aggregated attention in the
last block.
"""
import torch

import dirl
from experiments.ssl.losses import WeightedSum
from train import Recipe


def unevenness(aggregated, teacher=None, teacher_temp=None):
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
        return {"f": logits, "even": [aggregated for _, aggregated in encoded]}


def build(encoder, args):
    """Returns the Recipe of --ssl evenness."""
    student = AttentiveDINO(encoder, "baseline", args.out_dim, norm_last_layer=args.norm_last_layer)
    student = student.to(args.device)
    dino = dirl.DINOLoss(args.out_dim, args.student_temp, args.center_momentum)
    loss = WeightedSum({"f": 1, "even": args.even_weight}, {"f": dino, "even": unevenness}).to(args.device)
    return Recipe(student, dirl.make_teacher(student), loss)
