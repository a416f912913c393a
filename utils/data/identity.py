"""What a prompt or a pair is, in a few bytes: the same in every run, file and process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from .calls import EXTRA

if TYPE_CHECKING:
    from datasets import Dataset

SAID = ("prompt", "chosen", "rejected", "completion")


def hash_value(value: Any, size: int = 16) -> bytes:
    """A hash of a text or a list of messages, in `size` bytes: of turns with text alone, of that text and the role."""
    value = _without_nothing(value)
    return blake2b(json.dumps(value, ensure_ascii=True).encode(), digest_size=size).digest()


def _without_nothing(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nothing(item) for item in value]
    if isinstance(value, dict) and value.get(EXTRA, "") is None:
        return {key: item for key, item in value.items() if key != EXTRA}
    return value


def pair_id(row: Mapping[str, Any]) -> str:
    """16 characters that name what a row says (prompt and replies), wherever it was read."""
    return hash_value([row[name] for name in SAID if name in row], 8).hex()


def read_pair_ids(rows: Dataset) -> Iterator[str]:
    """`pair_id` of each row; the rows are read many at a time, one by one would take three times as long."""
    names = [name for name in SAID if name in rows.column_names]
    for batch in rows.select_columns(names).iter(batch_size=1000):
        for values in zip(*(batch[name] for name in names), strict=True):
            yield pair_id(dict(zip(names, values, strict=True)))
