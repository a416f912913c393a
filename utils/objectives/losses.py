"""Preference losses: log-probs of pairs in, one loss per pair out; and the table that says what each of them is.

Notation of the papers: beta (b) is the strength of the pull towards the reference; the log-ratio of a completion is
log pi(y|x) - log pi_ref(y|x), c of the chosen and r of the rejected one; D = c - r, so bD is the reward margin. s is
the logistic function, e the label smoothing.

Every loss is a pure function of 1-D float32 tensors, shape (pairs,), and of the settings that its arguments name: one
without the argument `label_smoothing` has no label smoothing, one without `divergence` no form for f-divergences.
`LOSSES`, at the end, is the one table of losses. Flags, their checks, --help, docs/losses.md, training and evaluation
read it, so that a new loss is a function, and a row there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .pairs import Divergence, PairLogProbs, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor


def _smoothed(margin: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)


def sigmoid_loss(pairs: PairLogProbs, beta: float, divergence: Divergence, label_smoothing: float) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7): -log s(bD).

    With label smoothing e it is conservative DPO (cDPO, Mitchell 2023, "A note on DPO with noisy preferences"):
    -(1-e) log s(bD) - e log s(-bD).
    """
    return _smoothed(beta * divergence.difference(pairs), label_smoothing)


def robust_loss(pairs: PairLogProbs, beta: float, divergence: Divergence, label_smoothing: float) -> Tensor:
    """Robust DPO (arXiv 2403.00409), unbiased when a share e of the labels is flipped.

    (-(1-e) log s(bD) + e log s(-bD)) / (1 - 2e)
    """
    margin = beta * divergence.difference(pairs)
    clean, flipped = -log_sigmoid(margin), -log_sigmoid(-margin)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo_loss(pairs: PairLogProbs, beta: float, divergence: Divergence) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17): (h - 1/(2b))^2, where h is D with log-ratios averaged over their tokens."""
    return (divergence.difference_per_token(pairs) - 1 / (2 * beta)) ** 2


def hinge_loss(pairs: PairLogProbs, beta: float, divergence: Divergence) -> Tensor:
    """SLiC's hinge on the DPO margin (arXiv 2305.10425; RSO, arXiv 2309.06657): max(0, 1 - bD)."""
    return (1 - beta * divergence.difference(pairs)).relu()


def exo_pair_loss(pairs: PairLogProbs, beta: float, divergence: Divergence, label_smoothing: float) -> Tensor:
    """EXO for pairs (arXiv 2402.00856, eq. 16): KL from the policy's preference to the smoothed label's."""
    margin = beta * divergence.difference(pairs)
    log_win, log_lose = log_sigmoid(margin), log_sigmoid(-margin)
    win, lose = log_win - math.log1p(-label_smoothing), log_lose - math.log(label_smoothing)
    return log_win.exp() * win + log_lose.exp() * lose


def nca_pair_loss(pairs: PairLogProbs, beta: float) -> Tensor:
    """NCA for pairs (arXiv 2402.05369): -log s(bc) - log s(-bc) / 2 - log s(-br) / 2."""
    chosen, rejected = beta * pairs.chosen_logratio, beta * pairs.rejected_logratio
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def bco_pair_loss(pairs: PairLogProbs, beta: float) -> Tensor:
    """BCO on pairs without its running shift (arXiv 2404.04656 with delta = 0): -log s(bc) - log s(-br)."""
    return -log_sigmoid(beta * pairs.chosen_logratio) - log_sigmoid(-beta * pairs.rejected_logratio)


def sppo_hard_loss(pairs: PairLogProbs, beta: float) -> Tensor:
    """SPPO with hard labels (arXiv 2405.00675, eq. 4.7 with winning probability 1 and 0).

    (c - 1/(2b))^2 + (r + 1/(2b))^2
    """
    target = 0.5 / beta
    return (pairs.chosen_logratio - target) ** 2 + (pairs.rejected_logratio + target) ** 2


def aot_loss(pairs: PairLogProbs, beta: float, label_smoothing: float) -> Tensor:
    """AOT on paired data (arXiv 2406.05882): quantiles of the margins of policy and reference over the micro-batch."""
    policy, _ = (pairs.chosen - pairs.rejected).sort()
    reference, _ = (pairs.ref_chosen - pairs.ref_rejected).sort()
    return _smoothed(beta * (policy - reference), label_smoothing)


def aot_unpaired_loss(pairs: PairLogProbs, beta: float, label_smoothing: float) -> Tensor:
    """AOT on unpaired data (arXiv 2406.05882): quantiles of chosen and rejected log-ratios over the micro-batch."""
    chosen, _ = pairs.chosen_logratio.sort()
    rejected, _ = pairs.rejected_logratio.sort()
    return _smoothed(beta * (chosen - rejected), label_smoothing)


