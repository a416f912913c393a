"""Local data files: read fast by the library; where that fails, read line by line to find which one is at fault.

UserError is raised for every file that cannot be read, with the file, the line and what was found there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq
from datasets.features.features import register_feature
from datasets.io.generator import GeneratorDatasetInputStream

from ..errors import UserError, in_one_line
from ..run.manifests import hash_file
from ..runtime import say
from .arrow_safety import is_safe_for_arrow
from .code_hash import hash_code
from .csv_rows import csv_separator, iterate_csv, peek_csv, scan_csv
from .exact import check_texts, describe_changed_texts, find_changed_texts, is_exact, is_misread
from .opening import BOM, check_start, check_unpacked, open_binary
from .places import SHOWN, FileLines, FilePlaces, Place, describe_bad_rows, describe_skipped, list_places, stops
from .row_cache import keep_rows, make_key
from .scanning import Scan, check_width, iterate_json, json_layout, scan_json
from .wishes import file_kind

SMALL_BYTES = 64 << 20


@dataclass
class AnyJson:
    """The type of a column that holds values of any type, each as its JSON text.

    The library's own `Json` stores texts as they are and decodes every one, so that '"Yes"' loses its quotes and '42'
    becomes a number; it also rounds numbers.
    """

    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="AnyJson", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def encode_example(self, value: Any) -> str | None:
        """The JSON text of a value."""
        return None if value is None else json.dumps(value)

    def decode_example(self, text: str | None, token_per_repo_id: Any = None) -> Any:
        """The value of a JSON text."""
        return None if text is None else json.loads(text)


with warnings.catch_warnings():  # the library calls the function experimental
    warnings.simplefilter("ignore")
    register_feature(AnyJson, "AnyJson")


@dataclass(frozen=True)
class Unreadable:
    """Lines that hold no row, for one reason: where the first of them stand, and what was found in the very first."""

    places: tuple[str, ...] = ()
    detail: str = ""

    def __add__(self, other: Unreadable) -> Unreadable:
        return Unreadable((*self.places, *other.places)[:SHOWN], self.detail or other.detail)


@dataclass(frozen=True)
class FileRows:
    """The rows of some files of one kind, in order. `dropped`: reason -> rows left out (--on_bad_rows skip), of which
    `unreadable` says more."""

    rows: datasets.Dataset
    place: Place
    dropped: dict[str, int]
    unreadable: dict[str, Unreadable] = field(default_factory=dict)


def read_files(paths: Sequence[Path], on_bad_rows: str) -> FileRows:
    """Read files of one kind as one table.

    Raises UserError for an empty or unreadable file; and for lines that hold no row, unless they are skipped.
    """
    for path in paths:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty: nothing to read.")
        check_start(path)
        check_unpacked(path)
    kind = file_kind(paths[0])
    if kind == "parquet":
        return _read_parquet(paths)
    rows = _read_fast(kind, paths)
    if rows is None:
        return _read_slowly(kind, paths, on_bad_rows)
    return FileRows(rows, FilePlaces(paths[0].name, len(rows), lambda: [_line_numbers(path) for path in paths]), {})


def _line_numbers(path: Path) -> FileLines:
    """Where each row of a readable JSON or CSV file stands, without keeping the rows."""
    if path.name.lower().endswith((".csv", ".tsv")):
        scan = scan_csv(path)
        return FileLines(scan.name, scan.unit, scan.numbers)
    if json_layout(path) == "whole":
        scan = scan_json(path)
        return FileLines(scan.name, scan.unit, scan.numbers)
    with open_binary(path) as handle:
        lines = (number for number, line in enumerate(handle, start=1) if line.removeprefix(BOM).strip())
        return FileLines(path.name, "line", array("Q", lines))


def _read_fast(kind: str, paths: Sequence[Path]) -> datasets.Dataset | None:
    """The library's reading, or None where it fails or is known to misread."""
    if any(set("*?[]") & set(str(path)) for path in paths):
        return None  # the library takes these names for patterns
    if kind == "csv":
        header, first = peek_csv(paths[0])
        # pandas would take the first of the surplus fields for an index and shift every column
        if len(set(header)) < len(header) or len(first) > len(header):
            return None
        options = _csv_options(header, {csv_separator(path) for path in paths})
        if options is None:
            return None
    else:
        options = {"parse_agent_traces": False}
    try:
        with quiet(sum(path.stat().st_size for path in paths)):
            rows = _load_kept(kind, paths, options)
    except UserError:
        raise
    except Exception:
        return None
    check_width(paths[0].name, rows.column_names)
    if kind == "json" and (not is_exact(rows.features) or is_misread(rows, paths)):
        return None
    return rows


def _load_kept(kind: str, paths: Sequence[Path], options: dict[str, Any]) -> datasets.Dataset:
    """The library's reading of the files, kept under what they hold: dates of files can lie.

    Raises whatever the library does, and ValueError where it would not survive a file.
    """
    how = [kind, str(options), [(path.suffix.lower(), hash_file(path)) for path in paths]]

    def make(folder: Path) -> datasets.Dataset:
        if kind == "json" and not all(map(is_safe_for_arrow, paths)):
            raise ValueError("not for the library's reader")
        files = {"train": [str(path) for path in paths]}
        rows = datasets.load_dataset(kind, data_files=files, split="train", cache_dir=str(folder), **options)
        if kind != "parquet":  # of which it is said where
            rows.data.table.validate(full=True)  # the JSON reader lets invalid UTF-8 through
        return rows

    return keep_rows(make_key(how, hash_code(__name__)), make)


