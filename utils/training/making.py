"""Trainers that can start, made from settings, rows and models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from ..data.lengths import count_row_tokens, longest_first
from ..errors import UserError
from ..models.loading import (
    Reference,
    check_embeddings,
    context_length,
    new_adapter_config,
    turn_off_dropout,
)
from ..models.sources import ModelSource
from ..runtime import Precision, say
from ..settings.training import Settings
from .batch_size import limit_tokens_by_trying
from .config import build_config, make_objective
from .folder import read_former_record
from .reference import scores_ahead
from .refusals import refusals_explained
from .rows import Rows
from .sft import ImitationTrainer
from .trainer import PreferenceTrainer
from .within_memory import MICRO_BATCHES


def _check_reference_reads(rows: Rows, reference: Reference, source: ModelSource, settings: Settings) -> None:
    """A reference that has fewer positions than the pairs have tokens would fail at the first long one."""
    if reference.source.base == source.base:
        return
    limit = context_length(reference.source, settings.model)
    parts = [part for part in (rows.train, rows.held_out) if part is not None and len(part)]
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
    policy: PreTrainedModel | PeftModel,
    reference: Reference,
    rows: Rows,
    source: ModelSource,
    settings: Settings,
    precision: Precision,
    folder: Path,
) -> PreferenceTrainer:
    """The DPO trainer, with a fresh adapter on the policy where --use_lora asks for one."""
    _check_reference_reads(rows, reference, source, settings)
    if settings.trainer_fields.get("disable_dropout", True):
        for model in (policy, reference.model):
            if model is not None:
                turn_off_dropout(model)
    parts = _trainer_parts(policy, rows, source, settings, precision, folder)
    with refusals_explained(settings):
        objective = make_objective(settings.loss)
        trainer = PreferenceTrainer(objective=objective, reference=reference, end_ids=rows.end_ids, **parts)
    trainer.choose_layout(settings.training.engine)
    adapts = settings.lora.use_lora or source.adapter is not None
    ahead = scores_ahead(settings, adapts, len(rows.train), trainer.args.world_size)
    if settings.training.max_tokens_per_batch is not None:
        trainer.limit_tokens(settings.training.max_tokens_per_batch)
    elif settings.training.auto_batch_size:
        limit_tokens_by_trying(trainer, ahead, read_former_record(settings, folder).get(MICRO_BATCHES))
    if ahead:
        say("scoring all pairs with the reference")
        how = {
            "dtype": precision.name,
            "device": precision.device.type,
            "attention": settings.model.attn_implementation,
            "quantization": settings.model.bnb_4bit_quant_type if settings.model.use_4bit else None,
        }
        if trainer.precompute_reference(how, keep=not settings.run.dry_run):
            say("      found on the disk, from a run with the same reference and pairs")
    return trainer


def make_imitation_trainer(
    policy: PreTrainedModel | PeftModel,
    reference: None,
    rows: Rows,
    source: ModelSource,
    settings: Settings,
    precision: Precision,
    folder: Path,
) -> ImitationTrainer:
    """The SFT trainer, with a fresh adapter where --use_lora asks for one."""
    parts = _trainer_parts(policy, rows, source, settings, precision, folder)
    with refusals_explained(settings):
        trainer = ImitationTrainer(**parts)
    trainer.try_head()
    return trainer


def _trainer_parts(
    policy: Any, rows: Rows, source: ModelSource, settings: Settings, precision: Precision, folder: Path
) -> dict[str, Any]:
    adds_adapter = settings.lora.use_lora and source.adapter is None
    train, held_out = (_longest(part, settings) for part in (rows.train, rows.held_out))
    adapts = adds_adapter or source.adapter is not None
    check_embeddings(policy, rows.tokenizer, source)
    return {
        "model": policy,
        "args": build_config(settings, precision, folder, adapts, evaluates=held_out is not None),
        "lora_dropout": settings.lora.lora_dropout,
        "train_dataset": train,
        "eval_dataset": held_out,
        "processing_class": rows.tokenizer,
        "peft_config": new_adapter_config(settings.lora, source, policy) if adds_adapter else None,
    }


def _longest(rows: Dataset | None, settings: Settings) -> Dataset | None:
    """In a dry run the longest rows, as many as one step and one evaluation batch take: what fits them fits all."""
    if rows is None or not settings.run.dry_run:
        return rows
    training = settings.training
    step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    columns = [name for name in rows.column_names if name.endswith("_ids")]
    order = longest_first(count_row_tokens(rows, columns))
    return rows.select(order[: max(step, training.per_device_eval_batch_size)])