def apo_zero_loss(pairs: PairLogProbs, beta: float) -> Tensor:
    """APO-zero (arXiv 2408.06266, eq. 7), 1 - s(bc) + s(br): raises the chosen and lowers the rejected likelihood."""
    return 1 - (beta * pairs.chosen_logratio).sigmoid() + (beta * pairs.rejected_logratio).sigmoid()


def apo_down_loss(pairs: PairLogProbs, beta: float) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8), 1 + s(bc) - s(bD): lowers both, the rejected one more."""
    difference = pairs.chosen_logratio - pairs.rejected_logratio
    return (beta * pairs.chosen_logratio).sigmoid() + 1 - (beta * difference).sigmoid()


def discopop_loss(pairs: PairLogProbs, beta: float, divergence: Divergence, discopop_tau: float) -> Tensor:
    """DiscoPOP's log-ratio modulated loss (arXiv 2406.08414, eq. 5).

    -log s(bD) s(-bD/tau) + exp(-bD) s(bD/tau)
    """
    margin = beta * divergence.difference(pairs)
    modulation = margin / discopop_tau
    # s(m/tau) exp(-m) as one power: apart, they are 0 and infinity where the margin is far below 0.
    exponential = (log_sigmoid(modulation) - margin).exp()
    return -log_sigmoid(margin) * (-modulation).sigmoid() + exponential


def sigmoid_norm_loss(pairs: PairLogProbs, beta: float, divergence: Divergence) -> Tensor:
    """DPO on log-ratios averaged over their tokens (Tulu 3, arXiv 2411.15124)."""
    return -log_sigmoid(beta * divergence.difference_per_token(pairs))


def sft_loss(pairs: PairLogProbs) -> Tensor:
    """Negative log-likelihood of the chosen completion per token (the NLL term of arXiv 2404.19733).

    Each pair weighs the same, as in every loss here; stock TRL averages over the tokens of a batch, so that long
    completions weigh more and a pair's weight depends on its batch mates.
    """
    return pairs.chosen_nll


@dataclass(frozen=True)
class Parameter:
    """A number that is read by one loss alone: a flag, `must_be` says its bound and `holds` checks it."""

    default: float
    help: str
    must_be: str
    holds: Callable[[float], bool]


@dataclass(frozen=True)
class Loss:
    """A row of the table."""

    name: str
    function: Callable[..., Tensor]
    aliases: tuple[str, ...] = ()
    needs_smoothing: Mapping[str, str] = field(default_factory=dict)  # by which of its names -> what is usual
    parameters: Mapping[str, Parameter] = field(default_factory=dict)  # its own, by the name of the flag
    reads_reference: bool = True
    sorts_pairs: bool = False  # of a micro-batch, which then cannot be divided

    @property
    def title(self) -> str:
        """Its name, and its other names in brackets."""
        return f"{self.name} ({', '.join(self.aliases)})" if self.aliases else self.name

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """The names of what it reads beside the pairs."""
        return tuple(inspect.signature(self.function).parameters)[1:]

    def __call__(self, pairs: PairLogProbs, parameters: Mapping[str, Any]) -> Tensor:
        """The loss of each pair, shape (pairs,); of the parameters it takes those that it reads."""
        return self.function(pairs, **{name: parameters[name] for name in self.reads})


TAU = Parameter(
    default=0.05,
    help="smoothness of the transition from the logistic to the exponential loss at margin 0",
    must_be="above 0",
    holds=lambda tau: tau > 0,
)

LOSSES: Mapping[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("sigmoid", sigmoid_loss, aliases=("dpo", "cdpo"), needs_smoothing={"cdpo": "0.1"}),
        Loss("robust", robust_loss, aliases=("rdpo",)),
        Loss("ipo", ipo_loss),
        Loss("hinge", hinge_loss, aliases=("slic",)),
        Loss("exo_pair", exo_pair_loss, needs_smoothing={"exo_pair": "1e-3"}),
        Loss("nca_pair", nca_pair_loss),
        Loss("bco_pair", bco_pair_loss),
        Loss("sppo_hard", sppo_hard_loss),
        Loss("aot", aot_loss, sorts_pairs=True),
        Loss("aot_unpaired", aot_unpaired_loss, sorts_pairs=True),
        Loss("apo_zero", apo_zero_loss),
        Loss("apo_down", apo_down_loss),
        Loss("discopop", discopop_loss, parameters={"discopop_tau": TAU}),
        Loss("sigmoid_norm", sigmoid_norm_loss),
        Loss("sft", sft_loss, reads_reference=False),
    )
}

# Every name that --loss_type takes -> the loss.
BY_NAME: Mapping[str, Loss] = {name: loss for loss in LOSSES.values() for name in (loss.name, *loss.aliases)}


def reading(parameter: str) -> tuple[str, ...]:
    """The names of the losses that read a parameter."""
    return tuple(loss.name for loss in LOSSES.values() if parameter in loss.reads)
