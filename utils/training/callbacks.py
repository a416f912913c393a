"""What happens beside the training loop: lines on the console, metrics.jsonl, run.json, alarms, a stop that saves."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from utils.errors import UserError
from utils.output_folder import clear_run
from utils.runtime import readable_seconds, say
from utils.saving import METRICS, RunRecord, append_metrics, keep_metrics_until, read_json_lines
from utils.training.alarms import Limits, find_alarms
from utils.training.bad_batches import BadBatches
from utils.training.progress import Stopwatch
from utils.training.reporting import ReportFile

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


class RunWatcher(TrainerCallback):
    """Prints and records each log line and evaluation, and stops the run in good order when it is asked to."""

    def __init__(
        self,
        record: RunRecord,
        folder: Path | None,
        fresh: bool = True,
        max_kl: float | None = None,
        earlier: float = 0,
    ):
        self.record = record
        self.folder = folder
        self.fresh = fresh  # whether the run begins here, in place of one that the folder may hold
        self.stopwatch = Stopwatch()
        self._made = time.perf_counter() - earlier  # seconds that the run took before it was resumed
        self.asked_to_stop = False  # by a signal to this process
        self.interrupted = False  # whether the run stops, in all its processes
        self.begun = False  # whether everything that settings decide is made, so that what fails now is no setting
        self.shows_evaluations = True
        self.before: dict[str, float] | None = None
        self.resumed_step = 0
        self.lines: list[dict[str, Any]] = []  # of metrics.jsonl, as far as alarms look at them
        self._alarms: set[str] = set()
        self._max_kl = max_kl
        self.bad_batches: BadBatches | None = None  # of the run, which is made after its watcher
        self.report = ReportFile(folder, record) if folder is not None else None
        # Of the run, which is made after its watcher: what it used so far, and the seconds that are left.
        self.resources: Callable[[], dict[str, Any]] = dict
        self.seconds_left: Callable[[], float] = float

    @property
    def wall_seconds(self) -> float:
        """Seconds since the run began, evaluations and all."""
        return time.perf_counter() - self._made

    def on_train_begin(self, args, state, control, **_):
        self.resumed_step = state.global_step
        if args.world_size > 1:
            self._processes = torch.distributed.new_group(backend="gloo")
        if self.folder is not None and state.is_world_process_zero:
            if self.fresh:
                clear_run(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            keep_metrics_until(self.folder, state.global_step)
            self.lines = read_json_lines(self.folder / METRICS)
        if self.bad_batches is not None:
            self.bad_batches.restore(state)
            self.bad_batches.note()
        if self.folder is not None and state.is_world_process_zero:
            self.record.write_to(self.folder)
            self.report.write(now=True)
        self.begun = True
        self.stopwatch.start()

    def on_step_end(self, args, state, control, **_):
        last = state.global_step >= state.max_steps
        self.interrupted = self._any_asked_to_stop(args.world_size)
        if self.interrupted:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"
        # A log line before every checkpoint: what it counts is then never lost between two parts of a run.
        if control.should_save or last:
            control.should_log = True

    def _any_asked_to_stop(self, world_size: int) -> bool:
        """Whether a signal reached any process: all have to stop after the same step. Does not wait for a GPU."""
        if world_size == 1:
            return self.asked_to_stop
        asked = torch.tensor(int(self.asked_to_stop))
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, group=self._processes)
        return bool(asked)

    def on_log(self, args, state, control, logs=None, **_):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        held_out = any(name.startswith("eval_") for name in logs)
        line = {name.replace("eval_", "held_out_"): value for name, value in logs.items()}
        bad = [name for name, value in line.items() if isinstance(value, float) and not math.isfinite(value)]
        line = {"step": state.global_step, **line} | dict.fromkeys(bad)  # null: JSON has no NaN
        if self.folder is not None:
            append_metrics(self.folder, line)
        if not held_out:
            left = self.seconds_left()
            say(self._progress(state, logs, left))
            if "loss" in bad:
                raise UserError(
                    f"training came apart by step {state.global_step}: {', '.join(bad)} not finite. Nothing is saved "
                    f"from here on; try a smaller --learning_rate (it is {args.learning_rate:g}), "
                    "--max_grad_norm, or --dtype float32"
                )
            self.record.update(
                step=state.global_step, steps=state.max_steps, seconds_left=left, resources=self.resources()
            )
        self._sound_alarms(line, state.max_steps)
        if self.report is not None:
            self.report.write(now=held_out)

    def _sound_alarms(self, line: dict[str, Any], steps: int) -> None:
        """Says each alarm that the metrics set off, once in a run."""
        self.lines.append(line)
        if len(self.lines) > MOST_LINES:  # alarms look at evaluations, and at the first and last lines of training
            middle = self.lines[MOST_LINES // 4 : -MOST_LINES // 2]
            kept = [line for line in middle if "learning_rate" not in line]
            self.lines[MOST_LINES // 4 : -MOST_LINES // 2] = kept
        for name, text in find_alarms(self.lines, Limits(steps, self._max_kl)):
            if name not in self._alarms:
                self._alarms.add(name)
                self.record.warn(text, aloud=True)

    def _progress(self, state, logs: Mapping[str, Any], left: float) -> str:
        width = len(str(state.max_steps))
        return (
            f"  step {state.global_step:>{width}}/{state.max_steps}  {readable_metrics(logs)}  "
            f"lr {logs.get('learning_rate', 0):.1e}  {readable_seconds(left)} left"
        )

    def on_evaluate(self, args, state, control, metrics=None, **_):
        shown = {name.removeprefix("eval_"): value for name, value in (metrics or {}).items()}
        if state.global_step == 0:
            self.before = shown
            self.record.update(metrics={"held_out_before": shown})
        else:
            self.record.update()
        if state.is_world_process_zero and self.shows_evaluations:
            when = "before training" if state.global_step == 0 else f"at step {state.global_step}"
            say(f"  held out {when}: {readable_metrics(shown)}")

    def on_train_end(self, args, state, control, **_):
        self.stopwatch.stop()


class StopInGoodOrder:
    """Within the context Ctrl-C and SIGTERM let the step finish and its state be saved; a second one is final."""

    def __init__(self, watcher: RunWatcher):
        self.watcher = watcher
        self.former: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.former[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_):
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if self.watcher.asked_to_stop:
            raise KeyboardInterrupt
        self.watcher.asked_to_stop = True
        say("  stopping after this step (once more to stop at once, without saving)")
