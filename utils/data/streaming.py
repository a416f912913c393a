"""--streaming: of data too large to read whole, no more rows than a run of --max_steps uses.

Rows are read from the beginning, file by file in an order that the seed draws, converted, checked and split row by
row; the pairs are kept on the disk until the run ends. What follows (lengths, the layout's proof, the reference scored
ahead, resuming) then works as with any other data, on exactly the pairs that will be trained on.
"""

from __future__ import annotations

import atexit
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter

from ..errors import UserError, in_one_line
from ..runtime import say
from ..settings.data import DataSettings
from .columns import list_heads
from .conversion import NeedsExtra, convert_batch, features_of, padded_columns
from .exact import describe_changed_texts, holds_json
from .files import json_or_text, quiet
from .labels import label_column, read_numbers
from .layouts import GIVEN
from .parts import Part, check_part
from .places import SHOWN, describe_bad_rows, describe_nothing_left, describe_skipped, stops
from .ranking import LEFT_OUT
from .row_cache import make_scratch
from .scanning import check_width
from .schemas import SAMPLED_ROWS, Reading, check_effects, find_reading
from .sources import Source, Stream
from .splitting import DEFAULT_FRACTION, DEFAULT_MOST_ROWS, SPARE, number_rows, without_group
from .wishes import Wish

BATCH = 1000
FILE_BITS = 40  # a row's number is its file's, then its own within it


@dataclass
class StreamedPairs:
    """What was read of a stream. `exhausted`: it ended before as many pairs were found as wanted."""

    train: datasets.Dataset
    held_out: datasets.Dataset | None
    reading: Reading
    dropped: dict[str, int]
    rows_read: int
    exhausted: bool


class _Intake:
    """The good rows of a stream, batch by batch, and what is counted on the way."""

    def __init__(self, stream: Stream, reading: Reading, on_bad_rows: str) -> None:
        self.dropped: Counter[str] = Counter()
        self.numbers: set[str] = set()  # among the labels of two answers
        self.rows_read = 0
        self._bad: dict[str, list[str]] = {}  # reason -> the first places, with `skip_few`
        self._bad_counts: Counter[str] = Counter()
        self.reading = reading
        self._stream, self._on_bad_rows = stream, on_bad_rows
        self._padded = padded_columns(stream.rows.features)

    def read(self, seed: int) -> Iterator[datasets.Dataset]:
        """The good rows of each batch, whole files in an order that the seed draws. Raises UserError for bad ones."""
        for batch, first in _read_batches(self._stream, seed):
            count = len(next(iter(batch.values())))
            labels = batch.get(label_column(self.reading.columns), [])
            try:
                self.numbers |= read_numbers(labels, self.reading.columns)
            except UserError as error:
                raise UserError(*(f"--dataset_name {self._stream.label}: {fault}" for fault in error.faults)) from None
            columns = convert_batch(batch, list(range(first, first + count)), self.reading, self._padded)
            self.rows_read += count
            rows = datasets.Dataset.from_dict(columns, features=features_of(self.reading))
            part = check_part(self._as_part(rows), "skip" if self._on_bad_rows == "skip_few" else self._on_bad_rows)
            if self._on_bad_rows == "skip_few":
                self._count_bad(part)
            self.dropped.update(part.dropped)
            yield part.pairs

    def _count_bad(self, part: Part) -> None:
        """Raises UserError where bad rows are 1% of those that were read so far, or more."""
        faults = {reason: at for reason, at in part.bad.items() if reason not in LEFT_OUT}
        for reason, at in faults.items():
            places = self._bad.setdefault(reason, [])
            places += [part.find_place(position) for position in at[: SHOWN - len(places)]]
            self._bad_counts[reason] += len(at)
        if stops(self._bad_counts.total(), self.rows_read, self._on_bad_rows):
            raise UserError(
                *(describe_bad_rows(reason, self._bad[reason], count) for reason, count in self._bad_counts.items())
            )

    def tell(self) -> None:
        """Says which bad rows were left out unasked."""
        if self._bad:
            say(describe_skipped(self._bad, self._bad_counts, self.rows_read))

    def _as_part(self, converted: datasets.Dataset) -> Part:
        label = self._stream.label
        source = Source(converted, None, label, (), partial(place_of, label))
        return Part(Wish(label), source, self.reading, converted)


