"""docs/paper.md: each of its commands runs, at a tiny size.

bash expands the guide's blocks with stand-ins for the programs, which only note how they are called. The
calls then run in this process: of those that differ only in the data set, the encoder or the run, the first;
before it, the trainings that its --checkpoint names. The flags of all trainings are parsed.
"""
import importlib
import os
import re
import subprocess
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from synthetic import SmallHead, make_chaoyang, make_mhist, saved, tissue, write, write_table

import dirl
import eval as evaluation
import train
from common.encoders import ClassTokenViT
from common.files import save_tensors
from experiments import compare, study

pytestmark = pytest.mark.usefixtures("blank_figures")

GUIDE = Path(__file__).resolve().parents[1] / "docs/paper.md"
OTHER_PROGRAMS = ("gdc-client", "curl", "git", "cp")  # named in the guide, not ours
MASKED = ("--data", "--arch", "--checkpoint", "--run", "--out", "--split", "--splits")  # any value is run


def calls_of(text, folder):
    """Returns the words of every command that bash would run for the blocks of a Markdown text."""
    noted = folder / "calls"
    for name in ("python", *OTHER_PROGRAMS):
        program = folder / name
        write(program, f'#!/bin/sh\n{{ printf "%s\\t" "{name}" "$@"; echo; }} >> "{noted}"\n')
        program.chmod(0o755)
    blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-eu", "-c", "\n".join(blocks)], check=True, env=environment)
    return [line.split("\t")[:-1] for line in noted.read_text().splitlines()]


def of(call):
    """Returns (module, argv) of a call of python; None for other programs."""
    program, *words = call
    if program != "python":
        return None
    if words[0] == "-m":
        return words[1], words[2:]
    return words[0].removesuffix(".py"), words[1:]


def values_of(argv, flag):
    """Returns the values that follow a flag."""
    if flag not in argv:
        return []
    after = argv[argv.index(flag) + 1:]
    end = next((i for i, word in enumerate(after) if word.startswith("--")), len(after))
    return after[:end]


def key_of(module, argv):
    """Returns what tells calls apart that are run: all words but the values of MASKED."""
    words = list(argv)
    for flag in MASKED:
        for value in values_of(words, flag):
            words.remove(value)
    return module, *words


@pytest.fixture
def data_sets(tmp_path, monkeypatch):
    """A new folder with what the commands read: datasets/ of a few tiny slides or images each, and files."""
    monkeypatch.chdir(tmp_path)
    tcga = {"lung": ("LUAD", "LUSC"), "brca": ("IDC", "ILC"), "paad": ("basal", "classical")}
    for data, classes in tcga.items():
        slides_of(data, classes, side=448)
    slides_of("bright", ("PB", "UDH", "FEA", "ADH", "DCIS", "IC"), side=224)
    make_mhist()
    make_chaoyang()
    for picture in ("dog.jpg", "crop.jpg"):
        saved(Path(picture))


def slides_of(data, classes, side):
    """Writes five slides of a tile of each class with cells, and a published split."""
    folder = Path("datasets", data)
    rows = []
    names = {"train": [], "val": [], "test": []}
    for i, label in enumerate(classes):
        for k, split in enumerate(("train", "train", "train", "val", "test")):
            name = f"TCGA-05-{i}{k:03d}-01Z-00-DX1"
            names[split].append(name)
            saved(folder / "slides" / f"{name}.png", array=tissue(side, seed=10 * i + k))
            cells = np.random.default_rng(k).uniform(0, side, (30, 2))
            for segmenter in (".", "hovernet", "cellpose", "histomicstk"):
                write_table(folder / "cells" / segmenter / f"{name}.csv", "x,y",
                            [f"{x:.1f},{y:.1f}" for x, y in cells])
            rows.append(f"{name},{label},{split},1.0")
    write_table(folder / "labels.csv", "slide,label,split,mpp", rows)
    columns = zip_longest(*names.values(), fillvalue="")
    write_table(Path(f"splits/tcga_{data}/splits_0.csv"), "train,val,test", map(",".join, columns))


