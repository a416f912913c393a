"""What both trainers do in the same way: checkpoints without pickles, and an exact evaluation of held-out rows."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from peft import PeftModel
from torch import Tensor
from torch.utils.data import RandomSampler, SequentialSampler
from transformers import Trainer
from trl.models.utils import disable_gradient_checkpointing

from ..data.places import Place, row_places
from ..distributed import agree, gather, sum_of
from ..engine.adapters import keep_dora_norms, speed_up_lora, start_dora_magnitudes
from ..engine.proving import Trial, gives_all_gradients, let_head_score_in_chunks
from ..models.adapter_config import sort_modules
from ..models.loading import TRAINED_ADAPTER
from ..run.record import RunRecord
from ..run.state import load_state, read_random_state, restoring, save_state, set_random_state
from ..run.writing import let_umask_decide, write_json
from ..runtime import peak_memory_bytes
from .bad_batches import BadBatches, losses_by_row
from .batches import ROWS, TOKENS
from .checkpointing import WholeCheckpoints
from .compiling import CompilesLayers
from .history import fold_history
from .launch import KEPT_BY_DEEPSPEED
from .progress import Stopwatch
from .shards import load_weights, shard_optimizer_state, whole_state, whole_weights
from .shares import StepShares
from .stepping import SparingSteps
from .trained_weights import float32_kept, set_lora_dropout


class RunFolderTrainer(SparingSteps, CompilesLayers, WholeCheckpoints):
    """Saves a run in the layout of utils/run/, and evaluates with `measure_held_out`, which subclasses give.

    Each `counted` item (a pair, or a token to be learnt) weighs the same in the loss of its optimizer step and in the
    logged metrics, whatever micro-batch or process it fell in.
    """

    counted = "items"  # what the loss is a mean over, by its name in the log
    loss_is_scaled_for_ga = True  # by the items of the whole optimizer step, in `compute_loss`
    stopwatch = Stopwatch()  # replaced by the run's own
    bad_batches: BadBatches  # of the run
    place: Place = staticmethod(row_places("row"))  # of a row that is trained on, by its `row`; the run's own
    max_tokens: int | None = None  # of a micro-batch, where there is a limit
    _shares: StepShares | None = None  # with several processes

    def __init__(self, *, model: torch.nn.Module, args: Any, lora_dropout: float, **parts: Any):
        with float32_kept(model):
            super().__init__(model=model, args=args, **parts)
        set_lora_dropout(self.model, lora_dropout)
        speed_up_lora(self.model)
        keep_dora_norms(self.model)
        if parts.get("peft_config") is not None:  # an adapter of this run's own
            start_dora_magnitudes(self.model)
        self.record = RunRecord({})  # the run's own takes its place, and what it says so far
        self.held_out_rows: list[dict[str, float]] = []
        self.tokens_computed = self.tokens_padded = 0  # in training, by this process: as computed, and as padded rows
        self.tokens_seen = 0  # in training, by this process: tokens of the data, padding not counted
        self._last_line = (0, 0.0)  # tokens seen and seconds of training when it was logged
        self._step_losses: list[tuple[list[int], Tensor]] = []  # of the micro-batches of the optimizer step
        self._before_step: tuple[Tensor, dict[str, Tensor]] | None = None  # what is logged, without that step

    def warn(self, text: str) -> None:
        """Says something once, and keeps it in the run's record; another process than the main one says it alone."""
        if self.args.process_index:
            print(f"warning: {text}", flush=True)
        else:
            self.record.warn(text, aloud=True)

    def models(self) -> list[torch.nn.Module]:
        """Everything that is computed with."""
        return [self.model]

    def choose_head(self, batch: Mapping[str, Any]) -> None:
        """Lets each model score completions in chunks, where a trial on this batch shows that nothing changes."""
        self._choose_exchange(batch)
        for model in self.models():
            let_head_score_in_chunks(model, batch, self.trial())

    def _choose_exchange(self, batch: Mapping[str, Any]) -> None:
        """Lets DDP not look in every step for weights without a gradient, where a trial on this batch finds none."""
        handler = self.accelerator.ddp_handler
        exchanges = self.args.world_size > 1 and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if exchanges and self.args.ddp_find_unused_parameters is None and handler.find_unused_parameters:
            handler.find_unused_parameters = not gives_all_gradients(self.model, batch, self.trial())

    def trial(self) -> Trial:
        """How models are tried before they train."""
        step = 2.0**-8 if self.args.bf16 else 2.0**-11 if self.args.fp16 else None
        return Trial(self.accelerator.autocast, step)

    def agree(self, fault: str | None) -> str | None:
        """What the processes found, so that all go on in the same way."""
        if self.is_fsdp_enabled:
            return gather(fault)[0]  # the others may hold no weights yet
        return agree(fault)

    def tokens_of_rows(self) -> Sequence[int]:
        """What each row that is trained on puts through the model."""
        raise TypeError("a trainer of this project says what its rows take")

    def _get_train_sampler(self, train_dataset=None):
        """The rows in the order of training; with several processes the micro-batches of this one."""
        rows, args = super()._get_train_sampler(train_dataset), self.args
        if type(rows) not in (RandomSampler, SequentialSampler) or args.world_size == 1:
            return rows
        if isinstance(rows, RandomSampler):  # as accelerate does in one process
            rows = SeedableRandomSampler(self.train_dataset, data_seed=args.data_seed)
        sizes = self.tokens_of_rows()
        self.data_collator.filler = [self.train_dataset[min(range(len(sizes)), key=sizes.__getitem__)]]
        self._shares = StepShares(
            rows,
            sizes,
            args.world_size,
            args.process_index,
            args.gradient_accumulation_steps,
            args.per_device_train_batch_size,
            by_tokens=self.max_tokens is not None,
            drop_last=args.dataloader_drop_last,
        )
        return self._shares

    def count_items(self, batch: Any) -> int | Tensor:
        """The `counted` items of a micro-batch."""
        raise TypeError("a trainer of this project says what it counts")

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """The items of this optimizer step, over all its micro-batches and processes; asked for as it begins."""
        self._before_step = self._tr_loss.clone(), dict(self._sums)
        count = _made_on(device, sum(map(self.count_items, batch_samples)))
        return sum_of(count)

    def share_of_step(self, num_items_in_batch: Tensor) -> Tensor:
        """What one item weighs: processes average their gradients; times the world size, that is a sum again."""
        return self.args.world_size / num_items_in_batch

    def add_to_log(self, sums: dict[str, Tensor], count: int | Tensor) -> None:
        """Adds a micro-batch to the sums that the next log line divides by its items. Stays on the device."""
        for name, value in (sums | {self.counted: _made_on(self.args.device, count).float()}).items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().to(self.args.device)

    def note_rows(self, batch: Mapping[str, Any], losses: Tensor) -> None:
        """Remembers, until the optimizer step, which rows a micro-batch held; `losses` has shape (rows,)."""
        self.tokens_seen += batch.get(TOKENS, 0)
        self._step_losses.append((batch.get(ROWS, []), losses.detach()))

    def _get_grad_norm(self, model, grad_norm=None):
        """The gradient norm, which the trainer asks for just before the optimizer step; None for a step left out.

        Raises:
            UserError: loss or gradient is not finite, and no more such steps may be left out, or the weights are not
                finite either; the step is not taken.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        parts, self._step_losses = self._step_losses, []
        loss_is_bad, gradient_is_bad = self._find_faults(parts, norm)
        cause, scaler = None, self.accelerator.scaler
        if gradient_is_bad and not loss_is_bad and scaler is not None:
            if scaler.get_scale() > 1:
                return norm  # float16: the scaler leaves the step out and tries a smaller scale
            cause = "a smaller scale of float16 does not mend it"
        if loss_is_bad or gradient_is_bad:
            self.check_weights()  # with broken ones no row is to blame
            losses = losses_by_row(parts)
            self.bad_batches.leave_out(self.state.global_step + 1, losses, self.state, cause)
            self._leave_out(model)
            return None
        return norm

    def _find_faults(self, parts: list[tuple[list[int], Tensor]], norm: Any) -> tuple[bool, bool]:
        """Whether any row's loss, and whether the gradient, is not finite; the same in all processes."""
        finite = [torch.isfinite(losses).all() for _, losses in parts]
        # A process may have had no rows of its own.
        finite.append(torch.ones((), dtype=torch.bool, device=self.args.device))
        bad = (~torch.stack(finite)).any().float()
        # The one wait for a GPU in an optimizer step, at its end.
        return bool(sum_of(bad)), norm is not None and not math.isfinite(norm)

    def _leave_out(self, model: torch.nn.Module) -> None:
        """Takes back what a step did so far: an optimizer passes over parameters without a gradient."""
        model.zero_grad(set_to_none=True)
        loss, self._sums = self._before_step
        self._tr_loss.copy_(loss)
        self._globalstep_last_logged += 1  # the logged loss is a mean over the steps that were taken

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means over the items since the last line to a line of training metrics."""
        if self._sums and "loss" in logs:
            names = sorted(self._sums)
            tokens, seconds = self.tokens_seen - self._last_line[0], self.stopwatch.seconds - self._last_line[1]
            sums = torch.stack([self._sums[name] for name in names]).double()
            *values, tokens = sum_of(torch.cat([sums, sums.new_tensor([tokens])])).tolist()
            totals = dict(zip(names, values, strict=True))
            count = totals.pop(self.counted)
            logs |= {name: total / count for name, total in totals.items()} | {self.counted: count}
            logs["tokens_per_second"] = tokens / seconds if seconds > 0 else 0.0
            logs["peak_memory_bytes"] = peak_memory_bytes(self.args.device)
            if self.bad_batches.left_out:
                logs["skipped_steps"] = len(self.bad_batches.left_out)
            self._sums, self._last_line = {}, (self.tokens_seen, self.stopwatch.seconds)
        Trainer.log(self, logs, start_time)
        fold_history(self.state.log_history, self.counted)

    def measure_held_out(self) -> dict[str, float]:
        """Metrics of the held-out rows, exact over rows, by name."""
        raise TypeError("a trainer of this project says how it measures held-out rows")

    def measure(self) -> dict[str, float]:
        """The same, with the model as it is used after training; nothing is logged."""
        with self._as_evaluated():
            return self.measure_held_out()

    @contextlib.contextmanager
    def _as_evaluated(self) -> Iterator[None]:
        """Within the context the model computes as it does after training; that time is none of training."""
        model = self.model_wrapped if self.is_fsdp_enabled or self.is_deepspeed_enabled else self.model
        was_training = model.training
        model.eval()
        try:
            with (
                self.stopwatch.paused("evaluation"),
                torch.no_grad(),
                self.accelerator.autocast(),
                disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            ):
                yield
        finally:
            model.train(was_training)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Measures the held-out rows and logs it; names get the prefix, as the trainer's best-model logic expects."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.measure().items()}
        Trainer.log(self, dict(metrics))  # past the trainers' own versions, which add metrics of training batches
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _run_epoch(self, *arguments, epoch: int, **options) -> None:
        if self._shares is not None:  # which the trainer does not reach through what it wraps around it on a resume
            self._shares.set_epoch(epoch)
        if epoch == options["epochs_trained"]:
            self.broken_before = self.count_broken()
            if options["resume_from_checkpoint"] is not None:
                with restoring(Path(options["resume_from_checkpoint"]), "log_state"):
                    self.load_log_state(options["resume_from_checkpoint"])
        # A run resumed after its last step has nothing left to train; the loop alone would take one step too many.
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*arguments, epoch=epoch, **options)
        else:
            self.control.should_training_stop = True

    def share_of_batches(self, batches: list[list[int]]) -> list[list[int]]:
        """This process's share of the batches, as many for each process, since sharded models compute in step.

        A process that would have fewer gets one of its batches, or the first, once more; `merge_rows` counts it once.
        """
        world, rank = self.args.world_size, self.args.process_index
        own = batches[rank::world]
        return own + [own[0] if own else batches[0]] * (-(-len(batches) // world) - len(own))

    def merge_rows(self, rows: dict[int, dict[str, float]]) -> list[dict[str, float]]:
        """The rows of all processes, by index: each row once, whichever processes computed it."""
        merged = {index: row for part in gather(rows) for index, row in part.items()}
        return [merged[index] for index in sorted(merged)]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        options: dict[str, Any] = {"state_dict": state_dict} if state_dict is not None else {}
        if isinstance(model, PeftModel):
            options |= {"selected_adapters": [TRAINED_ADAPTER], "save_embedding_layers": False}
        had_readme = (folder / "README.md").is_file()
        model.save_pretrained(folder, **options)
        if isinstance(model, PeftModel):
            sort_modules(folder)
        if not had_readme:
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in; the record is run.json
        self.processing_class.save_pretrained(folder)
        let_umask_decide(*folder.glob("*.safetensors"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves whole weights, as plain transformers and PEFT load them, however they lie in memory."""
        if self.is_fsdp_enabled:
            self._save(output_dir, state_dict=whole_weights(self.accelerator.unwrap_model(self.model)))
        else:
            super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif model is not None:  # before it is sharded the trainer asks too
            load_weights(self.accelerator.unwrap_model(model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            self.check_best_model()
            self._load_from_checkpoint(self.state.best_model_checkpoint, self.model)
        else:
            super()._load_best_model()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            if self.args.should_save:
                write_json(Path(output_dir) / KEPT_BY_DEEPSPEED, {"deepspeed": True, "processes": self.args.world_size})
            return
        optimizer = whole_state(self.optimizer.state_dict())
        if self.args.should_save:
            state = {"optimizer": optimizer, "scheduler": self.lr_scheduler.state_dict()}
            save_state(Path(output_dir), "optimizer", state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = load_state(Path(checkpoint), "optimizer")
        with restoring(Path(checkpoint), "optimizer"):
            self.optimizer.load_state_dict(shard_optimizer_state(state["optimizer"], self.optimizer))
            self.lr_scheduler.load_state_dict(state["scheduler"])

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            save_state(Path(output_dir), "scaler", scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is not None and scaler is not None and (Path(checkpoint) / "scaler.json").is_file():
            with restoring(Path(checkpoint), "scaler"):
                scaler.load_state_dict(load_state(Path(checkpoint), "scaler"))

    def _random_state_name(self) -> str:
        return f"random_state_{self.args.process_index}"

    def _save_rng_state(self, output_dir: str) -> None:
        os.makedirs(output_dir, exist_ok=True)
        save_state(Path(output_dir), self._random_state_name(), read_random_state())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        name = self._random_state_name()
        if checkpoint is not None and (Path(checkpoint) / f"{name}.json").is_file():
            with restoring(Path(checkpoint), name):
                set_random_state(load_state(Path(checkpoint), name))


def _made_on(device: torch.device, count: int | Tensor) -> Tensor:
    """A number on a device: made there, since one that is copied there is waited for."""
    if isinstance(count, Tensor):
        return count.to(device)
    return torch.full((), count, dtype=torch.int64, device=device)
