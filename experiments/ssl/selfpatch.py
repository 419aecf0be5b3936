"""SelfPatch (4.1, Table 3): DINO, and each patch against an aggregate of its most similar neighbours.

Yun et al. 2022, alinlab/SelfPatch. For every patch of every view the teacher aggregates the 4 most similar of
its 8 neighbours (by cosine; the grid is closed to a torus, so that a border patch has 8, too) through two
blocks of class attention; the student's patch at that place has to predict the aggregate. This loss has
weight 0.1 next to DINO's, whose f is the same aggregation of all patches; patches have 4096 outputs (here
--disentangled-dim).

As in the original, neighbours are chosen and aggregated among tokens without the closing norm, which follows
the aggregation, and both centres are of all the teacher's views; compare.DEFAULTS has the original's scales.
What differs: the closing norm is the encoder's (theirs: next to the aggregation), so that training reaches
it; evaluation averages the tokens after it, as for every encoder in this project, without the aggregation; a
batch has the paper's 256 crops (theirs: 1,024). All other settings are DINO's in both.
"""
import torch
import torch.nn.functional as F
from torch import nn

import dirl
from experiments.ssl.losses import WeightedSum
from train import Recipe

NEIGHBOURS = 4  # of 8
WEIGHT = 0.1  # of L_patch, next to L_f


def neighbours_of(grid, device=None):
    """Returns the indices (grid^2, 8) of each patch's neighbours on a square grid closed to a torus.

    With fewer than 3 patches a side, neighbours repeat or include the patch itself.
    """
    index = torch.arange(grid * grid, device=device).view(grid, grid)
    around = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    return torch.stack([index.roll(shift, (0, 1)).flatten() for shift in around], 1)


def similar_neighbours(tokens, count=NEIGHBOURS):
    """tokens (B, n, d) -> of each its count most similar neighbours by cosine (B, n, count, d)."""
    around = tokens[:, neighbours_of(int(tokens.shape[1] ** 0.5), tokens.device)]  # (B, n, 8, d)
    best = F.cosine_similarity(around, tokens.unsqueeze(2), dim=-1).topk(count, -1).indices
    return around.gather(2, best.unsqueeze(-1).expand(-1, -1, -1, tokens.shape[-1]))


class ClassAttention(dirl.Block):
    """A block whose only query is one token (CaiT): tokens (N, m, d), x (N, 1, d) -> the new x (N, 1, d)."""

    def forward(self, tokens, x):
        q, k, v = self.attn.project(self.norm1(torch.cat([x, tokens], 1)))
        attention = self.attn.logits(q[:, :, :1], k).softmax(-1)  # (N, heads, 1, 1 + m)
        x = x + self.attn.merge(attention.to(v.dtype) @ v)
        return x + self.mlp(self.norm2(x))


class Aggregation(nn.Module):
    """Tokens (N, m, d) -> one each (N, d): a learned token queries them in two blocks of class attention."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList([ClassAttention(dim, num_heads) for _ in range(2)])
        self.apply(dirl.init_weights)
        nn.init.trunc_normal_(self.token, std=0.02)

    def forward(self, tokens):
        x = self.token.expand(len(tokens), -1, -1)
        for block in self.blocks:
            x = block(tokens, x)
        return x.squeeze(1)


class PatchLoss(dirl.DINOLoss):
    """L_patch: the mean of -<q, log p> over views, crops and patches; each view is paired with itself.

    student, teacher: logits (V_i, B, n_i, K) per size of views, of the patches and of their neighbours. The
    centre is that of all patches. After a call, entropy is the mean H(q).
    """

    def forward(self, student, teacher, teacher_temp=0.04):
        views = sum(map(len, student))
        loss = 0
        self.entropy = 0
        for s, t in zip(student, teacher):
            q = ((t.float() - self.center) / teacher_temp).softmax(-1)
            log_p = (s.float() / self.student_temp).log_softmax(-1)
            loss = loss - (q * log_p).sum(-1).mean() * len(s) / views
            self.entropy = self.entropy + torch.special.entr(q).sum(-1).mean() * len(s) / views
        with torch.no_grad():
            rows = torch.cat([t.flatten(0, 2) for t in teacher]).unsqueeze(0)  # (1, all patches, K)
            self.add_to_center(rows, torch.ones(rows.shape[:2], device=rows.device))
        return loss


class AggregateLoss(dirl.DINOLoss):
    """DINO's loss of f with a centre of all the teacher's views: teacher is (U, B, K), (V - U, B, K)."""

    def forward(self, student, teacher, teacher_temp=0.04):
        of_global, of_local = teacher
        with torch.no_grad():
            self.add_to_center(of_local, torch.ones(of_local.shape[:2], device=of_local.device))
        return super().forward(student, of_global, teacher_temp)


class SelfPatch(nn.Module):
    """The encoder, the aggregation, a head on its f and one on the patches."""

    def __init__(self, encoder, out_dim=65536, patch_dim=4096, norm_last_layer=True):
        super().__init__()
        self.encoder = encoder
        self.aggregation = Aggregation(encoder.embed_dim, encoder.num_heads)
        self.heads = nn.ModuleDict({
            name: dirl.DINOHead(encoder.embed_dim, dim, norm_last_layer=norm_last_layer)
            for name, dim in (("f", out_dim), ("patch", patch_dim))})

    def forward(self, views, priors=None):
        """views, one (V_i, B, 3, H, W) per size -> logits of f (V, B, K), of patches (V_i, B, n_i, K)."""
        tokens = self.tokens_of(views)
        return self.logits(tokens, tokens)

    def tokens_of(self, views):
        """Returns the tokens (V_i, B, n_i, d) of each size, without the closing norm."""
        tokens = [self.encoder.blocks(self.encoder.embed(x.flatten(0, 1))) for x in views]
        return [t.unflatten(0, x.shape[:2]) for t, x in zip(tokens, views)]

    def logits(self, tokens, patches):
        """Returns the logits of f, aggregated from tokens, and of patches; both (V_i, B, n_i, d) per size."""
        f = torch.cat([self.aggregation(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in tokens])
        norm = self.encoder.norm
        return {"f": self.heads["f"](norm(f)), "patch": [self.heads["patch"](norm(x)) for x in patches]}

    def of_neighbours(self, tokens):
        """Returns the aggregation of each patch's neighbours in the patch's place, (V_i, B, n_i, d)."""
        around = similar_neighbours(tokens.flatten(0, 1))  # (V_i B, n_i, 4, d)
        return self.aggregation(around.flatten(0, 1)).view_as(tokens)


def teach_neighbours(teacher, views, priors):
    """Returns the teacher's outputs on all views, with each patch's neighbours in the patch's place."""
    tokens = teacher.tokens_of(views)
    out = teacher.logits(tokens, [teacher.of_neighbours(x) for x in tokens])
    U = len(views[0])  # global views
    return out | {"f": (out["f"][:U], out["f"][U:])}


def build(encoder, args):
    """Returns the Recipe of --ssl selfpatch."""
    student = SelfPatch(encoder, args.out_dim, args.disentangled_dim, args.norm_last_layer).to(args.device)
    settings = args.student_temp, args.center_momentum
    terms = {"f": AggregateLoss(args.out_dim, *settings),
             "patch": PatchLoss(args.disentangled_dim, *settings)}
    loss = WeightedSum({"f": 1, "patch": WEIGHT}, terms).to(args.device)
    return Recipe(student, dirl.make_teacher(student), loss, teach_neighbours)
