"""The paper's claim on your own patches (4.1, 4.2): does DiRL de-sparsify attention, and does it help?

python claim.py run --data FOLDER [flags of train.py] pre-trains every arm with every seed, the same flags for all, into
OUT/<arm>_seed<k>/, and measures each on the test part of FOLDER/labels.csv (claim.npz: each test image's attention and
scores). Stop it whenever you like: the same command goes on. python claim.py show prints the table and draws.
"""
import argparse
import csv
import json
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from zipfile import BadZipFile

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier

import data as data_py
import dirl
import eval as eval_py
import mil
import patches
import train as train_py
import views
from errors import InputError, check_ranges, exit_code, renamed
from prior import bin_centroids
from slides import CROP

# What is compared: flags of train.py. "shuffled" and those after it are controls; "random" is an encoder as it starts.
ARMS = {
    "random": None,
    "baseline": ["--method", "baseline"],
    "cellback": ["--method", "cellback"],
    "dirl": ["--method", "dirl"],
    "shuffled": ["--method", "dirl", "--shuffle-prior"],
    "lambda_2_0.25": ["--method", "dirl", "--lambda-2", "0.25"],
    "two_views": ["--method", "dirl", "--local-crops", "0", "--global-scale", "0.14", "1"],
    "baseline_two_views": ["--method", "baseline", "--local-crops", "0", "--global-scale", "0.14", "1"],
    "zeros": ["--method", "dirl", "--empty-regions", "zeros"],
}
BINS = ("tokens with attention 0 to 0.5", "tokens with attention 0.5 to 2", "tokens with attention over 2")
SPREAD = "sd of the aggregated attention within an image"
BASELINE_OF = {"two_views": "baseline_two_views"}  # the others: "baseline"
DSMIL_EPOCHS = 200  # as Li et al. (A.1.2)
COLORS = dict(zip(ARMS, ("#999999", "#1b1b1b", "#1f78b4", "#d95f02", "#e7b416", "#984ea3", "#4daf4a", "#7fc97f", "#a65628")))


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
        command.add_argument("--pair", nargs=2, metavar="CLASS", help="show: two classes that are also told apart alone, by the same scores")
    add = run.add_argument
    add("--data", required=True, help="folder of patches with labels.csv: image,label,split[,group or source_tile]")
    add("--arms", nargs="+", default=["random", "baseline", "cellback", "dirl", "shuffled"], choices=list(ARMS), metavar="ARM",
        help=f"{', '.join(ARMS)}; those from shuffled on are controls, and set their own flags")
    add("--seeds", type=int, nargs="+", default=[0], help="several tell an effect from luck; the first seed's arms are run first")
    add("--folds", type=int, default=5, help="of the training part, for logistic regression and fine-tuning")
    add("--tune-epochs", type=int, default=0, help="of fine-tuning, as in eval.py patches (40 in the paper); 0 leaves it out")
    add("--tune-folds", type=int, default=5, help="folds that are fine-tuned; fewer where time is short")
    add("--bag-groups", type=int, default=4, help="source tiles in a synthetic slide for DSMIL")
    add("--bag-seeds", type=int, default=3, help="trainings of DSMIL; 0 leaves it out")
    add = show.add_argument
    add("--overlay", help="folder with slides or crops whose crops are shown with each arm's attention")
    add("--mpp", type=float, help="um/px of the overlay's crops (default: the encoders')")
    add("--slide-mpp", type=float, help="um/px of slides that record none")
    add("--crops", type=int, default=3, help="crops of the overlay")
    args, args.rest = parser.parse_known_args(argv)
    if args.command == "show":
        if args.rest or args.crops < 1:
            raise InputError(f"{' '.join(args.rest) or '--crops below 1'}: not known to show; python claim.py show --help")
        return args
    check_ranges(args, folds=(2, 1000), tune_epochs=(0, 10000), tune_folds=(1, 1000), bag_groups=(1, 10000), bag_seeds=(0, 1000))
    said = {word.split("=")[0] for word in args.rest}
    for flag in {"--method", "--run", "--seed", "--probe", "--shuffle-prior"} & said:
        raise InputError(f"{flag}: the experiment sets it; take --arms, --seeds or --out")
    return args


# ---------------------------------------------------------------- run

