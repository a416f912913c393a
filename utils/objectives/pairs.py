"""What a preference loss is computed from: log-probs of pairs by policy and reference, and how the two are compared.

torch is not imported before it computes: the table of losses is read for --help, which must be quick.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PairLogProbs:
    """Summed log-probs of a batch of pairs, in nats, and completion lengths in tokens; each of shape (pairs,)."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    chosen_nll: Tensor  # negative log-likelihood of the chosen completion per token, whatever weighs the sums

    @property
    def chosen_logratio(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def rejected_logratio(self) -> Tensor:
        return self.rejected - self.ref_rejected

    def agreeing(self) -> PairLogProbs:
        """The same pairs if the reference said of them what the policy says."""
        return dataclasses.replace(self, ref_chosen=self.chosen, ref_rejected=self.rejected)


def log_sigmoid(values: Tensor) -> Tensor:
    """log s(x), the one function here that is no method of a tensor."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)


DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

# exp(80) is about the largest that float32 holds with room for a product.
LARGEST_EXPONENT = 80.0


@dataclass(frozen=True)
class Divergence:
    """The f-divergence between policy and reference (f-DPO, arXiv 2309.16240): its f' maps log-ratios to scores.

    `alpha` is that of f'(t) = (t^(alpha - 1) - 1) / (alpha - 1): towards 1 it is the reverse KL.
    """

    name: str = "reverse_kl"
    alpha: float = 0.5

    def score(self, logratio: Tensor) -> Tensor:
        """f'(t) for t = exp(logratio), with the additive constant that makes it 0 where policy and reference agree.

        Raises:
            ValueError: the name is unknown.
        """
        if self.name == "reverse_kl" or (self.name == "alpha_divergence" and abs(self.alpha - 1) < 1e-6):
            return logratio
        if self.name == "forward_kl":
            return 1 - (-logratio).clamp(max=LARGEST_EXPONENT).exp()
        if self.name == "js_divergence":
            return math.log(2) + log_sigmoid(logratio)
        if self.name == "alpha_divergence":
            power = ((self.alpha - 1) * logratio).clamp(max=LARGEST_EXPONENT)
            return power.expm1() / (self.alpha - 1)
        raise ValueError(f"unknown f-divergence: {self.name}")

    def difference(self, pairs: PairLogProbs) -> Tensor:
        """The score of the chosen log-ratio minus that of the rejected one; for the reverse KL it is D."""
        return self.score(pairs.chosen_logratio) - self.score(pairs.rejected_logratio)

    def difference_per_token(self, pairs: PairLogProbs) -> Tensor:
        """The same with each score divided by the tokens of its completion."""
        chosen, rejected = self.score(pairs.chosen_logratio), self.score(pairs.rejected_logratio)
        return chosen / pairs.chosen_length - rejected / pairs.rejected_length
