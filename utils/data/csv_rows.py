"""CSV files record by record in Python, which can say at which line a fault is."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from .opening import refuse_utf16
from .scanning import Fault, Scan, check_width, find_repeated, is_encodable, raise_fault

CSV_SEPARATORS = (",", "\t", ";", "|")


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
        refuse_utf16(path, handle.read(2))
    try:
        with _csv_records(path) as records:
            filled = (record for record in records if record)
            header: list[str] = next(filled, [])
            check_width(path.name, header)
            with contextlib.suppress(csv.Error):
                return header, next(filled, [])
            return header, []
    except csv.Error as error:
        raise UserError(f"{path} line 1 is not valid CSV ({error}). Fix the file.") from None


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
        raise_fault(scan)
        yield from scan.rows


def _filled_records(path: Path) -> Iterator[tuple[int, list[str], list[str]]]:
    """The line, the header and the fields of each record that is not empty."""
    header, _ = peek_csv(path)
    if not is_encodable(header):
        raise UserError(f"{path} line 1 is not UTF-8 text. Save the file as UTF-8.")
    repeated = find_repeated(header)
    if repeated is not None:
        raise UserError(f"{path} line 1 names the column '{repeated}' twice. Rename one of them.")
    with _csv_records(path) as records:
        line, seen_header = 1, False
        while True:
            try:
                record = next(records, None)
            except csv.Error as error:
                raise UserError(f"{path} line {line} is not valid CSV ({error}). Fix the file.") from None
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
    elif not is_encodable(record):
        scan.faults.append(Fault(line, "text that is not UTF-8"))
    else:
        scan.add(line, dict.fromkeys(header) | dict(zip(header, record, strict=False)))
