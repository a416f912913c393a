"""The folder of a run: which one, whether the run may write there, and what a run that it holds already recorded."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from ..distributed import LONG, gather
from ..models.templates import recorded_moment
from ..run.checkpoints import find_checkpoints
from ..run.lock import FolderLock
from ..run.paths import read_path
from ..run.record import read_record
from ..settings.training import Settings
from .early import check_content, check_folder


def find_folder(settings: Settings, lock: FolderLock) -> Path | None:
    """The output folder, checked and locked for this run; None in a dry run.

    Raises:
        UserError: it holds something that this run would spoil, or another run writes there.
    """
    folder = check_folder(settings)
    if folder is None:
        return None
    lock.take(folder)
    check_content(folder, settings)  # once more: from here on nobody else changes it
    return folder


def choose_moment(settings: Settings) -> datetime:
    """What a chat template that writes the date is told: what the run that is resumed was told, else now. The same in
    all processes.

    Raises:
        UserError: the record of the run is none.
    """
    now = gather(datetime.now(), LONG)[0]
    folder = settings.run.output_dir
    before = read_former_record(settings, read_path(folder).resolve()) if folder is not None else {}
    return recorded_moment(before) or now


def read_former_record(settings: Settings, folder: Path) -> dict[str, Any]:
    """The record of the run that is resumed; empty where one begins."""
    wish = settings.run.resume_from_checkpoint
    return read_record(folder) if wish is not None and find_checkpoints(folder) else {}
