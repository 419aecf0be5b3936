"""How cost grows (docs/performance.md): a step over batch, views and image size; slides; start-up over crops.

    python -m experiments.growth [--steps 3] [--what batch views size slides crops] [flags of train.py]

A step is measured by train.py --benchmark. Slides are prepared anew in a temporary folder; crops are empty
synthetic files, 1,000 a slide with 100 cells each. Writes runs/growth.png and its numbers as CSV next to it.
"""
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common.errors import InputError, check_ranges, run_script
from common.files import write_json
from data import Crops, find_data
from experiments import inputs
from experiments.claim import TRAIN
from wsi.folders import Data
from wsi.prepare import TILES, made_from, tiles_folder
from wsi.segment import save_cells
from wsi.slides import file_identity

PER_SLIDE, CELLS = 1000, 100  # of the synthetic slides: crops, and cells of each
AXES = {  # what is varied: its name, its values
    "batch": ("crops a step, 2 + 8 views", (4, 8, 16, 32)),
    "views": ("local views, 8 crops", (0, 2, 4, 8)),
    "size": ("px of 2 global views, 4 crops", (224, 320, 448)),
    "slides": ("slides prepared", (4, 13, 26, 52)),
    "crops": ("crops at start-up", (10 ** 4, 10 ** 5, 10 ** 6)),
}
STEPS = {  # of a value: crops a step, local views, px of the global views
    "batch": lambda value: (value, 8, 224),
    "views": lambda value: (8, value, 224),
    "size": lambda value: (4, 0, value),
}
PRINTED = re.compile(r"([\d.]+) images a second, peak memory ([\d.]+) GiB")


def arguments(argv):
    parser, add = inputs.parser_of(
        "growth", "Measures how cost grows.", allow_abbrev=False,
        epilog="All other flags are train.py's, for the steps: --arch, --method, --precision, ...")
    add("--data", default="demo", help="crops of the steps, and slides that are prepared; as in train.py")
    add("--what", nargs="+", default=list(AXES), choices=list(AXES), help="what is varied")
    add("--steps", type=int, default=3, help="measured steps; more on a noisy machine")
    add("--out", default="runs/growth.png", help="the figure")
    args, args.rest = parser.parse_known_args(argv)
    check_ranges(args, steps=(1, 1e6))
    return args


def step(args, what, value):
    """Seconds of a training step and peak GiB, by train.py --benchmark."""
    batch, local_crops, size = STEPS[what](value)
    flags = ["--data", args.data, "--arch", "vit_t", "--out-dim", "65536", "--disentangled-dim", "4096",
             "--local-size", "96", *args.rest, "--batch", str(batch), "--local-crops", str(local_crops),
             "--global-size", str(size), "--benchmark", str(args.steps)]
    done = subprocess.run([sys.executable, TRAIN, *flags], capture_output=True, text=True)
    found = PRINTED.search(done.stdout)
    if not found:
        why = done.stderr.strip() or "no figures"
        raise InputError(f"train.py {' '.join(flags)}: {why.splitlines()[-1]}")
    rate, peak = map(float, found.groups())
    return batch / rate, peak


def slides(args, count):
    """Seconds of data.py prepare for the first count slides, and peak GiB of one process; None if too few."""
    images = [Path(path).resolve() for path in find_data(args.data).images.values()]
    if count > len(images):
        return None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "some" / "slides").mkdir(parents=True)
        for path in images[:count]:
            (Path(folder) / "some" / "slides" / path.name).symlink_to(path)
        began = time.perf_counter()
        command = [sys.executable, TRAIN.with_name("data.py"), "prepare", "--data", "some", "--mpp", "2",
                   "--workers", str(os.cpu_count())]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        prepare = subprocess.Popen(command, cwd=folder, **quiet)
        _, status, used = os.wait4(prepare.pid, 0)
        if status:
            raise InputError(f"data.py prepare: failed on the slides of {args.data}; try it by itself")
        return time.perf_counter() - began, used.ru_maxrss / 2 ** 20


def synthetic_data(folder, crops):
    """A data set of empty files as prepare() leaves them: PER_SLIDE crops a slide, CELLS cells a crop."""
    source, rng = Path(folder) / "src", np.random.default_rng(0)
    images = {f"s{k:05d}": source / f"s{k:05d}.svs" for k in range(crops // PER_SLIDE)}
    found = Data("synthetic", source, Path(folder) / "work", 2.0, "slides", images)
    source.mkdir()
    for name, path in images.items():
        path.write_bytes(b"x")
        tiles = tiles_folder(found) / name
        tiles.mkdir(parents=True)
        for k in range(PER_SLIDE):
            (tiles / f"{448 * (k % 40)}_{448 * (k // 40)}.jpg").touch()
        info = dict.fromkeys(TILES, 0) | {"mpp": 2.0, "slide_mpp": 1.0, "mpp_source": "synthetic"}
        write_json(tiles.with_suffix(".json"), info | file_identity(path))
        cells = found.work / "cells" / "builtin" / f"{name}.npz"
        xy = rng.integers(0, (448 * 40, 448 * PER_SLIDE // 40), (CELLS * PER_SLIDE, 2))
        save_cells(cells, xy, made_from(found, name, cells))
    return found


def start_up(crops):
    """Seconds of data.Crops on synthetic files, and the peak GiB above what the imports take."""
    with tempfile.TemporaryDirectory() as folder:
        found = synthetic_data(folder, crops)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        made = Crops(found, list(found.images))
        seconds = time.perf_counter() - began
        if (len(made), len(made.xy)) != (crops, CELLS * crops):
            raise InputError(f"{folder}: {len(made)} crops and {len(made.xy)} cells; is the disk full?")
        return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 20


def measure(args, what, value):
    if what == "slides":
        return slides(args, value)
    if what == "crops":  # in a process of its own, whose memory has no history
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(start_up, value).result()
    return step(args, what, value)


def draw(found):
    """{what: [(value, seconds, GiB), ...]}: seconds above, peak memory below."""
    figure = Figure(figsize=(2.6 * len(found) + 0.4, 4.2), layout="constrained")
    rows = figure.subplots(2, len(found), squeeze=False)
    for k, (what, points) in enumerate(found.items()):
        x, *measured = np.transpose(points)
        for axis, y, label in zip(rows[:, k], measured, ("seconds", "peak memory, GiB")):
            axis.plot(x, y, "o-", color=inputs.COLORS[1], ms=4)
            if what == "crops" and min(y) > 0:
                axis.set(xscale="log", yscale="log")
            else:
                axis.set_ylim(0, 1.15 * max(y) or 1)
            axis.set_ylabel(label if k == 0 else "")
        rows[1, k].set_xlabel(AXES[what][0])
    return figure


def run(args):
    found = {}
    for what in args.what:
        for value in AXES[what][1]:
            if measured := measure(args, what, value):
                found.setdefault(what, []).append((value, *measured))
                print(f"{what} {value}: {measured[0]:.3g} s, {measured[1]:.2f} GiB", flush=True)
    rows = [("what", "value", "seconds", "GiB")]
    rows += [(what, *point) for what, points in found.items() for point in points]
    inputs.save_both(draw(found), rows, args.out)
    return 0


def main(argv=None):
    return run_script("growth", lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
