"""The runs of a folder, to the terminal and into the page that was asked for."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..run.bounded import Unreadable, read_bytes
from ..run.paths import read_path
from ..run.writing import write_text
from ..runtime import say
from ..settings.training import Settings
from ..settings.verbs import StatusSettings
from .page import TITLE, make_page
from .state import Overview, read_runs
from .table import summarize


def show_status(settings: Settings) -> None:
    """The verb `status`: the runs under a folder -> a table, JSON, or a page that compares them."""
    wish = settings.of(StatusSettings)
    publish(read_runs(read_path(wish.folder)), wish)


def publish(overview: Overview, settings: StatusSettings) -> None:
    """Prints the table, or with --json everything, once the page is written that was asked for.

    Raises:
        UserError: the page cannot be written where it should be.
    """
    if settings.report is not None:
        write_comparison(overview, read_path(settings.report))
    if settings.json:
        say(json.dumps(as_json(overview), indent=2).replace("\x7f", "\\u007f"))  # the one control that JSON leaves
        return
    for line in summarize(overview):
        say(line)
    if settings.report is not None:
        say(f"\npage: {settings.report}")


def write_comparison(overview: Overview, path: Path) -> None:
    """Writes the page that compares the runs; a page of an earlier call is replaced, another file never.

    Raises:
        UserError: there is nothing to compare, the file is another's or in a run's folder, or cannot be written.
    """
    if not overview.runs:
        raise UserError(f"--report {path}: there are no runs to compare in {overview.folder}")
    folders = {Path(run.folder).resolve() for run in overview.runs}
    if not folders.isdisjoint(path.resolve().parents):
        raise UserError(f"--report {path}: lies in the folder of a run, which holds that run alone; name another place")
    try:
        if path.exists() and TITLE not in read_bytes(path).decode("utf-8", errors="replace")[:2000]:
            raise Unreadable("is another file")
        write_text(path, make_page(overview, path.resolve().parent))
    except Unreadable:  # also a pipe, which would be waited for, and a device, which may have no end
        raise UserError(f"--report {path}: exists and is no page of this verb; name another file") from None
    except OSError as error:
        raise UserError(f"--report {path}: cannot be written ({error.strerror})") from None


def as_json(overview: Overview) -> dict[str, Any]:
    """Everything that is known, as JSON takes it: the whole record of each run among it."""
    return _without_nan(
        {
            "folder": overview.folder,
            "runs": [dataclasses.asdict(run) for run in overview.runs],
            "foreign": [{"folder": name, "why": why} for name, why in overview.foreign],
        }
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
