"""Evaluation of a pre-trained encoder (4, A.1).

    python eval.py [slides] [--data demo]
    python eval.py predict --data FOLDER [--checkpoint RUN]
    python eval.py patches --data mhist|chaoyang|FOLDER

slides takes the newest run of the data set (or --checkpoint). It counts the test crops' aggregated attention
in the bins of Fig. 4 and draws it (4.2), writes features/<slide>.npz, trains DSMIL on the features with
--repeats seeds and scores it on the test slides (3.6, Table 1). --compare measures other runs, too: each
network's results go to its own run, pictures of all and their common table (compared.csv) to the first one's.
On the demo, all finished runs and the random start are compared by default. --folds K cross-validates DSMIL
on K folds of all labelled slides instead (folds.csv).

predict scores slides without labels with the DSMILs that the slides command kept (dsmil_<seed>.pt), and
writes predicted/: a CSV with each class's score, and for each slide the attention of its tiles as a picture
and for QuPath.

patches classifies images (4.1, Table 2). The training set is split into --folds stratified folds. Each fold
validates once while the others train; the epoch that is best on it scores the test set. Writes patches.csv (a
row per fold) and patches_predictions.csv (the folds' mean score of each test image).

Nothing is chosen on the test set, and an encoder that was trained on a test image is refused. Results go to
the encoder's run; those on another data set, or at another um/px, to a folder on_<data>.. in it. --checkpoint
FILE --arch vit_s measures weights with timm's or DINO's names; results go to runs/<data>_<file's name>/.
"""
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import dirl
from common import bags, classify, encoders
from common.crossval import score_folds
from common.encoders import attention_of, represent
from common.errors import InputError, Parser, exit_code_of, print_skipped, run_script
from common.export import check_export, export_slides, tiles_of, write_features
from common.figures import BINS, draw_fig_4, draw_maps, draw_overlays, save_figure, stitch
from common.files import print_table, write_csv
from common.flags import SEED, add_dsmil, add_encoder, add_max_gigapixels, add_shard, between, whole
from common.networks import describe, features_stamp, files_of, named, network_of, next_command, random_start
from common.pool import call
from common.report import RESULTS, last_losses, print_results, row_of
from data import Crops, collate, spread
from demo.truth import check_with_truth, draw_slide
from prior import bin_centroids
from wsi.cache import file_mpp, keep_shard, load_crops, prepare_tiles, ready_cells, tile_infos
from wsi.cell_files import cell_files, whose_cells
from wsi.crops import picture_of
from wsi.datasets import add_data_flags, evaluated_mpp, run_name
from wsi.folders import claim_work, find_folder
from wsi.folds import open_folds
from wsi.slides import CROP
from wsi.splits import check_classes, check_split_flags, check_unseen, find_data, find_patches, hashes_of

# ---------------------------------------------------------------- flags

def slides_arguments(argv):
    parser = Parser(
        prog="python eval.py slides", description="Measures an encoder: features, DSMIL and attention.",
        epilog="Other commands: python eval.py predict --help, python eval.py patches --help")
    data = parser.add_argument_group(
        "data", "as in train.py; without --mpp the crops of a folder have the um/px that the encoder saw")
    add_data_flags(data.add_argument)
    add = parser.add_argument
    add("--compare", nargs="+", default=["none"], metavar="RUN",
        help="also measures other runs, next to the first: folders or encoder.pt; all: the data set's "
             "finished runs in their default folders; random: the first one's random start, which shows "
             "what the training is worth; none. With --data demo the default is random all")
    add_dsmil(add)
    add("--folds", type=whole(3, 1000), metavar="K",
        help="only cross-validates DSMIL on K folds of all labelled slides, by patient, stratified by class")
    add("--attention-crops", type=whole(), default=1000, help="test crops for Fig. 4; more is steadier")
    add("--overlays", type=whole(1, 100), default=4, help="crops in the attention picture")
    add("--export", nargs="+", default=(), choices=["clam", "csv", "geojson"],
        help="writes clam/ (features, dataset CSV and splits in CLAM's layout), csv/ (bags for the datasets/ "
             "of DSMIL's authors' code) or geojson/ (each slide's tiles and cells for QuPath)")
    add_encoder(add, 64)
    add_max_gigapixels(add)
    add_shard(add)
    if parser.parse_known_args(argv)[0].data == "demo":
        parser.set_defaults(compare=["random", "all"], mil_lr=bags.FEW_LR, epochs=100, repeats=3,
                            mil_weight_decay=bags.FEW_DECAY, standardize=True)
    return with_device(parser.parse_args(argv))


