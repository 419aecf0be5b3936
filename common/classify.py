"""Classifiers of images (4.1, A.1.2): nearest neighbours, logistic regression, fine-tuning; their folds."""
import copy
import hashlib
import math
import shutil
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import nn
from tqdm import tqdm

import dirl
from common.encoders import in_batches, represent
from common.errors import InputError
from common.files import atomic_write, merge_csv, read_npz
from common.metrics import DRAWS, bootstrap, measures_of

SETTINGS = {  # A.1.2, "Patch classification"; a folder takes mhist's
    "mhist": dict(lr=3e-4, weight_decay=1e-2, batch=128, epochs=40, milestones=[20, 30]),
    "chaoyang": dict(lr=1e-4, weight_decay=1e-2, batch=128, epochs=45, milestones=[20, 30, 40])}
CS = (1e-3, 1e-2, 0.1, 1, 10, 100)  # C of the logistic regression, chosen on the validation fold
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
PATCH_KEYS = ("data", "encoder", "training")  # rows of patches.csv that differ in one of these are kept


# ---------------------------------------------------------------- folds

@dataclass(frozen=True)
class Patches:
    """Labelled images: a test set, and a training set in folds."""

    names: np.ndarray  # (N,), of the images
    images: torch.Tensor  # uint8 (N, 3, 224, 224)
    labels: np.ndarray  # (N,), indices of classes
    groups: np.ndarray  # (N,), the patient or group of each image; a fold keeps it whole
    classes: list  # names
    folds: list  # [(train indices, val indices), ...]
    test: np.ndarray  # (T,), indices


def unit(groups):
    """What is drawn and split: images, or groups if one has several images."""
    return "images" if len(set(groups)) == len(groups) else "groups"


def make_folds(labels, groups, classes, count, seed):
    """Stratified folds of labels (N,) that keep groups (N,) whole: [(train indices, val indices), ...].

    InputError if a class has fewer groups than folds, or is missing from a fold's training images.
    """
    for c, name in enumerate(classes):
        present = len(set(groups[labels == c]))
        if present < count:
            raise InputError(f"--folds {count}: there are only {present} {unit(groups)} of {name} to divide; "
                             "use fewer folds")
    if unit(groups) == "groups":
        folds = StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(labels, labels, groups)
    else:
        folds = StratifiedKFold(count, shuffle=True, random_state=seed).split(labels, labels)
    folds = list(folds)
    if any(len(np.unique(labels[train])) < len(classes) for train, _ in folds):
        raise InputError(f"--folds {count}: a fold would train without one of the classes, because its "
                         "groups are large; use fewer folds or another --seed")
    return folds


def make_patches(names, images, rows, classes, folds, seed):
    """Returns Patches; rows: {"label", "patient", "split"} of each image, folds: their number."""
    labels = np.array([classes.index(row["label"]) for row in rows])
    groups = np.array([row["patient"] for row in rows])
    is_test = np.array([row["split"] == "test" for row in rows])
    train = np.flatnonzero(~is_test)
    of_train = make_folds(labels[train], groups[train], classes, folds, seed)
    of_all = [(train[fold_train], train[fold_val]) for fold_train, fold_val in of_train]
    return Patches(names, images, labels, groups, classes, of_all, np.flatnonzero(is_test))


# ---------------------------------------------------------------- on frozen features

def pixel_statistics(images):
    """Mean, standard deviation and five quantiles of each RGB channel: uint8 (N, 3, H, W) -> (N, 21)."""
    rows = []
    for image in tqdm(images, "pixels", leave=False):
        x = np.sort(image.flatten(1).numpy(), kind="stable")  # (3, H W); bytes sort quickly
        quantiles = [x[:, round(q * (x.shape[1] - 1))] for q in QUANTILES]
        rows.append(np.concatenate([x.mean(1), x.std(1), *quantiles]))
    return np.stack(rows).astype(np.float32)


