"""Faults that are injected into runs: damaged files, calls of the system that fail, full and vanished disks."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING

from forked import PATIENCE, start

if TYPE_CHECKING:
    from torture import Torture

BLOCK = 4096
# Calls of the system with which a run writes and reads in its folder, and what they may answer.
SYSTEM_CALLS = ("openat", "mkdir", "rename", "unlink", "unlinkat", "rmdir", "link", "chmod", "ftruncate", "write",
                "fsync", "read", "getdents64", "newfstatat", "lseek", "fcntl", "flock")  # fmt: skip
ANSWERS = ("ENOSPC", "EIO", "EFBIG", "EACCES", "EPERM", "EMFILE", "ENFILE", "ETIMEDOUT", "EBUSY", "ESTALE", "EDQUOT",
           "EROFS", "ENOLCK", "EREMOTEIO", "EINVAL", "ENODEV", "ENXIO", "ENOMEM")  # fmt: skip


def in_a_child(act: Callable[[], None]) -> None:
    """Does something in a process of its own, whose threads and memory go with it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"{act} failed")


def inject_faults(torture: Torture, short: bool, calls: int) -> None:
    """Each kind of fault; with `short` once. `calls` is how many system calls are made to fail."""
    damage_files(torture, short)
    fail_calls(torture, (7,) if short else (1, 5, 12, 30))
    fail_system_calls(torture, 1 if short else calls)
    fill_the_disk(torture, (0.7,) if short else (0.02, 0.1, 0.5, 0.9, 1.2))
    if not short:
        lose_the_folder(torture)
        make_read_only(torture)


def note(torture: Torture, kind: str, of: str, code: int | None, faults: list[str], said: str = "") -> None:
    """Writes down a fault and what became of it."""
    torture.faults.append({"kind": kind, "of": of, "code": code, "good": not faults, "faults": faults})
    for fault in faults:
        torture.fail(f"{kind} ({of}): {fault}", said)


def go_on(torture: Torture, way: str, folder: Path) -> tuple[list[str], str]:
    """Resumes the run; in what it differs from the undisturbed one, and what it said."""
    from torture import compare

    started = start(torture.flags(way, folder, "--resume_from_checkpoint", "auto"), torture.fresh("resumed"))
    codes = started.wait()
    if any(codes):
        return [f"it does not resume: exit code {codes[0]}"], started.said()
    return compare(torture.baseline(way, 1), folder), started.said()


def damage_files(torture: Torture, short: bool) -> None:
    """Every file of the newest checkpoint: cut off, one bit flipped, emptied, removed; some of them resumed from."""
    way = "lora"
    baseline = torture.baseline(way, 1)
    newest = max(baseline.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    names = sorted(path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file())
    resumed = torture.draw.sample(range(4 * len(names)), 1 if short else 8)
    for number, (name, (what, act)) in enumerate((name, way) for name in names for way in DAMAGES.items()):
        folder = torture.fresh("damaged")
        shutil.copytree(newest, folder / newest.name)
        act(folder / newest.name / name, torture.draw.randrange(2**30))
        faults = _find(folder / newest.name, name)
        if number in resumed:
            shutil.rmtree(folder)
            shutil.copytree(baseline, folder)
            act(folder / newest.name / name, torture.draw.randrange(2**30))
            differences, said = go_on(torture, way, folder)
            aside = f"{newest.name}.damaged"
            shown = name == "manifest.json" or name in said
            if (folder / aside).is_dir() and shown:
                differences = [one for one in differences if aside not in one]
            else:
                differences.append("the damage is not said")
            faults += differences
        note(torture, f"a file of a checkpoint {what}", name, None, faults)
        shutil.rmtree(folder)


def _find(checkpoint: Path, name: str) -> list[str]:
    """Whether the damage to a file is found, and named."""
    from utils.run.checkpoints import find_fault

    found = find_fault(checkpoint)
    named = found is not None and (name in found or name == "manifest.json")  # which may tell of another file wrongly
    return [] if named else [f"found: {found}"]


def _cut(path: Path, number: int) -> None:
    os.truncate(path, number % max(path.stat().st_size - 1, 1))


def _flip(path: Path, number: int) -> None:
    content = bytearray(path.read_bytes())
    content[number % len(content)] ^= 1 << number % 8
    path.write_bytes(content)


DAMAGES = {
    "cut off": _cut,
    "with a bit flipped": _flip,
    "emptied": lambda path, number: os.truncate(path, 0),
    "removed": lambda path, number: path.unlink(),
}


def fail_calls(torture: Torture, calls: tuple[int, ...]) -> None:
    """The system refuses to flush, to rename or to write, once, at the so-manieth call in the run's folder."""
    way = "full"
    torture.baseline(way, 1)
    for name in ("fsync", "replace", "rename"):
        for call in calls:
            folder = torture.fresh(f"{name}-{call}")
            started = start(torture.flags(way, folder), folder, before=lambda name=name, call=call: _break(name, call))
            (code,) = started.wait()
            said = started.said()
            faults = _judge_message(code, said, "fails")
            differences, after = go_on(torture, way, folder) if code else ([], "")
            note(torture, f"os.{name} that fails", f"call {call}", code, faults + differences, said + after)


def _break(name: str, call: int) -> None:
    real, count = getattr(os, name), 0

    def broken(*arguments, **options):
        nonlocal count
        count += 1
        if count == call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments, **options)

    # As if it were the system's own: who raised an exception decides what a run says of it.
    its_own = FunctionType(broken.__code__, globals() | {"__name__": "os"}, name, None, broken.__closure__)
    setattr(os, name, its_own)