def predict_arguments(argv):
    parser = Parser(
        prog="python eval.py predict",
        description="Scores slides without labels with the DSMILs that python eval.py kept for an encoder "
                    "(dsmil_<seed>.pt), and draws their attention; both are means over the DSMILs. The class "
                    "with the highest score is predicted.",
        epilog="First, with labelled slides: python eval.py --data LABELLED --checkpoint RUN. Tiles are cut "
               "at the um/px of those slides, and with their --tissue unless one is given.")
    add = parser.add_argument
    add_data_flags(add, "--data", "--slide-mpp", "--tissue", required=True)
    parser.set_defaults(tissue=None)
    add("--dsmil", metavar="FOLDER",
        help="folder with dsmil_<seed>.pt; default: the encoder's own, measured on its own data set")
    add("--pixels", type=whole(50, 20_000), default=900, help="longer side of a picture; more for print")
    add_encoder(add, 64)
    add_max_gigapixels(add)
    return with_device(parser.parse_args(argv))


def patches_arguments(argv):
    parser = Parser(
        prog="python eval.py patches",
        description="Fine-tunes an encoder on labelled images, or fits a linear classifier to its features.",
        epilog="Fine-tuning defaults to the paper's settings for MHIST; with --data chaoyang, for Chaoyang.")
    add = parser.add_argument
    add("--data", default="mhist",
        help="mhist, chaoyang, or a folder with labels.csv: image,label[,split][,patient]")
    add("--split-seed", type=SEED, default=0, help="seed of the split when it is first drawn, as in train.py")
    add("--encoder", nargs="+", default=["checkpoint"], choices=["checkpoint", "random", "pixels"],
        help="whose features are classified; random and pixels are baselines: an untrained encoder, and the "
             "image's colour statistics (always linear)")
    add("--linear", action="store_true",
        help="fits a logistic regression to frozen features: seconds where fine-tuning takes hours")
    add("--folds", type=whole(2, 1000), default=5, help="folds of the training set; fewer for a rare class")
    add("--epochs", type=whole(1, 10 ** 6), help="epochs of fine-tuning; more for few images")
    add("--lr", type=between(0, 10), help="learning rate of fine-tuning; lower it if the loss blows up")
    add("--weight-decay", type=between(0, 10), help="AdamW's weight decay; raise it if the encoder overfits")
    add("--milestones", type=whole(), nargs="*",
        help="epochs after which the learning rate is divided by 10; change them with --epochs")
    add("--seed", type=SEED, default=0, help="seed of folds, training, random encoder and bootstrap")
    add_encoder(add, 128, "images per step of fine-tuning; with --linear, images at a time")
    parser.set_defaults(**classify.SETTINGS["mhist"])
    parser.set_defaults(**classify.SETTINGS.get(parser.parse_known_args(argv)[0].data, {}))
    return with_device(parser.parse_args(argv))


def with_device(args):
    """Checks --device, adds args.bf16 (whether to compute in bf16) and returns args."""
    encoders.check_device(args.device)
    args.bf16 = encoders.use_bf16(args.precision, args.device)
    return args


# ---------------------------------------------------------------- features

@torch.no_grad()
def over_crops(function, crops, args, title):
    """Applies a function of uint8 images (B, 3, 224, 224) to all crops; returns (N, ...) on the CPU."""
    cuda = torch.device(args.device).type == "cuda"
    loader = DataLoader(crops, args.batch, collate_fn=collate, num_workers=args.workers if cuda else 0)
    bar = tqdm(loader, desc=title, unit="batch", leave=False, disable=len(loader) < 20)
    return torch.cat([function(images).cpu() for images, _ in bar])


