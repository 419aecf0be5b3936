"""The table and the pictures of experiments.claim, from the arms' claim.npz and log.csv, with intervals."""
from pathlib import Path

import matplotlib
import numpy as np
import torch

import dirl
from common.encoders import MEAN, STD, attention_of, load_encoder
from common.errors import InputError, print_skipped
from common.figures import draw_distribution, plot_overlays, save_figure, spread
from common.files import file_stamp, print_table, read_json, read_npz, write_csv
from common.log import MIDDLE, PROBED, read_log, symbol_of
from common.metrics import DRAWS, auc, bootstrap_indices
from common.report import note_on_middle
from data import Crops
from prior import bin_centroids
from wsi.cache import file_mpp, prepare
from wsi.slides import CROP
from wsi.splits import find_data

# What is compared: flags of train.py, or of experiments.compare. "random" is an untrained encoder; "shuffled"
# and those after it are controls and comparisons.
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
    "two_heads": ["--heads", "12", "12"],  # the number of heads without regions
    "13_blocks": ["--depth", "13", "--method", "baseline"],  # Table 6
    "13_blocks*": ["--depth", "13", "--heads", "12", "13"],
    "4_blocks": ["--depth", "4", "--method", "baseline"],
    "4_blocks_dirl": ["--depth", "4", "--method", "dirl"],
}
for ssl in ("byol", "simclr"):  # Table 8
    ARMS |= {ssl + end: ["--ssl", ssl, "--method", method] for end, method in (
        ("", "baseline"), ("_cellback", "cellback"), ("_dirl", "dirl"))}
ARMS |= {ssl: ["--ssl", ssl] for ssl in ("esvit", "selfpatch", "imix", "lsup")}  # Tables 3 and 9, Fig. 9
COMPARED = ("--ssl", "--depth", "--heads")  # flags of experiments.compare, which trains these arms
BASELINE_OF = {"two_views": "baseline_two_views"}  # the others: "baseline"
COLORS = dict(zip(ARMS, ("#999999", "#1b1b1b", "#1f78b4", "#d95f02", "#e7b416", "#984ea3", "#4daf4a",
                         "#7fc97f", "#a65628", *matplotlib.colormaps["tab20"].colors)))
