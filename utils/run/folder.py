"""What a run may do to --output_dir: whether it may write there, and what it may remove."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..runtime import HALF_CHARACTER
from .checkpoints import find_checkpoints, find_models_alone, remove_checkpoint
from .names import (
    CHECKPOINT,
    HALF_MADE,
    HALF_WRITTEN,
    LOCK,
    OWN_FILES,
    RECORD,
    RESULT_FOLDER,
    RESULTS,
    SET_ASIDE,
    is_own,
)
from .record import read_record
from .results import is_result
from .writing import check_held, write_json


def check_output_folder(output_dir: Path, verb: str, resume: bool, overwrite: bool) -> None:
    """Refuses a folder whose content this run would spoil.

    Raises:
        UserError: the folder holds another run, or files that are not a run's; or it cannot be written.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir}: a file of that name exists")
    check_writable(output_dir)
    if not output_dir.is_dir() or not _content(output_dir):
        return
    record = read_record(output_dir)
    if "status" not in record:
        raise UserError(
            f"--output_dir {output_dir}: not empty, and not a run of this script (no {RECORD}). Choose another folder"
        )
    if overwrite:
        return
    if resume and record.get("status") == "finished" and not find_checkpoints(output_dir):
        alone = ", ".join(path.name for path in find_models_alone(output_dir))
        what = "without checkpoints, so there is nothing to resume"
        if alone:
            what = (
                f"whose checkpoints ({alone}) hold the model alone, without the optimizer's state "
                "(--save_only_model), so it cannot be resumed"
            )
        raise UserError(
            f"--output_dir {output_dir}: holds a finished run {what}. Choose another folder, or pass "
            "--overwrite_output_dir to replace it"
        )
    if not resume:
        go_on = "pass --resume_from_checkpoint auto to continue it, " if record.get("status") != "finished" else ""
        raise UserError(
            f"--output_dir {output_dir}: holds a run ({record.get('verb')}, {record.get('status')}). Choose another "
            f"folder, {go_on}or pass --overwrite_output_dir to replace it"
        )
    if record.get("verb") != verb:
        raise UserError(f"--resume_from_checkpoint: {output_dir} holds a run of {record.get('verb')}, not of {verb}")


def _content(folder: Path) -> list[Path]:
    """What lies in a folder, without what a run that is beginning, or was killed as it began, has there: its lock, and
    the lock or the record half written."""

    def is_begun(name: str) -> bool:
        half = HALF_WRITTEN.fullmatch(name)
        return name == LOCK or (half is not None and half[1] in (LOCK, RECORD))

    return [path for path in folder.iterdir() if not is_begun(path.name)]


def check_writable(output_dir: Path) -> None:
    """Refuses a folder that cannot be written or made."""
    whole = output_dir.resolve()
    if HALF_CHARACTER.search(str(whole)):  # the libraries that save could not pass it on
        raise UserError(
            f"--output_dir {output_dir}: {whole} is not {sys.getfilesystemencoding()} text; choose another folder"
        )
    existing = next(path for path in (output_dir, *whole.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError:
        raise UserError(f"--output_dir {output_dir}: {existing} cannot be written to; choose another folder") from None


@contextlib.contextmanager
def named_as_given(wish: str | None) -> Iterator[None]:
    """Within the context a fault of the folder for results names --output_dir as its cause only where it was given.

    Raises:
        UserError: as within, with the folder itself in place of the flag where `wish` is None.
    """
    try:
        yield
    except UserError as error:
        if wish is not None:
            raise
        faults = [fault.replace("--output_dir /", "the folder for the results, /", 1) for fault in error.faults]
        named = [
            f"{fault} (--output_dir names another)" if fault != old else fault
            for fault, old in zip(faults, error.faults, strict=True)
        ]
        raise UserError(*named) from None


def clear_run(output_dir: Path, damaged: bool = True) -> None:
    """Removes what a former run wrote into the folder, and nothing else. The lock is that of the run which clears.

    Its record stays until that of the new run takes its place, and says no longer that it is finished: a folder that
    was cleared half way is neither a finished run nor unknown.

    Of links the link alone is removed.

    Args:
        damaged: whether checkpoints that were renamed as damaged go too.

    Raises:
        UserError: a folder has the name of a file that a run writes.
    """
    if not output_dir.is_dir():
        return
    check_held(output_dir)
    record = read_record(output_dir)
    if record.get("status") == "finished":
        left = {
            "status": "failed",
            "failure": "another run was replacing it, and was stopped while it removed this one",
        }
        write_json(output_dir / RECORD, record | left)
    for path in list(output_dir.iterdir()):
        is_checkpoint = CHECKPOINT.fullmatch(path.name) or (damaged and SET_ASIDE.fullmatch(path.name))
        if is_checkpoint and path.is_symlink():
            path.unlink()
        elif is_checkpoint and path.is_dir():
            remove_checkpoint(path)
        elif RESULT_FOLDER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            _clear_results(path)
        elif is_own(path.name) and path.name not in (RECORD, LOCK):
            if path.is_dir() and not path.is_symlink():
                raise UserError(f"--output_dir {output_dir}: its {path.name} is a folder that no run made; move it")
            path.unlink()
    remove_leftovers(output_dir)


def _clear_results(folder: Path) -> None:
    """Removes what verbs found of a run that is replaced, and their folder where nothing else (votes, say) is in it."""
    for verb, names in RESULTS.items():
        if is_result(folder / names[0], verb):
            for name in names:
                (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Removes what writers that were killed left half done in the folder of a run, by the names that they give."""
    for path in list(folder.iterdir()):
        if path.is_dir() and HALF_MADE.fullmatch(path.name):
            shutil.rmtree(path)
        elif (match := HALF_WRITTEN.fullmatch(path.name)) and match[1] in OWN_FILES:
            path.unlink(missing_ok=True)
