"""DINO with registers (Darcet et al. 2024), the usual cure for sparse attention; not in the paper.

Four learned tokens go through every block with the patches. They are pooled nowhere, so f is the mean of the
patches' tokens, and counted in no bin: attention is measured among the patches (common.encoders.RegisterViT).
A seed's encoder and head start as the baseline's.
"""
from common.encoders import with_registers
from train import build_dirl

REGISTERS = 4  # theirs


def build(encoder, args):
    """Returns the Recipe of --ssl registers."""
    return build_dirl(with_registers(encoder, REGISTERS), args)
