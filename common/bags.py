"""Bags (3.6): the features of a slide's crops, as eval.py keeps them in features/<slide>.npz, and DSMIL.

eval.py keeps every DSMIL that it trains as dsmil_<seed>.pt, next to its results.
"""
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import mil
from common.classify import fit_logistic, standardize
from common.errors import InputError, one_line
from common.files import atomic_write, file_stamp, load_tensors, read_npz, save_tensors, write_csv
from common.metrics import measures_of
from common.pool import in_processes
from common.report import row_of

SPLITS = ("train", "val", "test")
MEASURES = ("accuracy", "AUC", "macro F1")
FEW_SLIDES = 100  # with fewer training slides, DSMIL needs other settings than the paper's
FEW_LR = 2e-3  # DSMIL's learning rate for few slides, and the demo's
FEW_DECAY = 5e-3  # its weight decay for them


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


def labelled(found, names):
    """Returns ((slide, split, class index), ...) of the labelled slides among names, split by split."""
    return tuple((name, split, found.classes.index(found.labels[name]["label"]))
                 for split in SPLITS for name in found.split(split) if name in names)


@lru_cache(maxsize=1)  # the trainings with different seeds share them
def load_bags(run, slides, standardized, device):
    """Reads the features of slides (see labelled) from a folder's features/.

    Returns {split: [(features (N, d) on the device, class index), ...]}, and the (mean, sd) that they are
    standardised with, or None.
    """
    bags = {split: [] for split in SPLITS}
    for name, split, label in slides:
        features = torch.from_numpy(read_bag(run, name)["features"]).to(device)
        bags[split].append((features, label))
    return standardize(bags) if standardized else (bags, None)


# ---------------------------------------------------------------- DSMIL

@dataclass(frozen=True)
class DSMILSettings:
    """How DSMIL is trained (see the flags of eval.py)."""

    seeds: range
    epochs: int
    lr: float
    weight_decay: float
    standardize: bool
    class_weights: bool


class Trained(NamedTuple):
    """A DSMIL and what it says of the test slides."""

    weights: dict  # its state dict as arrays: tensors would take open files on their way between processes
    measures: tuple  # of MEASURES
    scores: np.ndarray  # (T, C)
    attention: list  # of each slide, (N,): that of its tiles for its own class


def train_and_score(run, slides, classes, settings, device, seed):
    """Trains DSMIL once on the training slides and scores the test slides; returns a Trained.

    run, slides: see load_bags; classes: their number.
    """
    bags, _ = load_bags(run, slides, settings.standardize, device)
    weights = None
    if settings.class_weights:
        weights = mil.class_weights([label for _, label in bags["train"]], classes)
    with tqdm(total=settings.epochs, desc=f"DSMIL, seed {seed}", leave=False, mininterval=0.5,
              disable=parent_process() is not None) as bar:
        def progress(epoch, loss, val_loss):
            bar.set_postfix(loss=f"{loss:.3f}", val=f"{val_loss:.3f}", refresh=False)
            bar.update()
        model = mil.train_dsmil(bags["train"], bags["val"], classes, settings.epochs, settings.lr,
                                settings.weight_decay, seed, progress, weights)
    truth = np.array([label for _, label in bags["test"]])
    scores = torch.stack([mil.dsmil_predict(model, features) for features, _ in bags["test"]]).cpu().numpy()
    with torch.no_grad():  # model(features)[2] is the attention (N, C)
        attention = [model(features)[2][:, label].cpu().numpy() for features, label in bags["test"]]
    arrays = {name: weight.cpu().numpy() for name, weight in model.state_dict().items()}
    return Trained(arrays, measures_of(truth, scores), scores, attention)


