"""The findings, to the terminal and into the files that were asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.inspection.page import make_page
from utils.inspection.summary import summarize
from utils.runtime import say
from utils.saving import write_json, write_text
from utils.settings import InspectionSettings


def publish(record: dict[str, Any], settings: InspectionSettings) -> None:
    """Prints the summary (or the JSON, for `--json_file -`) and writes the page and the JSON.

    Raises:
        UserError: a file cannot be written.
    """
    if settings.json_file == "-":
        say(json.dumps(record, indent=2, ensure_ascii=True))
    else:
        for line in summarize(record):
            say(line)
        _write("json_file", settings.json_file, lambda path: write_json(path, record))
    _write("report_file", settings.report_file, lambda path: write_text(path, make_page(record)))
    if settings.json_file != "-" and settings.report_file is not None:
        say(f"page: {settings.report_file}")


def _write(name: str, file: str | None, write: Callable[[Path], None]) -> None:
    if file is None or file == "-":
        return
    try:
        write(Path(file).expanduser())
    except OSError as error:
        raise UserError(f"--{name} {file}: cannot be written ({error.strerror})") from None