BINS = ("tokens with attention 0 to 0.5", MIDDLE, "tokens with attention over 2")
SPREAD = "sd of the aggregated attention within an image"
ABOUT = ("stamp", "classes", "labels", "groups")  # of claim.npz; the rest are measures
BAGS = ", labels of its test bags"
TOKENS = (CROP // 16) ** 2


# ---------------------------------------------------------------- statistics

def read_measures(path, stamp):
    """{measure: array} of a claim.npz made from this encoder and these labels; {} otherwise."""
    file = read_npz(path)
    if not file or str(file.get("stamp")) != stamp or file["attention"].shape[1] != TOKENS:
        return {}
    return {name: values for name, values in file.items() if name not in ABOUT}


def draws_of(groups):
    """(1 + DRAWS) rows of indices: all images, then those of each bootstrap draw of groups (N,)."""
    return [np.arange(len(groups)), *bootstrap_indices(groups)]


def score_statistics(truth, scores, draws):
    """Accuracy and AUC of scores (R, N, C) for each of draws, as means over the R folds or trainings.

    The paper has such means, not those of an ensemble. An AUC is NaN if a draw lacks a class.
    """
    right = (scores.argmax(2) == truth).mean(0)
    accuracy, area = np.array([right[index].mean() for index in draws]), np.full(len(draws), np.nan)
    for i, index in enumerate(draws):
        if len(np.unique(truth[index])) == scores.shape[2]:
            area[i] = np.mean([auc(truth[index], one[index]) for one in scores])
    return accuracy, area


def pair_statistics(labels, scores, draws, two):
    """score_statistics of two classes told apart by the ratio of their scores, on the images of these two."""
    there = np.isin(labels, two)
    place = np.cumsum(there) - 1  # of an image among those of the two
    inside = [place[index[there[index]]] for index in draws]
    ratio = np.log(scores[:, there][:, :, two] + 1e-9)
    return score_statistics((labels[there] == two[1]).astype(int), ratio, inside)


def statistics(file, draws, pair):
    """{measure: (1 + DRAWS,)} of a claim.npz: its value and that of every draw of test groups."""
    labels, classes, out = file["labels"], file["classes"].tolist(), {}
    for name in file:
        if name.startswith("attention"):
            images = torch.from_numpy(file[name])
            of_image = [(*dirl.attention_bins(image), image.std().item()) for image in images]
            for what, column in zip((*BINS, SPREAD), np.array(of_image).T):
                measure = what + name.removeprefix("attention")
                out[measure] = np.array([column[index].mean() for index in draws])
    for name in file:
        if name in ABOUT or name.startswith("attention") or name.endswith(BAGS):
            continue
        truth, drawn = labels, draws
        if name.startswith("DSMIL"):
            truth, drawn = file[name + BAGS], draws_of(np.arange(len(file[name + BAGS])))
        out[f"accuracy, {name}"], out[f"AUC, {name}"] = score_statistics(truth, file[name], drawn)
        if pair and truth is labels:
            between = f"{name}, {pair[0]} against {pair[1]}"
            two = [classes.index(c) for c in pair]
            out[f"accuracy, {between}"], out[f"AUC, {between}"] = pair_statistics(
                labels, file[name], draws, two)
    return out


def read_runs(args):
    """{arm: [(seed, folder, {measure: (1 + DRAWS,)}), ...]} of the measured runs, in the order of ARMS."""
    found, draws = {}, {}
    by_data = read_json(Path(args.out) / "settings.json").get("stats") == "data"
    if args.pair and args.pair[0] == args.pair[1]:
        raise InputError("--pair: two different classes are needed")
    for path in sorted(Path(args.out).glob("*_seed*/claim.npz")):
        arm, seed = path.parent.name.rsplit("_seed", 1)
        file = read_npz(path)
        if arm not in ARMS or not seed.isdigit() or not file or not {*ABOUT, "attention"} <= file.keys():
            raise InputError(f"{path}: cannot be read as a measured run; delete it and run again")
        if file["attention"].shape[1] != TOKENS:
            raise InputError(f"{path}: an earlier version made it; delete it and run again")
        is_current = str(file["stamp"]).startswith(file_stamp(path.parent / "encoder.pt"))
        if is_current and by_data:  # an earlier version normalized "random" by ImageNet's statistics
            encoder, _ = load_encoder(path.parent / "encoder.pt")
            is_current = (encoder.mean, encoder.std) != (MEAN, STD)
        if not is_current:
            print(f"skipped: {path}: is of an earlier encoder; run measures it again")
            continue
        for name in args.pair or ():
            if name not in file["classes"]:
                raise InputError(f"--pair {name}: the classes are {', '.join(file['classes'])}")
        key = tuple(file["groups"])
        if key not in draws:
            draws[key] = draws_of(file["groups"])
        found.setdefault(arm, []).append((int(seed), path.parent, statistics(file, draws[key], args.pair)))
    if not found:
        raise InputError(f"{args.out}/: no measured run is there; first: python -m experiments.claim run "
                         f"--data FOLDER --out {args.out}")
    return {arm: sorted(found[arm], key=lambda run: run[0]) for arm in ARMS if arm in found}


def probe_curve(folder):
    """{epochs done: (low, middle, high, k-NN accuracy)} that --probe left in log.csv."""
    return {int(row["epoch"]) + 1: tuple(float(row[name]) for name in PROBED)
            for row in read_log(folder / "log.csv") if row[PROBED[-1]]}


def loss_shares(folder):
    """{head: the last epoch's mean loss / ln(its outputs)}: 1 if teacher and student are uniform.

    Losses without a centre, such as BYOL's and SimCLR's, have no such value: log.csv has no entropy of them.
    """
    log, config, out = read_log(folder / "log.csv"), read_json(folder / "config.json"), {}
    last = [row for row in log if row["epoch"] == log[-1]["epoch"]]
    for column in last[0] if last else ():
        head = column.removeprefix("loss_")
        if column.startswith("loss_") and last[0].get(f"entropy_{head}"):
            outputs = config["disentangled_dim" if head in dirl.DISENTANGLED else "out_dim"]
            out[head] = float(np.mean([float(row[column]) for row in last])) / np.log(outputs)
    return out


# ---------------------------------------------------------------- the table

def cell(values, seeds):
    """(1 + DRAWS,) of each seed as text: the mean, its sd over several seeds, the 95 % interval.

    If some of the seeds have not been measured, it says how many have.
    """
    values = np.stack(values)
    mean = values.mean(0)
    text = f"{mean[0]:.3f}"
    if len(values) > 1:
        text += f" ± {values[:, 0].std(ddof=1):.3f}"
    if len(mean) > 1:
        low, high = np.nanpercentile(mean[1:], (2.5, 97.5))
        text += f" ({low:.3f} to {high:.3f})"
    return text + (f" [{len(values)} of {seeds} seeds]" if len(values) < seeds else "")


def table_of(title, names, columns, seeds):
    """Rows of texts: title, then a row per name with a cell for each of columns.

    columns: [{name: [values of a seed, ...]}, ...]. A name without any value is left out.
    """
    rows = [title]
    for name in names:
        if any(name in column for column in columns):
            rows.append((name, *(cell(column[name], n) if name in column else ""
                                 for column, n in zip(columns, seeds))))
    return rows


def gather(dicts):
    """[{name: value}, ...] of several seeds to {name: [value, ...]}."""
    names = dict.fromkeys(name for one in dicts for name in one)
    return {name: [one[name] for one in dicts if name in one] for name in names}


def minus_baseline(runs, arm):
    """{measure: [difference to the arm's baseline of the same seed, ...]}."""
    base = {seed: rows for seed, _, rows in runs.get(BASELINE_OF.get(arm, "baseline"), ())}
    return gather([{name: rows[name] - base[seed][name] for name in rows if name in base[seed]}
                   for seed, _, rows in runs[arm] if seed in base])


def show(args):
    """Prints and draws what the measured runs of --out hold; 0."""
    runs, out = read_runs(args), Path(args.out)
    seeds = [len(results) for results in runs.values()]
    names = list(dict.fromkeys(name for results in runs.values() for _, _, rows in results for name in rows))
    title = [f"{arm}, seed{'s' * (len(results) > 1)} {' '.join(str(seed) for seed, _, _ in results)}"
             for arm, results in runs.items()]
    columns = [gather([rows for _, _, rows in results]) for results in runs.values()]
    compared = [arm for arm in runs if arm not in ("random", "baseline", *BASELINE_OF.values())]
    headings = [f"{arm} minus {BASELINE_OF[arm]}" if arm in BASELINE_OF else arm for arm in compared]
    heads = {symbol_of(head): head for head in ("f", *dirl.REGIONS, *dirl.DISENTANGLED)}
    losses = [gather([{name: [share[head]] for name, head in heads.items() if head in share} for share in
                      (loss_shares(folder) for _, folder, _ in results)]) for results in runs.values()]
    differences = [minus_baseline(runs, arm) for arm in compared]
    for rows in (table_of(("measure", *title), names, columns, seeds),
                 table_of(("arm minus baseline, same seeds", *headings), names, differences,
                          [len(runs[arm]) for arm in compared]),
                 table_of(("last epoch's loss / ln K", *title), list(heads), losses, seeds)):
        if len(rows) > 1:
            print_table(rows)
            print()
    print(f"in brackets: 95 % of {DRAWS} draws of test groups (DSMIL: of its synthetic slides); "
          "±: sd over seeds")
    if note := note_on_middle([rows[MIDDLE][0] for results in runs.values() for _, _, rows in results]):
        print(note)
    print("curves on the probe: epochs, tokens with attention 0.5 to 2, 20-NN accuracy")
    for arm, results in runs.items():
        for seed, folder, _ in results:
            if points := probe_curve(folder):
                print(f"{f'{arm}, seed {seed}':<28}"
                      + "  ".join(f"{epoch}: {p[1]:.1%} {p[3]:.3f}" for epoch, p in points.items()))
    write_csv(out / "claim.csv", [("arm", "seed", "measure", "value", "low", "high")] + [
        (arm, seed, name,
         *(f"{v:.4f}" for v in (rows[name][0], *np.nanpercentile(rows[name][1:], (2.5, 97.5)))))
        for arm, results in runs.items() for seed, _, rows in results for name in rows])
    plot_claim(runs, out / "claim.png")
    if args.overlay:
        overlay(runs, args, out / "claim_overlay.png")
    print(f"Wrote {out}/claim.csv, claim.png{', claim_overlay.png' if args.overlay else ''}")
    return 0


# ---------------------------------------------------------------- pictures

def plot_claim(runs, path):
    """Fig. 4 of each arm (all its seeds), and the middle bin's share and the k-NN accuracy over the epochs.

    The latter two have a line per seed.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    fig_4, middle, knn = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    pooled = {}
    for arm, results in runs.items():
        of_seed = [read_npz(folder / "claim.npz", "attention")["attention"] for _, folder, _ in results]
        pooled[arm] = np.concatenate([attention.ravel() for attention in of_seed])
    draw_distribution(fig_4, pooled, COLORS)
    for arm, results in runs.items():
        for points in (probe_curve(folder) for _, folder, _ in results):
            style = {"ms": 3, "lw": 1, "color": COLORS[arm]}
            middle.plot(list(points), [100 * p[1] for p in points.values()], "o-", **style)
            knn.plot(list(points), [p[3] for p in points.values()], "o-", **style)
    middle.set(xlabel="epochs", ylabel=f"{MIDDLE}, %")
    knn.set(xlabel="epochs", ylabel="20-NN accuracy on the probe")
    save_figure(figure, path)


@torch.no_grad()
def overlay(runs, args, path):
    """The same crops of --overlay with P_c and every arm's aggregated attention (first seed)."""
    encoders = {arm: load_encoder(results[0][1] / "encoder.pt") for arm, results in runs.items()}
    mpp = args.mpp or next(iter(encoders.values()))[1]["mpp"]
    found = find_data(args.overlay, mpp, slide_mpp=args.slide_mpp)
    if found.kind == "crops" and not args.mpp:
        found.mpp = file_mpp(found, mpp)
    print_skipped(prepare(found))
    crops = Crops(found, sorted(found.images))
    covered = crops.priors().mean(1)
    mixed = np.flatnonzero((covered > 0.2) & (covered < 0.8))  # crops that have both regions
    chosen = mixed[spread(len(mixed), args.crops)] if len(mixed) else spread(len(crops), args.crops)
    if not len(chosen):
        raise InputError(f"--overlay {args.overlay}: no crop is there; use another folder or --mpp")
    images, cells = zip(*(crops[int(i)] for i in chosen))
    attention = {arm: attention_of(encoder, torch.stack(images)) for arm, (encoder, _) in encoders.items()}
    plot_overlays(images, attention, [bin_centroids(xy, CROP) for xy in cells], path)
