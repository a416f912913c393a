"""The two models of a comparison: which they are, what they read prompts with, and what they answer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.encoding import PromptEncoder
from ..data.template_kwargs import as_options
from ..errors import UserError, gather
from ..models.loading import context_length, load_tokenizer
from ..models.quantization import check_4bit
from ..models.side_by_side import Contender, Wanted
from ..models.sources import ModelSource, read_end_ids
from ..models.templates import arguments_read, check_no_template, first_tools, recorded_moment, set_chat_template
from ..models.trained import TrainedModel, find_trained
from ..responses.generation import Continuation, find_fitting, sample_continuations
from ..runtime import say
from ..settings.training import Settings
from ..settings.verbs import ComparisonSettings, SamplingSettings
from .questions import Questions

PROMPTS_AT_A_TIME = 64


@dataclass(frozen=True)
class Side:
    """A model of a comparison, before it is loaded. `name` is what it is called in the results."""

    name: str
    flag: str
    trained: TrainedModel
    in_4bit: bool
    how: str  # what it is, in words

    @property
    def source(self) -> ModelSource:
        """Where its weights are."""
        return self.trained.source

    def wanted(self) -> Wanted:
        """How it is to be loaded."""
        return Wanted(self.flag, self.source, self.in_4bit)

    def as_record(self) -> dict[str, Any]:
        """For comparison.json."""
        folder = self.trained.folder
        return {
            "name": self.source.name,
            **dataclasses.asdict(self.source),
            "in_4bit": self.in_4bit,
            "what": self.how,
            "run": str(folder) if folder else None,
        }


@dataclass(frozen=True)
class Reader:
    """What a model reads prompts with: the tokenizer with its chat template, its end tokens, its context."""

    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]
    context: int | None
    template: str | None  # which chat template, in words; None for prompts of plain text

    @property
    def encoder(self) -> PromptEncoder:
        """Prompts and responses as its token ids."""
        return PromptEncoder(self.tokenizer, self.end_ids)


def find_sides(settings: Settings) -> tuple[Side, Side]:
    """The model and its baseline.

    Raises:
        UserError: one of them is not there or not finished, there is no baseline, or both are the same.
    """
    wish, flag = settings.model, "--model_name_or_path"
    baseline = settings.of(ComparisonSettings).baseline
    trained, other = gather(
        lambda: find_trained(flag, wish.model_name_or_path, wish.model_revision),
        lambda: find_trained("--baseline", baseline) if baseline is not None else None,
    )
    model = Side("model", flag, trained, trained.in_4bit or wish.use_4bit, _describe(trained))
    if other is not None:
        # The same base held in the same way is one model in memory, and differs from it by the adapter alone.
        alike = trained.in_4bit and other.folder is None and other.source.base == trained.source.base
        side = Side("baseline", "--baseline", other, other.in_4bit or alike or wish.use_4bit, _describe(other))
    elif trained.reference is not None:
        reference = TrainedModel(trained.find_reference())
        in_4bit = trained.reference_in_4bit or wish.use_4bit
        how = "the reference of the run" if trained.has_reference else "the initial model of the run"
        side = Side("baseline", "--baseline", reference, in_4bit, how)
    else:
        raise UserError(
            f"--baseline is missing: {trained.source.name} is not a run of this script, so nothing says what to "
            "compare it with; name a model"
        )
    if (model.source, model.in_4bit) == (side.source, side.in_4bit):
        raise UserError(f"--baseline {side.source.name}: is the model itself; name another one to compare with")
    if model.in_4bit or side.in_4bit:
        check_4bit()
    return model, side


def _describe(trained: TrainedModel) -> str:
    source, verb = trained.source, trained.record.get("verb")
    bits = " in 4 bits" if trained.in_4bit else ""
    what = f"an adapter on {source.base}{bits}" if source.adapter is not None else "a full model"
    if trained.folder is None:
        return what
    checkpoint = "" if Path(source.name) == trained.folder else "a checkpoint of "
    return f"{what}, {checkpoint}a run of {verb}"


def read_readers(sides: tuple[Side, Side], settings: Settings, questions: Questions) -> tuple[Reader, Reader]:
    """What each of the two reads the prompts with.

    A baseline that reads the same token ids takes the model's tokenizer, and with it its chat template, unless its own
    has one and it is no part of the model's run: each then reads what it was made for.

    Raises:
        UserError: a tokenizer or template cannot be used, or a template is wished for plain text.
    """
    model, baseline = sides
    wish, arguments = settings.model.chat_template, settings.model.chat_template_kwargs
    if not questions.are_messages:
        check_no_template(settings.model, "these prompts")
    tokenizers = [load_tokenizer(side.source, settings.model) for side in sides]
    same = tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    of_the_run = baseline.source in (model.trained.reference, model.trained.start)
    of_the_base = baseline.source.base == model.source.base and baseline.source.adapter is None
    shared = same and (of_the_run or of_the_base or not tokenizers[1].chat_template)
    templates: list[str | None] = [None, None]
    if questions.are_messages:
        tools = first_tools(questions.told)
        # Both are told the same date; that of a run is the model's, whose reward is then as it was in training.
        moment = recorded_moment(model.trained.record) or recorded_moment(baseline.trained.record) or datetime.now()
        for place in (0,) if shared else (0, 1):
            tokenizer = tokenizers[place]
            own = arguments_read(tokenizer, arguments) if place and wish is None else arguments
            reasoning = model.trained.setting("reasoning")
            templates[place] = set_chat_template(tokenizer, wish, False, tools, moment, own, reasoning)
    if shared:
        tokenizers[1], templates[1] = tokenizers[0], templates[0]
    readers = [
        Reader(
            tokenizer,
            read_end_ids(side.source.base, side.source.revision, tokenizer),
            context_length(side.source, settings.model),
            template,
        )
        for side, tokenizer, template in zip(sides, tokenizers, templates, strict=True)
    ]
    return readers[0], readers[1]


def bound_new_tokens(settings: Settings, readers: tuple[Reader, Reader]) -> Settings:
    """The settings with a --max_new_tokens that was not given lowered to half of a short context."""
    halves = [reader.context // 2 for reader in readers if reader.context is not None]
    if "max_new_tokens" in settings.given or not halves:
        return settings
    most = min(settings.of(SamplingSettings).max_new_tokens, *halves)
    return settings.with_values({"max_new_tokens": most})


def choose_fitting(questions: Questions, readers: tuple[Reader, Reader], max_new_tokens: int) -> Questions:
    """The prompts that leave room for a response in the context of both models.

    Raises:
        UserError: there are none.
    """
    prompts, options = questions.prompts, as_options(questions.told)
    fits = [find_fitting(reader.tokenizer, prompts, max_new_tokens, reader.context, **options) for reader in readers]
    fitting = [place for place, both in enumerate(zip(*fits, strict=True)) if all(both)]
    if not fitting:
        context = min(reader.context for reader in readers if reader.context is not None)
        raise UserError(
            f"--max_new_tokens {max_new_tokens}: none of {len(prompts):,} prompts leaves room for that many in a "
            f"context of {context:,} tokens; lower it"
        )
    return questions.select(fitting)


def write_responses(
    contender: Contender, name: str, reader: Reader, questions: Questions, settings: Settings
) -> list[Continuation]:
    """The model's response to each prompt, drawn with --seed; says how far it is."""
    written: list[Continuation] = []
    sampling, count = settings.of(SamplingSettings), len(questions.prompts)
    with contender.active() as model:
        for start in range(0, count, PROMPTS_AT_A_TIME):
            part = questions.select(range(start, min(start + PROMPTS_AT_A_TIME, count)))
            written += sample_continuations(
                model,
                reader.tokenizer,
                part.prompts,
                sampling,
                seed=settings.training.seed,
                end_ids=reader.end_ids,
                **as_options(part.told),
            )
            say(f"      {name}: {len(written):,} of {count:,} responses")
    return written
