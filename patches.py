"""Patch-level classification (4.1, A.1.1, A.1.2): python eval.py patches --data mhist|chaoyang|FOLDER [--linear].

The official training set is split into --folds stratified folds; one is for validation, the others train, and the
official test set is scored by the epoch that was best on the validation fold. Nothing is chosen on the test set.
Writes patches.csv (a row a fold) and patches_predictions.csv (the folds' mean score of each test image).
"""
import argparse
import copy
import csv
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from tqdm import tqdm

import data as data_py
import dirl
import eval as eval_py
from eval import represent
from errors import InputError, check_ranges, renamed
from slides import CROP
from train import native_bf16, run_name

SETTINGS = {  # A.1.2, "Patch classification"; a folder takes mhist's
    "mhist": dict(lr=3e-4, weight_decay=1e-2, batch=128, epochs=40, milestones=[20, 30]),
    "chaoyang": dict(lr=1e-4, weight_decay=1e-2, batch=128, epochs=45, milestones=[20, 30, 40])}
CLASSES = {"mhist": ["HP", "SSA"], "chaoyang": ["normal", "serrated", "adenocarcinoma", "adenoma"]}
FROM = {"mhist": "images/ and annotations.csv of https://bmirds.github.io/MHIST",
        "chaoyang": "train.json, test.json and the images of https://bupt-ai-cz.github.io/HSA-NRL"}
CS = (1e-3, 1e-2, 0.1, 1, 10, 100)  # of the logistic regression; the validation fold chooses
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
DRAWS = 1000  # of the bootstrap


def arguments(argv):
    parser = argparse.ArgumentParser(prog="eval.py patches", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description="Fine-tunes an encoder on images with a label each, or fits a linear classifier to it.")
    add = parser.add_argument
    add("--data", default="mhist", help="mhist, chaoyang, or a folder with labels.csv: image,label[,split][,group or source_tile]")
    add("--checkpoint", help="encoder.pt or its run (default: the newest run in runs/, of whatever data set)")
    add("--encoder", nargs="+", default=["checkpoint"], choices=["checkpoint", "random", "pixels"],
        help="what is classified; as baselines random, an encoder as it starts, and pixels, colour statistics of the image (linear)")
    add("--arch", choices=list(dirl.ARCHS), help="of --encoder random (default: the checkpoint's, else vit_t)")
    add("--linear", action="store_true", help="frozen features and logistic regression: seconds where fine-tuning takes hours")
    add("--folds", type=int, default=5, help="of the training set; fewer where a class has few images")
    add("--epochs", type=int, help="more for few images; 45 for chaoyang")
    add("--batch", type=int, help="images a step; lower it when memory runs out")
    add("--lr", type=float, help="learning rate; lower it if the loss blows up; 1e-4 for chaoyang")
    add("--weight-decay", type=float, help="of AdamW (the paper names no optimizer); higher where it overfits")
    add("--milestones", type=int, nargs="*", help="epochs after which lr is divided by 10; change with --epochs; 20 30 40 for chaoyang")
    add("--precision", default="fp32", choices=["auto", "bf16", "fp32"], help="auto is faster where bf16 is native")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1 or cpu")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="threads that read images; all stay in memory, 150 KB each")
    add("--seed", type=int, default=0, help="of folds, training, random encoder, bootstrap, and of the split where none is given")
    parser.set_defaults(**SETTINGS["mhist"])
    parser.set_defaults(**SETTINGS.get(parser.parse_known_args(argv)[0].data, {}))
    args = parser.parse_args(argv)
    eval_py.check_flags(args, "epochs", "batch", "workers")
    check_ranges(args, folds=(2, 1000), lr=(0, 10), weight_decay=(0, 10))
    args.bf16 = args.precision == "bf16" or args.precision == "auto" and native_bf16(torch.device(args.device))
    return args


# ---------------------------------------------------------------- A.1.1 data sets

