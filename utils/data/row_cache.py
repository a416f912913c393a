"""Tables on the disk that need not be made again: found by what decides them, and checked before they are used.

An entry is a folder under its key: the Arrow files and a list of them with their hashes. It is written beside, flushed
and renamed, so that it is whole or not there. One that is not what was written is made again. Where the cache cannot be
read or written, the table is made in a temporary folder that goes with the process.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets.fingerprint import Hasher
from datasets.table import MemoryMappedTable, concat_tables

from ..errors import UserError
from ..progress import phase
from ..run.manifests import hash_file
from ..run.writing import flush_folder, write_text
from ..runtime import say
from .code_hash import hash_code

LIST = "entry.json"
STALE_SECONDS = 7 * 24 * 3600  # an unfinished entry of this age was left by a process that was killed
LIBRARIES = (datasets.__version__, datasets.config.PYARROW_VERSION.release)

_said: set[str] = set()


def cache_folder() -> Path:
    """Where entries are kept: within the cache of `datasets`, which HF_DATASETS_CACHE and HF_HOME move."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "checked_rows"


def make_key(*parts: Any) -> str:
    """One key of values that JSON can write."""
    return hashlib.sha256(json.dumps([*parts, LIBRARIES], sort_keys=True).encode()).hexdigest()[:40]


def map_rows(
    rows: datasets.Dataset,
    function: Callable[..., Any],
    decides: Iterable[Any],
    on_disk: bool | None = None,
    doing: str = "reading",
    **options: Any,
) -> datasets.Dataset:
    """`rows.map(function)`, kept under the rows, what `decides`, and the code of the function's module.

    Rows that are in memory stay there, unless `on_disk`.

    Args:
        decides: all that the result depends on beside the rows and the code, in values that hash alike everywhere.
        doing: what a person calls it, while it lasts.
        options: of `Dataset.map`, whose function gets batches.
    """
    key = make_key(rows._fingerprint, Hasher.hash(tuple(decides)), hash_code(function.__module__))
    if not (bool(rows.cache_files) if on_disk is None else on_disk):
        return _map_shown(rows, function, doing, new_fingerprint=key, **options)

    def make(folder: Path) -> datasets.Dataset:
        file = str(folder / "rows.arrow")
        return _map_shown(rows, function, doing, new_fingerprint=key, cache_file_name=file, **options)

    return keep_rows(key, make)


def _map_shown(rows: datasets.Dataset, function: Callable[..., Any], doing: str, **options: Any) -> datasets.Dataset:
    """`rows.map`, which says how far it is; not where processes share the work, whose rows are not counted here."""
    if (options.get("num_proc") or 1) > 1:
        with phase(doing):
            return rows.map(function, **options)
    with phase(doing, len(rows), "rows") as shown:

        @functools.wraps(function)
        def counted(batch: Any, *more: Any, **values: Any) -> Any:
            result = function(batch, *more, **values)
            shown.advance(len(batch[next(iter(batch))]))
            return result

        return rows.map(counted, **options)


