"""Weights that are kept in float32 and computed with in a shorter format: where they must begin."""

from __future__ import annotations

import torch

DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of float32's fraction
LOOKED_AT = 2**16  # weights of each tensor
MOST_TIES = 0.01  # share; of numbers that lie anywhere, one in 2^16 (2^13) lies half-way


@torch.no_grad()
def begin_on_steps(model: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Rounds float32 weights to numbers of `dtype`, where many lie half-way between two of them; whether it did.

    One in eight numbers of float16 lies half-way between two of bfloat16. The smallest update tips each of them by a
    whole step, a hundred times as far as it was meant to, and all in the direction of the gradient: the model that is
    computed would run ahead of the one that is saved. A forward pass rounds weights in any case, so that on a step of
    `dtype` they compute the same, and a small update moves none of them to the next.
    """
    if dtype not in DROPPED_BITS:
        return False
    tensors = [tensor for tensor in model.parameters() if tensor.dtype == torch.float32 and not tensor.is_meta]
    ties = looked_at = 0
    for tensor in tensors:
        bits = tensor.flatten()[:LOOKED_AT].view(torch.int32) & ((1 << DROPPED_BITS[dtype]) - 1)
        ties += int((bits == 1 << (DROPPED_BITS[dtype] - 1)).sum())
        looked_at += len(bits)
    if ties <= MOST_TIES * looked_at:
        return False
    for tensor in tensors:
        tensor.copy_(tensor.to(dtype))
    return True
