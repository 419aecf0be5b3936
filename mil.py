"""DSMIL (Li et al. 2021), the multiple instance learning of section 3.6.

Imports torch and the standard library only. The network (a query network of two layers, the features
themselves as values), the 200 epochs and the score (the mean of two sigmoids) are those of the authors' code
of September 2022. The orthogonal initialisation is from their later code, since the earlier one loads its
initial weights from a file. Two choices differ. They keep the epoch with the best AUC and accuracy on the
slides that they report; we keep the one with the lowest loss on validation slides. They tune a threshold per
class on the reported slides; we take the class with the highest score.

A bag is the feature matrix (N, d) of a slide's N crops; C classes.
"""
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn


class DSMIL(nn.Module):
    """Dual-stream MIL: a bag (N, d) -> instance scores (N, C), bag scores (C,), attention (N, C).

    Stream 1 scores every instance; the highest-scoring one of each class is its critical instance. Stream 2
    compares all instances with it: attention = softmax over the instances of q . q_critical / sqrt(128). The
    attention-weighted mean of the features is the bag's embedding (C, d), scored by a Conv1d.
    """

    def __init__(self, in_dim, num_classes):
        super().__init__()
        self.instance = nn.Linear(in_dim, num_classes)
        self.query = nn.Sequential(nn.Linear(in_dim, 128), nn.ReLU(), nn.Linear(128, 128), nn.Tanh())
        self.bag = nn.Conv1d(num_classes, num_classes, in_dim)  # each filter sees all C rows
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d)):
                nn.init.orthogonal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features):
        scores = self.instance(features)  # (N, C)
        q = self.query(features)  # (N, 128)
        # The same as q[scores.argmax(0)], but its gradient has C rows instead of N.
        critical = self.query(features[scores.argmax(0)])  # (C, 128)
        attention = (q @ critical.T / math.sqrt(q.shape[1])).softmax(0)  # (N, C), columns sum to 1
        embedding = attention.T @ features  # (C, d)
        return scores, self.bag(embedding.unsqueeze(0)).view(-1), attention


def class_weights(labels, num_classes):
    """Returns weights (C,) inverse to the classes' counts, N / (C n_c), so that all classes weigh the same.

    labels: ints below C, of the training slides; ValueError if a class has none, or for other labels.
    """
    counts = torch.bincount(torch.as_tensor(labels), minlength=num_classes)
    if len(counts) > num_classes or (counts == 0).any():
        raise ValueError(f"slides of classes {counts.tolist()}: each of {num_classes} needs some")
    return len(labels) / (num_classes * counts.float())


def dsmil_loss(scores, bag_scores, label, weights=None):
    """Half the bag's binary cross-entropy over the classes, half the critical instances'; label is an int.

    weights (C,): if given, the loss is multiplied by the weight of the slide's class.
    """
    target = F.one_hot(torch.as_tensor(label, device=bag_scores.device), len(bag_scores)).to(bag_scores.dtype)
    loss = 0.5 * (F.binary_cross_entropy_with_logits(bag_scores, target)
                  + F.binary_cross_entropy_with_logits(scores.max(0).values, target))
    return loss if weights is None else loss * weights[label].to(loss.device)


def dsmil_predict(model, features):
    """A bag (N, d) -> class scores (C,): the mean of the bag's and the critical instances' sigmoids."""
    with torch.no_grad():
        scores, bag_scores, _ = model(features)
        return (bag_scores.sigmoid() + scores.max(0).values.sigmoid()) / 2


def train_dsmil(train, val, num_classes, epochs=200, lr=2e-4, weight_decay=5e-2, seed=0, progress=None,
                weights=None):
    """Trains DSMIL on bags [(float features (N, d), label), ...], on their device, with batch 1.

    lr, weight_decay and batch are A.1.2's, the rest Li et al.'s: Adam with betas (0.5, 0.9), cosine from lr
    to 5e-6. The epoch with the lowest loss on val is kept. progress(epoch, loss, val_loss), if given, is
    called after each epoch; weights (C,), if given, weigh the classes in training and validation
    (class_weights). Returns the model in eval mode. ValueError without a training or validation bag;
    FloatingPointError if no loss on val is finite, as for features that are NaN.
    """
    if not train or not val:
        raise ValueError("DSMIL needs at least one training and one validation bag")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DSMIL(train[0][0].shape[1], num_classes).to(train[0][0].device)
        orders = [torch.randperm(len(train)).tolist() for _ in range(epochs)]
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.5, 0.9), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=5e-6)
    best, best_state = math.inf, None
    for epoch, order in enumerate(orders):
        total = 0.0
        for i in order:
            features, label = train[i]
            loss = dsmil_loss(*model(features)[:2], label, weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        schedule.step()
        with torch.no_grad():
            val_loss = sum(dsmil_loss(*model(x)[:2], y, weights).item() for x, y in val) / len(val)
        if val_loss < best:
            best, best_state = val_loss, copy.deepcopy(model.state_dict())
        if progress:
            progress(epoch, total / len(train), val_loss)
    if not math.isfinite(best):
        raise FloatingPointError("DSMIL: no validation loss is finite; check the features, or lower --mil-lr")
    model.load_state_dict(best_state)
    return model.eval()
