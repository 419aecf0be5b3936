"""DiRL: the method of "Attention De-sparsification Matters" (sections 3.1, 3.3, 3.4, 3.5, 4.2).

Imports torch and the standard library only, so that a function can be copied out with those that it calls.
Shapes: B crops, n tokens per crop, d features, K outputs of a head, V views, of which U = 2 are global.
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
        self.scale = (dim // num_heads) ** -0.5  # as in ViT and DINO; the paper's formula omits it
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def project(self, x):
        """x (B, n, d) -> q, k, v, each (B, heads, n, d_head)."""
        B, n, d = x.shape
        qkv = self.qkv(x).view(B, n, 3, self.num_heads, d // self.num_heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def merge(self, heads):
        """Joins the heads through the output layer: (B, heads, n, d_head) -> (B, n, d)."""
        return self.proj(heads.transpose(1, 2).flatten(2))

    def logits(self, q, k):
        """q k^T / sqrt(d_head), (B, heads, n, n), before any mask and softmax."""
        return q @ k.transpose(-2, -1) * self.scale

    def forward(self, x):
        q, k, v = self.project(x)
        return self.merge(attend(q, k, v))


class Mlp(nn.Module):
    """Linear, GELU, linear; the hidden layer is four times as wide."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Eq. 2: T' = T + MSA(LN(T)); T = T' + MLP(LN(T')). (B, n, d) -> (B, n, d)."""

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
    """Initialises a linear layer as ViT and DINO do: truncated normal of std 0.02, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class PatchEmbed(nn.Module):
    """Eq. 1: d filters E of p x p pixels. (B, 3, H, W) -> (B, n, d), patches row by row."""

    def __init__(self, dim, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """The encoder: images (B, 3, H, W) -> T_L (B, n, d). It has no class token: f is T_L.mean(1).

    T_L is the last block's output after a LayerNorm, as in ViT and DINO; eq. 2 has none. H and W are
    multiples of patch_size (ValueError if not); for sizes other than img_size the position embedding is
    interpolated. Images are RGB that the caller has normalised with mean and std (default: ImageNet's, as in
    DINO); the encoder only stores the two. The state dict has timm's names (timm has no vit_h).
    """

    def __init__(self, embed_dim, depth, num_heads, patch_size=16, img_size=224, drop_path=0.0,
                 mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.grid = img_size // patch_size  # patches per side
        self.patch_embed = PatchEmbed(embed_dim, patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid ** 2, embed_dim))
        rates = torch.linspace(0, drop_path, depth).tolist()  # later blocks are dropped more often
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, rate) for rate in rates))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_weights)

    def embed(self, images):
        """T_0 (B, n, d): the patches' embeddings (eq. 1) plus the position embedding at this view's size."""
        H, W = images.shape[-2:]
        p = self.patch_size
        if H % p or W % p:
            raise ValueError(f"an image of {H} x {W} px does not divide into patches of {p} x {p} px")
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
        tokens = self.blocks[:-1](self.embed(images))
        q, k, _ = last.attn.project(last.norm1(tokens))
        return last.attn.logits(q, k).softmax(-1)


def vit_t(depth=12, **kw):
    """ViT-Tiny: d = 192, 12 blocks, 3 heads; 5 M parameters (section 4)."""
    return VisionTransformer(192, depth, 3, **kw)


def vit_s(depth=12, **kw):
    """ViT-Small: d = 384, 12 blocks, 6 heads; 22 M parameters (section 4)."""
    return VisionTransformer(384, depth, 6, **kw)


class ViTH(VisionTransformer):
    """ViT-H: 8 blocks of ViT-S, then 4 of ViT-T, trained together; 16 M parameters (Table 4)."""

    def __init__(self, drop_path=0.0, **kw):
        super().__init__(384, depth=0, num_heads=6, **kw)
        rates = torch.linspace(0, drop_path, 12).tolist()
        small = [Block(384, 6, rate) for rate in rates[:8]]
        tiny = [Block(192, 3, rate) for rate in rates[8:]]
        self.blocks = nn.Sequential(*small, nn.Linear(384, 192), *tiny)  # the paper names no layer between
        self.norm = nn.LayerNorm(192, eps=1e-6)
        self.embed_dim = 192
        self.num_heads = 3
        self.blocks.apply(init_weights)


vit_t4 = partial(vit_t, depth=4)  # not in the paper: for runs of minutes
ARCHS = {"vit_t": vit_t, "vit_s": vit_s, "vit_h": ViTH, "vit_t4": vit_t4}


# ---------------------------------------------------------------- 3.3 cell-back pooling

def regions_present(prior):
    """P_c (B, n) -> bools (B,), (B,): are |P_c| and |1 - P_c|, the divisors of eq. 3 and 8, above 0?"""
    return (prior > 0).any(-1), (prior <= 0).any(-1)


def region_mean(tokens, region):
    """region^T T / |region|: tokens (B, n, d), region (B, n) of 0 and 1 -> (B, d); 0 where it is empty."""
    return (region.unsqueeze(-1) * tokens).sum(1) / region.sum(-1, keepdim=True).clamp(min=1)


def cell_back_pool(tokens, prior):
    """Eq. 3: f_c = P_c^T T_L / |P_c| and f_b = (1 - P_c)^T T_L / |1 - P_c|.

    The paper's idea: each region has its own feature to match, so attending to one region is not enough.
    tokens (B, n, d), prior (B, n) -> f_c, f_b (B, d); what is above 0 in prior counts as 1. An empty region
    pools to zeros and passes no gradient. ValueError for other shapes, such as tokens with a class token.
    """
    if prior.shape != tokens.shape[:2]:
        raise ValueError(f"a prior of shape {tuple(prior.shape)} for tokens of {tuple(tokens.shape)}")
    prior = (prior > 0).to(tokens.dtype)
    return region_mean(tokens, prior), region_mean(tokens, 1 - prior)


# ---------------------------------------------------------------- 3.4 disentangle block

def disentangle_masks(prior):
    """Eq. 4: P_c (B, n) -> M_self and M_cross, (B, n, n) of exact 0 and -inf, to add to the logits.

    M_self lets a token attend to its own region only, M_cross to the other region and to itself:
    M_self(i, j) = 0 where P_c(i) = P_c(j); M_cross(i, j) = 0 where P_c(i) != P_c(j) or i = j.
    The diagonal is 0 in both, so no row is all -inf: if the other region is empty, M_cross leaves i = j.
    """
    same = (prior > 0).unsqueeze(-1) == (prior > 0).unsqueeze(-2)  # (B, n, n)
    eye = torch.eye(prior.shape[-1], dtype=torch.bool, device=prior.device)
    zero = torch.zeros(same.shape, device=prior.device)
    m_self = zero.masked_fill(~same, -math.inf)
    m_cross = zero.masked_fill(same & ~eye, -math.inf)
    return m_self, m_cross


class DisentangleBlock(Block):
    """Eq. 5 to 7: T_L (B, n, d) and P_c (B, n) -> T_self and T_cross, each (B, n, d).

    One Block runs under M_self and under M_cross with the same weights, so that the two outputs differ by the
    masks alone. LN, q, k, v and the logits are shared and computed once. drop_path is ignored.
    """

    def forward(self, tokens, prior):
        q, k, v = self.attn.project(self.norm1(tokens))
        logits = self.attn.logits(q, k)  # (B, heads, n, n)
        m_self, m_cross = disentangle_masks(prior)
        t_self = self.under_mask(tokens, logits, v, m_self)  # eq. 6
        t_cross = self.under_mask(tokens, logits, v, m_cross)  # eq. 7
        return t_self, t_cross

    def under_mask(self, tokens, logits, v, mask):
        """Eq. 5 with one of the masks (B, n, n), then the two sums of eq. 6 or 7; returns (B, n, d)."""
        attention = (logits + mask.unsqueeze(1)).softmax(-1)
        x = tokens + self.attn.merge(attention.to(v.dtype) @ v)  # T'
        return x + self.mlp(self.norm2(x))


# ---------------------------------------------------------------- 3.5 heads and loss

class DINOHead(nn.Module):
    """DINO's projection head: f (N, in_dim) -> 2048 -> 2048 -> unit vector of 256 -> logits (N, out_dim).

    The last layer is weight-normalised with its norm fixed at 1: logits are cosines with out_dim prototypes.
    They are computed in fp32 even under autocast: after division by the teacher's temperature of 0.04, bf16
    would be off by up to 0.13. norm_last_layer=False: each prototype learns its norm, starting at 1.
    """

    def __init__(self, in_dim, out_dim, hidden_dim=2048, bottleneck_dim=256, norm_last_layer=True):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim))
        self.mlp.apply(init_weights)
        self.last_layer = nn.Linear(bottleneck_dim, out_dim, bias=False)
        # (K, 1): two dimensions, so that weight decay applies to the norms, as to DINO's weight_g.
        self.last_norm = None if norm_last_layer else nn.Parameter(torch.ones(out_dim, 1))

    def forward(self, f):
        z = self.mlp(f)  # (N, 256)
        with torch.autocast(z.device.type, enabled=False):
            prototypes = F.normalize(self.last_layer.weight, dim=-1)  # (K, 256)
            logits = F.linear(F.normalize(z.to(prototypes.dtype), dim=-1), prototypes)
        return logits if self.last_norm is None else logits * self.last_norm.squeeze(1)


def process_mean(x):
    """Averages x in place over all processes, if torch.distributed runs several, and returns it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x.div_(torch.distributed.get_world_size()))
    return x


