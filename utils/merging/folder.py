"""The folder of a merged model: made beside, renamed when it is whole and verified; the hub repository it goes to."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..models.trained import TrainedModel
from ..run.bounded import read_json
from ..run.folder import check_writable
from ..run.lock import check_not_held, read_owner, take_lock
from ..run.names import HALF_WRITTEN, LOCK
from ..run.paths import read_path
from ..run.processes import identify_process
from ..run.writing import explain_fault, find_disk_fault, flush_files, flush_folder, unused_name
from ..runtime import say

MERGE_RECORD = "merge.json"
FORMER = re.compile(r"\.(.+)\.[0-9a-f]+\.old")  # a model that is being replaced


def read_merge_record(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's merge.json; None where it has none of ours."""
    try:
        content = read_json(folder / MERGE_RECORD)
    except (OSError, ValueError):
        return None
    files = content.get("files") if isinstance(content, dict) else None
    return content if isinstance(files, list) and all(isinstance(name, str) for name in files) else None


def find_merge_folder(output_dir: str, trained: TrainedModel, overwrite: bool) -> Path:
    """The folder to write, checked but not made.

    Raises:
        UserError: it is a file, cannot be written, lies where the run or its base is, or holds anything else.
    """
    folder = read_path(output_dir).resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: a file of that name exists")
    places = [trained.folder, *(Path(name) for name in (trained.source.name, trained.source.base))]
    for place in places:
        if place is not None and place.is_dir() and (place == folder or place in folder.parents):
            raise UserError(f"--output_dir {folder}: is inside {place}, which is an input; choose another folder")
    check_not_held(folder)
    check_writable(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return folder
    record = read_merge_record(folder)
    if record is None:
        raise UserError(
            f"--output_dir {folder}: not empty, and not a merged model of this script (no {MERGE_RECORD}). "
            "Choose another folder"
        )
    if not overwrite:
        raise UserError(
            f"--output_dir {folder}: holds a merged model (of {record.get('adapter')}). Choose another folder, or "
            "pass --overwrite_output_dir to replace it"
        )
    others = sorted({path.name for path in folder.iterdir()} - {MERGE_RECORD, LOCK, *record["files"]})
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UserError(
            f"--output_dir {folder}: --overwrite_output_dir replaces the merged model, but "
            f"{', '.join(others[:3])}{more} were not written by a merge; move them away, or choose another folder"
        )
    return folder


@contextlib.contextmanager
def folder_beside(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of `folder` at the end; after a failure nothing of it is left.

    What a call that was killed left of its own is removed, and a model that it had moved aside is put back.

    Raises:
        UserError: something could not be written.
    """
    made = [parent for parent in folder.parents if not parent.exists()]
    beside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        beside = unused_name(folder)
        beside.mkdir()
        _, handle = take_lock(beside / LOCK, identify_process())
        try:
            yield beside
            flush_files(beside)
            _replace(beside, folder)
            # Until here it tells a call that was killed from one that goes on; from here on it means nothing.
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()
        finally:
            if handle is not None:
                os.close(handle)
    except BaseException as error:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        fault = find_disk_fault(error)
        if fault is None or fault.errno is None:
            raise
        what, remedy = explain_fault(fault)
        read = Path(str(fault.filename or ""))
        place = read if read.is_absolute() and folder.parent not in read.parents else f"--output_dir {folder}"
        raise UserError(f"{place}: {what}; nothing of the merge was kept. {remedy}, then run again") from None


def _tidy(folder: Path) -> None:
    for path in folder.parent.iterdir():
        half, former = HALF_WRITTEN.fullmatch(path.name), FORMER.fullmatch(path.name)
        if path.is_symlink() or not path.is_dir():
            continue
        if half is not None and half[1] == folder.name and (path / LOCK).is_file() and read_owner(path) is None:
            try:
                shutil.rmtree(path)
                say(f"removed {path}, left behind by a killed merge")
            except OSError as error:  # it is another person's, perhaps
                say(f"note: {path}, left behind by a killed merge, cannot be removed ({error.strerror})")
        if former is not None and former[1] == folder.name and read_merge_record(path) is not None:
            if folder.exists():
                shutil.rmtree(path)
            else:
                os.replace(path, folder)
                say(f"restored {folder}, which a killed merge had moved aside")


def _replace(beside: Path, folder: Path) -> None:
    """Gives the folder its name. What had that name goes, or stays where something fails."""
    former = unused_name(folder).with_suffix(".old") if folder.exists() else None
    if former is not None:
        os.replace(folder, former)
    try:
        os.replace(beside, folder)
        flush_folder(folder.parent)
    except OSError:
        if not beside.exists():
            os.replace(folder, beside)
        if former is not None:
            os.replace(former, folder)
        raise
    if former is not None:
        shutil.rmtree(former, ignore_errors=True)  # what stays of it the next call removes
