"""log.csv of a run, its progress bar, and its warnings."""
import csv
import math
import os
import re
import time
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from common.distributed import rank
from common.files import atomic_write, not_written, read_json

READ_EVERY = 10  # steps
UNIFORM = 0.98  # a head whose teacher's entropy is above this share of ln K learns nothing,
ONE_PROTOTYPE = 0.02  # nor does one below this share
MORE_CONTRAST = ("Lower --teacher-temp or --out-dim, take more crops or epochs, or weaken the colour "
                 "augmentation (--jitter, --greyscale, --solarize, --blur)")
LESS_CONTRAST = "Raise --teacher-temp, or lower --center-momentum or --lr"
MIDDLE = "tokens with attention 0.5 to 2"
EVERY_TOKEN = 0.9995  # shares of tokens from here on are printed as 1.000
PROBED = ("probe_0_to_0.5", "probe_0.5_to_2", "probe_over_2", "probe_knn")  # columns of watch.probe


def symbol_of(head):
    """Returns the paper's symbol of a head's input: "f", or "f_c" for head "c"."""
    return head if head.startswith("f") else f"f_{head}"


class Log:
    """log.csv and the progress bar of a run that starts or resumes at step start.

    names: of the losses. dino: {name: dirl.DINOLoss} of the heads with prototypes; the teacher's entropy H(q)
    and the divergence KL(q || p), which add up to a head's loss, are logged as shares of ln K. reads_late:
    reads the values of READ_EVERY steps at once, because every read makes a GPU wait. has_cells: without them
    both_regions and cell_share stay empty.
    """

    def __init__(self, folder, names, dino, start, steps, per_epoch, batch, out_dim, reads_late=False,
                 has_cells=True):
        self.names = names
        self.ln_k = {name: math.log(len(cross_entropy.center)) for name, cross_entropy in dino.items()}
        self.start = start
        self.per_epoch = per_epoch
        self.batch = batch
        self.ln_out_dim = math.log(out_dim)
        self.has_cells = has_cells
        self.started_at = time.monotonic()
        self.read_every = READ_EVERY if reads_late else 1
        self.warned = set()  # heads
        self.entropies = []  # {head: entropy} of each step of this epoch
        self.unread = []  # steps whose values are still on the device
        self.columns = [
            "step", "epoch", "loss", *(f"loss_{name}" for name in names),
            *(f"entropy_{head}" for head in dino), *(f"kl_{head}" for head in dino), "lr", "momentum",
            "teacher_temp", "both_regions", "cell_share", "ln_out_dim", "rank", *PROBED]
        self.file = open(os.devnull, "w") if rank() else self.open(Path(folder) / "log.csv")
        self.bar = tqdm(total=steps, initial=start, unit="step", mininterval=1, disable=rank() > 0,
                        bar_format="{n_fmt}/{total_fmt} {bar:10} {remaining} left{postfix}")

    def open(self, path):
        """Opens log.csv; only the rows of steps before the start are kept."""
        kept = [row for row in read_log(path) if int(row["step"]) < self.start]
        with atomic_write(path) as temp, open(temp, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        return open(path, "a", newline="")

    def write(self, step, values, schedule, effective_rank, probed):
        """Adds the row of a step: values, schedule of train.training_step, and what common.watch measured."""
        self.unread.append((step, values, schedule, effective_rank, probed))
        if len(self.unread) == self.read_every or (step + 1) % self.per_epoch == 0:
            self.read()

    def read(self):
        """Writes the unread rows; FloatingPointError if a loss or a gradient in them is not finite."""
        if not self.unread:
            return
        all_values = torch.stack([values for _, values, *_ in self.unread]).tolist()
        try:
            for (step, _, *others), values in zip(self.unread, all_values):
                *values, finite = values
                if not (math.isfinite(values[0]) and finite > 0.999):  # finite: a rounded mean
                    raise FloatingPointError(
                        f"the loss or a gradient is not finite at step {step} (loss {values[0]}); the run's "
                        "checkpoint.pt, if it exists, is the last good state. Try a lower --lr, a longer "
                        "--warmup-epochs or --precision fp32, with a new --run")
                self.write_row(step, values, *others)
            self.file.flush()
        except OSError as error:
            raise not_written(self.file.name, error) from None
        self.unread = []

    def write_row(self, step, values, schedule, effective_rank, probed):
        """Writes the row of a step whose values have been read, and updates the progress bar."""
        loss, *values, both_regions, cell_share = values
        losses = dict(zip(self.names, values))
        entropy, kl = {}, {}  # shares of ln K
        for head, value in zip(self.ln_k, values[len(losses):]):
            entropy[head] = value / self.ln_k[head]
            kl[head] = losses[head] / self.ln_k[head] - entropy[head]

        row = {"step": step, "epoch": step // self.per_epoch, "loss": f"{loss:.6g}",
               "lr": f"{schedule.lr:.6g}", "momentum": f"{schedule.momentum:.8g}",
               "teacher_temp": f"{schedule.teacher_temp:.6g}", "ln_out_dim": f"{self.ln_out_dim:.6g}"}
        if self.has_cells:
            row |= {"both_regions": f"{both_regions:.4g}", "cell_share": f"{cell_share:.4g}"}
        for column, of_heads in (("loss", losses), ("entropy", entropy), ("kl", kl)):
            row |= {f"{column}_{head}": f"{value:.6g}" for head, value in of_heads.items()}
        if effective_rank is not None:
            row["rank"] = f"{effective_rank:.4g}"
        if probed:
            row |= {column: f"{value:.4g}" for column, value in zip(PROBED, probed)}
        csv.DictWriter(self.file, self.columns).writerow(row)

        self.bar.update()
        shown = {"loss": f"{loss:.3f}", "lr": f"{schedule.lr:.0e}", "img/s": f"{self.speed(step + 1):.0f}"}
        if entropy:
            shown["H"] = f"{sum(entropy.values()) / len(entropy):.2f}"
            shown["KL"] = f"{sum(kl.values()) / len(kl):.2f}"
        self.bar.set_postfix(shown, refresh=False)
        self.warn(step, entropy)
        if probed:
            _, middle, _, accuracy = probed
            untrained = " (as in an untrained network)" if middle >= EVERY_TOKEN else ""
            tqdm.write(f"step {step + 1}: {MIDDLE} {middle:.1%}{untrained}, "
                       f"20-NN accuracy {accuracy:.3f} on the probe")

    def warn(self, step, entropy):
        """Warns once of each head whose outputs were uniform, or on one prototype, for a whole epoch."""
        self.entropies.append(entropy)
        if (step + 1) % self.per_epoch:
            return
        steps = self.entropies
        self.entropies = []
        if len(steps) < self.per_epoch:  # the run was resumed within the epoch
            return
        for head in self.ln_k:
            # exactly 0: no pair of views of that step had the region
            entropies = [of_step[head] for of_step in steps if of_step[head]]
            if not entropies or head in self.warned:
                continue
            if min(entropies) > UNIFORM:
                state, advice = "been uniform", MORE_CONTRAST
            elif max(entropies) < ONE_PROTOTYPE:
                state, advice = "been on one prototype each", LESS_CONTRAST
            else:
                continue
            self.warned.add(head)
            tqdm.write(f"warning: step {step + 1}: for a whole epoch the outputs of head {symbol_of(head)} "
                       f"have {state}: it has collapsed. {advice}")

    def speed(self, step):
        """Returns the crops per second since training started or resumed."""
        return (step - self.start) * self.batch / (time.monotonic() - self.started_at)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()
        with suppress(OSError):  # the rows have been flushed, or that has failed already
            self.file.close()


def read_log(path):
    """Returns the rows of a log.csv as dicts; [] without the file. Rows without a step are dropped."""
    if not path.is_file():
        return []
    with open(path, newline="", errors="replace") as file:
        rows = list(csv.DictReader(line.replace("\0", "") for line in file))
    return [row for row in rows if re.fullmatch("[0-9]+", row.get("step") or "")]


def is_finished(folder):
    """Returns whether the run in this folder reached its last step, by its config.json and log.csv."""
    config = read_json(folder / "config.json")
    log = read_log(folder / "log.csv")
    if not config or not log:
        return False
    steps = config["epochs"] * (config["crops"] // config["batch"])
    return int(log[-1]["step"]) + 1 == steps