def extract(network, found, infos, args):
    """Writes features/<slide>.npz of each slide in infos: features (N, d), coords (N, 2) in level-0 px.

    Files of the same encoder and tiles are kept.
    """
    for name, info in tqdm(infos.items(), desc="features, slides", leave=False, disable=not infos):
        stamp = features_stamp(network, info, args.bf16)
        bag = bags.read_bag(network.features, name)
        if bag is None or str(bag["encoder"]) != stamp:
            crops = Crops(found, [name], with_cells=False)
            features = over_crops(lambda x: represent(network.encoder, x, args.bf16), crops, args, name)
            bags.write_bag(network.features, name, features.numpy(), crops.corners, stamp)


def extract_shard(networks, found, args):
    """Tiles and features of the slides of --shard; returns the exit code."""
    keep_shard(found, args.shard)
    skipped = prepare_tiles(found, args.tissue, args.workers, args.max_gigapixels) if found.images else []
    print_skipped(skipped)
    infos = tile_infos(found)
    for network in networks:
        extract(network, found, infos, args)
        print(f"Wrote {network.features}/features/ of the {len(infos)} slides of --shard {args.shard}.")
    print("Next, when all shards are done: the same command without --shard")
    return exit_code_of(skipped)


# ---------------------------------------------------------------- slides: attention

def count_attention(networks, title, found, run, args):
    """Counts aggregated attention over crops of the test split in the bins of Fig. 4, and draws it.

    networks: {name: Network}; title: of Fig. 4. Returns {name: rows of the table}. Without labels the crops
    are those of training. The overlay shows P_c if the cells of all crops are known.
    """
    split = "test" if found.split("test") else "train"
    crops = Crops(found, found.split(split), with_cells=False)
    crops_with_cells = Crops(found, found.split(split))
    has_cells = len(crops_with_cells) == len(crops)
    if has_cells:
        print(whose_cells(found))
        crops = crops_with_cells
    else:
        print(f"warning: {len(crops_with_cells)} of {len(crops)} crops have cells: the overlay is drawn "
              f"without P_c. Cells come from python data.py prepare, or from {found.source}/cells/.")
    counted = Subset(crops, spread(len(crops), args.attention_crops))
    over = f"{len(counted)} {split} crops"
    shared = []  # rows that do not depend on the network
    if len(crops_with_cells):
        shared = [row_of("patches with a cell", [crops_with_cells.priors().mean().item()],
                         f"{len(crops_with_cells)} crops")]
    aggregated = {}
    tables = {}
    for name, network in networks.items():
        values = over_crops(lambda x: attention_of(network.encoder, x), counted, args, "attention")  # (N, n)
        aggregated[name] = values
        bins = [row_of(f"tokens with attention {interval}", [share], over)
                for interval, share in zip(BINS, dirl.attention_bins(values))]
        tables[name] = bins + shared + last_losses(network.folder)
    save_figure(draw_fig_4(aggregated, title), run / "attention_distribution.png")

    chosen = spread(len(counted), args.overlays)
    images, cells = zip(*[counted[i] for i in chosen])
    priors = [bin_centroids(xy, CROP) for xy in cells] if has_cells else None
    figure = draw_overlays(images, {name: values[chosen] for name, values in aggregated.items()}, priors)
    save_figure(figure, run / "attention_overlay.png", dpi=110)
    return tables


# ---------------------------------------------------------------- slides: the command

def open_networks(args):
    """Returns the data set, and the Networks of --checkpoint and --compare; InputError if a file is bad.

    The data set's um/px is --mpp, else a known data set's, else that of the first encoder's training.
    """
    check_split_flags(args.split, args.drop_shared)
    data = run_name(args.data, args.split, args.drop_shared)
    paths = files_of(args.checkpoint, args.compare, data)
    opened = [(path, *encoders.open_encoder(path, args.arch)) for path in paths]
    path, _, about = opened[0]
    if args.arch not in (None, about["arch"]):
        raise InputError(f"--arch {args.arch}: {path} is a {about['arch']}; leave the flag out, or name the "
                         "file that needs it by --checkpoint and this run by --compare")
    mpp = evaluated_mpp(args.data, args.mpp, about["mpp"])
    prior = encoders.prior_of(path, data) if args.prior == "auto" else args.prior
    found = find_data(args.data, mpp, prior, args.split_seed, slide_mpp=args.slide_mpp, split=args.split,
                      drop_shared=args.drop_shared)
    if found.kind == "crops" and not args.mpp:
        found.mpp = file_mpp(found, about["mpp"])
    if args.export and (args.folds or args.shard):
        raise InputError("--export: is not written with --folds or --shard; run eval.py once without these")
    check_export(args.export, found)
    networks = []
    cut_at = found.mpp if found.kind == "slides" else None
    for path, encoder, about in opened:
        network = network_of(path, encoder, about, data, found.name, cut_at, args.device)
        encoders.describe_results(network.folder, path, about, data, cut_at)
        networks.append(network)
        warned = None if args.mpp else opened[0][2]["mpp"]  # of this um/px evaluated_mpp has warned
        if found.kind == "slides" and about["mpp"] not in (None, found.mpp, warned):
            print(f"warning: {path}: was trained at {about['mpp']:g} um/px and is measured at {found.mpp:g}")
    return found, networks


