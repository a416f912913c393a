"""What ends a run from outside: a full disk, a folder that is gone, no memory; and what is safe."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path

from ..engine.memory import LESS_MEMORY, ran_out_of_memory
from ..errors import LocalError, UserError, in_one_line
from ..run.writing import MEANINGS, FolderLost, explain_fault, find_disk_fault

PACKAGE = __name__.partition(".")[0]
GONE = ("the folder is gone (removed, or its disk was taken out)", "Restore it")


def explain_failure(error: BaseException, folder: Path | None, step: int, safe: str, to_go_on: str) -> UserError | None:
    """A failure that comes from outside the script as one message; None for any other.

    Args:
        folder: of the run; None in a dry run.
        step: the last one that was taken.
        safe: what is saved, as a sentence.
        to_go_on: the command.
    """
    if isinstance(error, FolderLost) and folder is not None:
        return UserError(
            f"--output_dir {folder}: {error}. This run stopped after step {step}, and wrote nothing more there. Look "
            "at what is there now; if it is not this run's, start again in another folder"
        )
    fault = find_disk_fault(error)
    if fault is not None and folder is not None and _is_of(fault, folder, error):
        what, remedy = GONE if not folder.is_dir() else explain_fault(fault)
        if fault.errno == errno.EIO and fault.strerror:
            what = f"{what}: {fault.strerror}"
        return UserError(
            f"--output_dir {folder}: {what}; the run stopped after step {step}. {safe} {remedy}, then resume with:\n"
            f"  {to_go_on}"
        )
    if ran_out_of_memory(error):
        return LocalError(
            f"out of memory after step {step} ({in_one_line(error)}). {safe} The same command resumes once other "
            f"programs have freed memory:\n  {to_go_on}\nOtherwise a new run needs less with {LESS_MEMORY}"
        )
    return None


def _is_of(fault: OSError, folder: Path, error: BaseException) -> bool:
    """Whether a file in the folder could not be written. Libraries may not say which file it was, or name it as it is
    called within its own folder; then it counts who was writing."""
    if fault.errno == errno.ENOMEM or isinstance(fault, ConnectionError):
        return False
    path = Path(str(fault.filename or ""))
    if path.is_absolute():
        return folder == path or folder in path.parents
    modules = {frame.f_globals.get("__name__") or "" for frame, _ in traceback.walk_tb(error.__traceback__)}
    return any(map(is_writer, modules)) or (not fault.filename and fault.errno in MEANINGS)


def is_writer(module: str) -> bool:
    """Whether a module is one that writes into the folder of a run."""
    return module.startswith(f"{PACKAGE}.run.") or module == f"{PACKAGE}.training.checkpointing"