def row_mask(present, outputs):
    """Returns present (V, B) as float; if it is None, ones for all rows of outputs (V, B, K)."""
    if present is None:
        return torch.ones(outputs.shape[:2], device=outputs.device)
    return present.float()


def view_cross_entropy(student, q, pairs, temp):
    """One student view against the teacher's: the sum over u, b of -pairs[u, b] <q[u, b], log p[b]>.

    student (B, K) logits, q (U, B, K), pairs (U, B); p = softmax(student / temp).
    """
    target = torch.einsum("ub,ubk->bk", pairs, q)  # summed over u first, since log p[b] is the same for all
    return -(target * (student.float() / temp).log_softmax(-1)).sum()


class DINOLoss(nn.Module):
    """L_CE of one head (Caron et al. 2021), with its centre: the mean of -<q, log p> over pairs of views.

    q = softmax((teacher - centre) / teacher_temp), p = softmax(student / student_temp).
    student (V, B, K): logits of all views, the U global ones first; teacher (U, B, K). Every student view is
    compared with every other global view of the teacher. A pair counts if the region is present in both
    (present_s (V, B), present_t (U, B); None: everywhere). Returns the mean over the pairs that count, 0 if
    none does. Each call collects rows for update_center(), to be called once per step in all DDP processes.

    `entropy` is the mean H(q) of the last call: ln K if the outputs are uniform, 0 if each is on a single
    prototype. The loss is H(q) + KL(q || p).
    """

    def __init__(self, out_dim, student_temp=0.1, center_momentum=0.9):
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(out_dim))
        # The teacher's rows since the last update_center: their sum and their number.
        self.register_buffer("step_sum", torch.zeros(out_dim), persistent=False)
        self.register_buffer("step_rows", torch.zeros(()), persistent=False)

    def forward(self, student, teacher, teacher_temp=0.04, present_s=None, present_t=None):
        with torch.autocast(teacher.device.type, enabled=False):  # fp32, wherever it is called
            V, U = len(student), len(teacher)
            mask_s = row_mask(present_s, student)  # (V, B)
            mask_t = row_mask(present_t, teacher)  # (U, B)
            different = 1 - torch.eye(U, V, device=teacher.device)  # 0 where both are the same view
            pairs = different.unsqueeze(-1) * mask_t.unsqueeze(1) * mask_s  # (U, V, B): 1 if the pair counts
            # Averaged over DDP's ranks, so that the mean of their losses is the whole batch's.
            count = process_mean(pairs.sum()).clamp(min=1e-6)  # without pairs: 0 / 1e-6

            with torch.no_grad():
                q = ((teacher.float() - self.center) / teacher_temp).softmax(-1)  # (U, B, K)
                self.entropy = (pairs.sum(1) * torch.special.entr(q).sum(-1)).sum() / count
                self.add_to_center(teacher, mask_t)

            total = 0
            for v in range(V):  # each view's log p is recomputed in the backward pass, to save memory
                total = total + checkpoint(view_cross_entropy, student[v], q, pairs[:, v], self.student_temp,
                                           use_reentrant=False, preserve_rng_state=False)
            return total / count

    def add_to_center(self, teacher, mask):
        """Adds the rows of teacher (U, B, K) where mask (U, B) is 1 to the sums of this step."""
        self.step_sum += torch.einsum("ub,ubk->k", mask, teacher.float())
        self.step_rows += mask.sum()

    @torch.no_grad()
    def update_center(self):
        """centre = m centre + (1 - m) (mean of the teacher's rows that counted since the last call)."""
        total = process_mean(self.step_sum)
        rows = process_mean(self.step_rows)
        weight = (1 - self.center_momentum) * (rows > 0).float()  # 0 without rows: the centre stays
        self.center.lerp_(total / rows.clamp(min=1e-6), weight)
        self.step_sum.zero_()
        self.step_rows.zero_()


