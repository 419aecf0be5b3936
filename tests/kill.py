"""python tests/kill.py [--kills 50]: does a killed run end with the files of an uninterrupted one?

train.py (tiles, cells, training) and eval.py (features, DSMIL, exports) on six small synthetic slides are
stopped at random moments, by SIGKILL, SIGTERM, SIGHUP or by closing the pipes that they print to, and started
again; after some stops they are left to end, and every file is compared. Its result: docs/reliability.md.
"""
import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # for synthetic.py, which imports the project

from synthetic import saved, tissue, write_table

FLAGS = ["--data", "in", "--mpp", "1", "--slide-mpp", "1", "--device", "cpu", "--workers", "2"]
COMMANDS = {
    "train.py": [*FLAGS, "--batch", "4", "--epochs", "6", "--warmup-epochs", "1", "--local-crops", "2",
                 "--out-dim", "64", "--disentangled-dim", "16", "--global-size", "64", "--local-size", "32",
                 "--save-minutes", "0"],
    "eval.py": [*FLAGS, "--repeats", "2", "--epochs", "40", "--export", "clam", "csv", "geojson"]}
WAYS = [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, "closed pipes"]
STOPS = 5  # before a pipeline is left to end


def make_slides(folder):
    """Six slides of two classes, 672 x 448 px at 1 um/px, two in every part of the split."""
    rows = []
    for i, split in enumerate(("train", "train", "val", "val", "test", "test")):
        saved(folder / "in" / "slides" / f"s{i}.png", array=np.tile(tissue(224, seed=i), (2, 3, 1)))
        rows.append(f"s{i},{'AB'[i % 2]},{split}")
    write_table(folder / "in" / "labels.csv", "slide,label,split", rows)


def start(script, folder):
    """Starts a script; gives its process and the reading end of the pipe that it prints to."""
    read, written = os.pipe()
    process = subprocess.Popen([sys.executable, ROOT / script, *COMMANDS[script]], cwd=folder, stdout=written,
                               stderr=written, start_new_session=True)
    os.close(written)
    return process, read


def finish(process, read):
    """Reads what a script prints until it ends; its exit code and the text."""
    with open(read, errors="replace") as file:
        text = file.read()
    return process.wait(), text


def stop(script, folder, way, seconds):
    """Stops a script that many seconds after it printed something; gives what it was about to do."""
    process, read = start(script, folder)
    said = os.read(read, 1 << 16)
    until = time.monotonic() + seconds
    os.set_blocking(read, False)
    while time.monotonic() < until and process.poll() is None:
        try:
            said = os.read(read, 1 << 16) or said
        except BlockingIOError:
            time.sleep(0.01)
    if way == "closed pipes":
        os.close(read)
        process.wait(600)
    else:
        os.killpg(process.pid, way) if process.poll() is None else None
        os.set_blocking(read, True)
        finish(process, read)
    words = said.decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.split(":")[0].strip()[:30] for line in reversed(words) if ":" in line), "")


def content(path):
    """What has to be the same in two files of this name."""
    if path.suffix == ".pt":  # the order of a zip's entries does not count
        state = torch.load(path, weights_only=True)
        return repr(state) if torch.is_tensor(state) else repr(sorted(
            (name, value) for name, value in flatten(state)))
    return path.read_bytes()


def flatten(state, name=""):
    """(name, value) of everything in nested dicts and lists, tensors as bytes."""
    if isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        for key, value in items:
            yield from flatten(value, f"{name}/{key}")
    else:
        yield name, state.numpy().tobytes() if torch.is_tensor(state) else state


def files(folder):
    """{relative path: content} of all files, without locks and what killed processes left half written."""
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix != ".part" and path.name != ".lock"}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, place, took = random.Random(args.seed), Path(tempfile.mkdtemp()), {}
    make_slides(place / "whole")
    for script in COMMANDS:
        process, read = start(script, place / "whole")
        first = os.read(read, 1)
        began = time.monotonic()
        code, text = finish(process, read)
        took[script] = time.monotonic() - began
        assert code == 0 and first, text
    wanted, stopped, wrong = files(place / "whole"), Counter(), []
    for done in range(0, args.kills, STOPS):
        folder = place / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        make_slides(folder)
        ways = [(rng.choice(list(COMMANDS)), rng.choice(WAYS)) for _ in range(min(STOPS, args.kills - done))]
        for script, way in sorted(ways, key=lambda pair: list(COMMANDS).index(pair[0])):
            if script == "eval.py" and not (folder / "finished").exists():
                wrong += [text for code, text in [finish(*start("train.py", folder))] if code]
                (folder / "finished").touch()
            phase = stop(script, folder, way, rng.uniform(0, took[script]))
            stopped[script, getattr(way, "name", way)] += 1
            print(f"{sum(stopped.values())}: {script} by {getattr(way, 'name', way)} at: {phase}", flush=True)
        for script in COMMANDS:
            wrong += [text for code, text in [finish(*start(script, folder))] if code]
        (folder / "finished").unlink(missing_ok=True)
        got = files(folder)
        wrong += [f"{name}: differs" for name in sorted(wanted.keys() | got.keys())
                  if wanted.get(name) != got.get(name)]
    for (script, way), count in sorted(stopped.items()):
        print(f"{script} by {way}: {count}")
    print("\n".join(wrong) or f"{sum(stopped.values())} stops: all {len(wanted)} files are those of the "
          "uninterrupted run")
    shutil.rmtree(place)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
