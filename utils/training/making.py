"""Trainers that can start, made from settings, rows and models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from ..data.lengths import count_row_tokens, longest_first
from ..errors import UserError
from ..libraries import import_bitsandbytes
from ..models.loading import (
    check_embeddings,
    context_length,
    new_adapter_config,
    turn_off_dropout,
)
from ..models.reference import Reference, ReferencePlan
from ..runtime import say
from ..settings.training import Settings
from .bad_batches import BadBatches
from .batch_size import limit_tokens_by_trying
from .config import build_config, make_objective
from .context import Run
from .refusals import refusals_explained
from .trainer import ImitationTrainer, PreferenceTrainer, RunTrainer
from .within_memory import MICRO_BATCHES


def _check_reference_reads(run: Run, reference: ReferencePlan) -> None:
    """A reference that has fewer positions than the pairs have tokens would fail at the first long one."""
    if reference.source.base == run.source.base:
        return
    limit = context_length(reference.source, run.settings.model)
    parts = [part for part in (run.rows.train, run.rows.held_out) if part is not None and len(part)]
    columns = ("chosen_ids", "rejected_ids")
    longest = max(
        (int(count_row_tokens(part, ["prompt_ids", name]).max()) for part in parts for name in columns), default=0
    )
    if limit is not None and longest > limit:
        raise UserError(
            f"the reference {reference.source.name} reads at most {limit} tokens, and the longest pair has {longest}: "
            f"pass --max_length {limit}, or name another reference with --ref_model_name_or_path"
        )


def make_preference_trainer(
    run: Run, policy: PreTrainedModel | PeftModel, reference: Reference, folder: Path
) -> PreferenceTrainer:
    """The DPO trainer, with a fresh adapter on the policy where --use_lora asks for one."""
    settings, precision = run.settings, run.precision
    _check_reference_reads(run, reference.plan)
    if settings.trainer_fields.get("disable_dropout", True):
        for model in (policy, reference.model):
            if model is not None:
                turn_off_dropout(model)
    parts = _trainer_parts(run, policy, folder)
    with refusals_explained(settings):
        objective = make_objective(settings.loss)
        trainer = PreferenceTrainer(objective=objective, reference=reference, end_ids=run.rows.end_ids, **parts)
    _give_to(trainer, run)
    trainer.layout.choose(settings.training.engine, trainer.train_dataset, trainer.aux_loss_enabled)
    ahead = reference.plan.ahead
    if settings.training.max_tokens_per_batch is not None:
        trainer.layout.limit_tokens(settings.training.max_tokens_per_batch, trainer.train_dataset, trainer.eval_dataset)
    elif settings.training.auto_batch_size:
        limit_tokens_by_trying(trainer, ahead, run.former.get(MICRO_BATCHES) if run.checkpoint is not None else None)
    if ahead:
        say("scoring all pairs with the reference")
        how = {
            "dtype": precision.name,
            "device": precision.device.type,
            "attention": settings.model.attn_implementation,
            "quantization": settings.model.bnb_4bit_quant_type if settings.model.use_4bit else None,
        }
        if trainer.score_reference_ahead(how, keep=not settings.run.dry_run):
            say("      found on the disk, from a run with the same reference and pairs")
    return trainer


def make_imitation_trainer(run: Run, policy: PreTrainedModel | PeftModel, folder: Path) -> ImitationTrainer:
    """The SFT trainer, with a fresh adapter where --use_lora asks for one."""
    parts = _trainer_parts(run, policy, folder)
    with refusals_explained(run.settings):
        trainer = ImitationTrainer(**parts)
    _give_to(trainer, run)
    trainer.task.choose_head(trainer.train_dataset, trainer.compiler)
    return trainer


def _trainer_parts(run: Run, policy: Any, folder: Path) -> dict[str, Any]:
    settings, rows = run.settings, run.rows
    train, held_out = (_longest(part, settings) for part in (rows.train, rows.held_out))
    adds_adapter = settings.lora.use_lora and run.source.adapter is None
    check_embeddings(policy, rows.tokenizer, run.source)
    if adds_adapter:
        import_bitsandbytes()
    return {
        "model": policy,
        "args": build_config(settings, run.precision, folder, run.adapts, evaluates=held_out is not None),
        "lora_dropout": settings.lora.lora_dropout,
        "train_dataset": train,
        "eval_dataset": held_out,
        "processing_class": rows.tokenizer,
        "peft_config": new_adapter_config(settings.lora, run.source, policy) if adds_adapter else None,
    }


def _give_to(trainer: RunTrainer, run: Run) -> None:
    """Lets a trainer record, time and place what it does as the run's own."""
    machine = trainer.machine
    machine.record, machine.stopwatch, machine.place = run.record, run.stopwatch, run.data.place
    machine.bad_batches = BadBatches(run.settings.training.skip_bad_batches, run.data, run.record, run.folder)


def _longest(rows: Dataset | None, settings: Settings) -> Dataset | None:
    """In a dry run the longest rows, as many as one step and one evaluation batch take: what fits them fits all."""
    if rows is None or not settings.run.dry_run:
        return rows
    training = settings.training
    step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    columns = [name for name in rows.column_names if name.endswith("_ids")]
    order = longest_first(count_row_tokens(rows, columns))
    return rows.select(order[: max(step, training.per_device_eval_batch_size)])
