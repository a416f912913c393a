"""Reasoning in replies: where a turn has it, how it is left out, and where it stands in what a template renders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import escape

from .calls import EXTRA, REASONING, RESULT_ROLES, extra_of, reasoning_of
from .think_tags import KINDS

# What templates are given so that they render the reasoning of earlier turns too, where they read it.
SWITCHES = {"preserve_thinking": True, "truncate_history_thinking": False, "clear_thinking": False}

Span = tuple[int, int]


def split_block(content: str) -> tuple[str, str]:
    """The think block that a text begins with, without its tags, and what follows; ("", text) where it has none.

    The opening tag may be missing, as where the prompt ends with it.
    """
    for number, tags in enumerate(KINDS):
        opening = tags.opening.match(content)
        closing = tags.closing.search(content, opening.end() if opening else 0)
        if closing is None or (opening is None and (number or tags.anywhere.search(content[: closing.start()]))):
            continue
        return content[opening.end() if opening else 0 : closing.start()], content[closing.end() :]
    return "", content


def thought_of(turn: Mapping[str, Any]) -> str:
    """The reasoning of a turn of the assistant, in a field or in a think block at its beginning."""
    content = turn.get("content")
    if turn.get("role") != "assistant":
        return ""
    return (reasoning_of(turn) or (split_block(content)[0] if isinstance(content, str) else "")).strip()


def without_thought(turn: Mapping[str, Any]) -> dict[str, Any]:
    """The turn without its reasoning."""
    if turn.get("role") != "assistant":
        return dict(turn)
    content = turn.get("content")
    kept = {key: value for key, value in turn.items() if key not in REASONING}
    if kept.get(EXTRA):
        extra = {key: value for key, value in extra_of(turn).items() if key not in REASONING}
        kept[EXTRA] = json.dumps(extra, ensure_ascii=False) if extra else None
    if isinstance(content, str) and split_block(content)[0].strip():
        kept["content"] = split_block(content)[1].lstrip()
    return kept


def find_thoughts(text: str, reply: Sequence[Mapping[str, Any]], results: Sequence[Span]) -> tuple[Span, ...]:
    """Where the reasoning of a reply's turns stands in its text, with the think tags around it.

    `results`: where the results of tools stand, between which each of the assistant's turns is looked for.
    """
    spans: list[Span] = []
    place, passed = 0, 0
    for before, turn in zip([None, *reply], reply, strict=False):
        if turn["role"] in RESULT_ROLES and before is not None and before["role"] not in RESULT_ROLES:
            place = max(place, results[passed][1]) if passed < len(results) else len(text)
            passed += 1
        said = thought_of(turn)
        if not said:
            continue
        begin, end = _behind_tag(text, place), results[passed][0] if passed < len(results) else len(text)
        forms = (said, json.dumps(said, ensure_ascii=False)[1:-1], json.dumps(said)[1:-1], str(escape(said)))
        found = next(((at, at + len(form)) for form in forms if (at := text.find(form, begin, end)) >= 0), None)
        if found is not None:
            spans.append(_with_tags(text, place, *found))
            place = spans[-1][1]
    return tuple(spans)


def _behind_tag(text: str, place: int) -> int:
    openings = (tags.opening.match(text, place) for tags in KINDS)
    return next((opening.end() for opening in openings if opening), place)


def _with_tags(text: str, place: int, begin: int, end: int) -> Span:
    for tags in KINDS:
        opened, closed = tags.opened.search(text[place:begin]), tags.closed.match(text, end)
        begin = place + opened.start() if opened else begin
        end = closed.end() if closed else end
    return begin, end
