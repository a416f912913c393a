"""What a label says: which of two answers is the better one, a number, or yes and no.

A number means what the columns' own names say (`response_1` and `response_2`: 1 and 2). Whether a source counts so is
judged by its whole column: of a source that counts from 0, each row with a 1 would look right and be read the wrong
way round, so one number that the names do not explain refuses all rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import pyarrow.compute as pc

from ..errors import UserError
from .calls import BadRow
from .layouts import SIGNED_LABELS

TIE_WORDS = {"tie", "ties", "tie (bothbad)", "both", "bothbad", "both bad", "equal", "same", "neither", "none", ""}
SHOWN_NUMBERS = 5

Names = Mapping[str, str]  # part -> its column: first, second and label


def read_number(value: Any) -> float | None:
    """A finite number, also one written as text; None for anything else ("N/A", NaN, true)."""
    number = _as_float(value)
    return number if number is not None and math.isfinite(number) else None


def read_yes_or_no(value: Any) -> bool | None:
    """True or false, also written as text (CSV has nothing else); None for anything else."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().casefold())
    return value if isinstance(value, bool) else None


def _as_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def find_better(label: Any, names: Names, numbered: bool) -> int | None:
    """0 or 1, whichever answer the label names; None for a tie.

    `numbered`: the column holds numbers, so a label that says nothing is missing and no tie. Raises BadRow for that,
    and for a label that names neither answer.
    """
    word = _word_of(label)
    if numbered and word in ("", "nan"):
        raise BadRow(f"'{names['label']}' is missing")
    if word in TIE_WORDS:
        return None
    number = _named_answer(label, word, names)
    if number is None:
        raise BadRow(f"'{names['label']}' names neither '{names['first']}' nor '{names['second']}'")
    return number


def _word_of(label: Any) -> str:
    """The label as a word, whole numbers without a fraction ("1.0": 1); "" for none."""
    if label is None:
        return ""
    number = read_number(label)
    return str(int(number)) if number is not None and number.is_integer() else str(label).strip().casefold()


def _named_answer(label: Any, word: str, names: Names) -> int | None:
    first, second = names["first"], names["second"]
    if first == "human_ref_A" and word in ("0", "1"):
        return 1 - int(word)  # SHP: 1 is A
    for number, name in enumerate((first, second)):
        ending = _endings(first, second)[number]
        if not isinstance(label, bool) and word in (name.casefold(), ending, f"model_{ending}", f"response_{ending}"):
            return number
    return None


def _endings(first: str, second: str) -> tuple[str, str]:
    """By what the two names differ: a and b, 0 and 1, 1 and 2."""
    shared = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
    return first[shared:].casefold(), second[shared:].casefold()


def label_column(names: Names) -> str | None:
    """The column that names the better of two answers, where the source has one."""
    label = names.get("label") if {"first", "second"} <= set(names) else None
    return None if label in SIGNED_LABELS else label


def check_labels(rows: datasets.Dataset, names: Names) -> bool:
    """Whether the labels of all rows are numbers; False too where nothing names the better answer.

    Raises UserError where one is a number that the columns' names do not explain.
    """
    column = label_column(names)
    if column is None or column not in rows.column_names:
        return False
    return bool(read_numbers(_distinct(rows.select_columns([column]), column), names))


def _distinct(rows: datasets.Dataset, column: str) -> Iterable[Any]:
    """The different texts and numbers of a column."""
    kind = rows.features[column]
    if isinstance(kind, datasets.Value | datasets.ClassLabel):
        return pc.unique(rows.with_format("arrow")[:][column]).to_pylist()
    batches = rows.iter(batch_size=1000)  # of many types, which the table holds as JSON
    scalars = (value for batch in batches for value in batch[column] if isinstance(value, str | int | float))
    return {repr(value): value for value in scalars}.values()  # by value, no would hide 0


def read_numbers(labels: Iterable[Any], names: Names) -> set[str]:
    """The numbers among the labels, as words. Raises UserError where the columns' names do not explain one of them."""
    numbers = {_word_of(label) for label in labels if _has_number(label, names)}
    unexplained = sorted(word for word in numbers if _named_answer(word, word, names) is None)
    if not unexplained:
        return numbers
    shown = ", ".join(unexplained[:SHOWN_NUMBERS]) + (", ..." if len(unexplained) > SHOWN_NUMBERS else "")
    raise UserError(
        f"'{names['label']}' holds {shown}, which fits the name of neither '{names['first']}' nor "
        f"'{names['second']}': which "
        "answer its numbers mean is unclear, so none of its rows is read. Rename the two "
        "columns by their numbers (response_0 and response_1, say), or read the rows with --dataset_adapter "
        "file.py:function"
    )


def _has_number(value: Any, names: Names) -> bool:
    """Whether a label is a number, or a word that ends in one ("model_1") and names the answers by it."""
    word = _word_of(value)
    first, second = names["first"].casefold(), names["second"].casefold()
    stem = first.removesuffix(_endings(first, second)[0])
    for prefix in ("model_", "response_", stem):
        word = word.removeprefix(prefix)
    number = _as_float(word)
    return number is not None and not isinstance(value, bool) and not math.isnan(number)
