"""Several sources as one table: what each brings, drawn by share or count, written in one way, its places kept."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from ..errors import UserError
from ..run.paths import is_there
from .conversion import PLAIN_TURNS, WHOLE_TURNS
from .files import quiet
from .identity import read_pair_ids
from .places import Place
from .row_cache import map_rows
from .splitting import draw_numbers

ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant", "completion": "assistant"}
FIRST_COLUMNS = ("prompt", "chosen", "rejected", "completion")


@dataclass(frozen=True)
class Wish:
    """One source of --dataset_name: how much of it is wanted, as a share of its pairs or their number (None: all)."""

    name: str
    share: float | None = None
    count: int | None = None

    @property
    def written(self) -> str:
        """As the person wrote it."""
        amount = self.share if self.share is not None else self.count
        return self.name if amount is None else f"{self.name}:{amount:g}"


def read_wishes(dataset_name: str) -> list[Wish]:
    """The sources that --dataset_name lists: "a.jsonl,b:0.3,c:5000".

    A name that exists as it is written is one source. Raises UserError for what is neither a share nor a count, and
    for a source that stands twice.
    """
    if is_there(dataset_name):
        return [Wish(dataset_name)]
    items = [item.strip() for item in dataset_name.split(",")]
    if "" in items:
        raise UserError(f"--dataset_name {dataset_name}: a name is missing next to a comma")
    wishes = [_read_wish(item) for item in items]
    names = [wish.name for wish in wishes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(*(f"--dataset_name names {name} twice; name each source once" for name in twice))
    return wishes


def source_names(dataset_name: str) -> list[str]:
    """The names of the sources alone; none where two are the same, which reading them reports."""
    try:
        return [wish.name for wish in read_wishes(dataset_name)]
    except UserError:
        return []


def _read_wish(item: str) -> Wish:
    name, colon, amount = item.rpartition(":")
    if not colon or not name or is_there(item):
        return Wish(item)
    try:
        number = float(amount)
    except ValueError:
        return Wish(item)
    flag = f"--dataset_name {item}"
    if amount.isdigit() and number > 1:
        return Wish(name, count=int(amount))
    if amount == "1":
        raise UserError(f"{flag}: leave out :1 to take all of {name} (a whole number is a number of pairs)")
    if not 0 < number <= 1:
        raise UserError(f"{flag}: the number after the colon is a share of its pairs (0.3) or a count (5000)")
    return Wish(name, share=number)


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
