"""Writes and reads the files of a pre-training run: config.json, checkpoint.pt, encoder.pt, log.csv."""
import csv
import fcntl
import json
import math
import os
import re
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

import dirl
from common.encoders import save_encoder, use_bf16
from common.errors import InputError, one_line
from common.files import atomic_write, load_tensors, read_json, save_tensors, stamp_of, write_json
from common.processes import rank

RESUMABLE = (  # flags that may change when a run is resumed
    "run", "plot", "benchmark", "pack", "compile", "workers", "save_minutes", "save_every",
    "max_steps", "device", "probe", "probe_epochs", "probe_images", "split_seed", "max_seconds",
    "max_gigapixels")
READ_EVERY = 10  # steps
UNIFORM, ONE_PROTOTYPE = 0.98, 0.02  # of ln K: the teacher's entropy beyond which a head learns nothing
MORE_CONTRAST = ("Lower --teacher-temp or --out-dim, take more crops or epochs, or weaken the augmentation "
                 "(--jitter, --greyscale, --solarize, --blur).")
LESS_CONTRAST = "Raise --teacher-temp, or lower --center-momentum or --lr."
MIDDLE = "tokens with attention 0.5 to 2"
EVERY_TOKEN = 0.9995  # the share of tokens from which on 1.000 is printed
PROBED = ("probe_0_to_0.5", "probe_0.5_to_2", "probe_over_2", "probe_knn")  # shares of tokens, accuracy


def symbol_of(head):
    """The paper's symbol for what a head takes: "f", or "f_c" for head "c"."""
    return "f" if head == "f" else f"f_{head}"


def check_config(path, config):
    """InputError if the run of the config.json at path was started with settings other than config."""
    old, changed = read_json(path), []
    if not old:
        raise InputError(f"{path}: cannot be read; use another folder for a new run")
    new = {"ssl": None} | json.loads(json.dumps(config))  # train.py does not go on with another --ssl
    for name, value in new.items():
        if old.get(name) != value:
            flag = name if name in ("crops", "images", "labels", "pixels") else f"--{name.replace('_', '-')}"
            changed.append(f"{flag} {old.get(name)} (now {value})")
    if changed:
        raise InputError(f"{path.parent}: was made with {'; '.join(changed)}: use the same to resume it, "
                         "or another folder for a new run (--run)")


