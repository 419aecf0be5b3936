"""The paper's claim on your own patches (4.1, 4.2): does DiRL de-sparsify attention, and does it help?

python claim.py run --data FOLDER [flags of train.py] pre-trains every arm with every seed, the same flags for all, into
OUT/<arm>_seed<k>/, and measures each on the test part of FOLDER/labels.csv (OUT/<arm>_seed<k>/claim.json). Stop it
whenever you like: the same command goes on. python claim.py show prints the table and draws from these folders.
"""
import argparse
import csv
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from sklearn.metrics import accuracy_score
from sklearn.neighbors import KNeighborsClassifier

import data as data_py
import dirl
import eval as eval_py
import mil
import patches
import train as train_py
import views
from errors import InputError, exit_code, renamed
from prior import bin_centroids
from slides import CROP

# What is compared: flags of train.py. "shuffled" to "zeros" are controls; "random" is an encoder as it starts.
ARMS = {
    "random": None,
    "baseline": ["--method", "baseline"],
    "cellback": ["--method", "cellback"],
    "dirl": ["--method", "dirl"],
    "shuffled": ["--method", "dirl", "--shuffle-prior"],
    "lambda2x10": ["--method", "dirl", "--lambda-2", "0.25"],
    "no_locals": ["--method", "dirl", "--local-crops", "0", "--global-scale", "0.14", "1"],
    "zeros": ["--method", "dirl", "--empty-regions", "zeros"],
}
BINS = ("tokens, attention 0 to 0.5", "tokens, attention 0.5 to 2", "tokens, attention over 2")
DSMIL_EPOCHS = 200  # A.1.3
COLORS = dict(zip(ARMS, ("#999999", "#1b1b1b", "#1f78b4", "#d95f02", "#e7b416", "#984ea3", "#4daf4a", "#a65628")))


def arguments(argv):
    parser = argparse.ArgumentParser(description="Pre-trains and measures the arms of an experiment, and shows what came out.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                              help="pre-trains and measures; all other flags go to train.py, for every arm alike",
                              epilog="All other flags are train.py's, the same for every arm: --mpp, --epochs, --batch, --arch, ...")
    show = commands.add_parser("show", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                               help="prints the table and draws the bins, their course and the overlays")
    for command in (run, show):
        command.add_argument("--out", default="runs/claim", help="folder of the experiment; another for other settings")
    add = run.add_argument
    add("--data", required=True, help="folder of patches with labels.csv: image,label,split[,group or source_tile]")
    add("--arms", nargs="+", default=["random", "baseline", "cellback", "dirl", "shuffled"], choices=list(ARMS), metavar="ARM",
        help=f"{', '.join(ARMS)}; the last four are controls")
    add("--seeds", type=int, nargs="+", default=[0], help="several tell an effect from luck; the first seed's arms are run first")
    add("--folds", type=int, default=5, help="of the training part, for logistic regression and fine-tuning")
    add("--tune-epochs", type=int, default=0, help="of fine-tuning, as in eval.py patches (40 in the paper); 0 leaves it out")
    add("--tune-folds", type=int, default=5, help="folds that are fine-tuned; fewer where time is short")
    add("--pair", nargs=2, metavar="CLASS", help="two classes that are also told apart alone, by the same scores")
    add("--bag-groups", type=int, default=4, help="source tiles in a synthetic slide for DSMIL")
    add("--bag-seeds", type=int, default=3, help="trainings of DSMIL; 0 leaves it out")
    add = show.add_argument
    add("--overlay", help="folder with slides or crops whose crops are shown with each arm's attention")
    add("--mpp", type=float, help="um/px of the overlay's crops")
    add("--slide-mpp", type=float, help="um/px of slides that record none")
    add("--crops", type=int, default=3, help="crops of the overlay")
    args, args.rest = parser.parse_known_args(argv)
    if args.rest and args.command == "show":
        raise InputError(f"{' '.join(args.rest)}: not known to show; python claim.py show --help")
    for flag in {"--method", "--run", "--seed", "--shuffle-prior"} & {word.split("=")[0] for word in args.rest}:
        raise InputError(f"{flag}: the experiment sets it; take --arms, --seeds or --out")
    return args


