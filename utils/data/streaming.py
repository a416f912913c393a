"""--streaming: of data too large to read whole, no more rows than a run of --max_steps uses.

Rows are read from the beginning, file by file in an order that the seed draws, converted, checked and split row by
row; the pairs are kept on the disk until the run ends. What follows (lengths, the layout's proof, the reference scored
ahead, resuming) then works as with any other data, on exactly the pairs that will be trained on.
"""

from __future__ import annotations

import atexit
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter

from ..errors import UserError
from ..settings.training import DataSettings
from .columns import list_heads
from .conversion import convert_batch, features_of, padded_columns
from .files import describe_changed_texts, first_line, holds_json, json_or_text, quiet
from .labels import label_column, read_numbers
from .places import SHOWN, describe_bad_rows
from .ranking import LEFT_OUT
from .row_cache import make_scratch
from .scanning import check_width
from .schemas import SAMPLED_ROWS, Reading, check_effects, find_reading
from .sources import Stream
from .splitting import DEFAULT_FRACTION, DEFAULT_MOST_ROWS, SPARE, draw_numbers, group_of, without_group

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


@dataclass
class _Intake:
    """Where good rows go, and what is counted on the way."""

    reading: Reading
    label: str
    on_bad_rows: str
    features: datasets.Features
    padded: tuple[str, ...] = ()
    dropped: Counter[str] = field(default_factory=Counter)
    rows_read: int = 0
    numbers: set[str] = field(default_factory=set)  # among the labels of two answers

    def good_rows(self, batch: dict[str, list], first: int) -> Iterator[dict[str, Any]]:
        """The good rows of one batch, whose first row has the number `first`. Raises UserError for bad ones."""
        count = len(next(iter(batch.values())))
        labels = batch.get(label_column(self.reading.columns), [])
        try:
            self.numbers |= read_numbers(labels, self.reading.columns)
        except UserError as error:
            raise UserError(*(f"--dataset_name {self.label}: {fault}" for fault in error.faults)) from None
        output = convert_batch(batch, list(range(first, first + count)), self.reading, self.padded)
        self.rows_read += count
        bad: dict[str, list[int]] = {}
        for row, reason in zip(output["row"], output["reason"], strict=True):
            if reason is not None:
                bad.setdefault(reason, []).append(row)
        faults = {reason: rows for reason, rows in bad.items() if reason not in LEFT_OUT}
        if faults and self.on_bad_rows == "error":
            places = {reason: [place_of(self.label, row) for row in rows[:SHOWN]] for reason, rows in faults.items()}
            raise UserError(*(describe_bad_rows(reason, places[reason], len(rows)) for reason, rows in faults.items()))
        self.dropped.update({reason: len(rows) for reason, rows in bad.items()})
        for values in zip(*(output[name] for name in self.features), output["reason"], strict=True):
            if values[-1] is None:
                yield dict(zip(self.features, values, strict=False))


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
    try:
        return _read_into(_temporary_folder(), stream, held_out, settings, verb, seed, wanted)
    except OSError as error:
        fault = error
    try:
        return _read_into(make_scratch(fault), stream, held_out, settings, verb, seed, wanted)
    except OSError as error:
        raise UserError(
            f"--streaming: pairs cannot be written to the disk ({error.strerror or error}); make room, or name another "
            "disk with HF_DATASETS_CACHE or TMPDIR"
        ) from None


