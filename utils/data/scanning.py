"""JSON and CSV files read line by line in Python: slower than the library, and able to say which line is at fault."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import UserError
from .places import FileLines

BOM = b"\xef\xbb\xbf"
WRAPPERS = ("data", "rows", "examples", "instances", "train")  # {"data": [rows]}
PACKED_RATIO = 100  # text packs to a tenth or so of its size; only copies of one row pack to a hundredth
FREE_BYTES = 64 << 20  # that any packed file may hold
UNPACKED_BLOCK = 1 << 20
ROW_BYTES = 16 << 20  # of one row: millions of tokens
DEPTH = 100  # of brackets within brackets in one row; the library's reader dies of some thousands
COLUMNS = 5000  # of a table; the library takes milliseconds for each
TOO_LONG = f"a row of more than {ROW_BYTES >> 20} MiB"
TOO_DEEP = f"nested too deeply (more than {DEPTH} brackets)"
# How files begin that are not what their names say.
STARTS = {
    b"version https://git-lfs": "a pointer of Git LFS and not the data; run git lfs pull in its folder",
    b"\x1f\x8b": "packed with gzip; end its name in .jsonl.gz or .json.gz, or unpack it",
    b"PAR1": "a Parquet file; end its name in .parquet",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "packed with zstd; unpack it",
    b"\xfd7zXZ": "packed with xz; unpack it",
    b"BZh": "packed with bzip2; unpack it",
    b"ARROW1": "an Arrow file; save the data set as .parquet",
    b"<!doctype html": "a web page and not the data; download the file itself",
    b"<html": "a web page and not the data; download the file itself",
}
OWN_STARTS = {".gz": b"\x1f\x8b", ".parquet": b"PAR1"}
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # of a pair, or half of one, which the library drops from an array
# What the library turns into a row that is null: in a file of lines, and in one that is an array.
NULL_LINE = re.compile(rb"\n\s*(?:null|NaN|-?Infinity)\b")
NULL_ITEM = re.compile(rb"[\n\[,]\s*(?:null|NaN|-?Infinity)\b")
CSV_SEPARATORS = (",", "\t", ";", "|")
MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})


@dataclass(frozen=True)
class Fault:
    """One line (or row) that holds no row: `reason` groups faults, `detail` is what was found in this one."""

    number: int
    reason: str
    detail: str = ""


@dataclass
class Scan:
    """What one file holds. Row k stands at `unit` number `numbers[k]`."""

    name: str
    unit: str
    rows: list[dict] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def add(self, number: int, row: Any) -> None:
        """Keep a row, or note why the value found at `number` is not one."""
        if isinstance(row, dict):
            self.rows.append(row)
            self.numbers.append(number)
        else:
            self.faults.append(Fault(number, "no JSON object", f"found {name_of(row)}"))


def name_of(value: Any) -> str:
    """What a value is, in words for people: "a list", "a number", ..."""
    kinds = {bool: "true or false", str: "a text", int: "a number", float: "a number", list: "a list"}
    return "null" if value is None else kinds.get(type(value), "an object")


class _Unpacked(io.RawIOBase):
    """The bytes of a packed file. Raises UserError where it holds far more than text can be packed to."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, gzip.GzipFile(path)
        self._most = max(FREE_BYTES, PACKED_RATIO * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        if self._file.tell() > self._most:
            raise UserError(
                f"{self._path} unpacks to more than {PACKED_RATIO} times its size, as no text of many rows does. "
                "If it is to be read, unpack it with gunzip and give the file that comes out."
            )
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked when it ends in .gz. Raises UserError when the packed data is cut off or damaged."""
    packed = path.name.lower().endswith(".gz")
    with io.BufferedReader(_Unpacked(path), UNPACKED_BLOCK) if packed else open(path, "rb") as handle:
        try:
            yield handle
        except EOFError:
            raise UserError(f"{path} is cut off: its gzip data ends early. Copy or download it again.") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path} is not valid gzip data ({error}). Copy or download it again.") from None


def check_start(path: Path) -> None:
    """Raises UserError where the first bytes of a file say that it is of another kind than its name."""
    with open(path, "rb") as file:
        start = file.read(32).lower()
    for known, what in STARTS.items():
        if start.startswith(known.lower()) and OWN_STARTS.get(path.suffix.lower()) != known:
            raise UserError(f"{path} is {what}.")


def check_unpacked(path: Path) -> None:
    """Raises UserError where a packed file holds far more than text can be packed to: it would fill memory and disk."""
    if path.suffix.lower() == ".gz":
        with open_binary(path) as file:
            while file.read(UNPACKED_BLOCK):
                pass


def is_too_deep(text: bytes) -> bool:
    """Whether brackets stand within brackets more than DEPTH deep, outside of texts."""
    if text.count(b"[") + text.count(b"{") <= DEPTH:
        return False
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]
    codes = np.frombuffer(b"".join(bare), np.uint8)
    opened, closed = np.isin(codes, list(b"[{")), np.isin(codes, list(b"]}"))
    depth = np.cumsum(opened.astype(np.int8) - closed.astype(np.int8), dtype=np.int32)
    return bool(depth.max(initial=0) > DEPTH)


def _lines(handle: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is longer than a row may be, no more than shows it."""
    while line := handle.readline(ROW_BYTES + 1):
        yield line
        while len(line) > ROW_BYTES and not line.endswith(b"\n"):
            line = handle.readline(ROW_BYTES + 1)


def read_text(path: Path) -> str:
    """The whole file as text, without a byte order mark. Raises UserError when it is not UTF-8."""
    with open_binary(path) as handle:
        content = handle.read()
    _refuse_utf16(path, content)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line} is not UTF-8 text ({error.reason}). Save the file as UTF-8.") from None


