"""How a run saves: each checkpoint, and the model at the end, whole or not at all, and without pickles."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers.trainer_callback import ExportableState

from ..distributed import LONG, agree, gather
from ..errors import UserError
from ..models.adapter_config import sort_modules
from ..models.loading import TRAINED_ADAPTER
from ..progress import phase
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
from ..run.state import (
    kept_in_checkpoint,
    load_state,
    read_random_state,
    restoring,
    save_state,
    set_random_state,
)
from ..run.writing import FolderLost, check_held, find_disk_fault, let_umask_decide, move_into_place, write_json
from .launch import KEPT_BY_DEEPSPEED
from .machine import Machine
from .shards import load_weights, shard_optimizer_state, whole_state, whole_weights

STOPS = "stops"  # in what a checkpoint keeps: steps that were saved because the run was asked to stop there


class CheckpointWriter:
    """Saves in folders that get their name when everything is in them, on the disk and read back.

    `most`: how many checkpoints are kept; None for all. `saved_files`: bytes and SHA-256 of the finished model's files,
    by name.
    """

    def __init__(self, machine: Machine, most: int | None) -> None:
        self.machine, self.most = machine, most
        self.broken_before = 0  # trained weights that were not finite when training began
        self.saved_files: dict[str, tuple[int, str]] = {}

    def save(self, write: Callable[[Path], None]) -> None:
        """Saves a checkpoint of this step, whose files `write` puts into a folder; older ones go."""
        machine, step = self.machine, self.machine.state.global_step
        folder, saves = Path(machine.args.output_dir), machine.args.should_save
        partial = unfinished_checkpoint(folder, step)
        with machine.stopwatch.paused("saving"), phase(f"saving checkpoint-{step}"):
            self.check_weights()
            if machine.state.best_global_step:
                self.note_best(folder)
            with self._together(partial):
                if saves:
                    begin_checkpoint(folder, step)
            with self._together(partial):
                write(partial)
            with self._together(partial):
                if saves:
                    self._prune(finish_checkpoint(folder, step))

    def save_at_root(self, folder: Path, write: Callable[[Path], None]) -> None:
        """Saves at the root of `folder` what `write` puts into another, each file in one step, and records sizes and
        hashes in `saved_files`."""
        made, saves = folder / UNFINISHED_MODEL, self.machine.args.should_save
        self.check_weights()
        with self._together(made):
            if saves:
                newest = folder / f"checkpoint-{self.machine.state.global_step}"
                if newest.is_dir():  # a run that was killed after saving it may not have come to this
                    self._prune(newest)
                check_held(folder)
                shutil.rmtree(made, ignore_errors=True)
                made.mkdir()
        with self._together(made):
            write(made)
        with self._together(made):
            if saves:
                self.saved_files = describe_files(made)
                move_into_place(made, folder)

    def _prune(self, newest: Path) -> None:
        state = self.machine.state
        best, stops = state.best_model_checkpoint, kept_in_checkpoint(state, STOPS) or ()
        prune_checkpoints(newest, self.most, Path(best) if best else None, stops)

    def count_broken(self) -> int:
        """How many of the trained weights are not finite, in all processes."""
        trained = [weight for weight in self.machine.policy.parameters() if weight.requires_grad]
        local = [getattr(weight, "_local_tensor", weight).detach() for weight in trained]  # of a sharded one its part
        # Piece by piece: memory may be used up by now, and the whole of a large weight would be needed once more.
        pieces = (piece for part in local for piece in part.flatten().split(2**24))
        return sum(gather(sum(int((~torch.isfinite(piece)).sum()) for piece in pieces), LONG))

    def check_weights(self) -> None:
        """Raises:
        UserError: more of the trained weights are not finite than when training began; nothing is saved of them.
        """
        machine, broken = self.machine, self.count_broken() - self.broken_before
        if broken > 0:
            raise UserError(
                f"{broken:,} of the trained weights are no longer finite after step {machine.state.global_step}; "
                f"nothing is saved from there on; {machine.bad_batches.what_is_safe()}. Try a smaller --learning_rate "
                f"(it is {machine.args.learning_rate:g}), a smaller --max_grad_norm, or --dtype float32"
            )

    @contextlib.contextmanager
    def _together(self, made: Path) -> Iterator[None]:
        """All processes go on when all are done. What one cannot write is an OSError in each, and what was made so far
        is removed, which gives its space back.

        Sharded models exchange their weights while they are saved: there the process that fails ends, and the others
        with it.
        """
        fault, args = None, self.machine.args
        try:
            yield
        except Exception as error:
            fault = find_disk_fault(error)
            if fault is None or args.world_size == 1 or self.machine.is_sharded:
                if not isinstance(fault, FolderLost):  # else what is there by now is not this run's to remove
                    shutil.rmtree(made, ignore_errors=True)
                raise fault or error from None
        first = agree(fault, LONG)
        if first is not None:
            if args.should_save and not isinstance(first, FolderLost):
                shutil.rmtree(made, ignore_errors=True)
            raise first

    def note_best(self, folder: Path) -> None:
        """Which checkpoint in `folder` the best model is in, this one or one that was saved before."""
        state = self.machine.state
        best = folder / f"checkpoint-{state.best_global_step}"
        if state.best_global_step == state.global_step or best.is_dir():
            state.best_model_checkpoint = str(best)

    def check_best_model(self) -> None:
        """Raises:
        UserError: the best model so far is not as it was saved.
        """
        best = Path(self.machine.state.best_model_checkpoint or "")
        fault = find_fault(best, reads=is_of_model)
        if fault is not None:
            raise UserError(
                f"the best model so far, {best.name}, was damaged since it was saved: {fault}. The same command with "
                "--resume_from_checkpoint auto resumes from an older checkpoint, which makes it again"
            )

    def save_trainer_state(self, folder: Path, parts: Iterable[Any]) -> None:
        """Adds the trainer's own state to a checkpoint, with that of its `parts` (callbacks and control)."""
        state = self.machine.state
        for part in parts:
            if isinstance(part, ExportableState):
                name, own = type(part).__name__, part.state()
                former = state.stateful_callbacks.get(name)  # none in the state of a checkpoint that was changed
                state.stateful_callbacks[name] = [*former, own] if isinstance(former, list) else own
        state.save_to_json(str(folder / TRAINER_STATE))

    def save_weights(self, folder: Path, weights: dict[str, Any] | None = None) -> None:
        """Saves the model or the trained adapter with its tokenizer, as plain transformers and PEFT load them.

        Args:
            weights: those of a model whose own are divided among processes.
        """
        if not self.machine.args.should_save:
            return
        model = self.machine.accelerator.unwrap_model(self.machine.policy, keep_torch_compile=False)
        options: dict[str, Any] = {"state_dict": weights} if weights is not None else {}
        if isinstance(model, PeftModel):
            options |= {"selected_adapters": [TRAINED_ADAPTER], "save_embedding_layers": False}
        had_readme = (folder / "README.md").is_file()
        model.save_pretrained(folder, **options)
        if isinstance(model, PeftModel):
            sort_modules(folder)
        if not had_readme:
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in; the record is run.json
        self.machine.tokenizer.save_pretrained(folder)
        let_umask_decide(*folder.glob("*.safetensors"))

    def save_joined_weights(self, folder: Path) -> None:
        """The same of a model whose weights FSDP divides; all processes must call it."""
        self.save_weights(folder, whole_weights(self.machine.unwrapped()))

    def load_divided_weights(self, checkpoint: Path, model: torch.nn.Module) -> None:
        """Puts the weights of a checkpoint into a model whose weights FSDP divides."""
        load_weights(self.machine.unwrapped(model), checkpoint)

    def save_progress(self, folder: Path, optimizer_too: Callable[[str], None]) -> None:
        """Adds optimizer, schedule, scale of float16 and random numbers to a checkpoint.

        Args:
            optimizer_too: what saves optimizer and schedule where DeepSpeed holds them.
        """
        args, scaler = self.machine.args, getattr(self.machine.accelerator, "scaler", None)
        if self.machine.uses_deepspeed:
            optimizer_too(str(folder))
            if args.should_save:
                write_json(folder / KEPT_BY_DEEPSPEED, {"deepspeed": True, "processes": args.world_size})
        else:
            optimizer = whole_state(self.machine.optimizer.state_dict())
            if args.should_save:
                state = {"optimizer": optimizer, "scheduler": self.machine.scheduler.state_dict()}
                save_state(folder, "optimizer", state)
        if scaler is not None and args.should_save:
            save_state(folder, "scaler", scaler.state_dict())
        folder.mkdir(parents=True, exist_ok=True)
        save_state(folder, self._random_state_name(), read_random_state())

    def load_optimizer(self, checkpoint: Path) -> None:
        """Sets optimizer and schedule as a checkpoint has them."""
        state = load_state(checkpoint, "optimizer")
        with restoring(checkpoint, "optimizer"):
            self.machine.optimizer.load_state_dict(shard_optimizer_state(state["optimizer"], self.machine.optimizer))
            self.machine.scheduler.load_state_dict(state["scheduler"])

    def load_scaler(self, checkpoint: str | None) -> None:
        """Sets the scale of float16 as a checkpoint has it, where there is one."""
        scaler = getattr(self.machine.accelerator, "scaler", None)
        if checkpoint is not None and scaler is not None and (Path(checkpoint) / "scaler.json").is_file():
            with restoring(Path(checkpoint), "scaler"):
                scaler.load_state_dict(load_state(Path(checkpoint), "scaler"))

    def load_random_state(self, checkpoint: str | None) -> None:
        """Sets this process's random numbers as a checkpoint has them, where it has."""
        name = self._random_state_name()
        if checkpoint is not None and (Path(checkpoint) / f"{name}.json").is_file():
            with restoring(Path(checkpoint), name):
                set_random_state(load_state(Path(checkpoint), name))

    def _random_state_name(self) -> str:
        return f"random_state_{self.machine.args.process_index}"
