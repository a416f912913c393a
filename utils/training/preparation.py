"""From settings, data and models to a trainer that can start."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.lengths import count_row_tokens, longest_first
from ..data.loading import PreferenceData
from ..data.mixing import source_names
from ..data.places import Place
from ..data.tokenizing import PromptEncoder, Truncation, tokenize_rows
from ..errors import UserError, gather
from ..models.adapter_config import read_adapter_config
from ..models.loading import (
    Reference,
    check_4bit,
    check_embeddings,
    check_same_tokenizer,
    choose_max_length,
    context_length,
    new_adapter_config,
    turn_off_dropout,
)
from ..models.sources import ModelSource, find_model, read_end_ids
from ..models.templates import choose_template, recorded_moment, template_date
from ..run.bounded import read_json
from ..run.checkpoints import find_checkpoints
from ..run.folder import check_output_folder
from ..run.lock import FolderLock, check_not_held
from ..run.names import ADAPTER_CONFIG
from ..run.paths import read_path
from ..run.processes import count_processes
from ..run.record import read_record
from ..runtime import Precision, find_device, say
from ..settings.training import Settings
from .batch_size import limit_tokens_by_trying
from .config import build_config, make_objective
from .launch import check_launch, gather_from_all, uses, with_deepspeed
from .pushing import check_login
from .reference import scores_ahead
from .refusals import refusals_explained
from .sft import ImitationTrainer
from .tracking import check_trackers
from .trainer import PreferenceTrainer
from .within_memory import MICRO_BATCHES

CONFIG_FILES = ("deepspeed", "fsdp_config", "accelerator_config", "liger_kernel_config")
MOST_CONFIG_BYTES = 2**20


@dataclass(frozen=True)
class Rows:
    """Tokenized rows of both sides, what the length limit and the template did to them, and what they were made with.

    `template_date`: what a chat template that asks for the time is told, ISO 8601 in local time; else None.
    """

    train: Dataset
    held_out: Dataset | None
    truncation: Truncation
    held_out_truncation: Truncation
    max_length: int
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    template_date: str | None
    end_ids: frozenset[int]

    @property
    def warnings(self) -> list[str]:
        """What is to be said of rows that are used in another form than they seem to be."""
        return [
            *(f"training rows: {text}" for text in self.truncation.warnings),
            *(f"held-out rows: {text}" for text in self.held_out_truncation.warnings),
        ]

    @property
    def bad_rows(self) -> dict[str, int]:
        """Reason -> rows of both sides that were left out with --on_bad_rows skip."""
        return dict(Counter(self.truncation.bad_rows) + Counter(self.held_out_truncation.bad_rows))


def find_folder(settings: Settings, lock: FolderLock) -> Path | None:
    """The output folder, checked and locked for this run; None in a dry run.

    Raises:
        UserError: it holds something that this run would spoil, or another run writes there.
    """
    if settings.run.dry_run:
        return None
    folder = read_path(settings.run.output_dir).resolve()
    _check_inputs_outside(folder, settings)
    resume = settings.run.resume_from_checkpoint is not None
    if resume and settings.run.resume_from_checkpoint != "auto":
        checkpoint = read_path(settings.run.resume_from_checkpoint).resolve()
        if checkpoint.parent != folder:
            raise UserError(
                f"--resume_from_checkpoint {checkpoint}: not a checkpoint of the run in --output_dir {folder}; "
                "to start a new run from its weights, name it with --model_name_or_path"
            )
    check_not_held(folder)
    about = (folder, settings.verb, resume, settings.run.overwrite_output_dir)
    check_output_folder(*about)
    lock.take(folder)
    check_output_folder(*about)  # once more: from here on nobody else changes it
    return folder


def _check_inputs_outside(folder: Path, settings: Settings) -> None:
    """What a run reads must not lie where it writes: its own result would take its place."""
    model = settings.model
    inputs = {
        "model_name_or_path": model.model_name_or_path,
        "ref_model_name_or_path": model.ref_model_name_or_path,
        "adapter_name_or_path": model.adapter_name_or_path,
    }
    for name in ("model_name_or_path", "adapter_name_or_path", "ref_model_name_or_path"):
        if inputs[name] is not None and (Path(inputs[name]) / ADAPTER_CONFIG).is_file():
            config = read_adapter_config(inputs[name]) or {}
            inputs[f"{name} (its base model)"] = config.get("base_model_name_or_path")
    faults = []
    data = [("dataset_name", name) for name in source_names(settings.data.dataset_name)]
    for name, value in [*inputs.items(), *data]:
        if not isinstance(value, str) or not os.path.exists(expanduser(value)):
            continue
        path = Path(expanduser(value)).resolve()
        if path == folder or folder in path.parents:
            faults.append(f"--output_dir {folder}: holds --{name} {value}, which the result would overwrite")
    if faults:
        raise UserError(*faults)


def check_settings(settings: Settings) -> None:
    """What can be refused before anything is loaded: 4-bit without its library, a missing tracker or reference."""
    checks = [lambda: check_trackers(settings), lambda: check_launch(settings), lambda: _check_offloading(settings)]
    checks.append(lambda: _check_precision(settings))
    checks += [lambda: _check_sampling(settings), lambda: _check_skipping(settings)]
    checks.append(lambda: _check_named_files(settings))
    if settings.trainer_fields.get("push_to_hub"):
        checks.append(lambda: check_login("--push_to_hub"))
    if settings.model.use_4bit:
        checks.append(check_4bit)
    if settings.model.ref_model_name_or_path is not None:
        checks.append(lambda: find_model("--ref_model_name_or_path", settings.model.ref_model_name_or_path))
    gather(*checks)


def _check_named_files(settings: Settings) -> None:
    """Configs for the libraries that are named as files, which these would read without a limit."""
    faults = []
    for name in CONFIG_FILES:
        value = settings.trainer_fields.get(name)
        try:
            if isinstance(value, str) and os.path.exists(value):
                read_json(Path(value), MOST_CONFIG_BYTES)
        except (OSError, ValueError) as error:
            faults.append(f"--{name} {value}: {getattr(error, 'strerror', None) or error}; name a JSON file")
    if faults:
        raise UserError(*faults)


def _check_precision(settings: Settings) -> None:
    if settings.model.dtype == "float16" and find_device().type == "cpu":
        raise UserError("--dtype float16: is not trained in on a CPU; pass bfloat16 or float32, or leave it out")


def _check_offloading(settings: Settings) -> None:
    if settings.trainer_fields.get("activation_offloading") and not torch.cuda.is_available():
        raise UserError("--activation_offloading moves activations from a GPU to main memory; there is no GPU here")


def find_sharding(settings: Settings) -> list[str]:
    """What lays the weights in parts in several processes, by name; empty where nothing does."""
    sharded = [engine for engine in ("FSDP", "DEEPSPEED") if uses(engine)]
    return sharded + [f"--{name}" for name in ("fsdp", "deepspeed") if settings.trainer_fields.get(name)]


def _check_sampling(settings: Settings) -> None:
    """A model whose weights lie in parts in several processes cannot write in one of them."""
    sharded = find_sharding(settings)
    if settings.run.sample_during_eval and sharded:
        raise UserError(
            f"--sample_during_eval: with {sharded[0]} the weights lie in parts in several processes, and none of them "
            "can write; leave it out, and look at what the model writes when it is trained"
        )


def _check_skipping(settings: Settings) -> None:
    if settings.training.skip_bad_batches and with_deepspeed(settings):
        raise UserError(
            "--skip_bad_batches: DeepSpeed takes the optimizer step by itself, before it can be looked at; leave it out"
        )


def prepare_rows(
    data: PreferenceData,
    tokenizer: PreTrainedTokenizerBase,
    source: ModelSource,
    settings: Settings,
    columns: dict[str, str],
    moment: datetime | None = None,
) -> Rows:
    """The rows as token ids, with the chat template and the length limit that apply.

    `moment` is what a template that writes the date is told; None for now.

    Raises:
        UserError: settings that do not fit the model or its adapter, or rows that do not fit the length limit or that
            the chat template does not render whole.
    """
    template, max_length, end_ids, _, _ = gather(
        lambda: choose_template(
            data.train, data.reading.is_transcript, tokenizer, settings.model.chat_template, moment
        ),
        lambda: choose_max_length(settings.data.max_length, context_length(source, settings.model)),
        lambda: read_end_ids(source.base, source.revision, tokenizer),
        lambda: _check_adapter_settings(source, settings),
        lambda: check_same_tokenizer(tokenizer, settings.model),
    )
    encoder = PromptEncoder(tokenizer, end_ids)

    def tokenize(part: Dataset | None, place: Place) -> tuple[Dataset | None, Truncation]:
        if part is None:
            return None, Truncation(0, 0, 0)
        processes, limit = settings.trainer_fields.get("dataset_num_proc"), settings.data.truncation
        return tokenize_rows(part, encoder, columns, max_length, limit, processes, place, settings.data.on_bad_rows)

    (train, truncation), (held_out, of_held_out) = gather(
        lambda: tokenize(data.train, data.place), lambda: tokenize(data.held_out, data.held_out_place)
    )
    date = template_date(tokenizer) if template is not None else None
    return Rows(train, held_out, truncation, of_held_out, max_length, tokenizer, template, date, encoder.end_ids)


def choose_moment(settings: Settings) -> datetime:
    """What a chat template that writes the date is told: what the run that is resumed was told, else now. The same in
    all processes.

    Raises:
        UserError: the record of the run is none.
    """
    now = gather_from_all(datetime.now())[0]
    folder = settings.run.output_dir
    before = _recorded(settings, read_path(folder).resolve()) if folder is not None else {}
    return recorded_moment(before) or now


def check_steps(rows: Rows, settings: Settings) -> None:
    """Refuses a run that would take no step, before a model is loaded.

    Raises:
        UserError: --dataloader_drop_last drops every row.
    """
    if not settings.trainer_fields.get("dataloader_drop_last"):
        return
    training = settings.training
    device, processes = training.per_device_train_batch_size, count_processes()
    if training.max_tokens_per_batch is not None or training.auto_batch_size:  # the rows of a step are handed out whole
        device *= training.gradient_accumulation_steps
    count, batch = len(rows.train), device * processes
    if count < batch:
        several = f" ({device} in each of {processes} processes)" if processes > 1 else ""
        raise UserError(
            f"--dataloader_drop_last drops a batch that is not full, and the {count} rows to train on are fewer "
            f"than one of {batch}{several}: no step would be left. Leave it out, or lower --per_device_train_batch_size"
        )


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


def _check_adapter_settings(source: ModelSource, settings: Settings) -> None:
    """An adapter that training continues has its own shape; a flag that says otherwise cannot be honoured."""
    if source.adapter is None:
        return
    config = source.adapter_config()
    wishes = {
        "lora_r": (settings.lora.lora_r, config.get("r")),
        "lora_alpha": (settings.lora.lora_alpha, config.get("lora_alpha")),
        "use_rslora": (settings.lora.use_rslora, config.get("use_rslora", False)),
        "use_dora": (settings.lora.use_dora, config.get("use_dora", False)),
    }
    faults = [
        f"--{name} is {wish}, but the adapter that training continues ({source.adapter}) has {own}: leave the flag out"
        for name, (wish, own) in wishes.items()
        if name in settings.given and wish != own
    ]
    if "lora_target_modules" in settings.given:
        faults.append(
            f"--lora_target_modules: the adapter that training continues ({source.adapter}) has its own; leave it out"
        )
    if settings.verb == "train" and config.get("bias", "none") != "none":
        faults.append(
            f"{source.adapter}: bias is {config['bias']!r} in its adapter_config.json: it changes biases of the base "
            "itself, so the base can no longer be the reference nor a frozen copy of the adapter be kept beside it; "
            "merge it first, and name the merged model with --model_name_or_path"
        )
    if faults:
        raise UserError(*faults)


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
        limit_tokens_by_trying(trainer, ahead, _recorded(settings, folder).get(MICRO_BATCHES))
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


def _recorded(settings: Settings, folder: Path) -> dict[str, Any]:
    """The record of the run that is resumed; empty where one begins."""
    wish = settings.run.resume_from_checkpoint
    return (read_record(folder) or {}) if wish is not None and find_checkpoints(folder) else {}


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