def datasets_to_score(found, networks, args):
    """Returns the data sets that DSMIL is trained and tested on, {number: Data}: those of --folds, or found.

    InputError, before hours of feature extraction, for what would make the table worthless.
    """
    trained = {network.path: network.about["trained_on"] for network in networks}
    if args.folds:
        return open_folds(found, args.folds, args.split_seed, trained)
    if found.kind == "slides" and found.labels:
        check_classes(found, found.images)
    for path, trained_on in trained.items():
        check_unseen(found, found.split("test"), trained_on, path)
    return {0: found}


def evaluate_slides(args):
    """Measures encoders on slides or ready-cut crops; returns the exit code."""
    found, networks = open_networks(args)
    if args.shard:
        return extract_shard(networks, found, args)
    folds = datasets_to_score(found, networks, args)
    infos, skipped = {}, []  # of slides; ready-cut crops have neither tiles nor bags
    if found.kind == "slides":
        skipped = prepare_tiles(found, args.tissue, args.workers, args.max_gigapixels)
        infos = tile_infos(found)
    print_skipped(skipped)
    describe(networks)
    if args.data == "demo":
        print("The demo's slides are synthetic.")
    settings = bags.DSMILSettings(range(args.seed, args.seed + args.repeats), args.epochs, args.mil_lr,
                                  args.mil_weight_decay, args.standardize, args.class_weights)
    if infos and found.labels:
        for data in folds.values():
            check_classes(data, infos)  # again, because slides may have been skipped
        fewest = min(len(infos.keys() & set(data.split("train"))) for data in folds.values())
        bags.warn_of_few_slides(fewest, settings)
    if "random" in args.compare:
        networks.append(random_start(networks[0], args.device))

    run = networks[0].folder
    if args.folds:
        for name, network in named(networks).items():
            extract(network, found, infos, args)
            score_folds(folds, dict.fromkeys(folds, network.features), infos, settings, args.device,
                        args.workers, name, run / "folds.csv")
    else:
        measure(named(networks), found, infos, settings, run, args)
    if found.labels and infos and not args.folds:
        print(f"Next, for slides without labels: {next_command(networks[0], args.arch)}")
    return exit_code_of(skipped)


def measure(networks, found, infos, settings, run, args):
    """Measures {name: Network} by attention, features and DSMIL; writes and prints the tables.

    infos: {slide: tile_info}. Pictures of all networks and their common table go to run.
    """
    archs = dict.fromkeys(network.about["arch"] for network in networks.values())  # each once
    title = ", ".join([run_name(args.data), *archs])
    tables = count_attention(networks, title, found, run, args)
    pictures = ["attention_distribution.png", "attention_overlay.png"]

    # Features and DSMIL of every network.
    for network in networks.values():
        extract(network, found, infos, args)
    if infos:
        first = next(network for network in networks.values() if network.folder == run)
        export_slides(args.export, found, first.features / "features", infos,
                      partial(ready_cells, found, files=cell_files(found)), run)
        print(f"Wrote {first.features}/features/")
        pictures += [f"{kind}/" for kind in args.export]
    classified = {}
    if infos and found.labels:
        classified = bags.classify_slides(found, networks, infos, settings, args.device, args.workers)
        for name, (rows, attention) in classified.items():
            known = check_with_truth(found, networks[name].features, list(infos), attention)
            tables[name] = rows + known + tables[name]
        attention = {name: weights for name, (_, weights) in classified.items()}
        draw_slide(found, first.features, attention, run / "attention_slide.png")
        pictures.append("attention_slide.png")
    elif infos:
        print("No labels.csv: features are written, no slide is classified.")

    # The tables: each network's own, and all of them next to each other.
    files = "results.csv, slides.csv, predictions.csv, dsmil_<seed>.pt" if classified else "results.csv"
    for name, network in networks.items():
        write_csv(network.folder / "results.csv", [RESULTS, *tables[name]])
        print(f"Wrote {network.folder}/{files}")
    print_results(tables, run / "compared.csv")
    pictures += ["compared.csv"] if len(networks) > 1 else []
    print(f"Wrote {run}/{', '.join(pictures)}")


