"""What is inspected: the pairs of a source, good and bad, with the split that a training run would make of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from utils.data.conversion import convert_rows
from utils.data.mixing import read_wishes
from utils.data.places import Place
from utils.data.schemas import Reading, find_reading
from utils.data.sources import Source, load_source
from utils.data.splitting import split_rows
from utils.errors import UserError
from utils.inspection.scanning import choose_processes
from utils.settings import Settings

SCORE_WORD = re.compile(r"score|rating|reward", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """One split of the source as it was converted. `good` and `bad` are positions in `converted`."""

    name: str
    converted: datasets.Dataset
    place: Place
    good: np.ndarray
    bad: dict[str, np.ndarray]  # reason -> positions


@dataclass(frozen=True)
class Subject:
    """All good pairs, those of the training split first; `held_out` and `trained` say what a run would do with them."""

    source: Source
    reading: Reading
    parts: tuple[Part, ...]
    pairs: datasets.Dataset
    held_out: np.ndarray  # (pairs,) bool
    trained: np.ndarray  # (pairs,) bool; pairs may be on neither side
    split: str  # how they were parted, as a phrase

    @property
    def part_of(self) -> np.ndarray:
        """The index in `parts` of each pair."""
        return np.repeat(np.arange(len(self.parts)), [len(part.good) for part in self.parts])

    def find_place(self, pair: int) -> str:
        """Where a pair is found by the person who has to mend it."""
        for part in self.parts:
            if pair < len(part.good):
                return part.place(part.converted[int(part.good[pair])]["row"])
            pair -= len(part.good)
        raise IndexError(pair)


def load_subject(settings: Settings) -> Subject:
    """Reads, converts and splits the data as `train` would, but keeps what is wrong with it.

    Raises:
        UserError: there is nothing to inspect: no data, no known shape, or not one good pair.
    """
    wish = dataclasses.replace(settings.data, on_bad_rows="skip")
    if len(read_wishes(settings.data.dataset_name)) > 1:
        raise UserError(f"--dataset_name {settings.data.dataset_name}: data looks at one source at a time; name one")
    source = load_source(wish, "train")
    if len(source.rows) == 0:
        raise UserError(f"--dataset_name {source.description}: has no rows")
    reading = find_reading(source.rows, wish, "train")
    parts = [_read_part("train", source.rows, reading, source.place)]
    if source.held_out_rows is not None:
        parts.append(_read_part("held-out", source.held_out_rows, reading, source.held_out_place))
    good = [part.converted.select(part.good) for part in parts]
    pairs = datasets.concatenate_datasets(good) if len(good) > 1 else good[0]
    held_out, trained, split = _divide(good, settings)
    return Subject(source, reading, tuple(parts), pairs, held_out, trained, split)


def _read_part(name: str, rows: datasets.Dataset, reading: Reading, place: Place) -> Part:
    converted = convert_rows(rows, reading, choose_processes(len(rows)))
    reasons = converted.select_columns(["reason"]).with_format("arrow")[:]["reason"]
    names = [reason for reason in pc.unique(reasons).to_pylist() if reason is not None]
    good = np.flatnonzero(reasons.is_null().to_numpy())
    bad = {name: np.flatnonzero(pc.fill_null(pc.equal(reasons, name), False).to_numpy()) for name in names}
    return Part(name, converted, place, good, bad)


def _divide(good: Sequence[datasets.Dataset], settings: Settings) -> tuple[np.ndarray, np.ndarray, str]:
    """Which pairs `train` would hold out, which it would train on, and how they are parted, or why they cannot be."""
    wish, seed = settings.data.validation_split, settings.training.seed
    sizes = [len(part) for part in good]
    if len(good) > 1:
        held_out = np.arange(sum(sizes)) >= sizes[0]
        return held_out, ~held_out, "the source's own held-out split"
    held_out, trained = np.zeros(sizes[0], dtype=bool), np.ones(sizes[0], dtype=bool)
    if sizes[0] == 0 or wish == "none":
        return held_out, trained, "nothing is to be held out"
    numbered = good[0].add_column("position", np.arange(sizes[0]))
    try:
        parted = split_rows(numbered, None, wish, seed)
    except UserError as error:
        return held_out, trained, f"train would stop: {error.faults[0]}"
    trained = np.isin(np.arange(sizes[0]), parted.train.with_format("numpy")["position"][:])
    if parted.held_out is not None:
        held_out[parted.held_out.with_format("numpy")["position"][:]] = True
    return held_out, trained, f"the split that train makes with --seed {seed}"


def read_scores(subject: Subject) -> tuple[str, np.ndarray, np.ndarray] | None:
    """The columns with a score of each side, as a phrase, and both scores per pair (NaN: none); None without any."""
    found: list[tuple[str, np.ndarray, np.ndarray]] = []
    for part, rows in zip(subject.parts, (subject.source.rows, subject.source.held_out_rows), strict=False):
        if _score_columns(part.converted.features):  # the reading found them, or made the pair by them
            names = _score_columns(part.converted.features)
            scores = [_read_numbers(part.converted, name)[part.good] for name in names]
            known = [subject.reading.columns.get(name, name) for name in names]
            found.append((" and ".join(known), *scores))
            continue
        names = _score_columns(rows.features)
        if names is None:
            return None
        indices = np.array(part.converted.with_format("numpy")["row"][:])[part.good]
        scores = [_read_numbers(rows, name)[indices] for name in names]
        found.append((" and ".join(names), *scores))
    return found[0][0], *(np.concatenate([part[side] for part in found]) for side in (1, 2))


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
