"""One run per folder: a file in it says which process writes there, and goes with that process.

The file is made in one step, so that of two runs that start together one has it, and is held open under a lock of the
system (flock) for as long as the process lives. A run whose process is gone leaves its file behind; the next run takes
it over. A process is known again by its number and by when it began, counted since the machine was switched on; one in
another container of this machine by the system's lock. Whether a process on another machine lives cannot be seen: its
file holds.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..runtime import is_main_process, readable_seconds, say
from .bounded import read_json
from .names import LOCK
from .processes import identify_process, is_alive, on_same_kernel, patience_seconds
from .record import now, read_record, seconds_at
from .writing import HELD, create_file, explain_fault, unused_name

GRACE = 30.0  # seconds in which a lock that cannot be read may be in the making
LONGEST_SILENCE = 1e9  # seconds; what a record says beyond that (NaN, say) says nothing
PATIENT = 10.0  # seconds to wait for another run that looks at the lock just now


class FolderLock:
    """Within the context: the right to write into a folder, once it was taken."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._content: dict[str, Any] = {}
        self._handle: int | None = None  # of the file, open and locked for the life of the run
        self._made: list[Path] = []  # folders

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self, folder: Path) -> None:
        """Takes the folder, which is made where there is none, for the run of this process and of those it works with.

        Raises:
            UserError: another run has it.
        """
        if not is_main_process():
            return
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self._content = {**identify_process(), "since": now(), "command": shlex.join(sys.argv)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(folder):
                former, self._handle = take_lock(folder / LOCK, self._content)
                HELD[folder.absolute()] = (folder / LOCK).read_bytes()
        except OSError as error:
            what, remedy = explain_fault(error)
            raise UserError(
                f"--output_dir {folder}: {what}; nothing in it was changed. {remedy}, then run again; a run that had "
                "started there resumes with --resume_from_checkpoint auto"
            ) from None
        self._path = folder / LOCK
        if former is not None:
            say(f"lock: {former}; its lock is taken over")

    def release(self) -> None:
        """Gives the folder back; one that was made for the lock and holds nothing goes too."""
        path, self._path = self._path, None
        if path is not None and self._content.get("pid") == os.getpid():
            own = HELD.pop(path.parent.absolute(), None)
            with contextlib.suppress(OSError):
                if path.read_bytes() == own:
                    path.unlink()
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._made = []


def check_not_held(folder: Path) -> None:
    """Refuses a folder that the run of another process writes into; the main one of several asks.

    Raises:
        UserError: who has it, since when, and what to do.
    """
    if not is_main_process():
        return
    path = folder / LOCK
    owner = _read(path)
    if owner is None and _is_fresh(path):
        raise UserError(f"--output_dir {folder}: another run is just starting there; choose another folder")
    if owner is not None and not _is_gone(folder, owner):
        raise UserError(f"--output_dir {folder}: {_describe(folder, owner)}")


def read_owner(folder: Path) -> dict[str, Any] | None:
    """The process that holds a folder, as `identify_process` gives it; None for a folder that is free."""
    owner = _read(folder / LOCK)
    return owner if owner is not None and not _is_gone(folder, owner) else None


def take_lock(path: Path, content: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """Makes the file and locks it. Says of the one in whose place it came, if there was one, that it was left behind;
    and gives the descriptor that holds the system's lock, None where there is no such lock."""
    beside, former = unused_name(path), None
    handle = create_file(beside)
    held: int | None = handle
    try:
        locked = _lock(handle)
        text = json.dumps({**content, "locked": locked}, indent=2)
        _write(handle, text)
        if not locked:
            os.close(handle)
            held = None
        while not _place(beside, path):
            check_not_held(path.parent)
            owner = _read(path) or {}
            former = f"process {owner.get('pid')}, which wrote into {path.parent} since {owner.get('since')}, is gone"
            former = former if owner else f"nothing can be read in {path}"
            path.unlink(missing_ok=True)
        return former, held
    except BaseException:
        if held is not None:
            os.close(held)
        raise
    finally:
        beside.unlink(missing_ok=True)


def _place(beside: Path, path: Path) -> bool:
    """Gives the file its name, unless that is taken."""
    try:
        os.link(beside, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links: the file is written once more, without the system's lock
        try:
            handle = create_file(path)
        except FileExistsError:
            return False
        content = json.loads(beside.read_text(encoding="utf-8")) | {"locked": False}
        _write(handle, json.dumps(content, indent=2))
        os.close(handle)
    return True


def _write(handle: int, text: str) -> None:
    content = text.encode()
    while content:
        content = content[os.write(handle, content) :]
    os.fsync(handle)


def _lock(handle: int, way: str = "LOCK_EX") -> bool:
    """Locks an open file until it is closed or the process ends; False where the system cannot.

    Raises:
        BlockingIOError: another process has locked it.
    """
    try:
        import fcntl

        fcntl.flock(handle, getattr(fcntl, way) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError):  # Windows, some network file systems
        return False
    return True


def _is_locked(path: Path) -> bool | None:
    """Whether a process holds the lock of a file; None where that cannot be seen."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return None if not _lock(handle, "LOCK_SH") else False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While one run looks whether a lock's owner is gone and puts its own in the place, others wait.

    Else the second of two could remove the lock that the first has just made. Where the system cannot do that, that
    moment remains.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows
        yield
        return
    try:
        until = time.monotonic() + PATIENT
        while time.monotonic() < until:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # some network file systems
                break
        yield
    finally:
        os.close(handle)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = read_json(path)  # a pipe in its place would be waited for
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _is_fresh(path: Path) -> bool:
    """Whether a lock that cannot be read is so young that it may be in the making."""
    try:
        return abs(time.time() - path.stat().st_mtime) < GRACE
    except OSError:
        return False


def _is_gone(folder: Path, owner: Mapping[str, Any]) -> bool:
    """Whether the process that made a lock is known to have ended, or is this one."""
    import psutil

    alive = is_alive(owner)
    if alive is not None:
        return not alive or owner.get("pid") == os.getpid()
    if owner.get("locked") is True and on_same_kernel(owner):  # in another container, whose processes are not seen
        locked = _is_locked(folder / LOCK)
        if locked is not None:
            return not locked
    # After a power cut: it ran on a machine of this name, of which nothing was heard since this one was switched on.
    heard, _ = _last_heard(folder, owner)
    return owner.get("host") == socket.gethostname() and heard is not None and heard < psutil.boot_time()


def _describe(folder: Path, owner: Mapping[str, Any]) -> str:
    """Who has the folder, and what can be done."""
    host, pid, since = (owner.get(name, "?") for name in ("host", "pid", "since"))
    command = f" ({owner['command']})" if owner.get("command") else ""
    who = f"process {pid} on {host} writes into it since {since}{command}"
    if is_alive(owner):
        stop = f"kill -TERM {pid}" if os.name == "posix" else f"taskkill /PID {pid}"
        return (
            f"{who}. Two runs cannot write into one folder: choose another, wait for that one, or end it ({stop}: it "
            f"saves its state first). Its progress: status {shlex.quote(str(folder))}"
        )
    at, usual = _last_heard(folder, owner)
    silence = time.time() - at if at is not None else None
    heard = f"its last heartbeat was {readable_seconds(silence)} ago" if silence is not None else "it left no heartbeat"
    if silence is not None and silence > patience_seconds(usual):
        before = f", and its longest gap before was {readable_seconds(usual)}" if usual is not None else ""
        heard += f"{before}: it is probably dead"
    return (
        f"{who}. Whether it still runs cannot be seen from here; {heard}. Check that machine; if the run is dead, "
        f"remove {folder / LOCK} and start again; else choose another folder"
    )


def _last_heard(folder: Path, owner: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """When the run wrote last (seconds since 1970), and the longest that it was ever silent, as far as is known."""
    record = read_record(folder)
    process = record.get("process")
    same = isinstance(process, dict) and process.get("started") == owner.get("started")
    times = [seconds_at(owner.get("since")), seconds_at(record.get("updated")) if same else None]
    usual = record.get("longest_silence") if same else None
    heard = max((at for at in times if at is not None), default=None)
    return heard, float(usual) if isinstance(usual, int | float) and 0 <= usual < LONGEST_SILENCE else None
