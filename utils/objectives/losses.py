"""Preference losses: log-probs of pairs in, one loss per pair out.

Notation of the papers: beta (b) is the strength of the pull towards the reference; the log-ratio of a completion is
log pi(y|x) - log pi_ref(y|x); D is the chosen log-ratio minus the rejected one, so b * D is the reward margin. s is
the logistic function, e the label smoothing.

Every loss is a pure function of 1-D float32 tensors, shape (pairs,), and is registered in `LOSSES` by its name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
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
            return 1 - torch.exp(torch.clamp(-logratio, max=LARGEST_EXPONENT))
        if self.name == "js_divergence":
            return math.log(2) + F.logsigmoid(logratio)
        if self.name == "alpha_divergence":
            power = torch.clamp((self.alpha - 1) * logratio, max=LARGEST_EXPONENT)
            return torch.expm1(power) / (self.alpha - 1)
        raise ValueError(f"unknown f-divergence: {self.name}")


DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass(frozen=True)
class LossParameters:
    """What the losses read besides log-probs."""

    beta: float
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    divergence: Divergence = field(default_factory=Divergence)


Loss = Callable[[PairLogProbs, LossParameters], Tensor]


def _score_difference(pairs: PairLogProbs, parameters: LossParameters) -> Tensor:
    """D, or its f-divergence counterpart."""
    score = parameters.divergence.score
    return score(pairs.chosen_logratio) - score(pairs.rejected_logratio)


def _smoothed(margin: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def sigmoid_loss(pairs: PairLogProbs, parameters: LossParameters) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7): -log s(bD).

    With label smoothing e it is conservative DPO (cDPO, Mitchell 2023, "A note on DPO with noisy preferences"):
    -(1-e) log s(bD) - e log s(-bD).
    """
    return _smoothed(parameters.beta * _score_difference(pairs, parameters), parameters.label_smoothing)


def robust_loss(pairs: PairLogProbs, parameters: LossParameters) -> Tensor:
    """Robust DPO (arXiv 2403.00409), unbiased when a share e of the labels is flipped.

    (-(1-e) log s(bD) + e log s(-bD)) / (1 - 2e)
    """
    margin, smoothing = parameters.beta * _score_difference(pairs, parameters), parameters.label_smoothing
    clean, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - smoothing) * clean - smoothing * flipped) / (1 - 2 * smoothing)


def ipo_loss(pairs: PairLogProbs, parameters: LossParameters) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17): (h - 1/(2b))^2, where h is D with log-ratios averaged over their tokens."""
    score = parameters.divergence.score
    chosen = score(pairs.chosen_logratio) / pairs.chosen_length
    rejected = score(pairs.rejected_logratio) / pairs.rejected_length
    return (chosen - rejected - 1 / (2 * parameters.beta)) ** 2


def sigmoid_norm_loss(pairs: PairLogProbs, parameters: LossParameters) -> Tensor:
    """DPO on log-ratios averaged over their tokens (Tulu 3, arXiv 2411.15124)."""
    score = parameters.divergence.score
    chosen = score(pairs.chosen_logratio) / pairs.chosen_length
    rejected = score(pairs.rejected_logratio) / pairs.rejected_length
    return -F.logsigmoid(parameters.beta * (chosen - rejected))


def hinge_loss(pairs: PairLogProbs, parameters: LossParameters) -> Tensor:
    """SLiC's hinge on the DPO margin (arXiv 2305.10425; RSO, arXiv 2309.06657): max(0, 1 - bD)."""
    return torch.relu(1 - parameters.beta * _score_difference(pairs, parameters))


def exo_pair_loss(pairs: PairLogProbs, parameters: LossParameters) -> Tensor:
    """EXO for pairs (arXiv 2402.00856, eq. 16): KL from the policy's preference to the smoothed label's."""
    margin, smoothing = parameters.beta * _score_difference(pairs, parameters), parameters.label_smoothing
    log_win, log_lose = F.logsigmoid(margin), F.logsigmoid(-margin)
    return log_win.exp() * (log_win - math.log1p(-smoothing)) + log_lose.exp() * (log_lose - math.log(smoothing))


