"""log.csv and the progress bar of a run, and what it warns of."""
import csv
import math
import os
import re
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common.distributed import rank
from common.files import atomic_write, read_json

READ_EVERY = 10  # steps
UNIFORM, ONE_PROTOTYPE = 0.98, 0.02  # of ln K: the teacher's entropy beyond which a head learns nothing
MORE_CONTRAST = ("Lower --teacher-temp or --out-dim, take more crops or epochs, or weaken the colour "
                 "augmentation (--jitter, --greyscale, --solarize, --blur)")
LESS_CONTRAST = "Raise --teacher-temp, or lower --center-momentum or --lr"
MIDDLE = "tokens with attention 0.5 to 2"
EVERY_TOKEN = 0.9995  # the share of tokens from which on 1.000 is printed
PROBED = ("probe_0_to_0.5", "probe_0.5_to_2", "probe_over_2", "probe_knn")  # shares of tokens, accuracy


def symbol_of(head):
    """The paper's symbol for what a head takes: "f", or "f_c" for head "c"."""
    return head if head.startswith("f") else f"f_{head}"


class Log:
    """log.csv and the progress bar of a run that starts or resumes at step start.

    names: of the losses. dino: {name: dirl.DINOLoss} of the heads with prototypes, whose entropies and
    divergences are logged as shares of ln K. reads_late: the values of READ_EVERY steps are read at once, as
    every reading makes a GPU wait. diverged(step, loss): the message of a run whose loss is not finite.
    """

    def __init__(self, folder, names, dino, start, steps, per_epoch, batch, out_dim, diverged,
                 reads_late=False):
        self.names = names
        self.ln_k = {name: math.log(len(cross_entropy.center)) for name, cross_entropy in dino.items()}
        self.start = start
        self.per_epoch = per_epoch
        self.batch = batch
        self.ln_out_dim = math.log(out_dim)
        self.diverged = diverged
        self.began = time.monotonic()
        self.read_every = READ_EVERY if reads_late else 1
        self.warned = set()  # heads
        self.entropies = []  # of this epoch's steps, a list per step
        self.unread = []  # rows whose values are still on the device
        self.file = open(os.devnull, "w") if rank() else self.open(Path(folder) / "log.csv")
        self.bar = tqdm(total=steps, initial=start, unit="step", mininterval=1, disable=rank() > 0,
                        bar_format="{n_fmt}/{total_fmt} {bar:10} {remaining} left{postfix}")

    def open(self, path):
        """The file, with the rows of the steps before the first kept."""
        shares = [f"{value}_{head}" for value in ("entropy", "kl") for head in self.ln_k]
        names = ["step", "epoch", "loss", *(f"loss_{name}" for name in self.names), *shares, "lr", "momentum",
                 "teacher_temp", "both_regions", "cell_share", "ln_out_dim", "rank", *PROBED]
        kept = [[row.get(name) for name in names] for row in read_log(path) if int(row["step"]) < self.start]
        with atomic_write(path) as temp, open(temp, "w", newline="") as file:
            csv.writer(file).writerows([names, *kept])
        return open(path, "a", newline="")

    def write(self, step, values, schedule, effective_rank, probed):
        """Adds the row of a step: what train.training_step measured, and the rank and the probe (or None)."""
        self.unread.append((step, values, schedule, effective_rank, probed))
        if len(self.unread) == self.read_every or (step + 1) % self.per_epoch == 0:
            self.read()

    def read(self):
        """Writes the unread rows; FloatingPointError if a loss or a gradient in them is not finite."""
        if not self.unread:
            return
        all_values = torch.stack([values for _, values, *_ in self.unread]).tolist()
        for (step, _, *others), values in zip(self.unread, all_values):
            *values, finite = values
            if not (math.isfinite(values[0]) and finite > 0.999):  # a mean over processes, which rounds
                raise FloatingPointError(self.diverged(step, values[0]))
            self.write_row(step, values, *others)
        self.unread = []
        self.file.flush()

    def write_row(self, step, values, schedule, effective_rank, probed):
        loss, *values, both_regions, cell_share = values
        losses = dict(zip(self.names, values))
        entropy = {head: value / self.ln_k[head] for head, value in zip(self.ln_k, values[len(losses):])}
        kl = {head: losses[head] / self.ln_k[head] - entropy[head] for head in self.ln_k}
        numbers = [loss, *losses.values(), *entropy.values(), *kl.values()]
        csv.writer(self.file).writerow([
            step, step // self.per_epoch, *(f"{number:.6g}" for number in numbers),
            f"{schedule.lr:.6g}", f"{schedule.momentum:.8g}", f"{schedule.teacher_temp:.6g}",
            f"{both_regions:.4g}", f"{cell_share:.4g}", f"{self.ln_out_dim:.6g}",
            "" if effective_rank is None else f"{effective_rank:.4g}",
            *([f"{value:.4g}" for value in probed] if probed else [""] * len(PROBED))])
        self.bar.update()
        shown = {"loss": f"{loss:.3f}", "lr": f"{schedule.lr:.0e}", "img/s": f"{self.speed(step + 1):.0f}"}
        if entropy:
            shown["H"] = f"{sum(entropy.values()) / len(entropy):.2f}"
            shown["KL"] = f"{sum(kl.values()) / len(kl):.2f}"
        self.bar.set_postfix(shown, refresh=False)
        self.warn(step, entropy)
        if probed:
            untrained = " (as in an untrained network)" if probed[1] >= EVERY_TOKEN else ""
            tqdm.write(f"step {step + 1}: {MIDDLE} {probed[1]:.1%}{untrained}, "
                       f"20-NN accuracy {probed[3]:.3f} on the probe")

    def warn(self, step, entropy):
        """Warns once of each head whose outputs were uniform, or on one prototype, for a whole epoch."""
        self.entropies.append(entropy)
        if (step + 1) % self.per_epoch:
            return
        rows, self.entropies = self.entropies, []
        if len(rows) < self.per_epoch:  # resumed within the epoch
            return
        for head in self.ln_k:
            present = [row[head] for row in rows if row[head]]  # exactly 0: no pair of a step had the region
            if not present or head in self.warned:
                continue
            if min(present) > UNIFORM:
                state, advice = "been uniform", MORE_CONTRAST
            elif max(present) < ONE_PROTOTYPE:
                state, advice = "been on one prototype each", LESS_CONTRAST
            else:
                continue
            self.warned.add(head)
            tqdm.write(f"warning: step {step + 1}: for a whole epoch the outputs of head {symbol_of(head)} "
                       f"have {state}: it has collapsed. {advice}")

    def speed(self, step):
        """Crops a second since the start of this call."""
        return (step - self.start) * self.batch / (time.monotonic() - self.began)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()
        self.file.close()


def read_log(path):
    """The rows of a log.csv as dicts, those that name their step; [] if there is none."""
    if not path.is_file():
        return []
    with open(path, newline="", errors="replace") as file:
        rows = list(csv.DictReader(line.replace("\0", "") for line in file))
    return [row for row in rows if re.fullmatch("[0-9]+", row.get("step") or "")]


def is_finished(folder):
    """Did the run in this folder reach its last step, by its config.json and log.csv?"""
    config, log = read_json(folder / "config.json"), read_log(folder / "log.csv")
    return bool(config and log) and (
        int(log[-1]["step"]) + 1 == config["epochs"] * (config["crops"] // config["batch"]))
