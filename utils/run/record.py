"""run.json: what a run is and how it went, rewritten whole at every milestone."""

from __future__ import annotations

import calendar
import errno
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runtime import say
from .bounded import Unreadable
from .names import CHECKPOINT, RECORD
from .records import read_run
from .writing import write_json

TIME = "%Y-%m-%dT%H:%M:%SZ"


class RunRecord:
    """run.json: what the run is and how it went. Every update rewrites it, once it has a folder."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.path: Path | None = None
        self.content = dict(content)
        self._last = time.monotonic()  # update

    def write_to(self, folder: Path) -> None:
        """Writes the file in `folder`, now and at every update."""
        self.path = folder / RECORD
        folder.mkdir(parents=True, exist_ok=True)
        self.write()

    def update(self, **values: Any) -> None:
        """Sets keys; mappings are merged into what stands there. `updated` shows others that the run goes on, and
        `longest_silence` how many seconds at most it was silent before."""
        silence = time.monotonic() - self._last
        self._last += silence
        self.content["updated"] = now()
        self.content["longest_silence"] = round(max(silence, self.content.get("longest_silence", 0)), 1)
        for key, value in values.items():
            old = self.content.get(key)
            self.content[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, Mapping) else value
        self.write()

    def warn(self, text: str, aloud: bool = False) -> None:
        """Adds a warning, once; `aloud` says it on the console too."""
        warnings = self.content.setdefault("warnings", [])
        if text not in warnings:
            warnings.append(text)
            if aloud:
                say(f"warning: {text}")
            self.write()

    def write(self) -> None:
        """Writes the file, where there is a folder for it.

        Raises:
            OSError: it cannot be written; FileNotFoundError where the folder is gone, which is not made again.
        """
        if self.path is None:
            return
        if not self.path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the folder of the run is gone", str(self.path))
        write_json(self.path, self.content)


def read_record(folder: Path, whole: bool = False) -> dict[str, Any]:
    """The content of a folder's run.json; empty when it has none of this script that can be read.

    Args:
        whole: whether one without what every run writes counts as none.
    """
    try:
        return read_run(folder / RECORD, whole)
    except (OSError, Unreadable):
        return {}


def find_run_folder(folder: Path) -> Path:
    """The folder of the run that a checkpoint lies in; any other folder is taken for that of a run itself."""
    return folder.parent if CHECKPOINT.fullmatch(folder.name) and (folder.parent / RECORD).is_file() else folder


def now() -> str:
    """The time as run.json holds it (UTC, ISO 8601)."""
    return time.strftime(TIME, time.gmtime())


def seconds_at(text: str | None) -> float | None:
    """Seconds since 1970 of a time as run.json holds it."""
    try:
        return float(calendar.timegm(time.strptime(text or "", TIME)))
    except (TypeError, ValueError, OverflowError):
        return None