def _refuse_utf16(path: Path, start: bytes) -> None:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16 text. Save it as UTF-8.")


def json_layout(path: Path) -> str:
    """lines (one value per line) or whole (one array or object over the whole file)."""
    with open_binary(path) as handle:
        filled = (line for line in _lines(handle) if line.strip(BOM).strip())
        first, second = next(filled, b""), next(filled, b"")
    first = first.removeprefix(BOM)
    if second and _is_json(first):
        return "lines"
    if first.lstrip().startswith(b"["):
        return "whole"
    if path.name.lower().removesuffix(".gz").endswith(".json"):
        return "whole" if not second or _is_json(read_text(path).encode()) else "lines"
    return "whole" if not second and whole_rows(path) is not None else "lines"


def _parse(text: str | bytes, **options: Any) -> Any:
    """The JSON value. Raises ValueError, also where it is nested deeper than can be read."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _is_json(text: bytes) -> bool:
    try:
        _parse(text)
    except ValueError:
        return False
    return True


def whole_rows(path: Path) -> list | None:
    """The rows of a table in one JSON object, {"data": [rows]} or {"prompt": [...], "chosen": [...]}; else None."""
    try:
        value = _parse(read_text(path))
    except ValueError:
        return None
    return _unwrap(value)


def _unwrap(value: Any) -> list | None:
    if not isinstance(value, dict) or not value or not all(isinstance(column, list) for column in value.values()):
        return None
    name, column = next(iter(value.items()))
    if len(value) == 1 and name in WRAPPERS:
        return column
    lengths = {len(column) for column in value.values()}
    if len(lengths) > 1 or any(_is_message(item) for column in value.values() for item in column[:1]):
        return None
    return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and any(keys <= set(value) for keys in MESSAGE_KEYS)


def scan_json(path: Path) -> Scan:
    """Every row of a JSON file (an array, a table in one object, or one object per line) with its faults.

    Raises UserError when the file as a whole cannot be read.
    """
    if json_layout(path) == "lines":
        return _scan_json_lines(path)
    text = read_text(path)
    if is_too_deep(text.encode("utf-8", "surrogatepass")):
        raise UserError(f"{path} is {TOO_DEEP}. Mend the file.")
    try:
        value = _parse(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno} is not valid JSON ({_describe(error)}). Mend the file.") from None
    except ValueError as error:
        raise UserError(f"{path} is not a usable JSON file: {error}. Mend the file.") from None
    rows = value if isinstance(value, list) else _unwrap(value) or [value]
    scan = Scan(path.name, "row")
    for number, row in enumerate(rows, start=1):
        if not _is_encodable(row):
            scan.faults.append(Fault(number, "a broken character (half of a surrogate pair)"))
        else:
            scan.add(number, row)
    return scan


def _scan_json_lines(path: Path) -> Scan:
    scan = Scan(path.name, "line")
    for number, line in _filled_lines(path):
        _add_line(scan, number, line)
    return scan


def _filled_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open_binary(path) as handle:
        for number, line in enumerate(_lines(handle), start=1):
            if number == 1:
                _refuse_utf16(path, line)
                line = line.removeprefix(BOM)
            if line.strip():
                yield number, line


def _add_line(scan: Scan, number: int, line: bytes) -> None:
    if len(line) > ROW_BYTES or is_too_deep(line):
        scan.faults.append(Fault(number, TOO_LONG if len(line) > ROW_BYTES else TOO_DEEP))
        return
    try:
        row = _parse(line.decode("utf-8"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        scan.faults.append(Fault(number, "text that is not UTF-8", f"byte {error.start + 1}: {error.reason}"))
    except json.JSONDecodeError as error:
        comma = line.rstrip().endswith(b",") and _is_json(line.rstrip().removesuffix(b","))
        detail = "a comma behind the row, where the line must end" if comma else _describe(error)
        scan.faults.append(Fault(number, "invalid JSON", detail))
    except ValueError as error:
        scan.faults.append(Fault(number, "a key that occurs twice", str(error)))
    else:
        if SURROGATE.search(line) and not _is_encodable(row):
            scan.faults.append(Fault(number, "a broken character (half of a surrogate pair)"))
        else:
            scan.add(number, row)


def iterate_json(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON file one after the other; those of a file of lines without reading on.

    Raises ValueError at a line (or row) that holds no row.
    """
    if json_layout(path) == "whole":
        scan = scan_json(path)
        _raise_fault(scan)
        yield from scan.rows
        return
    for number, line in _filled_lines(path):
        scan = Scan(path.name, "line")
        _add_line(scan, number, line)
        _raise_fault(scan)
        yield from scan.rows


