"""report.html while a run trains: rewritten now and then, never so often that training would wait for it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from ..report.run_page import make_run_page
from ..run.names import REPORT
from ..run.record import RunRecord
from ..run.writing import FolderLost, write_text

EVERY_SECONDS = 20.0
LARGEST_SHARE = 0.02  # of the time, for pages that take long to write


class ReportFile:
    """The page of one run. A failure to write it is a warning, and stops nothing."""

    def __init__(self, folder: Path, record: RunRecord) -> None:
        self.folder, self.record = folder, record
        self._next = 0.0  # when it may be written again, unasked

    def write(self, now: bool = False) -> None:
        """Writes the page from what the folder holds; without `now` only when the last one has become old."""
        begun = time.perf_counter()
        if not now and begun < self._next:
            return
        try:
            page = make_run_page(self.folder)  # which fails where the folder is gone: it is not made again
            write_text(self.folder / REPORT, page)
        except FolderLost:
            raise
        except Exception as error:
            with contextlib.suppress(OSError):  # run.json, which has the same reason
                self.record.warn(f"{REPORT} could not be written: {type(error).__name__}: {error}", aloud=True)
        ended = time.perf_counter()
        self._next = ended + max(EVERY_SECONDS, (ended - begun) / LARGEST_SHARE)
