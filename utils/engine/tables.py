"""Integers that say where the tokens of a packed row stand, on the device that computes: sent by one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNED = 16  # numbers: compiled kernels read from addresses that are multiples of 16 bytes


@dataclass(frozen=True)
class RowTables:
    """Of a packed row of pairs; the tokens that count of completions, in order, chosen ones of all pairs first."""

    positions: Tensor  # of each token in its own text, (1, tokens)
    predictors: Tensor  # row index of the token that predicts each completion token, (completion tokens,)
    targets: Tensor  # row index of each completion token, (completion tokens,)
    places: Tensor  # of each of them in a matrix of (2 x pairs, longest completion), counted row by row
    ends: Tensor  # of each completion, its last token among all of them, (2 x pairs,)
    lengths: Tensor  # of the completions, (2 x pairs,)


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Integer tensors of one format on a device. A GPU gets them by one copy, for which it does not stop and nobody
    waits; what has to be waited for is a copy from memory that the system may move."""
    if device.type == "cpu":
        return list(tensors)
    sizes = [tensor.numel() + -tensor.numel() % ALIGNED for tensor in tensors]
    together = torch.zeros(sum(sizes), dtype=tensors[0].dtype, pin_memory=device.type == "cuda")
    for tensor, piece in zip(tensors, together.split(sizes), strict=True):
        piece[: tensor.numel()] = tensor.flatten()
    pieces = together.to(device, non_blocking=together.is_pinned()).split(sizes)  # else it could be gone too soon
    return [piece[: tensor.numel()].view(tensor.shape) for tensor, piece in zip(tensors, pieces, strict=True)]
