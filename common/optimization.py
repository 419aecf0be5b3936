"""DINO's optimisation (A.1.2): schedules, AdamW's two groups, clipping, frozen layers, order of crops."""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

import dirl


def cosine(peak, end, step, steps, warmup=0):
    """The schedule at a step: linear from 0 to peak over warmup steps, then half a cosine to end."""
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
    """What changes from step to step, over a run of so many steps (DINO's schedules)."""

    steps: int
    lr: float
    min_lr: float
    warmup_steps: int
    weight_decay: float
    weight_decay_end: float
    momentum: float
    teacher_temp: float
    warmup_teacher_temp: float
    warmup_temp_steps: int
    frozen_steps: int  # in which the heads' last layers are frozen

    def at(self, step):
        return Schedule(
            lr=cosine(self.lr, self.min_lr, step, self.steps, self.warmup_steps),
            weight_decay=cosine(self.weight_decay, self.weight_decay_end, step, self.steps),
            momentum=cosine(self.momentum, 1, step, self.steps),
            teacher_temp=self.teacher_temp_at(step))

    def teacher_temp_at(self, step):
        """Linear over the warm-up, where DINO's rises epoch by epoch."""
        if step >= self.warmup_temp_steps:
            return self.teacher_temp
        share = step / self.warmup_temp_steps
        return self.warmup_teacher_temp + share * (self.teacher_temp - self.warmup_teacher_temp)


# ---------------------------------------------------------------- parameters

def build_optimizer(student):
    """AdamW with weight decay on everything but biases and norms, as DINO."""
    parameters = list(student.parameters())
    decayed = {"params": [p for p in parameters if p.ndim > 1]}
    biases_and_norms = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
    return torch.optim.AdamW([decayed, biases_and_norms], fused=True)


def set_rates(optimizer, schedule):
    """Sets a step's learning rate and weight decay."""
    decayed, biases_and_norms = optimizer.param_groups
    decayed.update(lr=schedule.lr, weight_decay=schedule.weight_decay)
    biases_and_norms.update(lr=schedule.lr)


def clip_gradients(parameters, limit):
    """Clips each parameter's gradient to limit, as DINO does (0: off); returns a bool tensor: all finite?"""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    if limit:
        torch._foreach_mul_(grads, list((limit / (norms + 1e-6)).clamp(max=1)))
    return norms.isfinite().all()


def freeze_last_layers(student):
    """Drops the gradient of every DINO head's last layer, so that the optimiser leaves it unchanged."""
    for head in student.modules():
        if isinstance(head, dirl.DINOHead):
            head.last_layer.weight.grad = None
            if head.last_norm is not None:
                head.last_norm.grad = None


def batches(count, batch, start, steps, seed, shard=(0, 1)):
    """Crop indices for steps start to steps; each epoch in its own order, without its incomplete batch.

    shard: (index, count) of this process, which takes its share of each batch.
    """
    per_epoch = count // batch
    size = batch // shard[1]
    epoch, order = None, None
    for step in range(start, steps):
        if epoch != step // per_epoch:
            epoch = step // per_epoch
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(count, generator=generator).tolist()
        first = step % per_epoch * batch + shard[0] * size
        yield order[first: first + size]