def lock_folder(folder):
    """An open file that locks a run's folder while this process lives; InputError if another has the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); run where you may write") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise InputError(f"{folder}: another train.py is writing to it; wait for it, or use another "
                         "--run") from None
    return file


class Run:
    """The files of a run: config.json (its settings), checkpoint.pt, encoder.pt; locked from resume to exit.

    parts: {name: what has a state_dict}, all that resuming needs; seen: what the encoder is trained on.
    """

    def __init__(self, args, name, mpp, crops, seen, **parts):
        self.folder, self.parts, self.seen = Path(args.run), parts, seen
        self.minutes, self.every, self.saved = args.save_minutes, args.save_every, time.monotonic()
        self.device, self.bf16 = torch.device(args.device), use_bf16(args.precision, args.device)
        flags = {flag: value for flag, value in vars(args).items() if flag not in RESUMABLE}
        self.config = flags | {
            "data": name, "mpp": mpp, "precision": "bf16" if self.bf16 else "fp32",
            "crops": crops, "images": f"{len(seen['images'])} (stamp {stamp_of(seen)})"}

    def resume(self):
        """Locks the folder, loads a checkpoint that is there into the parts; gives the step to go on at.

        Of several processes each loads, and the first alone locks and writes.
        """
        with ExitStack() as until_loaded:
            self.lock = until_loaded.enter_context(nullcontext() if rank() else lock_folder(self.folder))
            step = self.load() if (self.folder / "checkpoint.pt").is_file() else 0
            if not rank():
                write_json(self.folder / "config.json", self.config)
            until_loaded.pop_all()
        return step

    def load(self):
        """Loads checkpoint.pt and gives its step; InputError if it is damaged or of other settings."""
        check_config(self.folder / "config.json", self.config)
        state = load_tensors(self.folder / "checkpoint.pt")
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            step = state["step"]
            if type(step) is not int or step < 1:
                raise ValueError(f"step {step}")
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise InputError(f"{self.folder}/checkpoint.pt: is damaged or not of this run "
                             f"({one_line(error)}); delete it to begin again") from None
        return step

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.lock:
            self.lock.close()

    def save(self, step, log):
        log.read()  # ends the run if it diverged: what is saved is good
        if not rank():
            self.save_encoder("encoder.pt", step)
            state = {name: part.state_dict() for name, part in self.parts.items()}
            save_tensors(self.folder / "checkpoint.pt", state | {"step": step})  # last: marks all as saved
        self.saved = time.monotonic()

    def save_encoder(self, name, step):
        about = {name: self.config[name] for name in ("arch", "method", "data", "mpp", "depth", "ssl")
                 if name in self.config}
        save_encoder(self.folder / name, self.parts["teacher"].encoder, **about, step=step,
                     trained_on=self.seen)

    def diverged(self, step, loss):
        checkpoint = self.folder / "checkpoint.pt"
        kept = f"{checkpoint} is the last good state" if checkpoint.is_file() else "nothing is saved yet"
        return (f"the loss or a gradient is not finite at step {step} (loss {loss}); {kept}. Try a lower "
                "--lr, a longer --warmup-epochs or --precision fp32, with a new --run")

    def save_if_due(self, step, per_epoch, log):
        """Saves when --save-minutes have passed, at an epoch's end when one minute has; and --save-every."""
        if self.every and step % (self.every * per_epoch) == 0 and not rank():
            self.save_encoder(f"encoder_{step // per_epoch}.pt", step)
        minutes = min(1, self.minutes) if step % per_epoch == 0 else self.minutes
        if time.monotonic() - self.saved > 60 * minutes:
            self.save(step, log)


