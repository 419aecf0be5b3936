"""Times the sections of a training step: python -m experiments.benchmark [--steps N] [flags of train.py].

Runs train.py's own step on the data set's crops and prints milliseconds per section, crops a second and peak
memory. Writes no run.
"""
import os
import sys
import time
from contextlib import contextmanager

import numpy as np
import torch

import train
from common.errors import InputError, run_script
from common.files import print_table
from common.flags import whole
from dirl import DINOHead

WARM_UP = 3  # untimed steps at the start


class Timer:
    """Times named sections on a device. A section's time excludes the sections that run inside it."""

    def __init__(self, device):
        self.device = device
        self.durations = {}  # {section: milliseconds of each time it ran}
        self.nested = [0.0]  # seconds of the sections inside each open one

    def now(self):
        """Returns the time in seconds, once the device has finished its queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def section(self, name):
        began = self.now()
        self.nested.append(0.0)
        yield
        elapsed = self.now() - began
        self.durations.setdefault(name, []).append(1000 * (elapsed - self.nested.pop()))
        self.nested[-1] += elapsed

    def watch(self, module, name):
        """Times every call of a module as a section."""
        open_sections = []

        def enter(*_):
            open_sections.append(self.section(name))
            open_sections[-1].__enter__()

        def leave(*_):
            open_sections.pop().__exit__(None, None, None)
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def medians(self, steps):
        """Returns {section: median milliseconds a step} and the median of their sum, without WARM_UP."""
        per_step = {name: np.reshape(ms, (steps + WARM_UP, -1)).sum(1)[WARM_UP:]
                    for name, ms in self.durations.items()}
        total = np.median(sum(per_step.values()))
        return {name: np.median(ms) for name, ms in per_step.items()}, total


def peak_memory(device):
    """Returns the peak memory in GiB (NaN on Windows, which does not record it) and the device's name."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30, torch.cuda.get_device_name(device)
    where = f"cpu, {torch.get_num_threads()} threads"
    try:
        import resource
    except ImportError:
        return float("nan"), where
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kib / 2 ** 20, where


def benchmark(args, build=train.build_dirl):
    """Times args.steps steps and prints a row per section; returns 0."""
    data, settings, recipe, optimizer = train.set_up(args, build)
    model = torch.compile(recipe.student) if args.compile else recipe.student
    timer = Timer(settings.device)
    if not args.compile:  # a hook would split the compiled graph
        for module in recipe.student.modules():
            if isinstance(module, DINOHead):
                timer.watch(module, "student's heads")
    loader = iter(train.loader_of(data.crops, args, 0, WARM_UP + args.steps))
    for step in range(WARM_UP + args.steps):
        with timer.section("crops read"):
            images, cells = next(loader)
        train.training_step(recipe, model, optimizer, images, cells, step, settings, timer.section)
    medians, total = timer.medians(args.steps)
    rows = [(name, f"{ms:.1f}", f"{ms / total:.1%}") for name, ms in medians.items()]
    print_table([("section", "ms a step", "share"), *rows])
    peak, where = peak_memory(settings.device)
    precision = "bf16" if settings.bf16 else "fp32"
    print(f"{1000 * args.batch / total:.2f} crops a second, peak memory {peak:.2f} GiB; {args.method} "
          f"{args.arch}, batch {args.batch}, 2 + {args.local_crops} views of {args.global_size} and "
          f"{args.local_size} px, {precision}, on {where}, torch {torch.__version__}, medians of "
          f"{args.steps} steps. No run was written.")
    return 0


def arguments(argv):
    parser = train.argument_parser("python -m experiments.benchmark")
    parser.add_argument_group("benchmark").add_argument(
        "--steps", type=whole(), default=10, help="steps to time; more if timings vary")
    args = train.arguments(argv, parser)
    if args.accumulate > 1 or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("--accumulate and torchrun: the benchmark times one process's whole step; drop "
                         "them, and read crops a second from the run itself")
    return args


def main(argv=None):
    torch.set_flush_denormal(True)  # denormal numbers are slow on a CPU
    return run_script("benchmark", lambda: benchmark(arguments(argv)), "--batch or --local-crops")


if __name__ == "__main__":
    sys.exit(main())
