"""Work on many files in processes; a failure costs only its own file."""
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch
from tqdm import tqdm

from common.errors import InputError


def call(function, arguments):
    """(function's result, None), or (None, one line) for an error that the user can fix."""
    try:
        return function(*arguments), None
    except InputError as error:
        return None, str(error)
    except MemoryError:
        return None, f"{arguments[0]}: not enough memory for it"


def pool_of(workers):
    """Processes of one thread each."""
    return ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))


def in_processes(function, tasks, workers, what):
    """Yields (task, result, error) of function(*task) as they end, under a progress bar named what.

    Of result and error one is None. A worker that is killed (out of memory) costs only its own task: the
    tasks that were in flight are tried again one by one.
    """
    with tqdm(total=len(tasks), desc=what, unit="", disable=not tasks, leave=False) as bar:
        if workers <= 1 or len(tasks) <= 1:
            for task in tasks:
                yield task, *call(function, task)
                bar.update()
            return
        again = []
        with pool_of(min(workers, len(tasks))) as pool:
            futures = {pool.submit(call, function, task): task for task in tasks}
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
                    result = pool.submit(call, function, task).result()
                except BrokenProcessPool:
                    result = None, f"{task[0]}: reading it ended the process; is the file whole?"
            yield task, *result
            bar.update()
