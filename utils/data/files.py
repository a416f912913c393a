"""Local data files: read fast by the library; where that fails, read line by line to find which one is at fault.

UserError is raised for every file that cannot be read, with the file, the line and what was found there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
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
from .places import SHOWN, FileLines, FilePlaces, Place, describe_bad_rows, list_places
from .row_cache import hash_code, keep_rows, make_key
from .scanning import (
    Scan,
    check_start,
    check_unpacked,
    check_width,
    csv_separator,
    is_safe_for_arrow,
    iterate_csv,
    iterate_json,
    line_numbers,
    open_binary,
    peek_csv,
    scan_csv,
    scan_json,
    whole_rows,
)

KINDS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SMALL_BYTES = 64 << 20
LIBRARY_BLOCK = 10 << 20  # of a JSON file; the types of the first are those of all
CHECKED_BLOCK = 32 << 20
TOOLS = ("tools", "functions")  # JSON schemas, in which a null or 1 for 1.0 is another schema


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


def file_kind(path: Path) -> str | None:
    """json, csv or parquet by the file's ending (a .gz after .json or .jsonl included), else None."""
    name = path.name.lower()
    kind = KINDS.get(Path(name.removesuffix(".gz")).suffix)
    return None if name.endswith(".gz") and kind != "json" else kind


