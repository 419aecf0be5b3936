"""What EsViT, SelfPatch and L_sup need of an encoder and of a head: every token, not only their mean."""


def tokens_of(encoder, views):
    """views: one (V_i, B, 3, H, W) per size, to T_L of each size, (V_i, B, n_i, d)."""
    return [encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in views]


def through(head, x):
    """A head of rows (N, d) over x (.., d) to (.., K)."""
    return head(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
