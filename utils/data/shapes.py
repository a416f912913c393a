"""How the values of a row are written: texts, message lists, transcripts. Another way of writing is one more line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .beginnings import find_prompt
from .calls import BadRow
from .columns import MESSAGES, TEXT
from .turns import prepend_system, read_turns, split_reply, split_transcript, take_reply

Kinds = Mapping[str, str]  # part -> kind of its values; without the parts that the source lacks
Names = Mapping[str, str]  # part -> its column
Sides = tuple[Any, Any]  # prompt and reply; None: missing


@dataclass(frozen=True)
class Shape:
    """How the values are written: `split(row, reply, names)` gives prompt and reply of one side, or raises BadRow.

    `passes_over`: parts that it does not look at, should the source have a column for them.
    """

    name: str
    description: str
    matches: Callable[[Kinds, Sequence[str]], bool]
    split: Callable[[Mapping[str, Any], str, Names], Sides]
    is_text: bool = False
    is_transcript: bool = False
    prompt_may_be_empty: bool = False
    passes_over: tuple[str, ...] = ()


def _split_texts(row: Mapping[str, Any], reply: str, names: Names) -> Sides:
    for part in ("prompt", reply):
        if not isinstance(row.get(part), str | None):
            raise BadRow(f"'{names[part]}' is not text")
    return row.get("prompt"), row[reply]


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
    before, answer = take_reply(turns, names[reply])
    asked, said = split_reply(prompt)
    if turns[: len(prompt)] == prompt and len(turns) > len(prompt):
        # A prompt may end in the assistant's own words, which are then no part of the reply.
        before, answer = (before, answer) if len(before) >= len(prompt) else (prompt, turns[len(prompt) :])
    elif all(turn["role"] == "system" for turn in before):
        before = before + prompt
    elif not isinstance(row["prompt"], str) and not (said and before == asked):  # else it ends in a reply of its own
        raise BadRow(f"'{names[reply]}' has turns before its last reply that are not those of '{names['prompt']}'")
    return prepend_system(row.get("system"), before), answer


def _split_dialogue(row: Mapping[str, Any], reply: str, names: Names) -> Sides:
    if row[reply] is None:
        return None, None
    turns, answer = take_reply(read_turns(row[reply], names[reply], "assistant"), names[reply])
    return prepend_system(row.get("system"), turns), answer


def _split_transcripts(row: Mapping[str, Any], reply: str, names: Names) -> Sides:
    if row[reply] is None:
        return None, None
    if not isinstance(row[reply], str):
        raise BadRow(f"'{names[reply]}' is not text")
    turns, answer = take_reply(split_transcript(row[reply]), names[reply])
    return prepend_system(row.get("system"), turns), answer


def _split_alike(row: Mapping[str, Any], reply: str, names: Names) -> Sides:
    """A text whose prompt is what the text of the other side begins with too."""
    chosen, rejected = (row.get(part) for part in ("chosen", "rejected"))
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        wrong = next((part for part in ("chosen", "rejected") if not isinstance(row.get(part), str | None)), None)
        if wrong is not None:
            raise BadRow(f"'{names[wrong]}' is not text")
        return None, row[reply]
    prompt = find_prompt(chosen, rejected)
    if not prompt:
        raise BadRow(f"'{names['chosen']}' and '{names['rejected']}' do not begin alike: there is no prompt")
    return prompt, row[reply][len(prompt) :]


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
        "whole texts, trained on in full",
        lambda kinds, replies: replies == ("text",) and _all(kinds, replies, TEXT),
        _split_whole_text,
        is_text=True,
        prompt_may_be_empty=True,
    ),
    Shape(
        "transcripts",
        "'Human: ... Assistant: ...' transcripts; everything before the last reply is the prompt",
        lambda kinds, replies: "transcript" in kinds.values() and _all(kinds, replies, ("transcript",)),
        _split_transcripts,
        is_transcript=True,
        passes_over=("prompt",),
    ),
    Shape(
        "texts that begin alike",
        "texts that begin alike; what both begin with, up to a whole word, is the prompt",
        lambda kinds, replies: "prompt" not in kinds and _all(kinds, ("chosen", "rejected"), ("text",)),
        _split_alike,
        is_text=True,
    ),
    Shape(
        "texts with a system prompt",
        "prompt and replies are texts, after a system turn",
        lambda kinds, replies: "system" in kinds and _all(kinds, ("system", "prompt", *replies), TEXT),
        _split_texts_with_system,
    ),
    Shape(
        "texts",
        "prompt and replies are texts",
        lambda kinds, replies: _all(kinds, ("prompt", *replies), TEXT),
        _split_texts,
        is_text=True,
        passes_over=("system",),
    ),
    Shape(
        "messages with a prompt",
        "messages, the prompt in its own column",
        lambda kinds, replies: "prompt" in kinds and _any_messages(kinds, ("prompt", *replies)),
        _split_with_prompt,
    ),
    Shape(
        "messages",
        "message lists; everything before the last reply is the prompt",
        lambda kinds, replies: "prompt" not in kinds and _all(kinds, replies, ("messages",)),
        _split_dialogue,
    ),
)


def find_shape(name: str) -> Shape:
    """The shape of that name."""
    return next(shape for shape in SHAPES if shape.name == name)
