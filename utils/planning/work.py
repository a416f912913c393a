"""What a plan is about: the config of a model, and the pairs of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from ..data.lengths import count_row_tokens
from ..data.loading import load_pairs
from ..data.tokenizing import PAIR_COLUMNS, SFT_COLUMNS
from ..models.adapter_config import read_adapter_config
from ..models.loading import choose_max_length, load_tokenizer, longest_context
from ..models.quantization import check_trainable
from ..models.reference import choose_reference
from ..models.sources import ModelSource, find_policy
from ..models.translating import translating
from ..models.untrusted import check_folder
from ..run.paths import read_path
from ..settings.training import Settings
from ..settings.verbs import PlanSettings
from ..training.config import rows_of_run
from ..training.rows import prepare_rows
from .padded import PartLengths, mean_padded_length, padded_tokens


@dataclass(frozen=True)
class Work:
    """The pairs of a run, or rows of sft: lengths of those that are trained on, the longest first.

    `known`: read from data. `padded`: rows, which micro-batches pad.
    """

    lengths: list[PartLengths]
    held_out_tokens: int
    known: bool
    padded: bool = False

    @property
    def kind(self) -> str:
        """What there are several of."""
        return "rows" if self.padded else "pairs"

    @property
    def tokens(self) -> int:
        """Of one pass."""
        return sum(map(sum, self.lengths))

    def computed(self, pairs: Sequence[PartLengths]) -> int:
        """Tokens that a micro-batch of these puts through the model."""
        return padded_tokens(pairs) if self.padded else sum(map(sum, pairs))

    def mean_computed(self, batch: int) -> float:
        """The same for each of a micro-batch of so many, on average over a shuffled pass."""
        return (
            mean_padded_length(list(map(sum, self.lengths)), batch) if self.padded else self.tokens / len(self.lengths)
        )

    def longest(self, count: int) -> list[PartLengths]:
        """A micro-batch of the longest."""
        return [self.lengths[index % len(self.lengths)] for index in range(count)]


@dataclass(frozen=True)
class Subject:
    """What a plan is about. `reference_config`: of a reference that is a model of its own kind, else None."""

    source: ModelSource
    config: PretrainedConfig
    reference_config: PretrainedConfig | None
    work: Work

    @property
    def adapts(self) -> bool:
        """Whether training continues an adapter."""
        return self.source.adapter is not None


def read_subject(settings: Settings) -> Subject:
    """Reads the model's config, that of a reference with a name of its own, and the pairs.

    Raises:
        UserError: model, reference or data cannot be read.
    """
    source, config = find_config(settings)
    adapts = settings.lora.use_lora or source.adapter is not None
    check_trainable("--model_name_or_path", source.base, source.stored(), adapts, settings.model.use_4bit)
    named = settings.model.named_reference
    reference_config = _read_reference_config(*named, settings) if named is not None else None
    return Subject(source, config, reference_config, read_work(settings, source, config))


def _read_reference_config(flag: str, name: str, settings: Settings) -> PretrainedConfig:
    folder = read_path(name)
    adapter = read_adapter_config(str(folder) if folder.is_dir() else name)
    base = (adapter or {}).get("base_model_name_or_path") or (str(folder) if folder.is_dir() else name)
    check_folder(flag, base)
    return translating(
        f"{flag} {name}: its config cannot be read",
        lambda: AutoConfig.from_pretrained(base, trust_remote_code=settings.model.trust_remote_code),
    )


def place_of_reference(settings: Settings, adapts: bool, work: Work) -> str:
    """What computes the reference in each step, as training decides it (see `ReferencePlan.place`).

    Args:
        adapts: whether an adapter is trained, in the way of training that is looked at.
    """
    settings = dataclasses.replace(settings, lora=dataclasses.replace(settings.lora, use_lora=adapts))
    anywhere = ModelSource("", None, None, "")  # the place depends on kinds, not on where weights are
    pairs, processes = len(work.lengths), settings.of(PlanSettings).num_devices
    return choose_reference(settings, anywhere, torch.float32, pairs, processes, find=lambda *_: anywhere).place


def pairs_per_step(settings: Settings) -> int:
    """Pairs of an optimizer step on all devices."""
    training, devices = settings.training, settings.of(PlanSettings).num_devices
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * devices


def find_config(settings: Settings) -> tuple[ModelSource, PretrainedConfig]:
    """Where the model is and its config; of a model nothing else is needed, be it here or on the hub."""
    model = settings.model
    name = model.model_name_or_path
    folder = read_path(name)
    if model.adapter_name_or_path or read_adapter_config(str(folder) if folder.is_dir() else name):
        source = find_policy(model)
    else:
        place = str(folder.resolve()) if folder.is_dir() else name
        check_folder("--model_name_or_path", place, model.model_revision)
        source = ModelSource(place, None, model.model_revision, place)
    config = translating(
        f"--model_name_or_path {source.base}: its config cannot be read",
        lambda: AutoConfig.from_pretrained(
            source.base, revision=source.revision, trust_remote_code=model.trust_remote_code
        ),
    )
    return source, config


def read_work(settings: Settings, source: ModelSource, config: PretrainedConfig) -> Work:
    """What --dataset_name names, read and tokenized as a run does; without it one row as long as can be."""
    padded = settings.verb == "sft"
    if settings.data.dataset_name is None:
        longest = choose_max_length(settings.data.max_length, longest_context(config.get_text_config()))
        completions = [longest // 2] * (1 if padded else 2)
        return Work([(longest - longest // 2, *completions)], 0, known=False, padded=padded)
    data = load_pairs(settings.data, settings.verb, settings.training.seed, None, rows_of_run(settings))
    tokenizer = load_tokenizer(source, settings.model)
    columns = SFT_COLUMNS if padded else PAIR_COLUMNS
    rows = prepare_rows(data, tokenizer, source, settings, columns)
    lengths, held_out = (_lengths(part, columns) if part is not None else [] for part in (rows.train, rows.held_out))
    return Work(sorted(lengths, key=sum, reverse=True), sum(map(sum, held_out)), True, padded)


def _lengths(rows: Any, completions: Iterable[str]) -> list[PartLengths]:
    columns = (count_row_tokens(rows, [name]).tolist() for name in ("prompt_ids", *completions))
    return list(zip(*columns, strict=True))
