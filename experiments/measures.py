"""What `experiments.study claim` measures: labelled patches, the measures of an arm, their statistics.

A measure is an array: aggregated attention (T, n) of the T test images and what else their patches have
(OF_PATCHES), or scores (R, T, C) of R folds or trainings, DSMIL's of the test bags. An arm's claim.npz holds
them by name, next to the entries of ABOUT.
"""
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import dirl
import mil
from common.classify import SETTINGS, FineTuning, Patches, fine_tune, linear_folds, make_patches
from common.encoders import attention_of, in_batches, inputs_of, load_encoder, represent, use_bf16
from common.errors import InputError, print_skipped
from common.files import atomic_write, file_stamp, read_npz
from common.log import MIDDLE
from common.metrics import bootstrap_indices, score_statistics
from common.neighbors import nearest
from data import resample
from prior import bin_centroids
from wsi.cache import load_crops, prepare, read_crop_cells
from wsi.slides import CROP

DSMIL_EPOCHS = 200  # as Li et al. (A.1.2)
BINS = ("tokens with attention 0 to 0.5", MIDDLE, "tokens with attention over 2")
SPREAD = "sd of the aggregated attention within an image"
ABOUT = ("stamp", "classes", "labels", "groups")  # the last two of the test images
BAGS = ", labels of its test bags"
OF_PATCHES = ("kinds", "norms", "on registers")  # where attention goes
KINDS = ("cell", "background", "white")
WHITE = 0.88  # least green of a white patch, as a share of the brightest patches'


# ---------------------------------------------------------------- labelled patches

@dataclass(frozen=True)
class StudyPatches(Patches):
    """Labelled images and how they are divided: the same for every arm; images: None until loaded."""

    train: np.ndarray  # indices of images
    train_bags: list  # make_bags
    test_bags: list
    kinds: np.ndarray = None  # (T, n), indices of KINDS of the test images' patches; -1: no cells are known


def divide(found, names, args, images=None):
    """Returns StudyPatches of a data set's named images; InputError if a class or split is too small."""
    rows = [found.labels[name] for name in names]
    patches = make_patches(names, images, rows, found.classes, args.folds, 0)
    train = np.setdiff1d(np.arange(len(names)), patches.test)
    bags = {}
    for split, indices, least in ("training", train, 5), ("test", patches.test, 1):
        if len(indices) < 20:
            raise InputError(f"{args.data}/labels.csv: {len(indices)} {split} images; at least 20 are needed")
        bags[split] = make_bags(indices, patches.labels, patches.groups, args.bag_groups, 0)
        counts = np.bincount([label for _, label in bags[split]], minlength=len(found.classes))
        if args.bag_seeds and counts.min() < least:
            raise InputError(f"--bag-groups {args.bag_groups}: fewer than {least} {split} bags of "
                             f"{found.classes[counts.argmin()]}; lower it, or --bag-seeds 0")
    return StudyPatches(**vars(patches), train=train, train_bags=bags["training"], test_bags=bags["test"])


def load_patches(found, args, workers):
    """Returns the StudyPatches of the images that can be read, with the kinds of their patches."""
    images, readable, failed = load_crops(list(found.images.values()), workers)
    print_skipped(failed)
    names = [list(found.images)[i] for i in readable]
    patches = divide(found, names, args, images)
    prepare(found, workers=workers)  # finds the cells, if training has not
    cells = read_crop_cells(found)
    of_test = [cells.get(names[i]) for i in patches.test]
    priors = np.stack([bin_centroids([] if xy is None else xy, CROP) for xy in of_test])
    kinds = kinds_of(images[patches.test], priors)
    kinds[[xy is None for xy in of_test]] = -1
    return replace(patches, kinds=kinds)


def kinds_of(images, priors):
    """Returns the index in KINDS of every patch: images uint8 (T, 3, H, H), P_c (T, n) -> (T, n).

    A cell patch has P_c = 1. A white one, of glass or a lumen, has no cell and a mean green, which both
    stains absorb most, of at least WHITE times the 99th percentile of all patches. Background is the rest.
    """
    green = F.avg_pool2d(images[:, 1:2].float(), 16).flatten(1).numpy()
    is_white = green >= WHITE * np.quantile(green, 0.99)
    return np.where(priors > 0, 0, np.where(is_white, 2, 1)).astype(np.int8)