def find_patches(data, seed=0, root="datasets"):
    """The images of a data set and its classes: [{"image", "path", "label", "part", "group"}, ...], [class, ...].

    label: number of the class; part: "train" or "test"; group: what has to stay together (the image itself if
    nothing is known). InputError in one line for what is missing or not as the data set's layout has it.
    """
    source = Path(root) / data if data in SETTINGS else Path(data)
    if not source.is_dir():
        raise InputError(f"{source}/ is not there: put {FROM[data]} into it" if data in FROM else
                         f"--data {data}: neither a folder nor one of {', '.join(SETTINGS)}")
    rows = {"mhist": read_mhist, "chaoyang": read_chaoyang}.get(data, read_folder)(source)
    seen = set()
    for row in rows:
        where, name = row["where"], row["image"]
        row["path"] = source / row["file"]
        if data in CLASSES and row["label"] not in CLASSES[data]:
            raise InputError(f"{where}: label {row['label']!r} of {name} is none of {', '.join(CLASSES[data])}")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{where}: image {name!r} lies outside the folder")
        if name in seen:
            raise InputError(f"{where}: names {name} a second time; take one out")
        seen.add(name)
        if not row["path"].is_file():
            raise InputError(f"{where}: {row['path']} is not there; fetch it or take the line out")
    if data not in CLASSES:
        rows = split_folder(source / "labels.csv", rows, seed)
    classes = CLASSES.get(data) or sorted({row["label"] for row in rows})
    for row in rows:
        row["label"] = classes.index(row["label"])
    return rows, classes