def _read_into(
    folder: Path, stream: Stream, held_out: Stream | None, settings: DataSettings, verb: str, seed: int, wanted: int
) -> StreamedPairs:
    reading = _find_reading(stream, settings, verb)
    check_effects([reading], settings)
    if reading.layout.pairs_up:
        raise UserError("--streaming: answers in rows of their own are paired across the whole data; leave it out")
    features = datasets.Features({n: kind for n, kind in features_of(reading).items() if n != "reason"})
    padded = padded_columns(stream.rows.features)
    intake = _Intake(reading, stream.label, settings.on_bad_rows, features, padded)
    fraction = None if held_out is not None else _fraction(settings.validation_split)
    most = None if fraction is not None and settings.validation_split is not None else DEFAULT_MOST_ROWS
    train, other = _Writer(folder / "train.arrow", features), _Writer(folder / "held_out.arrow", features)
    for rows in _good_batches(stream, intake, seed):
        for row in rows:
            if fraction is None or draw_numbers([group_of(row)], seed)[0] >= fraction:
                if train.count < wanted:
                    train.write(row)
            elif most is None or other.count < most:
                other.write(row)
            else:
                intake.dropped[SPARE] += 1
        if train.count >= wanted and (fraction is None or other.count):
            break
    exhausted = train.count < wanted
    if held_out is not None:
        other_intake = _Intake(
            reading,
            held_out.label,
            settings.on_bad_rows,
            features,
            padded_columns(held_out.rows.features),
            intake.dropped,
            numbers=intake.numbers,
        )
        for rows in _good_batches(held_out, other_intake, seed):
            for row in rows[: DEFAULT_MOST_ROWS - other.count]:
                other.write(row)
            if other.count >= DEFAULT_MOST_ROWS:
                break
    if len(intake.numbers) == 1 and not exhausted:
        raise UserError(
            f"--streaming: '{label_column(reading.columns)}' holds the number {min(intake.numbers)} alone in the "
            f"{intake.rows_read:,} rows that were read, so whether it counts from 0 or from 1 cannot be told; leave "
            "--streaming out"
        )
    if train.count == 0:
        found = ", ".join(f"{reason}: {count}" for reason, count in intake.dropped.items()) or "there are no rows"
        raise UserError(f"--dataset_name: no usable row is left ({found})")
    if other.count == 0 and (fraction is not None or held_out is not None):
        raise UserError(
            f"--validation_split: none of the {intake.rows_read:,} rows that were read is held out; raise it, or "
            "pass none"
        )
    sides = [train.finish(), other.finish() if other.count else None]
    return StreamedPairs(*sides, reading, dict(intake.dropped), intake.rows_read, exhausted)


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
    texts = [path for part, path in (reading.columns if reading else {}).items() if part != "tools"]
    used = {head for path in texts for head in list_heads(path)} or features
    changed = next((name for name in features if name in used and holds_json(features[name])), None)
    if changed is not None:
        raise UserError(
            f"--streaming: {stream.label}: {describe_changed_texts(changed)}, which cannot be ruled out for a stream; "
            "leave --streaming out, or give files of JSON lines"
        )


def _good_batches(stream: Stream, intake: _Intake, seed: int) -> Iterator[list[dict[str, Any]]]:
    """Good rows of each batch in the order of reading: whole files, in an order that the seed draws."""
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
            yield list(intake.good_rows(batch, (file << FILE_BITS) + row))
            row += len(next(iter(batch.values())))


class _reading:
    """Around the library's own reading: whatever stops it is said in one line."""

    def __init__(self, label: str, row: int):
        self.label, self.row = label, row
        self._quiet = quiet(0)

    def __enter__(self) -> None:
        self._quiet.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._quiet.__exit__(None, None, None)
        if isinstance(error, Exception) and not isinstance(error, UserError):
            cause = first_line(error.__cause__ or error)
            raise UserError(
                f"--streaming: {self.label} cannot be read on after row {self.row:,} ({cause}); "
                "read without --streaming, a file's lines at fault are named and can be skipped"
            ) from None


class _Writer:
    """Rows to a table on the disk, some at a time."""

    def __init__(self, path: Path, features: datasets.Features):
        self.count = 0
        self._path, self._features = path, features
        self._writer = ArrowWriter(path=str(path), features=features, writer_batch_size=BATCH)

    def write(self, row: dict[str, Any]) -> None:
        self._writer.write(row)
        self.count += 1

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
