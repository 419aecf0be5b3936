"""train.py --benchmark: milliseconds of each part of a training step, images a second, peak memory."""
import resource
import time
from contextlib import contextmanager

import numpy as np
import torch

from common.files import print_table

WARM_UP = 3  # steps that are not counted


class Parts:
    """Times named parts of steps on a device; parts may be nested, and each has its own time only."""

    def __init__(self, device):
        self.device, self.took, self.inner = torch.device(device), {}, [0.0]

    def now(self):
        """Seconds, when the device has done what it was asked to."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def part(self, name):
        began = self.now()
        self.inner.append(0.0)
        yield
        whole = self.now() - began
        self.took.setdefault(name, []).append(1000 * (whole - self.inner.pop()))
        self.inner[-1] += whole

    def within(self, module, name):
        """module, whose calls are a part of their own."""
        forward = module.forward

        def timed(*args):
            with self.part(name):
                return forward(*args)
        module.forward = timed

    def report(self, batch, steps, about):
        """Prints the table; a part that ran several times a step counts with their sum."""
        per_step = {name: np.reshape(ms, (steps + WARM_UP, -1)).sum(1)[WARM_UP:]
                    for name, ms in self.took.items()}
        medians = {name: np.median(ms) for name, ms in per_step.items()}
        total = np.median(sum(per_step.values()))
        print_table([("part", "ms a step", "share"), *(
            (name, f"{ms:.1f}", f"{ms / total:.1%}") for name, ms in medians.items())])
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2 ** 30
            where = torch.cuda.get_device_name(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
            where = f"cpu, {torch.get_num_threads()} threads"
        print(f"{1000 * batch / total:.2f} images a second, peak memory {peak:.2f} GiB; {about}, on {where}, "
              f"torch {torch.__version__}, medians of {steps} steps. No run was touched.")
