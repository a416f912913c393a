"""A run from its first step to its last: trains, is recorded, stops in good order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PrinterCallback

from ..errors import Interrupted, ProcessLost, UserError
from ..interruptions import stop_if_asked
from ..models.reference import ReferencePlan
from ..progress import phase
from ..run.checkpoints import checkpoint_step, find_checkpoints
from ..run.processes import command_to_go_on
from ..run.record import read_record
from ..runtime import is_main_process, say
from .callbacks import RunWatcher, StopInGoodOrder
from .context import Run
from .early_stopping import EarlyStopping
from .failures import explain_failure
from .launch import check_resumable, explain_lost_process, speaks
from .recording import record_models
from .refusals import refusals_explained
from .samples import SampleWriter
from .start import StartCheck
from .trackers import attach_trackers, close_trackers
from .trainer import RunTrainer
from .usage import Usage


@dataclass
class LiveRun:
    """A run with the trainer that it has and with what watches it."""

    run: Run
    trainer: RunTrainer
    watcher: RunWatcher

    def train(self) -> None:
        """Trains to the end.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the state was saved.
            UserError, ProcessLost: it ended before; the message says what is safe.
        """
        with (
            self.failing_in_good_order(),
            StopInGoodOrder(self.watcher),
            refusals_explained(self.run.settings, lambda: self.watcher.begun),
            phase("training", unit="steps", plain=False) as self.watcher.shown,
        ):
            stop_if_asked()  # before; from here on signals are the watcher's
            self.trainer.train(resume_from_checkpoint=str(self.run.checkpoint) if self.run.checkpoint else None)
            self._check_steps()
        if self.watcher.interrupted:
            self.end("interrupted")
            raise Interrupted(self._how_to_go_on())

    def _check_steps(self) -> None:
        """Says it where training ended before its last step and nothing asked it to.

        Raises:
            UserError: no step was taken at all.
        """
        state, stopped = self.trainer.state, (self.run.record.content.get("early_stopping") or {}).get("stopped")
        if state.global_step >= state.max_steps or self.watcher.interrupted or stopped:
            return
        if state.global_step == 0:
            raise UserError(
                f"no step was taken, of {state.max_steps} that were planned: the {len(self.run.rows.train)} rows to "
                "train on gave no batch; nothing is saved"
            )
        self.trainer.machine.warn(
            f"training ended after step {state.global_step} of {state.max_steps}: its rows gave no more batches"
        )

    @contextlib.contextmanager
    def failing_in_good_order(self) -> Iterator[None]:
        """Records what ends the run before its time, and says it with what is safe and the command that goes on."""
        try:
            yield
        except KeyboardInterrupt:
            self._record_end("interrupted")
            if not self.watcher.begun:
                raise
            raise Interrupted(self._how_to_go_on()) from None
        except BaseException as error:
            explained = self._explain(error)
            if isinstance(explained, ProcessLost):
                explained.spoken = not speaks(self.run.folder) or (
                    not is_main_process() and self._main_process_failed()
                )
            self._record_failure(explained or error)
            if explained is not None:
                raise explained from error
            raise

    def _explain(self, error: BaseException) -> UserError | ProcessLost | None:
        step = self.trainer.state.global_step
        return explain_failure(
            error, self.run.folder, step, self._what_is_safe(), self._command()
        ) or explain_lost_process(error, self.run.record.content, self.run.folder, step)

    def _main_process_failed(self) -> bool:
        return self.run.folder is not None and read_record(self.run.folder).get("status") == "failed"

    def _what_is_safe(self) -> str:
        checkpoints = find_checkpoints(self.run.folder) if self.run.folder is not None else []
        if not checkpoints:
            there = self.run.folder is not None and self.run.folder.is_dir()
            return "No checkpoint was saved yet." if there else "Its content is gone."
        return f"{checkpoints[-1].name} is safe, and everything up to its step."

    def _command(self) -> str:
        return command_to_go_on(self.run.record.content["arguments"], self.run.record.content["process"])

    def _record_failure(self, error: BaseException) -> None:
        named = isinstance(error, UserError | ProcessLost)
        texts = getattr(error, "faults", [str(error)]) if named else [f"{type(error).__name__}: {error}"]
        if self.watcher.begun:
            self.run.record.content["warnings"] += [
                text for text in texts if text not in self.run.record.content["warnings"]
            ]
        self._record_end("failed", failure=texts[0].partition("\n")[0])

    def _record_end(self, status: str, **values: Any) -> None:
        """The same as `end`, where the disk may be what failed."""
        with contextlib.suppress(OSError):
            self.end(status, **values)

    def end(self, status: str, **values: Any) -> None:
        """The last record of the run, and its report."""
        if self.watcher.begun:
            state = self.trainer.state  # no line may have been logged yet
            values |= {"seconds_left": None, "resources": self.watcher.usage.resources()}
            values |= {"step": state.global_step, "steps": state.max_steps}
        self.run.record.update(status=status, **values)
        close_trackers(self.trainer, self.run.record)
        if self.watcher.report is not None and self.trainer.args.should_save and self.watcher.begun:
            self.watcher.report.write(now=True)

    def _how_to_go_on(self) -> str:
        step = self.trainer.state.global_step
        checkpoints = find_checkpoints(self.run.folder) if self.run.folder is not None else []
        if not checkpoints:
            return f"interrupted at step {step}; no checkpoint was saved"
        saved = checkpoint_step(checkpoints[-1])
        what = "its state is saved" if saved == step else f"its state as of step {saved} is saved"
        return f"interrupted at step {step}, {what}; to resume:\n  {self._command()}"


def start_run(run: Run, trainer: RunTrainer, reference: ReferencePlan) -> LiveRun:
    """Attaches to the trainer what watches and records the run; nothing is written before its first step can be
    taken."""
    settings = run.settings
    if run.checkpoint is not None:
        check_resumable(run.checkpoint, trainer.is_deepspeed_enabled)
        trainer.args.eval_on_start = False
        say(f"resuming from {run.checkpoint}")
    elif settings.run.resume_from_checkpoint is not None:
        say("no checkpoint to resume from yet: starting from the beginning")
    record_models(run, trainer, reference)
    watcher = RunWatcher(run, trainer.machine.bad_batches, Usage(run, trainer))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watcher)
    if reference.is_start:
        trainer.add_callback(StartCheck(trainer, reference))
    patience = settings.training.early_stopping_patience
    if patience is not None and not settings.run.dry_run:
        trainer.add_callback(EarlyStopping(patience, settings.training.early_stopping_metric, run.record))
    if settings.run.sample_during_eval:
        trainer.add_callback(SampleWriter(run, trainer))
    step = checkpoint_step(run.checkpoint) if run.checkpoint is not None else 0
    run.record.content["wandb_run_id"] = attach_trackers(trainer, settings.run, run.former, step, run.record)
    return LiveRun(run, trainer, watcher)