def read_mhist(source):
    """Rows of MHIST: annotations.csv, images/*.png, parts as the column Partition has them."""
    table = source / "annotations.csv"
    columns = ["image name", "majority vote label", "partition"]
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            lines = [[value.strip() for value in line] for line in csv.reader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read as CSV ({error}); it comes with {FROM['mhist']}") from None
    head = [name.lower() for name in lines[0]] if lines else []
    if not set(columns) <= set(head):
        raise InputError(f"{table}: its first line has to name Image Name, Majority Vote Label and Partition")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if any(line):
            name, label, part = (dict(zip(head, line)).get(column, "") for column in columns)
            if part.lower() not in ("train", "test"):
                raise InputError(f"{table}: line {number}: Partition {part!r} of {name} is neither train nor test")
            rows.append({"where": f"{table}: line {number}", "image": name, "file": f"images/{name}", "label": label,
                         "part": part.lower(), "group": name})
    return rows


def read_chaoyang(source):
    """Rows of Chaoyang: train.json and test.json, each a list of {"name": file, "label": 0 to 3}."""
    rows, classes = [], CLASSES["chaoyang"]
    for part in ("train", "test"):
        table = source / f"{part}.json"
        try:
            entries = json.loads(table.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{table}: cannot be read as JSON ({error}); it comes with {FROM['chaoyang']}") from None
        for number, entry in enumerate(entries if isinstance(entries, list) else [None]):
            if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or "label" not in entry:
                raise InputError(f'{table}: entry {number}: {{"name", "label"}} is expected')
            name, label = entry["name"], entry["label"]
            rows.append({"where": f"{table}: entry {number}", "image": name, "file": name, "part": part, "group": name,
                         "label": classes[label] if isinstance(label, int) and 0 <= label < len(classes) else label})
    return rows


def read_folder(source):
    """Rows of a folder's labels.csv as they stand there; split_folder makes the rest."""
    table = source / "labels.csv"
    if not table.is_file():
        raise InputError(f"{table}: is not there; write it with the columns image,label (and split, group)")
    rows = data_py.read_table(table)
    if "image" not in rows[0]:
        raise InputError(f"{table}: has no column image; patches are images, for slides: python eval.py slides")
    return [row | {"where": f"{table}: line {number}", "file": row.get("image", ""), "image": row.get("image", "")}
            for number, row in enumerate(rows, 2)]


def split_folder(table, rows, seed):
    """Part and group of a folder's rows as data.check_labels reads or makes them; its val is training here."""
    checked = data_py.check_labels(table, rows, "image", {row["image"]: row["path"] for row in rows}, seed)
    return [{"image": row["image"], "path": row["path"], "label": checked[row["image"]]["label"],
             "part": "test" if checked[row["image"]]["split"] == "test" else "train",
             "group": checked[row["image"]]["patient"]} for row in rows]


def load_images(rows, workers):
    """Images uint8 (N, 3, 224, 224), resized to that; the rows that could be read; a line for each that could not."""
    images = torch.empty(len(rows), 3, CROP, CROP, dtype=torch.uint8)

    def read(i):
        result, error = data_py.call(data_py.read_crop, (rows[i]["path"],))
        if result:
            images[i] = torch.from_numpy(np.array(result[0])).permute(2, 0, 1)
        return error
    with ThreadPoolExecutor(workers) as pool:
        errors = list(tqdm(pool.map(read, range(len(rows))), "images", len(rows), leave=False))
    kept = [i for i, error in enumerate(errors) if error is None]
    images = images if len(kept) == len(rows) else images[kept]
    return images, [rows[i] for i in kept], [error for error in errors if error]


def unit(groups):
    """What is drawn and divided: images, or groups where one has several images."""
    return "images" if len(set(groups)) == len(groups) else "groups"


def make_folds(labels, groups, classes, count, seed):
    """count stratified folds of labels (N,) in which groups (N,) stay whole: [(train indices, val indices), ...]."""
    for c, name in enumerate(classes):
        if len(set(groups[labels == c])) < count:
            raise InputError(f"--folds {count}: the training set has {len(set(groups[labels == c]))} {unit(groups)} of {name}; "
                             "take fewer folds")
    whole = unit(groups) == "groups"
    splitter = (StratifiedGroupKFold if whole else StratifiedKFold)(count, shuffle=True, random_state=seed)
    folds = list(splitter.split(labels, labels, groups if whole else None))
    if any(len(np.unique(labels[train])) < len(classes) for train, _ in folds):
        raise InputError(f"--folds {count}: a fold trains without a class, for its groups are large; take fewer folds or another --seed")
    return folds


# ---------------------------------------------------------------- what is classified

@torch.no_grad()
def in_batches(function, images, batch, what=""):
    """function over all images, a batch at a time, on the CPU in the end: (N, ...)."""
    starts = tqdm(range(0, len(images), batch), what, leave=False, disable=not what)
    return torch.cat([function(images[i: i + batch]).cpu() for i in starts])


def pixel_statistics(images):
    """Mean, standard deviation and five quantiles of each RGB channel: uint8 (N, 3, H, W) to (N, 21)."""
    out = []
    for image in tqdm(images, "pixels", leave=False):
        x = np.sort(image.flatten(1).numpy(), kind="stable")  # (3, H W); bytes sort faster than quantiles are found
        out.append(np.concatenate([x.mean(1), x.std(1), *(x[:, round(q * (x.shape[1] - 1))] for q in QUANTILES)]))
    return np.stack(out).astype(np.float32)


def random_encoder(arch, seed):
    """An encoder as it starts, before any pre-training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dirl.ARCHS[arch]().eval()


# ---------------------------------------------------------------- A.1.2 training

def fit_linear(features, labels, train, val):
    """Logistic regression on standardised features (N, d): the C of CS with the lowest loss on val.

    Gives a function from features to probabilities (.., C), that loss, and what was kept, in words.
    """
    best = None
    for c in CS:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000)).fit(features[train], labels[train])
        loss = log_loss(labels[val], model.predict_proba(features[val]), labels=model.classes_)
        if best is None or loss < best[1]:
            best = model.predict_proba, loss, f"C {c:g}"
    return best


def flip(images, generator):
    """Each image mirrored left to right and top to bottom, each with probability 1/2. (B, 3, H, W)."""
    across, down = torch.rand(2, len(images), 1, 1, 1, generator=generator) < 0.5
    images = torch.where(across, images.flip(-1), images)
    return torch.where(down, images.flip(-2), images)


def fine_tune(encoder, images, labels, train, val, classes, args, seed, what=""):
    """Encoder, mean over the n tokens and one linear layer, all of it trained (A.1.2), with flips (the paper is silent).

    images uint8 (N, 3, 224, 224), labels (N,), train and val: indices; the encoder given stays as it is. Gives, of the
    epoch with the lowest loss on val: a function from images to probabilities (.., C), that loss, the epoch in words.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(encoder.embed_dim, classes)
        dirl.init_weights(head)
    model = nn.ModuleDict({"encoder": copy.deepcopy(encoder), "head": head}).to(args.device)
    logits = lambda x: model["head"](represent(model["encoder"], x, args.bf16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, args.milestones, gamma=0.1)
    generator, labels = torch.Generator().manual_seed(seed), torch.as_tensor(labels)
    train, val, best = torch.as_tensor(train), torch.as_tensor(val), (math.inf, 0, None)
    bar = tqdm(range(1, args.epochs + 1), what, unit="epoch", leave=False, disable=not what)
    for epoch in bar:
        model.train()
        for index in train[torch.randperm(len(train), generator=generator)].split(args.batch):
            loss = F.cross_entropy(logits(flip(images[index], generator)), labels[index].to(args.device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        schedule.step()
        model.eval()
        val_loss = F.cross_entropy(in_batches(logits, images[val], args.batch), labels[val]).item()
        if val_loss < best[0]:
            best = val_loss, epoch, copy.deepcopy(model.state_dict())
        bar.set_postfix(loss=f"{loss.item():.3f}", val=f"{val_loss:.3f}")
    if best[2] is None:
        raise FloatingPointError(f"fine-tuning with learning rate {args.lr:g}: the loss is not finite; lower --lr")
    model.load_state_dict(best[2])
    predict = lambda x: in_batches(lambda part: logits(part).softmax(-1), x, args.batch).numpy()
    return predict, best[0], f"epoch {best[1]} of {args.epochs}"


# ---------------------------------------------------------------- figures

def draws(groups, seed=0):
    """Yields DRAWS times the indices of groups (N,) drawn with replacement, whole; the same for the same groups."""
    members, rng = [np.flatnonzero(groups == group) for group in np.unique(groups)], np.random.default_rng(seed)
    for _ in range(DRAWS):
        yield np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])


def bootstrap(truth, scores, groups, seed=0):
    """95 % intervals of the accuracy and the AUC of scores (N, C), as (2, 2): low, high.

    A draw that lacks a class has no AUC and is left out there.
    """
    values = []
    for index in draws(groups, seed):
        whole = len(np.unique(truth[index])) == scores.shape[1]
        values.append(((truth[index] == scores[index].argmax(1)).mean(),
                       eval_py.auc(truth[index], scores[index]) if whole else np.nan))
    return np.nanpercentile(values, (2.5, 97.5), axis=0).T


def keep_rows(path, rows):
    """Writes rows (dicts) to a CSV; rows that are there of another data set, encoder or training stay."""
    key = lambda row: (row.get("data"), row.get("encoder"), row.get("training"))
    new, old = {key(row) for row in rows}, []
    if path.is_file():
        with open(path, encoding="utf-8", newline="") as file:
            old = [row for row in csv.DictReader(file) if key(row) not in new and None not in row]
    with renamed(path) as temp, open(temp, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in old + rows for name in row)), restval="")
        writer.writeheader()
        writer.writerows(old + rows)


# ---------------------------------------------------------------- script

def encoders_of(args):
    """{name: encoder, None for pixels} of --encoder, and the run folder that the results go to."""
    out, arch, run = {}, "vit_t", Path("runs") / "_".join([run_name(args.data), *args.encoder])
    if "checkpoint" in args.encoder or args.checkpoint:
        path = eval_py.find_encoder(args.checkpoint)
        encoder, about = eval_py.load_encoder(path)
        run, arch = path.parent, about["arch"]
        if "checkpoint" in args.encoder:
            out[run.resolve().name] = encoder
    if "random" in args.encoder:
        out[f"random {args.arch or arch}"] = random_encoder(args.arch or arch, args.seed)
    if "pixels" in args.encoder:
        out["pixels"] = None
    return out, run


def fold_results(encoder, images, labels, folds, test, classes, args, name):
    """Trains on every fold and scores the test images: yields (scores (T, C), val loss, what was kept in words)."""
    if encoder is not None:
        encoder.to(args.device)
    if args.linear or encoder is None:
        features = pixel_statistics(images) if encoder is None else in_batches(
            lambda x: represent(encoder, x, args.bf16), images, args.batch, "features").numpy()
    for k, (train, val) in enumerate(folds, 1):
        if args.linear or encoder is None:
            predict, loss, kept = fit_linear(features, labels, train, val)
            yield predict(features[test]), loss, kept
        else:
            predict, loss, kept = fine_tune(encoder, images, labels, train, val, classes, args, 1000 * args.seed + k,
                                            f"{name}, fold {k}")
            yield predict(images[test]), loss, kept


def evaluate(args):
    rows, classes = find_patches(args.data, args.seed)
    encoders, run = encoders_of(args)
    images, rows, failed = load_images(rows, args.workers)
    for line in failed:
        print("passed over:", line)
    labels, groups, parts = (np.array([row[name] for row in rows]) for name in ("label", "group", "part"))
    train, test = np.flatnonzero(parts == "train"), np.flatnonzero(parts == "test")
    absent = [name for c, name in enumerate(classes) if not (labels[test] == c).any()]
    if absent:
        raise InputError(f"--data {args.data}: no test image of {', '.join(absent)}; every class needs one")
    folds = [(train[a], train[b]) for a, b in make_folds(labels[train], groups[train], classes, args.folds, args.seed)]
    print(f"{args.data}: {len(train)} training and {len(test)} test images of {', '.join(classes)}; "
          f"{args.folds} folds, stratified, of whole {unit(groups[train])}")
    if not args.linear and any(encoders.values()):
        print(f"fine-tuning on {args.device}: AdamW, lr {args.lr:g}, weight decay {args.weight_decay:g}, batch {args.batch}, "
              f"{args.epochs} epochs, lr x 0.1 after {' '.join(map(str, args.milestones))}, flips")
    wide = max(24, *(len(name) + 14 for name in encoders))
    show = lambda *cells: print(f"{cells[0]:<{wide}}{cells[1]:<26}{cells[2]:<26}{cells[3]}")
    show("encoder", "accuracy", "AUC", "")
    measure = lambda scores: (accuracy_score(labels[test], scores.argmax(1)), eval_py.auc(labels[test], scores))
    for name, encoder in encoders.items():
        training = "linear" if args.linear or encoder is None else "fine-tuned"
        key, table, values, mean = {"data": run_name(args.data), "encoder": name, "training": training}, [], [], 0
        for k, (scores, loss, kept) in enumerate(fold_results(encoder, images, labels, folds, test, len(classes), args, name), 1):
            values.append(measure(scores))
            mean = mean + scores / len(folds)
            figures = [f"{v:.4f}" for v in values[-1]]
            show(f"{name}, fold {k}", *figures, f"{kept}, val loss {loss:.4f}")
            table.append(key | {"fold": k, "accuracy": figures[0], "auc": figures[1], "val_loss": f"{loss:.4f}", "kept": kept,
                                "train": len(folds[k - 1][0]), "val": len(folds[k - 1][1]), "test": len(test)})
            keep_rows(run / "patches.csv", table)  # now: the next fold may take an hour
        show(f"{name}, mean", *(f"{np.mean(v):.4f} ± {np.std(v, ddof=1):.4f}" for v in zip(*values)),
             f"{training}, sd over {len(folds)} folds")
        show(f"{name}, mean score", *(f"{v:.4f} ({low:.4f} to {high:.4f})" for v, (low, high) in zip(
            measure(mean), bootstrap(labels[test], mean, groups[test], args.seed))),
            f"95 %, {DRAWS} draws of {len(set(groups[test]))} test {unit(groups[test])}")
        keep_rows(run / "patches_predictions.csv", [
            key | {"image": rows[i]["image"], "group": rows[i]["group"], "label": classes[rows[i]["label"]]}
            | {f"score {c}": f"{v:.4f}" for c, v in zip(classes, score)} for i, score in zip(test, mean)])
    print(f"Wrote {run}/patches.csv, patches_predictions.csv")
    if failed:
        print(f"{len(failed)} images were passed over (see above).")
    return 1 if failed else 0