def train_each(runs, slides, classes, settings, device, workers):
    """Trains DSMIL on the features in each of runs, once with each seed; yields (run, {seed: Trained}).

    A run is yielded when all its seeds are done, while its bags are still loaded. On a CPU in several
    processes: DSMIL's steps are too small to be divided among threads.
    """
    load_bags.cache_clear()  # the files may have been written again
    tasks = [(run, slides, classes, settings, device, seed) for run in runs for seed in settings.seeds]
    workers = workers if device == "cpu" else 1
    trained = {run: {} for run in runs}
    for (run, *_, seed), result, error in in_processes(train_and_score, tasks, workers, "DSMIL, trainings"):
        if error:
            raise InputError(error)
        trained[run][seed] = result
        if len(trained[run]) == len(settings.seeds):
            yield run, dict(sorted(trained[run].items()))  # by seed, in whatever order they ended


def score_mean_features(bags):
    """Accuracy, AUC and macro F1 of a logistic regression on each bag's mean feature."""
    means = {split: torch.stack([features.mean(0) for features, _ in bags[split]]).cpu().numpy()
             for split in ("train", "test")}
    model = fit_logistic(means["train"], [label for _, label in bags["train"]])
    truth = np.array([label for _, label in bags["test"]])
    return measures_of(truth, model.predict_proba(means["test"]))


# ---------------------------------------------------------------- DSMILs that are kept

def keep_dsmils(folder, trained, **about):
    """Writes dsmil_<seed>.pt of {seed: Trained}, in place of an earlier evaluation's; for load_dsmil.

    about: classes, statistics, encoder, mpp, tissue and trained_on, of DSMILs and load_dsmil.
    """
    for earlier in Path(folder).glob("dsmil_*.pt"):
        earlier.unlink()
    statistics = about.pop("statistics")
    mean, sd = (values.cpu() for values in statistics) if statistics else (None, None)
    for seed, one in trained.items():
        state = {name: torch.from_numpy(weight) for name, weight in one.weights.items()}
        save_tensors(Path(folder) / f"dsmil_{seed}.pt", {
            "dsmil": state, "in_dim": state["instance.weight"].shape[1], "mean": mean, "sd": sd, **about})


@dataclass(frozen=True)
class DSMILs:
    """DSMILs that eval.py kept: of one encoder and one data set, with several seeds."""

    models: tuple
    classes: list  # names
    statistics: tuple | None  # (mean, sd) that standardise features
    mpp: float  # um/px of the tiles
    tissue: float  # minimum share of tissue in them
    trained_on: set  # hashes of the training and validation slides' files

    def apply(self, features):
        """Features (N, d) of a slide -> class scores (C,) and attention (N, C), means over the models."""
        features = torch.from_numpy(features).to(self.models[0].instance.weight.device)
        if self.statistics:
            mean, sd = self.statistics
            features = (features - mean) / sd
        scores = torch.stack([mil.dsmil_predict(model, features) for model in self.models])
        with torch.no_grad():
            attention = torch.stack([model(features)[2] for model in self.models])
        return scores.mean(0).cpu().numpy(), attention.mean(0).cpu().numpy()


def load_dsmil(path, device):
    """Returns the DSMIL of a dsmil_<seed>.pt on the device, and its other values; InputError if damaged."""
    about = load_tensors(path)
    try:
        model = mil.DSMIL(about["in_dim"], len(about["classes"]))
        model.load_state_dict(about.pop("dsmil"))
        about["statistics"] = None
        if about["mean"] is not None:
            about["statistics"] = about["mean"].to(device), about["sd"].to(device)
        about.setdefault("tissue", 0.5)  # of earlier versions
        names = ("classes", "statistics", "encoder", "mpp", "tissue", "trained_on")
        about = {name: about[name] for name in names}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path}: is no DSMIL of eval.py ({one_line(error)}); delete it and run eval.py "
                         "again") from None
    return model.to(device).eval(), about


