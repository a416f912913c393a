"""The findings, to the terminal and into the files that were asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..run.paths import read_path
from ..run.writing import write_json, write_text
from ..runtime import say
from ..settings.data import InspectionSettings
from .page import make_page
from .summary import summarize


def publish(record: dict[str, Any], settings: InspectionSettings) -> None:
    """Prints the summary (or the JSON, for `--json_file -`) and writes the page and the JSON.

    Raises:
        UserError: a file cannot be written, or no pair was left for --output_file.
    """
    if settings.json_file != "-":
        _write("json_file", settings.json_file, lambda path: write_json(path, record))
    _write("report_file", settings.report_file, lambda path: write_text(path, make_page(record)))
    _print(record, settings)
    if record.get("output", {}).get("pairs") == 0:
        raise UserError(f"--output_file {settings.output_file}: not written, as no pair is left")


def _print(record: dict[str, Any], settings: InspectionSettings) -> None:
    if settings.json_file == "-":
        say(json.dumps(record, indent=2).replace("\x7f", "\\u007f"))  # the one control that JSON leaves
        return
    for line in summarize(record):
        say(line)
    if settings.report_file is not None:
        say(f"\npage: {settings.report_file}")


def _write(name: str, file: str | None, write: Callable[[Path], None]) -> None:
    if file is None:
        return
    try:
        write(read_path(file))
    except OSError as error:
        raise UserError(f"--{name} {file}: cannot be written ({error.strerror})") from None
