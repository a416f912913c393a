"""Metrics of preference pairs: by pair, and their means."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives.pairs import PairLogProbs

ROUNDING = 2.0**-21  # of a sum of log-probs in float32: what the shape of a batch can make of it (measured: 2**-23)


MEANS = (
    *("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logps", "rejected_logps"),
    *("chosen_tokens", "rejected_tokens", "chosen_ends", "rejected_ends", "chosen_end_prob"),
)
DIVERGENCES = ("chosen_kl", "rejected_kl")


def pair_metrics(pairs: PairLogProbs, losses: Tensor, beta: float) -> dict[str, Tensor]:
    """Metrics by pair, each of shape (pairs,).

    Rewards are beta times the log-ratio (arXiv 2305.18290, section 4). Accuracy is 1 where the chosen completion has
    the higher reward, and a half where the two are equal as far as float32 tells, as before the first step.
    """
    chosen, rejected = beta * pairs.chosen_logratio.detach(), beta * pairs.rejected_logratio.detach()
    equal = (chosen - rejected).abs() <= beta * ROUNDING * (pairs.chosen.abs() + pairs.rejected.abs()).detach()
    return {
        "loss": losses.detach(),
        "accuracy": torch.where(equal, 0.5, (chosen > rejected).float()),
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "chosen_logps": pairs.chosen.detach(),
        "rejected_logps": pairs.rejected.detach(),
        "chosen_tokens": pairs.chosen_length,
        "rejected_tokens": pairs.rejected_length,
    }


def summarise(rows: list[dict[str, float | None]]) -> dict[str, float]:
    """Means over pairs, and their count. What no pair has is left out.

    `chosen_kl` and `rejected_kl` are over the `kl_pairs` pairs that have them.
    """
    means = {name: _mean([row.get(name) for row in rows]) for name in (*MEANS, *DIVERGENCES)}
    compared = [row for row in rows if DIVERGENCES[0] in row]
    counts = {"pairs": len(rows)} | ({"kl_pairs": len(compared)} if compared else {})
    return {name: mean for name, mean in means.items() if mean is not None} | counts


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
