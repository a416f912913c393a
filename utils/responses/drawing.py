"""Tokens picked with random numbers of the row's own, so that what else is in the batch changes nothing."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor, RepetitionPenaltyLogitsProcessor

from ..errors import UserError

NOT_FINITE = (
    "the model that writes computes numbers that are not finite; its weights are broken (a run that "
    "diverged?), or too large for this precision: try --dtype float32"
)


def draw_numbers(seed: int, prompt: Any, number: int, count: int) -> np.ndarray:
    """Uniform random numbers in [0, 1) for the tokens of a prompt's `number`th continuation, shape (count,).

    They are the same on every machine, and more of them begin with the same ones.
    """
    key = json.dumps([seed, prompt, number], sort_keys=True).encode()
    generator = np.random.PCG64(int.from_bytes(hashlib.sha256(key).digest(), "big"))
    return (generator.random_raw(count) >> np.uint64(11)) * 2.0**-53


class DrawnToken(LogitsProcessor):
    """Leaves of each row's scores the one token that the row's random number picks.

    The token is where the cumulative distribution, in the order of the vocabulary, passes the number. Greedy decoding
    then takes it.
    """

    def __init__(self, draws: np.ndarray, width: int, device: torch.device) -> None:
        """`draws` has shape (rows, steps); `width` is the length of the padded prompts."""
        self.precision = torch.float32 if device.type == "mps" else torch.float64
        self.draws = torch.tensor(draws, dtype=self.precision, device=device)
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # On a GPU, generation may run a step beyond the last one, and drops it again.
        step = min(input_ids.shape[1] - self.width, self.draws.shape[1] - 1)
        picked = pick_tokens(scores.to(self.precision).softmax(dim=-1), self.draws[:, step])
        return torch.full_like(scores, -torch.inf).scatter_(1, picked, 0.0)


def pick_tokens(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Where the cumulative distribution of each row passes its number; shapes (rows, tokens), (rows,) -> (rows, 1)."""
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Below the total, whatever rounding did: behind it are only tokens that cannot be picked.
    below = torch.minimum(draws[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, below, right=True)


class FiniteScores(LogitsProcessor):
    """Notes scores that are not numbers (NaN, infinite), which a model with broken weights gives; `check` says so."""

    def __init__(self) -> None:
        self._broken: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        numbers = scores < torch.inf  # -inf is a token that cannot be
        broken = ~numbers.all()
        self._broken = broken if self._broken is None else self._broken | broken
        return torch.where(numbers, scores, 0.0)  # so that what follows has something to pick from

    def check(self) -> None:
        """Raises UserError where there were any. Asked once, at the end: each look waits for a GPU."""
        if self._broken is not None and self._broken.item():
            raise UserError(NOT_FINITE)


class PenaltyOnText(RepetitionPenaltyLogitsProcessor):
    """The repetition penalty for tokens of the text, not for the padding in front of it."""

    def __init__(self, penalty: float, mask: Tensor) -> None:
        super().__init__(penalty)
        self.mask = mask  # (rows, width): 1 on the prompts' tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        padded = torch.zeros_like(input_ids, dtype=torch.bool)
        padded[:, : self.mask.shape[1]] = self.mask == 0
        last = input_ids[:, self.mask.shape[1] - 1 : self.mask.shape[1]]  # a token of the row's own prompt
        return super().__call__(torch.where(padded, last, input_ids), scores)
