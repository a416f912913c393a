"""What a source holds beside the parts that are read, where leaving it out may not be what is meant."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from .calls import is_nothing
from .files import AnyJson
from .turns import MEDIA, WRITTEN_START, holds_messages

# Columns whose content belongs to a prompt or a reply.
CONTENT = ("tools", "functions", "tool_calls", "system", "system_prompt", "history", "chat_template_kwargs", *MEDIA)
SPLIT_COLUMNS = ("split", "set", "subset", "partition", "fold", "data_split", "dataset_split")
HELD_OUT = re.compile(r"(test|testing|val|valid|validation|dev|eval|evaluation|held|heldout|hold|holdout)([\W_]|$)")


@dataclass(frozen=True)
class Remark:
    """`title` is what was found, to be read after the number of `rows`; `advice` what to do."""

    name: str
    title: str
    advice: str
    rows: int


def list_unused(rows: datasets.Dataset, used: Collection[str]) -> list[str]:
    """The columns that are not read, those that carry content first."""
    unused = [name for name in rows.column_names if name not in used]
    return sorted(unused, key=lambda name: _plain(name) not in CONTENT)


def find_remarks(rows: datasets.Dataset, unused: Sequence[str]) -> Iterator[Remark]:
    """Content that is not read, and rows that their own column marks as held out."""
    for name in unused:
        if _plain(name) in CONTENT and (count := _count_filled(rows, name)):
            yield Remark(
                "unused_content",
                f"{_rows(count)} whose '{name}' is not used",
                "The model does not see it; leave out rows whose prompt or replies need it.",
                count,
            )
        if _plain(name) in SPLIT_COLUMNS and (words := _count_held_out(rows, name)):
            listed = ", ".join(f"{count:,} {word}" for word, count in words.items())
            count = sum(words.values())
            yield Remark(
                "split_column",
                f"{_rows(count)} that '{name}' marks as held out ({listed}): it is not read, train trains on them too",
                "Write each split to its own file, train.jsonl and test.jsonl in one folder.",
                count,
            )


def find_written_messages(rows: datasets.Dataset, columns: Sequence[str]) -> Iterator[Remark]:
    """Message lists written as text in columns that are read as texts, for most of their texts are none."""
    for name in columns:
        is_json = isinstance(rows.features[name], AnyJson)
        batches = rows.select_columns([name]).with_format("arrow").iter(batch_size=1000)
        count = sum(_count_written(batch.column(name), is_json) for batch in batches)
        if count:
            yield Remark(
                "messages_as_text",
                f"{_rows(count)} whose '{name}' is a message list written as text",
                "It is read as a text, brackets and all, as the others are; write all of them in one way.",
                count,
            )


def _count_written(column: pa.ChunkedArray, is_json: bool) -> int:
    if not pa.types.is_string(column.type) and not pa.types.is_large_string(column.type):
        return 0
    begins = '^"' if is_json else f"^({WRITTEN_START.pattern})"
    like = column.filter(pc.match_substring_regex(column, begins)).to_pylist()
    return sum(map(holds_messages, map(json.loads, like) if is_json else like))


def _rows(count: int) -> str:
    return "row" if count == 1 else "rows"


def _plain(name: str) -> str:
    return name.strip().casefold()


def _count_filled(rows: datasets.Dataset, name: str) -> int:
    """How many rows have something in a column; of media, as they are stored."""
    batches = rows.select_columns([name]).with_format("arrow").iter(batch_size=1000)
    return sum(_count_values(batch.column(name)) for batch in batches)


def _count_values(column: pa.ChunkedArray) -> int:
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pc.sum(pc.greater(pc.list_value_length(column), 0)).as_py() or 0
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return sum(not is_nothing(value) and value not in ("null", "[]", "{}") for value in column.to_pylist())
    return len(column) - column.null_count


def _count_held_out(rows: datasets.Dataset, name: str) -> dict[str, int]:
    """The rows that each word for held-out data marks; none where all rows have one mark, so are one split."""
    words = Counter(_list_words(rows, name))
    held_out = {word: count for word, count in words.items() if HELD_OUT.match(_plain(word))}
    return held_out if len(words) > 1 else {}


def _list_words(rows: datasets.Dataset, name: str) -> Iterator[str]:
    """The texts of a column, and the names of its classes."""
    kind = rows.features[name]
    names = kind.names if isinstance(kind, datasets.ClassLabel) else None
    if (
        names is None
        and not isinstance(kind, AnyJson)
        and getattr(kind, "dtype", None) not in ("string", "large_string")
    ):
        return
    for batch in rows.select_columns([name]).iter(batch_size=1000):
        for value in batch[name]:
            if isinstance(value, str):
                yield value
            elif names is not None and value is not None and 0 <= value < len(names):
                yield names[value]