def fail_system_calls(torture: Torture, tries: int) -> None:
    """The kernel answers one call with an error, at any call by which the run writes or reads in its folder."""
    try:
        subprocess.run(["strace", "-o", os.devnull, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"skipped failing system calls: strace does not work here ({error})", flush=True)
        return
    way = "full"
    torture.baseline(way, 1)
    found = _list_calls(torture, way)
    names = [name for name in SYSTEM_CALLS if name in found]
    for number in range(tries):
        name, answer = names[number % len(names)], torture.draw.choice(ANSWERS)
        call = torture.draw.choice(found[name])
        folder, log = torture.fresh(f"{name}-{call}-{answer}"), torture.fresh("strace")
        options = ("-e", f"trace={name}", "-e", f"inject={name}:error={answer}:when={call}")
        started = start(
            torture.flags(way, folder), folder, before=lambda log=log, options=options: _trace(log, *options)
        )
        (code,) = started.wait()
        said, hit = started.said(), _injected(log)
        if not _is_in(folder, hit):  # the calls of two runs are not quite the same
            continue
        differences, after = go_on(torture, way, folder) if code else (compare_runs(torture, way, folder), "")
        # What could be done without has left a warning; a lock that could not be removed is its owner's, who is gone.
        may = ("warnings in run.json", "files ['run.lock']")
        differences = [one for one in differences if not one.startswith(may)]
        faults = _judge_message(code, said, "error" if code else "") + differences
        of = f"{name}, call {call}: {answer} ({hit})"
        note(torture, f"a system call `{name}` that fails", of, code, faults, said + after)


def compare_runs(torture: Torture, way: str, folder: Path) -> list[str]:
    """In what a run that ended by itself differs from the undisturbed one."""
    from torture import compare

    return compare(torture.baseline(way, 1), folder)


def _list_calls(torture: Torture, way: str) -> dict[str, list[int]]:
    """By name of a system call: at which of its calls a run has to do with its folder."""
    folder, log = torture.fresh("traced"), torture.fresh("strace")
    started = start(
        torture.flags(way, folder), folder, before=lambda: _trace(log, "-e", f"trace={','.join(SYSTEM_CALLS)}")
    )
    if any(started.wait()):
        raise RuntimeError(f"the traced run failed:\n{started.said()}")
    counts: Counter[str] = Counter()
    found: dict[str, list[int]] = {}
    for line in log.read_text(errors="replace").splitlines():
        if match := re.match(r"(\w+)\(", line):
            counts[match[1]] += 1
            if _is_in(folder, line):
                found.setdefault(match[1], []).append(counts[match[1]])
    return found


def _trace(log: Path, *options: str) -> None:
    """Has strace follow this process from here on."""
    words = ["strace", "-q", "-y", "-s", "0", "-o", str(log), *options, "-p", str(os.getpid())]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
        if process.poll() is not None:
            raise RuntimeError("strace does not follow this process")
        time.sleep(0.005)
    time.sleep(0.1)  # it has yet to ask for what it is to see


def _is_in(folder: Path, call: str) -> bool:
    return re.search(rf"{re.escape(str(folder))}[/\">]", call) is not None


def _injected(log: Path) -> str:
    """The call that was answered with an error, as strace writes it."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line for line in lines if "(INJECTED)" in line), "")


def _judge_message(code: int | None, said: str, word: str) -> list[str]:
    """A run that was hit ends well, or with one message: what happened, what is safe, the command that goes on."""
    if code == 0:
        return []
    faults = [f"exit code {code}"] if code != 2 else []
    faults += ["a traceback"] if "Traceback" in said else []
    faults += [f"nothing about {word!r}"] if word not in said else []
    faults += ["no command that goes on"] if "--resume_from_checkpoint auto" not in said else []
    return faults + (["several messages"] if said.count("error: ") > 1 else [])


def fill_the_disk(torture: Torture, shares: tuple[float, ...]) -> None:
    """A disk with room for a part of what the run leaves, which fills in different moments; given more, it goes on."""
    way = "full"
    whole = sum(path.stat().st_size + BLOCK for path in torture.baseline(way, 1).rglob("*") if path.is_file())
    for share in shares:
        size = round(share * whole / 1024)
        with_disk = _mount(torture.fresh("disk"), size)
        for place in with_disk:
            folder = place / "run"
            started = start(torture.flags(way, folder), torture.fresh("full"))
            (code,) = started.wait()
            said = started.said()
            faults = _judge_message(code, said, "the disk is full")
            subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
            differences, after = go_on(torture, way, folder)
            note(torture, "a full disk", f"{size} KiB", code, faults + differences, said + after)


def lose_the_folder(torture: Torture) -> None:
    """The folder is taken away while the run goes on, and brought back."""
    way = "full"
    folder = torture.fresh("vanished")
    started = start(torture.flags(way, folder), folder)
    if _wait_for(folder / "checkpoint-6"):
        folder.rename(folder.with_name("away"))
    (code,) = started.wait()
    said = started.said()
    faults = _judge_message(code, said, "the folder is gone")
    faults += ["the folder was made again"] if folder.exists() else []
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name("away").rename(folder)
    differences, after = go_on(torture, way, folder)
    note(torture, "a folder that is taken away", "", code, faults + differences, said + after)


def make_read_only(torture: Torture) -> None:
    """The disk can only be read from some moment on."""
    way = "lora"
    for place in _mount(torture.fresh("disk"), 65536):
        folder = place / "run"
        started = start(torture.flags(way, folder), torture.fresh("read-only"))
        _wait_for(folder / "checkpoint-6")
        remounted = None
        while started.look() and remounted != 0:  # refused while a file is open for writing
            remounted = subprocess.run(["mount", "-o", "remount,ro", str(place)], capture_output=True).returncode
        (code,) = started.wait()
        said = started.said()
        faults = _judge_message(code, said, "can only be read")
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
        differences, after = go_on(torture, way, folder)
        note(torture, "a disk that can only be read", "", code, faults + differences, said + after)


def _wait_for(path: Path) -> bool:
    ends = time.monotonic() + PATIENCE
    while not path.exists() and time.monotonic() < ends:
        time.sleep(0.002)
    return path.exists()


def _mount(place: Path, kibibytes: int) -> Iterator[Path]:
    """A small disk in memory, for as long as the loop over it runs; none where mounting is not allowed."""
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "torture", str(place)]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"skipped a disk of {kibibytes} KiB: mounting one is not allowed here ({error})", flush=True)
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)
