"""What a row gives its chat template beside messages and tools: arguments by name, and documents to answer from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from ..settings.flags import TEMPLATE_KWARGS
from .calls import BadRow
from .layouts import DOCUMENTS, KWARGS

TOLD = ("tools", KWARGS)  # columns of converted rows


class Options(TypedDict):
    """Arguments by which `PromptEncoder` and generation take what rows give their template."""

    tools: list[str | None]
    kwargs: list[str | None]


def told(row: Mapping[str, Any]) -> dict[str, str]:
    """What the template of a converted row is given beside the messages: its JSON texts by column."""
    return {name: row[name] for name in TOLD if row.get(name)}


def as_options(rows: Sequence[Mapping[str, str]]) -> Options:
    """What `told` says of several rows, as `PromptEncoder` and generation take it."""
    return Options(tools=[row.get("tools") for row in rows], kwargs=[row.get(KWARGS) for row in rows])


def list_documents(value: Any) -> list[Any] | None:
    """The documents that a value holds, a list of objects or its JSON text; None where it holds something else."""
    read = _parse(value)
    return read if isinstance(read, list) and all(isinstance(item, Mapping) for item in read) else None


def kwargs_text(parts: Mapping[str, Any], names: Mapping[str, str]) -> str | None:
    """All that a row gives its template, as one JSON text; None where that is nothing.

    Raises BadRow for arguments that are no object or are given anyway, and for documents that are no objects.
    """
    given: dict[str, Any] = {}
    documents = parts.get(DOCUMENTS)
    if documents:
        given[DOCUMENTS] = list_documents(documents)
        if given[DOCUMENTS] is None:
            raise BadRow(f"'{names.get(DOCUMENTS, DOCUMENTS)}' is not a list of objects, one for each document")
    if parts.get(KWARGS):
        read, name = _parse(parts[KWARGS]), names.get(KWARGS, KWARGS)
        if not isinstance(read, Mapping):
            raise BadRow(f"'{name}' is not a JSON object")
        if not TEMPLATE_KWARGS.holds(read):
            raise BadRow(f"'{name}' must be {TEMPLATE_KWARGS.text}")
        given |= read
    return json.dumps(given, ensure_ascii=False) if given else None


def read_kwargs(text: str | None) -> dict[str, Any]:
    """What `kwargs_text` wrote."""
    return json.loads(text) if text else {}


def holds_documents(values: Sequence[Any]) -> bool:
    """Whether the values of a column are documents: some of them are lists of objects."""
    return any(list_documents(value) for value in values if value)


def _parse(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None
