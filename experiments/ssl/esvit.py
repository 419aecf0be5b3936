"""EsViT (4.1, Table 3): half DINO's loss on views, half the same loss on regions, which are single tokens.

Li et al. 2021, microsoft/esvit. Each token of the student is matched to the most similar token of another
view of the teacher, by the cosine of the backbone's outputs. The tokens have their own head, with as many
outputs (65536), and their own centre. That is K numbers for each of the 2 x 196 + 8 x 36 tokens of a crop:
lower --out-dim or --batch (EsViT has 32 to 64 crops per GPU).
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dirl
from experiments.ssl.dense import through, tokens_of
from train import Recipe


def match_tokens(student, teacher):
    """Returns indices (B, n): the teacher's token (B, m, d) most similar to each student's (B, n, d)."""
    return (F.normalize(student, dim=-1) @ F.normalize(teacher, dim=-1).transpose(1, 2)).argmax(-1)


def region_cross_entropy(student, targets, matches, temp):
    """One student view against some of the teacher's: the sum over these of the mean of -<q_match, log p>.

    student: logits (B, n, K); targets: q (B, m, K) of each teacher view; matches (B, n) for each of them;
    p = softmax(student / temp).
    """
    K = student.shape[-1]
    q = sum(t.gather(1, m.unsqueeze(-1).expand(-1, -1, K)) for t, m in zip(targets, matches))  # (B, n, K)
    return -(q * (student.float() / temp).log_softmax(-1)).sum(-1).mean()


class RegionLoss(dirl.DINOLoss):
    """EsViT's region-level loss: the mean of -<q_match, log p> over tokens, crops and pairs of views.

    student: logits (V_i, B, n_i, K) per size of views, the U global views first; teacher (U, B, m, K).
    tokens_s and tokens_t, to match by, have d in K's place. Pairs are DINO's: every view of the student with
    every other of the teacher. After a call, entropy is the mean H(q) of the matched tokens.
    """

    def forward(self, student, teacher, tokens_s, tokens_t, teacher_temp=0.04):
        U = len(teacher)
        views = [x for size in student for x in size]  # V of (B, n, K)
        tokens = [x for size in tokens_s for x in size.detach()]  # V of (B, n, d)
        q = ((teacher.float() - self.center) / teacher_temp).softmax(-1)  # (U, B, m, K)
        h = torch.special.entr(q).sum(-1)  # (U, B, m)
        loss = 0
        entropy = 0
        for v, logits in enumerate(views):
            others = [u for u in range(U) if u != v]
            matches = [match_tokens(tokens[v], tokens_t[u]) for u in others]  # each (B, n)
            loss = loss + checkpoint(region_cross_entropy, logits, [q[u] for u in others], matches,
                                     self.student_temp, use_reentrant=False, preserve_rng_state=False)
            entropy = entropy + sum(h[u].gather(1, match).mean() for u, match in zip(others, matches))
        pairs = U * (len(views) - 1)
        self.entropy = entropy / pairs
        with torch.no_grad():
            rows = teacher.flatten(1, 2)  # (U, B m, K)
            self.add_to_center(rows, torch.ones(rows.shape[:2], device=rows.device))
        return loss / pairs


class EsViT(nn.Module):
    """The encoder with a head on f and one on every token."""

    def __init__(self, encoder, out_dim=65536, norm_last_layer=True):
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict({
            name: dirl.DINOHead(encoder.embed_dim, out_dim, norm_last_layer=norm_last_layer)
            for name in ("f", "region")})

    def forward(self, views, priors=None):
        """views: one (V_i, B, 3, H, W) per size, the global ones first.

        Returns the logits of f (V, B, K), and per size those of the tokens (V_i, B, n_i, K) and the tokens.
        """
        tokens = tokens_of(self.encoder, views)
        f = torch.cat([t.mean(2) for t in tokens])  # (V, B, d)
        return through(self.heads["f"], f), [through(self.heads["region"], t) for t in tokens], tokens


class EsViTLoss(nn.Module):
    """(L_f + L_region) / 2 of student's and teacher's outputs; (loss, {name: L_name without gradient})."""

    def __init__(self, out_dim, student_temp=0.1, center_momentum=0.9):
        super().__init__()
        self.losses = nn.ModuleDict({"f": dirl.DINOLoss(out_dim, student_temp, center_momentum),
                                     "region": RegionLoss(out_dim, student_temp, center_momentum)})

    def forward(self, student, teacher, teacher_temp=0.04):
        f_s, region_s, tokens_s = student
        f_t, (region_t,), (tokens_t,) = teacher
        each = {"f": self.losses["f"](f_s, f_t, teacher_temp),
                "region": self.losses["region"](region_s, region_t, tokens_s, tokens_t, teacher_temp)}
        return sum(each.values()) / 2, {name: loss.detach() for name, loss in each.items()}

    def update_centers(self):
        for cross_entropy in self.losses.values():
            cross_entropy.update_center()


def build(encoder, args):
    """Returns the Recipe of --ssl esvit."""
    student = EsViT(encoder, args.out_dim, args.norm_last_layer).to(args.device)
    loss = EsViTLoss(args.out_dim, args.student_temp, args.center_momentum).to(args.device)
    return Recipe(student, dirl.make_teacher(student), loss, ("f", "region"), dict(loss.losses))
