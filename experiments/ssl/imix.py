"""i-mix in DINO (A.3, Table 9, Fig. 8): the student sees mixed crops and predicts the mixed targets.

Lee et al. 2021, kibok90/imix: x_i becomes l x_i + (1 - l) x_j, with j a permutation of the batch, and l from
Beta(1, 1) and at least a half for each crop; the loss is l L(i) + (1 - l) L(j). The paper does not say how it
puts that into DINO. Here all views of a crop share j and l, the teacher sees unmixed views, and its
distribution q is mixed, since the cross-entropy is linear in q. With torchrun or --accumulate the permutation
is one of each shard, as in the original on several GPUs.
"""
import torch
from torch.utils.checkpoint import checkpoint

import dirl
from experiments.ssl.losses import WeightedSum
from train import Recipe

ALPHA = 1.0  # l is drawn from Beta(alpha, alpha)


def draw_mix(count, device, alpha=ALPHA):
    """Returns l (count,), at least a half, and j (count,), a permutation, from torch's random numbers."""
    share = torch.distributions.Beta(alpha, alpha).sample((count,))
    return torch.maximum(share, 1 - share).to(device), torch.randperm(count).to(device)


def mix(x, share, partner):
    """Returns l x_i + (1 - l) x_j over the second dimension of x (V, B, ...)."""
    share = share.view(-1, *[1] * (x.dim() - 2))
    return share * x + (1 - share) * x[:, partner]


class MixLoss(dirl.DINOLoss):
    """DINO's loss against mixed targets: the mean over pairs of views of -<l q_i + (1 - l) q_j, log p_i>.

    student: logits (V, B, K) of mixed views, the U global ones first, l (B,) and j (B,); teacher (U, B, K) of
    unmixed views. Pairs and centre are DINO's; entropy is that of the mixed q.
    """

    def forward(self, student, teacher, teacher_temp=0.04):
        logits, share, partner = student
        V, B, _ = logits.shape
        U = len(teacher)
        different = 1 - torch.eye(U, V, device=teacher.device)
        pairs = different.unsqueeze(-1).expand(-1, -1, B)  # (U, V, B)
        with torch.no_grad():
            q = mix(((teacher.float() - self.center) / teacher_temp).softmax(-1), share, partner)  # (U, B, K)
            self.entropy = torch.special.entr(q).sum(-1).mean()
            self.add_to_center(teacher, torch.ones(U, B, device=q.device))
        total = 0
        for v in range(V):
            total = total + checkpoint(dirl.view_cross_entropy, logits[v], q, pairs[:, v], self.student_temp,
                                       use_reentrant=False, preserve_rng_state=False)  # as in dirl.py
        return total / pairs.sum()


class Imix(dirl.DiRL):
    """DINO on f with mixed views; returns what MixLoss takes."""

    def forward(self, views, priors):
        share, partner = draw_mix(views[0].shape[1], views[0].device)
        logits, _ = super().forward([mix(x, share, partner) for x in views], priors)["f"]
        return {"f": (logits, share, partner)}


def teach_unmixed(teacher, views, priors):
    """Returns the teacher's logits (2, B, K) on the unmixed global views."""
    logits, _ = dirl.DiRL.forward(teacher, views[:1], priors[:1])["f"]
    return {"f": logits}


def build(encoder, args):
    """Returns the Recipe of --ssl imix."""
    student = Imix(encoder, "baseline", args.out_dim, norm_last_layer=args.norm_last_layer).to(args.device)
    loss = MixLoss(args.out_dim, args.student_temp, args.center_momentum)
    loss = WeightedSum({"f": 1}, {"f": loss}).to(args.device)
    return Recipe(student, dirl.make_teacher(student), loss, teach_unmixed)
