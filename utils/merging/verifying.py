"""Whether a merged model, as read back from the disk, is the adapter on its base: token by token, to rounding.

How far rounding may move log-probs depends on the model, so it is measured: the merged weights are moved by up to one
step of their format at random, and the same tokens scored again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.counted import count_tokens, plain_ids
from ..engine.scoring import score_tokens
from ..errors import UserError
from ..interruptions import stop_if_asked
from ..training.batches import consecutive_batches
from .pairs import CheckedTexts

STEPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# How many times as far as rounding two right ways may be apart, on average and for a single token.
TIMES_ROUNDING, TIMES_LARGEST = 2.0, 4.0
# Differences, in nats, that are never refused: the products of a large model in float32 make them.
MEAN, LARGEST = 1e-5, 1e-3
MOST_OF_EFFECT = 0.5  # an error of this share of what the adapter changes is no merge, whatever the format
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Difference:
    """How far two models' log-probs of the same tokens are apart, in nats."""

    mean: float
    largest: float

    @classmethod
    def between(cls, one: Tensor, other: Tensor) -> Difference:
        """Of log-probs, shape (tokens,)."""
        difference = (one.double() - other.double()).abs()
        return cls(difference.mean().item(), difference.max().item())

    def __str__(self) -> str:
        return f"{self.mean:.2g} on average, {self.largest:.2g} at most"


@dataclass(frozen=True)
class Verdict:
    """What the comparison of a merged model with the adapter on its base found."""

    difference: Difference
    rounding: Difference  # what moving the merged weights by a step of their format makes
    effect: Difference  # what the adapter makes: with it against without
    bound: Difference

    @property
    def lost(self) -> float:
        """The share of what the adapter changes that the difference is."""
        return self.difference.mean / self.effect.mean if self.effect.mean else 0.0

    def faults(self) -> list[str]:
        """Why the merge is refused, empty where it is right."""
        apart, bound = self.difference, self.bound
        if not apart.mean <= bound.mean or not apart.largest <= bound.largest:  # also where they are no numbers
            return [
                f"the merged model is not the adapter on its base: log-probs differ by {apart}, where rounding "
                f"allows {bound}"
            ]
        if apart.mean > MEAN and self.lost > MOST_OF_EFFECT:
            return [
                "the adapter's changes are smaller than the resolution of the saved weights: merged, log-probs are "
                f"off by {apart}, where the adapter itself changes them by {self.effect}; pass --dtype float32"
            ]
        return []

    def record(self) -> dict[str, Any]:
        """For merge.json."""
        return dataclasses.asdict(self) | {"lost_share_of_effect": self.lost}


def judge(adapted: Tensor, without: Tensor, merged: Tensor, moved: Tensor) -> Verdict:
    """The verdict on log-probs, shape (tokens,): with the adapter on, off, merged, and merged with moved weights."""
    rounding = Difference.between(merged, moved)
    bound = Difference(max(TIMES_ROUNDING * rounding.mean, MEAN), max(TIMES_LARGEST * rounding.largest, LARGEST))
    return Verdict(Difference.between(adapted, merged), rounding, Difference.between(adapted, without), bound)


@torch.no_grad()
def score_texts(model: torch.nn.Module, texts: CheckedTexts) -> Tensor:
    """The log-prob of each token that counts, of every completion, shape (tokens,), float32 on the CPU, in the order of
    `texts`."""
    device = next(model.parameters()).device
    rows = list(zip(texts.prompts, texts.completions, strict=True))
    found: dict[int, Tensor] = {}
    sizes = [len(prompt) + len(completion) for prompt, completion in rows]
    for indices in consecutive_batches(sizes, TOKENS_PER_BATCH, len(rows), padded=True):
        stop_if_asked()
        batch = {name: value.to(device) for name, value in _pad([rows[index] for index in indices]).items()}
        scores = score_tokens(model, batch)
        for index, row, mask in zip(indices, scores.log_probs.cpu(), scores.mask.bool().cpu(), strict=True):
            found[index] = row[mask]
    return torch.cat([found[index] for index in range(len(rows))])


def _pad(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, Tensor]:
    """Prompts with completions as one batch, padded on the right."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    batch = {name: torch.zeros(len(rows), width, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["completion_mask"] = torch.zeros(len(rows), width, dtype=torch.long)
    for place, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        batch["input_ids"][place, :end] = torch.tensor([*prompt, *plain_ids(completion)])
        batch["attention_mask"][place, :end] = 1
        batch["completion_mask"][place, len(prompt) : end] = torch.tensor([int(token >= 0) for token in completion])
    return batch


@torch.no_grad()
def move_weights(model: torch.nn.Module, step: float, modules: Collection[str] | None) -> None:
    """Moves each weight by up to one relative `step`, at random; of these modules, or of all."""
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in model.named_parameters():
        if modules is not None and name.rpartition(".")[0] not in modules:
            continue
        device = parameter.device
        generator = generators.setdefault(device, torch.Generator(device).manual_seed(0))
        signs = torch.randint(-1, 2, parameter.shape, generator=generator, device=device)
        parameter.data = (parameter.float() * (1 + step * signs)).to(parameter.dtype)


def sum_rows(log_probs: Tensor, texts: CheckedTexts) -> list[float]:
    """The log-prob of each completion, from those of its tokens."""
    parts = log_probs.double().split([count_tokens(ids) for ids in texts.completions])
    return [part.sum().item() for part in parts]


def measure_accuracy(log_probs: Tensor, texts: CheckedTexts, reference: Sequence[float]) -> float:
    """The share of pairs whose chosen side has the higher reward; `reference` has the log-prob of each completion."""
    rewards = [own - other for own, other in zip(sum_rows(log_probs, texts), reference, strict=True)]
    chosen, rejected = rewards[: texts.pairs], rewards[texts.pairs :]
    right = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(chosen, rejected, strict=True)]
    return sum(right) / len(right)


def refuse(verdict: Verdict) -> None:
    """Raises UserError where the merged model is not the adapter on its base."""
    if faults := verdict.faults():
        raise UserError(*faults)