# ---------------------------------------------------------------- run

def run(args):
    """Pre-trains and measures what is not done yet; 130 where it was stopped."""
    common = ["--data", args.data, "--probe", args.data, *args.rest]
    jobs = [(arm, seed, Path(args.out) / f"{arm}_seed{seed}") for seed in args.seeds for arm in args.arms]
    flags = {folder: train_py.arguments([*common, "--run", str(folder), "--seed", str(seed), *(ARMS[arm] or [])])
             for arm, seed, folder in jobs}  # all of them now: a wrong flag is told before the hours, not after
    test = None
    for arm, seed, folder in jobs:
        settings = flags[folder]
        if ARMS[arm]:
            print(f"--- {folder}")
            code = train_py.train(settings)
            if code not in (0, 1) or settings.max_steps and not finished(folder):
                return code
        else:
            encoder = patches.random_encoder(settings.arch, seed)
            with renamed(folder / "encoder.pt") as temp:
                torch.save({"encoder": encoder.state_dict(), "arch": settings.arch, "method": "none", "data": args.data,
                            "mpp": settings.mpp, "mean": list(views.MEAN), "std": list(views.STD), "step": 0}, temp)
        stamp = [hashlib.sha256((folder / "encoder.pt").read_bytes()).hexdigest()[:16],
                 args.folds, args.tune_epochs, args.tune_folds, args.pair, args.bag_groups, args.bag_seeds]
        if read_json(folder / "claim.json").get("stamp") != stamp:
            test = test or load_patches(args, settings)
            encoder = eval_py.load_encoder(folder / "encoder.pt")[0].to(settings.device)
            rows = measure(encoder, test, args, settings)
            with renamed(folder / "claim.json") as temp:
                temp.write_text(json.dumps({"arm": arm, "seed": seed, "stamp": stamp, "data": test.about, "measures": rows}, indent=1))
        print(f"measured: {folder}/claim.json")
    print(f"All of {args.out} is done. Next: python claim.py show --out {args.out}")
    return 0


