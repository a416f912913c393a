"""What is inspected: the pairs of all sources, good and bad, with the split that a training run would make of them."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.parts import (
    POSITION,
    Joined,
    Part,
    check_part,
    convert_part,
    draw_part,
    join_parts,
    read_parts,
    split_joined,
    take_parts,
)
from ..data.schemas import Reading, check_effects
from ..data.wishes import Wish, read_wishes
from ..errors import UserError
from ..settings.data import DataSettings
from ..settings.training import Settings
from .scanning import choose_processes

SCORE_WORD = re.compile(r"score|rating|reward", re.IGNORECASE)


@dataclass(frozen=True)
class Subject:
    """All good pairs in use, those of the training splits first; `held_out` and `trained` say what a run does.

    `parts` are the training splits of all sources, then the held-out splits that those have of their own.
    """

    description: str
    reading: Reading  # in the words of all sources
    parts: tuple[Part, ...]
    pairs: datasets.Dataset  # of several sources with a column `source`
    held_out: np.ndarray  # (pairs,) bool
    trained: np.ndarray  # (pairs,) bool; pairs may be on neither side
    split: str  # how they were parted, as a phrase

    @cached_property
    def sources(self) -> tuple[Part, ...]:
        """The training split of each source."""
        return tuple(part for part in self.parts if not part.is_held_out)

    @cached_property
    def part_of(self) -> np.ndarray:
        """The index in `parts` of each pair."""
        return np.repeat(np.arange(len(self.parts)), [len(part.good) for part in self.parts])

    @property
    def source_of(self) -> np.ndarray:
        """The index in `sources` of each pair."""
        wishes = [source.wish for source in self.sources]
        return np.array([wishes.index(part.wish) for part in self.parts])[self.part_of]

    @property
    def in_training_split(self) -> np.ndarray:
        """(pairs,) bool: not from a held-out split that the source has of its own."""
        return self.part_of < len(self.sources)

    @property
    def unreadable(self) -> Counter[str]:
        """Lines that hold no row, by reason."""
        return sum((Counter(part.source.dropped) for part in self.sources), Counter())

    def find_place(self, pair: int) -> str:
        """The place of a pair, for messages."""
        part = self.parts[self.part_of[pair]]
        return part.find_place(part.good[pair - np.searchsorted(self.part_of, self.part_of[pair])])


def load_subject(settings: Settings) -> Subject:
    """Reads, converts, draws, mixes and splits the data as `train` would, but keeps what is wrong with it.

    Raises:
        UserError: there is nothing to inspect: no data, no known shape, or fewer good pairs than are to be drawn.
    """
    data, seed = dataclasses.replace(settings.data, on_bad_rows="skip"), settings.training.seed
    wishes = read_wishes(data.dataset_name)

    def take(wish: Wish) -> list[Part]:
        return [draw_part(_check(part, data), seed) for part in read_parts(wish, wishes, data, "train")]

    parts = take_parts(wishes, take)
    check_effects([part.reading for part in parts if not part.is_held_out], data)
    joined = join_parts(parts, numbered=True)
    pairs = [*joined.rows, *(rows for rows in joined.held_out if rows is not None)]
    held_out, trained, split = _divide(joined, parts, settings)
    return Subject(
        description=joined.description,
        reading=joined.reading,
        parts=tuple(parts),
        pairs=datasets.concatenate_datasets(pairs) if len(pairs) > 1 else pairs[0],
        held_out=held_out,
        trained=trained,
        split=split,
    )


def _check(part: Part, settings: DataSettings) -> Part:
    part = convert_part(part, settings.max_samples, choose_processes(len(part.rows)))
    return check_part(part, settings.on_bad_rows, settings.max_samples)


def _divide(joined: Joined, parts: Sequence[Part], settings: Settings) -> tuple[np.ndarray, np.ndarray, str]:
    """Which pairs `train` would hold out, which it would train on, and how they are split, or why they cannot be."""
    wish, seed = settings.data.validation_split, settings.training.seed
    count = sum(len(part.good) for part in parts)
    nothing, everything = np.zeros(count, dtype=bool), np.ones(count, dtype=bool)
    empty = dict.fromkeys(part.wish.written for part in parts if part.found == 0)
    if empty:
        return nothing, everything, f"train would stop: no good pair in {', '.join(empty)}"
    try:
        split = split_joined(joined, wish, seed)
    except UserError as error:
        return nothing, everything, f"train would stop: {error.faults[0]}"
    held_out, trained = (_mark(rows, count) for rows in (split.held_out, split.train))
    return held_out, trained, _describe_split(joined, wish, seed)


def _mark(rows: datasets.Dataset | None, count: int) -> np.ndarray:
    marks = np.zeros(count, dtype=bool)
    if rows is not None:
        marks[rows.with_format("numpy")[POSITION][:]] = True
    return marks


def _describe_split(joined: Joined, wish: str | None, seed: int) -> str:
    if wish == "none":
        return "no validation split"
    own = sum(rows is not None for rows in joined.held_out)
    made = f"the split that train makes with --seed {seed}"
    if own == 0:
        return made
    if len(joined.rows) == 1:
        return "the source's own held-out split"
    theirs = "the sources' own held-out splits"
    return theirs if own == len(joined.rows) else f"{theirs} where they have one, else {made}"


def read_scores(subject: Subject) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Per kind of columns with a score of each side: their names as a phrase, and both scores of each pair (NaN: none).

    The splits of one source, and sources whose columns are called alike, are taken together.
    """
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    start = 0
    for part in subject.parts:
        read = _read_part_scores(part)
        if read is not None:
            columns, *scores = read
            empty = np.full((2, len(subject.part_of)), np.nan)
            for all_of_side, own in zip(found.setdefault(columns, (empty[0], empty[1])), scores, strict=True):
                all_of_side[start : start + len(own)] = own
        start += len(part.good)
    return [(columns, *scores) for columns, scores in found.items()]


def _read_part_scores(part: Part) -> tuple[str, np.ndarray, np.ndarray] | None:
    names = _score_columns(part.rows.features)
    if names:  # the reading found them, or made the pair by them
        scores = (_read_numbers(part.rows, name)[part.good] for name in names)
        return " and ".join(part.reading.columns.get(name, name) for name in names), *scores
    names = _score_columns(part.found_rows.features)
    if names is None:
        return None
    indices = np.array(part.rows.with_format("numpy")["row"][:])[part.good]
    return " and ".join(names), *(_read_numbers(part.found_rows, name)[indices] for name in names)


def _score_columns(features: Mapping[str, Any]) -> tuple[str, str] | None:
    """Two numeric columns that differ in the words chosen and rejected alone and hold a score by their name."""
    numeric = set(_numeric_columns(features))
    for name in sorted(numeric):
        other = name.replace("chosen", "rejected")
        if other != name and other in numeric and SCORE_WORD.search(name):
            return name, other
    return None


def _numeric_columns(features: Mapping[str, Any], before: str = "") -> list[str]:
    names = []
    for name, feature in features.items():
        if isinstance(feature, Mapping):
            names += _numeric_columns(feature, f"{before}{name}.")
        elif isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint", "float")):
            names.append(before + name)
    return names


def _read_numbers(rows: datasets.Dataset, path: str) -> np.ndarray:
    if path in rows.column_names:
        values = rows.select_columns([path]).with_format("arrow")[:][path]
    else:
        head, *inner = path.split(".")
        values = pc.struct_field(rows.select_columns([head]).with_format("arrow")[:][head], inner)
    return values.cast(pa.float64()).fill_null(float("nan")).to_numpy()
