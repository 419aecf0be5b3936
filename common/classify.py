"""Classifiers of images (4.1, A.1.2): nearest neighbours, logistic regression, fine-tuning, folds."""
import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from tqdm import tqdm

import dirl
from common.encoders import in_batches, represent
from common.errors import InputError

SETTINGS = {  # A.1.2, "Patch classification"; a folder takes mhist's
    "mhist": dict(lr=3e-4, weight_decay=1e-2, batch=128, epochs=40, milestones=[20, 30]),
    "chaoyang": dict(lr=1e-4, weight_decay=1e-2, batch=128, epochs=45, milestones=[20, 30, 40])}
CS = (1e-3, 1e-2, 0.1, 1, 10, 100)  # of the logistic regression; the validation fold chooses
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


# ---------------------------------------------------------------- folds

def unit(groups):
    """What is drawn and split: images, or groups if one has several images."""
    return "images" if len(set(groups)) == len(groups) else "groups"


def make_folds(labels, groups, classes, count, seed):
    """Stratified folds of labels (N,) that keep groups (N,) whole: [(train indices, val indices), ...]."""
    for c, name in enumerate(classes):
        there = len(set(groups[labels == c]))
        if there < count:
            raise InputError(f"--folds {count}: the training set has {there} {unit(groups)} of {name}; "
                             "use fewer folds")
    if unit(groups) == "groups":
        folds = StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(labels, labels, groups)
    else:
        folds = StratifiedKFold(count, shuffle=True, random_state=seed).split(labels, labels)
    folds = list(folds)
    if any(len(np.unique(labels[train])) < len(classes) for train, _ in folds):
        raise InputError(f"--folds {count}: a fold trains without a class, for its groups are large; "
                         "use fewer folds or another --seed")
    return folds


# ---------------------------------------------------------------- on frozen features

def pixel_statistics(images):
    """Mean, standard deviation and five quantiles of each RGB channel: uint8 (N, 3, H, W) to (N, 21)."""
    out = []
    for image in tqdm(images, "pixels", leave=False):
        x = np.sort(image.flatten(1).numpy(), kind="stable")  # (3, H W); bytes sort quickly
        quantiles = (x[:, round(q * (x.shape[1] - 1))] for q in QUANTILES)
        out.append(np.concatenate([x.mean(1), x.std(1), *quantiles]))
    return np.stack(out).astype(np.float32)


def standardize(bags):
    """{"train": [(features (N, d), label), ...], ...} with each feature's mean 0 and its sd 1.

    Both over all tiles of the training slides.
    """
    tiles = torch.cat([features for features, _ in bags["train"]])
    mean, sd = tiles.mean(0), tiles.std(0).clamp(min=1e-6)
    return {part: [((features - mean) / sd, label) for features, label in of_part]
            for part, of_part in bags.items()}


def nearest(train, labels, test, classes, k=20):
    """Class shares (T, classes) among the k nearest of train (N, d) to each of test (T, d), by cosine."""
    model = KNeighborsClassifier(min(k, len(train)), metric="cosine").fit(train, labels)
    shares = np.zeros((len(test), classes))
    shares[:, model.classes_] = model.predict_proba(test)  # labels (N,) may lack a class
    return shares


def fit_logistic(features, labels, c=1.0, max_iter=2000):
    """Logistic regression on standardised features (N, d): a fitted scikit-learn model."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=max_iter))
    return model.fit(features, labels)


def fit_linear(features, labels, train, val):
    """Logistic regression with the C of CS that has the lowest loss on val; train, val: indices.

    Gives a function from features to probabilities (.., C), that loss, and what was kept, in words.
    """
    best = None
    for c in CS:
        model = fit_logistic(features[train], labels[train], c, 5000)
        loss = log_loss(labels[val], model.predict_proba(features[val]), labels=model.classes_)
        if best is None or loss < best[1]:
            best = model.predict_proba, loss, f"C {c:g}"
    return best


# ---------------------------------------------------------------- fine-tuning

def flip(images, generator):
    """Each image mirrored left to right and top to bottom, each with probability 1/2. (B, 3, H, W)."""
    across, down = torch.rand(2, len(images), 1, 1, 1, generator=generator) < 0.5
    images = torch.where(across, images.flip(-1), images)
    return torch.where(down, images.flip(-2), images)


def fine_tune(encoder, images, labels, train, val, classes, settings, seed, what=""):
    """Encoder, mean over the n tokens and one linear layer, all of it trained (A.1.2), with flips (ours).

    images uint8 (N, 3, 224, 224), labels (N,), train and val: indices; settings has lr, weight_decay, batch,
    epochs, milestones, device, bf16. The encoder itself is not changed. Gives, for the epoch with the lowest
    loss on val: a function from images to probabilities (.., C), that loss, the epoch in words.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(encoder.embed_dim, classes)
        dirl.init_weights(head)
    model = nn.ModuleDict({"encoder": copy.deepcopy(encoder), "head": head}).to(settings.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, settings.milestones, gamma=0.1)
    generator, labels = torch.Generator().manual_seed(seed), torch.as_tensor(labels)
    train, val, best = torch.as_tensor(train), torch.as_tensor(val), (math.inf, 0, None)

    def logits(x):
        return model["head"](represent(model["encoder"], x, settings.bf16))
    bar = tqdm(range(1, settings.epochs + 1), what, unit="epoch", leave=False, disable=not what)
    for epoch in bar:
        model.train()
        for index in train[torch.randperm(len(train), generator=generator)].split(settings.batch):
            loss = F.cross_entropy(logits(flip(images[index], generator)), labels[index].to(settings.device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        schedule.step()
        model.eval()
        val_loss = F.cross_entropy(in_batches(logits, images[val], settings.batch), labels[val]).item()
        if val_loss < best[0]:
            best = val_loss, epoch, copy.deepcopy(model.state_dict())
        bar.set_postfix(loss=f"{loss.item():.3f}", val=f"{val_loss:.3f}")
    if best[2] is None:
        raise FloatingPointError(f"fine-tuning with --lr {settings.lr:g}: the loss is not finite; lower --lr")
    model.load_state_dict(best[2])

    def predict(x):
        return in_batches(lambda part: logits(part).softmax(-1), x, settings.batch).numpy()
    return predict, best[0], f"epoch {best[1]} of {settings.epochs}"
