"""The files that a run resumes from: config.json, checkpoint.pt, encoder.pt, and the lock of its folder."""
import json
import time
from pathlib import Path

from filelock import FileLock, Timeout

from common.distributed import rank
from common.encoders import save_encoder
from common.errors import InputError, one_line
from common.files import load_tensors, not_written, read_json, save_tensors, write_json

NOT_FLAGS = {  # entries of config.json that no flag sets, and what they are
    "crops": "number of crops", "images": "slides, patients or their files", "recipe": "recipe",
    "places": "tiles, or cells in them", "pixels": "mean and sd of the pixels"}
HASHES = ("images", "places")


def check_config(path, config):
    """InputError if the run of the config.json at path was started with other settings than config."""
    old = read_json(path)
    if not old:
        raise InputError(f"{path}: cannot be read; use another folder for a new run")
    new = json.loads(json.dumps(config))  # tuples become lists, as in the file
    changed = []
    for name in dict.fromkeys([*new, *old]):
        if name == "recipe" and name not in old:
            continue  # a run of before
        if old.get(name) != new.get(name):
            setting = NOT_FLAGS.get(name, f"--{name.replace('_', '-')}")
            values = f" {old.get(name)} (now {new.get(name)})"
            changed.append(f"other {setting}" if name in HASHES else setting + values)
    if changed:
        raise InputError(f"{path.parent}: was started with {'; '.join(changed)}: use the same settings to "
                         "resume it, or another folder for a new run (--run)")


class Run:
    """The files of a run: config.json, checkpoint.pt, encoder.pt. Its folder is locked from resume to exit.

    config: the settings, which stay the same when the run is resumed. trained_on: the images and patients
    that encoder.pt records. minutes: between checkpoints within an epoch. save_every: epochs between the
    encoder_<epoch>.pt. modules: {name: what has a state_dict}, everything that resuming needs, with a
    "teacher" that has an encoder.
    """

    def __init__(self, folder, config, trained_on, minutes=10, save_every=None, **modules):
        self.folder = Path(folder)
        self.config = config
        self.trained_on = trained_on
        self.modules = modules
        self.minutes = minutes
        self.save_every = save_every
        self.lock = FileLock(self.folder / ".lock", timeout=0)
        self.saved_at = time.monotonic()

    def resume(self):
        """Locks the run folder, loads checkpoint.pt if it exists, and returns the step to resume from.

        Under torchrun every process loads it; only rank 0 locks and writes.
        """
        if not rank():
            self.acquire()
        try:
            step = self.load() if (self.folder / "checkpoint.pt").is_file() else 0
        except BaseException:
            self.lock.release()
            raise
        if not rank():
            write_json(self.folder / "config.json", self.config)
        return step

    def acquire(self):
        """Makes the folder and locks it; InputError if another process has locked it, or on a write error."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
        except Timeout:
            raise InputError(f"{self.folder}: another train.py is writing to it; wait for it, or use another "
                             "--run") from None
        except OSError as error:
            raise not_written(self.folder, error) from None

    def load(self):
        """Loads checkpoint.pt and returns its step; InputError if it is corrupt or of other settings."""
        check_config(self.folder / "config.json", self.config)
        state = load_tensors(self.folder / "checkpoint.pt")
        try:
            for name, module in self.modules.items():
                module.load_state_dict(state[name])
            step = state["step"]
            if type(step) is not int or step < 1:
                raise ValueError(f"step {step}")
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise InputError(f"{self.folder}/checkpoint.pt: is corrupt or belongs to another run "
                             f"({one_line(error)}); delete it to start over") from None
        return step

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.lock.release()

    def save(self, step, log):
        """Writes encoder.pt and checkpoint.pt after a step."""
        log.read()  # raises if the run diverged, so a bad state is never saved
        if not rank():
            self.save_encoder("encoder.pt", step)
            state = {name: module.state_dict() for name, module in self.modules.items()}
            save_tensors(self.folder / "checkpoint.pt", state | {"step": step})  # last: all else is saved
        self.saved_at = time.monotonic()

    def save_encoder(self, name, step):
        about = {key: self.config[key] for key in ("arch", "method", "data", "mpp", "depth", "ssl")}
        save_encoder(self.folder / name, self.modules["teacher"].encoder, **about, step=step,
                     trained_on=self.trained_on)

    def save_if_due(self, step, per_epoch, log):
        """Saves if the last checkpoint is too old: `minutes`, at an epoch's end one; also for save_every."""
        if self.save_every and step % (self.save_every * per_epoch) == 0 and not rank():
            self.save_encoder(f"encoder_{step // per_epoch}.pt", step)
        minutes = min(1, self.minutes) if step % per_epoch == 0 else self.minutes
        if time.monotonic() - self.saved_at > 60 * minutes:
            self.save(step, log)
