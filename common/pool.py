"""Work on many files in processes; a failure costs only its own file."""
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch
from tqdm import tqdm

from common.errors import DiskFull, InputError


def call(function, arguments):
    """Returns (function's result, None), or (None, one line) for an error that the user can fix.

    If memory runs out, the line names the first of the arguments, a file or a slide. DiskFull is raised.
    """
    try:
        return function(*arguments), None
    except DiskFull:
        raise
    except InputError as error:
        return None, str(error)
    except MemoryError:
        return None, f"{arguments[0]}: out of memory while reading it"


def pool_of(workers):
    """Returns a pool of processes of one thread each."""
    return ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))


def in_processes(function, tasks, workers, what):
    """Yields (task, result, error) of function(*task) as they end, under a progress bar named what.

    One of result and error is None. A worker that is killed (out of memory) costs only its own task: the
    tasks that were in flight are tried again one by one. DiskFull, or an error of the caller, ends the work:
    no further task is begun.
    """
    with tqdm(total=len(tasks), desc=what, unit="", disable=not tasks, leave=False) as bar:
        if workers <= 1 or len(tasks) <= 1:
            for task in tasks:
                yield task, *call(function, task)
                bar.update()
            return
        in_flight = []
        pool = pool_of(min(workers, len(tasks)))
        try:
            futures = {pool.submit(call, function, task): task for task in tasks}
            for future in as_completed(futures):
                try:
                    result = future.result()
                except BrokenProcessPool:
                    in_flight.append(futures[future])
                    continue
                yield futures[future], *result
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)  # of DiskFull, or of an error where the results are used
        for task in in_flight:
            with pool_of(1) as pool:
                try:
                    result = pool.submit(call, function, task).result()
                except BrokenProcessPool:
                    result = None, (f"{task[0]}: the worker died while reading it (corrupt file, or out of "
                                    "memory)")
            yield task, *result
            bar.update()