def make_bags(indices, labels, groups, size, seed):
    """Returns synthetic slides, [(indices of tiles, class), ...], each all tiles of size groups of a class.

    indices: of the images that may be used. No tile is in two slides; a class's last groups that do not fill
    a slide are not used.
    """
    rng = np.random.default_rng(seed)
    bags = []
    for label in np.unique(labels[indices]):
        of_class = indices[labels[indices] == label]
        names = rng.permutation(np.unique(groups[of_class]))
        for i in range(0, len(names) - size + 1, size):
            bags.append((of_class[np.isin(groups[of_class], names[i: i + size])], int(label)))
    return bags


# ---------------------------------------------------------------- measures

def measures(args, settings):
    """Returns {name: function of (encoder, features (N, d), patches)} of the measures that the flags name."""
    out = {"attention": attention}
    if settings.global_size != CROP:  # the encoder was trained at another size: at that of its views, too
        out[f"attention at {settings.global_size} px"] = partial(attention, size=settings.global_size)
    out["kinds"] = lambda encoder, features, patches: patches.kinds
    out["norms"] = norms
    if settings.ssl == "registers":
        out["on registers"] = on_registers
    out["20-NN"] = neighbours
    out[f"logistic regression, {args.folds} folds"] = logistic
    if args.bag_seeds:
        name = f"DSMIL on synthetic slides of {args.bag_groups}, {args.bag_seeds} seeds"
        out[name] = partial(dsmil, seeds=args.bag_seeds)
    if args.tune_epochs:
        folds = min(args.folds, args.tune_folds)
        name = f"fine-tuned {args.tune_epochs} epochs, {folds} of {args.folds} folds"
        out[name] = partial(fine_tuned, epochs=args.tune_epochs, folds=folds, settings=settings)
    return out


def measure(folder, args, settings, labels_stamp, load):
    """Adds the missing measures() to a run's claim.npz; load() returns the StudyPatches with images."""
    stamp = file_stamp(folder / "encoder.pt") + labels_stamp
    file = read_npz(folder / "claim.npz") or {}
    is_current = str(file.get("stamp")) == stamp
    done = {name: file[name] for name in file if name not in ABOUT and is_current}
    missing = {name: function for name, function in measures(args, settings).items() if name not in done}
    if not missing:
        return
    patches = load()
    encoder = load_encoder(folder / "encoder.pt")[0].to(settings.device)
    bf16 = use_bf16(settings.precision, settings.device)
    features = in_batches(lambda x: represent(encoder, x, bf16), patches.images, 64, "features").numpy()
    about = dict(stamp=stamp, classes=patches.classes, labels=patches.labels[patches.test],
                 groups=patches.groups[patches.test])
    for name, function in missing.items():
        done[name] = function(encoder, features, patches)
        if name.startswith("DSMIL"):
            done[name + BAGS] = np.array([label for _, label in patches.test_bags])
        with atomic_write(folder / "claim.npz") as temp, open(temp, "wb") as file:
            np.savez(file, **about, **done)


def attention(encoder, features, patches, size=CROP):
    """Returns the aggregated attention (T, n) of the test images at size px."""
    whole = torch.tensor([[0.0, 0, CROP, CROP]])

    def aggregated(x):
        if size != CROP:
            x = resample(x.float(), whole.expand(len(x), 4), torch.zeros(len(x)), size)
        return attention_of(encoder, x)
    return in_batches(aggregated, patches.images[patches.test], 64, "attention").numpy()


def norms(encoder, features, patches):
    """Returns the norms (T, n) of the test images' tokens before the closing LayerNorm, which levels them."""
    n = patches.kinds.shape[1]

    def of_tokens(x):
        tokens = encoder.blocks(encoder.embed(inputs_of(encoder, x)))
        return tokens[:, -n:].norm(dim=-1)  # the patches': registers come first
    return in_batches(of_tokens, patches.images[patches.test], 64, "norms").numpy()


def on_registers(encoder, features, patches):
    """Returns the share (T,) of the patches' attention in the last block that registers draw."""
    count = encoder.reg_token.shape[1]

    def share(x):
        attention = dirl.VisionTransformer.last_attention(encoder, inputs_of(encoder, x))
        return attention[..., count:, :count].sum(-1).mean((1, 2))
    return in_batches(share, patches.images[patches.test], 64, "registers").numpy()


def neighbours(encoder, features, patches):
    """Returns the shares of the classes among the 20 nearest training images: (1, T, C)."""
    train, test = features[patches.train], features[patches.test]
    return nearest(train, patches.labels[patches.train], test, len(patches.classes))[None]


def logistic(encoder, features, patches):
    """Returns the probabilities by a logistic regression on each fold: (folds, T, C)."""
    return np.stack([scores for scores, _, _ in linear_folds(features, patches)])


