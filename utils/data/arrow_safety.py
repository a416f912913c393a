"""Whether the library's JSON reader survives a file, and reads all of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import UserError
from .opening import BOM, open_binary
from .scanning import COLUMNS, DEPTH, ROW_BYTES, SURROGATE, is_too_deep, json_layout, parse_json, read_keys_once

# What the library turns into a row that is null: in a file of lines, and in one that is an array.
NULL_LINE = re.compile(rb"\n\s*(?:null|NaN|-?Infinity)\b")
NULL_ITEM = re.compile(rb"[\n\[,]\s*(?:null|NaN|-?Infinity)\b")


def _is_odd_value(file: BinaryIO) -> bool:
    """Whether a file that is one value, which the library too reads whole, is nested deeper than a row may be, or holds
    a key twice, of which the library takes the last. True of what is no JSON too."""
    text = file.read()

    def forget(pairs: list[tuple[str, Any]]) -> None:
        read_keys_once(pairs)

    if is_too_deep(text):
        return True
    try:
        parse_json(text, object_pairs_hook=forget)
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
    half characters from an array, and of a duplicate key in a file that is one value it takes the last.
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
