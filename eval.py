"""Slide-level classification (3.6, A.1.2) and attention (4.2): python eval.py [slides] [--data demo].

Takes the newest run of the data set (or --checkpoint), writes features/<slide>.npz, trains DSMIL over --repeats
seeds and scores it on the test slides, counts the tokens' aggregated attention in the bins of Fig. 4, and draws.
python eval.py patches is patch-level classification, in patches.py.
"""
import argparse
import csv
import hashlib
import os
import re
import sys
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import data as data_py
import dirl
import mil
import prior
import views
from data import DATASETS
from errors import InputError, check_ranges, exit_code, renamed
from slides import CROP
from train import check_device, load, native_bf16, run_name, save


def arguments(argv):
    parser = argparse.ArgumentParser(prog="eval.py [slides]", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description="Features, DSMIL and attention of a pre-trained encoder.",
                                     epilog="Patch-level classification: python eval.py patches --help")
    add = parser.add_argument
    add("--data", default="demo", help=f"{', '.join(DATASETS)}, or a folder, as in train.py")
    add("--checkpoint", help="encoder.pt of another run (default: the newest run of the data set)")
    add("--mpp", type=float, help="um/px of the crops; default: what the encoder was trained at")
    add("--slide-mpp", type=float, help="um/px of slides that record none, as in train.py")
    add("--tissue", type=float, default=0.5, help="least share of tissue in a tile, as in train.py")
    add("--prior", default="auto", choices=data_py.PRIORS, help="whose cells the overlay shows, as in train.py")
    add("--repeats", type=int, default=5, help="trainings of DSMIL, each with a seed of its own")
    add("--epochs", type=int, default=200, help="of DSMIL; fewer where there are thousands of slides")
    add("--class-weights", action="store_true", help="weighs slides inversely to their class's count in training; where a class is rare")
    add("--export", nargs="+", default=(), choices=["clam", "csv"],
        help="also writes the features for other MIL code: clam/ is CLAM's pt_files and h5_files, csv/ is for DSMIL's datasets/")
    add("--attention-crops", type=int, default=1000, help="test crops whose attention is counted; more is steadier, slower")
    add("--overlays", type=int, default=4, help="crops in the attention picture")
    add("--batch", type=int, default=64, help="crops at a time; lower it when memory runs out")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1 or cpu")
    add("--precision", default="fp32", choices=["auto", "bf16", "fp32"], help="of the features; auto is faster where bf16 is native")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that cut tiles and read crops")
    add("--seed", type=int, default=0, help="of the split, where labels.csv has none, and of DSMIL's first run")
    args = parser.parse_args(argv)
    check_flags(args, "repeats", "epochs", "batch", "attention_crops", "overlays")
    return args


def check_flags(args, *names):
    """InputError where one of these flags is below 1, --seed below 0 or --device no device of this machine."""
    for name in names:
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1 is needed")
    check_ranges(args, seed=(0, 2 ** 31))
    check_device(args.device)


