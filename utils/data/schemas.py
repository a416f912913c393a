"""Known shapes of preference and demonstration data: where the prompt and the replies are, and how they are written.

Two small tables. A `Layout` says which columns play which part (prompt, chosen, ...); a `Shape` says how the values of
those parts are read. Another dataset is one more line in one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from utils.data.columns import (
    KIND_NAMES,
    MESSAGES,
    TEXT,
    Rows,
    describe_missing,
    kind_of_column,
    list_columns,
    list_names,
)
from utils.data.turns import BadRow, prepend_system, read_turns, split_reply, split_transcript
from utils.errors import UserError
from utils.settings import DataSettings

SAMPLED_ROWS = 100

Kinds = Mapping[str, str]  # part -> kind of its values; without the parts that the source lacks
Names = Mapping[str, str]  # part -> its column
Sides = tuple[Any, Any]  # prompt and reply; None: missing


@dataclass(frozen=True)
class Layout:
    """Which columns play which part: the first candidate that exists. Parts in `optional` may be absent."""

    name: str
    parts: Mapping[str, tuple[str, ...]]
    optional: tuple[str, ...] = ("system", "tools")


@dataclass(frozen=True)
class Shape:
    """How the values are written: `split(row, reply, names)` gives prompt and reply of one side, or raises BadRow."""

    name: str
    description: str
    matches: Callable[[Kinds, Sequence[str]], bool]
    split: Callable[[Mapping[str, Any], str, Names], Sides]
    is_text: bool = False
    is_transcript: bool = False
    prompt_may_be_empty: bool = False


@dataclass(frozen=True)
class Reading:
    """How the rows are read, found once. `columns`: part -> column; `replies`: chosen and rejected, or the one part."""

    name: str
    description: str
    columns: Names
    shape: Shape
    replies: tuple[str, ...]

    @property
    def is_text(self) -> bool:
        """Prompt and replies become texts (else message lists)."""
        return self.shape.is_text

    @property
    def is_transcript(self) -> bool:
        """The source is "Human: ... Assistant: ..." text, so a tokenizer without a template takes a transcript one."""
        return self.shape.is_transcript

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the replies are called once converted."""
        return self.replies if len(self.replies) == 2 else ("completion",)

    @property
    def labels(self) -> dict[str, str]:
        """Converted column -> the source's name for it, for messages to people."""
        replies = dict(zip(self.outputs, self.replies, strict=True))
        return {name: self.columns.get(replies.get(name, name), name) for name in ("prompt", *self.outputs)}


PROMPT = {"prompt": ("prompt", "question"), "system": ("system", "system_prompt"), "tools": ("tools",)}
PAIR = Layout(
    "chosen and rejected",
    PROMPT | {"chosen": ("chosen",), "rejected": ("rejected",)},
    ("prompt", "system", "tools"),
)
OPENAI = Layout(
    "OpenAI preference format",
    {
        "prompt": ("input.messages",),
        "chosen": ("preferred_output",),
        "rejected": ("non_preferred_output",),
        "tools": ("input.tools", "tools"),
    },
)
COMPLETION = Layout("prompt and completion", PROMPT | {"completion": ("completion",)}, ("prompt", "system", "tools"))
DIALOGUE = Layout(
    "dialogue",
    {"completion": ("messages", "conversations", "conversation"), "system": ("system",), "tools": ("tools",)},
)
INSTRUCTION = Layout(
    "instruction and output",
    {"prompt": ("instruction",), "context": ("input",), "completion": ("output", "response"), "system": ("system",)},
    ("context", "system"),
)
WHOLE_TEXT = Layout("text", {"text": ("text",)})

LAYOUTS = {"train": (PAIR, OPENAI), "sft": (COMPLETION, PAIR, OPENAI, DIALOGUE, INSTRUCTION, WHOLE_TEXT)}
FLAGS = {"train": ("prompt", "chosen", "rejected"), "sft": ("prompt", "chosen", "completion", "text")}