def standardize(bags):
    """Standardises features with the mean and sd (d,) over all tiles of the training slides.

    bags: {split: [(features (N, d), label), ...]}. Returns the same, standardised, and (mean, sd).
    """
    tiles = torch.cat([features for features, _ in bags["train"]])
    mean = tiles.mean(0)
    sd = tiles.std(0).clamp(min=1e-6)
    standardized = {}
    for split, pairs in bags.items():
        standardized[split] = [((features - mean) / sd, label) for features, label in pairs]
    return standardized, (mean, sd)


def fit_logistic(features, labels, c=1.0, max_iter=2000):
    """Returns scikit-learn's logistic regression, fitted to standardised features (N, d)."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=max_iter))
    with threadpool_limits(1, "blas"):  # two threads are up to six times slower on L-BFGS's small vectors
        return model.fit(features, labels)


# ---------------------------------------------------------------- fine-tuning

@dataclass(frozen=True)
class FineTuning:
    """How an encoder is fine-tuned; SETTINGS has the paper's."""

    lr: float
    weight_decay: float
    batch: int
    epochs: int
    milestones: list  # epochs after which lr is divided by 10
    device: str
    bf16: bool


def flip(images, generator):
    """Mirrors each of images (B, 3, H, W) left to right and top to bottom, each with probability 1/2."""
    across, down = torch.rand(2, len(images), 1, 1, 1, generator=generator) < 0.5
    images = torch.where(across, images.flip(-1), images)
    return torch.where(down, images.flip(-2), images)


def fine_tune(encoder, images, labels, train, val, classes, settings, seed, title=""):
    """Trains a copy of the encoder and one linear layer on the mean of its n tokens (A.1.2); flips are ours.

    images uint8 (N, 3, 224, 224), labels (N,); train, val: indices; classes: their number; settings:
    FineTuning; title: of the progress bar. Returns, of the epoch with the lowest loss on val: a function from
    images to probabilities (.., C), that loss, and the epoch in words. FloatingPointError if no loss is
    finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(encoder.embed_dim, classes)
        dirl.init_weights(head)
    model = nn.ModuleDict({"encoder": copy.deepcopy(encoder), "head": head}).to(settings.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, settings.milestones, gamma=0.1)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.as_tensor(labels)
    train = torch.as_tensor(train)
    val = torch.as_tensor(val)

    def logits(x):
        return model["head"](represent(model["encoder"], x, settings.bf16))

    best_loss, best_epoch, best_state = math.inf, 0, None
    bar = tqdm(range(1, settings.epochs + 1), title, unit="epoch", leave=False, disable=not title)
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
        if val_loss < best_loss:
            best_loss, best_epoch, best_state = val_loss, epoch, copy.deepcopy(model.state_dict())
        bar.set_postfix(loss=f"{loss.item():.3f}", val=f"{val_loss:.3f}")
    if best_state is None:
        raise FloatingPointError(f"fine-tuning with --lr {settings.lr:g}: the loss is not finite; lower --lr")
    model.load_state_dict(best_state)

    def probabilities(x):
        return in_batches(lambda batch: logits(batch).softmax(-1), x, settings.batch).numpy()
    return probabilities, best_loss, f"epoch {best_epoch} of {settings.epochs}"


# ---------------------------------------------------------------- all folds (Table 2)

def linear_folds(features, patches):
    """Fits a logistic regression to features (N, d) on each fold, with the C of CS that is best on its val.

    Yields for each fold (scores (T, C) of the test images, val loss, what was kept in words).
    """
    labels = patches.labels
    for train, val in patches.folds:
        fitted = []
        for c in CS:
            model = fit_logistic(features[train], labels[train], c, 5000)
            loss = log_loss(labels[val], model.predict_proba(features[val]), labels=model.classes_)
            fitted.append((loss, c, model))
        loss, c, model = min(fitted)  # of equal losses the smallest C
        yield model.predict_proba(features[patches.test]), loss, f"C {c:g}"


def fine_tuned_folds(encoder, patches, settings, seed, name, folder):
    """Fine-tunes the encoder on each fold; yields what linear_folds yields.

    A fold that is done is kept as fold_<k>.npz in the folder, so that a stopped command resumes.
    """
    made_from = content_stamp(encoder, patches, settings, seed)
    for k, (train, val) in enumerate(patches.folds, 1):
        path = folder / f"fold_{k}.npz"
        fold = read_npz(path, "scores", "loss", "kept", "made_from")
        if fold is None or str(fold["made_from"]) != made_from:
            predict, loss, kept = fine_tune(
                encoder, patches.images, patches.labels, train, val, len(patches.classes), settings,
                1000 * seed + k, f"{name}, fold {k}")
            fold = {"scores": predict(patches.images[patches.test]), "loss": loss, "kept": kept}
            with atomic_write(path) as temp, open(temp, "wb") as file:
                np.savez(file, made_from=made_from, **fold)
        yield fold["scores"], float(fold["loss"]), str(fold["kept"])


def folds_folder(run, key):
    """Returns the folder of fine_tuned_folds until write_predictions removes it; key: as in report_folds."""
    return run / "patches_folds" / key["data"] / key["encoder"]


def content_stamp(encoder, patches, settings, seed):
    """Returns 16 hex digits of all that fine-tuning's results are made from."""
    pixels = encoder.mean, encoder.std
    digest = hashlib.sha256(f"{settings} {seed} {patches.classes} {pixels}".encode())
    indices = [index for fold in patches.folds for index in fold]
    for array in (patches.images, patches.labels, patches.test, *indices, *encoder.state_dict().values()):
        digest.update(torch.as_tensor(array).contiguous().cpu().numpy())
    return digest.hexdigest()[:16]


