"""DINO's optimisation (A.1.2): schedules, AdamW's parameter groups, clipping, freezing, order of crops."""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

import dirl


def cosine(peak, end, step, steps, warmup=0):
    """A schedule's value at a step: linear from 0 to peak during warmup, then half a cosine to end."""
    if step < warmup:
        return peak * step / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return end + (peak - end) * (1 + math.cos(math.pi * share)) / 2


class Schedule(NamedTuple):
    """The scheduled values of one step."""

    lr: float
    weight_decay: float
    momentum: float  # of the teacher
    teacher_temp: float


@dataclass(frozen=True)
class Schedules:
    """DINO's schedules: everything that changes from step to step."""

    steps: int  # of the whole run
    lr: float
    min_lr: float
    warmup_steps: int
    weight_decay: float
    weight_decay_end: float
    momentum: float
    teacher_temp: float
    warmup_teacher_temp: float
    warmup_temp_steps: int
    frozen_steps: int  # during which the heads' last layers are frozen

    def at(self, step):
        """Returns the Schedule of a step."""
        return Schedule(
            lr=cosine(self.lr, self.min_lr, step, self.steps, self.warmup_steps),
            weight_decay=cosine(self.weight_decay, self.weight_decay_end, step, self.steps),
            momentum=cosine(self.momentum, 1, step, self.steps),
            teacher_temp=self.teacher_temp_at(step))

    def teacher_temp_at(self, step):
        """The teacher's temperature; it warms up step by step, DINO's epoch by epoch."""
        if step >= self.warmup_temp_steps:
            return self.teacher_temp
        share = step / self.warmup_temp_steps
        return self.warmup_teacher_temp + share * (self.teacher_temp - self.warmup_teacher_temp)


# ---------------------------------------------------------------- parameters

def build_optimizer(student):
    """Returns AdamW with weight decay on all parameters but biases and LayerNorms, as in DINO."""
    parameters = list(student.parameters())
    decayed = {"params": [p for p in parameters if p.ndim > 1]}
    not_decayed = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
    return torch.optim.AdamW([decayed, not_decayed], fused=True)


def set_rates(optimizer, schedule):
    """Sets the learning rate and the weight decay of a step's Schedule."""
    decayed, not_decayed = optimizer.param_groups
    decayed.update(lr=schedule.lr, weight_decay=schedule.weight_decay)
    not_decayed.update(lr=schedule.lr)


def clip_gradients(parameters, limit):
    """Clips each parameter's gradient norm to limit (0: off), like DINO; returns whether all are finite."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    if limit:
        torch._foreach_mul_(grads, list((limit / (norms + 1e-6)).clamp(max=1)))
    return norms.isfinite().all()


def freeze_last_layers(student):
    """Drops the gradients of every DINO head's last layer, so that the optimiser leaves it unchanged."""
    for head in student.modules():
        if isinstance(head, dirl.DINOHead):
            head.last_layer.weight.grad = None
            if head.last_norm is not None:
                head.last_norm.grad = None


def batches(count, batch, start, steps, seed, shard=(0, 1)):
    """Yields the crop indices of steps start to steps.

    Each epoch has its own order of the count crops, drawn from (seed, epoch), and drops its incomplete
    batch. shard: (index, count) of this process, which takes its share of each batch.
    """
    shard_index, shards = shard
    per_epoch = count // batch
    size = batch // shards
    for step in range(start, steps):
        epoch, index = divmod(step, per_epoch)
        if step == start or index == 0:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(count, generator=generator).tolist()
        first = index * batch + shard_index * size
        yield order[first: first + size]