def flatten_rows(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows as a table of their own where they are a choice of another's; `add_column` would write it unchecked."""
    if rows._indices is None or not rows.cache_files:
        return rows
    key = make_key(rows._fingerprint, "flat")
    return keep_rows(
        key, lambda folder: rows.flatten_indices(cache_file_name=str(folder / "rows.arrow"), new_fingerprint=key)
    )


def keep_rows(key: str, make: Callable[[Path], datasets.Dataset]) -> datasets.Dataset:
    """The rows kept under `key`; those that `make` writes into the folder given, where there are none that are sound.

    Raises:
        UserError: neither the cache nor a temporary folder can be written.
    """
    folder = cache_folder()
    try:
        rows = _load(folder / key)
        if rows is None:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_stale(folder)
            rows = _make_entry(folder / key, make)
        return rows
    except Exception as error:
        fault = find_system_fault(error)
        if fault is None:
            raise
    try:
        made = make(make_scratch(fault))
    except Exception as error:
        fault = find_system_fault(error)
        if fault is None:
            raise
        raise UserError(
            f"rows can be written neither to the cache {folder} nor in a temporary folder ({fault.strerror or fault}): "
            "make room, or name another disk with HF_DATASETS_CACHE or TMPDIR"
        ) from None
    made._fingerprint = key
    return made


def make_scratch(fault: OSError) -> Path:
    """A temporary folder in the place of the cache, which goes with the process; `fault` is why, said once."""
    folder = Path(tempfile.mkdtemp(prefix="rows-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    text = (
        f"warning: the cache {cache_folder()} cannot be used ({fault.strerror or fault}); rows are prepared again at "
        "each start"
    )
    if text not in _said:
        _said.add(text)
        say(text)
    return folder


def name_by_content(rows: datasets.Dataset) -> list[str]:
    """Makes what its files hold the fingerprint of a table, in place of what its records say; returns their hashes."""
    hashes = [hash_file(Path(file["filename"])) for file in rows.cache_files]
    if hashes:
        rows._fingerprint = make_key(hashes, rows.features.to_dict())
    return hashes


def know_by_content(splits: Mapping[str, datasets.Dataset]) -> Path | None:
    """`name_by_content` of tables in a cache that is not ours. Returns a file that is not what it was when it was
    first read, if there is one (which is said)."""
    for rows in splits.values():
        hashes = name_by_content(rows)
        files = [file["filename"] for file in rows.cache_files]
        known = cache_folder() / f"seen-{make_key(files)}.json"
        try:
            former = json.loads(known.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            former = None
        if former == hashes or not files:
            continue
        if former is not None:
            say(f"warning: {files[0]} has changed since it was written; it is prepared again")
            return Path(files[0])
        with contextlib.suppress(OSError):  # then the next start cannot compare
            write_text(known, json.dumps(hashes))
    return None


def find_system_fault(error: BaseException | None) -> OSError | None:
    """The failure of a file or disk behind an error, which a library may have wrapped; None where there is none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen and not isinstance(error, UserError):
        if isinstance(error, OSError) and error.errno is not None:  # damaged data has none
            return error
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _make_entry(entry: Path, make: Callable[[Path], datasets.Dataset]) -> datasets.Dataset:
    beside = entry.with_name(f".{entry.name}.{secrets.token_hex(8)}")
    beside.mkdir()
    try:
        made = make(beside)
        files = [Path(file["filename"]) for file in made.cache_files]
        if not files or not all(file.is_relative_to(beside) for file in files):
            return made  # no rows, of which the library writes no file
        about = {"features": made.features.to_dict(), "builder_name": made.builder_name}
        del made  # so that its files can be moved on any system
        _seal(beside, files, about, entry.name)
        _put_in_place(beside, entry)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    rows = _load(entry)
    if rows is None:
        raise OSError(errno.EIO, "what is written there is lost", str(entry))
    return rows


def _seal(folder: Path, files: list[Path], about: dict[str, Any], key: str) -> None:
    """Leaves the files alone in the folder, with a list of their hashes, all of it flushed."""
    listed = []
    for number, file in enumerate(files):
        target = folder / f"rows-{number:05}.arrow"
        os.replace(file, target)
        listed.append([target.name, target.stat().st_size, hash_file(target)])
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in {name for name, _, _ in listed}:
            path.unlink()
    content = {"files": listed, **about}
    (folder / LIST).write_text(json.dumps([content, make_key(key, content)]), encoding="utf-8")
    for path in folder.iterdir():
        with open(path, "r+b") as written:
            os.fsync(written.fileno())
    flush_folder(folder)


def _put_in_place(beside: Path, entry: Path) -> None:
    """Renames the folder to `entry`. One that another process put there meanwhile stays if it is sound."""
    with contextlib.suppress(OSError, ValueError):
        _check(entry)
        return
    if os.path.lexists(entry):
        _remove(entry)
    try:
        beside.rename(entry)
    except OSError:
        if not entry.is_dir():
            raise
    flush_folder(entry.parent)


def _load(entry: Path) -> datasets.Dataset | None:
    """The rows of an entry; None where there is none, or one that is not what was written (which is said)."""
    if not os.path.lexists(entry):
        return None
    try:
        content = _check(entry)
        tables = [MemoryMappedTable.from_file(str(entry / name)) for name, _, _ in content["files"]]
        features = datasets.Features.from_dict(content["features"])
        info = datasets.DatasetInfo(features=features, builder_name=content["builder_name"])
        return datasets.Dataset(concat_tables(tables), info=info, fingerprint=entry.name)
    except Exception as error:  # damaged files can make the readers raise anything
        fault = (error.strerror if isinstance(error, OSError) else None) or error
    say(f"warning: kept rows in {entry} are damaged ({fault}); they are prepared again")
    return None


def _check(entry: Path) -> dict[str, Any]:
    """What an entry's list says. Raises OSError or ValueError where it, or a file, is not what was written."""
    try:
        content, digest = json.loads((entry / LIST).read_text(encoding="utf-8"))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{LIST} has changed") from None
    if digest != make_key(entry.name, content):
        raise ValueError(f"{LIST} has changed")
    for name, size, digest in content["files"]:
        if (entry / name).stat().st_size != size or hash_file(entry / name) != digest:
            raise ValueError(f"{name} has changed")
    return content


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_stale(folder: Path) -> None:
    for path in folder.glob(".*"):
        if time.time() - path.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
