"""The two trainers: TRL's, with what they compute and save handed over to collaborators that know no trainer.

Every method of transformers and TRL that is overridden stands here; tests/training/test_parents.py names their
parents, so that an upgrade of a library tells which to read again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerControl
from trl import DPOTrainer, SFTTrainer

from ..engine.adapters import keep_dora_norms, speed_up_lora, start_dora_magnitudes
from ..engine.completions import CompletionScorer
from ..models.loading import TRAINED_ADAPTER
from ..models.reference import Reference
from ..objectives.objective import Objective
from ..run.names import TRAINER_STATE
from ..run.state import restoring
from ..runtime import peak_memory_bytes
from .bad_batches import find_faults, losses_by_row
from .batches import REFERENCE_COLUMNS, PairCollator
from .checkpointing import CheckpointWriter
from .compiling import LayerCompiler, take_over_compiling
from .history import fold_history
from .layout import LayoutChoice
from .machine import Machine
from .pair_scoring import PairTask
from .reference import REFERENCE_ADAPTER, ReferenceScores
from .sft import CompletionCollator, CompletionTask
from .shares import StepShares, share_steps
from .tally import LOG_STATE, LogState, StepTally, load_log_state
from .trained_weights import float32_kept, set_lora_dropout
from .within_memory import MicroBatches, let_it_begin_anew


class Task(Protocol):
    """What is learnt from a batch, and what held-out rows are measured by."""

    counted: str  # the items that the loss is a mean over, by their name in the log
    columns: Sequence[str]  # of the data, that batches are made of

    def count_items(self, batch: Mapping[str, Any]) -> int | Tensor:
        """The `counted` items of a micro-batch."""

    def tokens_of_rows(self, dataset: Dataset) -> Sequence[int]:
        """What each row puts through the model."""

    def loss(self, model: torch.nn.Module, inputs: dict[str, Any], share: Tensor, auxiliary: float | None) -> Tensor:
        """A micro-batch's share of the optimizer step's loss, each item weighing `share`."""

    def score(self, dataset: Dataset) -> list[Any]:
        """One row of metrics per row of the data set, in its order."""

    def summarise(self, rows: list[Any]) -> dict[str, float]:
        """The metrics of all rows, by name."""


class RunTrainer(Trainer):
    """What both trainers override. Each `counted` item (a pair, or a token to be learnt) weighs the same in the loss of
    its optimizer step and in the log, whatever micro-batch or process it fell in; trained weights are float32; rows are
    tokenized already; and checkpoints hold no pickles."""

    loss_is_scaled_for_ga = True  # by the items of the whole optimizer step
    task: Task
    control: TrainerControl
    train_dataset: Dataset
    eval_dataset: Dataset | None
    tally: StepTally  # what is counted
    _shares: StepShares | None = None  # with several processes

    def __init__(self, *, model: torch.nn.Module, args: Any, lora_dropout: float, **parts: Any) -> None:
        self.machine = Machine(self)
        # The trainer's own way to prune looks at names alone, also at those of folders that are no checkpoints.
        most, args.save_total_limit = args.save_total_limit, None
        with float32_kept(model):
            super().__init__(model=model, args=args, **parts)
        set_lora_dropout(self.model, lora_dropout)
        speed_up_lora(self.model)
        keep_dora_norms(self.model)
        if parts.get("peft_config") is not None:  # an adapter of this run's own
            start_dora_magnitudes(self.model)
        self.writer, self.held_out_rows = CheckpointWriter(self.machine, most), list[Any]()

    @property
    def max_tokens(self) -> int | None:
        """The most tokens of a micro-batch, where there is a limit."""
        return getattr(self.data_collator, "max_tokens", None)

    def measure(self) -> dict[str, float]:
        """Metrics of the held-out rows, exact over rows, with the model as it is used after training; the rows
        themselves stay in `held_out_rows`, and nothing is logged."""
        with self.machine.evaluating():
            self.held_out_rows = self.task.score(self.eval_dataset)
            return self.task.summarise(self.held_out_rows)

    def save_at_root(self, folder: Path) -> None:
        """Saves the finished model or adapter with its tokenizer."""
        self.writer.save_at_root(folder, lambda made: self.save_model(str(made), _internal_call=True))

    def compute_part(self, model: torch.nn.Module, part: Mapping[str, Any], items: Any) -> Tensor:
        """Forward and backward of one micro-batch, as the parent computes a step; its share of the loss."""
        try:
            with self.machine.training(model):
                return super().training_step(model, part, items)
        finally:
            if "layout" in part and part["layout"].kept:
                part["layout"].kept.clear()  # of layers that were not computed again, or not any more

    # What is computed

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        return self.compute_part(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        if self.args.gradient_checkpointing:
            self.machine.switches.keep_last_layer()
        # Processes average their gradients; times their number, that is a sum again.
        share, auxiliary = self.args.world_size / num_items_in_batch, self.aux_loss_enabled
        return self.task.loss(model, inputs, share, self.router_aux_loss_coef if auxiliary else None)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        self.tally.begin_step(self._tr_loss)
        return self.tally.count(map(self.task.count_items, batch_samples))

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        return self._flops_of_token * (inputs["input_ids"].numel() if "input_ids" in inputs else 0)

    @cached_property
    def _flops_of_token(self) -> int:  # its parent counts all weights for each batch
        return super().floating_point_ops({"input_ids": torch.zeros(1)})

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.compiler = LayerCompiler(self.machine, take_over_compiling(self.accelerator))

    # The order of rows, and the steps

    def _prepare_dataset(self, dataset: Dataset, *arguments: Any, **options: Any) -> Dataset:
        return dataset  # tokenized already, by utils/data/tokenizing.py

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(self.task.columns)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | StepShares | None:
        rows = super()._get_train_sampler(train_dataset)
        if self.args.world_size == 1:
            return rows
        sizes = self.task.tokens_of_rows(self.train_dataset)
        self._shares = share_steps(rows, self.train_dataset, sizes, self.args, by_tokens=self.max_tokens is not None)
        if self._shares is not None:  # a process may have no rows left in a step
            self.data_collator.filler = [self.train_dataset[min(range(len(sizes)), key=sizes.__getitem__)]]
        return self._shares or rows

    def _run_epoch(self, *arguments: Any, epoch: int, **options: Any) -> None:
        self._begin_epoch(epoch, options["epochs_trained"], options["resume_from_checkpoint"])
        # A run resumed after its last step has nothing left to train; the loop alone would take one step too many.
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*arguments, epoch=epoch, **options)
        else:
            self.control.should_training_stop = True

    def _begin_epoch(self, epoch: int, first: int, checkpoint: str | None) -> None:
        if self._shares is not None:  # which the trainer does not reach through what it wraps around it on a resume
            self._shares.set_epoch(epoch)
        if epoch != first:
            return
        self.writer.broken_before = self.writer.count_broken()
        if checkpoint is not None:
            with restoring(Path(checkpoint), LOG_STATE):
                self._go_on_counting(Path(checkpoint))

    def _go_on_counting(self, checkpoint: Path) -> None:
        """Goes on for the next log line where the checkpoint's run stopped."""
        state = load_log_state(checkpoint, self.args.process_index, self.args.world_size, self.args.device)
        if state is not None:
            self._globalstep_last_logged -= state.steps
            self._tr_loss += state.loss
            self.tally.sums = state.sums

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Asked for just before the optimizer step; None for a step that is left out."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return norm if self._is_sound(norm) else self._leave_out(model)

    def _is_sound(self, norm: Any) -> bool:
        """Whether a step can be taken, whose gradient has this norm.

        Raises:
            UserError: loss or gradient is not finite, and no more such steps may be left out, or the weights are not
                finite either; the step is not taken.
        """
        parts, self.tally.losses = self.tally.losses, []
        loss_is_bad, gradient_is_bad = find_faults([losses for _, losses in parts], norm, self.args.device)
        if not (loss_is_bad or gradient_is_bad):
            return True
        cause, scaler = None, self.accelerator.scaler
        if not loss_is_bad and scaler is not None:
            if scaler.get_scale() > 1:
                return True  # float16: the scaler leaves the step out and tries a smaller scale
            cause = "a smaller float16 loss scale does not fix it"
        self.writer.check_weights()  # with broken ones no row is to blame
        self.machine.bad_batches.leave_out(self.state.global_step + 1, losses_by_row(parts), self.state, cause)
        return False

    def _leave_out(self, model: torch.nn.Module) -> None:
        """Takes back what a step did so far: an optimizer passes over parameters without a gradient."""
        model.zero_grad(set_to_none=True)
        self.tally.take_back_step(self._tr_loss)
        self._globalstep_last_logged += 1  # the logged loss is a mean over the steps that were taken

    # What is logged and measured

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.tally.sums and "loss" in logs:
            logs |= self.tally.finish_line(self.machine.stopwatch.seconds)
            logs["peak_memory_bytes"] = peak_memory_bytes(self.args.device)
            if self.machine.bad_batches.left_out:
                logs["skipped_steps"] = len(self.machine.bad_batches.left_out)
        Trainer.log(self, logs, start_time)  # past TRL's, which add metrics of batches
        fold_history(self.state.log_history, self.task.counted)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.measure().items()}
        Trainer.log(self, dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # What is saved and loaded

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.store_flos()
        self.writer.save(self._write_checkpoint)

    def _write_checkpoint(self, folder: Path) -> None:
        self.save_model(str(folder), _internal_call=True)
        if not self.args.save_only_model:
            self.writer.save_progress(folder, self._save_optimizer_and_scheduler)
            counted = self.state.global_step - self._globalstep_last_logged
            LogState(counted, self._tr_loss, self.tally.sums).save(folder, self.args.process_index)
        if self.args.should_save:
            self.writer.save_trainer_state(folder, [*self.callback_handler.callbacks, self.control])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self.writer.save_weights(Path(output_dir or self.args.output_dir), state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_fsdp_enabled:
            self.writer.save_joined_weights(Path(output_dir or self.args.output_dir))
        else:
            super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif model is not None:  # before it is sharded the trainer asks too
            self.writer.load_divided_weights(Path(resume_from_checkpoint), model)

    def _load_best_model(self) -> None:
        self.writer.check_best_model()
        if self.is_fsdp_enabled:
            self._load_from_checkpoint(self.state.best_model_checkpoint, self.model)
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            self.writer.load_optimizer(Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        self.writer.load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self.writer.load_random_state(checkpoint)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        lengths = (max_steps, num_update_steps_per_epoch, num_train_epochs)
        with restoring(Path(checkpoint or ""), TRAINER_STATE):  # which may be of another version of transformers
            state = super()._init_training_state(*lengths, checkpoint, trial)
        if checkpoint is not None and self.state.best_global_step:
            self.writer.note_best(Path(self.args.output_dir))  # where the folder is now
        return state


class PreferenceTrainer(RunTrainer, DPOTrainer):
    """Direct preference optimization of tokenized pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`, `row`)."""

    task: PairTask
    data_collator: PairCollator

    def __init__(
        self,
        *,
        objective: Objective,
        reference: Reference,
        end_ids: frozenset[int],
        processing_class: PreTrainedTokenizerBase,
        **parts: Any,
    ) -> None:
        model, args, collator = parts["model"], parts["args"], PairCollator(pad_token_id=processing_class.pad_token_id)
        adapts = parts.get("peft_config") is not None or isinstance(model, PeftModel)
        is_start = reference.model is None and not adapts
        args.precompute_ref_log_probs = is_start  # else TRL loads the model once more
        # TRL refuses an f-divergence beside losses of ours.
        divergence, args.f_divergence_type = args.f_divergence_type, "reverse_kl"
        common = {"ref_model": reference.model, "data_collator": collator, "processing_class": processing_class}
        with _copied_without_a_start(model):
            super().__init__(**common, **parts)
        args.precompute_ref_log_probs, args.f_divergence_type = False, divergence
        _freeze_reference_adapter(self.model)
        scorer = CompletionScorer(end_ids, args.ld_alpha, args.use_weighting)
        scores = ReferenceScores(self.machine, collator, scorer, is_start)
        self.tally = StepTally(PairTask.counted, self.args.device)
        self.task = PairTask(self.machine, self.tally, collator, objective, scorer, scores)
        self.layout = LayoutChoice(self.machine, collator, self.compiler)
        self.steps = MicroBatches(self.machine, self.tally, collator, self.compute_part, objective.sorting)

    @property
    def scored_ahead(self) -> bool:
        """Whether the pairs carry the reference's log-probs."""
        return REFERENCE_COLUMNS[0] in self.train_dataset.column_names

    def score_reference_ahead(self, how: Mapping[str, Any], keep: bool = True) -> bool:
        """Scores every pair with the reference once; whether all was found on the disk (see ReferenceScores)."""
        how, score = {**how, **self.layout.describe()}, self.task.reference.score_ahead
        self.train_dataset, self.eval_dataset, found = score(self.train_dataset, self.eval_dataset, how, keep)
        return found

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        with self.task.reference.in_batches.attending():
            return self.steps.take(model, inputs, num_items_in_batch)

    def create_optimizer(self, *arguments: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*arguments, **options)
        let_it_begin_anew(optimizer, self.machine)
        return optimizer

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # `score_reference_ahead` scores it


class ImitationTrainer(RunTrainer, SFTTrainer):
    """Supervised fine-tuning on `prompt_ids` and `completion_ids`: cross-entropy of the completion's tokens."""

    task: CompletionTask

    def __init__(self, *, processing_class: PreTrainedTokenizerBase, **parts: Any) -> None:
        collator = CompletionCollator(processing_class.pad_token_id)
        super().__init__(data_collator=collator, processing_class=processing_class, **parts)
        self.tally = StepTally(CompletionTask.counted, self.args.device)
        self.task = CompletionTask(self.machine, self.tally, collator, dft=self.args.loss_type == "dft")


@contextlib.contextmanager
def _copied_without_a_start(model: torch.nn.Module) -> Iterator[None]:
    """Within the context TRL's frozen copy of an adapter is made without changing the base as the adapter itself did.

    The copy gets the adapter's values in any case. A start such as PiSSA's would take its part out of the base's
    weights once more, under the adapter that is trained, and layers would be repeated again.
    """
    config = getattr(model, "peft_config", {}).get(TRAINED_ADAPTER)
    without = {"init_lora_weights": False, "layer_replication": None}
    before = {name: getattr(config, name) for name in without if hasattr(config, name)}
    for name in before:
        setattr(config, name, without[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _freeze_reference_adapter(model: torch.nn.Module) -> None:
    """Freezes the copy of an adapter that training continues; of those whose weights end in the adapter's name (IA3,
    LoKr), which its maker leaves as they were made, it makes the copy."""
    weights = dict(model.named_parameters())
    for name, parameter in weights.items():
        if name.endswith(f".{REFERENCE_ADAPTER}"):
            parameter.data.copy_(weights[f"{name.removesuffix(REFERENCE_ADAPTER)}{TRAINED_ADAPTER}"].data)
        if f".{REFERENCE_ADAPTER}." in f"{name}.":
            parameter.requires_grad_(False)
