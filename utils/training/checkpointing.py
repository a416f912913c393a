"""How a trainer saves: each checkpoint, and the model at the end, whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from ..distributed import LONG, agree, gather
from ..errors import UserError
from ..run.checkpoints import (
    begin_checkpoint,
    find_fault,
    finish_checkpoint,
    is_of_model,
    prune_checkpoints,
    unfinished_checkpoint,
)
from ..run.manifests import describe_files
from ..run.names import TRAINER_STATE, UNFINISHED_MODEL
from ..run.state import kept_in_checkpoint, load_state, restoring, save_state
from ..run.writing import FolderLost, check_held, find_disk_fault, move_into_place

STOPS = "stops"  # in what a checkpoint keeps: steps that were saved because the run was asked to stop there
LOG_STATE = "log_state"  # files of what was counted since the last log line, one a process


class WholeCheckpoints(Trainer):
    """Saves in `folder`s that get their name when everything is in them, on the disk and read back.

    Beside the trainer's own state a checkpoint holds what the next log line is to count, so that a stop between two
    lines leaves no trace in the log.
    """

    def __init__(self, **parts: Any):
        super().__init__(**parts)
        # Pruned here; the trainer's own way looks at names alone, also at those of folders that are no checkpoints.
        self.most_checkpoints, self.args.save_total_limit = self.args.save_total_limit, None
        self._sums: dict[str, torch.Tensor] = {}
        self.broken_before = 0  # trained weights that were not finite when training began
        self.saved_files: dict[str, tuple[int, str]] = {}  # bytes and SHA-256 of the finished model's files, by name

    def _save_checkpoint(self, model, trial) -> None:
        step, folder = self.state.global_step, Path(self.args.output_dir)
        partial = unfinished_checkpoint(folder, step)
        with self.stopwatch.paused("saving"):
            self.store_flos()
            self.check_weights()
            if self.state.best_global_step:
                self._note_best(folder)
            with self._together(partial):
                if self.args.should_save:
                    begin_checkpoint(folder, step)
            with self._together(partial):
                self._write_checkpoint(partial)
            with self._together(partial):
                if self.args.should_save:
                    self._prune(finish_checkpoint(folder, step))

    def _prune(self, newest: Path) -> None:
        best, stops = self.state.best_model_checkpoint, kept_in_checkpoint(self.state, STOPS) or ()
        prune_checkpoints(newest, self.most_checkpoints, Path(best) if best else None, stops)

    def count_broken(self) -> int:
        """How many of the trained weights are not finite, in all processes."""
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        local = [getattr(weight, "_local_tensor", weight).detach() for weight in trained]  # of a sharded one its part
        # Piece by piece: memory may be used up by now, and the whole of a large weight would be needed once more.
        pieces = (piece for part in local for piece in part.flatten().split(2**24))
        count = sum(int((~torch.isfinite(piece)).sum()) for piece in pieces)
        return sum(gather(count, LONG))

    def check_weights(self) -> None:
        """Raises:
        UserError: more of the trained weights are not finite than when training began; nothing is saved of them.
        """
        broken = self.count_broken() - self.broken_before
        if broken > 0:
            raise UserError(
                f"{broken:,} of the trained weights are no longer finite after step {self.state.global_step}; nothing "
                f"is saved from there on; {self.bad_batches.what_is_safe()}. Try a smaller --learning_rate (it is "
                f"{self.args.learning_rate:g}), a smaller --max_grad_norm, or --dtype float32"
            )

    def _write_checkpoint(self, folder: Path) -> None:
        self.save_model(str(folder), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            self._save_log_state(folder)
        if self.args.should_save:
            self._save_trainer_state(folder)

    def save_at_root(self, folder: Path) -> None:
        """Saves the model or adapter with its tokenizer at the root of `folder`, each file in one step, and records
        their sizes and hashes in `saved_files`."""
        made = folder / UNFINISHED_MODEL
        self.check_weights()
        with self._together(made):
            if self.args.should_save:
                newest = folder / f"checkpoint-{self.state.global_step}"
                if newest.is_dir():  # a run that was killed after saving it may not have come to this
                    self._prune(newest)
                check_held(folder)
                shutil.rmtree(made, ignore_errors=True)
                made.mkdir()
        with self._together(made):
            self.save_model(str(made), _internal_call=True)
        with self._together(made):
            if self.args.should_save:
                self.saved_files = describe_files(made)
                move_into_place(made, folder)

    @contextlib.contextmanager
    def _together(self, made: Path) -> Iterator[None]:
        """All processes go on when all are done. What one cannot write is an OSError in each, and what was made so far
        is removed, which gives its space back.

        Sharded models exchange their weights while they are saved: there the process that fails ends, and the others
        with it.
        """
        fault = None
        try:
            yield
        except Exception as error:
            fault = find_disk_fault(error)
            if fault is None or self.args.world_size == 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled:
                if not isinstance(fault, FolderLost):  # else what is there by now is not this run's to remove
                    shutil.rmtree(made, ignore_errors=True)
                raise fault or error from None
        first = agree(fault, LONG)
        if first is not None:
            if self.args.should_save and not isinstance(first, FolderLost):
                shutil.rmtree(made, ignore_errors=True)
            raise first

    def _note_best(self, folder: Path) -> None:
        """Which checkpoint the best model is in, this one or one that was saved before."""
        best = folder / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step == self.state.global_step or best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _save_trainer_state(self, folder: Path) -> None:
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name, state = type(callback).__name__, callback.state()
                former = self.state.stateful_callbacks.get(name)  # none in the state of a checkpoint that was changed
                self.state.stateful_callbacks[name] = [*former, state] if isinstance(former, list) else state
        self.state.save_to_json(str(folder / TRAINER_STATE))

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial):
        with restoring(Path(checkpoint or ""), TRAINER_STATE):  # which may be of another version of transformers
            state = super()._init_training_state(
                max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
            )
        if checkpoint is not None and self.state.best_global_step:
            self._note_best(Path(self.args.output_dir))  # where the folder is now
        return state

    def check_best_model(self) -> None:
        """Raises:
        UserError: the best model so far is not as it was saved.
        """
        best = Path(self.state.best_model_checkpoint)
        fault = find_fault(best, reads=is_of_model)
        if fault is not None:
            raise UserError(
                f"the best model so far, {best.name}, was damaged since it was saved: {fault}. The same command with "
                "--resume_from_checkpoint auto goes on from an older checkpoint, and makes it again"
            )

    def _load_best_model(self) -> None:
        self.check_best_model()
        super()._load_best_model()

    def _save_log_state(self, folder: Path) -> None:
        counted = self.state.global_step - self._globalstep_last_logged
        if counted:
            state = {"steps": counted, "loss": self._tr_loss, "sums": self._sums}
            save_state(folder, f"{LOG_STATE}_{self.args.process_index}", state)

    def load_log_state(self, checkpoint: str) -> None:
        """Goes on counting for the next log line where the checkpoint's run stopped, in any number of processes.

        In as many as before each has its own part back, so that sums are rounded as they would have been.
        """
        names = sorted(path.stem for path in Path(checkpoint).glob(f"{LOG_STATE}_*.json"))
        if not names:
            return
        states = [load_state(Path(checkpoint), name) for name in names]
        self._globalstep_last_logged -= states[0]["steps"]
        if len(states) == self.args.world_size:
            own = load_state(Path(checkpoint), f"{LOG_STATE}_{self.args.process_index}")
            self._tr_loss += own["loss"].to(self.args.device)
            self._sums = {name: value.to(self.args.device) for name, value in own["sums"].items()}
            return
        # A line's loss is the mean over processes, everything else in it comes from sums over them.
        self._tr_loss += sum(state["loss"].to(self.args.device) for state in states) / len(states)
        if self.args.process_index == 0:
            sums = [state["sums"] for state in states]
            self._sums = {name: sum(part[name].to(self.args.device) for part in sums) for name in sums[0]}
