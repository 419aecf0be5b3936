"""The processes that torchrun starts, which share each batch; everything also works in one process."""
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

import dirl


def join():
    """Joins the other processes if torchrun started this one."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return
    if int(os.environ["RANK"]):
        sys.stdout = open(os.devnull, "w")  # only rank 0 prints
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # The other ranks wait while rank 0 prepares slides, which may take days.
    dist.init_process_group(backend, timeout=timedelta(days=30))


def device_of_process(device):
    """Returns the device of this process: under torchrun on CUDA, the GPU of its local rank."""
    if not dist.is_initialized() or torch.device(device).type != "cuda":
        return device
    device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(device)
    return device


def leave():
    """Undoes join."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """The number of this process; rank 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    """How many processes share a batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def first_before_others():
    """Runs the block on rank 0 first, then on the other ranks, which reuse its files."""
    if dist.is_initialized() and rank():
        dist.barrier()
    yield
    if dist.is_initialized() and not rank():
        dist.barrier()


def any_of(flag):
    """Whether the flag is true in any process; exchanged on the CPU, so that no GPU is waited for."""
    return dirl.process_mean(torch.tensor(float(bool(flag)))).item() > 0
