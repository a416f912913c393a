"""The prompts of any data: of pairs, of demonstrations, or in a column of their own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from ..errors import UserError
from ..settings.data import DataSettings
from .adapter import read_code, run_adapter
from .calls import BadRow, keeps_extra, plain_turns, said_by
from .columns import MESSAGES, kind_of_column, list_columns, list_names, reach
from .conversion import PLAIN_TURNS, WHOLE_TURNS, NeedsExtra, convert_rows, tools_text
from .files import quiet
from .layouts import ANY_PROMPT, CONVERSATION, DOCUMENTS, GIVEN, KWARGS
from .ranking import Choice, add_context, expand_history
from .row_cache import map_rows
from .schemas import find_reading, is_packed, take_rows
from .sources import Source, load_source
from .splitting import prompt_key
from .template_kwargs import TOLD, holds_documents, kwargs_text, told
from .turns import Value, flatten, prepend_system, read_turns, unpack

PROMPT_NAMES = ("prompt", "question", "instruction", "query", "input", "problem", "text", *CONVERSATION)
WITH_SPLIT = re.compile(r"(.+)\[([\w.-]+)\]")
BATCH = 1000


# A prompt, messages as a template takes them, with what the template is given beside them (TOLD).
Asked = tuple[str | list[dict[str, Any]], dict[str, str]]


@dataclass(frozen=True)
class Prompts:
    """`rows` has the column `prompt`, and those of TOLD that rows give their chat template; `left_out` says how many
    rows have no prompt, by the reason."""

    source: str
    description: str  # how they are read
    rows: datasets.Dataset
    left_out: dict[str, int]
    first_left_out: dict[str, str]  # reason -> where the first such row stands, for those whose place is known

    def each(self) -> Iterator[Asked]:
        """Every prompt, messages as a template takes them, with what the template is given beside them."""
        return ((plain_turns(row["prompt"]), told(row)) for row in self.rows)

    def describe_left_out(self, what: str) -> Iterator[str]:
        """A line for each reason; `what` are left out, to be read after their number."""
        for reason, count in self.left_out.items():
            where = f" (the first: {self.first_left_out[reason]})" if reason in self.first_left_out else ""
            yield f"      {count:,} {what}: {reason}{where}"


@dataclass(frozen=True)
class PromptColumns:
    """Part -> column of rows that hold prompts alone, or of what an adapter makes of them."""

    parts: Mapping[str, str]
    to_messages: bool
    adapter: str | None
    packed: bool = False  # the prompts are message lists written as text
    keeps_extra: bool = False  # turns have a column for what they say beside their text

    @property
    def told(self) -> tuple[str, ...]:
        """The columns with what a row gives its template."""
        parts = self.parts.keys()
        return tuple(name for name, of in (("tools", {"tools"}), (KWARGS, set(GIVEN))) if parts & of)

    @property
    def description(self) -> str:
        """For people."""
        how = ", ".join(f"{part} '{column}'" for part, column in self.parts.items())
        how = f"{how}; its texts are message lists" if self.packed else how
        return how if self.adapter is None else f"adapter {self.adapter}: {how}"


def read_prompts(settings: DataSettings, flag: str = "--dataset_name") -> Prompts:
    """The prompts of the data that `settings` name; `flag` is what the person named them with.

    Raises:
        UserError: there are none, or they are not as the settings say.
    """
    settings = dataclasses.replace(settings, validation_split="none", on_bad_rows="skip")
    try:
        source = load_source(settings, "train")
    except UserError as error:
        raise UserError(*(_rename(fault, flag, settings.dataset_name) for fault in error.faults)) from None
    if len(source.rows) == 0:
        raise UserError(f"{flag} {settings.dataset_name}: has no rows")
    fault = None
    for verb in ("train", "sft"):
        try:
            reading = find_reading(source.rows, settings, verb)
        except UserError as error:
            fault = error
            continue
        if settings.prompt_column is not None and reading.is_transcript:
            continue  # the prompts in the transcripts are others than those of the column that was named
        if reading.adapter or "prompt" in reading.columns or reading.layout.both_sides or not reading.is_text:
            prompts = _keep_prompts(convert_rows(source.rows, reading), source, reading.description)
            if len(prompts.rows):
                return prompts
    return _read_bare_prompts(source, settings, flag, fault)


def take_different(prompts: Iterable[Asked]) -> Iterator[Asked]:
    """Each prompt once; case and spacing do not count."""
    seen: set[tuple[str, str]] = set()
    for prompt, given in prompts:
        key = (prompt_key(prompt), repr(given))
        if key not in seen:
            seen.add(key)
            yield prompt, given


def name_split(settings: DataSettings, name: str) -> DataSettings:
    """The settings for data of that name; NAME[SPLIT] names a split."""
    named = WITH_SPLIT.fullmatch(name)
    place, split = named.groups() if named else (name, None)
    return dataclasses.replace(settings, dataset_name=place, dataset_split=split)


def _read_bare_prompts(source: Source, settings: DataSettings, flag: str, fault: UserError | None) -> Prompts:
    """The prompts of rows that hold no responses. `fault` is why they cannot be read as rows that do."""
    sample = take_rows(source.rows)
    if settings.dataset_adapter is not None:
        sample = [parts for row in sample for parts in _run_adapter(settings.dataset_adapter, row)]
    columns = list(dict.fromkeys(list_columns(sample)))
    column = settings.prompt_column or next((known for known in PROMPT_NAMES if known in columns), None)
    if settings.dataset_adapter is not None:
        column = "prompt"
    asked = settings.dataset_format or settings.dataset_adapter or settings.prompt_column
    if fault is not None and (settings.dataset_format or (asked and column not in columns)):
        raise fault
    name = settings.dataset_name
    if column is None:
        advice = "with --prompt_column" if flag != "--compare" else f"one of {', '.join(PROMPT_NAMES)}"
        has = list_names(columns)
        raise UserError(f"{flag} {name}: no column is recognised as the prompt; it has: {has}. Name it {advice}")
    how = _find_prompt_columns(sample, columns, column, settings.dataset_adapter)
    try:
        converted = _convert_prompts(source.rows, how)
    except NeedsExtra:
        converted = _convert_prompts(source.rows, dataclasses.replace(how, keeps_extra=True))
    prompts = _keep_prompts(converted, source, how.description)
    if len(prompts.rows) == 0:
        raise UserError(f"{flag} {name}: has no prompts ({'; '.join(prompts.left_out)})")
    return prompts


def _find_prompt_columns(
    sample: Sequence[Mapping[str, Any]], columns: Sequence[str], prompt: str, adapter: str | None
) -> PromptColumns:
    parts = {"prompt": prompt}
    for part in ("system", "context", "tools", *GIVEN):
        name = next((name for name in ANY_PROMPT[part] if name in columns and name != prompt), None)
        if name is not None and (part != DOCUMENTS or holds_documents([row.get(name) for row in sample])):
            parts[part] = name
    if "history" in columns and prompt != "history" and kind_of_column(sample, "history") == "list":
        parts["history"] = "history"
    packed = adapter is None and is_packed(sample, prompt)
    to_messages = packed or parts.keys() - {"prompt", "context"} or kind_of_column(sample, prompt) in MESSAGES
    return PromptColumns(parts, bool(to_messages), adapter, packed)


def _convert_prompts(rows: datasets.Dataset, how: PromptColumns) -> datasets.Dataset:
    """`prompt`, `row` and `reason` as in converted rows."""
    own_code = read_code(how.adapter) if how.adapter else b""
    turns = WHOLE_TURNS if how.keeps_extra else PLAIN_TURNS
    features = {"prompt": turns if how.to_messages else datasets.Value("string")}
    features |= {name: datasets.Value("string") for name in how.told}
    with quiet(rows.data.nbytes):
        return map_rows(
            rows,
            _convert_batch,
            decides=(repr(how), own_code),
            batched=True,
            with_indices=True,
            fn_kwargs={"how": how},
            remove_columns=rows.column_names,
            features=datasets.Features(
                {**features, "row": datasets.Value("int64"), "reason": datasets.Value("string")}
            ),
            desc="Reading the prompts",
        )


def _convert_batch(batch: Mapping[str, list[Any]], indices: list[int], how: PromptColumns) -> dict[str, list[Any]]:
    output: dict[str, list[Any]] = {name: [] for name in ("prompt", *how.told, "row", "reason")}
    for position, index in enumerate(indices):
        row = {name: column[position] for name, column in batch.items()}
        try:
            made = [row] if how.adapter is None else run_adapter(how.adapter, row)
            read = [{"prompt": _read_prompt(parts, how), **_read_told(parts, how)} for parts in made]
        except BadRow as fault:
            read = [{"reason": str(fault)}]
        for prompt in read:
            for name, values in output.items():
                values.append(index if name == "row" else prompt.get(name))
    return output


def _read_prompt(row: Mapping[str, Any], how: PromptColumns) -> Value:
    """The prompt of a row, with its input, earlier rounds and system text as in rows with responses."""
    parts = {part: reach(row, column) for part, column in how.parts.items()}
    name, system = how.parts["prompt"], parts.get("system")
    if not isinstance(system, str | None):
        raise BadRow(f"'{how.parts['system']}' is not text")
    if "history" in parts:
        parts = expand_history(parts, how.parts, Choice())[0]
    prompt = unpack(parts["prompt"], name) if how.packed else parts["prompt"]
    if isinstance(prompt, str):
        prompt = add_context(prompt, parts.get("context"))
    if prompt is None or not (prompt.strip() if isinstance(prompt, str) else prompt):
        raise BadRow(f"'{name}' is empty")
    if how.to_messages:
        prompt = prepend_system(system, read_turns(prompt, name, "user"))
        if keeps_extra(prompt) and not how.keeps_extra:
            raise NeedsExtra
    elif not isinstance(prompt, str):
        raise BadRow(f"'{name}' is not text")
    try:
        flatten(prompt).encode()
    except UnicodeEncodeError:
        raise BadRow(f"'{name}' has half a character (an unpaired surrogate)") from None
    return prompt


def _read_told(row: Mapping[str, Any], how: PromptColumns) -> dict[str, str | None]:
    parts = {part: reach(row, column) for part, column in how.parts.items()}
    read = {"tools": lambda: tools_text(parts["tools"], how.parts["tools"], is_text=False)}
    read[KWARGS] = lambda: kwargs_text(parts, how.parts)
    return {name: read[name]() for name in how.told}


def _run_adapter(spec: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    try:
        return run_adapter(spec, row)
    except BadRow:
        return []


def _keep_prompts(converted: datasets.Dataset, source: Source, description: str) -> Prompts:
    """Those of the converted rows that have a prompt, with a count of the others."""
    left_out, kept = dict(source.dropped), []
    first = {reason: lines.places[0] for reason, lines in source.unreadable.items()}
    for batch in converted.select_columns(["prompt", "row", "reason"]).iter(BATCH):
        for prompt, row, reason in zip(batch["prompt"], batch["row"], batch["reason"], strict=True):
            kept.append(_is_prompt(prompt))
            if not kept[-1]:
                reason = reason or "the prompt is empty"
                left_out[reason] = left_out.get(reason, 0) + 1
                first.setdefault(reason, source.place(row))
    columns = [name for name in ("prompt", *TOLD) if name in converted.column_names]
    rows = converted.select_columns(columns).select(np.flatnonzero(kept))
    return Prompts(source.description, description, rows, left_out, first)


def _is_prompt(value: Value | None) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return bool(value) and any(said_by(turn).strip() for turn in value)


def _rename(fault: str, flag: str, name: str) -> str:
    """What was said of --dataset_name and --dataset_split, said of --compare."""
    if flag == "--dataset_name":
        return fault
    fault = fault.replace("--dataset_name", flag)
    fault = fault.replace("--dataset_split is missing:", f"{flag} {name}: write NAME[SPLIT] to name a split:")
    return fault.replace("--dataset_split", f"{flag} {name}: split")