def dsmil(encoder, features, patches, seeds):
    """Returns DSMIL's scores (seeds, bags, C) of the test bags; every fifth training bag validates."""
    tiles = torch.from_numpy(features)
    bags = [(tiles[index], label) for index, label in patches.train_bags]
    train = [bag for i, bag in enumerate(bags) if i % 5]
    out = []
    for seed in range(seeds):
        model = mil.train_dsmil(train, bags[::5], len(patches.classes), DSMIL_EPOCHS, seed=seed)
        scores = [mil.dsmil_predict(model, tiles[index]) for index, _ in patches.test_bags]
        out.append(torch.stack(scores).numpy())
    return np.stack(out)


def fine_tuned(encoder, features, patches, epochs, folds, settings):
    """Returns scores (folds, T, C) of the encoder fine-tuned (A.1.2) as for MHIST, with scaled milestones."""
    mhist = SETTINGS["mhist"]
    scaled = [round(milestone * epochs / mhist["epochs"]) for milestone in mhist["milestones"]]
    tuning = FineTuning(**mhist | {"epochs": epochs, "milestones": [m for m in scaled if m > 0]},
                        device=settings.device, bf16=use_bf16(settings.precision, settings.device))
    out = []
    for k, fold in enumerate(patches.folds[:folds], 1):
        predict, _, _ = fine_tune(encoder, patches.images, patches.labels, *fold, len(patches.classes),
                                  tuning, settings.seed, f"fine-tuning, fold {k}")
        out.append(predict(patches.images[patches.test]))
    return np.stack(out)


# ---------------------------------------------------------------- statistics

def draws_of(groups):
    """Returns (1 + DRAWS) arrays of indices: all images, then each bootstrap draw of groups (N,)."""
    return [np.arange(len(groups)), *bootstrap_indices(groups)]


def pair_statistics(labels, scores, draws, two):
    """Returns score_statistics of two classes, told apart by the ratio of their scores, on their images."""
    of_pair = np.isin(labels, two)
    place = np.cumsum(of_pair) - 1  # of an image among those of the pair
    inside = [place[index[of_pair[index]]] for index in draws]
    ratio = np.log(scores[:, of_pair][:, :, two] + 1e-9)
    return score_statistics((labels[of_pair] == two[1]).astype(int), ratio, inside)


def mean_inside(values, inside, draws):
    """Returns the mean of values (T, n) over the patches inside (T, n), in each of draws of the images."""
    total = (values * inside).sum(1)
    count = inside.sum(1)
    with np.errstate(invalid="ignore"):
        return np.array([total[index].sum() / count[index].sum() for index in draws])


def place_statistics(file, draws):
    """Returns {statistic: (1 + DRAWS,)} of where attention goes, means over patches; {} if not measured."""
    out = {}
    if {"kinds", "norms"} <= file.keys():
        for words, name in ("even shares", "attention"), ("norm of tokens", "norms"):
            for k, kind in enumerate(KINDS):
                inside = file["kinds"] == k
                if inside.any():
                    out[f"{words} on {kind} patches"] = mean_inside(file[name], inside, draws)
    if "on registers" in file:
        drawn = [file["on registers"][index].mean() for index in draws]
        out["share of attention on registers"] = np.array(drawn)
    return out


def statistics(file, draws, pair):
    """Returns {statistic: (1 + DRAWS,)} of a claim.npz: its value, and that of every draw of test groups."""
    labels = file["labels"]
    classes = file["classes"].tolist()
    out = place_statistics(file, draws)
    for name in file:
        if name in (*ABOUT, *OF_PATCHES) or name.endswith(BAGS):
            continue
        if name.startswith("attention"):
            images = torch.from_numpy(file[name])
            of_image = [(*dirl.attention_bins(image), image.std().item()) for image in images]
            for statistic, values in zip((*BINS, SPREAD), np.array(of_image).T):
                drawn = [values[index].mean() for index in draws]
                out[statistic + name.removeprefix("attention")] = np.array(drawn)
            continue
        if name.startswith("DSMIL"):
            bag_labels = file[name + BAGS]
            both = score_statistics(bag_labels, file[name], draws_of(np.arange(len(bag_labels))))
        else:
            both = score_statistics(labels, file[name], draws)
        out[f"accuracy, {name}"], out[f"AUC, {name}"] = both
        if pair and not name.startswith("DSMIL"):
            both = pair_statistics(labels, file[name], draws, [classes.index(label) for label in pair])
            between = f"{name}, {pair[0]} against {pair[1]}"
            out[f"accuracy, {between}"], out[f"AUC, {between}"] = both
    return out
