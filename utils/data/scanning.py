"""JSON files read line by line in Python: slower than the library, and able to say which line is at fault."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import UserError
from .opening import BOM, open_binary, read_text, refuse_utf16

WRAPPERS = ("data", "rows", "examples", "instances", "train")  # {"data": [rows]}
ROW_BYTES = 16 << 20  # of one row: millions of tokens
DEPTH = 100  # of brackets within brackets in one row; the library's reader dies of some thousands
COLUMNS = 5000  # of a table; the library takes milliseconds for each
TOO_LONG = f"a row of more than {ROW_BYTES >> 20} MiB"
TOO_DEEP = f"nested too deeply (more than {DEPTH} brackets)"
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # of a pair, or half of one, which the library drops from an array
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
    rows: list[dict[str, Any]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def add(self, number: int, row: Any) -> None:
        """Keep a row, or note why the value found at `number` is not one."""
        if isinstance(row, dict):
            self.rows.append(row)
            self.numbers.append(number)
        else:
            self.faults.append(Fault(number, "not a JSON object", f"found {name_of(row)}"))


def name_of(value: Any) -> str:
    """What a value is, in words for people: "a list", "a number", ..."""
    kinds = {bool: "true or false", str: "a text", int: "a number", float: "a number", list: "a list"}
    return "null" if value is None else kinds.get(type(value), "an object")


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


def parse_json(text: str | bytes, **options: Any) -> Any:
    """The JSON value. Raises ValueError, also where it is nested deeper than can be read."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _is_json(text: bytes) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def whole_rows(path: Path) -> list[Any] | None:
    """The rows of a table in one JSON object, {"data": [rows]} or {"prompt": [...], "chosen": [...]}; else None."""
    try:
        value = parse_json(read_text(path))
    except ValueError:
        return None
    return _unwrap(value)


def _unwrap(value: Any) -> list[Any] | None:
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
        raise UserError(f"{path} is {TOO_DEEP}. Fix the file.")
    try:
        value = parse_json(text, object_pairs_hook=read_keys_once)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno} is not valid JSON ({_describe(error)}). Fix the file.") from None
    except ValueError as error:
        raise UserError(f"{path} is not a usable JSON file: {error}. Fix the file.") from None
    rows = value if isinstance(value, list) else _unwrap(value) or [value]
    scan = Scan(path.name, "row")
    for number, row in enumerate(rows, start=1):
        if not is_encodable(row):
            scan.faults.append(Fault(number, "half a character (an unpaired surrogate)"))
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
                refuse_utf16(path, line)
                line = line.removeprefix(BOM)
            if line.strip():
                yield number, line


def _add_line(scan: Scan, number: int, line: bytes) -> None:
    if len(line) > ROW_BYTES or is_too_deep(line):
        scan.faults.append(Fault(number, TOO_LONG if len(line) > ROW_BYTES else TOO_DEEP))
        return
    try:
        row = parse_json(line.decode("utf-8"), object_pairs_hook=read_keys_once)
    except UnicodeDecodeError as error:
        scan.faults.append(Fault(number, "text that is not UTF-8", f"byte {error.start + 1}: {error.reason}"))
    except json.JSONDecodeError as error:
        comma = line.rstrip().endswith(b",") and _is_json(line.rstrip().removesuffix(b","))
        detail = "a comma after the row, where the line must end" if comma else _describe(error)
        scan.faults.append(Fault(number, "invalid JSON", detail))
    except ValueError as error:
        scan.faults.append(Fault(number, "a duplicate key", str(error)))
    else:
        if SURROGATE.search(line) and not is_encodable(row):
            scan.faults.append(Fault(number, "half a character (an unpaired surrogate)"))
        else:
            scan.add(number, row)


def iterate_json(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON file one after the other; those of a file of lines without reading on.

    Raises ValueError at a line (or row) that holds no row.
    """
    if json_layout(path) == "whole":
        scan = scan_json(path)
        raise_fault(scan)
        yield from scan.rows
        return
    for number, line in _filled_lines(path):
        scan = Scan(path.name, "line")
        _add_line(scan, number, line)
        raise_fault(scan)
        yield from scan.rows


def raise_fault(scan: Scan) -> None:
    """Raises ValueError for the first fault of a scan, if there is one."""
    for fault in scan.faults:
        raise ValueError(f"{scan.unit} {fault.number}: {fault.reason}{fault.detail and ', ' + fault.detail}")


def _describe(error: json.JSONDecodeError) -> str:
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def read_keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of these keys and values. Raises ValueError for a duplicate key."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"the key '{find_repeated(name for name, _ in pairs)}' occurs twice")
    return row


def find_repeated(names: Iterable[str]) -> str | None:
    """The first name that occurs more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def is_encodable(value: Any) -> bool:
    """Whether no text in a value holds half of a surrogate pair, which no file can."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_width(name: str, columns: Sequence[str]) -> None:
    """Raises UserError where a table has more columns than can be read in a reasonable time."""
    if len(columns) > COLUMNS:
        raise UserError(
            f"{name} has {len(columns):,} columns, from '{columns[0]:.40}' to '{columns[-1]:.40}'; more than "
            f"{COLUMNS:,} are not read. Remove those that are not part of a pair."
        )