@pytest.fixture
def tiny_networks(data_sets, monkeypatch):
    """Encoders of 3 blocks and heads, 64 wide."""
    def small(depth=3, **kw):
        return dirl.VisionTransformer(64, depth, 1, **kw)
    monkeypatch.setitem(dirl.ARCHS, "vit_t", small)
    monkeypatch.setitem(dirl.ARCHS, "vit_s", small)
    monkeypatch.setitem(dirl.ARCHS, "vit_h", small)
    monkeypatch.setattr(dirl, "DINOHead", SmallHead)

    def in_this_process(command):
        return SimpleNamespace(returncode=evaluation.main(command[2:]))
    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=in_this_process))
    encoder = ClassTokenViT(64, 3, 1)  # DINO's ViT-S
    positions = torch.zeros(1, 197, 64)
    save_tensors(Path("dino_deitsmall16_pretrain.pth"), encoder.state_dict() | {"pos_embed": positions})


CPU = "--device cpu".split()
TRAINING = [*CPU, *"--workers 0 --batch 4 --warmup-epochs 0 --global-size 32 --local-size 16 --out-dim 8 "
                   "--disentangled-dim 8 --precision fp32".split()]
SWEEP = [*TRAINING, *"--epochs 1 --repeats 1 --mil-epochs 1".split()]
SIZES = {  # flags that make a call tiny, by module and its first word
    "train": TRAINING,
    "experiments.compare": TRAINING,
    "experiments.study prior": [*SWEEP, "--values", "histomicstk"],
    "experiments.study fraction": [*SWEEP, "--values", "1", "--methods", "dirl"],
    "experiments.study folds": [*CPU, *"--epochs 1".split()],
    "eval": [*CPU, *"--workers 0 --repeats 1 --epochs 1 --attention-crops 2".split()],
    "eval patches": [*CPU, *"--workers 0 --epochs 1 --milestones 1 --batch 2 --folds 2".split()],
    "experiments.figures.attention": CPU,
    "experiments.figures.attention picture": [],
    "experiments.figures.tokens": [*CPU, *"--tokens 10 --perplexity 3".split()],
    "experiments.figures.views": "--crops 4 --workers 0".split(),
    "experiments.figures.priors": "--crops 4 --workers 0".split(),
    "experiments.table": [],
}
PARSERS = {"train": train.arguments, "experiments.compare": compare.arguments}  # of what makes runs
NETWORK = "data"  # data.py manifest asks the GDC: tests/test_gdc.py runs it


def size_of(module, argv):
    """Returns the flags that make a call tiny."""
    sizes = SIZES.get(f"{module} {argv[0]}" if argv else module, SIZES.get(module))
    assert sizes is not None, f"{module} {argv[:1]}: tests/test_paper.py has no tiny size for it"
    if module in PARSERS:
        sizes = [*sizes, "--epochs", "1"]
    return [*sizes, "--save-every", "1"] if "--save-every" in argv else sizes


def run_of(path):
    """Returns the folder of the run, or the file, that a value of --checkpoint names; of folds the first."""
    path = Path(path.split("=")[-1].replace("{fold}", "0"))
    return path.parent if path.suffix == ".pt" else path


class Guide:
    """The calls of the guide; runs them, each once, and first the trainings that they need."""

    def __init__(self, calls):
        self.calls = calls
        self.training = {}  # {run folder: (module, argv)}
        self.done = set()
        for module, argv in calls:
            if module in PARSERS:
                self.training[Path(PARSERS[module](argv).run)] = module, argv

    def run(self, module, argv):
        if (module, *argv) in self.done:
            return
        self.done.add((module, *argv))
        for value in values_of(argv, "--checkpoint"):
            needed = run_of(value)
            assert needed in self.training or needed.exists(), f"{value}: no command before makes it"
            if needed in self.training:
                self.run(*self.training[needed])
        code = importlib.import_module(module).main([*argv, *size_of(module, argv)])
        assert code == 0, (module, argv)


def test_every_command_of_the_guide_runs(tiny_networks, tmp_path):
    calls = [of(call) for call in calls_of(GUIDE.read_text(), tmp_path / "programs")]
    calls = [call for call in calls if call and call[0] != NETWORK]
    guide = Guide(calls)
    chosen = {}
    for call in calls:
        chosen.setdefault(key_of(*call), call)
    for call in chosen.values():
        guide.run(*call)
    assert len(calls) > 100 and {key_of(*call) for call in calls} == chosen.keys()
