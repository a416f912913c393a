"""Files are written beside their place, flushed, then renamed, and only where the folder is still this process's own.

Nothing in the folder of a run is a pickle: tensors are safetensors, everything else is JSON.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .names import LOCK

# What the system says -> what it means for the folder, and what to do.
MEANINGS = {
    errno.ENOSPC: ("the disk is full", "Make room there"),
    errno.EDQUOT: ("the disk quota is used up", "Make room there"),
    errno.EROFS: ("the disk is read-only now", "Make it writable"),
    errno.EACCES: ("writing is no longer allowed", "Allow it"),
    errno.EPERM: ("writing is no longer allowed", "Allow it"),
    errno.EIO: ("disk error", "Check the disk"),
    errno.EFBIG: ("the file size limit is reached", "Raise that limit (ulimit -f)"),
    errno.EMFILE: ("too many files are open", "Raise that limit (ulimit -n)"),
    errno.ELOOP: ("a symlink is in the place of a file", "Remove it"),
}
# Folders that this process writes into alone, each with the bytes of its run.lock.
HELD: dict[Path, bytes] = {}


class FolderLost(OSError):
    """The folder of the run is another run's by now, or was emptied: nothing more may be written there."""


def check_held(path: Path) -> None:
    """Makes sure, before something is written at `path`, that a folder around it which this process holds is its own
    still.

    Raises:
        FolderLost: its lock is gone, or another's. FileNotFoundError where the whole folder is gone.
    """
    path = path.absolute()
    for folder in (path, *path.parents) if HELD else ():
        if folder in HELD:
            try:
                found = (folder / LOCK).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                if not folder.is_dir():
                    raise FileNotFoundError(errno.ENOENT, "the folder of the run is gone", str(folder)) from None
                raise FolderLost(f"its {LOCK} was removed, so that another run may start there") from None
            if found != HELD[folder]:
                raise FolderLost(f"its {LOCK} is that of another run, which writes there now")


def unused_name(path: Path) -> Path:
    """A name beside `path` for what is to take its place. Nobody can foresee it, so nobody has put a link there."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def open_file(path: str | Path, flags: int) -> int:
    """Opens a file, never through a link (an `opener` of Python's open). Returns its descriptor."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def create_file(path: Path) -> int:
    """Makes an empty file that did not exist, and opens it to read and write. Returns its descriptor."""
    return open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; what was written there takes the place of `path` in one step, or nothing does."""
    check_held(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = unused_name(path)
    os.close(create_file(beside))
    try:
        yield beside
        let_umask_decide(beside)
        with open(beside, "r+b") as file:
            os.fsync(file.fileno())
        check_held(path)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def find_disk_fault(error: BaseException) -> OSError | None:
    """A failure to write or read as Python's own exception, also where a library words it in its own way."""
    if isinstance(error, OSError):
        return error
    if match := re.search(r"\(os error (\d+)\)", str(error)):  # of safetensors
        return OSError(int(match[1]), os.strerror(int(match[1])))
    if "PytorchStreamWriter failed" in str(error):  # torch.save, which does not say why
        return OSError(errno.EIO, "a file could not be written whole")
    return None


def explain_fault(fault: OSError) -> tuple[str, str]:
    """What a failure to write or read means, and what to do about it."""
    name = f" {Path(str(fault.filename)).name}" if fault.filename else ""
    reason = f"{(fault.strerror or str(fault) or type(fault).__name__).lower()}{name}"
    return MEANINGS.get(fault.errno or 0, (reason, "Fix that"))


def flush_files(folder: Path) -> None:
    """Brings every file and every name in a folder to the disk."""
    paths = sorted(folder.rglob("*"))
    for path in paths:
        if path.is_file():
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
    for path in (*(path for path in paths if path.is_dir()), folder):
        flush_folder(path)


def flush_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk: what was made, renamed or removed in it outlives a power cut."""
    if os.name == "nt":  # which has no such call, and needs none
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def move_into_place(made: Path, folder: Path) -> None:
    """Moves what stands in `made` into `folder`, each file in one step, flushed before; `made` is gone afterwards."""
    paths = sorted(made.rglob("*"))
    for path in paths:
        if path.is_file():
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
    check_held(folder)  # which takes no time; flushing may
    folders = [folder]
    for path in paths:
        target = folder / path.relative_to(made)
        if path.is_dir():
            target.mkdir(exist_ok=True)
            folders.append(target)
        else:
            os.replace(path, target)
    for path in folders:
        flush_folder(path)
    shutil.rmtree(made)


def let_umask_decide(*paths: Path) -> None:
    """Gives files the modes that any new file of this process gets; safetensors makes its own for the owner alone."""
    mask = os.umask(0o077)  # the only way to read it is to set it, for a moment to the narrowest
    os.umask(mask)
    for path in paths:
        path.chmod(0o666 & ~mask)


def write_text(path: Path, text: str) -> None:
    """Replaces the file in one step: a reader sees the old content or the new one, never a part."""
    # A lone surrogate, which JSON may hold, is written as the JSON escape \udXXX.
    with replacing(path) as beside, open(beside, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def write_json(path: Path, content: Any) -> None:
    """`content` as indented JSON, in one step."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object per line, in one step."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