def _read_batches(stream: Stream, seed: int) -> Iterator[tuple[dict[str, list[Any]], int]]:
    """Batches as they were found, each with the number of its first row."""
    files = list(range(stream.rows.num_shards))
    random.Random(seed).shuffle(files)
    for file in files:
        part = stream.rows.shard(num_shards=len(files), index=file) if len(files) > 1 else stream.rows
        batches, row = part.iter(batch_size=BATCH), 0
        while True:
            with _reading(stream.label, row):
                batch = next(batches, None)
            if batch is None:
                break
            yield batch, (file << FILE_BITS) + row
            row += len(next(iter(batch.values())))


def place_of(label: str, row: int) -> str:
    """Where a row of a stream is, by its number."""
    file, index = row >> FILE_BITS, row & ((1 << FILE_BITS) - 1)
    return f"{label} file {file + 1} row {index + 1}" if file else f"{label} row {index + 1}"


def read_stream(
    stream: Stream, held_out: Stream | None, settings: DataSettings, verb: str, seed: int, wanted: int
) -> StreamedPairs:
    """The first `wanted` good pairs to train on, with the held-out ones that stand among them or in `held_out`.

    A pair is held out where the hash of its prompt says so, as without --streaming; of those that were met, 1000 at
    most are kept unless --validation_split is a fraction. Reading goes on, a batch at a time, until there is one.

    Raises UserError for bad rows in any batch of 1000 (unless they are skipped), where nothing is left, and where the
    pairs cannot be written to the disk.
    """
    reading = _find_reading(stream, settings, verb)
    check_effects([reading], settings)
    if reading.layout.pairs_up:
        raise UserError("--streaming: single answers (unpaired) are paired across all of the data; leave it out")

    def read_into(folder: Path, keeps_extra: bool = False) -> StreamedPairs:
        how = replace(reading, keeps_extra=keeps_extra)
        intakes = [_Intake(each, how, settings.on_bad_rows) for each in (stream, held_out) if each is not None]
        try:
            return _read_into(folder, intakes, settings.validation_split, seed, wanted)
        except NeedsExtra:
            return read_into(folder, keeps_extra=True)

    try:
        return read_into(_temporary_folder())
    except OSError as error:
        fault = error
    try:
        return read_into(make_scratch(fault))
    except OSError as error:
        raise UserError(
            f"--streaming: pairs cannot be written to the disk ({error.strerror or error}); make room, or name another "
            "disk with HF_DATASETS_CACHE or TMPDIR"
        ) from None


def _read_into(
    folder: Path, intakes: Sequence[_Intake], validation_split: str | None, seed: int, wanted: int
) -> StreamedPairs:
    """The pairs of the first intake, and of a second that is held out; without one, of the first some are."""
    intake, *own = intakes
    fraction = None if own else _fraction(validation_split)
    most = DEFAULT_MOST_ROWS if fraction is None or validation_split is None else sys.maxsize
    train, other = _Writer(folder / "train.arrow", wanted), _Writer(folder / "held_out.arrow", most)
    for rows in intake.read(seed):
        held_out = number_rows(rows, seed) < (fraction or 0)
        train.write(rows.select(np.flatnonzero(~held_out)))
        spare = other.write(rows.select(np.flatnonzero(held_out)))
        intake.dropped.update({SPARE: spare} if spare else {})
        if train.is_full and (fraction is None or other.count):
            break
    exhausted = not train.is_full
    for held_out_intake in own:
        for rows in held_out_intake.read(seed):
            other.write(rows)
            if other.is_full:
                break
    dropped = sum((each.dropped for each in own), intake.dropped)
    if not exhausted:
        _check_numbers(intakes)
    if train.count == 0:
        raise UserError(describe_nothing_left("--dataset_name", dropped))
    if other.count == 0 and (fraction is not None or own):
        raise UserError(
            f"--validation_split: none of the {intake.rows_read:,} rows that were read is held out; raise it, or "
            "pass none"
        )
    for each in intakes:
        each.tell()
    rows, held_out = train.finish(), other.finish() if other.count else None
    return StreamedPairs(rows, held_out, intake.reading, dict(dropped), intake.rows_read, exhausted)


