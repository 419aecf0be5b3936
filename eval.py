"""Evaluation of a pre-trained encoder (4, A.1).

    python eval.py [slides] [--data demo]
    python eval.py patches --data mhist|chaoyang|FOLDER

slides takes the newest run of the data set (or --checkpoint), writes features/<slide>.npz, trains DSMIL over
--repeats seeds and scores it on the test slides (3.6, A.1.2), counts the tokens' aggregated attention in the
bins of Fig. 4, and draws the attention. With --compare random, the same of the network as it started.

patches classifies images (4.1, Table 2). The training set is split into --folds stratified folds; one
validates, the others train, and the test set is scored by the epoch that was best on the validation fold.
Writes patches.csv (a row per fold) and patches_predictions.csv (the folds' mean score of each test image).

Nothing is chosen on the test set, and an encoder that has seen a test image is refused.
"""
import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import dirl
import mil
from common import classify, encoders
from common.encoders import attention_of, represent
from common.errors import InputError, Parser, check_ranges, exit_code_of, print_skipped, run_script
from common.export import export_clam, export_csv, export_geojson, read_features
from common.figures import plot_distribution, plot_overlays, spread
from common.files import atomic_write, file_stamp, merge_csv, read_json, read_npz, write_csv
from common.flags import add_max_gigapixels
from common.metrics import measures_of
from common.patches import PATCH_KEYS, fold_results, report_folds
from common.pool import add_shard
from common.report import last_losses, row_of, write_results
from data import Crops, collate
from demo.truth import check_with_truth, draw_slide
from prior import bin_centroids
from wsi.cache import file_mpp, keep_shard, load_crops, prepare_tiles, ready_cells, tile_info, tile_side
from wsi.datasets import DATASETS, add_data_flags, run_name
from wsi.slides import CROP
from wsi.splits import check_unseen, find_data

MEASURES = ("accuracy", "AUC", "macro F1")
FEW_SLIDES = 100  # training slides; with fewer DSMIL needs other settings than the paper's
FEW_DECAY = 5e-3  # DSMIL's weight decay for these, the demo's


# ---------------------------------------------------------------- flags

def add_common(add, batch, seed):
    """Flags of both commands."""
    add("--checkpoint", help="encoder.pt or its run (default: the newest run)")
    add("--batch", type=int, default=batch, help="images at a time; lower it if memory runs out")
    add("--precision", default="fp32", choices=["auto", "bf16", "fp32"],
        help="auto is faster if bf16 is native")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1 or cpu")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1),
        help="processes that cut tiles and read images")
    add("--seed", type=int, default=0, help=seed)


def slides_arguments(argv):
    parser = Parser(
        prog="python eval.py slides", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Features, DSMIL and attention of a pre-trained encoder.",
        epilog="Patch-level classification: python eval.py patches --help")
    add = parser.add_argument
    add_data_flags(add)
    add("--compare", default="none", choices=["none", "random"],
        help="random: the same measures of the same network as it started, in columns beside the trained "
             "one; says what the training is worth, and takes as long again")
    add("--repeats", type=int, default=5, help="trainings of DSMIL, each with its own seed")
    add("--epochs", type=int, default=200, help="of DSMIL; fewer if there are thousands of slides")
    add("--mil-weight-decay", type=float, default=5e-2,
        help="of DSMIL, the paper's; lower for few slides, whose instance attention it makes all the same")
    add("--standardize", action=argparse.BooleanOptionalAction, default=False,
        help="takes each feature's mean off and divides by its sd, both over the training slides, before "
             "DSMIL; for few slides, and features with a large mean, which hide from it what differs")
    add("--class-weights", action="store_true",
        help="weights slides inversely to their class's count in training; if a class is rare")
    add("--export", nargs="+", default=(), choices=["clam", "csv", "geojson"],
        help="clam/: features, dataset CSV and splits as CLAM has them; csv/: for DSMIL's datasets/; "
             "geojson/: tiles and cells of each slide for QuPath")
    add("--attention-crops", type=int, default=1000,
        help="test crops whose attention is counted; more is steadier and slower")
    add("--overlays", type=int, default=4, help="crops in the attention picture")
    add_max_gigapixels(add)
    add_shard(add)
    add_common(add, 64, "of DSMIL's first training")
    if parser.parse_known_args(argv)[0].data == "demo":
        parser.set_defaults(compare="random", mil_weight_decay=FEW_DECAY, standardize=True, repeats=3)
    args = parser.parse_args(argv)
    check_ranges(args, attention_crops=(1, 1e9), overlays=(1, 100), repeats=(1, 1e4),
                 mil_weight_decay=(0, 10))
    return check_common(args)