# ---------------------------------------------------------------- DiRL

REGIONS = ("c", "b")  # eq. 3
DISENTANGLED = ("cc", "bb", "cb", "bc")  # eq. 8
METHODS = {"baseline": ("f",), "cellback": REGIONS, "dirl": REGIONS + DISENTANGLED}


def eq9_weights(names, lambda_1=0.5, lambda_2=0.1 / 4):
    """Returns {name: weight of L_name}: lambda_1 and lambda_2 as in eq. 9, 1 for the baseline's f."""
    weight = {"f": 1.0} | dict.fromkeys(REGIONS, lambda_1) | dict.fromkeys(DISENTANGLED, lambda_2)
    return {name: weight[name] for name in names}


class DiRL(nn.Module):
    """Encoder, disentangle block and one head per representation of the method.

    encoder: images -> T_L (B, n, d), with embed_dim and num_heads. Weights are fp32; bf16 is for autocast.
    method: "baseline" is DINO on f, "cellback" has f_c and f_b, "dirl" has all six; ValueError for others.
    out_dim: K of the heads of f, f_c and f_b; disentangled_dim: K of the other four.
    """

    def __init__(self, encoder, method="dirl", out_dim=65536, disentangled_dim=4096, norm_last_layer=True):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
        self.method = method
        self.encoder = encoder
        if method == "dirl":
            self.disentangle = DisentangleBlock(encoder.embed_dim, encoder.num_heads)
            self.disentangle.apply(init_weights)
        self.heads = nn.ModuleDict()
        for name in METHODS[method]:
            outputs = disentangled_dim if name in DISENTANGLED else out_dim
            self.heads[name] = DINOHead(encoder.embed_dim, outputs, norm_last_layer=norm_last_layer)

    def represent(self, images, prior):
        """images (B, 3, H, W), P_c (B, n) -> {name: f_name (B, d)}, {name: is its region present (B,)}.

        f_cb is a mean over cell tokens, so it is present in any view with cells, even without background.
        """
        tokens = self.encoder(images)  # T_L (B, n, d)
        has_cell, has_background = regions_present(prior)
        if self.method == "baseline":
            return {"f": tokens.mean(1)}, {"f": torch.ones_like(has_cell)}
        f_c, f_b = cell_back_pool(tokens, prior)  # eq. 3
        f = {"c": f_c, "b": f_b}
        if self.method == "dirl":
            t_self, t_cross = self.disentangle(tokens, prior)  # eq. 5 to 7
            f["cc"], f["bb"] = cell_back_pool(t_self, prior)  # eq. 8
            f["cb"], f["bc"] = cell_back_pool(t_cross, prior)
        present = {"c": has_cell, "b": has_background}  # by the first letter: whose tokens are pooled
        return f, {name: present[name[0]] for name in f}

    def forward(self, views, priors):
        """views: one (V_i, B, 3, H, W) per view size, global first; priors: the P_c (V_i, B, n_i) of each.

        Returns {name: (logits (V, B, K), present (V, B))} over all V views. ValueError for unequal lists.
        """
        B = views[0].shape[1]
        by_size = [self.represent(x.flatten(0, 1), p.flatten(0, 1))
                   for x, p in zip(views, priors, strict=True)]
        out = {}
        for name, head in self.heads.items():
            f_name = torch.cat([f[name] for f, _ in by_size])  # (V B, d)
            present = torch.cat([region[name] for _, region in by_size])  # (V B,)
            logits = head(f_name)  # (V B, K)
            out[name] = logits.unflatten(0, (-1, B)), present.unflatten(0, (-1, B))
        return out