def nca_pair_loss(pairs: PairLogProbs, parameters: LossParameters) -> Tensor:
    """NCA for pairs (arXiv 2402.05369)."""
    chosen, rejected = parameters.beta * pairs.chosen_logratio, parameters.beta * pairs.rejected_logratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair_loss(pairs: PairLogProbs, parameters: LossParameters) -> Tensor:
    """BCO on pairs without its running shift (arXiv 2404.04656 with delta = 0)."""
    chosen, rejected = parameters.beta * pairs.chosen_logratio, parameters.beta * pairs.rejected_logratio
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard_loss(pairs: PairLogProbs, parameters: LossParameters) -> Tensor:
    """SPPO with hard labels (arXiv 2405.00675, eq. 4.7 with winning probability 1 and 0)."""
    target = 0.5 / parameters.beta
    return (pairs.chosen_logratio - target) ** 2 + (pairs.rejected_logratio + target) ** 2


def aot_loss(pairs: PairLogProbs, parameters: LossParameters) -> Tensor:
    """AOT on paired data (arXiv 2406.05882): quantiles of the margins of policy and reference over the micro-batch."""
    policy, _ = torch.sort(pairs.chosen - pairs.rejected)
    reference, _ = torch.sort(pairs.ref_chosen - pairs.ref_rejected)
    return _smoothed(parameters.beta * (policy - reference), parameters.label_smoothing)


def aot_unpaired_loss(pairs: PairLogProbs, parameters: LossParameters) -> Tensor:
    """AOT on unpaired data (arXiv 2406.05882): quantiles of chosen and rejected log-ratios over the micro-batch."""
    chosen, _ = torch.sort(pairs.chosen_logratio)
    rejected, _ = torch.sort(pairs.rejected_logratio)
    return _smoothed(parameters.beta * (chosen - rejected), parameters.label_smoothing)


def apo_zero_loss(pairs: PairLogProbs, parameters: LossParameters) -> Tensor:
    """APO-zero (arXiv 2408.06266, eq. 7): raises the chosen and lowers the rejected likelihood."""
    return (
        1
        - torch.sigmoid(parameters.beta * pairs.chosen_logratio)
        + torch.sigmoid(parameters.beta * pairs.rejected_logratio)
    )


def apo_down_loss(pairs: PairLogProbs, parameters: LossParameters) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8): lowers both, the rejected one more."""
    difference = pairs.chosen_logratio - pairs.rejected_logratio
    return torch.sigmoid(parameters.beta * pairs.chosen_logratio) + 1 - torch.sigmoid(parameters.beta * difference)


def discopop_loss(pairs: PairLogProbs, parameters: LossParameters) -> Tensor:
    """DiscoPOP's log-ratio modulated loss (arXiv 2406.08414, eq. 5)."""
    margin = parameters.beta * _score_difference(pairs, parameters)
    modulation = margin / parameters.discopop_tau
    # s(m/tau) exp(-m) as one power: apart, they are 0 and infinity where the margin is far below 0.
    exponential = torch.exp(F.logsigmoid(modulation) - margin)
    return -F.logsigmoid(margin) * torch.sigmoid(-modulation) + exponential


def sft_loss(pairs: PairLogProbs, parameters: LossParameters) -> Tensor:
    """Negative log-likelihood of the chosen completion per token (the NLL term of arXiv 2404.19733).

    Each pair weighs the same, as in every loss here; stock TRL averages over the tokens of a batch, so that long
    completions weigh more and a pair's weight depends on its batch mates.
    """
    return pairs.chosen_nll


LOSSES: Mapping[str, Loss] = {
    "sigmoid": sigmoid_loss,
    "robust": robust_loss,
    "ipo": ipo_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "hinge": hinge_loss,
    "exo_pair": exo_pair_loss,
    "nca_pair": nca_pair_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "aot": aot_loss,
    "aot_unpaired": aot_unpaired_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "discopop": discopop_loss,
    "sft": sft_loss,
}

# Names that people use for the same losses. cDPO is the sigmoid loss with label smoothing.
ALIASES = {"dpo": "sigmoid", "cdpo": "sigmoid", "rdpo": "robust", "slic": "hinge"}

# f-DPO leaves a term that cancels only in the difference of a pair; other losses have no such form.
DIVERGENCE_LOSSES = frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"})


def canonical_loss(name: str) -> str:
    """The registered name of a loss, for any of its names."""
    return ALIASES.get(name, name)


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    parameters: LossParameters

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """The loss of each pair, shape (pairs,)."""
        terms = (
            LOSSES[name](pairs, self.parameters) * weight for name, weight in zip(self.names, self.weights, strict=True)
        )
        return torch.stack(list(terms)).sum(dim=0)
