"""What a model says of whole completions: log-probs in sums and means, and whether and how surely they end."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .head import KeptLogits
from .scoring import Comparison, score_tokens


@dataclass(frozen=True)
class CompletionLogProbs:
    """What one forward pass says of 2 x pairs completions, chosen first: each tensor has shape (2 x pairs,)."""

    summed: Tensor  # nats, in float32, weighted by ld_alpha where it is set
    mean_negative: Tensor  # nats per token, unweighted
    length: Tensor  # tokens
    ended: Tensor  # whether the last token is an end-of-text token
    end_prob: Tensor  # how likely the model is to end where the completion ends; NaN where that was cut off
    weight: Tensor | None  # WPO weights, where they are used
    auxiliary: Tensor | None  # load-balancing loss of a mixture of experts, a scalar
    divergence: Tensor | None  # KL from the reference's next-token distributions, summed over the tokens, nats


class CompletionScorer:
    """Scores the completions of a batch with one forward pass, by the same rules for policy and reference.

    Args:
        end_ids: the tokens that end a text.
        ld_alpha: what tokens beyond the pair's shorter completion count (LD-DPO, arXiv 2409.06411); None: in full.
        weighs: whether to give the weights of WPO (arXiv 2406.11827).
    """

    def __init__(self, end_ids: Collection[int], ld_alpha: float | None, weighs: bool) -> None:
        self.end_ids = torch.tensor(sorted(end_ids))
        self.ld_alpha, self.weighs = ld_alpha, weighs

    def score(
        self,
        model: torch.nn.Module,
        batch: Mapping[str, Any],
        with_auxiliary: bool = False,
        reference: KeptLogits | None = None,
    ) -> CompletionLogProbs:
        """The log-probs that `model` gives a batch's completions, and its divergence from the reference's logits."""
        comparison = Comparison(against=reference) if reference is not None else None
        scores = score_tokens(
            model, batch, with_squares=self.weighs, with_auxiliary=with_auxiliary, comparison=comparison
        )
        length = scores.mask.sum(dim=1)
        weight = None
        if scores.log_sum_sq_probs is not None:
            # WPO, eq. 2: how likely a completion is under the policy, per token.
            aligned = (scores.log_probs - scores.log_sum_sq_probs).detach().sum(dim=1)
            weight = torch.exp(aligned / length)
        self.end_ids = self.end_ids.to(scores.last_ids.device)  # and there they stay
        ended = torch.isin(scores.last_ids, self.end_ids)
        return CompletionLogProbs(
            summed=sum_log_probs(scores.log_probs, scores.mask, self.ld_alpha),
            mean_negative=-scores.log_probs.sum(dim=1) / length,
            length=length,
            ended=ended,
            end_prob=torch.where(ended, last_values(scores.log_probs.detach(), scores.mask).exp(), torch.nan),
            weight=weight,
            auxiliary=scores.auxiliary,
            divergence=scores.divergence.sum(dim=1) if scores.divergence is not None else None,
        )

    def sums(
        self, model: torch.nn.Module, batch: Mapping[str, Any], comparison: Comparison | None = None
    ) -> tuple[Tensor, KeptLogits | None]:
        """The summed log-probs alone, shape (2 x pairs,), and the logits where they are to be kept."""
        scores = score_tokens(model, batch, comparison=comparison)
        return sum_log_probs(scores.log_probs, scores.mask, self.ld_alpha), scores.logits


def sum_log_probs(log_probs: Tensor, mask: Tensor, ld_alpha: float | None) -> Tensor:
    """Summed log-probs of 2 x pairs completions, shape (2 x pairs,), in float32.

    With `ld_alpha` a, tokens beyond the length of the pair's shorter completion count a instead of 1 (LD-DPO, arXiv
    2409.06411).

    Args:
        log_probs: shape (2 x pairs, length), zero outside `mask`.
        mask: the same shape, 1 on completion tokens.
    """
    log_probs = log_probs.float()
    if ld_alpha is None:
        return log_probs.sum(dim=1)
    position, length = mask.cumsum(dim=1), mask.sum(dim=1)
    shorter = torch.minimum(*length.chunk(2)).repeat(2)
    return (log_probs * torch.where(position <= shorter.unsqueeze(1), 1.0, ld_alpha)).sum(dim=1)


def last_values(values: Tensor, mask: Tensor) -> Tensor:
    """Each row's value at its last masked position, shape (rows,); both have shape (rows, length)."""
    last = mask.size(1) - 1 - mask.flip(1).argmax(dim=1, keepdim=True)
    return values.gather(1, last).squeeze(1)