def run(args):
    """Pre-trains and measures what is not done yet: 0, 130 where it was stopped, 1 where an arm failed."""
    common = ["--data", args.data, "--probe", args.data, *args.rest]
    jobs = [(arm, seed, Path(args.out) / f"{arm}_seed{seed}") for seed in args.seeds for arm in args.arms]
    flags = {folder: train_py.arguments([*common, "--run", str(folder), "--seed", str(seed), *(ARMS[arm] or [])])
             for arm, seed, folder in jobs}
    rows, classes = find_patches(args)
    arrange(rows, classes, args)  # all that can be wrong with flags and labels is told before the hours, not after
    shared = train_py.arguments(common)
    found = data_py.find_data(args.data, shared.mpp, shared.slide_mpp, 0, shared.prior)
    train_py.check_batch(shared.batch, round(shared.fraction * len(found.split("train") + found.split("val"))))
    labels = eval_py.stamp_of(Path(args.data) / "labels.csv")
    keep_settings(Path(args.out) / "settings.json", shared, labels)
    load, failed = cache(lambda: load_patches(args, rows, classes, shared)), []
    for arm, seed, folder in jobs:
        settings = flags[folder]
        print(f"--- {folder}")
        try:
            code = start(settings, folder) if ARMS[arm] is None else pre_train(settings, folder)
            if code == 130:
                return code
            measure(folder, measures(args, settings), load, labels, settings.device)
        except FloatingPointError as error:  # the others can still be compared
            print(f"claim.py: {folder}: {error}", file=sys.stderr)
            failed.append(str(folder))
    if failed:
        print(f"claim.py: failed: {', '.join(failed)}; see above, and take other settings with another --out", file=sys.stderr)
    print(f"Wrote {args.out}/. Next: python claim.py show --out {args.out}")
    return int(bool(failed))


def keep_settings(path, settings, labels):
    """Writes what all arms of a folder have in common; InputError where it was begun with something else."""
    new = {k: v for k, v in vars(settings).items() if k not in (*train_py.NOT_THE_RUN, "seed", "method")} | {"labels.csv": labels}
    if path.is_file():
        train_py.check_config(path, new)
    with renamed(path) as temp:
        temp.write_text(json.dumps(new, indent=1))


def pre_train(settings, folder):
    """train.py's exit code, 130 where the run is not at its end."""
    if finished(folder) and (folder / "encoder.pt").is_file() and not (folder / "checkpoint.pt").is_file():
        return 0  # the checkpoint is large, and may be deleted when a run is done
    code = train_py.train(settings)
    return code if finished(folder) else 130


def start(settings, folder):
    """encoder.pt of an encoder as it starts."""
    if not (folder / "encoder.pt").is_file():
        train_py.save(folder / "encoder.pt", {
            "encoder": patches.random_encoder(settings.arch, settings.seed).state_dict(), "arch": settings.arch, "method": "none",
            "data": settings.data, "mpp": settings.mpp, "mean": list(views.MEAN), "std": list(views.STD), "step": 0})
    return 0