class Log:
    """log.csv and the progress bar of a run that starts or resumes at step start.

    Entropies and divergences are shares of ln K, with K outputs of the heads whose loss has a centre: losses
    is {name: the module of L_name}. On a GPU the values of READ_EVERY steps are read at once, for each
    reading makes it wait.
    """

    def __init__(self, args, run, losses, start, steps, per_epoch):
        self.args, self.run, self.losses, self.start, self.per_epoch = args, run, losses, start, per_epoch
        self.began, self.every = time.monotonic(), READ_EVERY if run.device.type == "cuda" else 1
        self.ln_k = {name: math.log(len(cross_entropy.center)) for name, cross_entropy in losses.items()
                     if hasattr(cross_entropy, "center")}
        self.told, self.seen, self.parts, self.waiting = set(), [], [], []
        self.file = open(os.devnull, "w") if rank() else self.open(Path(args.run) / "log.csv")
        self.bar = tqdm(total=steps, initial=start, unit="step", mininterval=1, disable=rank() > 0)

    def open(self, path):
        """The file, with the rows of the steps before the first kept."""
        names = ["step", "epoch", "loss", *(f"loss_{name}" for name in self.losses),
                 *(f"{value}_{head}" for value in ("entropy", "kl") for head in self.ln_k), "lr", "momentum",
                 "teacher_temp", "both_regions", "cell_share", "ln_out_dim", "rank", *PROBED]
        kept = [[row.get(name) for name in names] for row in read_log(path) if int(row["step"]) < self.start]
        with atomic_write(path) as temp, open(temp, "w", newline="") as file:
            csv.writer(file).writerows([names, *kept])
        return open(path, "a", newline="")

    def add(self, loss, each, priors):
        """What a part of a step's batch gave: the loss, {name: L_name}, the views' P_c."""
        has_both = [((p.amax(-1) > 0) & (p.amin(-1) < 1)).flatten() for p in priors]
        both, cells = torch.cat(has_both).float().mean(), (priors[0] > 0).float().mean()
        entropies = [self.losses[name].entropy for name in self.ln_k]
        self.parts.append(torch.stack([loss.detach(), *each.values(), *entropies, both, cells]))

    def write(self, step, finite, schedule, effective_rank, probed):
        """Adds the row of a step, the mean of its parts and processes.

        finite: a tensor, are the gradients? schedule: learning rate, momentum, teacher's temperature; the
        features' effective rank and the probe's result, both None if not due.
        """
        values = torch.cat([torch.stack(self.parts).mean(0), finite.float()[None]])
        self.waiting.append((step, dirl.process_mean(values), schedule, effective_rank, probed))
        self.parts = []
        if len(self.waiting) == self.every or (step + 1) % self.per_epoch == 0:
            self.read()

    def read(self):
        """Writes the rows that wait; FloatingPointError if a loss or a gradient in them is not finite."""
        if not self.waiting:
            return
        steps, values, *others = zip(*self.waiting)
        self.waiting = []
        for step, row, *other in zip(steps, torch.stack(values).tolist(), *others):
            if not (math.isfinite(row[0]) and row[-1] > 0.999):  # a mean over processes, which rounds
                raise FloatingPointError(self.run.diverged(step, row[0]))
            self.write_row(step, row, *other)
        self.file.flush()

    def write_row(self, step, values, schedule, effective_rank, probed):
        (loss, *values), names = values[:-1], list(self.losses)
        losses, (both, cells) = dict(zip(names, values)), values[-2:]
        entropy = [value / k for value, k in zip(values[len(names):], self.ln_k.values())]
        kl = [losses[name] / k - h for (name, k), h in zip(self.ln_k.items(), entropy)]
        csv.writer(self.file).writerow([
            step, step // self.per_epoch,
            *(f"{value:.6g}" for value in (loss, *losses.values(), *entropy, *kl)),
            f"{schedule[0]:.6g}", f"{schedule[1]:.8g}", f"{schedule[2]:.6g}", f"{both:.4g}", f"{cells:.4g}",
            f"{math.log(self.args.out_dim):.6g}", "" if effective_rank is None else f"{effective_rank:.4g}",
            *([f"{value:.4g}" for value in probed] if probed else [""] * len(PROBED))])
        self.bar.update()
        shares = {name: " ".join(f"{v:.2f}" for v in row) for name, row in (("H", entropy), ("KL", kl))}
        self.bar.set_postfix(loss=f"{loss:.3f}", **shares, lr=f"{schedule[0]:.0e}",
                             img_s=f"{self.speed(step + 1):.0f}", refresh=False)
        self.warn(step, entropy)
        if probed:
            untrained = " (as in an untrained network)" if probed[1] >= EVERY_TOKEN else ""
            tqdm.write(f"step {step + 1}: {MIDDLE} {probed[1]:.1%}{untrained}, "
                       f"20-NN accuracy {probed[3]:.3f} on {self.args.probe}")

    def warn(self, step, entropy):
        """Warns once for each head whose outputs were uniform, or on one prototype, for a whole epoch."""
        self.seen.append(entropy)
        if (step + 1) % self.per_epoch:
            return
        rows, self.seen = self.seen, []
        if len(rows) < self.per_epoch:  # resumed within the epoch
            return
        present = {head: [h for h in column if h]  # exactly 0: the region was in no pair of that step
                   for head, column in zip(self.ln_k, zip(*rows))}
        for state, holds, advice in (("uniform", lambda h: min(h) > UNIFORM, MORE_CONTRAST),
                                     ("on one prototype each", lambda h: max(h) < ONE_PROTOTYPE,
                                      LESS_CONTRAST)):
            heads = [head for head, h in present.items() if h and holds(h) and head not in self.told]
            self.told.update(heads)
            if heads:
                named = ", ".join(map(symbol_of, heads))
                tqdm.write(f"warning: step {step + 1}: for an epoch the outputs of the head of {named} have "
                           f"been {state}: nothing is learned there. {advice}")

    def speed(self, step):
        """Crops a second since the start of this call."""
        return (step - self.start) * self.args.batch / (time.monotonic() - self.began)

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