def _raise_fault(scan: Scan) -> None:
    for fault in scan.faults:
        raise ValueError(f"{scan.unit} {fault.number}: {fault.reason}{fault.detail and ', ' + fault.detail}")


def _describe(error: json.JSONDecodeError) -> str:
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"the key '{_repeated(name for name, _ in pairs)}' occurs twice")
    return row


def _repeated(names: Iterable[str]) -> str | None:
    """The first name that occurs more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _is_encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def csv_separator(path: Path) -> str:
    """What stands between the fields: a comma, or, where the header has none, a tab, semicolon or bar that it has."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as handle:
        header = next((line for line in handle if line.strip()), "")
    return next((mark for mark in CSV_SEPARATORS if mark in header), ",")


@contextlib.contextmanager
def _csv_records(path: Path) -> Iterator[Any]:
    """A csv reader that notes bad bytes instead of stopping; the module's field limit is lifted meanwhile."""
    limit = csv.field_size_limit(1 << 30)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
            yield csv.reader(handle, strict=True, delimiter=csv_separator(path))
    finally:
        csv.field_size_limit(limit)


def peek_csv(path: Path) -> tuple[list[str], list[str]]:
    """The header and the first record of a CSV file; empty lists where there is none.

    Raises UserError when the header cannot be read.
    """
    with open(path, "rb") as handle:
        _refuse_utf16(path, handle.read(2))
    try:
        with _csv_records(path) as records:
            filled = (record for record in records if record)
            header = next(filled, [])
            check_width(path.name, header)
            with contextlib.suppress(csv.Error):
                return header, next(filled, [])
            return header, []
    except csv.Error as error:
        raise UserError(f"{path} line 1 is not valid CSV ({error}). Mend the file.") from None


def check_width(name: str, columns: Sequence[str]) -> None:
    """Raises UserError where a table has more columns than can be read in a reasonable time."""
    if len(columns) > COLUMNS:
        raise UserError(
            f"{name} has {len(columns):,} columns, from '{columns[0]:.40}' to '{columns[-1]:.40}'; more than "
            f"{COLUMNS:,} are not read. Leave out those that hold no part of a pair."
        )


def scan_csv(path: Path) -> Scan:
    """Every record of a CSV file, all values as text, with its faults. Raises UserError for unusable CSV."""
    scan = Scan(path.name, "line")
    for line, header, record in _filled_records(path):
        _add_record(scan, line, header, record)
    return scan


