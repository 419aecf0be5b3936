"""Encoder and head on every token, not only on their mean; for EsViT, SelfPatch and L_sup."""


def tokens_of(encoder, views):
    """views, one (V_i, B, 3, H, W) per size -> T_L of each size, (V_i, B, n_i, d)."""
    return [encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in views]


def through(head, x):
    """x (.., d) -> (.., K) through a head that takes rows (N, d)."""
    return head(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