def read_files(paths: Sequence[Path], on_bad_rows: str) -> FileRows:
    """Read files of one kind as one table.

    Raises UserError for an empty or unreadable file; and, unless `on_bad_rows` is "skip", for lines that hold no row.
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
    return FileRows(rows, FilePlaces(paths[0].name, len(rows), lambda: [line_numbers(path) for path in paths]), {})


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
    if kind == "json" and (not is_exact(rows.features) or _is_misread(rows, paths)):
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


def find_changed_texts(rows: datasets.Dataset) -> str | None:
    """A column that the library itself read, or wrote, in which it may have changed texts.

    Where a field holds values of several types it decodes those that are texts: '"Yes"' is then Yes, '42' a number.
    """
    for name, kind in rows.features.items():
        for chunk in rows.data.column(name).chunks:
            for stored in _stored_json(chunk, kind):
                if any(
                    text is not None and text[:1] not in ("{", "[") for text in stored.cast(pa.string()).to_pylist()
                ):
                    return name
    return None


def describe_changed_texts(column: str) -> str:
    """What is wrong with such a column, for messages."""
    return (
        f"'{column}' holds texts beside values of other types, and the datasets library changes such texts as it reads "
        "or writes them"
    )


def holds_json(kind: Any) -> bool:
    """Whether the library holds values of several types in a column of this type."""
    if isinstance(kind, dict):
        return any(map(holds_json, kind.values()))
    return holds_json(kind.feature) if hasattr(kind, "feature") else type(kind).__name__ == "Json"


def _stored_json(array: pa.Array, kind: Any) -> Iterator[pa.Array]:
    """The arrays in which the library holds values of several types as JSON."""
    if isinstance(kind, dict):
        for name, inner in kind.items():
            yield from _stored_json(array.field(name), inner)
    elif hasattr(kind, "feature"):
        yield from _stored_json(array.flatten(), kind.feature)
    elif type(kind).__name__ == "Json":
        yield array.storage if isinstance(array, pa.ExtensionArray) else array


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


def is_exact(features: Any, name: str = "") -> bool:
    """Whether values of these types are what their file says.

    False where the library holds values of several types in one column, and where nested tools become columns of a
    table: that adds nulls for what other rows have, and turns 1 into 1.0.
    """
    if isinstance(features, dict):
        return name not in TOOLS and all(is_exact(kind, name) for name, kind in features.items())
    if hasattr(features, "feature"):
        return is_exact(features.feature, name)
    return type(features).__name__ != "Json"


def _is_misread(rows: datasets.Dataset, paths: Sequence[Path]) -> bool:
    """Texts that look like dates become timestamps; a whole table in one object becomes a single row; and what stands
    behind a block or a file of texts alone becomes text: numbers, objects, and dates in another form than theirs."""
    if any(_has_timestamp(field.type) for field in rows.data.table.schema):
        return True
    size = max(path.stat().st_size for path in paths)
    in_one_block = len(paths) == 1 and size <= LIBRARY_BLOCK and paths[0].suffix.lower() != ".gz"
    if not in_one_block and not _is_as_written(rows.data.table, paths):
        return True
    return len(rows) == len(paths) and any(whole_rows(path) is not None for path in paths)


def _is_as_written(table: pa.Table, paths: Sequence[Path]) -> bool:
    """Whether a table holds the values of these files of JSON lines as they are written."""
    known = pa.schema([field for field in table.schema if not pa.types.is_null(field.type)])
    parse = pyarrow.json.ParseOptions(explicit_schema=known, unexpected_field_behavior="ignore")
    table, read = table.select(known.names), 0
    try:
        for path in paths:
            with open_binary(path) as file:
                if file.read(1) == b"[":
                    return len(paths) == 1  # an array is one block
                file.seek(0)
                for batch in pyarrow.json.open_json(file, pyarrow.json.ReadOptions(block_size=CHECKED_BLOCK), parse):
                    if not pa.Table.from_batches([batch]).equals(table.slice(read, len(batch))):
                        return False
                    read += len(batch)
    except pa.ArrowException:
        return False
    return read == len(table)


def _has_timestamp(kind: pa.DataType) -> bool:
    return pa.types.is_temporal(kind) or any(_has_timestamp(kind.field(i).type) for i in range(kind.num_fields))


def _read_parquet(paths: Sequence[Path]) -> FileRows:
    def count_rows() -> list[FileLines]:
        return [FileLines(p.name, "row", range(1, pq.read_metadata(p).num_rows + 1)) for p in paths]

    count = 0
    for path in paths:
        try:
            count += pq.read_metadata(path).num_rows
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read as Parquet: {first_line(error)}") from None
    if count == 0:
        raise UserError(f"{', '.join(map(str, paths))} holds no rows.")
    try:
        with quiet(sum(path.stat().st_size for path in paths)):
            if any(set("*?[]") & set(str(path)) for path in paths):
                rows = datasets.Dataset(pa.concat_tables([pq.read_table(path) for path in paths]))
            else:
                rows = _load_kept("parquet", paths, {})
    except (datasets.exceptions.DatasetsError, pa.ArrowException, OSError, ValueError) as error:
        names = ", ".join(str(path) for path in paths)
        raise UserError(f"{names} cannot be read as Parquet: {first_line(error.__cause__ or error)}") from None
    column = find_changed_texts(rows)
    if column is not None:
        raise UserError(f"{', '.join(map(str, paths))}: {describe_changed_texts(column)}; write it as texts alone")
    place = FilePlaces(paths[0].name, len(rows), count_rows)
    check_texts(rows, place, f"{', '.join(map(str, paths))} cannot be read")
    return FileRows(rows, place, {})


def check_texts(rows: datasets.Dataset, place: Place, fault: str) -> None:
    """Raises UserError where a table holds bytes that are no text, which some readers let through, and where."""
    for name, column in zip(rows.data.table.column_names, rows.data.table.columns, strict=True):
        before = 0
        for chunk in column.chunks:
            try:
                chunk.validate(full=True)
            except pa.ArrowException as error:
                index = re.search(r"at string index (\d+)", str(error))
                flat = index and (pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type))
                where = f"{place(before + int(index[1]))}, column '{name}'" if flat else f"column '{name}'"
                raise UserError(f"{fault}: damaged at {where} ({first_line(error)}). Make or copy it again.") from None
            before += len(chunk)


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
    if found and on_bad_rows == "error":
        raise UserError(
            *(
                describe_bad_rows(reason, lines.places, dropped[reason], lines.detail)
                for reason, lines in unreadable.items()
            )
        )
    table = [row for scan in scans for row in scan.rows]
    check_width(paths[0].name, list(dict.fromkeys(name for row in table for name in row)))
    if not table:
        names = ", ".join(str(path) for path in paths)
        faults = [
            f"{reason} ({list_places(lines.places, dropped[reason])}{'; the first: ' * bool(lines.detail)}"
            f"{lines.detail})"
            for reason, lines in unreadable.items()
        ]
        raise UserError(f"{names} holds no readable row{': ' * bool(faults)}{', '.join(faults)}.")
    lines = [FileLines(scan.name, scan.unit, array("Q", scan.numbers)) for scan in scans]
    return FileRows(json_or_text(table), FilePlaces(paths[0].name, len(table), lambda: lines), dropped, unreadable)


def _scan(kind: str, path: Path) -> Scan:
    return scan_csv(path) if kind == "csv" else scan_json(path)


def json_or_text(table: list[dict]) -> datasets.Dataset:
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


def first_line(error: BaseException) -> str:
    """The text of an error in one line, or its name when it has none."""
    return in_one_line(error)
