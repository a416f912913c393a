"""Columns of a table by name, dots reaching into nested fields, and the kind of values that they hold."""

from __future__ import annotations

import difflib
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .turns import as_messages, is_message, is_transcript, role_of, unpack

TEXT = ("text", "transcript")
MESSAGES = ("messages", "message", "replies")
KIND_NAMES = {
    "text": "texts",
    "transcript": "transcripts",
    "messages": "message lists",
    "message": "single messages",
    "replies": "assistant messages",
    "list": "lists",
    "object": "objects",
    "other": "values that are not text",
    "null": "nulls",
}
SHOWN_COLUMNS = 24

Rows = Sequence[Mapping[str, Any]]  # the first rows, as a sample


def reach(row: Mapping[str, Any], path: str) -> Any:
    """The value at a column, or at a dotted path into one; None where the row has nothing there."""
    if path in row:
        return row[path]
    inner = ((row.get(head), path[len(head) + 1 :]) for head in list_heads(path)[:-1])
    values = (reach(value, rest) for value, rest in inner if isinstance(value, Mapping))
    return next((value for value in values if value is not None), None)


def unpack_row(row: Mapping[str, Any], paths: Sequence[str]) -> Mapping[str, Any]:
    """The row with messages in place of the texts at these paths that hold them. Raises BadRow as `unpack` does."""
    for path in paths:
        row = _unpack_at(row, path, path)
    return row


def _unpack_at(row: Mapping[str, Any], path: str, name: str) -> Mapping[str, Any]:
    if path in row:
        return {**row, path: unpack(row[path], name)}
    for head in list_heads(path)[:-1]:
        if isinstance(row.get(head), Mapping):
            row = {**row, head: _unpack_at(row[head], path[len(head) + 1 :], name)}
    return row


@functools.cache
def list_heads(path: str) -> list[str]:
    """The columns in which a dotted path may begin, whose own names may have dots: a, a.b and a.b.c for a.b.c."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def list_columns(sample: Rows) -> list[str]:
    """Every column and nested field that occurs, dotted, in the order of the table."""
    names: dict[str, None] = {}
    for row in sample:
        for name, value in row.items():
            names[name] = None
            if isinstance(value, Mapping) and not is_message(value):
                names |= {f"{name}.{inner}": None for inner in list_columns([value])}
    return list(names)


def kind_of_column(sample: Rows, path: str) -> str:
    """What most of the sampled values are: one of KIND_NAMES."""
    counts = Counter(_kind(value) for value in (reach(row, path) for row in sample) if value is not None)
    return counts.most_common(1)[0][0] if counts else "null"


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "transcript" if is_transcript(value) else "text"
    if isinstance(value, list):
        return _kind_of_list(value)
    if isinstance(value, Mapping):
        messages = as_messages(value)
        return "object" if messages is None else "message" if messages == [value] else _kind_of_list(messages)
    return "other"


def _kind_of_list(value: list[Any]) -> str:
    if not all(is_message(item) for item in value):
        return "list"
    roles = set(map(role_of, value))
    return "replies" if value and roles == {"assistant"} else "messages"


def list_names(columns: Sequence[str]) -> str:
    """The columns for people, not more than fit in a message."""
    return ", ".join(columns[:SHOWN_COLUMNS]) + (", ..." if len(columns) > SHOWN_COLUMNS else "")


def describe_missing(flag: str, path: str, columns: Sequence[str]) -> str:
    """One line: the flag, the column it names, the nearest spelling and the columns there are."""
    near = difflib.get_close_matches(path, columns, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{flag} {path}: no such column; {hint}the data has: {list_names(columns)}"