class DiRLLoss(nn.Module):
    """Eq. 9: lambda_1 (L_c + L_b) + lambda_2 (L_cc + L_bb + L_cb + L_bc); the baseline is L_f alone.

    Called on the outputs of two DiRL models; returns (loss, {name: L_name without gradient}). Call
    update_centers() once per step. skip_empty=False: a region that a view lacks counts too, as zeros.
    weight: {name: weight of L_name} instead of eq. 9's; the lambdas are then ignored.
    """

    def __init__(self, model, lambda_1=0.5, lambda_2=0.1 / 4, student_temp=0.1, center_momentum=0.9,
                 skip_empty=True, weight=None):
        super().__init__()
        self.skip_empty = skip_empty
        self.weight = weight or eq9_weights(model.heads, lambda_1, lambda_2)
        self.losses = nn.ModuleDict({
            name: DINOLoss(head.last_layer.out_features, student_temp, center_momentum)
            for name, head in model.heads.items()})

    def forward(self, student, teacher, teacher_temp=0.04):
        total, each = 0, {}
        for name, cross_entropy in self.losses.items():
            logits_s, present_s = student[name]
            logits_t, present_t = teacher[name]
            if not self.skip_empty:
                present_s = present_t = None
            loss = cross_entropy(logits_s, logits_t, teacher_temp, present_s, present_t)  # L_name
            total = total + self.weight[name] * loss
            each[name] = loss.detach()
        return total, each

    def update_centers(self):
        for cross_entropy in self.losses.values():
            cross_entropy.update_center()


