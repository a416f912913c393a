"""Rows that cannot be trained on: found, counted by reason, reported with their places, or left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from ..errors import UserError
from .places import SHOWN, Place, describe_bad_rows
from .ranking import LEFT_OUT

MOST_CHARACTERS = 16 << 20  # of a row: millions of tokens, more than any model reads, and memory for each of them


@dataclass(frozen=True)
class CheckedRows:
    """The good rows, in order. `dropped`: reason -> how many rows were left out for it."""

    rows: datasets.Dataset
    dropped: dict[str, int]


def check_rows(
    converted: datasets.Dataset,
    place: Place,
    on_bad_rows: str,
    max_samples: int | None = None,
    flag: str = "--dataset_name",
) -> CheckedRows:
    """The good rows, the first `max_samples` of them when that is given; rows after those are not looked at.

    Raises UserError, one line per reason, for bad rows unless `on_bad_rows` is "skip"; and when no row is left. Rows
    that are left out on purpose (ties, say) are counted and never an error.
    """
    is_good = _find_good(converted)
    good = np.flatnonzero(is_good)
    if max_samples is not None and len(good) >= max_samples:
        good = good[:max_samples]
        is_good = is_good[: good[-1] + 1]
    bad: dict[str, list[int]] = {}  # reason -> rows of the source
    if not is_good.all():
        told = converted.select_columns(["row", "reason"]).select(np.flatnonzero(~is_good))[:]
        for row, reason in zip(told["row"], told["reason"], strict=True):
            bad.setdefault(reason, []).append(row)
    faults = {reason: rows for reason, rows in bad.items() if reason not in LEFT_OUT}
    if faults and on_bad_rows == "error":
        raise UserError(
            *(
                describe_bad_rows(reason, [place(row) for row in rows[:SHOWN]], len(rows))
                for reason, rows in faults.items()
            )
        )
    dropped = {reason: len(rows) for reason, rows in bad.items()}
    if not len(good):
        found = ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "there are no rows"
        raise UserError(f"{flag}: no usable row is left ({found})")
    rows = converted if len(good) == len(converted) else converted.select(good)
    return CheckedRows(rows.remove_columns("reason"), dropped)


def _find_good(converted: datasets.Dataset) -> np.ndarray:
    """Whether each row has no reason against it, shape (rows,)."""
    return converted.select_columns(["reason"]).with_format("arrow")[:]["reason"].is_null().to_numpy()


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
    return len(value or "") if not isinstance(value, list) else sum(len(turn["content"]) for turn in value)


def _is_blank(value: str | list[dict[str, str]]) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return not any(turn["content"].strip() for turn in value if turn["role"] != "system")


def _stripped(value: str | list[dict[str, str]]) -> str | list[str]:
    return value.strip() if isinstance(value, str) else [turn["content"].strip() for turn in value]
