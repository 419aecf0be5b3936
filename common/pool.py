"""Work on many files in processes, each within limits; a failure costs only its own file."""
import re
import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import NamedTuple

import torch
from tqdm import tqdm

from common.errors import InputError, check_ranges


class Limits(NamedTuple):
    """What one file may take: seconds, and px of a slide, so that a broken or hostile one ends."""

    seconds: float = 3600
    gigapixels: float = 40


LIMITS = Limits()


def add_limits(add):
    """The flags of a script that reads slides, for limits_of."""
    add("--max-seconds", type=float, default=LIMITS.seconds,
        help="a slide or a file of cells that takes longer is skipped; raise it for slow disks")
    add("--max-gigapixels", type=float, default=LIMITS.gigapixels,
        help="a slide that claims more px is skipped, as broken files do")


def limits_of(args):
    """The Limits of add_limits' flags; InputError for a flag out of its range."""
    check_ranges(args, max_seconds=(0.1, 1e9), max_gigapixels=(1e-6, 1e6))
    return Limits(args.max_seconds, args.max_gigapixels)


def add_shard(add):
    """The flag of a script whose work several machines share, for shard_of."""
    add("--shard", metavar="I/N",
        help="does the part I (0 to N - 1) of N of the slides and no more; for an array job on a cluster")


def shard_of(names, shard):
    """The names that a shard "i/n" does, every n-th; all for None. InputError for another text."""
    part = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", shard or "0/1")
    if not part or int(part[1]) >= int(part[2]):
        raise InputError(f"--shard {shard}: two numbers are expected, 0/8 to 7/8 for eight parts")
    return sorted(names)[int(part[1])::int(part[2])]


@contextmanager
def time_limit(seconds, what):
    """InputError in the block when the seconds are over (None: no limit); in a process's main thread only."""
    def stop(*_):
        raise InputError(f"{what}: took longer than --max-seconds {seconds:g}; raise it or take the file out")
    if not seconds:
        yield
        return
    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again each second, should a callback swallow the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def call(function, arguments, seconds=None):
    """(function's result, None), or (None, one line) for an error that the user can fix."""
    try:
        with time_limit(seconds, arguments[0]):
            return function(*arguments), None
    except InputError as error:
        return None, str(error)
    except MemoryError:
        return None, f"{arguments[0]}: not enough memory for it"


def pool_of(workers):
    """Processes of one thread each."""
    return ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))


def in_processes(function, tasks, workers, what, seconds=None):
    """Yields (task, result, error) of function(*task) as they end, under a progress bar named what.

    Of result and error one is None. A task that takes longer than the seconds is an error. A worker that is
    killed (out of memory) costs only its own task: those that were in flight are tried again one by one.
    """
    with tqdm(total=len(tasks), desc=what, unit="", disable=not tasks, leave=False) as bar:
        if workers <= 1 or len(tasks) <= 1:
            for task in tasks:
                yield task, *call(function, task, seconds)
                bar.update()
            return
        again = []
        with pool_of(min(workers, len(tasks))) as pool:
            futures = {pool.submit(call, function, task, seconds): task for task in tasks}
            for future in as_completed(futures):
                try:
                    result = future.result()
                except BrokenProcessPool:
                    again.append(futures[future])
                    continue
                yield futures[future], *result
                bar.update()
        for task in again:
            with pool_of(1) as pool:
                try:
                    result = pool.submit(call, function, task, seconds).result()
                except BrokenProcessPool:
                    result = None, f"{task[0]}: reading it ended the process; is the file whole?"
            yield task, *result
            bar.update()
