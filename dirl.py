"""DiRL: the method of "Attention De-sparsification Matters" (sections 3.1, 3.3, 3.4, 3.5).

torch and the standard library alone, so that every function can be copied out as it stands.
Shapes: B crops, n tokens of a crop, d features, K outputs of a head, V views, U = 2 global views.
A prior is P_c (B, n): 1 for a patch with a cell, 0 for background.
"""
import copy
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------- 3.1 vision transformer

class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole samples with probability p while training."""

    def __init__(self, p=0.0):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.p
        return x * keep.to(x.dtype) / (1 - self.p)


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(d_head)) v, then a linear layer."""

    def __init__(self, dim, num_heads):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5  # the paper leaves it out; ViT and DINO divide
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def project(self, x):
        """x (B, n, d) to q, k, v, each (B, heads, n, d_head)."""
        B, n, d = x.shape
        qkv = self.qkv(x).view(B, n, 3, self.num_heads, d // self.num_heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def merge(self, heads):
        """(B, heads, n, d_head) to (B, n, d), through the output layer."""
        return self.proj(heads.transpose(1, 2).flatten(2))

    def logits(self, q, k):
        """q k^T / sqrt(d_head), (B, heads, n, n): before any mask and softmax."""
        return q @ k.transpose(-2, -1) * self.scale

    def forward(self, x):
        q, k, v = self.project(x)
        if v.dtype == torch.bfloat16 and not v.is_cuda:  # on a CPU torch's own is slow in bf16
            return self.merge(self.logits(q, k).softmax(-1).to(v.dtype) @ v)
        return self.merge(F.scaled_dot_product_attention(q, k, v))


class Mlp(nn.Module):
    """Linear, GELU, linear; four times as wide inside."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Eq. 2: T' = T + MSA(LN(T)); T = T' + MLP(LN(T')). (B, n, d) to (B, n, d)."""

    def __init__(self, dim, num_heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def init_weights(module):
    """Linear layers: normal with std 0.02 truncated at 2, biases 0, as ViT and DINO start."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class PatchEmbed(nn.Module):
    """Eq. 1: the filters E, d of them of p x p pixels. (B, 3, H, W) to (B, n, d), row by row."""

    def __init__(self, dim, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """The encoder: images (B, 3, H, W) to T_L (B, n, d); no class token, and f is T_L.mean(1).

    T_L comes out of a closing LayerNorm as ViT's and DINO's tokens do; eq. 2 has none. H and W are multiples
    of patch_size (ValueError if not); other sizes than img_size interpolate the position embedding. State
    dict in timm's names (but for vit_h, which timm has not).
    """

    def __init__(self, embed_dim, depth, num_heads, patch_size=16, img_size=224, drop_path=0.0):
        super().__init__()
        self.embed_dim, self.num_heads, self.patch_size = embed_dim, num_heads, patch_size
        self.grid = img_size // patch_size
        self.patch_embed = PatchEmbed(embed_dim, patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid ** 2, embed_dim))
        rates = torch.linspace(0, drop_path, depth).tolist()  # later blocks are dropped more often
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, rate) for rate in rates))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_weights)

    def embed(self, images):
        """T_0 (B, n, d): patches through E, plus the position embedding at this view's size."""
        (H, W), p = images.shape[-2:], self.patch_size
        if H % p or W % p:
            raise ValueError(f"an image of {H} x {W} px is not made of {p} x {p} px patches")
        pos = self.pos_embed
        if (H // p, W // p) != (self.grid, self.grid):
            pos = pos.view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
            pos = F.interpolate(pos, size=(H // p, W // p), mode="bicubic", align_corners=False)
            pos = pos.flatten(2).transpose(1, 2)
        return self.patch_embed(images) + pos

    def forward(self, images):
        return self.norm(self.blocks(self.embed(images)))  # T_L

    def last_attention(self, images):
        """softmax(q k^T / sqrt(d_head)) of the last block, (B, heads, n, n); every row sums to 1."""
        last = self.blocks[-1]
        q, k, _ = last.attn.project(last.norm1(self.blocks[:-1](self.embed(images))))
        return last.attn.logits(q, k).softmax(-1)


def vit_t(depth=12, **kw):
    """ViT-Tiny: d = 192, 12 blocks, 3 heads; 5 M parameters (section 4)."""
    return VisionTransformer(192, depth, 3, **kw)


def vit_s(**kw):
    """ViT-Small: d = 384, 12 blocks, 6 heads; 22 M parameters (section 4)."""
    return VisionTransformer(384, 12, 6, **kw)


def vit_h(drop_path=0.0, **kw):
    """ViT-H (Table 4): 8 blocks of ViT-S, 4 of ViT-T, trained together; the linear layer between is ours."""
    model = VisionTransformer(384, 8, 6, **kw)
    tail = nn.Sequential(nn.Linear(384, 192), *(Block(192, 3) for _ in range(4))).apply(init_weights)
    model.blocks.extend(tail)
    model.norm = nn.LayerNorm(192, eps=1e-6)
    model.embed_dim, model.num_heads = 192, 3
    blocks = [b for b in model.blocks if isinstance(b, Block)]
    for block, rate in zip(blocks, torch.linspace(0, drop_path, len(blocks)).tolist()):
        block.drop_path.p = rate
    return model


ARCHS = {"vit_t": vit_t, "vit_s": vit_s, "vit_h": vit_h, "vit_t4": partial(vit_t, 4)}  # ours


# ---------------------------------------------------------------- 3.3 cell-back pooling

def regions_present(prior):
    """P_c (B, n) to two bools (B,): is |P_c| > 0, is |1 - P_c| > 0? Eq. 3 and 8 divide by these."""
    return (prior > 0).any(-1), (prior < 1).any(-1)


def region_mean(tokens, region):
    """region^T T / |region|: tokens (B, n, d), region (B, n) of 0 and 1, to (B, d); 0 where it is empty."""
    return (region.unsqueeze(-1) * tokens).sum(1) / region.sum(-1, keepdim=True).clamp(min=1)


def cell_back_pool(tokens, prior):
    """Eq. 3: f_c = P_c^T T_L / |P_c| and f_b = (1 - P_c)^T T_L / |1 - P_c|.

    tokens (B, n, d), prior (B, n), to f_c, f_b (B, d). An empty region gives zeros and takes no gradient.
    """
    prior = prior.to(tokens.dtype)
    return region_mean(tokens, prior), region_mean(tokens, 1 - prior)


# ---------------------------------------------------------------- 3.4 disentangle block

def disentangle_masks(prior):
    """Eq. 4: P_c (B, n) to M_self and M_cross, (B, n, n) of exact 0 and -inf, to add to the logits.

    M_self(i, j) = 0 where P_c(i) = P_c(j); M_cross(i, j) = 0 where P_c(i) != P_c(j) or i = j.
    The diagonal is open in both, so no row is all -inf: with one region only, M_cross attends to itself.
    """
    same = prior.unsqueeze(-1) == prior.unsqueeze(-2)  # (B, n, n)
    eye = torch.eye(prior.shape[-1], dtype=torch.bool, device=prior.device)
    zero = torch.zeros(same.shape, device=prior.device)
    m_self = zero.masked_fill(~same, -math.inf)
    m_cross = zero.masked_fill(same & ~eye, -math.inf)
    return m_self, m_cross


class DisentangleBlock(Block):
    """Eq. 5 to 7: T_L (B, n, d) and P_c (B, n) to T_self and T_cross, each (B, n, d).

    The layers of a Block, used twice with the same weights, under M_self and under M_cross; LN, q, k, v and
    the logits are the same for both and computed once. No stochastic depth.
    """

    def forward(self, tokens, prior):
        q, k, v = self.attn.project(self.norm1(tokens))
        logits = self.attn.logits(q, k)  # (B, heads, n, n)

        def under(mask):
            attention = (logits + mask.unsqueeze(1)).softmax(-1)  # eq. 5
            x = tokens + self.attn.merge(attention.to(v.dtype) @ v)  # T'
            return x + self.mlp(self.norm2(x))
        m_self, m_cross = disentangle_masks(prior)
        return under(m_self), under(m_cross)  # eq. 6, eq. 7


# ---------------------------------------------------------------- 3.5 heads and loss

class Cosines(torch.autograd.Function):
    """<z, w_k / ||w_k||> of z (N, d) and every row w_k of weight (K, d): F.linear(z, F.normalize(weight)).

    The norms divide the logits instead of the weights, which would be read and written some twenty times.
    """

    @staticmethod
    def forward(ctx, z, weight):
        w, norm = weight.to(z.dtype), weight.norm(dim=-1).to(z.dtype)
        cosine = F.linear(z, w).div_(norm)
        ctx.save_for_backward(z, weight, w, norm, cosine)
        return cosine

    @staticmethod
    def backward(ctx, grad):
        z, weight, w, norm, cosine = ctx.saved_tensors
        along = z.new_ones(1, len(z)) @ (grad * cosine) / norm ** 2  # a product with ones is a fast sum
        grad = grad / norm
        d_weight = (grad.t() @ z).to(weight.dtype)  # (z - cosine_k w_k / ||w_k||) / ||w_k||, summed over z
        return grad @ w, d_weight.addcmul_(weight, along.t().to(weight.dtype), value=-1)


class DINOHead(nn.Module):
    """DINO's projection head: (N, in_dim) to (N, out_dim) through 2048, 2048 and an L2-normalised 256.

    The last layer is weight-normalised with its norm fixed at 1: logits are cosines with out_dim prototypes.
    norm_last_layer=False: each prototype learns its norm, as in DINO; it starts at 1.
    """

    def __init__(self, in_dim, out_dim, hidden_dim=2048, bottleneck_dim=256, norm_last_layer=True):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim))
        self.mlp.apply(init_weights)
        self.last_layer = nn.Linear(bottleneck_dim, out_dim, bias=False)
        self.last_norm = None if norm_last_layer else nn.Parameter(torch.ones(out_dim, 1))

    def forward(self, f):
        z = self.mlp(f)
        logits = Cosines.apply(F.normalize(z, dim=-1).to(z.dtype), self.last_layer.weight)
        return logits if self.last_norm is None else logits * self.last_norm.squeeze(1)


def process_mean(x):
    """x, averaged in place over all processes where torch.distributed runs several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x.div_(torch.distributed.get_world_size()))
    return x


def view_cross_entropy(student, target, weight, temp):
    """One student view against the teacher's: the sum over u, b of -weight[u, b] <target[u, b], log p[b]>.

    student (B, K) logits, target (U, B, K), weight (U, B); p = softmax(student / temp).
    """
    q = torch.einsum("ub,ubk->bk", weight, target)  # all targets meet the same log p
    return -(q * (student.float() / temp).log_softmax(-1)).sum()


class DINOLoss(nn.Module):
    """L_CE of one head (Caron et al. 2021) with its centre: the mean of -<q, log p> over pairs of views.

    q = softmax((teacher - centre) / teacher_temp), p = softmax(student / student_temp).
    student (V, B, K): all views, the U global ones first; teacher (U, B, K). Every student view is compared
    with every other global view of the teacher. A pair counts if the region is present in both
    (present_s (V, B), present_t (U, B); None: everywhere). The loss is the mean over the pairs that count,
    0 if none does; with several processes, the mean of what each gives is. Every call moves the centre, by
    the teacher's rows whose region is present (move_center=False: they wait for the next call).
    entropy is the mean of H(q), for the loss is H(q) + KL(q || p): ln K if all outputs are uniform, 0 on one.
    """

    def __init__(self, out_dim, student_temp=0.1, center_momentum=0.9):
        super().__init__()
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.register_buffer("center", torch.zeros(out_dim))
        self.waiting = 0

    def forward(self, student, teacher, teacher_temp=0.04, present_s=None, present_t=None, move_center=True):
        V, U = len(student), len(teacher)
        s, t = (torch.ones(x.shape[:2], device=x.device) if present is None else present.float()
                for x, present in ((student, present_s), (teacher, present_t)))
        other = 1 - torch.eye(U, V, device=t.device)  # no view is compared with itself
        weight = other.unsqueeze(-1) * t.unsqueeze(1) * s  # (U, V, B)
        with torch.no_grad():
            target = ((teacher.float() - self.center) / teacher_temp).softmax(-1)  # q
            pairs = process_mean(weight.sum()).clamp(min=1e-6)
            self.entropy = (weight.sum(1) * torch.special.entr(target).sum(-1)).sum() / pairs
        again = partial(checkpoint, view_cross_entropy, use_reentrant=False, preserve_rng_state=False)
        loss = sum(again(x, target, weight[:, v], self.student_temp)  # again in the backward pass, for memory
                   for v, x in enumerate(student)) / pairs
        self.update_center(teacher, t, move_center)
        return loss

    @torch.no_grad()
    def update_center(self, teacher, present, move=True):
        """centre = m * centre + (1 - m) * mean of the teacher's rows that count; move=False: they wait."""
        total = torch.einsum("ub,ubk->k", present, teacher.float())
        self.waiting = self.waiting + torch.cat([total, present.sum()[None]])
        if move:
            total, rows = process_mean(self.waiting).split((len(self.center), 1))
            self.center.lerp_(total / rows.clamp(min=1e-6), (1 - self.center_momentum) * (rows > 0).float())
            self.waiting = 0


# ---------------------------------------------------------------- DiRL

REGIONS = ("c", "b")  # eq. 3
DISENTANGLED = ("cc", "bb", "cb", "bc")  # eq. 8
METHODS = {"baseline": ("f",), "cellback": REGIONS, "dirl": REGIONS + DISENTANGLED}


class DiRL(nn.Module):
    """Encoder, disentangle block and a head for each representation of the method.

    "baseline" is DINO on f; "cellback" has f_c and f_b; "dirl" has all six (ValueError otherwise).
    """

    def __init__(self, encoder, method="dirl", out_dim=65536, disentangled_dim=4096, norm_last_layer=True):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
        self.method, self.encoder, d = method, encoder, encoder.embed_dim
        if method == "dirl":
            self.disentangle = DisentangleBlock(d, encoder.num_heads)
            self.disentangle.apply(init_weights)
        self.heads = nn.ModuleDict({
            name: DINOHead(d, disentangled_dim if name in DISENTANGLED else out_dim,
                           norm_last_layer=norm_last_layer)
            for name in METHODS[method]})

    def represent(self, images, prior):
        """images (B, 3, H, W), P_c (B, n) to {name: f_name (B, d)} and {name: is its region present (B,)}.

        f_cb is the cells' mean, and present if cells are, even without background (M_cross is then i = j).
        """
        tokens = self.encoder(images)  # T_L (B, n, d)
        has_cell, has_back = regions_present(prior)
        if self.method == "baseline":
            return {"f": tokens.mean(1)}, {"f": has_cell | has_back}
        f_c, f_b = cell_back_pool(tokens, prior)  # eq. 3
        f = {"c": f_c, "b": f_b}
        if self.method == "dirl":
            t_self, t_cross = self.disentangle(tokens, prior)  # eq. 5 to 7
            f["cc"], f["bb"] = cell_back_pool(t_self, prior)  # eq. 8
            f["cb"], f["bc"] = cell_back_pool(t_cross, prior)
        return f, {name: has_cell if name[0] == "c" else has_back for name in f}  # whose tokens are pooled

    def forward(self, views, priors):
        """views: one (V_i, B, 3, H, W) per size, the global ones first; priors: (V_i, B, n) to match.

        Gives {name: (logits (V, B, K), present (V, B))} over all V views.
        """
        out, B = {}, views[0].shape[1]
        of_size = [self.represent(x.flatten(0, 1), p.flatten(0, 1)) for x, p in zip(views, priors)]
        for name, head in self.heads.items():
            f_name = torch.cat([f[name] for f, _ in of_size])  # (V B, d)
            there = torch.cat([present[name] for _, present in of_size])  # (V B,)
            out[name] = head(f_name).unflatten(0, (-1, B)), there.unflatten(0, (-1, B))
        return out


class DiRLLoss(nn.Module):
    """Eq. 9: lambda_1 (L_c + L_b) + lambda_2 (L_cc + L_bb + L_cb + L_bc); the baseline is L_f alone.

    Takes what two DiRL models give and returns (loss, {name: L_name without gradient}). skip_empty=False:
    a region that is not in a view counts as well, pooled to zeros.
    """

    def __init__(self, model, lambda_1=0.5, lambda_2=0.1 / 4, student_temp=0.1, center_momentum=0.9,
                 skip_empty=True):
        super().__init__()
        self.skip_empty = skip_empty
        self.weight = {name: 1.0 if name == "f" else lambda_1 if name in REGIONS else lambda_2
                       for name in model.heads}
        self.losses = nn.ModuleDict({
            name: DINOLoss(head.last_layer.out_features, student_temp, center_momentum)
            for name, head in model.heads.items()})

    def forward(self, student, teacher, teacher_temp=0.04, move_center=True):
        total, each = 0, {}
        for name, cross_entropy in self.losses.items():
            (s, s_present), (t, t_present) = student[name], teacher[name]
            if not self.skip_empty:
                s_present = t_present = None
            loss = cross_entropy(s, t, teacher_temp, s_present, t_present, move_center)  # L_name
            total = total + self.weight[name] * loss
            each[name] = loss.detach()
        return total, each


def make_teacher(student):
    """A copy of the student that shares no storage, takes no gradient and drops no path."""
    return copy.deepcopy(student).eval().requires_grad_(False)


@torch.no_grad()
def update_teacher(student, teacher, momentum):
    """theta_t = m theta_t + (1 - m) theta_s, parameter by parameter."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


# ---------------------------------------------------------------- 4.2 attention

def aggregated_attention(attention):
    """attention (B, heads, n, n) to (B, n): column sums, averaged over the heads; the n values sum to n."""
    return attention.sum(-2).mean(1)


def attention_bins(aggregated):
    """Shares of all tokens in 0 to 0.5, 0.5 to 2 and over 2 (Fig. 4), three floats that sum to 1."""
    bins = aggregated < 0.5, (aggregated >= 0.5) & (aggregated <= 2), aggregated > 2  # NaN is in none
    return tuple(bin.float().mean().item() for bin in bins)
