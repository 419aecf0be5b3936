"""What part 5 of the lab shows of real tissue: numbers that trainings on it gave, without any pixel.

    python -m lab.record "DINO's colour=runs/map_dino" "weaker colour=runs/map_weak"

takes the runs that `python -m experiments.study claim --probe-epochs N --out FOLDER` has measured in each
folder, and writes lab/recorded.npz: each run's aggregated attention of the test crops in 16-bit floats, its
20-NN accuracy on all of them, and the curve of its probe.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.errors import InputError, Parser, run_script
from common.files import atomic_write, read_npz
from common.log import PROBED, read_log
from data import spread

RECORDED = Path(__file__).parent / "recorded.npz"
BYTES = 6_000_000  # of attention; if the runs have more, all keep the same, evenly spread crops
NETWORKS = {  # arms of experiments.study, in the order of the lab's tables
    "random": "random start", "baseline": "DINO", "cellback": "Cellback", "dirl": "DiRL",
    "shuffled": "DiRL, shuffled prior", "two_heads": "DINO, two heads", "registers": "DINO, registers",
    "evenness": "DINO, evenness penalty"}


@dataclass(frozen=True)
class Recording:
    """One run on real tissue."""

    setting: str
    network: str
    seed: int
    attention: torch.Tensor  # (crops, n), aggregated
    accuracy: float  # of 20-NN
    curve: np.ndarray  # (points, 3): step, share of tokens with attention 0.5 to 2, 20-NN of the probe


def load(path=RECORDED):
    """Returns the Recordings, ordered by setting, network and seed; InputError for a broken file."""
    saved = read_npz(path)
    if saved is None:
        raise InputError(f"{path}: is missing or corrupt; check it out again, or record runs into it")
    names = [key.removesuffix("|attention") for key in saved if key.endswith("|attention")]
    recordings = []
    for name in names:
        setting, network, seed = name.split("|")
        attention = torch.from_numpy(saved[f"{name}|attention"]).float()
        recordings.append(Recording(setting, network, int(seed), attention,
                                    float(saved[f"{name}|accuracy"]), saved[f"{name}|curve"]))
    return recordings


def read_run(folder):
    """Returns attention (T, n), 20-NN accuracy and curve of a measured run."""
    claim = read_npz(folder / "claim.npz")
    if claim is None:
        raise InputError(f"{folder}/claim.npz: is corrupt; delete it and measure the run again")
    correct = claim["20-NN"].argmax(-1) == claim["labels"]
    curve = [(int(row["step"]) + 1, float(row[PROBED[1]]), float(row[PROBED[-1]]))
             for row in read_log(folder / "log.csv") if row.get(PROBED[-1])]
    return claim["attention"], correct.mean(), np.array(curve).reshape(-1, 3)


def read_studies(studies):
    """Returns {(setting, network, seed): read_run} of studies {setting: folder}; InputError without a run."""
    runs = {}
    for setting, folder in studies.items():
        for arm, network in NETWORKS.items():
            for path in sorted(Path(folder).glob(f"{arm}_seed*/claim.npz")):
                seed = path.parent.name.removeprefix(f"{arm}_seed")
                if seed.isdigit():
                    runs[setting, network, int(seed)] = read_run(path.parent)
        if not any(of == setting for of, *_ in runs):
            raise InputError(f"{folder}: has no measured run; python -m experiments.study claim makes them")
    return runs


def record(studies, path=RECORDED):
    """Writes the recordings of studies {setting: folder}; returns 0."""
    runs = read_studies(studies)
    crops = {len(attention) for attention, *_ in runs.values()}
    if len(crops) > 1:
        raise InputError(f"the runs were measured on {', '.join(map(str, sorted(crops)))} test crops; "
                         "record runs of one data set and split")
    count, tokens = next(iter(runs.values()))[0].shape
    kept = spread(count, BYTES // (2 * tokens * len(runs)))
    saved = {}
    for (setting, network, seed), (attention, accuracy, curve) in runs.items():
        name = f"{setting}|{network}|{seed}"
        saved[f"{name}|attention"] = attention[kept].astype(np.float16)
        saved[f"{name}|accuracy"] = np.float32(accuracy)
        saved[f"{name}|curve"] = curve.astype(np.float32)
    with atomic_write(path) as temp, open(temp, "wb") as file:
        np.savez_compressed(file, **saved)
    print(f"Wrote {path}: {len(runs)} runs, {len(kept)} of {count} test crops, "
          f"{path.stat().st_size / 1e6:.1f} MB. Next: store the notebook's outputs again.")
    return 0


def main(argv=None, path=RECORDED):
    parser = Parser(prog="python -m lab.record", description="Records runs on real tissue for the lab.")
    parser.add_argument("studies", nargs="+", metavar="SETTING=FOLDER",
                        help="the setting's name in the lab, and the folder of its study")

    def command():
        studies = {}
        for study in parser.parse_args(argv).studies:
            setting, _, folder = study.partition("=")
            if not setting or not folder or "|" in setting:
                raise InputError(f"{study}: SETTING=FOLDER is expected, such as weaker=runs/map_weak")
            studies[setting] = folder
        return record(studies, path)
    return run_script("record", command)


if __name__ == "__main__":
    sys.exit(main())