def finished(folder):
    """Did the run in this folder come to its last step? config.json and log.csv tell."""
    config = read_json(folder / "config.json")
    last = read_log(folder / "log.csv")[-1:]
    return bool(config and last) and int(last[0]["step"]) + 1 == config["epochs"] * (config["crops"] // config["batch"])


def measure(folder, functions, load, labels, device):
    """Adds to a folder's claim.npz those of measures() that it has not of its encoder.pt; load() gives the images."""
    stamp = eval_py.stamp_of(folder / "encoder.pt") + labels
    done = read_measures(folder / "claim.npz", stamp)
    todo = {name: function for name, function in functions.items() if name not in done}
    if not todo:
        return
    on, encoder = load(), eval_py.load_encoder(folder / "encoder.pt")[0].to(device)
    for name, function in todo.items():
        done[name] = function(encoder, on)
        if name.startswith("DSMIL"):
            done[name + BAGS] = np.array([label for _, label in on.test_bags])
        with renamed(folder / "claim.npz") as temp, open(temp, "wb") as file:
            np.savez(file, stamp=stamp, classes=on.classes, labels=on.labels[on.test], groups=on.groups[on.test], **done)


def read_json(path):
    """A JSON object; {} where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_log(path):
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_measures(path, stamp):
    """{measure: array} of a claim.npz that was made of this encoder and these labels; {} otherwise."""
    try:
        with np.load(path, allow_pickle=False) as file:
            whole = str(file["stamp"]) == stamp and file["attention"].shape[1] == TOKENS  # an earlier version had no tokens
            return {name: file[name] for name in file.files if name not in ABOUT} if whole else {}
    except (OSError, ValueError, KeyError, BadZipFile):
        return {}


# ---------------------------------------------------------------- measures

ABOUT = ("stamp", "classes", "labels", "groups")  # of claim.npz; the rest are measures
TOKENS = (CROP // 16) ** 2
BAGS = ", labels of its test bags"


def find_patches(args):
    rows, classes = patches.find_patches(args.data, 0)
    if not all(row.get("split") for row in data_py.read_table(Path(args.data) / "labels.csv")):
        raise InputError(f"{args.data}/labels.csv: has no column split, or an empty cell in it; every seed has to train and test on the same images, so write one")
    return rows, classes


def arrange(rows, classes, args):
    """Labels, groups, parts, folds and bags of the images: what every arm is measured on."""
    labels, groups, parts = (np.array([row[name] for row in rows]) for name in ("label", "group", "part"))
    train, test = np.flatnonzero(parts == "train"), np.flatnonzero(parts == "test")
    if len(np.unique(labels[test])) < len(classes):
        raise InputError(f"{args.data}/labels.csv: a class has no test image; every class needs one")
    for part in ("training", train), ("test", test):
        if len(part[1]) < 20:
            raise InputError(f"{args.data}/labels.csv: {len(part[1])} {part[0]} images; 20 at least are needed")
    folds = [(train[a], train[b]) for a, b in patches.make_folds(labels[train], groups[train], classes, args.folds, 0)]
    train_bags, test_bags = (make_bags(part, labels, groups, args.bag_groups, 0) for part in (train, test))
    for part, bags, least in (("training", train_bags, 5), ("test", test_bags, 1)):
        for c, name in enumerate(classes):
            if args.bag_seeds and [label for _, label in bags].count(c) < least:
                raise InputError(f"--bag-groups {args.bag_groups}: fewer than {least} {part} bags of {name}; lower it, or --bag-seeds 0")
    return SimpleNamespace(labels=labels, groups=groups, train=train, test=test, folds=folds, classes=classes,
                           train_bags=train_bags, test_bags=test_bags)


def load_patches(args, rows, classes, settings):
    images, kept, failed = patches.load_images(rows, max(1, settings.workers))
    for line in failed:
        print("passed over:", line)
    on = arrange(kept, classes, args)
    on.images = images
    return on


def make_bags(indices, labels, groups, size, seed):
    """Synthetic slides: (indices of the tiles, class), each the tiles of one class in size groups, no tile in two of them.

    indices: of the images that may be taken; a class's last groups that do not fill a bag are left out.
    """
    rng, bags = np.random.default_rng(seed), []
    for label in np.unique(labels[indices]):
        of_class = indices[labels[indices] == label]
        names = rng.permutation(np.unique(groups[of_class]))
        bags += [(of_class[np.isin(groups[of_class], names[i: i + size])], int(label)) for i in range(0, len(names) - size + 1, size)]
    return bags


def measures(args, settings):
    """{measure: function of (encoder, images)}: attention (T, n), aggregated, of each test image, at CROP px and at the
    global views' size; the others scores (R, T, C) of R folds or trainings, DSMIL's of test bags."""
    device = torch.device(settings.device)
    bf16 = settings.precision != "fp32" and train_py.native_bf16(device)

    @torch.no_grad()
    def attention(encoder, on, size=CROP):
        whole, flip = torch.tensor([[0., 0, CROP, CROP]]), torch.zeros(1)
        resized = lambda x: x if size == CROP else views.resample(x.float(), whole.expand(len(x), 4), flip.expand(len(x)), size)
        return patches.in_batches(lambda x: eval_py.attention(encoder, resized(x)), on.images[on.test], 64, "attention").numpy()

    @torch.no_grad()
    def features(encoder, on):
        if getattr(on, "of", None) is not encoder:  # once for three measures
            on.of, on.features = encoder, patches.in_batches(
                lambda x: eval_py.represent(encoder, x, bf16), on.images, 64, "features").numpy()
        return on.features

    out = {"attention": attention, "20-NN": lambda encoder, on: nearest(features(encoder, on), on)[None],
           f"logistic regression, {args.folds} folds": lambda encoder, on: linear(features(encoder, on), on)}
    if settings.global_size != CROP:  # the encoder has never seen CROP px, so also as a view in training is resampled
        out[f"attention at {settings.global_size} px"] = lambda encoder, on: attention(encoder, on, settings.global_size)
    if args.bag_seeds:
        out[f"DSMIL on synthetic slides of {args.bag_groups}, {args.bag_seeds} seeds"] = lambda encoder, on: on_bags(
            features(encoder, on), on, args.bag_seeds)
    if args.tune_epochs:
        folds = min(args.folds, args.tune_folds)
        out[f"fine-tuned {args.tune_epochs} epochs, {folds} of {args.folds} folds"] = lambda encoder, on: fine_tuned(
            encoder, on, args.tune_epochs, folds, settings.seed, device, bf16)
    return out


def nearest(features, on, k=20):
    """Class shares (T, C) among the k training images nearest to each test image, by cosine on f."""
    model = KNeighborsClassifier(min(k, len(on.train)), metric="cosine").fit(features[on.train], on.labels[on.train])
    return model.predict_proba(features[on.test])


def linear(features, on):
    """Logistic regression on frozen features, a fold each: (folds, T, C)."""
    return np.stack([patches.fit_linear(features, on.labels, *fold)[0](features[on.test]) for fold in on.folds])


def fine_tuned(encoder, on, epochs, folds, seed, device, bf16):
    """The whole encoder fine-tuned (A.1.2) at MHIST's settings, its milestones in proportion: (folds, T, C)."""
    args = SimpleNamespace(**patches.SETTINGS["mhist"] | {"epochs": epochs}, device=device, bf16=bf16)
    args.milestones = [m for m in (round(m * epochs / patches.SETTINGS["mhist"]["epochs"]) for m in args.milestones) if m > 0]
    return np.stack([patches.fine_tune(encoder, on.images, on.labels, *fold, len(on.classes), args, seed, f"fine-tuning, fold {k}")[0](
        on.images[on.test]) for k, fold in enumerate(on.folds[:folds], 1)])


def on_bags(features, on, seeds):
    """DSMIL's scores (seeds, bags, C) of the test bags; every fifth training bag validates."""
    tiles = torch.from_numpy(features)
    bags = [(tiles[index], label) for index, label in on.train_bags]
    out = []
    for seed in range(seeds):
        model = mil.train_dsmil([bag for i, bag in enumerate(bags) if i % 5], bags[::5], len(on.classes), DSMIL_EPOCHS, seed=seed)
        out.append(torch.stack([mil.dsmil_predict(model, tiles[index]) for index, _ in on.test_bags]).numpy())
    return np.stack(out)


# ---------------------------------------------------------------- show

def draws_of(groups):
    """(1 + DRAWS) rows of indices: all images, then those of each draw of groups (N,)."""
    return [np.arange(len(groups)), *patches.draws(groups)]


def statistics(file, draws, pair):
    """{measure: (1 + DRAWS,)} of a claim.npz: its value and that of every draw; an AUC is NaN where a draw lacks a class.

    Accuracy and AUC are means over the folds or trainings, as the paper has them, not those of an ensemble.
    """
    labels, classes, out = file["labels"], file["classes"].tolist(), {}
    for name in (n for n in file if n.startswith("attention")):
        of_image = np.array([(*dirl.attention_bins(image), image.std().item()) for image in torch.from_numpy(file[name])])
        for what, column in zip((*BINS, SPREAD), of_image.T):
            out[what + name.removeprefix("attention")] = np.array([column[index].mean() for index in draws])

    def score(name, truth, scores, drawn):
        right = (scores.argmax(2) == truth).mean(0)
        out[f"accuracy, {name}"] = np.array([right[index].mean() for index in drawn])
        whole = lambda index: len(np.unique(truth[index])) == scores.shape[2]
        out[f"AUC, {name}"] = np.array([np.mean([eval_py.auc(truth[index], one[index]) for one in scores]) if whole(index) else np.nan
                                        for index in drawn])
    for name in (n for n in file if n not in ABOUT and not n.startswith("attention") and not n.endswith(BAGS)):
        if name.startswith("DSMIL"):
            score(name, file[name + BAGS], file[name], draws_of(np.arange(len(file[name + BAGS]))))
            continue
        score(name, labels, file[name], draws)
        if pair:
            two = [classes.index(c) for c in pair]
            there = np.isin(labels, two)
            inside = np.cumsum(there) - 1
            score(f"{name}, {pair[0]} against {pair[1]}", (labels[there] == two[1]).astype(int),
                  np.log(file[name][:, there][:, :, two] + 1e-9), [inside[index[there[index]]] for index in draws])
    return out


def read_runs(args):
    """{arm: [(seed, folder, {measure: (1 + DRAWS,)}), ...]} of the measured runs, in the order of ARMS."""
    found, draws = {}, {}
    for path in sorted(Path(args.out).glob("*_seed*/claim.npz")):
        arm, seed = path.parent.name.rsplit("_seed", 1)
        try:
            with np.load(path, allow_pickle=False) as archive:
                file = {name: archive[name] for name in archive.files}
            stamp, key = str(file["stamp"]), tuple(file["groups"])
            made = eval_py.stamp_of(path.parent / "encoder.pt")
            if arm not in ARMS or not seed.isdigit():
                raise ValueError("no arm of this experiment")
            if file["attention"].shape[1] != TOKENS:
                raise ValueError("an earlier version made it")
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise InputError(f"{path}: cannot be read ({error}); delete it and run again") from None
        if not stamp.startswith(made):
            print(f"left out: {path} is of an earlier encoder; run measures it anew")
            continue
        for name in args.pair or ():
            if name not in file["classes"]:
                raise InputError(f"--pair {name}: the classes are {', '.join(file['classes'])}")
        if args.pair and args.pair[0] == args.pair[1]:
            raise InputError("--pair: two different classes are needed")
        if key not in draws:
            draws[key] = draws_of(file["groups"])
        found.setdefault(arm, []).append((int(seed), path.parent, statistics(file, draws[key], args.pair)))
    if not found:
        raise InputError(f"{args.out}/: no measured run is there; first: python claim.py run --data FOLDER --out {args.out}")
    return {arm: sorted(found[arm], key=lambda r: r[0]) for arm in ARMS if arm in found}


def course(folder):
    """{epochs done: (low, middle, high, k-NN accuracy)} that --probe left in log.csv."""
    return {int(row["epoch"]) + 1: tuple(float(row[name]) for name in train_py.PROBED)
            for row in read_log(folder / "log.csv") if row[train_py.PROBED[-1]]}


def loss_shares(folder):
    """{head: mean loss over the last epoch as a share of ln(its outputs)}: 1 is what a uniform teacher and student have."""
    log, config = read_log(folder / "log.csv"), read_json(folder / "config.json")
    last = [row for row in log if row["epoch"] == log[-1]["epoch"]] if log else []
    return {name[5:]: float(np.mean([float(row[name]) for row in last])) / np.log(
        config["disentangled_dim" if name[5:] in dirl.DISENTANGLED else "out_dim"])
        for name in (last[0] if last else ()) if name.startswith("loss_")}


def cell(values, seeds):
    """(1 + DRAWS,) of each seed in words: the mean, its sd over seeds where there are several, and the 95 % interval;
    of how many seeds, where some have not been measured."""
    values = np.stack(values)
    mean = values.mean(0)
    low, high = np.nanpercentile(mean[1:], (2.5, 97.5)) if len(mean) > 1 else (np.nan, np.nan)
    sd = f" ± {values[:, 0].std(ddof=1):.3f}" if len(values) > 1 else ""
    return (f"{mean[0]:.3f}{sd}" + (f" ({low:.3f} to {high:.3f})" if len(mean) > 1 else "")
            + (f" [{len(values)} of {seeds} seeds]" if len(values) < seeds else ""))


def show(args):
    runs, out = read_runs(args), Path(args.out)
    names = list(dict.fromkeys(name for results in runs.values() for _, _, rows in results for name in rows))
    title = [f"{arm}, seed{'s' * (len(r) > 1)} {' '.join(str(seed) for seed, _, _ in r)}" for arm, r in runs.items()]
    table, long = [("measure", *title)], [("arm", "seed", "measure", "value", "low", "high")]
    for name in names:
        there = [[rows[name] for _, _, rows in results if name in rows] for results in runs.values()]
        table.append((name, *(cell(values, len(r)) if values else "" for values, r in zip(there, runs.values()))))
        long += [(arm, seed, name, *(f"{v:.4f}" for v in (rows[name][0], *np.nanpercentile(rows[name][1:], (2.5, 97.5)))))
                 for arm, results in runs.items() for seed, _, rows in results if name in rows]
    against = {arm: BASELINE_OF.get(arm, "baseline") for arm in runs if arm not in ("random", "baseline", *BASELINE_OF.values())}
    minus = [("arm minus baseline, same seeds", *(arm if base == "baseline" else f"{arm} minus {base}" for arm, base in against.items()))]
    both = [[(rows, other) for seed, _, rows in runs[arm] for same, _, other in runs.get(base, ()) if same == seed]
            for arm, base in against.items()]
    for name in names:
        pairs = [[rows[name] - other[name] for rows, other in seeds if name in rows and name in other] for seeds in both]
        if any(pairs):
            minus.append((name, *(cell(p, len(runs[arm])) if p else "" for p, arm in zip(pairs, against))))
    losses = [("last epoch's loss / ln K", *title)]
    for head in ("f", *dirl.REGIONS, *dirl.DISENTANGLED):
        shares = [[[share[head]] for _, folder, _ in results if head in (share := loss_shares(folder))] for results in runs.values()]
        if any(shares):
            losses.append(("f" if head == "f" else f"f_{head}", *(cell(s, len(r)) if s else "" for s, r in zip(shares, runs.values()))))
    for lines in (table, minus, losses):
        if len(lines) > 1:
            eval_py.print_table(lines)
            print()
    print(f"in brackets: 95 % of {patches.DRAWS} draws of test groups (DSMIL: of its synthetic slides); ±: sd over seeds")
    print("course on the probe: epochs, tokens with attention 0.5 to 2, 20-NN accuracy")
    for arm, results in runs.items():
        for seed, folder, _ in results:
            if points := course(folder):
                print(f"{f'{arm}, seed {seed}':<28}" + "  ".join(f"{epoch}: {p[1]:.1%} {p[3]:.3f}" for epoch, p in points.items()))
    eval_py.write_csv(out / "claim.csv", long)
    plot_claim(runs, out / "claim.png")
    made = ["claim.csv", "claim.png"]
    if args.overlay:
        overlay(runs, args, out / "claim_overlay.png")
        made.append("claim_overlay.png")
    print(f"Wrote {out}/{', '.join(made)}")
    return 0


def attention_of(folder):
    """(T, n), aggregated, of the test images."""
    with np.load(folder / "claim.npz", allow_pickle=False) as file:
        return file["attention"]


def plot_claim(runs, path):
    """Fig. 4 for each arm (all its seeds), and over the epochs the share of the middle bin and the k-NN accuracy (a line a
    seed)."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    fig_4, middle, knn = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    eval_py.draw_distribution(fig_4, {arm: np.concatenate([attention_of(folder).ravel() for _, folder, _ in results])
                                      for arm, results in runs.items()}, COLORS)
    for arm, results in runs.items():
        for points in (course(folder) for _, folder, _ in results):
            for axis, k, scale in ((middle, 1, 100), (knn, 3, 1)):
                axis.plot(list(points), [scale * p[k] for p in points.values()], "o-", ms=3, lw=1, color=COLORS[arm])
    middle.set(xlabel="epochs", ylabel="tokens with attention 0.5 to 2, %")
    knn.set(xlabel="epochs", ylabel="20-NN accuracy on the probe")
    with renamed(path) as temp:
        figure.savefig(temp, format="png", dpi=130)


@torch.no_grad()
def overlay(runs, args, path):
    """The same crops of --overlay with P_c and every arm's aggregated attention (first seed)."""
    encoders = {arm: eval_py.load_encoder(results[0][1] / "encoder.pt") for arm, results in runs.items()}
    found = data_py.find_data(args.overlay, args.mpp or next(iter(encoders.values()))[1]["mpp"], args.slide_mpp)
    for line in data_py.prepare(found, args.slide_mpp):
        print("passed over:", line)
    crops = data_py.Crops(found, sorted(found.images))
    covered = crops.priors().mean(1)
    mixed = np.flatnonzero((covered > 0.2) & (covered < 0.8))  # crops that have both regions
    chosen = mixed[eval_py.spread(len(mixed), args.crops)] if len(mixed) else eval_py.spread(len(crops), args.crops)
    if not len(chosen):
        raise InputError(f"--overlay {args.overlay}: no crop is there; take another folder or --mpp")
    images, cells = zip(*(crops[int(i)] for i in chosen))
    attention = {arm: eval_py.attention(encoder, torch.stack(images)) for arm, (encoder, _) in encoders.items()}
    eval_py.plot_overlays(images, attention, [bin_centroids(xy, CROP) for xy in cells], path)


def main(argv=None):
    def command():
        args = arguments(argv)
        return run(args) if args.command == "run" else show(args)
    return exit_code("claim.py", command)


if __name__ == "__main__":
    sys.exit(main())
