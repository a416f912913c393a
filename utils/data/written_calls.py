"""Tool calls that turns hold as text, in tags or as an action with its input, for rows that declare their tools.

Such rows are read as rows with calls in fields of their own, so a template writes calls in the form of its model. In
rows that declare no tools the text is the protocol of the data, and stays as it is.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from .calls import RESULT_ROLES, BadRow, Turn, extra_of, make_turn, read_calls

CALL = re.compile(r"<(?P<tag>tool_call|TOOLCALL)>\s*(?P<calls>.*?)\s*</(?P=tag)>", re.DOTALL)
ACTION = re.compile(
    r"^Action:[ \t]*(?P<name>\S[^\n]*?)[ \t]*\nAction Input:[ \t]*(?P<input>.*?)\s*(?=^Action:|\Z)",
    re.DOTALL | re.MULTILINE,
)
RESULT = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
CALL_MARKS = ("<tool_call>", "<TOOLCALL>", "Action Input:")
RESULT_MARK = "<tool_response>"


def holds_written(text: str) -> bool:
    """Whether a text may hold such calls or results."""
    return any(mark in text for mark in (*CALL_MARKS, RESULT_MARK))


def holds_call(text: str) -> bool:
    """Whether a text has the form of such a call."""
    may = any(mark in text for mark in CALL_MARKS)
    return may and any(form.search(text) is not None for form in (CALL, ACTION))


def read_written(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with calls and results that were written in their texts in fields of their own."""
    return [read for turn in turns for read in _read_turn(turn)]


def _read_turn(turn: Turn) -> list[Turn]:
    text = turn["content"]
    if not holds_written(text):
        return [turn]
    if turn["role"] in RESULT_ROLES:
        return _read_results(turn, text)
    extra = extra_of(turn)
    if turn["role"] != "assistant" or "tool_calls" in extra:
        return [turn]
    for form, read in ((CALL, _read_tag), (ACTION, _read_action)):
        found = list(form.finditer(text))
        if not found or form.sub("", text[found[0].start() :]).strip():
            continue  # none, or the model goes on to speak behind a call, which no field can say
        try:
            calls = [call for part in found for call in read(part)]
        except (BadRow, ValueError, SyntaxError, RecursionError, MemoryError):
            continue  # it stays the text that it is
        before = text[: found[0].start()].strip()
        extra = {key: value for key, value in extra.items() if key != "content"} | {"tool_calls": calls}
        return [make_turn("assistant", before or None, extra)]
    return [turn]


def _read_tag(found: re.Match[str]) -> list[dict[str, Any]]:
    return read_calls(_read_value(found["calls"]), "")


def _read_action(found: re.Match[str]) -> list[dict[str, Any]]:
    arguments = _read_value(found["input"])
    if not isinstance(arguments, dict):
        raise ValueError("no object")
    return read_calls({"name": found["name"], "arguments": arguments}, "")


def _read_value(text: str) -> Any:
    """A value in JSON, or as Python prints it."""
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)


def _read_results(turn: Turn, text: str) -> list[Turn]:
    found = list(RESULT.finditer(text))
    if not found or RESULT.sub("", text).strip():
        return [turn]
    return [{**turn, "content": part[1]} for part in found]
