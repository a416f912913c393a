"""The models of a chat: loaded, on one base where they share it, each with what it needs to be spoken to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..data.encoding import PromptEncoder, read_tools
from ..data.tools import list_tools
from ..errors import UserError, gather
from ..models.loading import check_embeddings, context_length, load_tokenizer
from ..models.quantization import check_4bit
from ..models.side_by_side import Contender, Wanted, load_side_by_side
from ..models.sources import read_end_ids
from ..models.templates import arguments_read, check_no_template, recorded_moment, set_chat_template
from ..models.trained import TrainedModel, as_in_run, find_trained
from ..responses.generation import Continuation, stream_continuation
from ..run.paths import read_path
from ..runtime import Precision, choose_precision, device_name, find_device, say
from ..settings.training import Settings
from ..settings.verbs import ChatSettings, SamplingSettings
from .dialogue import Dialogue, Shown

FLAG, OTHER = "--model_name_or_path", "--compare_with"
FROM_THE_RUN = ("dtype", "attn_implementation", "bnb_4bit_quant_type", "chat_template_kwargs")
REFERENCE = "reference"


@dataclass
class Speaker:
    """A model with its side of the conversation."""

    name: str
    source: str
    contender: Contender
    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]
    context: int | None
    dialogue: Dialogue

    def shown(self, max_new_tokens: int) -> Shown:
        """What of the conversation it is given; see `Dialogue.fit`."""
        return self.dialogue.fit(PromptEncoder(self.tokenizer, self.end_ids), self.context, max_new_tokens)

    def stream(self, shown: Shown, sampling: SamplingSettings, seed: int) -> Generator[Continuation, None, None]:
        """Its answer while it grows."""
        sampling = dataclasses.replace(sampling, max_new_tokens=shown.room)
        with self.contender.active() as model:
            yield from stream_continuation(
                model,
                self.tokenizer,
                shown.prompt,
                sampling,
                seed=seed,
                end_ids=self.end_ids,
                tools=self.dialogue.tools,
            )


@dataclass(frozen=True)
class Found:
    """A model that was found, by the flag that names it; `template` is None where plain text completion."""

    wanted: Wanted
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    end_ids: frozenset[int]
    context: int | None


def load_speakers(settings: Settings) -> list[Speaker]:
    """The model, and the one to compare it with where there is one; says what they are.

    Raises:
        UserError: one of them is not there or cannot be loaded, or a setting does not fit it.
    """
    model, tools = settings.model, read_tools_file(settings)
    trained = find_trained(FLAG, model.model_name_or_path, model.model_revision)
    settings = as_in_run(settings, trained, FROM_THE_RUN)
    in_4bit = model.use_4bit if "use_4bit" in settings.given else trained.in_4bit
    own = Wanted(FLAG, trained.source, in_4bit)
    other = _find_other(settings, trained, in_4bit)
    if "bnb_4bit_quant_type" in settings.given and not in_4bit:
        raise UserError("--bnb_4bit_quant_type: has no effect without --use_4bit; add it or leave this out")
    first, *_ = gather(
        lambda: _prepare(own, trained, settings, tools),
        lambda: check_4bit() if in_4bit or (other is not None and other.in_4bit) else None,
    )
    if first.template is None:
        _check_no_messages(own.source.name, settings)
    found = {_short_name(own): first}
    if other is not None:
        name = REFERENCE if settings.of(ChatSettings).compare_with == REFERENCE else _short_name(other)
        found[name if name not in found else "compared"] = _prepare_other(other, first, settings, tools)
    precision = choose_precision(settings.model.dtype, find_device())
    contenders = load_side_by_side({name: item.wanted for name, item in found.items()}, settings.model, precision)
    _describe(list(found.values()), settings, precision)
    return [_introduce(name, item, contenders[name], settings, tools) for name, item in found.items()]


def _short_name(wanted: Wanted) -> str:
    return Path(wanted.source.name).name


def read_tools_file(settings: Settings) -> str | None:
    """The tools of the file that --tools names, as JSON.

    Raises:
        UserError: it cannot be read, or holds no list of tools.
    """
    name = settings.of(ChatSettings).tools
    if name is None:
        return None
    try:
        tools = list_tools(read_path(name).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--tools {name}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"--tools {name}: must hold a JSON list of objects, one for each tool ({error})") from None
    if not tools:
        raise UserError(f"--tools {name}: holds no tools; leave it out")
    return json.dumps(tools, ensure_ascii=False)


def _check_no_messages(name: str, settings: Settings) -> None:
    """Raises UserError where a model that completes plain text is given what only a conversation has."""
    wish = settings.of(ChatSettings)
    has = {"--system_prompt": (wish.system_prompt, "system prompt"), "--tools": (wish.tools, "tools")}
    for flag, (value, what) in has.items():
        if value is not None:
            raise UserError(f"{flag}: {name} completes plain text, which has no {what}; leave it out")


def _introduce(name: str, found: Found, contender: Contender, settings: Settings, tools: str | None) -> Speaker:
    check_embeddings(contender.model, found.tokenizer, found.wanted.source)
    dialogue = Dialogue(found.template is None, settings.of(ChatSettings).system_prompt, tools)
    return Speaker(name, found.wanted.source.name, contender, found.tokenizer, found.end_ids, found.context, dialogue)


def _find_other(settings: Settings, trained: TrainedModel, in_4bit: bool) -> Wanted | None:
    name = settings.of(ChatSettings).compare_with
    if name is None:
        return None
    if name == REFERENCE:
        reference = trained.find_reference()
        if reference is None:
            raise UserError(
                f"{OTHER} {REFERENCE}: {trained.source.name} has no record of a run that names one; name a model"
            )
        return Wanted(OTHER, reference, trained.reference_in_4bit)
    other = find_trained(OTHER, name)
    # A plain model has no record of how it was held: as the other is, so that one base serves both.
    return Wanted(OTHER, other.source, other.in_4bit if other.record else in_4bit)


def _prepare(wanted: Wanted, trained: TrainedModel | None, settings: Settings, tools: str | None) -> Found:
    source = wanted.source
    tokenizer = load_tokenizer(source, settings.model)
    record = trained.record.get("data", {}) if trained else {}
    moment = recorded_moment(trained.record) if trained else None
    trained_on_texts = "chat_template" in record and record["chat_template"] is None
    template = None
    if settings.model.chat_template is not None or (tokenizer.chat_template and not trained_on_texts):
        wish, arguments = settings.model.chat_template, settings.model.chat_template_kwargs
        arguments = arguments_read(tokenizer, arguments) if trained is None and wish is None else arguments
        reasoning = trained.setting("reasoning") if trained is not None else None
        template = set_chat_template(tokenizer, wish, False, read_tools(tools), moment, arguments, reasoning)
    elif trained is not None:
        check_no_template(settings.model, f"what {source.name} completes")
    ends = read_end_ids(source.base, source.revision, tokenizer)
    return Found(wanted, tokenizer, template, ends, context_length(source, settings.model))


def _prepare_other(wanted: Wanted, first: Found, settings: Settings, tools: str | None) -> Found:
    """The second model, spoken to as the first where both read the same tokens."""
    other = _prepare(wanted, None, settings, tools)
    if other.tokenizer.get_vocab() != first.tokenizer.get_vocab():
        return other
    return dataclasses.replace(other, tokenizer=first.tokenizer, template=first.template)


def _describe(found: list[Found], settings: Settings, precision: Precision) -> None:
    """Says what answers, how it is spoken to, and what computes."""
    for label, item in zip(("model", "compared with"), found, strict=False):
        source, bits = item.wanted.source, ", in 4 bits" if item.wanted.in_4bit else ""
        base = f" (an adapter on {source.base}{bits})" if source.adapter else bits
        say(f"{label}: {source.name}{base}")
        if item.template is None:
            say("      plain text completion: each message is a separate text, without template or history")
        else:
            say(f"      chat template: {item.template.partition(';')[0]}")
    sampling = settings.of(SamplingSettings)
    how = f"temperature {sampling.temperature:g}" if sampling.temperature else "greedy decoding"
    how += f", top_p {sampling.top_p:g}" if sampling.top_p < 1 else ""
    how += f", top_k {sampling.top_k}" if sampling.top_k else ""
    how += f", repetition penalty {sampling.repetition_penalty:g}" if sampling.repetition_penalty != 1 else ""
    say(f"sampling: {how}, at most {sampling.max_new_tokens} tokens, seed {settings.training.seed}")
    say(f"device: {device_name(precision.device)}; computing in {precision.name} ({precision.reason})")
