"""Bags (3.6): the features of a slide's crops, as eval.py keeps them in features/<slide>.npz, and DSMIL."""
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import mil
from common.classify import fit_logistic
from common.errors import InputError
from common.files import atomic_write, file_stamp, read_npz
from common.metrics import measures_of

SPLITS = ("train", "val", "test")


def features_file(run, name):
    """Where eval.py keeps the features of a slide."""
    return Path(run) / "features" / f"{name}.npz"


def write_bag(run, name, features, coords, stamp):
    """Writes features (N, d) and coords (N, 2), level-0 px, of a slide; stamp: what they were made from."""
    with atomic_write(features_file(run, name)) as temp, open(temp, "wb") as file:
        np.savez(file, features=features, coords=coords, encoder=np.array(stamp))


def read_bag(run, name):
    """Returns {"features" (N, d), "coords" (N, 2), "encoder": the stamp}; None if missing or damaged."""
    return read_npz(features_file(run, name), "features", "coords", "encoder")


def read_bags(run, names, encoder_path):
    """Returns {slide: read_bag} of the slides that have features in a folder (encoders.features_folder).

    InputError if none has, or if one has those of an encoder other than encoder_path.
    """
    bags = {}
    stamp = file_stamp(encoder_path)
    for name in names:
        bag = read_bag(run, name)
        if bag is None:
            continue
        if not str(bag["encoder"]).startswith(stamp):
            raise InputError(f"{features_file(run, name)}: was made from another encoder; "
                             f"python eval.py --checkpoint {encoder_path}")
        bags[name] = bag
    if not bags:
        raise InputError(f"{run}/features: no features of these slides; first: "
                         f"python eval.py --checkpoint {encoder_path}")
    return bags


def labelled(bags, names, found, device):
    """Returns [(features (N, d) on the device, class index), ...] of those names that have a bag."""
    pairs = []
    for name in names:
        if name in bags:
            features = torch.from_numpy(bags[name]["features"]).to(device)
            pairs.append((features, found.classes.index(found.labels[name]["label"])))
    return pairs


# ---------------------------------------------------------------- DSMIL

def train_dsmil(bags, classes, seed, epochs, weight_decay, weights=None):
    """mil.train_dsmil on bags["train"] and bags["val"], under a progress bar; returns the model."""
    with tqdm(total=epochs, desc=f"DSMIL, seed {seed}", leave=False, mininterval=0.5) as bar:
        def progress(epoch, loss, val_loss):
            bar.set_postfix(loss=f"{loss:.3f}", val=f"{val_loss:.3f}", refresh=False)
            bar.update()
        return mil.train_dsmil(bags["train"], bags["val"], classes, epochs, seed=seed,
                               weight_decay=weight_decay, progress=progress, weights=weights)


def train_and_score(bags, classes, seeds, epochs, weight_decay, class_weights=False):
    """Trains DSMIL once with each of the seeds and scores the test bags.

    bags: {split: [(features (N, d), label), ...]}; classes: their number; class_weights: whether the loss
    weighs them (mil.class_weights). Returns [(seed, accuracy, AUC, macro F1), ...], the mean scores (T, C),
    and for each test bag the attention (seeds, N) of its instances for its own class.
    """
    weights = None
    if class_weights:
        weights = mil.class_weights([label for _, label in bags["train"]], classes)
    truth = np.array([label for _, label in bags["test"]])
    rows = []
    mean = 0
    attention = [[] for _ in truth]
    for seed in seeds:
        model = train_dsmil(bags, classes, seed, epochs, weight_decay, weights)
        scores = torch.stack([mil.dsmil_predict(model, features) for features, _ in bags["test"]])
        scores = scores.cpu().numpy()
        rows.append((seed, *measures_of(truth, scores)))
        mean = mean + scores / len(seeds)
        for of_bag, (features, label) in zip(attention, bags["test"]):
            with torch.no_grad():
                _, _, of_classes = model(features)  # (N, C)
            of_bag.append(of_classes[:, label].cpu().numpy())
    return rows, mean, [np.stack(of_bag) for of_bag in attention]


def score_mean_features(bags):
    """Accuracy, AUC and macro F1 of a logistic regression on each bag's mean feature."""
    means = {split: torch.stack([features.mean(0) for features, _ in bags[split]]).cpu().numpy()
             for split in ("train", "test")}
    model = fit_logistic(means["train"], [label for _, label in bags["train"]])
    truth = np.array([label for _, label in bags["test"]])
    return measures_of(truth, model.predict_proba(means["test"]))