# ---------------------------------------------------------------- predict

def draw_prediction(name, found, corners, scores, attention, classes, out, pixels):
    """Writes a slide's DSMIL attention: a picture for the predicted class, a GeoJSON for all classes.

    corners (N, 2) of the tiles in level-0 px, scores (C,), attention (N, C).
    """
    picture = picture_of(found, name, pixels)
    shares = dict(zip(classes, attention.T * len(attention)))  # {class: (N,)}, even share: 1
    label = classes[scores.argmax()]
    heat = stitch(shares[label][:, None], corners, picture.side, picture.unit, picture.pixels.shape[:2])
    title = f"{name}: {label}, score {scores.max():.2f}"
    save_figure(draw_maps(picture.pixels, {"DSMIL": {f"attention for {label}": heat}}, title),
                out / f"{name}.png")
    measured = {f"DSMIL's attention for {label}, even share 1": values for label, values in shares.items()}
    write_features(out / f"{name}.geojson", tiles_of(corners, picture.side, picture.bounds, "tile", measured))


def predict_slides(args):
    """Scores slides, with or without labels, by the DSMILs kept for an encoder; returns the exit code."""
    path = encoders.find_encoder(args.checkpoint)
    encoder, about = encoders.open_encoder(path, args.arch)
    if not (args.dsmil or about["data"]):
        raise InputError(f"--dsmil: name the folder in which eval.py kept the DSMILs of {path}")
    folder = args.dsmil or encoders.results_folder(path, about, about["data"])
    kept = bags.read_dsmils(folder, path, args.device)
    found = claim_work(find_folder(args.data, kept.mpp, slide_mpp=args.slide_mpp, has_classes=False))
    if found.kind == "crops":
        raise InputError(f"--data {args.data}: holds crops; predict takes the slides that they were cut from")
    network = network_of(path, encoder, about, run_name(args.data), found.name, kept.mpp, args.device)
    out = network.folder / "predicted"
    tissue = kept.tissue if args.tissue is None else args.tissue
    print(f"{path}: {about['method']} {about['arch']}, with {len(kept.models)} DSMILs of {folder} for "
          f"{', '.join(kept.classes)}; tiles at {kept.mpp:g} um/px with {tissue:g} tissue or more")
    skipped = prepare_tiles(found, tissue, args.workers, args.max_gigapixels)
    rows = [("slide", "tiles", "predicted", *kept.classes)]
    infos = tile_infos(found)
    extract(network, found, infos, args)
    for name in tqdm(infos, "predictions, slides", leave=False):
        bag = bags.read_bag(network.features, name)
        scores, attention = kept.apply(bag["features"])
        predicted = kept.classes[scores.argmax()]
        rows.append((name, str(len(attention)), predicted, *[f"{score:.4f}" for score in scores]))
        _, error = call(draw_prediction, (name, found, bag["coords"], scores, attention, kept.classes, out,
                                          args.pixels))
        skipped += [error] if error else []
    write_csv(out / "predictions.csv", rows)

    print_table(rows[:21])  # the first 20 slides
    print_skipped(skipped)
    hashes = {"the encoder": hashes_of(about["trained_on"]), "DSMIL": kept.trained_on}
    for what, trained_on in hashes.items():
        known = [name for name in infos if found.content_of(name) in trained_on]
        if known:
            print(f"warning: {len(known)} of these slides are ones that {what} was trained on ({known[0]}, "
                  "..): their scores say nothing about new slides")
    print(f"Wrote {out}/predictions.csv of {len(infos)} slides and, for each, <slide>.png and "
          "<slide>.geojson. Next: drag a .geojson onto its slide in QuPath; Measure, Show measurement maps "
          "colours the tiles by DSMIL's attention")
    return exit_code_of(skipped)


