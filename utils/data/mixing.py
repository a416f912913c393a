"""Several sources as one table: what each brings, drawn by share or count, written in one way, its places kept."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from ..errors import UserError
from .conversion import PLAIN_TURNS, WHOLE_TURNS
from .files import quiet
from .identity import read_pair_ids
from .places import Place
from .row_cache import map_rows
from .splitting import draw_numbers
from .wishes import Wish

ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant", "completion": "assistant"}
FIRST_COLUMNS = ("prompt", "chosen", "rejected", "completion")


def draw_positions(rows: datasets.Dataset, wish: Wish, seed: int) -> np.ndarray:
    """Where the rows stand that are drawn, by a hash of the seed and of what each says; ascending.

    Raises UserError where there are fewer than wished.
    """
    if wish.share is None and wish.count is None:
        return np.arange(len(rows))
    count = wish.count if wish.count is not None else max(1, round(wish.share * len(rows)))
    if count > len(rows):
        raise UserError(
            f"--dataset_name {wish.written}: has only {len(rows):,} good rows; lower the number or leave it out"
        )
    numbers = draw_numbers((f"draw {name}" for name in read_pair_ids(rows)), seed)
    return np.sort(np.argsort(numbers, kind="stable")[:count])


def align(
    tables: Sequence[datasets.Dataset], names: Sequence[str], starts: Sequence[int], to_messages: bool
) -> list[datasets.Dataset]:
    """The tables with the same columns and a `source`; each `row` counts from its table's start."""
    kinds = {name: kind for table in tables for name, kind in table.features.items()}
    keeps_extra = any(table.features[name] == WHOLE_TURNS for table in tables for name in table.features)
    if to_messages or keeps_extra:
        turns = WHOLE_TURNS if keeps_extra else PLAIN_TURNS
        kinds |= dict.fromkeys((name for name in FIRST_COLUMNS if name in kinds), turns)
    features = datasets.Features(kinds | {"source": datasets.Value("string")})
    aligned = []
    for table, name, start in zip(tables, names, starts, strict=True):
        if len(table) == 0:  # of which map() would keep the columns that it had
            aligned.append(datasets.Dataset.from_dict({column: [] for column in features}, features=features))
            continue
        with quiet(table.data.nbytes):
            aligned.append(
                map_rows(
                    table,
                    _align_batch,
                    decides=(name, start, sorted(features), to_messages, keeps_extra),
                    batched=True,
                    fn_kwargs={"source": name, "start": start, "columns": list(features), "to_messages": to_messages},
                    features=features,
                    remove_columns=table.column_names,
                    desc=f"Reading {name}",
                )
            )
    return aligned


def _align_batch(
    batch: Mapping[str, list[Any]], source: str, start: int, columns: list[str], to_messages: bool
) -> dict[str, list[Any]]:
    count = len(batch["row"])
    output = {name: batch.get(name, [None] * count) for name in columns}
    if to_messages:
        output |= {name: [_as_turns(v, ROLES[name]) for v in output[name]] for name in ROLES if name in output}
    return output | {"row": [start + row for row in batch["row"]], "source": [source] * count}


def _as_turns(value: Any, role: str) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


class MixedPlaces:
    """Places of the rows of several tables: table k holds the rows from `starts[k]` on."""

    def __init__(self, starts: Sequence[int], places: Sequence[Place]) -> None:
        self._starts = list(starts)
        self._places = list(places)

    def __call__(self, index: int) -> str:
        """The place of row `index` in its own table."""
        table = bisect.bisect_right(self._starts, index) - 1
        return self._places[table](index - self._starts[table])


def count_repeated(tables: Sequence[datasets.Dataset]) -> list[int]:
    """How many rows of each table say the same as a row of a table before it."""
    seen = np.zeros(0, dtype=np.uint64)
    repeated = []
    for table in tables:
        own = _read_ids(table)
        repeated.append(int(np.isin(own, seen).sum()))
        seen = np.concatenate([seen, own])
    return repeated


def _read_ids(table: datasets.Dataset) -> np.ndarray:
    """What each row says as a number, 8 bytes of each."""
    names = bytearray()
    for name in read_pair_ids(table):
        names += bytes.fromhex(name)
    return np.frombuffer(names, dtype=np.uint64)