def _split_texts(row: Mapping[str, Any], reply: str, names: Names) -> Sides:
    for part in ("prompt", reply):
        if not isinstance(row.get(part), str | None):
            raise BadRow(f"'{names[part]}' is not text")
    prompt, context = row.get("prompt"), row.get("context")
    if prompt and isinstance(context, str) and context.strip():
        prompt = f"{prompt}\n\n{context}"
    return prompt, row[reply]


def _split_texts_with_system(row: Mapping[str, Any], reply: str, names: Names) -> Sides:
    prompt, answer = _split_texts(row, reply, names)
    turns = None if prompt is None else prepend_system(row.get("system"), [{"role": "user", "content": prompt}])
    return turns, None if answer is None else [{"role": "assistant", "content": answer}]


def _split_with_prompt(row: Mapping[str, Any], reply: str, names: Names) -> Sides:
    """A prompt of its own; the reply's list may repeat the prompt's turns, or bring a system turn."""
    if row["prompt"] is None:
        return None, None
    prompt = read_turns(row["prompt"], names["prompt"], "user")
    if row[reply] is None:
        return prompt, None
    turns = read_turns(row[reply], names[reply], "assistant")
    before, answer = split_reply(turns)
    if turns[: len(prompt)] == prompt:
        # A prompt may end in the assistant's own words, which are then no part of the reply.
        before, answer = (before, answer) if len(before) >= len(prompt) else (prompt, turns[len(prompt) :])
    elif all(turn["role"] == "system" for turn in before):
        before = before + prompt
    elif not isinstance(row["prompt"], str):
        raise BadRow(f"'{names[reply]}' has turns before its last reply that are not those of '{names['prompt']}'")
    return prepend_system(row.get("system"), before), answer


def _split_dialogue(row: Mapping[str, Any], reply: str, names: Names) -> Sides:
    if row[reply] is None:
        return None, None
    turns, answer = split_reply(read_turns(row[reply], names[reply], "assistant"))
    return prepend_system(row.get("system"), turns), answer


def _split_transcripts(row: Mapping[str, Any], reply: str, names: Names) -> Sides:
    if row[reply] is None:
        return None, None
    if not isinstance(row[reply], str):
        raise BadRow(f"'{names[reply]}' is not text")
    return split_reply(split_transcript(row[reply]))


def _split_whole_text(row: Mapping[str, Any], reply: str, names: Names) -> Sides:
    if not isinstance(row[reply], str | None):
        raise BadRow(f"'{names[reply]}' is not text")
    return "", row[reply]


def _all(kinds: Kinds, parts: Sequence[str], wanted: Sequence[str]) -> bool:
    return all(kinds.get(part) in (*wanted, "null") for part in parts)


def _any_messages(kinds: Kinds, parts: Sequence[str]) -> bool:
    return any(kinds.get(part) in MESSAGES for part in parts) and _all(kinds, parts, TEXT + MESSAGES)


# In order: the first shape that matches is used.
SHAPES = (
    Shape(
        "whole texts",
        "whole texts, all of which is learnt",
        lambda kinds, replies: replies == ("text",) and _all(kinds, replies, TEXT),
        _split_whole_text,
        is_text=True,
        prompt_may_be_empty=True,
    ),
    Shape(
        "transcripts",
        "'Human: ... Assistant: ...' transcripts; all before the last reply is the prompt",
        lambda kinds, replies: "transcript" in kinds.values() and _all(kinds, replies, ("transcript",)),
        _split_transcripts,
        is_transcript=True,
    ),
    Shape(
        "texts with a system prompt",
        "prompt and replies are texts, with a system turn before",
        lambda kinds, replies: "system" in kinds and _all(kinds, ("system", "prompt", *replies), TEXT),
        _split_texts_with_system,
    ),
    Shape(
        "texts",
        "prompt and replies are texts",
        lambda kinds, replies: _all(kinds, ("prompt", *replies), TEXT),
        _split_texts,
        is_text=True,
    ),
    Shape(
        "messages with a prompt",
        "messages, the prompt in a column of its own",
        lambda kinds, replies: "prompt" in kinds and _any_messages(kinds, ("prompt", *replies)),
        _split_with_prompt,
    ),
    Shape(
        "messages",
        "message lists; all before the last reply is the prompt",
        lambda kinds, replies: "prompt" not in kinds and _all(kinds, replies, ("messages",)),
        _split_dialogue,
    ),
)


