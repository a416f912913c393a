"""The place of a row, for messages: a line of a file, or a row of a split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Place = Callable[[int], str]  # index of a row in its source -> "pairs.jsonl line 41"

SHOWN = 5  # places named per fault
FEW = 100  # of so many rows one bad row is too many to be skipped unasked


@dataclass(frozen=True)
class FileLines:
    """The rows of one file: row k stands at `unit` number `numbers[k]`, counted from 1."""

    name: str
    unit: str  # "line" or "row"
    numbers: Sequence[int]


class FilePlaces:
    """Places of rows that were read from files, in order. The files are scanned on the first question only."""

    def __init__(self, label: str, rows: int, scan: Callable[[], list[FileLines]]) -> None:
        self._label = label
        self._rows = rows
        self._scan = scan

    @cached_property
    def _files(self) -> list[FileLines]:
        try:
            files = self._scan()
        except Exception:  # the rows are already read; a failed second look only costs the line number
            return []
        # Several objects on one line, or one object over several: then a count of lines would name the wrong one.
        return files if sum(len(file.numbers) for file in files) == self._rows else []

    def __call__(self, index: int) -> str:
        """The file and line of row `index` (from 0); the file and row where lines cannot be told."""
        before = 0
        for file in self._files:
            if index < before + len(file.numbers):
                return f"{file.name} {file.unit} {file.numbers[index - before]}"
            before += len(file.numbers)
        return f"{self._label} row {index + 1}"


def row_places(label: str) -> Place:
    """Places of rows that are in no readable file: "name[train] row 12"."""
    return lambda index: f"{label} row {index + 1}"


def list_places(places: Sequence[str], count: int) -> str:
    """The first places of `count`, what they share said once: "pairs.jsonl line 41, 52, 77, 90, 93, ..."."""
    split = [place.rpartition(" ") for place in places[:SHOWN]]
    groups = [
        f"{head} {', '.join(number for _, _, number in group)}"
        for head, group in groupby(split, key=lambda parts: parts[0])
    ]
    return "; ".join(groups) + (", ..." if count > SHOWN else "")


def stops(bad: int, rows: int, on_bad_rows: str) -> bool:
    """Whether `bad` of the rows stop the run, by the value of --on_bad_rows."""
    return bad > 0 and (on_bad_rows == "error" or (on_bad_rows == "skip_few" and bad * FEW >= rows))


def describe_skipped(bad: Mapping[str, Sequence[str]], counts: Mapping[str, int], rows: int) -> str:
    """One line that counts the rows which are left out, and places the first of each reason.

    Args:
        bad: reason -> the first places.
        counts: reason -> how many rows there are.
    """
    total = sum(counts.values())
    reasons = "; ".join(
        f"{reason} in {counts[reason]:,} ({list_places(bad[reason], counts[reason])})" for reason in bad
    )
    are = "row is" if total == 1 else "rows are"
    return f"data: {total:,} bad {are} skipped, fewer than 1% of {rows:,}: {reasons}. --on_bad_rows error stops instead"


def describe_bad_rows(reason: str, places: Sequence[str], count: int, detail: str = "") -> str:
    """One line for one reason: what, how often, the first five places, and what to do."""
    rows, them = ("row", "it") if count == 1 else ("rows", "them")
    note = f"; {'' if count == 1 else 'the first: '}{detail}" if detail else ""
    return (
        f"{reason} in {count} {rows} ({list_places(places, count)}{note}). "
        f"Fix {them}, or pass --on_bad_rows skip (skipped rows are counted)."
    )


def describe_all_bad(bad: Mapping[str, Sequence[int] | np.ndarray], place: Place) -> list[str]:
    """A line for each reason; `place` says where what stands under it is found."""
    return [describe_bad_rows(reason, [place(at) for at in rows[:SHOWN]], len(rows)) for reason, rows in bad.items()]


def describe_nothing_left(flag: str, dropped: Mapping[str, int]) -> str:
    """That no row is left of the data that a flag names, and for which reasons."""
    found = ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "there are no rows"
    return f"{flag}: no usable row is left ({found})"