def _csv_options(header: Sequence[str], separators: set[str]) -> dict[str, Any] | None:
    """Without these, "None" and "N/A" become nulls and "42" a number: a response is always text.

    None for files whose fields are separated in several ways, which the library cannot read together.
    """
    if len(separators) > 1:
        return None
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {"features": features, "keep_default_na": False, "sep": separators.pop()}


def stream_files(paths: Sequence[Path], scratch: str) -> datasets.IterableDataset:
    """The rows of files of one kind, none of them read yet. The library makes a folder in `scratch`.

    Raises ValueError or UserError for a file that is not what its name says, and where the beginning of a JSON or CSV
    file cannot be read.
    """
    kind = file_kind(paths[0])
    for path in paths:
        check_start(path)
    if kind == "json":  # not through the library, which takes the types of the first rows for those of all
        for path in paths:
            next(iterate_json(path), None)
    if kind == "csv":  # nor these: it shifts the columns of records with too many fields
        for path in paths:
            next(iterate_csv(path), None)
    if kind != "parquet":
        kwargs = {"paths": list(paths)}  # not IterableDataset.from_generator, which must have a cache to write to
        return GeneratorDatasetInputStream(_iterate_files, gen_kwargs=kwargs, streaming=True, cache_dir=scratch).read()
    files = {"train": [str(path) for path in paths]}
    return datasets.load_dataset(kind, data_files=files, split="train", streaming=True, cache_dir=scratch)


def _iterate_files(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        yield from iterate_csv(path) if file_kind(path) == "csv" else iterate_json(path)


def _read_parquet(paths: Sequence[Path]) -> FileRows:
    def count_rows() -> list[FileLines]:
        return [FileLines(p.name, "row", range(1, pq.read_metadata(p).num_rows + 1)) for p in paths]

    count = 0
    for path in paths:
        try:
            count += pq.read_metadata(path).num_rows
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read as Parquet: {in_one_line(error)}") from None
    if count == 0:
        raise UserError(f"{', '.join(map(str, paths))} has no rows.")
    try:
        with quiet(sum(path.stat().st_size for path in paths)):
            if any(set("*?[]") & set(str(path)) for path in paths):
                rows = datasets.Dataset(pa.concat_tables([pq.read_table(path) for path in paths]))
            else:
                rows = _load_kept("parquet", paths, {})
    except (datasets.exceptions.DatasetsError, pa.ArrowException, OSError, ValueError) as error:
        names = ", ".join(str(path) for path in paths)
        raise UserError(f"{names} cannot be read as Parquet: {in_one_line(error.__cause__ or error)}") from None
    column = find_changed_texts(rows)
    if column is not None:
        raise UserError(f"{', '.join(map(str, paths))}: {describe_changed_texts(column)}; write it as texts alone")
    place = FilePlaces(paths[0].name, len(rows), count_rows)
    check_texts(rows, place, f"{', '.join(map(str, paths))} cannot be read")
    return FileRows(rows, place, {})


def _read_slowly(kind: str, paths: Sequence[Path], on_bad_rows: str) -> FileRows:
    """Every row through Python. All faulty lines of all files are reported together."""
    scans = [_scan(kind, path) for path in paths]
    found = [
        (fault.reason, f"{scan.name} {scan.unit} {fault.number}", fault.detail)
        for scan in scans
        for fault in scan.faults
    ]
    dropped = dict(Counter(reason for reason, _, _ in found))
    unreadable: dict[str, Unreadable] = {}
    for reason, place, detail in found:
        unreadable[reason] = unreadable.get(reason, Unreadable()) + Unreadable((place,), detail)
    table = [row for scan in scans for row in scan.rows]
    if stops(len(found), len(table) + len(found), on_bad_rows):
        raise UserError(
            *(
                describe_bad_rows(reason, lines.places, dropped[reason], lines.detail)
                for reason, lines in unreadable.items()
            )
        )
    if found and on_bad_rows == "skip_few":
        places = {reason: lines.places for reason, lines in unreadable.items()}
        say(describe_skipped(places, dropped, len(table) + len(found)))
    check_width(paths[0].name, list(dict.fromkeys(name for row in table for name in row)))
    if not table:
        names = ", ".join(str(path) for path in paths)
        faults = [
            f"{reason} ({list_places(lines.places, dropped[reason])}{'; the first: ' * bool(lines.detail)}"
            f"{lines.detail})"
            for reason, lines in unreadable.items()
        ]
        raise UserError(f"{names} has no readable row{': ' * bool(faults)}{', '.join(faults)}.")
    lines = [FileLines(scan.name, scan.unit, array("Q", scan.numbers)) for scan in scans]
    return FileRows(json_or_text(table), FilePlaces(paths[0].name, len(table), lambda: lines), dropped, unreadable)


def _scan(kind: str, path: Path) -> Scan:
    return scan_csv(path) if kind == "csv" else scan_json(path)


def json_or_text(table: list[dict[str, Any]]) -> datasets.Dataset:
    """A table of any mixture of types: columns that are not all text are held as JSON, so nothing in it changes."""
    columns = list(dict.fromkeys(name for row in table for name in row))
    values = {name: [row.get(name) for row in table] for name in columns}
    features = {
        name: datasets.Value("string") if all(v is None or isinstance(v, str) for v in column) else AnyJson()
        for name, column in values.items()
    }
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


@contextlib.contextmanager
def quiet(size_bytes: int) -> Iterator[None]:
    """Hold back the library's own error lines (ours say more) and, for small data, its progress bars."""
    logger = logging.getLogger("datasets")
    level = logger.level
    bars = size_bytes < SMALL_BYTES and not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    if bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