def report_folds(results, patches, key, path, seed):
    """Prints each fold's accuracy and AUC when it is done; returns the folds' mean score (T, C).

    results: linear_folds or fine_tuned_folds; key: {column: value} for PATCH_KEYS. After the last fold it
    writes their rows to path, patches.csv, and prints the folds' mean, and the mean score's measures with
    bootstrap intervals.
    """
    truth = patches.labels[patches.test]
    groups = patches.groups[patches.test]
    name = key["encoder"]
    width = max(24, len(name) + 14)

    def show(what, accuracy, area, note):
        title = f"{name}, {what}"
        print(f"{title:<{width}}{accuracy:<26}{area:<26}{note}")

    show("", "accuracy", "AUC", "")
    rows = []
    values = []  # (accuracy, AUC) of each fold
    mean = 0
    for k, (scores, loss, kept) in enumerate(results, 1):
        accuracy, area, _ = measures_of(truth, scores)
        values.append((accuracy, area))
        mean = mean + scores / len(patches.folds)
        show(f"fold {k}", f"{accuracy:.4f}", f"{area:.4f}", f"{kept}, val loss {loss:.4f}")
        train, val = patches.folds[k - 1]
        rows.append(key | {"fold": k, "accuracy": f"{accuracy:.4f}", "auc": f"{area:.4f}",
                           "val_loss": f"{loss:.4f}", "kept": kept, "train": len(train), "val": len(val),
                           "test": len(truth)})
    merge_csv(path, PATCH_KEYS, rows)

    spreads = [f"{np.mean(column):.4f} ± {np.std(column, ddof=1):.4f}" for column in zip(*values)]
    show("mean", *spreads, f"{key['training']}, sd over {len(patches.folds)} folds")
    intervals = bootstrap(truth, mean, groups, seed)
    bounded = [f"{value:.4f} ({low:.4f} to {high:.4f})"
               for value, (low, high) in zip(measures_of(truth, mean), intervals)]
    show("mean score", *bounded, f"95 %, {DRAWS} draws of {len(set(groups))} test {unit(groups)}")
    return mean


def write_predictions(path, scores, patches, key):
    """Writes scores (T, C) of the test images, a row per image, to patches_predictions.csv at path."""
    rows = []
    for i, of_image in zip(patches.test, scores):
        image = {"image": patches.names[i], "group": patches.groups[i],
                 "label": patches.classes[patches.labels[i]]}
        columns = {f"score {label}": f"{score:.4f}" for label, score in zip(patches.classes, of_image)}
        rows.append(key | image | columns)
    merge_csv(path, PATCH_KEYS, rows)
    shutil.rmtree(folds_folder(path.parent, key), ignore_errors=True)
