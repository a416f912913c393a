"""The manifest of a folder: every file with its size and SHA-256, written when all of them are on the disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from .bounded import read_json
from .names import PICKLE_ENDINGS
from .writing import flush_folder, write_json

MANIFEST = "manifest.json"
BLOCK = 2**22  # bytes that are read at a time
THREADS = 4  # hashing leaves Python alone, so that several files are read at once
# Bytes from which threads are worth their start; where memory has run out, Python may wait for ever for one to begin.
LARGE = 2**26
SHOWN = 3  # files that a message names

T = TypeVar("T")
U = TypeVar("U")


def write_manifest(folder: Path, step: int) -> None:
    """Flushes every file of the folder to the disk, then writes down what they are.

    Raises:
        OSError: something could not be flushed or written; there is no manifest then.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    described = _map(_flush_and_describe, paths, sum(path.stat().st_size for path in paths))
    names = [path.relative_to(folder).as_posix() for path in paths]
    for inner in {path.parent for path in paths} | {folder}:
        flush_folder(inner)
    write_json(folder / MANIFEST, {"step": step, "files": dict(zip(names, described, strict=True))})
    flush_folder(folder)


def find_damage(folder: Path, step: int, reads: Callable[[str], bool] = lambda name: True) -> str | None:
    """What is wrong with a folder by its manifest: files that are missing, of another size or of other content, and
    files that it does not list, since a library may load them in place of those that were saved. Hidden files are
    passed over, and so are pickles, which are refused by name wherever a checkpoint is read.

    Args:
        step: what the manifest is to say.
        reads: which files, by name, are read and hashed; of the others the size alone is looked at.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        known = manifest["step"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return f"{MANIFEST} cannot be read"
    if known != step:
        return f"{MANIFEST} is of step {known!r}"
    faults = list(find_changed(folder, files, reads).values())
    faults += [f"{name} is not in its {MANIFEST}" for name in sorted(_visible_files(folder) - {MANIFEST, *files})]
    more = f", and {len(faults) - SHOWN} more files" if len(faults) > SHOWN else ""
    return ", ".join(faults[:SHOWN]) + more if faults else None


def describe_files(folder: Path) -> dict[str, tuple[int, str]]:
    """The files at the top of a folder, hidden ones left out: their sizes in bytes and SHA-256, by name."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    sizes = [path.stat().st_size for path in paths]
    hashes = _map(hash_file, paths, sum(sizes))
    return {path.name: (size, sha256) for path, size, sha256 in zip(paths, sizes, hashes, strict=True)}


def find_changed(
    folder: Path, files: Mapping[str, tuple[int, str]], reads: Callable[[str], bool] = lambda name: True
) -> dict[str, str]:
    """By name, what is wrong with those of some files (their sizes and SHA-256, by name) that are not as described.

    Args:
        reads: which files, by name, are read and hashed; of the others the size alone is looked at.
    """
    size = sum(size for size, _ in files.values())
    found = _map(lambda name: _find_fault(folder / name, name, *files[name], reads(name)), files, size)
    return {name: fault for name, fault in zip(files, found, strict=True) if fault is not None}


def _visible_files(folder: Path) -> set[str]:
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    found = {name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)}
    return {name for name in found if not name.lower().endswith(PICKLE_ENDINGS)}


def _map(describe: Callable[[T], U], items: Iterable[T], size: int) -> list[U]:
    """What `describe` gives for each of some files of `size` bytes in all."""
    if size < LARGE:
        return [describe(item) for item in items]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(describe, items))


def _find_fault(path: Path, name: str, size: int, sha256: str, reads: bool) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
        if not path.is_file():
            return f"{name} is not a file"
        if reads and hash_file(path) != sha256:
            return f"{name} has changed since it was saved (its SHA-256 differs)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def _flush_and_describe(path: Path) -> dict[str, int | str]:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": hash_file(path)}


def forget_cached(folder: Path) -> None:
    """Lets the system drop what it holds of the folder's files in memory, so that reading them reads the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, 1.5 GB a second or so. Raises OSError where it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
