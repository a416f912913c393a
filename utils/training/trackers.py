"""Experiment trackers within the trainer: one record per run, which a resumed run continues without repeating steps."""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback, rewrite_logs
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ..errors import in_one_line
from ..report.messages import show_messages
from ..run.record import RunRecord
from ..runtime import say
from ..settings.training import RunSettings

TRACKERS = frozenset(INTEGRATION_TO_CALLBACK.values())
SAMPLE_COLUMNS = ("step", "prompt", "response", "ended")


class StepwiseWandb(WandbCallback):
    """W&B's own step is the optimizer step, so that a resumed run continues its record and writes no step twice.

    Names are those of every tracker: train/... and eval/...
    """

    def __init__(self, settings: RunSettings, run_id: str) -> None:
        super().__init__()
        self.settings, self.run_id = settings, run_id

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **options: Any) -> None:
        if state.is_world_process_zero and self._wandb.run is None:
            self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", self.settings.wandb_project),
                entity=self.settings.wandb_entity,
                name=args.run_name,
                tags=list(self.settings.wandb_tags) or None,
                id=self.run_id,
                resume=os.environ.get("WANDB_RESUME", "allow"),
                # As the environment is now: W&B looks at it once in a process, and this may be the second run in one.
                dir=os.environ.get("WANDB_DIR"),
                mode=os.environ.get("WANDB_MODE"),
            )
        super().setup(args, state, model, **options)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, float] | None = None,
        **options: Any,
    ) -> None:
        if not self._initialized:
            self.setup(args, state, model)
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        self._wandb.log({**rewrite_logs(logs), "train/global_step": state.global_step}, step=state.global_step)


def attach_trackers(
    trainer: Trainer, settings: RunSettings, former: Mapping[str, Any] | None, resumed_step: int, record: RunRecord
) -> str | None:
    """Puts trackers that go on with a resumed run in the place of the trainer's own. Returns the id of the W&B run.

    What fails in a tracker is a warning, and the run goes on without that tracker.

    Args:
        former: the record of the run that is resumed.
        resumed_step: the step of its checkpoint; 0 where it begins again.
    """
    run_id = None
    if _removed(trainer, WandbCallback):
        run_id = os.environ.get("WANDB_RUN_ID") or (former or {}).get("wandb_run_id") or secrets.token_hex(4)
        trainer.add_callback(StepwiseWandb(settings, run_id))
    if former is not None and _removed(trainer, TensorBoardCallback):
        from torch.utils.tensorboard import SummaryWriter

        folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(Path(trainer.args.output_dir) / "tensorboard")
        # What an earlier part logged after the checkpoint is struck out: it is trained again.
        trainer.add_callback(TensorBoardCallback(SummaryWriter(folder, purge_step=resumed_step + 1)))
    for callback in trainer.callback_handler.callbacks:
        if type(callback) in TRACKERS or isinstance(callback, StepwiseWandb):
            _let_fail(callback, record)
    # What their threads and their own logs cannot write comes back at the next call, which fails and is said in a line.
    threading.excepthook = _report_thread
    logging.raiseExceptions = False
    return run_id


def _report_thread(failure: threading.ExceptHookArgs) -> None:
    """Prints what ended a thread, as Python does; but not of TensorBoard's writer, whose next call has the reason."""
    of_tracker = type(failure.thread).__module__.startswith("tensorboard")
    if not (of_tracker and isinstance(failure.exc_value, OSError)):
        threading.__excepthook__(failure)


def _let_fail(callback: TrainerCallback, record: RunRecord) -> None:
    """From its first failure on a tracker is called no more."""
    name = _name_of(callback)
    failed = False

    def forgiving(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            nonlocal failed
            if failed:
                return None
            try:
                return call(*arguments, **options)
            except Exception as error:
                failed = True
                _warn_of(name, error, record)
                return None

        return called

    # A failure before the first step is one of settings, and is refused.
    for event in (name for name in dir(TrainerCallback) if name.startswith("on_") and name != "on_train_begin"):
        setattr(callback, event, forgiving(getattr(callback, event)))


def _name_of(callback: TrainerCallback) -> str:
    return next((name for name, kind in INTEGRATION_TO_CALLBACK.items() if isinstance(callback, kind)), "tracker")


def _warn_of(name: str, error: Exception, record: RunRecord) -> None:
    record.warn(
        f"{name} failed and is switched off; the run continues, and metrics.jsonl has everything "
        f"({type(error).__name__}: {in_one_line(error)})",
        aloud=True,
    )


def _removed(trainer: Trainer, kind: type) -> bool:
    """Whether the trainer had such a callback, which it now has no more."""
    return trainer.pop_callback(kind) is not None


def log_samples(trainer: Trainer, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Sends what the model wrote to the trackers that show texts: a table in W&B, a text in TensorBoard.

    Args:
        rows: step, prompt (a text, or messages), response, and whether it ended.
        step: the optimizer step.
    """
    cells = [[show_messages(row.get(name)) for name in SAMPLE_COLUMNS] for row in rows]
    for callback in trainer.callback_handler.callbacks:
        try:
            _log_cells(callback, cells, step)
        except Exception as error:
            name, kind = _name_of(callback), type(error).__name__
            say(f"warning: {name} rejected the samples of step {step} ({kind}: {error})")


def _log_cells(callback: TrainerCallback, cells: list[list[str]], step: int) -> None:
    if isinstance(callback, WandbCallback) and callback._wandb.run is not None:
        table = callback._wandb.Table(columns=list(SAMPLE_COLUMNS), data=cells)
        callback._wandb.log({"samples": table}, step=step)
    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        texts = [f"prompt:\n{prompt}\n\nresponse:\n{response}" for _, prompt, response, _ in cells]
        fenced = [text.replace("\n", "\n    ") for text in texts]  # indented: Markdown then shows it as it is
        callback.tb_writer.add_text("samples", "\n\n---\n\n".join(f"    {text}" for text in fenced), step)
        callback.tb_writer.flush()


def close_trackers(trainer: Trainer, record: RunRecord) -> None:
    """Ends the W&B run, as failed where the run failed, so that all of it is written before the script goes on."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, StepwiseWandb) and callback._wandb.run is not None:
            try:
                callback._wandb.finish(exit_code=int(record.content["status"] == "failed"))
            except Exception as error:
                _warn_of(_name_of(callback), error, record)
