"""What is inspected: the pairs of all sources, good and bad, with the split that a training run would make of them."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data import joining
from ..data.joining import Joined, convert_enough, join_parts, open_source, split_joined
from ..data.mixing import Wish, draw_positions, read_wishes
from ..data.places import Place
from ..data.row_cache import flatten_rows
from ..data.schemas import Reading, check_effects
from ..data.sources import Source
from ..errors import UserError, gather
from ..settings.training import DataSettings, Settings
from .scanning import choose_processes

TRAIN, HELD_OUT = "train", "held-out"
POSITION = "position"  # column: the index of a pair among all
SCORE_WORD = re.compile(r"score|rating|reward", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """One split of one source as it was converted. `good` and `bad` are positions in `converted`.

    Of a training split only the pairs drawn by its share or number are in `good`; `found` counts all of them.
    """

    name: str
    source: int
    converted: datasets.Dataset
    place: Place
    good: np.ndarray
    bad: dict[str, np.ndarray]  # reason -> positions
    found: int


@dataclass(frozen=True)
class Origin:
    """One source of --dataset_name."""

    wish: Wish
    source: Source
    reading: Reading


@dataclass(frozen=True)
class Subject:
    """All good pairs in use, those of the training splits first; `held_out` and `trained` say what a run does.

    `parts` are the training splits in the order of `origins`, then the held-out splits that those have of their own.
    """

    origins: tuple[Origin, ...]
    description: str
    reading: Reading  # in the words of all sources
    parts: tuple[Part, ...]
    pairs: datasets.Dataset  # of several sources with a column `source`
    held_out: np.ndarray  # (pairs,) bool
    trained: np.ndarray  # (pairs,) bool; pairs may be on neither side
    split: str  # how they were parted, as a phrase

    @cached_property
    def part_of(self) -> np.ndarray:
        """The index in `parts` of each pair."""
        return np.repeat(np.arange(len(self.parts)), [len(part.good) for part in self.parts])

    @property
    def source_of(self) -> np.ndarray:
        """The index in `origins` of each pair."""
        return np.array([part.source for part in self.parts])[self.part_of]

    @property
    def in_training_split(self) -> np.ndarray:
        """(pairs,) bool: not from a held-out split that the source has of its own."""
        return self.part_of < len(self.origins)

    @property
    def unreadable(self) -> Counter[str]:
        """Lines that hold no row, by reason."""
        return sum((Counter(origin.source.dropped) for origin in self.origins), Counter())

    def find_place(self, pair: int) -> str:
        """Where a pair is found by the person who has to mend it."""
        part = self.parts[self.part_of[pair]]
        position = part.good[pair - np.searchsorted(self.part_of, self.part_of[pair])]
        return part.place(part.converted[int(position)]["row"])


def load_subject(settings: Settings) -> Subject:
    """Reads, converts, draws, mixes and splits the data as `train` would, but keeps what is wrong with it.

    Raises:
        UserError: there is nothing to inspect: no data, no known shape, or fewer good pairs than are to be drawn.
    """
    wish = dataclasses.replace(settings.data, on_bad_rows="skip")
    seed = settings.training.seed
    wishes = read_wishes(wish.dataset_name)
    read = gather(*(_reader(number, wishes, wish, seed) for number in range(len(wishes))))
    origins = tuple(origin for origin, _ in read)
    check_effects([origin.reading for origin in origins], wish)
    parts = tuple(sorted((part for _, own in read for part in own), key=lambda part: part.name != TRAIN))
    joined = join_parts(list(_number_pairs(origins, parts)))
    pairs = [*joined.rows, *(rows for rows in joined.held_out if rows is not None)]
    held_out, trained, split = _divide(joined, origins, parts, settings)
    return Subject(
        origins=origins,
        description=joined.description,
        reading=joined.reading,
        parts=parts,
        pairs=datasets.concatenate_datasets(pairs) if len(pairs) > 1 else pairs[0],
        held_out=held_out,
        trained=trained,
        split=split,
    )


def _reader(
    number: int, wishes: Sequence[Wish], settings: DataSettings, seed: int
) -> Callable[[], tuple[Origin, list[Part]]]:
    def read() -> tuple[Origin, list[Part]]:
        wish = wishes[number]
        source, reading = open_source(wish, wishes, settings, "train")
        wanted = settings.max_samples
        train = _read_part(TRAIN, number, source.rows, reading, source.place, wanted)
        drawn = train.good[draw_positions(train.converted.select(train.good), wish, seed)]
        parts = [dataclasses.replace(train, good=drawn)]
        if source.held_out_rows is not None:
            parts.append(_read_part(HELD_OUT, number, source.held_out_rows, reading, source.held_out_place, wanted))
        return Origin(wish, source, reading), parts

    return read


def _number_pairs(origins: Sequence[Origin], parts: Sequence[Part]) -> Iterator[joining.Part]:
    """The pairs in use of each source, with their position among all: in the order of `parts`."""
    tables: dict[tuple[int, str], datasets.Dataset] = {}
    start = 0
    for part in parts:
        rows = part.converted.select(part.good).remove_columns("reason")
        tables[part.source, part.name] = flatten_rows(rows).add_column(POSITION, np.arange(start, start + len(rows)))
        start += len(rows)
    for number, origin in enumerate(origins):
        rows, held_out = tables[number, TRAIN], tables.get((number, HELD_OUT))
        yield joining.Part(origin.wish, origin.source, origin.reading, rows, held_out)


def _read_part(
    name: str, number: int, rows: datasets.Dataset, reading: Reading, place: Place, wanted: int | None
) -> Part:
    """The part up to its `wanted`th good pair; what stands behind that is not looked at."""
    converted = convert_enough(rows, reading, wanted, choose_processes(len(rows)))
    good = np.flatnonzero(_reasons(converted).is_null().to_numpy())
    if wanted is not None and len(good) >= wanted:
        good = good[:wanted]
        converted = converted.select(range(int(good[-1]) + 1))
    reasons = _reasons(converted)
    names = [reason for reason in pc.unique(reasons).to_pylist() if reason is not None]
    bad = {name: np.flatnonzero(pc.fill_null(pc.equal(reasons, name), False).to_numpy()) for name in names}
    return Part(name, number, converted, place, good, bad, len(good))


def _reasons(converted: datasets.Dataset) -> pa.ChunkedArray:
    return converted.select_columns(["reason"]).with_format("arrow")[:]["reason"]


def _divide(
    joined: Joined, origins: Sequence[Origin], parts: Sequence[Part], settings: Settings
) -> tuple[np.ndarray, np.ndarray, str]:
    """Which pairs `train` would hold out, which it would train on, and how they are parted, or why they cannot be."""
    wish, seed = settings.data.validation_split, settings.training.seed
    count = sum(len(part.good) for part in parts)
    nothing, everything = np.zeros(count, dtype=bool), np.ones(count, dtype=bool)
    empty = dict.fromkeys(origins[part.source].wish.written for part in parts if part.found == 0)
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
        return "nothing is to be held out"
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
        origin = subject.origins[part.source]
        rows = origin.source.rows if part.name == TRAIN else origin.source.held_out_rows
        read = _read_part_scores(part, rows, origin.reading)
        if read is not None:
            columns, *scores = read
            empty = tuple(np.full(len(subject.part_of), np.nan) for _ in scores)
            for all_of_side, own in zip(found.setdefault(columns, empty), scores, strict=True):
                all_of_side[start : start + len(own)] = own
        start += len(part.good)
    return [(columns, *scores) for columns, scores in found.items()]


def _read_part_scores(
    part: Part, rows: datasets.Dataset, reading: Reading
) -> tuple[str, np.ndarray, np.ndarray] | None:
    names = _score_columns(part.converted.features)
    if names:  # the reading found them, or made the pair by them
        scores = (_read_numbers(part.converted, name)[part.good] for name in names)
        return " and ".join(reading.columns.get(name, name) for name in names), *scores
    names = _score_columns(rows.features)
    if names is None:
        return None
    indices = np.array(part.converted.with_format("numpy")["row"][:])[part.good]
    return " and ".join(names), *(_read_numbers(rows, name)[indices] for name in names)


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