def iterate_csv(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file one after the other, without reading on.

    Raises ValueError at a record that holds no row, and UserError for unusable CSV.
    """
    for line, header, record in _filled_records(path):
        scan = Scan(path.name, "line")
        _add_record(scan, line, header, record)
        _raise_fault(scan)
        yield from scan.rows


def _filled_records(path: Path) -> Iterator[tuple[int, list[str], list[str]]]:
    """The line, the header and the fields of each record that is not empty."""
    header, _ = peek_csv(path)
    if not _is_encodable(header):
        raise UserError(f"{path} line 1 is not UTF-8 text. Save the file as UTF-8.")
    repeated = _repeated(header)
    if repeated is not None:
        raise UserError(f"{path} line 1 names the column '{repeated}' twice. Rename one of them.")
    with _csv_records(path) as records:
        line, seen_header = 1, False
        while True:
            try:
                record = next(records, None)
            except csv.Error as error:
                raise UserError(f"{path} line {line} is not valid CSV ({error}). Mend the file.") from None
            if record is None:
                return
            if record and seen_header:
                yield line, header, record
            seen_header = seen_header or bool(record)
            line = records.line_num + 1


def _add_record(scan: Scan, line: int, header: list[str], record: list[str]) -> None:
    if len(record) > len(header):
        detail = f"{len(record)} fields under {len(header)} columns"
        scan.faults.append(Fault(line, "too many fields", detail))
    elif not _is_encodable(record):
        scan.faults.append(Fault(line, "text that is not UTF-8"))
    else:
        scan.add(line, dict.fromkeys(header) | dict(zip(header, record, strict=False)))


def line_numbers(path: Path) -> FileLines:
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


def _is_odd_value(file: BinaryIO) -> bool:
    """Whether a file that is one value, which the library too reads whole, is nested deeper than a row may be, or holds
    a key twice, of which the library takes the last. True of what is no JSON too."""
    text = file.read()

    def forget(pairs: list[tuple[str, Any]]) -> None:
        _unique_keys(pairs)

    if is_too_deep(text):
        return True
    try:
        _parse(text, object_pairs_hook=forget)
    except ValueError:
        return True
    return False


def _has_odd_line(file: BinaryIO) -> bool:
    """Whether a line is longer, or nested deeper, than a row may be, or may have more keys than a table has columns."""
    rest = b""
    while chunk := file.read(1 << 22):
        whole, _, rest = (rest + chunk).rpartition(b"\n")
        if len(rest) > ROW_BYTES or _is_odd(whole):
            return True
    return _is_odd(rest)


def _is_odd(lines: bytes) -> bool:
    codes = np.frombuffer(lines + b"\n", np.uint8)
    ends = np.flatnonzero(codes == ord("\n"))
    opened = np.cumsum((codes == ord("[")) | (codes == ord("{")), dtype=np.int64)[ends]
    keys = np.cumsum(codes == ord(":"), dtype=np.int64)[ends]
    if np.diff(ends, prepend=-1).max() > ROW_BYTES or np.diff(keys, prepend=0).max() > COLUMNS:
        return True
    suspects = np.diff(opened, prepend=0).max() > DEPTH
    return bool(suspects) and any(map(is_too_deep, lines.split(b"\n")))


def is_safe_for_arrow(path: Path) -> bool:
    """Whether the library's reader survives a JSON file, and reads all of it.

    It dies of rows that are null at the start of a block, and of rows that are nested deeply or very long; it drops
    half characters from an array, and of a key that occurs twice in a file that is one value it takes the last.
    """
    try:
        is_odd = _is_odd_value if json_layout(path) == "whole" else _has_odd_line
        with open_binary(path) as file:
            if is_odd(file):
                return False
        with open_binary(path) as file:
            start = file.read(4096).removeprefix(BOM).lstrip()
            unsafe = [NULL_ITEM, SURROGATE] if start[:1] == b"[" else [NULL_LINE]
            found = any(pattern.search(b"\n" + start) for pattern in unsafe)
            tail = start[-64:]
            while not found and (chunk := file.read(1 << 22)):
                found = any(pattern.search(tail + chunk) for pattern in unsafe)
                tail = chunk[-64:]
    except (OSError, EOFError, ValueError, UserError):
        return False
    return start[:1] in (b"{", b"[") and not found
