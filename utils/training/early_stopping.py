"""A stop when the held-out pairs get no better, with the best model kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..run.names import step_in_name
from ..run.record import RunRecord
from ..runtime import say

SMALLER_IS_BETTER = {"loss": True, "margin": False, "accuracy": False}


@dataclass(frozen=True)
class Best:
    """The best evaluation so far; `evaluations_since` came after it and were no better."""

    step: int
    value: float
    evaluations_since: int


def find_best(lines: Sequence[Mapping[str, Any]], metric: str) -> Best | None:
    """The best of the evaluations in a trainer's log, the first of equals; the one before training does not count."""
    name, sign = f"eval_{metric}", -1 if SMALLER_IS_BETTER[metric] else 1
    values = [(line["step"], line[name]) for line in lines if name in line and line["step"] > 0]
    if not values:
        return None
    place = max(range(len(values)), key=lambda index: (sign * values[index][1], -index))
    return Best(*values[place], evaluations_since=len(values) - 1 - place)


class EarlyStopping(TrainerCallback):
    """Saves each evaluation that is the best so far, and stops after `patience` that were not.

    It counts from the trainer's log, which a resumed run has too.
    """

    def __init__(self, patience: int, metric: str, record: RunRecord) -> None:
        self.patience, self.metric, self.record = patience, metric, record

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        best = find_best(state.log_history, self.metric)
        if best is not None:  # a resumed run, which may have been stopped already
            control.should_training_stop = self._note(best, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_evaluate:
            control.should_log = True  # what a checkpoint counted is logged before it

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        best = find_best(state.log_history, self.metric)
        if best is None or state.global_step == 0:
            return
        if best.step == state.global_step:
            control.should_save = True
        if self._note(best, state):
            control.should_training_stop = True
            say(
                f"  stopping early: the held-out {self.metric} has not improved in {best.evaluations_since} "
                f"evaluation{'s' if best.evaluations_since > 1 else ''}"
            )

    def _note(self, best: Best, state: TrainerState) -> bool:
        """Records the best evaluation; whether the run stops for it."""
        stops = best.evaluations_since >= self.patience and state.global_step < state.max_steps
        content = {"metric": self.metric, "patience": self.patience, **asdict(best), "stopped": stops}
        self.record.update(early_stopping=content)
        return stops


def find_kept(state: TrainerState, args: TrainingArguments) -> dict[str, Any] | None:
    """Which step the model is from that a run ends with, where that is the best one; None where it is the last.

    Returns:
        `step`, `metric`, `value`, and `equal_steps`: later ones whose evaluation was as good.
    """
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return None
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    step = step_in_name(Path(state.best_model_checkpoint).name)
    lines = [line for line in state.log_history if f"eval_{metric}" in line]
    value = next((line[f"eval_{metric}"] for line in lines if line["step"] == step), state.best_metric)
    equal = [line["step"] for line in lines if line["step"] > step and line[f"eval_{metric}"] == value]
    return {"step": step, "metric": metric, "value": value, "equal_steps": equal}


def describe_best(content: Mapping[str, Any]) -> str:
    """Which step's model is kept, and why, as a sentence."""
    *most, last = [str(step) for step in content["equal_steps"]] or [""]
    others = f"{', '.join(most)} and {last}" if most else last
    equal = f" (step{'s' if most else ''} {others}: the same; the first is kept)" if last else ""
    value = f"{content['value']:.4g}"
    return f"the model of step {content['step']} is kept: the best held-out {content['metric']}, {value}{equal}"