def read_dsmils(folder, encoder_path, device):
    """Returns the DSMILs in a folder, on the device.

    InputError if it has none, or if one was trained on the features of an encoder other than encoder_path.
    """
    paths = sorted(Path(folder).glob("dsmil_*.pt"), key=lambda path: (len(path.name), path.name))  # by seed
    again = f"python eval.py --data DATA --checkpoint {encoder_path}, with DATA the labelled slides"
    if not paths:
        raise InputError(f"{folder}: has no dsmil_<seed>.pt; first: {again}")
    models, abouts = zip(*(load_dsmil(path, device) for path in paths))
    first = abouts[0]
    stamp = file_stamp(encoder_path)
    for path, about in zip(paths, abouts):
        if about["encoder"] != stamp:
            raise InputError(f"{path}: was trained on features of another encoder than {encoder_path}; give "
                             f"that encoder, or {again}")
        if about["classes"] != first["classes"]:
            raise InputError(f"{path}: has other classes than {paths[0]}; {again}")
    return DSMILs(models, first["classes"], first["statistics"], first["mpp"], first["tissue"],
                  set(first["trained_on"]))


# ---------------------------------------------------------------- slides (Tables 1 and 5)

def warn_of_few_slides(count, settings):
    """Prints a warning if DSMIL has the paper's settings but only a few training slides."""
    has_papers = settings.lr < FEW_LR or settings.weight_decay > FEW_DECAY or not settings.standardize
    if count < FEW_SLIDES and has_papers:
        print(f"warning: {count} training slides: DSMIL's defaults are the paper's, for hundreds; with fewer "
              f"than {FEW_SLIDES} try --standardize --mil-lr {FEW_LR:g} --mil-weight-decay {FEW_DECAY:g}")


def classify_slides(found, networks, infos, settings, device, workers):
    """Trains DSMIL on each network's features of the slides in infos and scores the test slides.

    networks: {name: Network}; infos: {slide: wsi.cache.tile_info}. Writes slides.csv (a row per seed),
    predictions.csv (mean scores of the test slides) and dsmil_<seed>.pt to each network's folder. Returns
    {name: (rows of the table, {test slide: DSMIL's attention (seeds, N)})}. The last rows are those of a
    logistic regression on each slide's mean feature, which shows what the features are worth without MIL.
    """
    slides = labelled(found, infos)
    trained_on = [found.content_of(name) for name, split, _ in slides if split != "test"]
    tissue = next(iter(infos.values()))["tissue"]  # the same for all (prepare_tiles)
    test_names = [name for name, split, _ in slides if split == "test"]
    over = f"{len(test_names)} test slides"
    names = {network.features: name for name, network in networks.items()}
    classified = dict.fromkeys(networks)  # in their order; runs may end in another
    for run, by_seed in train_each(names, slides, len(found.classes), settings, device, workers):
        name = names[run]
        network = networks[name]
        bags, statistics = load_bags(network.features, slides, settings.standardize, device)
        keep_dsmils(network.folder, by_seed, classes=list(found.classes), statistics=statistics,
                    encoder=network.stamp, mpp=found.mpp, tissue=tissue, trained_on=trained_on)

        measured = [(seed, *one.measures) for seed, one in by_seed.items()]
        write_csv(network.folder / "slides.csv", [("seed", "accuracy", "auc", "macro_f1"), *measured])
        predictions = [("slide", "label", *found.classes)]
        for slide, row in zip(test_names, np.mean([one.scores for one in by_seed.values()], 0)):
            predictions.append((slide, found.labels[slide]["label"], *[f"{score:.4f}" for score in row]))
        write_csv(network.folder / "predictions.csv", predictions)

        _, *columns = zip(*measured)  # without the seeds
        rows = [row_of(f"slide {measure}, DSMIL", values, f"{over}, {len(measured)} seeds")
                for measure, values in zip(MEASURES, columns)]
        for measure, value in zip(MEASURES, score_mean_features(bags)):
            rows.append(row_of(f"slide {measure}, mean feature, logistic regression", [value], over))
        of_slides = zip(*[one.attention for one in by_seed.values()])
        classified[name] = rows, dict(zip(test_names, map(np.stack, of_slides)))
    return classified
