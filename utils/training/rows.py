"""The rows of a run as token ids."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.encoding import PromptEncoder
from ..data.loading import PreferenceData
from ..data.places import Place
from ..data.rendering import held_reasoning
from ..data.tokenizing import Truncation, tokenize_rows
from ..errors import UserError, gather
from ..models.loading import (
    check_same_tokenizer,
    choose_max_length,
    context_length,
)
from ..models.sources import ModelSource, read_end_ids
from ..models.templates import choose_template, template_date
from ..run.processes import count_processes
from ..settings.training import Settings

REASONING = {  # by --reasoning
    None: "as the chat template renders it, counted (--reasoning keep, mask or drop says otherwise)",
    "keep": "rendered and counted",
    "mask": "rendered, not counted in log-probs and losses",
    "drop": "left out of the texts",
}


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
    def reasoning(self) -> str | None:
        """How many replies have reasoning, and what became of it; None where none has."""
        count = self.truncation.reasoned + self.held_out_truncation.reasoned
        how = REASONING[held_reasoning(self.tokenizer)]
        return f"of {count:,} repl{'ies' if count > 1 else 'y'}, {how}" if count else None

    @property
    def bad_rows(self) -> dict[str, int]:
        """Reason -> rows of both sides that were left out with --on_bad_rows skip."""
        return dict(Counter(self.truncation.bad_rows) + Counter(self.held_out_truncation.bad_rows))


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
        lambda: choose_template(data.train, data.reading.is_transcript, tokenizer, settings.model, moment),
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
            f"--dataloader_drop_last drops a batch that is not full, and the {count} rows to train on are "
            f"fewer than one of {batch}{several}: no batch would be left. Leave it out, or lower "
            "--per_device_train_batch_size"
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