# ---------------------------------------------------------------- patches

def encoders_of(found, args):
    """Returns {name: encoder} of --encoder, None for pixels, and the run folder that the results go to."""
    chosen = {}
    run = Path("runs") / "_".join([run_name(args.data), *args.encoder])
    arch = "vit_t"
    mean, std = encoders.MEAN, encoders.STD
    if "checkpoint" in args.encoder or args.checkpoint:
        path = encoders.find_encoder(args.checkpoint)
        encoder, about = encoders.open_encoder(path, args.arch)
        data = about["data"] or run_name(args.data)
        run = encoders.results_folder(path, about, data)  # patches.csv tells data sets apart by a column
        arch = about["arch"]
        mean, std = encoder.mean, encoder.std
        if "checkpoint" in args.encoder:
            check_unseen(found, found.split("test"), about["trained_on"], path)
            chosen[run.resolve().name] = encoder.to(args.device)
        encoders.describe_results(run, path, about, data)
    if "random" in args.encoder:
        arch = args.arch or arch
        chosen[f"random {arch}"] = encoders.random_encoder(arch, args.seed, mean, std).to(args.device)
    if "pixels" in args.encoder:
        chosen["pixels"] = None
    return chosen, run


def evaluate_patches(args):
    """Classifies labelled images with each of --encoder; returns the exit code."""
    found = find_patches(args.data, args.split_seed)
    chosen, run = encoders_of(found, args)
    images, good, skipped = load_crops(list(found.images.values()), args.workers)
    print_skipped(skipped)
    names = np.array(list(found.images))[good]
    patches = classify.make_patches(names, images, [found.labels[name] for name in names], found.classes,
                                    args.folds, args.seed)
    training_groups = np.delete(patches.groups, patches.test)
    print(f"{args.data}: {len(training_groups)} training and {len(patches.test)} test images of "
          f"{', '.join(found.classes)}; {args.folds} stratified folds of {classify.unit(training_groups)}")
    if not args.linear and any(chosen.values()):
        print(f"fine-tuning on {args.device}: AdamW, lr {args.lr:g}, weight decay {args.weight_decay:g}, "
              f"batch {args.batch}, {args.epochs} epochs, "
              f"lr x 0.1 after {' '.join(map(str, args.milestones))}, flips")
    settings = classify.FineTuning(args.lr, args.weight_decay, args.batch, args.epochs, args.milestones,
                                   args.device, args.bf16)
    for name, encoder in chosen.items():
        is_linear = args.linear or encoder is None
        key = {"data": run_name(args.data), "encoder": name,
               "training": "linear" if is_linear else "fine-tuned"}
        if encoder is None:
            results = classify.linear_folds(classify.pixel_statistics(images), patches)
        elif args.linear:
            features = encoders.in_batches(lambda x: represent(encoder, x, args.bf16), images, args.batch,
                                           "features")
            results = classify.linear_folds(features.numpy(), patches)
        else:
            results = classify.fine_tuned_folds(encoder, patches, settings, args.seed, name,
                                                classify.folds_folder(run, key))
        mean = classify.report_folds(results, patches, key, run / "patches.csv", args.seed)
        classify.write_predictions(run / "patches_predictions.csv", mean, patches, key)
    print(f"Wrote {run}/patches.csv, patches_predictions.csv")
    return exit_code_of(skipped)


# ---------------------------------------------------------------- script

def run_command(argv):
    """Runs the command that the first word names, or slides without one; returns the exit code."""
    command, flags = "slides", argv
    if argv and not argv[0].startswith("-"):
        command, *flags = argv
    commands = {"slides": (evaluate_slides, slides_arguments), "predict": (predict_slides, predict_arguments),
                "patches": (evaluate_patches, patches_arguments)}
    if command not in commands:
        raise InputError(f"{command}: is not slides, predict or patches; see python eval.py slides --help")
    function, arguments = commands[command]
    return function(arguments(flags))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    return run_script("eval.py", lambda: run_command(argv),
                      again="run it again (the features of finished slides, and finished folds, stay)")


if __name__ == "__main__":
    sys.exit(main())