def _check_numbers(intakes: Sequence[_Intake]) -> None:
    """Raises UserError where the labels that were read are one number alone, which does not say how it is counted."""
    numbers = set.union(*(intake.numbers for intake in intakes))
    if len(numbers) == 1:
        column, rows = label_column(intakes[0].reading.columns), intakes[0].rows_read
        raise UserError(
            f"--streaming: '{column}' holds the number {min(numbers)} alone in the {rows:,} rows that were read, so "
            "whether it counts from 0 or from 1 is unclear; leave --streaming out"
        )


def _fraction(validation_split: str | None) -> float | None:
    if validation_split is None:
        return DEFAULT_FRACTION
    return None if validation_split.strip().lower() == "none" else float(validation_split)


def _find_reading(stream: Stream, settings: DataSettings, verb: str) -> Reading:
    with _reading(stream.label, 0):
        sample = list(stream.rows.take(SAMPLED_ROWS))
    if not sample:
        raise UserError(f"--dataset_name {stream.label}: has no rows")
    check_width(stream.label, list(dict.fromkeys(name for row in sample for name in row)))
    try:
        reading = find_reading(json_or_text(sample), settings, verb)
    except UserError:
        _check_exact(stream)
        raise
    _check_exact(stream, reading)
    first = f"; among the first {len(sample)} rows"
    return replace(reading, remarks=tuple(replace(remark, title=remark.title + first) for remark in reading.remarks))


def _check_exact(stream: Stream, reading: Reading | None = None) -> None:
    """Refuses columns (those that the reading uses, where there is one) in which the library may change texts."""
    features = stream.rows.features or {}
    texts = [path for part, path in (reading.columns if reading else {}).items() if part not in ("tools", *GIVEN)]
    used = {head for path in texts for head in list_heads(path)} or features
    changed = next((name for name in features if name in used and holds_json(features[name])), None)
    if changed is not None:
        raise UserError(
            f"--streaming: {stream.label}: {describe_changed_texts(changed)}, which cannot be ruled out for a stream; "
            "leave --streaming out, or give files of JSON lines"
        )


class _reading:
    """Around the library's own reading: whatever stops it becomes a one-line message."""

    def __init__(self, label: str, row: int) -> None:
        self.label, self.row = label, row
        self._quiet = quiet(0)

    def __enter__(self) -> None:
        self._quiet.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._quiet.__exit__(None, None, None)
        if isinstance(error, Exception) and not isinstance(error, UserError):
            cause = in_one_line(error.__cause__ or error)
            raise UserError(
                f"--streaming: {self.label} cannot be read beyond row {self.row:,} ({cause}); "
                "without --streaming, bad lines of a file are named and can be skipped"
            ) from None


class _Writer:
    """Rows to a table on the disk, some at a time, `most` at most."""

    def __init__(self, path: Path, most: int) -> None:
        self.count = 0
        self._path, self._most = path, most
        self._writer: ArrowWriter | None = None

    @property
    def is_full(self) -> bool:
        return self.count >= self._most

    def write(self, rows: datasets.Dataset) -> int:
        """Writes as many as there is room for; returns how many there are more."""
        if self._writer is None:
            self._writer = ArrowWriter(path=str(self._path), features=rows.features)
        kept = min(len(rows), self._most - self.count)
        if kept:
            self._writer.write_table(rows.select(range(kept)).with_format("arrow")[:])
        self.count += kept
        return len(rows) - kept

    def finish(self) -> datasets.Dataset:
        self._writer.finalize()
        return without_group(datasets.Dataset.from_file(str(self._path)))


def _temporary_folder() -> Path:
    """A folder beside the library's own cache, removed when the process ends."""
    base = Path(datasets.config.HF_DATASETS_CACHE) / "streamed"
    try:
        base.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=base)
    except OSError as error:
        return make_scratch(error)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
