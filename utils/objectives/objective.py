"""What is optimised: a weighted sum of losses, with what they read beside log-probs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .losses import LOSSES
from .pairs import PairLogProbs


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses.

    `parameters` holds what any of them reads: beta, label_smoothing, divergence, and those that are a loss's own.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    parameters: Mapping[str, Any]

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """The loss of each pair, shape (pairs,)."""
        terms = (
            LOSSES[name](pairs, self.parameters) * weight for name, weight in zip(self.names, self.weights, strict=True)
        )
        return torch.stack(list(terms)).sum(dim=0)

    @property
    def beta(self) -> float:
        """The scale of rewards, which are beta times a log-ratio."""
        return self.parameters["beta"]

    @property
    def sorting(self) -> tuple[str, ...]:
        """Those of its losses that sort the pairs of a micro-batch."""
        return tuple(name for name in self.names if LOSSES[name].sorts_pairs)