def find_encoder(checkpoint, data=None):
    """encoder.pt of --checkpoint, or of the run that was written last: of the data set, or (data=None) of all."""
    if checkpoint:
        path = Path(checkpoint)
        path = path / "encoder.pt" if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"--checkpoint {path}: is not there")
        return path
    pattern = f"{run_name(data)}_vit_*" if data else "*"
    runs = sorted(Path("runs").glob(f"{pattern}/encoder.pt"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise InputError(f"no run {f'of {data} ' if data else ''}in runs/; first: python train.py{f' --data {data}' if data else ''}")
    return runs[-1]


def stamp_of(path):
    """Sixteen letters that tell one file's content from another's."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def load_encoder(path):
    """The encoder of an encoder.pt, in eval mode, and the file's other values."""
    state = load(path)
    if not isinstance(state, dict) or "encoder" not in state or state.get("arch") not in dirl.ARCHS:
        raise InputError(f"{path}: is no encoder.pt of train.py")
    encoder = dirl.ARCHS[state["arch"]]()
    encoder.load_state_dict(state.pop("encoder"))
    return encoder.eval(), state


# ---------------------------------------------------------------- features

def represent(encoder, images, bf16=False):
    """f = the mean of the n tokens of T_L: uint8 images (B, 3, 224, 224) to (B, d) float32."""
    device = next(encoder.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        tokens = encoder(views.normalize(images.to(device).float() / 255))  # (B, n, d)
    return tokens.float().mean(1)


@torch.no_grad()
def embed(encoder, crops, args, what):
    """f = the mean of the n tokens of T_L, of every crop: (N, d) float32."""
    device = next(encoder.parameters()).device
    bf16 = args.precision == "bf16" or args.precision == "auto" and native_bf16(device)
    loader = DataLoader(crops, args.batch, collate_fn=data_py.collate, num_workers=args.workers if device.type == "cuda" else 0)
    out = []
    for images, _ in tqdm(loader, desc=what, unit="batch", leave=False, disable=len(loader) < 20):
        out.append(represent(encoder, images, bf16).cpu())
    return torch.cat(out).numpy()


def tiles_of(found, name):
    """What tells apart two ways of cutting a slide; features of other tiles are made anew."""
    info = data_py.tile_info(found, name) or {}
    return " {mpp} {tissue} {tiles}".format_map(info) if info else ""


def extract(encoder, found, folder, stamp, args):
    """features/<slide>.npz for each slide: features (N, d) and coords (N, 2); what this encoder made already stays."""
    wanted, names = [], []
    for name in sorted(found.images):
        path = folder / f"{name}.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                done = str(file["encoder"]) == stamp + tiles_of(found, name)
        except (OSError, ValueError, KeyError, BadZipFile):
            done = False
        names += [name] if done or data_py.tile_info(found, name) else []
        wanted += [] if done else [name]
    crops = data_py.Crops(found, [name for name in wanted if name in names], with_cells=False)
    owner = np.array(crops.owner)
    for name in tqdm(sorted(set(crops.owner)), desc="features, slides", leave=False):
        index = np.flatnonzero(owner == name)
        with renamed(folder / f"{name}.npz") as temp, open(temp, "wb") as file:
            np.savez(file, features=embed(encoder, Subset(crops, index.tolist()), args, name),
                     coords=crops.corners[index], encoder=np.array(stamp + tiles_of(found, name)))
    return names


def read_features(path):
    """A slide's features (N, d) as a tensor."""
    with np.load(path, allow_pickle=False) as file:
        return torch.from_numpy(file["features"])


# ---------------------------------------------------------------- features for other MIL code

def newer(path, features):
    """Is the export there, and written after the features that it was made of?"""
    return path.is_file() and path.stat().st_mtime_ns >= features.stat().st_mtime_ns


def export_clam(folder, names, out):
    """CLAM's layout: pt_files/<slide>.pt, a tensor (N, d), and h5_files/<slide>.h5, features and coords.

    Gives a line on what was left out, or "". The .h5 files need h5py, which nothing else here does.
    """
    try:
        import h5py
    except ImportError:
        h5py = None
    for name in tqdm(names, desc="clam, slides", leave=False):
        source, pt, h5 = folder / f"{name}.npz", out / "pt_files" / f"{name}.pt", out / "h5_files" / f"{name}.h5"
        if not newer(pt, source):
            save(pt, read_features(source))
        if h5py and not newer(h5, source):
            with np.load(source, allow_pickle=False) as file, renamed(h5) as temp, h5py.File(temp, "w") as to:
                to["features"], to["coords"] = file["features"], file["coords"]
    return "" if h5py else f"{out}/h5_files is left out: h5py is not installed (pip install h5py, then the same command)"


def export_csv(found, folder, names, out):
    """DSMIL's bags, for its datasets/ folder: <data>/<class>/<slide>.csv, a row a crop and a column a feature, and
    <data>/<data>.csv, each bag's path and the number of its class (in the order of the classes' names)."""
    index = [("path", "label")]
    for name in tqdm(names, desc="csv, slides", leave=False):
        source, label = folder / f"{name}.npz", found.labels[name]["label"]
        path = Path(found.name, re.sub(r"[^\w.-]+", "_", label), f"{name}.csv")
        if not newer(out / path, source):
            rows = read_features(source).numpy()
            with renamed(out / path) as temp:  # nine digits give back every float32
                np.savetxt(temp, rows, "%.9g", ",", header=",".join(map(str, range(rows.shape[1]))), comments="")
        index.append((f"datasets/{path.as_posix()}", found.classes.index(label)))
    write_csv(out / found.name / f"{found.name}.csv", index)


# ---------------------------------------------------------------- slides

def classify_slides(found, folder, names, args):
    """DSMIL over --repeats seeds: rows of (seed, accuracy, AUC, F1) on the test slides, and the mean class scores.

    Beside it the row of a logistic regression on each slide's mean feature: what the features are worth without MIL.
    """
    check_classes(found, names)
    bags = {part: [(read_features(folder / f"{n}.npz").to(args.device), found.classes.index(found.labels[n]["label"]))
                   for n in found.split(part) if n in names] for part in ("train", "val", "test")}
    weights = mil.class_weights([label for _, label in bags["train"]], len(found.classes)) if args.class_weights else None
    truth, rows, total = np.array([label for _, label in bags["test"]]), [], 0
    for seed in range(args.seed, args.seed + args.repeats):
        bar = tqdm(total=args.epochs, desc=f"DSMIL, seed {seed}", leave=False)
        model = mil.train_dsmil(bags["train"], bags["val"], len(found.classes), args.epochs, seed=seed, weights=weights,
                                progress=lambda epoch, loss, val: (bar.set_postfix(loss=f"{loss:.3f}", val=f"{val:.3f}"), bar.update()))
        bar.close()
        scores = torch.stack([mil.dsmil_predict(model, x) for x, _ in bags["test"]]).cpu().numpy()
        rows.append((seed, accuracy_score(truth, scores.argmax(1)), auc(truth, scores), macro_f1(truth, scores)))
        total = total + scores / args.repeats
    return rows, total, linear_on_means(bags, truth)


def linear_on_means(bags, truth):
    """Accuracy, AUC and F1 of standardised mean features (d,) and logistic regression, trained on train alone."""
    x, y, test = (torch.stack([bag.mean(0) for bag, _ in bags["train"]]).cpu(), [label for _, label in bags["train"]],
                  torch.stack([bag.mean(0) for bag, _ in bags["test"]]).cpu())
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(x.numpy(), y)
    scores = model.predict_proba(test.numpy())
    return accuracy_score(truth, scores.argmax(1)), auc(truth, scores), macro_f1(truth, scores)


def check_classes(found, names):
    """InputError where a class has no slide among names for training or for the test, or none is for validation."""
    for part in ("train", "val", "test"):
        held = {found.labels[name]["label"] for name in found.split(part) if name in names}
        missing = [label for label in found.classes if label not in held]
        if missing and (part != "val" or not held):
            raise InputError(f"{found.source}/labels.csv: no usable {part} slide of {', '.join(missing)}; add slides or change the split")


def auc(truth, scores):
    """Area under the ROC curve of scores (N, C); for more than two classes the mean of one against the rest.

    By ranks (Mann and Whitney): scikit-learn's roc_auc_score takes a hundred times as long, and a bootstrap asks often.
    """
    values = scores[:, 1:] - scores[:, :1] if scores.shape[1] == 2 else scores
    positive = truth[:, None] == (np.arange(scores.shape[1]) if scores.shape[1] > 2 else [1])
    count = positive.sum(0)
    ranks = (rankdata(values, axis=0) * positive).sum(0)
    return float(np.mean((ranks - count * (count + 1) / 2) / (count * (len(truth) - count))))


def macro_f1(truth, scores):
    """The mean of the classes' F1, each class as heavy as the other: BRIGHT's measure (A.2)."""
    return f1_score(truth, scores.argmax(1), labels=range(scores.shape[1]), average="macro", zero_division=0)


# ---------------------------------------------------------------- attention

def attention(encoder, images):
    """Aggregated attention of uint8 images (B, 3, 224, 224), (B, n); the n values of an image sum to n."""
    device = next(encoder.parameters()).device
    return dirl.aggregated_attention(encoder.last_attention(views.normalize(images.to(device).float() / 255)))


@torch.no_grad()
def attention_of(encoder, crops, args):
    """attention of all crops, (N, n), on the CPU."""
    loader = DataLoader(crops, args.batch, collate_fn=data_py.collate)
    return torch.cat([attention(encoder, images).cpu() for images, _ in tqdm(loader, desc="attention", leave=False)])


def draw_distribution(axis, aggregated, colors=None):
    """Fig. 4: the distribution of tokens' aggregated attention, the bins' borders, and each encoder's share in 0.5 to 2.

    aggregated: {title: values}, any shape. Over a logarithmic axis, where 0.5 and 2 are as far from 1; what lies beyond is
    drawn at its ends.
    """
    edges = np.geomspace(2.0 ** -4, 2.0 ** 4, 65)
    for title, values in aggregated.items():
        values = np.asarray(values).ravel()
        axis.hist(values.clip(edges[0], edges[-1]), edges, weights=np.full(len(values), 100 / len(values)), histtype="step", lw=1.4,
                  color=(colors or {}).get(title), label=f"{title}: {dirl.attention_bins(torch.from_numpy(values))[1]:.1%}")
    axis.set_xscale("log", base=2)
    for border in (0.5, 2):
        axis.axvline(border, color="grey", ls=":", lw=1)
    axis.set_xticks([2.0 ** k for k in range(-4, 5, 2)] + [0.5, 2], ["1/16", "1/4", "1", "4", "16", "1/2", "2"])
    axis.set(xlabel="aggregated attention of a token", ylabel="tokens, % (64 steps)")
    axis.legend(title="between 0.5 and 2", fontsize=8, title_fontsize=8)


def plot_distribution(aggregated, title, path):
    """Fig. 4 of one encoder."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axis = figure.subplots()
    draw_distribution(axis, {title: aggregated})
    with renamed(path) as temp:
        figure.savefig(temp, format="png", dpi=130)


def plot_overlays(crops, attention, priors, path):
    """A row a crop: the crop, its patches with a cell (P_c), and over it the aggregated attention of each encoder.

    crops: images (3, 224, 224); attention: {title: (B, n)}; priors: P_c (n,) of each crop.
    """
    from matplotlib.figure import Figure
    count, columns = len(crops), 2 + len(attention)
    figure = Figure(figsize=(2.2 * columns, 2.2 * count), layout="constrained")
    axes = figure.subplots(count, columns, squeeze=False)
    for row, (image, p) in enumerate(zip(crops, priors)):
        grid = int(len(p) ** 0.5)
        grow = lambda v: np.asarray(Image.fromarray(v.view(grid, grid).numpy()).resize((CROP,) * 2, Image.NEAREST))
        for axis in axes[row]:
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set_axis_off()
        green = np.zeros((CROP, CROP, 4))
        green[..., 1], green[..., 3] = 0.8, 0.35 * grow(p)
        axes[row, 1].imshow(green)
        for axis, heat in zip(axes[row, 2:], attention.values()):
            shown = axis.imshow(grow(heat[row]), cmap="jet", alpha=0.5, vmin=0, vmax=3)
    for axis, title in zip(axes[0], ("crop", "patches with a cell, P_c", *attention)):
        axis.set_title(title, fontsize=9)
    figure.colorbar(shown, ax=axes[:, -1], shrink=0.6)
    with renamed(path) as temp:
        figure.savefig(temp, format="png", dpi=110)


def spread(count, wanted):
    """Up to wanted of count indices, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist()


# ---------------------------------------------------------------- script

def write_csv(path, rows):
    with renamed(path) as temp, open(temp, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def print_table(rows):
    """Rows of texts, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def evaluate(args):
    path = find_encoder(args.checkpoint, args.data)
    encoder, about = load_encoder(path)
    encoder.to(args.device)
    run, stamp = path.parent, stamp_of(path)
    mpp = args.mpp or (None if args.data in DATASETS else about["mpp"])
    found = data_py.find_data(args.data, mpp, args.slide_mpp, args.seed, args.prior)
    if args.export and found.kind != "slides":
        raise InputError(f"--export: {found.source} holds crops and no slides; leave the flag out")
    if "csv" in args.export and not found.labels:
        raise InputError(f"--export csv: DSMIL's bags have labels; write {found.source}/labels.csv (slide,label) or take --export clam")
    if found.kind == "slides" and found.labels:
        check_classes(found, found.images)  # now, rather than hours later
    failed = data_py.prepare(found, args.slide_mpp, args.tissue, args.workers)
    for line in failed:
        print("passed over:", line)
    print(f"{path}: {about['method']} {about['arch']} of {about['data']}, step {about['step']}"
          + (". The demo's slides are synthetic." if args.data == "demo" else ""))
    part = "test" if found.split("test") else "train"
    crops = data_py.Crops(found, found.split(part))
    if not len(crops):
        raise InputError(f"{found.source}: no {part} image has cells of --prior {args.prior}; take --prior auto, or one that they have")
    table = [("measure", "mean", "sd", "over")]
    if found.kind == "slides":
        names = extract(encoder, found, run / "features", stamp, args)
        if "clam" in args.export and (left_out := export_clam(run / "features", names, run / "clam")):
            print(left_out)
        if "csv" in args.export:
            export_csv(found, run / "features", names, run / "csv")
        if found.labels:
            rows, scores, linear = classify_slides(found, run / "features", names, args)
            for i, measure in ((1, "accuracy"), (2, "AUC"), (3, "macro F1")):
                values = [row[i] for row in rows]
                table.append((f"slide {measure}, DSMIL", f"{np.mean(values):.4f}", f"{np.std(values, ddof=1) if len(values) > 1 else 0:.4f}",
                              f"{len(scores)} test slides, {len(rows)} seeds"))
            for measure, value in zip(("accuracy", "AUC", "macro F1"), linear):
                table.append((f"slide {measure}, mean feature, logistic regression", f"{value:.4f}", "", f"{len(scores)} test slides"))
            write_csv(run / "slides.csv", [("seed", "accuracy", "auc", "macro_f1"), *rows])
            test = [n for n in found.split("test") if n in names]
            write_csv(run / "predictions.csv", [("slide", "label", *found.classes)] + [
                (n, found.labels[n]["label"], *(f"{v:.4f}" for v in row)) for n, row in zip(test, scores)])
        else:
            print("No labels.csv: features are written, no slide is classified.")
    counted = Subset(crops, spread(len(crops), args.attention_crops))
    columns = attention_of(encoder, counted, args)
    bins = dirl.attention_bins(columns)
    for name, share in zip(("0 to 0.5", "0.5 to 2", "over 2"), bins):
        table.append((f"tokens with attention {name}", f"{share:.4f}", "", f"{len(counted)} {f'{part} ' if found.labels else ''}crops"))
    covered = crops.priors().mean().item()
    table.append(("patches with a cell", f"{covered:.4f}", "", f"{len(crops)} crops"))
    plot_distribution(columns, f"{about['data']}, {about['arch']}, {about['method']}", run / "attention_distribution.png")
    chosen = spread(len(counted), args.overlays)
    plot_overlays([counted[i][0] for i in chosen], {"aggregated attention": columns[chosen]},
                  [prior.bin_centroids(counted[i][1], CROP) for i in chosen], run / "attention_overlay.png")
    write_csv(run / "results.csv", table)
    print_table(table)
    made = ["results.csv", "attention_distribution.png", "attention_overlay.png", *(f"{kind}/" for kind in args.export)]
    made += ["features/"] * (found.kind == "slides") + ["slides.csv", "predictions.csv"] * (found.kind == "slides" and bool(found.labels))
    print(f"Wrote {run}/{', '.join(made)}")
    if failed:
        print(f"{len(failed)} images were passed over (see above).")
    return 1 if failed else 0


def run_command(argv):
    """The sub-command that the first word names; without one it is slides."""
    command, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("slides", argv)
    if command == "patches":
        import patches  # it takes helpers from this module
        return patches.evaluate(patches.arguments(rest))
    if command != "slides":
        raise InputError(f"{command}: is neither slides nor patches; python eval.py [slides] --help, python eval.py patches --help")
    return evaluate(arguments(rest))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    return exit_code("eval.py", lambda: run_command(argv), again="run it again (the features of finished slides stay)")


if __name__ == "__main__":
    import eval  # this file under its own name, so that patches.py does not load it a second time
    sys.exit(eval.main())