def finished(folder):
    """Did the run in this folder come to its last step? config.json and log.csv tell."""
    config = read_json(folder / "config.json")
    last = read_log(folder / "log.csv")[-1:]
    return bool(config and last) and int(last[0]["step"]) + 1 == config["epochs"] * (config["crops"] // config["batch"])


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def read_log(path):
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- measures

def load_patches(args, settings):
    """The images of --data with labels, groups, folds and bags: what every arm is measured on."""
    rows, classes = patches.find_patches(args.data, 0)
    for name in args.pair or ():
        if name not in classes:
            raise InputError(f"--pair {name}: {args.data}/labels.csv has {', '.join(classes)}")
    images, rows, failed = patches.load_images(rows, max(1, settings.workers))
    for line in failed:
        print("passed over:", line)
    labels, groups, parts = (np.array([row[name] for row in rows]) for name in ("label", "group", "part"))
    train, test = np.flatnonzero(parts == "train"), np.flatnonzero(parts == "test")
    if len(np.unique(labels[test])) < len(classes):
        raise InputError(f"{args.data}/labels.csv: a class has no test image; every class needs one")
    folds = [(train[a], train[b]) for a, b in patches.make_folds(labels[train], groups[train], classes, args.folds, 0)]
    return SimpleNamespace(images=images, labels=labels, groups=groups, train=train, test=test, folds=folds, classes=classes,
                           about=f"{len(train)} training and {len(test)} test images of {', '.join(classes)}; the test part has "
                                 f"{len(set(groups[test]))} {patches.unit(groups[test])}")


def measure(encoder, on, args, settings):
    """[[measure, value, low, high], ...]: bins, then accuracy and AUC of each classifier with 95 % intervals by group."""
    device = next(encoder.parameters()).device
    bf16 = settings.precision != "fp32" and train_py.native_bf16(device)
    with torch.no_grad():
        features = patches.in_batches(lambda x: eval_py.represent(encoder, x, bf16), on.images, 64, "features").numpy()
        columns = patches.in_batches(lambda x: dirl.aggregated_attention(encoder.last_attention(
            views.normalize(x.to(device).float() / 255))), on.images[on.test], 64, "attention")
    rows = [[name, share, None, None] for name, share in zip(BINS, dirl.attention_bins(columns))]
    scores = {"20-NN": nearest(features, on), "logistic regression": sum(
        patches.fit_linear(features, on.labels, *fold)[0](features[on.test]) for fold in on.folds) / len(on.folds)}
    if args.tune_epochs:
        scores["fine-tuned"] = fine_tuned(encoder, on, args, settings)
    truth, groups = on.labels[on.test], on.groups[on.test]
    for name, values in scores.items():
        rows += scored(name, truth, values, groups)
        if args.pair:
            two = [on.classes.index(c) for c in args.pair]
            there = np.isin(truth, two)
            rows += scored(f"{name}, {args.pair[0]} against {args.pair[1]}", (truth[there] == two[1]).astype(int),
                           values[there][:, two], groups[there])
    return rows + (bags_scored(features, on, args) if args.bag_seeds else [])


def scored(name, truth, scores, groups):
    values = accuracy_score(truth, scores.argmax(1)), eval_py.auc(truth, scores)
    return [[f"{what}, {name}", value, *limits] for what, value, limits in zip(
        ("accuracy", "AUC"), map(float, values), patches.bootstrap(truth, scores, groups).tolist())]


def nearest(features, on, k=20):
    """Class shares (T, C) among the k training images nearest to each test image, by cosine on f."""
    model = KNeighborsClassifier(min(k, len(on.train)), metric="cosine").fit(features[on.train], on.labels[on.train])
    return model.predict_proba(features[on.test])


def fine_tuned(encoder, on, args, settings):
    """Mean test scores (T, C) over --tune-folds folds of fine-tuning the whole encoder (A.1.2), MHIST's settings."""
    tuning = SimpleNamespace(**patches.SETTINGS["mhist"], device=settings.device,
                             bf16=settings.precision != "fp32" and train_py.native_bf16(torch.device(settings.device)))
    tuning.milestones = [round(m * args.tune_epochs / tuning.epochs) for m in tuning.milestones]
    tuning.epochs = args.tune_epochs
    folds = on.folds[: args.tune_folds]
    return sum(patches.fine_tune(encoder, on.images, on.labels, *fold, len(on.classes), tuning, settings.seed, f"fine-tuning, fold {k}")[0](
        on.images[on.test]) for k, fold in enumerate(folds, 1)) / len(folds)


def make_bags(indices, labels, groups, size, seed):
    """Synthetic slides: (indices of the tiles, class) of size whole groups of one class, no tile in two of them.

    indices: of the images that may be taken; a class's last groups that do not fill a bag are left out.
    """
    rng, bags = np.random.default_rng(seed), []
    for label in np.unique(labels[indices]):
        of_class = indices[labels[indices] == label]
        names = rng.permutation(np.unique(groups[of_class]))
        bags += [(of_class[np.isin(groups[of_class], names[i: i + size])], int(label)) for i in range(0, len(names) - size + 1, size)]
    return bags


def bags_scored(features, on, args):
    """DSMIL on synthetic slides: every fifth training bag validates, the mean score over --bag-seeds trainings."""
    tiles = torch.from_numpy(features)
    parts = [[(tiles[index], label) for index, label in make_bags(part, on.labels, on.groups, args.bag_groups, 0)]
             for part in (on.train, on.test)]
    counts = [[label for _, label in part].count(c) for part, least in zip(parts, (5, 1)) for c in range(len(on.classes))]
    if min(counts[: len(on.classes)]) < 5 or min(counts) < 1:
        raise InputError(f"--bag-groups {args.bag_groups}: too few synthetic slides of a class (5 to train, 1 to test); lower it, or --bag-seeds 0")
    val, train = parts[0][::5], [bag for i, bag in enumerate(parts[0]) if i % 5]
    scores = 0
    for seed in range(args.bag_seeds):
        model = mil.train_dsmil(train, val, len(on.classes), DSMIL_EPOCHS, seed=seed)
        scores = scores + torch.stack([mil.dsmil_predict(model, bag) for bag, _ in parts[1]]).numpy() / args.bag_seeds
    return scored(f"DSMIL, {len(parts[1])} synthetic slides", np.array([label for _, label in parts[1]]), scores, np.arange(len(parts[1])))


# ---------------------------------------------------------------- show

def read_runs(out):
    """{arm: [(seed, folder, {measure: (value, low, high)}), ...]} of the measured runs in a folder, in the order of ARMS."""
    found = {}
    for path in sorted(Path(out).glob("*_seed*/claim.json")):
        result = read_json(path)
        if result.get("arm") not in ARMS:
            raise InputError(f"{path}: cannot be read; delete it and run again")
        found.setdefault(result["arm"], []).append(
            (result["seed"], path.parent, {name: values for name, *values in result["measures"]}))
    if not found:
        raise InputError(f"{out}/: no measured run is there; first: python claim.py run --data FOLDER --out {out}")
    return {arm: sorted(found[arm], key=lambda r: r[0]) for arm in ARMS if arm in found}


def course(folder):
    """[(epochs done, low, middle, high, k-NN accuracy), ...] that --probe left in log.csv."""
    return [(int(row["epoch"]) + 1, *(float(row[name]) for name in train_py.PROBED))
            for row in read_log(folder / "log.csv") if row[train_py.PROBED[-1]]]


def loss_shares(folder):
    """{head: mean loss over the last epoch as a share of ln(its outputs)}: 1 is what a uniform teacher and student have."""
    log, config = read_log(folder / "log.csv"), read_json(folder / "config.json")
    last = [row for row in log if row["epoch"] == log[-1]["epoch"]] if log else []
    return {name[5:]: float(np.mean([float(row[name]) for row in last])) / np.log(
        config["disentangled_dim" if name[5:] in dirl.DISENTANGLED else "out_dim"])
        for name in (last[0] if last else ()) if name.startswith("loss_")}


def cell(values):
    """One measure of an arm in words: mean and sd over seeds, and of a single seed the interval."""
    numbers = [value[0] for value in values]
    if len(numbers) > 1:
        return f"{np.mean(numbers):.3f} ± {np.std(numbers, ddof=1):.3f}"
    return f"{numbers[0]:.3f}" + (f" ({values[0][1]:.3f}-{values[0][2]:.3f})" if values[0][1] is not None else "")


def show(args):
    runs, out = read_runs(args.out), Path(args.out)
    names = list(dict.fromkeys(name for results in runs.values() for _, _, rows in results for name in rows))
    table = [("measure", *(f"{arm}, {len(results)} seed{'s' * (len(results) > 1)}" for arm, results in runs.items()))]
    for name in names:
        there = [[rows[name] for _, _, rows in results if name in rows] for results in runs.values()]
        table.append((name, *(cell(values) if values else "" for values in there)))
    for head in ("f", *dirl.REGIONS, *dirl.DISENTANGLED):
        shares = [[(share[head],) + (None,) * 2 for _, folder, _ in results if head in (share := loss_shares(folder))] for results in runs.values()]
        if any(shares):
            table.append((f"last epoch's loss of f_{head} / ln K".replace("f_f", "f"), *(cell(s) if s else "" for s in shares)))
    eval_py.write_csv(out / "claim.csv", table)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    print("one seed: 95 % interval over groups of test images (DSMIL: over synthetic slides); several: mean ± sd over seeds")
    print("\ncourse on the probe (first seed): epochs, tokens with attention 0.5 to 2, 20-NN accuracy")
    for arm, results in runs.items():
        points = course(results[0][1])
        if points:
            print(f"{arm:<12}" + "  ".join(f"{p[0]}: {p[2]:.1%} {p[4]:.3f}" for p in points))
    plot_claim(runs, out / "claim.png")
    made = ["claim.csv", "claim.png"]
    if args.overlay:
        overlay(runs, args, out / "claim_overlay.png")
        made.append("claim_overlay.png")
    print(f"Wrote {out}/{', '.join(made)}")
    return 0


def plot_claim(runs, path):
    """Fig. 4's bins for each arm, and over the epochs the share of the middle bin and the k-NN accuracy (mean over seeds)."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    bins, middle, knn = figure.subplots(1, 3)
    for k, (arm, results) in enumerate(runs.items()):
        values = np.array([[rows[name][0] for name in BINS] for _, _, rows in results])
        x = np.arange(3) + (k - (len(runs) - 1) / 2) * 0.8 / len(runs)
        bins.bar(x, 100 * values.mean(0), 0.8 / len(runs), yerr=100 * values.std(0, ddof=1) if len(values) > 1 else None,
                 color=COLORS[arm], label=arm)
        points = [course(folder) for _, folder, _ in results]
        length = min(map(len, points))
        if length:
            mean = np.mean([p[:length] for p in points], 0)
            middle.plot(mean[:, 0], 100 * mean[:, 2], "o-", ms=3, color=COLORS[arm], label=arm)
            knn.plot(mean[:, 0], mean[:, 4], "o-", ms=3, color=COLORS[arm], label=arm)
    bins.set_xticks(range(3), ("0 to 0.5", "0.5 to 2", "over 2"))
    bins.set(xlabel="aggregated attention of a token", ylabel="tokens, %", ylim=(0, 105))
    middle.set(xlabel="epochs", ylabel="tokens with attention 0.5 to 2, %")
    knn.set(xlabel="epochs", ylabel="20-NN accuracy on the probe")
    bins.legend(fontsize=8)
    with renamed(path) as temp:
        figure.savefig(temp, format="png", dpi=130)


@torch.no_grad()
def overlay(runs, args, path):
    """The same crops of --overlay with P_c and every arm's aggregated attention."""
    found = data_py.find_data(args.overlay, args.mpp, args.slide_mpp)
    for line in data_py.prepare(found, args.slide_mpp):
        print("passed over:", line)
    crops = data_py.Crops(found, sorted(found.images))
    covered = crops.priors().mean(1)
    mixed = np.flatnonzero((covered > 0.2) & (covered < 0.8))  # crops that have both regions
    chosen = mixed[eval_py.spread(len(mixed), args.crops)] if len(mixed) else eval_py.spread(len(crops), args.crops)
    if not len(chosen):
        raise InputError(f"--overlay {args.overlay}: no crop is there; take another folder or --mpp")
    images, cells = zip(*(crops[int(i)] for i in chosen))
    x = views.normalize(torch.stack(images).float() / 255)
    attention = {arm: dirl.aggregated_attention(eval_py.load_encoder(results[0][1] / "encoder.pt")[0].last_attention(x))
                 for arm, results in runs.items()}
    eval_py.plot_overlays(images, attention, [bin_centroids(xy, CROP) for xy in cells], path)


def main(argv=None):
    def command():
        args = arguments(argv)
        return run(args) if args.command == "run" else show(args)
    return exit_code("claim.py", command)


if __name__ == "__main__":
    sys.exit(main())
