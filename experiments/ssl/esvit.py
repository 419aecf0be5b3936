"""EsViT (4.1, Table 3): half DINO's loss on views, half the same loss on regions, which are single tokens.

Li et al. 2021, microsoft/esvit. Each token of the student is matched to the most similar token of another
view of the teacher, by the cosine of the backbone's outputs. The tokens have their own head, with as many
outputs (65536), and their own centre.

Logits of all 2 x 196 + 8 x 36 tokens of a batch of 256 crops would take 42 GiB, and their gradients as much
again. The head's two factors are kept instead, and multiplied for ROWS tokens at a time in both passes. By
calculation (not measured on a GPU) a step of ViT-S in bf16 then takes 0.12 GiB per crop and 12 GiB besides:
the batch of 256 fits in 80 GB.

What differs from the original: f is the mean token, since this encoder has no class token, and a batch has
the paper's 256 crops (theirs: 512). All other settings are DINO's in both.
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import dirl
from experiments.ssl.losses import WeightedSum, tokens_of
from train import Recipe

ROWS = 4096  # tokens whose logits exist at once: 1 GiB with 65536 outputs, five times that at the peak


def match_tokens(student, teacher):
    """Returns indices (B, n): the teacher's token (B, m, d) most similar to each student's (B, n, d)."""
    return (F.normalize(student, dim=-1) @ F.normalize(teacher, dim=-1).transpose(1, 2)).argmax(-1)


def logit_factors(head, tokens):
    """Factors of a DINOHead's logits z prototypes^T: tokens [(.., d), ..] -> z [(.., 256), ..], (K, 256)."""
    z = [F.normalize(head.mlp(x).float(), dim=-1) for x in tokens]
    prototypes = F.normalize(head.last_layer.weight, dim=-1)
    return z, prototypes if head.last_norm is None else prototypes * head.last_norm


def region_cross_entropy(student, prototypes_s, matched, prototypes_t, center, student_temp, teacher_temp):
    """Some tokens of a student's view against their matches: the sums of -<q_match, log p> and of H(q_match).

    student (N, 256), matched (W, N, 256) in W views of the teacher; prototypes (K, 256): logit_factors.
    """
    q = ((matched @ prototypes_t.t() - center) / teacher_temp).softmax(-1)  # (W, N, K)
    log_p = (student @ prototypes_s.t() / student_temp).log_softmax(-1)  # (N, K)
    return -(q.sum(0) * log_p).sum(), torch.special.entr(q).sum()


class RegionLoss(dirl.DINOLoss):
    """EsViT's region-level loss: the mean of -<q_match, log p> over tokens, crops and pairs of views.

    student: factors of the logits, z (V_i, B, n_i, 256) per size of views, the U global views first, and the
    prototypes (K, 256), and the tokens to match by, which have d in the place of 256; teacher: the same of
    the global views. Pairs are DINO's: every view of the student with every other of the teacher. After a
    call, entropy is the mean H(q) of the matched tokens.
    """

    def forward(self, student, teacher, teacher_temp=0.04):
        z_s, prototypes_s, tokens_s = student
        (z_t,), prototypes_t, (tokens_t,) = teacher
        U = len(z_t)
        views = [z for size in z_s for z in size]  # V of (B, n, 256)
        tokens = [x for size in tokens_s for x in size.detach()]  # V of (B, n, d)
        loss = 0
        entropy = 0
        for v, z in enumerate(views):
            others = [u for u in range(U) if u != v]
            matches = [match_tokens(tokens[v], tokens_t[u]).unsqueeze(-1) for u in others]  # each (B, n, 1)
            matched = torch.stack([z_t[u].take_along_dim(match, 1) for u, match in zip(others, matches)])
            rows = z.flatten(0, 1)  # (B n, 256)
            for shard, targets in zip(rows.split(ROWS), matched.flatten(1, 2).split(ROWS, 1)):
                sums = checkpoint(region_cross_entropy, shard, prototypes_s, targets, prototypes_t,
                                  self.center, self.student_temp, teacher_temp, use_reentrant=False,
                                  preserve_rng_state=False)
                loss = loss + sums[0] / len(rows)
                entropy = entropy + sums[1] / len(rows)
        pairs = U * (len(views) - 1)
        self.entropy = entropy / pairs
        with torch.no_grad():
            rows = z_t.flatten(0, 2)
            mean = rows.mean(0) @ prototypes_t.t()  # the mean of the teacher's logits
            self.add_to_center(mean.view(1, 1, -1), mean.new_full((1, 1), len(rows)))
        return loss / pairs


class EsViT(dirl.DiRL):
    """DINO on f, and a head on every token."""

    def __init__(self, encoder, out_dim, norm_last_layer):
        super().__init__(encoder, "baseline", out_dim, norm_last_layer=norm_last_layer)
        self.heads["region"] = dirl.DINOHead(encoder.embed_dim, out_dim, norm_last_layer=norm_last_layer)

    def forward(self, views, priors):
        """views: one (V_i, B, 3, H, W) per size, the global ones first.

        Returns the logits of f (V, B, K), and for the regions what RegionLoss takes.
        """
        tokens = tokens_of(self.encoder, views)
        f = torch.cat([t.mean(2) for t in tokens])  # (V, B, d)
        return {"f": self.heads["f"](f),
                "region": (*logit_factors(self.heads["region"], tokens), tokens)}


def build(encoder, args):
    """Returns the Recipe of --ssl esvit: (L_f + L_region) / 2."""
    student = EsViT(encoder, args.out_dim, args.norm_last_layer).to(args.device)
    settings = args.out_dim, args.student_temp, args.center_momentum
    terms = {"f": dirl.DINOLoss(*settings), "region": RegionLoss(*settings)}
    loss = WeightedSum(dict.fromkeys(terms, 0.5), terms).to(args.device)
    return Recipe(student, dirl.make_teacher(student), loss)
