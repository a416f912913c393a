"""Resumed runs: every checkpoint describes its run, and allowed changes take effect."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..run.state import IDENTITY, keep_in_checkpoints
from .context import Run
from .continuation import CHANGES, Continuation
from .trainer import RunTrainer


def attach_continuation(run: Run, trainer: RunTrainer, continuation: Continuation | None) -> None:
    """Lets the trainer's checkpoints and the record hold what the run is, and what was allowed to change."""
    if continuation is None:
        return
    # Whoever uses the run compares its models with these.
    run.record.content["identity"] = {name: continuation.identity[name] for name in ("model", "base", "reference")}
    for warning in continuation.warnings:
        run.record.warn(warning)
    trainer.add_callback(_CarryOn(continuation))


class _CarryOn(TrainerCallback):
    def __init__(self, continuation: Continuation) -> None:
        self.continuation = continuation

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        keep_in_checkpoints(state, IDENTITY, dict(self.continuation.identity))
        keep_in_checkpoints(state, CHANGES, list(self.continuation.changes))
        if self.continuation.changed and optimizer is not None:
            apply_settings(self.continuation.changed, args, optimizer, getattr(lr_scheduler, "scheduler", lr_scheduler))


def apply_settings(changed: frozenset[str], args: Any, optimizer: Any, scheduler: Any) -> None:
    """The changed settings of the optimizer and its schedule, in place of those that the checkpoint brought.

    Args:
        args: the trainer's.
    """
    groups = optimizer.param_groups
    for group in groups:
        if {"adam_beta1", "adam_beta2"} & changed and "betas" in group:
            group["betas"] = (args.adam_beta1, args.adam_beta2)
        if "adam_epsilon" in changed and "eps" in group:
            group["eps"] = args.adam_epsilon
    if "weight_decay" in changed:
        groups[0]["weight_decay"] = args.weight_decay  # the trainer's second group has none
    if "learning_rate" in changed:
        factor = args.learning_rate / max(scheduler.base_lrs)
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        for group, base in zip(groups, scheduler.base_lrs, strict=True):
            group["initial_lr"], group["lr"] = base, group["lr"] * factor
    if isinstance(scheduler, LambdaLR):  # also for another number of steps, another warm-up or shape
        shares = [share(scheduler.last_epoch) for share in scheduler.lr_lambdas]
        for group, base, share in zip(groups, scheduler.base_lrs, shares, strict=True):
            group["lr"] = base * share
    scheduler._last_lr = [group["lr"] for group in groups]