def find_reading(rows: datasets.Dataset, settings: DataSettings, verb: str) -> Reading:
    """How to read these rows, from their columns, the first of their values, and the --*_column flags.

    Raises UserError when a named column does not exist or no known shape fits.
    """
    sample = rows.select(range(min(SAMPLED_ROWS, len(rows)))).to_list()
    columns = list(dict.fromkeys([*rows.column_names, *list_columns(sample)]))
    mapped = {part: path for part in FLAGS[verb] if (path := getattr(settings, f"{part}_column")) is not None}
    lost = {part: path for part, path in mapped.items() if path not in columns}
    if lost:
        raise UserError(*(describe_missing(f"--{part}_column", path, columns) for part, path in lost.items()))
    for layout in LAYOUTS[verb]:
        replies = ("chosen", "rejected") if verb == "train" else (_sft_reply(layout),)
        found = _find_columns(layout, mapped, columns, replies)
        if found is None:
            continue
        kinds = {part: kind_of_column(sample, path) for part, path in found.items()}
        shape = next((shape for shape in SHAPES if shape.matches(kinds, replies)), None)
        if shape is not None:
            described = ", ".join(f"{part} '{path}'" for part, path in found.items())
            return Reading(layout.name, f"{shape.description} ({described})", found, shape, replies)
    raise UserError(_describe_unknown(settings, verb, mapped, columns, sample))


def _sft_reply(layout: Layout) -> str:
    return next(part for part in ("completion", "chosen", "text") if part in layout.parts)


def _find_columns(
    layout: Layout, mapped: Names, columns: Sequence[str], replies: Sequence[str]
) -> dict[str, str] | None:
    """Part -> column, or None where the layout lacks a part: one it needs, or one that a flag names."""
    if not set(mapped) <= set(layout.parts):
        return None
    found = {}
    for part, candidates in layout.parts.items():
        if part in ("chosen", "rejected") and part not in replies:
            continue
        path = mapped.get(part) or next((name for name in candidates if name in columns), None)
        if path is not None:
            found[part] = path
        elif part not in layout.optional:
            return None
    return found


def _describe_unknown(settings: DataSettings, verb: str, mapped: Names, columns: Sequence[str], sample: Rows) -> str:
    has = f"the data has: {list_names(columns)}"
    replies = [path for part in FLAGS[verb][1:] if (path := mapped.get(part, part)) in columns]
    kinds = {path: kind_of_column(sample, path) for path in dict.fromkeys([*mapped.values(), *replies])}
    no_prompt = "prompt" not in mapped and not any(name in columns for name in PROMPT["prompt"])
    if replies and no_prompt and all(kind in (*TEXT, "message", "replies") for kind in kinds.values()):
        names = " and ".join(f"'{path}'" for path in replies)
        return f"--prompt_column is missing: no column is known as the prompt of {names}; {has}"
    flags = "--prompt_column, --chosen_column and --rejected_column (dots reach into nested fields)"
    if verb == "sft":
        flags = "--prompt_column and --completion_column, --chosen_column, or --text_column"
    found = ", ".join(f"'{path}' holds {KIND_NAMES[kind]}" for path, kind in kinds.items())
    note = f" ({found}; texts or message lists are needed)" if found else ""
    name = settings.dataset_name
    return f"--dataset_name {name}: its columns fit no known shape{note}; name them with {flags}; {has}"
