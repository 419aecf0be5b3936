"""What shows how training goes: the probe, the rank of the features, the contrast at the start."""
import math

import torch

import dirl
from common.encoders import attention_of, in_batches, represent
from common.neighbors import nearest


def probe(encoder, train, test, classes):
    """Returns the shares of the test tokens in the three bins of Fig. 4, and the accuracy of 20-NN on f.

    train, test: (images uint8 (N, 3, H, W), labels (N,)); classes: their number.
    """
    train_images, train_labels = train
    test_images, test_labels = test
    train_f = in_batches(lambda x: represent(encoder, x), train_images, 64).numpy()
    test_f = in_batches(lambda x: represent(encoder, x), test_images, 64).numpy()
    aggregated = in_batches(lambda x: attention_of(encoder, x), test_images, 64)
    predicted = nearest(train_f, train_labels, test_f, classes).argmax(1)
    return *dirl.attention_bins(aggregated), (predicted == test_labels).mean()


@torch.no_grad()
def effective_rank(features):
    """The effective rank of features (N, d) (Roy and Vetterli 2007): how many directions they vary in.

    It is exp of the entropy of the singular values' shares, of the centred features: 1 if they lie on a
    line, at most min(N - 1, d); 0 if all are the same, NaN if one is not finite.
    """
    if not features.isfinite().all():
        return math.nan
    features = features.cpu()
    values = torch.linalg.svdvals(features - features.mean(0))
    if values[0] <= 1e-6 * features.norm():
        return 0.0
    return torch.special.entr(values / values.sum()).sum().exp().item()


@torch.no_grad()
def contrast(encoder, views):
    """Variance of f between crops over its variance between two views of one crop; views (2, N, 3, H, W).

    Both are summed over the d features. A crop's f is the mean of its two views, so crops that do not differ
    have a ratio of 1/2.
    """
    f = torch.stack([encoder(view).mean(1) for view in views])  # (2, N, d)
    between = f.mean(0).var(0, correction=1).sum()
    within = f.var(0, correction=1).mean(0).sum()
    return (between / within.clamp(min=1e-12)).item()
