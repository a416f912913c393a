"""What a verb writes beside a run: a record, rows and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .writing import write_json, write_json_lines, write_text


def write_results(
    folder: Path, names: tuple[str, str, str], record: dict[str, Any], rows: Sequence[Mapping[str, Any]], page: str
) -> None:
    """Record, rows and page of a verb, by these names, in place of those of an earlier call.

    The record is written first, by which the folder is known as the verb's own (`is_result`), and what stands beside it
    is never that of another.

    Raises:
        UserError: they cannot be written.
    """
    try:
        write_json(folder / names[0], record)
        for name in names[1:]:
            (folder / name).unlink(missing_ok=True)
        write_json_lines(folder / names[1], rows)
        write_text(folder / names[2], page)
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: cannot be written ({error.strerror}); fix that and run again"
        ) from None


def is_result(path: Path, verb: str) -> bool:
    """Whether a file is the record of a verb's results."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["verb"] == verb
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
