"""Before the first step the policy is its reference, so the first loss is known: whether this run starts there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..models.reference import ReferencePlan

if TYPE_CHECKING:
    from .trainer import PreferenceTrainer

PAIRS = 8  # that are looked at, of those that are trained on
TIMES_ROUNDING = 4.0  # how many times as far as the policy is from itself it may be from its reference
ROUNDING = 2.0**-20  # of a sum of log-probs in float32: what the order of its terms can make of it


@dataclass(frozen=True)
class Start:
    """What policy and reference say of the same pairs before the first step.

    `loss` and `known`: the mean loss, and what it is where the two agree. `gap`: by how many nats their log-probs of a
    completion differ (root mean square). `allowed`: how much of that rounding explains.
    """

    loss: float
    known: float
    gap: float
    allowed: float

    @property
    def is_known(self) -> bool:
        """Whether the run starts where it must; true of numbers that are not finite, which other checks report."""
        return not math.isfinite(self.gap) or self.gap <= self.allowed


def measure_start(trainer: PreferenceTrainer) -> Start:
    """Scores the first pairs with policy and reference, as an evaluation would.

    The two mostly compute the same, bit by bit. Half a step of the computing format for each token is allowed, added up
    as random errors add up, with its root. Where the two differ by more, how far rounding moves log-probs of this model
    on this device is measured: the policy scores the same pairs once more, one by one.
    """
    pairs = trainer.train_dataset.select(range(min(PAIRS, len(trainer.train_dataset))))
    together = trainer.task.score_start(pairs, max(2, min(PAIRS, trainer.args.per_device_eval_batch_size)))
    log_probs, reference, tokens, losses, known = together.unbind(dim=1)
    step = trainer.machine.trial().step or 0.0
    gap, allowed = _size(log_probs - reference), _size((step / 2 * tokens.sqrt()).maximum(ROUNDING * log_probs.abs()))
    if gap > allowed:
        alone = trainer.task.score_start(pairs, 1)[:, 0]
        allowed = max(allowed, TIMES_ROUNDING * _size(log_probs - alone))
    return Start(losses.mean().item(), known.mean().item(), gap, allowed)


def _size(differences: Tensor) -> float:
    return differences.square().mean().sqrt().item()


class StartCheck(TrainerCallback):
    """Looks before the first step whether the policy starts as its reference, and warns where it does not."""

    def __init__(self, trainer: PreferenceTrainer, reference: ReferencePlan) -> None:
        self.trainer, self.reference = trainer, reference

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step > 0:
            return
        start = measure_start(self.trainer)  # in all processes, with the same result
        if not start.is_known and state.is_world_process_zero:
            self.trainer.machine.warn(self._describe(start))

    def _describe(self, start: Start) -> str:
        loss = f"the first loss is {start.loss:.4f} instead of {start.known:.4f}"
        if self.reference.is_rounded:
            return (
                f"the 4-bit reference differs slightly from the policy: before the first step {loss}, and log-probs of "
                f"a response differ by {start.gap:.2g} nats. Scored ahead (--precompute_ref_log_probs) it is not "
                "rounded"
            )
        ahead = "--precompute_ref_log_probs false, " if self.trainer.scored_ahead else ""
        return (
            f"the policy and its reference differ before the first step, although their weights are the same: {loss}, "
            f"and log-probs of a response differ by {start.gap:.2g} nats, where rounding explains {start.allowed:.2g}. "
            f"All rewards and margins of this run are off by that much. Stop it, and try {ahead}--engine padded "
            "or --dtype float32"
        )