def make_teacher(student):
    """Returns a frozen copy of the student (not of its DDP wrapper) in eval mode; seed all ranks alike."""
    return copy.deepcopy(student).eval().requires_grad_(False)


@torch.no_grad()
def update_teacher(student, teacher, momentum):
    """theta_t = m theta_t + (1 - m) theta_s, parameter by parameter; not of buffers, since DiRL has none."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


# ---------------------------------------------------------------- 4.2 attention

def aggregated_attention(attention):
    """attention (B, heads, n, n) -> (B, n): column sums, averaged over the heads; the n values sum to n."""
    return attention.sum(-2).mean(1)


def attention_bins(aggregated):
    """Shares of all tokens in 0 to 0.5, 0.5 to 2 and over 2 (Fig. 4): three floats. NaN is in no bin."""
    bins = aggregated < 0.5, (aggregated >= 0.5) & (aggregated <= 2), aggregated > 2
    return tuple(inside.float().mean().item() for inside in bins)


# ---------------------------------------------------------------- for speed

def attend(q, k, v):
    """softmax(q k^T / sqrt(d_head)) v: q, k, v (B, heads, n, d_head) -> (B, heads, n, d_head).

    torch's fused attention, except for bf16 on a CPU, where the plain formula is faster.
    """
    if q.dtype == torch.bfloat16 and not q.is_cuda:
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)
