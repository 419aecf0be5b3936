"""Slide-level classification (3.6, A.1.3) and attention (4.2): python eval.py [--data demo].

Takes the newest run of the data set (or --checkpoint), writes features/<slide>.npz, trains DSMIL over --repeats
seeds and scores it on the test slides, counts the tokens' aggregated attention in the bins of Fig. 4, and draws.
"""
import argparse
import csv
import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, roc_auc_score
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import data as data_py
import dirl
import mil
import prior
import views
from data import DATASETS
from prior import InputError
from slides import CROP, renamed
from train import load, native_bf16, run_name


def arguments(argv):
    parser = argparse.ArgumentParser(description="Features, DSMIL and attention of a pre-trained encoder.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="demo", help=f"{', '.join(DATASETS)}, or a folder, as in train.py")
    add("--checkpoint", help="encoder.pt of another run (default: the newest run of the data set)")
    add("--mpp", type=float, help="um/px of the crops; default: what the encoder was trained at")
    add("--slide-mpp", type=float, help="um/px of slides that record none, as in train.py")
    add("--tissue", type=float, default=0.5, help="least share of tissue in a tile, as in train.py")
    add("--repeats", type=int, default=5, help="trainings of DSMIL, each with a seed of its own")
    add("--epochs", type=int, default=200, help="of DSMIL; fewer where there are thousands of slides")
    add("--attention-crops", type=int, default=1000, help="test crops whose attention is counted; more is steadier, slower")
    add("--overlays", type=int, default=4, help="crops in the attention picture")
    add("--batch", type=int, default=64, help="crops at a time; lower it when memory runs out")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1 or cpu")
    add("--precision", default="fp32", choices=["auto", "bf16", "fp32"], help="of the features; auto is faster where bf16 is native")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that cut tiles and read crops")
    add("--seed", type=int, default=0, help="of the split, where labels.csv has none, and of DSMIL's first run")
    args = parser.parse_args(argv)
    for name in ("repeats", "epochs", "batch", "attention_crops"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1 is needed")
    return args


def find_encoder(args):
    """encoder.pt of --checkpoint, or of the run of the data set that was written last."""
    if args.checkpoint:
        path = Path(args.checkpoint)
        path = path / "encoder.pt" if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"--checkpoint {path}: is not there")
        return path
    runs = sorted(Path("runs").glob(f"{run_name(args.data)}_vit_*/encoder.pt"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise InputError(f"no run of {args.data} in runs/; first: python train.py --data {args.data}")
    return runs[-1]


def load_encoder(path):
    """The encoder of an encoder.pt, in eval mode, and the file's other values."""
    state = load(path)
    if not isinstance(state, dict) or "encoder" not in state or state.get("arch") not in dirl.ARCHS:
        raise InputError(f"{path}: is no encoder.pt of train.py")
    encoder = dirl.ARCHS[state["arch"]]()
    encoder.load_state_dict(state.pop("encoder"))
    return encoder.eval(), state


# ---------------------------------------------------------------- features

@torch.no_grad()
def embed(encoder, crops, args, what):
    """f = the mean of the n tokens of T_L, of every crop: (N, d) float32."""
    device = next(encoder.parameters()).device
    bf16 = args.precision == "bf16" or args.precision == "auto" and native_bf16(device)
    loader = DataLoader(crops, args.batch, collate_fn=data_py.collate, num_workers=args.workers if device.type == "cuda" else 0)
    out = []
    for images, _ in tqdm(loader, desc=what, unit="batch", leave=False, disable=len(loader) < 20):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            tokens = encoder(views.normalize(images.to(device).float() / 255))  # (B, n, d)
        out.append(tokens.float().mean(1).cpu())
    return torch.cat(out).numpy()


def extract(encoder, found, folder, stamp, args):
    """features/<slide>.npz for each slide: features (N, d) and coords (N, 2); what this encoder made already stays."""
    wanted, names = [], []
    for name in sorted(found.images):
        path = folder / f"{name}.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                done = str(file["encoder"]) == stamp
        except (OSError, ValueError, KeyError):
            done = False
        names += [name] if done or data_py.tile_info(found, name) else []
        wanted += [] if done else [name]
    crops = data_py.Crops(found, [name for name in wanted if name in names])
    owner = np.array(crops.owner)
    for name in tqdm(sorted(set(crops.owner)), desc="features, slides", leave=False):
        index = np.flatnonzero(owner == name)
        with renamed(folder / f"{name}.npz") as temp, open(temp, "wb") as file:
            np.savez(file, features=embed(encoder, Subset(crops, index.tolist()), args, name),
                     coords=crops.corners[index], encoder=np.array(stamp))
    return names


def read_features(path):
    """A slide's features (N, d) as a tensor."""
    with np.load(path, allow_pickle=False) as file:
        return torch.from_numpy(file["features"])


# ---------------------------------------------------------------- slides

def classify_slides(found, folder, names, args):
    """DSMIL over --repeats seeds: rows of (seed, accuracy, AUC) on the test slides, and the mean class scores."""
    bags = {part: [(read_features(folder / f"{n}.npz").to(args.device), found.classes.index(found.labels[n]["label"]))
                   for n in found.split(part) if n in names] for part in ("train", "val", "test")}
    for part, held in bags.items():
        missing = [c for i, c in enumerate(found.classes) if i not in {label for _, label in held}]
        if missing and (part != "val" or not held):
            raise InputError(f"{found.source}/labels.csv: no usable {part} slide of {', '.join(missing)}; add slides or change the split")
    truth, rows, total = np.array([label for _, label in bags["test"]]), [], 0
    for seed in range(args.seed, args.seed + args.repeats):
        bar = tqdm(total=args.epochs, desc=f"DSMIL, seed {seed}", leave=False)
        model = mil.train_dsmil(bags["train"], bags["val"], len(found.classes), args.epochs, seed=seed,
                                progress=lambda epoch, loss, val: (bar.set_postfix(loss=f"{loss:.3f}", val=f"{val:.3f}"), bar.update()))
        bar.close()
        scores = torch.stack([mil.dsmil_predict(model, x) for x, _ in bags["test"]]).cpu().numpy()
        rows.append((seed, accuracy_score(truth, scores.argmax(1)), auc(truth, scores)))
        total = total + scores / args.repeats
    return rows, total


def auc(truth, scores):
    """Area under the ROC curve; for more than two classes the mean of one against the rest."""
    if scores.shape[1] == 2:
        return roc_auc_score(truth, scores[:, 1] - scores[:, 0])
    return float(np.mean([roc_auc_score(truth == c, scores[:, c]) for c in range(scores.shape[1])]))


# ---------------------------------------------------------------- attention

@torch.no_grad()
def attention_of(encoder, crops, args):
    """Aggregated attention of every token of the crops, (N, n); the n values of a crop sum to n."""
    device = next(encoder.parameters()).device
    loader = DataLoader(crops, args.batch, collate_fn=data_py.collate)
    return torch.cat([dirl.aggregated_attention(encoder.last_attention(views.normalize(images.to(device).float() / 255))).cpu()
                      for images, _ in tqdm(loader, desc="attention", leave=False)])


def plot_bins(bins, title, path):
    """Fig. 4: the share of tokens in each bin of aggregated attention."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(4.2, 3), layout="constrained")
    axis = figure.subplots()
    bars = axis.bar(["0 to 0.5", "0.5 to 2", "over 2"], [100 * b for b in bins], color=["#8da0cb", "#66a61e", "#d95f02"])
    axis.bar_label(bars, fmt="%.1f %%")
    axis.set(xlabel="aggregated attention of a token", ylabel="tokens, %", ylim=(0, 108), title=title)
    with renamed(path) as temp:
        figure.savefig(temp, format="png", dpi=130)


def plot_overlays(crops, attention, priors, path):
    """A row a crop: the crop, its patches with a cell (P_c), and the aggregated attention over it."""
    from matplotlib.figure import Figure
    count = len(crops)
    figure = Figure(figsize=(6.6, 2.2 * count), layout="constrained")
    axes = figure.subplots(count, 3, squeeze=False)
    for row, (image, heat, p) in enumerate(zip(crops, attention, priors)):
        grid = int(len(heat) ** 0.5)
        grow = lambda v: np.asarray(Image.fromarray(v.view(grid, grid).numpy()).resize((CROP,) * 2, Image.NEAREST))
        for axis in axes[row]:
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set_axis_off()
        axes[row, 1].imshow(grow(p), cmap="Greens", alpha=0.45, vmin=0, vmax=1)
        shown = axes[row, 2].imshow(grow(heat), cmap="jet", alpha=0.5, vmin=0, vmax=3)
    for axis, title in zip(axes[0], ("crop", "patches with a cell, P_c", "aggregated attention")):
        axis.set_title(title, fontsize=9)
    figure.colorbar(shown, ax=axes[:, 2], shrink=0.6)
    with renamed(path) as temp:
        figure.savefig(temp, format="png", dpi=110)


def spread(count, wanted):
    """Up to wanted of count indices, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist()


# ---------------------------------------------------------------- script

def write_csv(path, rows):
    with renamed(path) as temp, open(temp, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def evaluate(args):
    path = find_encoder(args)
    encoder, about = load_encoder(path)
    encoder.to(args.device)
    run, stamp = path.parent, hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    mpp = args.mpp or (None if args.data in DATASETS else about["mpp"])
    found = data_py.find_data(args.data, mpp, args.slide_mpp, args.seed)
    failed = data_py.prepare(found, args.slide_mpp, args.tissue, args.workers)
    for line in failed:
        print("passed over:", line)
    print(f"{path}: {about['method']} {about['arch']} of {about['data']}, step {about['step']}"
          + (". The demo's slides are synthetic." if args.data == "demo" else ""))
    table = [("measure", "mean", "sd", "over")]
    if found.kind == "slides":
        names = extract(encoder, found, run / "features", stamp, args)
        if found.labels:
            rows, scores = classify_slides(found, run / "features", names, args)
            for i, measure in ((1, "accuracy"), (2, "AUC")):
                values = [row[i] for row in rows]
                table.append((f"slide {measure}", f"{np.mean(values):.4f}", f"{np.std(values, ddof=1) if len(values) > 1 else 0:.4f}",
                              f"{len(scores)} test slides, {len(rows)} seeds"))
            write_csv(run / "slides.csv", [("seed", "accuracy", "auc"), *rows])
            test = [n for n in found.split("test") if n in names]
            write_csv(run / "predictions.csv", [("slide", "label", *found.classes)] + [
                (n, found.labels[n]["label"], *(f"{v:.4f}" for v in row)) for n, row in zip(test, scores)])
        else:
            print("No labels.csv: features are written, no slide is classified.")
    crops = data_py.Crops(found, found.split("test") or found.split("train"))
    part = Subset(crops, spread(len(crops), args.attention_crops))
    attention = attention_of(encoder, part, args)
    bins = dirl.attention_bins(attention)
    for name, share in zip(("0 to 0.5", "0.5 to 2", "over 2"), bins):
        table.append((f"tokens with attention {name}", f"{share:.4f}", "", f"{len(part)} {'test ' if found.labels else ''}crops"))
    covered = crops.priors().mean().item()
    table.append(("patches with a cell", f"{covered:.4f}", "", f"{len(crops)} crops"))
    plot_bins(bins, f"{about['data']}, {about['arch']}, {about['method']}", run / "attention_bins.png")
    chosen = spread(len(part), args.overlays)
    plot_overlays([part[i][0] for i in chosen], attention[chosen],
                  [prior.bin_centroids(part[i][1], CROP) for i in chosen], run / "attention_overlay.png")
    write_csv(run / "results.csv", table)
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(f"Wrote {run}/results.csv, attention_bins.png, attention_overlay.png"
          + (", features/" if found.kind == "slides" else "") + (", slides.csv, predictions.csv" if found.kind == "slides" and found.labels else ""))
    if failed:
        print(f"{len(failed)} images were passed over (see above).")
    return 1 if failed else 0


def main(argv=None):
    try:
        return evaluate(arguments(argv))
    except InputError as error:
        print("eval.py:", error, file=sys.stderr)
        return 2
    except (torch.OutOfMemoryError, MemoryError):
        print("eval.py: out of memory; lower --batch", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"eval.py: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eval.py: stopped; finished slides stay, run it again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
