"""Why a converted row cannot be trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .calls import said_by, turn_key

MOST_CHARACTERS = 16 << 20  # of a row: millions of tokens, more than any model reads, and memory for each of them


def find_fault(row: Mapping[str, Any], labels: Mapping[str, str], prompt_may_be_empty: bool = False) -> str | None:
    """Why a converted row cannot be trained on, or None. At most one reason, in a fixed order.

    `labels` are the row's columns, prompt first, each with the name by which its source knows it.
    """
    if sum(_length(row[name]) for name in labels) > MOST_CHARACTERS:
        return f"the row has more than {MOST_CHARACTERS:,} characters"
    for name, label in labels.items():
        if name == "prompt" and prompt_may_be_empty:
            continue
        if row[name] is None:
            return f"'{label}' is missing"
        if _is_blank(row[name]):
            return f"'{label}' is empty"
    if "rejected" in labels and _stripped(row["rejected"]) == _stripped(row["chosen"]):
        return f"'{labels['rejected']}' equals '{labels['chosen']}'"
    return None


def _length(value: str | list[dict[str, str]] | None) -> int:
    """Characters of a text, or of all turns."""
    return len(value or "") if not isinstance(value, list) else sum(len(said_by(turn)) for turn in value)


def _is_blank(value: str | list[dict[str, str]]) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return not any(said_by(turn).strip() for turn in value if turn["role"] != "system")


def _stripped(value: str | list[dict[str, str]]) -> str | list[tuple[str, ...]]:
    return value.strip() if isinstance(value, str) else list(map(turn_key, value))