def patches_arguments(argv):
    parser = Parser(
        prog="python eval.py patches", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Fine-tunes an encoder on labelled images, or fits a linear classifier to its features.")
    add = parser.add_argument
    add("--data", default="mhist",
        help="mhist, chaoyang, or a folder with labels.csv: image,label[,split][,patient]")
    add("--encoder", nargs="+", default=["checkpoint"], choices=["checkpoint", "random", "pixels"],
        help="what is classified; as baselines random, an untrained encoder, and pixels, the image's colour "
             "statistics (linear)")
    add("--arch", choices=list(dirl.ARCHS),
        help="of --encoder random (default: the checkpoint's, else vit_t)")
    add("--linear", action="store_true",
        help="frozen features and logistic regression: seconds where fine-tuning takes hours")
    add("--folds", type=int, default=5, help="of the training set; fewer if a class has few images")
    add("--epochs", type=int, help="more for few images; 45 for chaoyang")
    add("--lr", type=float, help="learning rate; lower it if the loss blows up; 1e-4 for chaoyang")
    add("--weight-decay", type=float, help="of AdamW (the paper names no optimizer); higher if it overfits")
    add("--milestones", type=int, nargs="*",
        help="epochs after which lr is divided by 10; change with --epochs; 20 30 40 for chaoyang")
    add_data_flags(add, "--split-seed")
    add_common(add, 128, "of folds, training, random encoder and bootstrap")
    parser.set_defaults(**classify.SETTINGS["mhist"])
    parser.set_defaults(**classify.SETTINGS.get(parser.parse_known_args(argv)[0].data, {}))
    args = parser.parse_args(argv)
    check_ranges(args, folds=(2, 1000), lr=(0, 10), weight_decay=(0, 10))
    return check_common(args)


def check_common(args):
    check_ranges(args, epochs=(1, 1e6), batch=(1, 1e6), workers=(0, 1024), seed=(0, 2 ** 31))
    encoders.check_device(args.device)
    args.bf16 = encoders.use_bf16(args.precision, args.device)
    return args


# ---------------------------------------------------------------- features

@torch.no_grad()
def embed(function, crops, args, what):
    """function of uint8 images (B, 3, 224, 224), over all crops: (N, ...) on the CPU."""
    cuda = torch.device(args.device).type == "cuda"
    loader = DataLoader(crops, args.batch, collate_fn=collate, num_workers=args.workers if cuda else 0)
    bar = tqdm(loader, desc=what, unit="batch", leave=False, disable=len(loader) < 20)
    return torch.cat([function(images).cpu() for images, _ in bar])


def is_current(path, stamp):
    """Are these features whole, and made from what the stamp says?"""
    kept = read_npz(path, "features", "coords", "encoder")
    return bool(kept) and str(kept["encoder"]) == stamp


def features_stamp(found, name, encoder_stamp, args):
    """What features are made from: encoder, precision, the slide's file and its tiles; None without tiles."""
    info = tile_info(found, name)
    if info is None:
        return None
    precision = "bf16" if args.bf16 else "fp32"
    cut_from = "{file_name} {file_hash} pixels {pixels} {mpp} {slide_mpp} {tissue} {tiles}".format_map(info)
    return f"{encoder_stamp} {precision} {cut_from}"


def extract(encoder, found, folder, encoder_stamp, args):
    """features/<slide>.npz of each slide that has tiles: features (N, d) and coords (N, 2) in level-0 px.

    Those made from the same encoder and tiles are kept. Gives the slides' names.
    """
    stamps = {name: features_stamp(found, name, encoder_stamp, args) for name in sorted(found.images)}
    stamps = {name: stamp for name, stamp in stamps.items() if stamp}
    todo = [name for name, stamp in stamps.items() if not is_current(folder / f"{name}.npz", stamp)]
    for name in tqdm(todo, desc="features, slides", leave=False):
        crops = Crops(found, [name], with_cells=False)
        features = embed(lambda x: represent(encoder, x, args.bf16), crops, args, name).numpy()
        with atomic_write(folder / f"{name}.npz") as temp, open(temp, "wb") as file:
            np.savez(file, features=features, coords=crops.corners, encoder=np.array(stamps[name]))
    return list(stamps)


def extract_shard(encoder, found, path, args):
    """Tiles and the trained network's features of the slides of --shard; gives the exit code."""
    keep_shard(found, args.shard)
    failed = prepare_tiles(found, args.tissue, args.workers, args.max_gigapixels) if found.images else []
    print_skipped(failed)
    names = extract(encoder, found, path.parent / "features", file_stamp(path), args)
    print(f"Wrote {path.parent}/features/ of the {len(names)} slides of --shard {args.shard}. "
          "Next, when all shards are done: the same without --shard")
    return exit_code_of(failed)


# ---------------------------------------------------------------- slides

def check_classes(found, names):
    """InputError if a class has no training or test slide among names, or there is no val slide at all."""
    for part in ("train", "val", "test"):
        there = {found.labels[name]["label"] for name in found.split(part) if name in names}
        missing = [label for label in found.classes if label not in there]
        if missing and (part != "val" or not there):
            raise InputError(f"{found.source}/labels.csv: no usable {part} slide of {', '.join(missing)}; "
                             "add slides or change the split")


def warn_of_few_slides(count, args):
    """One line where the paper's settings of DSMIL are for more training slides than these."""
    if count < FEW_SLIDES and (args.mil_weight_decay > FEW_DECAY or not args.standardize):
        print(f"warning: {count} training slides: DSMIL's defaults are the paper's, for hundreds; with fewer "
              f"than {FEW_SLIDES} try --standardize --mil-weight-decay {FEW_DECAY:g}")


def train_and_score(bags, classes, args):
    """DSMIL over --repeats seeds: [(seed, accuracy, AUC, macro F1), ...] on test bags, and mean scores.

    Also the instance attention (repeats, N) of each test bag for its own class.
    """
    truth, rows, total = np.array([label for _, label in bags["test"]]), [], 0
    weights = mil.class_weights([y for _, y in bags["train"]], classes) if args.class_weights else None
    attention = [[] for _ in truth]
    for seed in range(args.seed, args.seed + args.repeats):
        with tqdm(total=args.epochs, desc=f"DSMIL, seed {seed}", leave=False, mininterval=0.5) as bar:
            def progress(epoch, loss, val_loss):
                bar.set_postfix(loss=f"{loss:.3f}", val=f"{val_loss:.3f}", refresh=False)
                bar.update()
            model = mil.train_dsmil(bags["train"], bags["val"], classes, args.epochs, seed=seed,
                                    weight_decay=args.mil_weight_decay, progress=progress, weights=weights)
        scores = torch.stack([mil.dsmil_predict(model, x) for x, _ in bags["test"]]).cpu().numpy()
        with torch.no_grad():
            for of_bag, (x, label) in zip(attention, bags["test"]):
                of_bag.append(model(x)[2][:, label].cpu().numpy())
        rows.append((seed, *measures_of(truth, scores)))
        total = total + scores / args.repeats
    return rows, total, [np.stack(of_bag) for of_bag in attention]


def classify_slides(found, run, names, args):
    """Rows of the table for DSMIL, and for a logistic regression on each slide's mean feature.

    The latter shows what the features are worth without MIL. Writes slides.csv (a row per seed) and
    predictions.csv (mean scores of the test slides). Also gives {test slide: DSMIL's attention (repeats, N)}.
    """
    members = {part: [name for name in found.split(part) if name in names]
               for part in ("train", "val", "test")}
    bags = {part: [(read_features(run / "features" / f"{name}.npz").to(args.device),
                    found.classes.index(found.labels[name]["label"]))
                   for name in members[part]] for part in members}
    if args.standardize:
        bags = classify.standardize(bags)
    rows, scores, attention = train_and_score(bags, len(found.classes), args)
    write_csv(run / "slides.csv", [("seed", "accuracy", "auc", "macro_f1"), *rows])
    write_csv(run / "predictions.csv", [("slide", "label", *found.classes)] + [
        (name, found.labels[name]["label"], *(f"{v:.4f}" for v in row))
        for name, row in zip(members["test"], scores)])

    means = {part: torch.stack([bag.mean(0) for bag, _ in bags[part]]).cpu().numpy()
             for part in ("train", "test")}
    linear = classify.fit_logistic(means["train"], [label for _, label in bags["train"]])
    truth = np.array([label for _, label in bags["test"]])
    over = f"{len(scores)} test slides"
    table = [row_of(f"slide {measure}, DSMIL", values, f"{over}, {len(rows)} seeds")
             for measure, values in zip(MEASURES, list(zip(*rows))[1:])]
    for measure, value in zip(MEASURES, measures_of(truth, linear.predict_proba(means["test"]))):
        table.append((f"slide {measure}, mean feature, logistic regression", f"{value:.4f}", "", over))
    return table, dict(zip(members["test"], attention))


def count_attention(networks, title, found, run, args):
    """{network: rows of the table for the bins of Fig. 4} over crops of the test part, and shared rows.

    networks: {name: encoder}. Without labels all crops count, which are training's. Also draws both
    pictures, the overlay with P_c if all of these crops have their cells.
    """
    part = "test" if found.split("test") else "train"
    crops, celled = (Crops(found, found.split(part), with_cells) for with_cells in (False, True))
    if found.kind == "crops" and len(celled):
        crops = celled  # those that train.py takes: of one um/px, and none that it skipped
    has_cells = len(celled) == len(crops)
    crops = Subset(celled if has_cells else crops, spread(len(crops), args.attention_crops))
    over, tables, aggregated = f"{len(crops)} {found.crops_of_part(part)}", {}, {}
    for name, encoder in networks.items():
        aggregated[name] = embed(lambda x: attention_of(encoder, x), crops, args, "attention")
        tables[name] = [(f"tokens with attention {bin}", f"{share:.4f}", "", over) for bin, share in
                        zip(("0 to 0.5", "0.5 to 2", "over 2"), dirl.attention_bins(aggregated[name]))]
    if not has_cells:
        print(f"warning: {len(crops)} crops, but cells for {len(celled)}: the overlay is drawn without P_c. "
              f"Cells come from python train.py, or from {found.source}/cells/.")
    plot_distribution(aggregated, title, run / "attention_distribution.png")
    chosen = spread(len(crops), args.overlays)
    images, cells = zip(*(crops[i] for i in chosen))
    priors = [bin_centroids(xy, CROP) for xy in cells] if has_cells else None
    plot_overlays(images, {name: values[chosen] for name, values in aggregated.items()}, priors,
                  run / "attention_overlay.png")
    share = [("patches with a cell", f"{celled.priors().mean().item():.4f}", "", f"{len(celled)} crops")]
    return tables, share if len(celled) else []


def export(found, names, run, kinds):
    """Writes what --export asks for of the slides that have features."""
    infos = {name: tile_info(found, name) for name in names}
    infos = {name: info | {"side": tile_side(info)} for name, info in infos.items()}
    if "clam" in kinds:
        export_clam(found, run / "features", infos, run / "clam")
    if "csv" in kinds:
        export_csv(found, run / "features", [name for name in names if name in found.labels], run / "csv")
    if "geojson" in kinds:
        for name, info in tqdm(infos.items(), "geojson, slides", leave=False):
            corners = read_npz(run / "features" / f"{name}.npz", "coords")["coords"]
            export_geojson(run / "geojson" / f"{name}.geojson", corners, info, ready_cells(found, name))


def evaluate_slides(args):
    path = encoders.find_encoder(args.checkpoint, run_name(args.data))
    encoder, about = encoders.load_encoder(path)
    encoder.to(args.device)
    run, mpp = path.parent, args.mpp or (None if args.data in DATASETS else about["mpp"])
    found = find_data(args.data, mpp, args.prior, args.split_seed, slide_mpp=args.slide_mpp)
    slides = found.kind == "slides"
    if not slides and not args.mpp:
        found.mpp = file_mpp(found, about["mpp"])
    if args.export and not slides:
        raise InputError(f"--export: {found.source} holds crops and no slides; leave the flag out")
    if "csv" in args.export and not found.labels:
        raise InputError(f"--export csv: DSMIL's bags have labels; write {found.source}/labels.csv "
                         "(slide,label) or use --export clam")
    if args.shard:
        return extract_shard(encoder, found, path, args)
    if slides and found.labels:
        check_classes(found, found.images)  # now, rather than hours later
    check_unseen(found, found.split("test"), about["trained_on"], path)
    failed = prepare_tiles(found, args.tissue, args.workers, args.max_gigapixels) if slides else []
    print_skipped(failed)
    if slides and found.labels:  # again, without those that cannot be used: before hours of features
        check_classes(found, {name for name in found.images if tile_info(found, name)})
    print(f"{path}: {about['method']} {about['arch']} of {about['data']}, step {about['step']}"
          + (". The demo's slides are synthetic." if args.data == "demo" else ""))
    if slides and found.labels:
        warn_of_few_slides(sum(tile_info(found, name) is not None for name in found.split("train")), args)

    networks, folders = {"trained": encoder}, {"trained": run}
    stamps = {"trained": file_stamp(path)}
    if args.compare == "random":
        seed = read_json(run / "config.json").get("seed", 0)
        networks["random start"] = encoders.random_encoder(
            about["arch"], seed, encoder.mean, encoder.std, about.get("depth")).to(args.device)
        folders["random start"] = run / "random_start"
        stamps["random start"] = f"{about['arch']} {seed} {encoder.mean} {encoder.std}"
    made, attention = ["results.csv"], {}
    tables, shared = count_attention(networks, f"{about['data']}, {about['arch']}, {about['method']}",
                                     found, run, args)
    for title, network in networks.items() if slides else ():
        names = extract(network, found, folders[title] / "features", stamps[title], args)
        if found.labels:
            rows, attention[title] = classify_slides(found, folders[title], names, args)
            rows += check_with_truth(found, folders[title], names, attention[title])
            tables[title] = rows + tables[title]
    if slides:
        made += ["features/", *(f"{kind}/" for kind in args.export)]
        export(found, names, run, args.export)
    if attention:
        draw_slide(found, run, attention, run / "attention_slide.png")
        made += ["slides.csv", "predictions.csv", "attention_slide.png"]
    elif slides:
        print("No labels.csv: features are written, no slide is classified.")
    made += ["attention_distribution.png", "attention_overlay.png"]
    write_results(tables, shared + last_losses(run), run / "results.csv")
    print(f"Wrote {run}/{', '.join(made)}")
    return exit_code_of(failed)


# ---------------------------------------------------------------- patches

def find_patches(args):
    """The data set of labelled images; InputError if it is none, or a class has no test image."""
    folder = Path(args.data)
    if folder.is_dir() and not (folder / "labels.csv").is_file():
        raise InputError(f"{folder}/labels.csv: is not there; write it with the columns image,label[,split]")
    found = find_data(args.data, None, "auto", args.split_seed)
    if found.kind != "crops":
        raise InputError(f"{found.source}/labels.csv: has no column image; patches are images, "
                         "for slides: python eval.py slides")
    there = {found.labels[name]["label"] for name in found.split("test")}
    missing = [label for label in found.classes if label not in there]
    if missing:
        raise InputError(f"--data {args.data}: no test image of {', '.join(missing)}; every class needs one")
    return found


def encoders_of(found, args):
    """{name: encoder, None for pixels} of --encoder, and the run folder that the results go to."""
    out, arch, pixels = {}, "vit_t", (encoders.MEAN, encoders.STD)
    run = Path("runs") / "_".join([run_name(args.data), *args.encoder])
    if "checkpoint" in args.encoder or args.checkpoint:
        path = encoders.find_encoder(args.checkpoint)
        encoder, about = encoders.load_encoder(path)
        run, arch, pixels = path.parent, about["arch"], (encoder.mean, encoder.std)
        if "checkpoint" in args.encoder:
            check_unseen(found, found.split("test"), about["trained_on"], path)
            out[run.resolve().name] = encoder
    if "random" in args.encoder:
        out[f"random {args.arch or arch}"] = encoders.random_encoder(args.arch or arch, args.seed, *pixels)
    if "pixels" in args.encoder:
        out["pixels"] = None
    return out, run


def evaluate_patches(args):
    found = find_patches(args)
    encoders, run = encoders_of(found, args)
    names = list(found.images)
    images, good, failed = load_crops(list(found.images.values()), args.workers)
    print_skipped(failed)
    rows = [found.labels[names[i]] | {"image": names[i]} for i in good]
    labels = np.array([found.classes.index(row["label"]) for row in rows])
    groups = np.array([row["patient"] for row in rows])
    is_test = np.array([row["split"] == "test" for row in rows])
    train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    folds = classify.make_folds(labels[train], groups[train], found.classes, args.folds, args.seed)
    folds = [(train[a], train[b]) for a, b in folds]
    print(f"{args.data}: {len(train)} training and {len(test)} test images of {', '.join(found.classes)}; "
          f"{args.folds} folds, stratified, of whole {classify.unit(groups[train])}")
    if not args.linear and any(encoders.values()):
        print(f"fine-tuning on {args.device}: AdamW, lr {args.lr:g}, weight decay {args.weight_decay:g}, "
              f"batch {args.batch}, {args.epochs} epochs, "
              f"lr x 0.1 after {' '.join(map(str, args.milestones))}, flips")
    for name, encoder in encoders.items():
        key = {"data": run_name(args.data), "encoder": name,
               "training": "linear" if args.linear or encoder is None else "fine-tuned"}
        results = fold_results(encoder, images, labels, folds, test, len(found.classes), args, name)
        mean = report_folds(results, folds, labels[test], groups[test], key, run, args)
        merge_csv(run / "patches_predictions.csv", PATCH_KEYS, [
            key | {"image": rows[i]["image"], "group": rows[i]["patient"], "label": rows[i]["label"]}
            | {f"score {c}": f"{v:.4f}" for c, v in zip(found.classes, score)}
            for i, score in zip(test, mean)])
    print(f"Wrote {run}/patches.csv, patches_predictions.csv")
    return exit_code_of(failed)


# ---------------------------------------------------------------- script

def run_command(argv):
    """Runs the command that the first word names, or slides without one."""
    command, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("slides", argv)
    if command == "patches":
        return evaluate_patches(patches_arguments(rest))
    if command == "slides":
        return evaluate_slides(slides_arguments(rest))
    raise InputError(f"{command}: is neither slides nor patches; python eval.py [slides] --help, "
                     "python eval.py patches --help")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    return run_script("eval.py", lambda: run_command(argv),
                      again="run it again (the features of finished slides stay)")


if __name__ == "__main__":
    sys.exit(main())
