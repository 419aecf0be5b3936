"""Several processes that share each batch, one a GPU or CPU, as torchrun starts them; one without it."""
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from common.errors import InputError


def join(args):
    """Joins torchrun's processes, if it started this one, on a device of this process's own.

    InputError if --batch cannot be divided among them and --accumulate.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % (count * args.accumulate):
        raise InputError(f"--batch {args.batch}: has to be a multiple of {count} processes times "
                         f"--accumulate {args.accumulate}")
    if count == 1:
        return
    if int(os.environ["RANK"]):
        sys.stdout = open(os.devnull, "w")  # the first process speaks
    cuda = torch.device(args.device).type == "cuda"
    if cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    # The others wait while the first prepares slides, which may take days.
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=30))


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """This process's number, 0 for the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def first_before_others():
    """The block runs in the first process, then in the others, which find what it has made."""
    if dist.is_initialized() and rank():
        dist.barrier()
    yield
    if dist.is_initialized() and not rank():
        dist.barrier()


def any_of(flag, device):
    """Is the flag true in any process?"""
    if not dist.is_initialized():
        return bool(flag)
    total = torch.tensor(float(bool(flag)), device=device)
    dist.all_reduce(total)
    return total.item() > 0
