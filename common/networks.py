"""The networks that eval.py measures side by side: which files, where their results go, their names."""
import shlex
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import dirl
from common.encoders import features_folder, find_encoder, random_encoder, results_folder
from common.files import file_stamp, read_json
from common.log import is_finished

NAMES = {"none": "random start", "baseline": "baseline (DINO)", "cellback": "Cellback", "dirl": "DiRL"}


@dataclass
class Network:
    """An encoder that eval.py measures."""

    encoder: nn.Module  # on --device
    about: dict  # the other values of its file (open_encoder)
    path: Path  # its file
    folder: Path  # where its results go
    features: Path  # the folder of features/
    stamp: str  # of its weights: features of another stamp are recomputed


def network_of(path, encoder, about, data, slides, mpp, device):
    """Returns the Network of an encoder and its file.

    data: of the results, slides: as in features_folder; mpp: um/px of the slides, or None.
    """
    return Network(encoder.to(device), about, path, results_folder(path, about, data, mpp),
                   features_folder(path, about, slides, mpp), file_stamp(path))


def random_start(trained, device):
    """Returns the Network with random weights of the run's seed: its start, unless the run had --init."""
    about = trained.about | {"method": "none", "ssl": "dino"}
    seed = read_json(trained.folder / "config.json").get("seed", 0)
    mean, std = trained.encoder.mean, trained.encoder.std
    encoder = random_encoder(about["arch"], seed, mean, std, about.get("depth")).to(device)
    return Network(encoder, about, trained.path, trained.folder / "random_start",
                   trained.features / "random_start", f"{about['arch']} {seed} {mean} {std}")


def features_stamp(network, info, bf16):
    """Returns what a slide's features are made from: encoder, precision, the slide's file and its tiles."""
    precision = "bf16" if bf16 else "fp32"
    cut_from = "{file_name} {file_hash} pixels {pixels} {mpp} {slide_mpp} {tissue} {tiles}".format_map(info)
    return f"{network.stamp} {precision} {cut_from}"


def finished_runs(data, given):
    """Returns the encoder.pt of the data set's finished runs that are in their default folders.

    Prints a line for each run that is not finished and is not the given file's.
    """
    folders = [Path("runs", f"{data}_{arch}_{method}") for method in dirl.METHODS for arch in dirl.ARCHS]
    files = [folder / "encoder.pt" for folder in folders if (folder / "encoder.pt").is_file()]
    for path in files:
        if not is_finished(path.parent) and path.resolve() != given.resolve():
            print(f"skipped: {path.parent}: is not finished; --compare {path.parent} measures it")
    return [path for path in files if is_finished(path.parent)]


def files_of(checkpoint, compare, data):
    """Returns the files of the encoders to measure, each once: the one of --checkpoint, those of --compare.

    compare: runs, "all" (finished_runs), "random" and "none" (no file). InputError if one is missing.
    """
    paths = [find_encoder(checkpoint, data)]
    for run in compare:
        if run == "all":
            paths += finished_runs(data, paths[0])
        elif run not in ("none", "random"):
            paths.append(find_encoder(run, flag="--compare"))
    unique = {}
    for path in paths:
        unique.setdefault(path.resolve(), path)
    return list(unique.values())


def next_command(network, arch):
    """Returns the command that applies the DSMILs of a network, wherever they are kept; arch: --arch."""
    words = ["--checkpoint", str(network.path)]
    words += ["--arch", arch] if arch else []
    default = results_folder(network.path, network.about, network.about["data"])
    words += [] if network.folder == default else ["--dsmil", str(network.folder)]
    return f"python eval.py predict --data FOLDER {shlex.join(words)}"


def describe(networks):
    """Prints a line on each network that was trained."""
    for network in networks:
        about = network.about
        origin = f" of {about['data']}, step {about['step']}" if about["data"] else ", trained elsewhere"
        run = network.path.parent
        is_last = network.path.name == "encoder.pt" and (run / "log.csv").is_file()
        unfinished = ", unfinished" if is_last and not is_finished(run) else ""
        print(f"{network.path}: {about['method']} {about['arch']}{origin}{unfinished}")


def named(networks):
    """Returns {name: Network}: the random start, the paper's methods in its order, then the others.

    Networks of one method, and controls (a shuffled prior, other numbers of heads), have the names of their
    folders added; a method's name is train.py's, experiments.compare's or another program's file's.
    """
    names = []
    for network in networks:
        method = network.about["method"]
        ssl = network.about.get("ssl") or "dino"
        names.append(NAMES.get(method, method) if ssl == "dino" else f"{method}, {ssl}")
    out = {}
    for name, network in zip(names, networks):
        config = read_json(network.path.parent / "config.json")
        is_control = name != NAMES["none"] and (config.get("shuffle_prior") or config.get("heads"))
        if names.count(name) > 1 or is_control:
            file = network.path.with_suffix("") if network.path.name != "encoder.pt" else network.path.parent
            name = f"{name}, {file.as_posix().removeprefix('runs/')}"
        out[name] = network

    def place(name):
        method = out[name].about["method"]
        return list(NAMES).index(method) if method in NAMES else len(NAMES)
    return {name: out[name] for name in sorted(out, key=place)}
