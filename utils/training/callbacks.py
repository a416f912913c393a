"""What happens beside the training loop: lines on the console, metrics.jsonl, run.json, alarms, a stop that saves."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..distributed import any_of
from ..errors import UserError
from ..interruptions import heeded_signals, let_no_second_hangup_count
from ..progress import Phase
from ..run.folder import clear_run, remove_leftovers
from ..run.metrics import HELD_OUT, append_metrics, keep_rows_until, restore_metrics
from ..run.state import keep_in_checkpoints, kept_in_checkpoint
from ..runtime import readable_seconds, say
from .alarms import Limits, find_alarms
from .bad_batches import BadBatches
from .checkpointing import STOPS
from .context import Run
from .reporting import ReportFile
from .usage import Usage

# name in the log -> how the console shows it
SHOWN = {
    "loss": "loss {:.4f}",
    "accuracy": "accuracy {:.0%}",
    "margin": "margin {:+.3f}",
    "chosen_kl": "KL {:.2f}",
    "perplexity": "perplexity {:.2f}",
    "token_accuracy": "token accuracy {:.0%}",
}

MOST_LINES = 450  # of metrics that are kept at hand for the alarms


def readable_metrics(metrics: Mapping[str, Any]) -> str:
    """The metrics a person watches, in one phrase."""
    return "  ".join(form.format(metrics[name]) for name, form in SHOWN.items() if name in metrics)


def as_line(logs: Mapping[str, Any], step: int) -> dict[str, Any]:
    """A line of metrics.jsonl from what the trainer logs."""
    line = {name.replace("eval_", HELD_OUT): value for name, value in logs.items() if name != "step"}
    bad = [name for name, value in line.items() if isinstance(value, float) and not math.isfinite(value)]
    return {"step": step, **line} | dict.fromkeys(bad)  # null: JSON has no NaN


def is_of_run(logs: Mapping[str, Any]) -> bool:
    """Whether it is of a step; the trainer logs its own summary at the end of each part of a run."""
    return "train_runtime" not in logs


def steps_used(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """What settings given as shares of the run come to in steps, and rows that a step takes in all processes."""
    return {
        "max_steps": state.max_steps,
        "rows_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "warmup_steps": args.get_warmup_steps(state.max_steps),
        "logging_steps": state.logging_steps,
        "save_steps": state.save_steps,
        **({"eval_steps": state.eval_steps} if args.eval_strategy == "steps" else {}),
    }


class RunWatcher(TrainerCallback):
    """Prints and records each log line and evaluation, and stops the run in good order when it is asked to."""

    def __init__(self, run: Run, bad_batches: BadBatches, usage: Usage) -> None:
        self.record, self.folder, self.stopwatch = run.record, run.folder, run.stopwatch
        self.bad_batches, self.usage = bad_batches, usage
        self.fresh = run.checkpoint is None  # whether the run begins here, in place of one that the folder may hold
        # That one, also what was renamed as damaged, which a start without a checkpoint leaves.
        self.replaces = run.settings.run.resume_from_checkpoint is None
        self.report = ReportFile(run.folder, run.record) if run.folder is not None else None
        self.asked_to_stop = False  # by a signal to this process
        self.interrupted = False  # whether the run stops, in all its processes
        self.begun = False  # whether everything that settings decide is made, so that what fails now is no setting
        self.shows_evaluations = True
        self.shown: Phase | None = None  # how far training is, while it trains
        self.lines: list[dict[str, Any]] = []  # of metrics.jsonl, as far as alarms look at them
        self._max_kl = run.settings.run.max_kl
        self._saves_later = False
        self._has_named = False  # whether it was looked for what the first step does not train

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.usage.begun_at = state.global_step
        if self.folder is not None and state.is_world_process_zero:
            if self.fresh:
                clear_run(self.folder, damaged=self.replaces)
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
            lines = [as_line(logs, logs["step"]) for logs in state.log_history if is_of_run(logs)]
            restored = restore_metrics(self.folder, lines)
            keep_rows_until(self.folder, state.global_step)
            if lines:  # a run that is resumed after its last step logs no more
                self.record.content |= {"step": state.global_step, "steps": state.max_steps}
            # Those before the checkpoint's own lines, which it has as one mean, were looked at when they were written.
            for line in restored[: -len(lines)] if lines else ():
                self._keep_line(line)
            for line in restored[-len(lines) :] if lines else ():
                self._sound_alarms(line, state.max_steps, aloud=False)
        self.record.content["used"] |= steps_used(args, state)
        self.bad_batches.restore(state)
        self.bad_batches.note()
        if self.folder is not None and state.is_world_process_zero:
            self.record.write_to(self.folder)
            self.report.write(now=True)
        self.begun = True
        if self.shown is not None:
            self.shown.begin_at(state.global_step, state.max_steps)
        self.stopwatch.start()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **_: Any,
    ) -> None:
        if not self._has_named and model is not None and args.deepspeed is None:
            self._name_what_stays(model)

    def _name_what_stays(self, model: torch.nn.Module) -> None:
        """Warns of parameters that are said to be trained and that the first step's loss does not depend on.

        A step that is left out has no gradients at all; then the next one is looked at.
        """
        trained = [(name, part) for name, part in model.named_parameters() if part.requires_grad]
        still = [name for name, part in trained if part.grad is None]
        self._has_named = len(still) < len(trained)
        if still and self._has_named:
            more = f" and {len(still) - 1} more" if len(still) > 1 else ""
            self.record.warn(
                f"{still[0]}{more} of {len(trained)} trained tensors had no gradient in the first step: the loss does "
                "not depend on them, so they stay as they are",
                aloud=True,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True  # a line before every checkpoint, so that the two tell of the same step
        # A signal may have reached any process: all have to stop after the same step. Does not wait for a GPU.
        self.interrupted = any_of(self.asked_to_stop)
        if self.interrupted:
            # No line for a checkpoint that the run would not have made: what the next line counts is saved in it.
            control.should_training_stop = True
            ends_epoch = args.save_strategy == "epoch" and float(state.epoch).is_integer()
            if not control.should_save and not ends_epoch:
                keep_in_checkpoints(state, STOPS, [*(kept_in_checkpoint(state, STOPS) or []), state.global_step])
            control.should_save = args.save_strategy != "no"
        if self.shown is not None:
            self.shown.reach(state.global_step, self.usage.seconds_left())
        self._saves_later = False
        if control.should_save and args.eval_strategy == "epoch" and float(state.epoch).is_integer():
            # The evaluation at the end of the epoch belongs to this step too.
            control.should_save, self._saves_later = False, True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._saves_later:
            control.should_save, self._saves_later = True, False
        elif self.interrupted and not float(state.epoch).is_integer():
            # The epoch goes on when the run is resumed.
            control.should_log = control.should_evaluate = control.should_save = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or not is_of_run(logs):
            return
        held_out = any(name.startswith("eval_") for name in logs)
        line = as_line(logs, state.global_step)
        bad = [name for name, value in logs.items() if isinstance(value, float) and not math.isfinite(value)]
        if self.folder is not None:
            append_metrics(self.folder, line)
        if not held_out:
            left = self.usage.seconds_left()
            say(self._progress(state, logs, left))
            if "loss" in bad:
                raise UserError(
                    f"training diverged by step {state.global_step}: {', '.join(bad)} not finite. Nothing is saved "
                    f"from here on; try a smaller --learning_rate (it is {args.learning_rate:g}), "
                    "--max_grad_norm, or --dtype float32"
                )
            self.record.update(
                step=state.global_step, steps=state.max_steps, seconds_left=left, resources=self.usage.resources()
            )
        self._sound_alarms(line, state.max_steps)
        if self.report is not None:
            self.report.write(now=held_out)

    def _keep_line(self, line: dict[str, Any]) -> None:
        """Keeps a line of metrics for the alarms."""
        self.lines.append(line)
        if len(self.lines) > MOST_LINES:  # alarms look at evaluations, and at the first and last lines of training
            middle = self.lines[MOST_LINES // 4 : -MOST_LINES // 2]
            kept = [line for line in middle if "learning_rate" not in line]
            self.lines[MOST_LINES // 4 : -MOST_LINES // 2] = kept

    def _sound_alarms(self, line: dict[str, Any], steps: int, aloud: bool = True) -> None:
        """Says each alarm that the metrics set off, once in a run; a resumed run knows what was said before."""
        self._keep_line(line)
        for name, text in find_alarms(self.lines, Limits(steps, self._max_kl)):
            sounded = self.record.content.setdefault("alarms", [])  # by an earlier part of the run too
            if name not in sounded:
                sounded.append(name)
                self.record.warn(text, aloud=aloud)

    def _progress(self, state: TrainerState, logs: Mapping[str, Any], left: float) -> str:
        width = len(str(state.max_steps))
        return (
            f"  step {state.global_step:>{width}}/{state.max_steps}  {readable_metrics(logs)}  "
            f"lr {logs.get('learning_rate', 0):.1e}  {readable_seconds(left)} left"
        )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        shown = {name.removeprefix("eval_"): value for name, value in (metrics or {}).items()}
        if state.global_step == 0:
            self.record.update(metrics={"held_out_before": shown})
        else:
            self.record.update()
        if state.is_world_process_zero and self.shows_evaluations:
            when = "before training" if state.global_step == 0 else f"at step {state.global_step}"
            say(f"  held out {when}: {readable_metrics(shown)}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stopwatch.stop()
        if not self.interrupted and args.save_strategy != "no":  # asked after the last step, which is saved
            self.interrupted = any_of(self.asked_to_stop)


class StopInGoodOrder:
    """Within the context a signal to stop lets the step finish and its state be saved; a second one is final."""

    def __init__(self, watcher: RunWatcher) -> None:
        self.watcher = watcher
        self.former: dict[int, Any] = {}

    def __enter__(self) -> StopInGoodOrder:
        if threading.current_thread() is threading.main_thread():
            for number in heeded_signals():
                self.former[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.former.items():
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        let_no_second_hangup_count(number)
        if self.watcher.asked_to_stop:
            raise KeyboardInterrupt
        self.watcher.asked_to_stop = True
        with contextlib.suppress(RuntimeError):  # a stream that is just being written to
            say("  stopping after this step (once more to stop at once, without saving)")
