"""What a run writes: its record, its metrics, its checkpoints. Everything is written beside, flushed, then renamed.

Nothing in a run folder is a pickle: tensors are safetensors, everything else is JSON.
"""

from __future__ import annotations

import calendar
import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..runtime import say
from .records import Unreadable, read_lines, read_run

RECORD = "run.json"
LOCK = "run.lock"
METRICS = "metrics.jsonl"
PAIRS = "held_out_pairs.jsonl"
EXAMPLES = "held_out_examples.jsonl"
SAMPLES = "samples.jsonl"
BAD_PAIRS = "bad_pairs.jsonl"
REPORT = "report.html"
EVALUATION_FILES = ("evaluation.json", "evaluation_pairs.jsonl", "evaluation.html")  # record, rows, page
COMPARISON_FILES = ("comparison.json", "comparison.jsonl", "comparison.html")
RESULTS = {"evaluate": EVALUATION_FILES, "compare": COMPARISON_FILES}
TRAINER_STATE = "trainer_state.json"
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
SET_ASIDE = re.compile(r"checkpoint-\d+\.damaged(-\d+)?")
UNFINISHED_MODEL = ".model.partial"
HALF_MADE = re.compile(rf"\.checkpoint-\d+(\.damaged(-\d+)?)?\.(partial|former)|{re.escape(UNFINISHED_MODEL)}")
HALF_WRITTEN = re.compile(r"\.(.+)\.[0-9a-f]+\.tmp")  # see `unused_name`
STANDS_FOR = "lines"  # the key of a line of metrics in the place of others: how many they were
TIME = "%Y-%m-%dT%H:%M:%SZ"
RESULT_FOLDER = re.compile(r"(evaluation|comparison)(-checkpoint-\d+)?")

# What the system says -> what it means for the folder, and what to do.
MEANINGS = {
    errno.ENOSPC: ("the disk is full", "Make room there"),
    errno.EDQUOT: ("the disk quota is used up", "Make room there"),
    errno.EROFS: ("the disk can only be read now", "Make it writable"),
    errno.EACCES: ("writing is no longer allowed", "Allow it"),
    errno.EPERM: ("writing is no longer allowed", "Allow it"),
    errno.EIO: ("the disk fails", "Look at the disk"),
    errno.EFBIG: ("a file would become larger than is allowed", "Raise that limit (ulimit -f)"),
    errno.EMFILE: ("too many files are open", "Raise that limit (ulimit -n)"),
    errno.ELOOP: ("a link stands where a file belongs", "Remove it"),
}

# Folders that this process writes into alone, each with the bytes of its run.lock.
HELD: dict[Path, bytes] = {}

# What a run of this script puts into its folder, and so what --overwrite_output_dir may remove from it.
OWN_FILES = (
    RECORD,
    LOCK,
    METRICS,
    PAIRS,
    EXAMPLES,
    SAMPLES,
    BAD_PAIRS,
    REPORT,
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "README.md",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


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
                raise FolderLost(f"its {LOCK} was removed, so that another run may begin there") from None
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
    return MEANINGS.get(fault.errno, (reason, "Mend that"))


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
    for path in paths:
        target = folder / path.relative_to(made)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            os.replace(path, target)
    flush_folder(folder)
    shutil.rmtree(made)


def remove_leftovers(folder: Path) -> None:
    """Removes what writers that were killed left half done in the folder of a run, by the names that they give."""
    for path in list(folder.iterdir()):
        if path.is_dir() and HALF_MADE.fullmatch(path.name):
            shutil.rmtree(path)
        elif (match := HALF_WRITTEN.fullmatch(path.name)) and match[1] in OWN_FILES:
            path.unlink(missing_ok=True)


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


def sort_modules(path: Path) -> None:
    """Puts the names in a saved adapter's config in order: PEFT writes its sets in another one in each process."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), list):
            config[name].sort()
    write_json(path, config)


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object per line, in one step."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_results(
    folder: Path, names: tuple[str, str, str], record: dict[str, Any], rows: list[dict[str, Any]], page: str
) -> None:
    """Record, rows and page of a verb, by these names, in place of those of an earlier call.

    The record is written first, by which the folder is known as the verb's own (`is_result`), and what stands beside it
    is never that of another.

    Raises:
        UserError: they cannot be written.
    """
    try:
        write_json(folder / names[0], record)
        for name in names[1:]:
            (folder / name).unlink(missing_ok=True)
        write_json_lines(folder / names[1], rows)
        write_text(folder / names[2], page)
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: cannot be written ({error.strerror}); mend that and run again"
        ) from None


def is_result(path: Path, verb: str) -> bool:
    """Whether a file is the record of a verb's results."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["verb"] == verb
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


class RunRecord:
    """run.json: what the run is and how it went. Every update rewrites it, once it has a folder."""

    def __init__(self, content: Mapping[str, Any]):
        self.path: Path | None = None
        self.content = dict(content)
        self._last = time.monotonic()  # update

    def write_to(self, folder: Path) -> None:
        """Writes the file in `folder`, now and at every update."""
        self.path = folder / RECORD
        folder.mkdir(parents=True, exist_ok=True)
        self.write()

    def update(self, **values: Any) -> None:
        """Sets keys; mappings are merged into what stands there. `updated` shows others that the run goes on, and
        `longest_silence` how many seconds at most it was silent before."""
        silence = time.monotonic() - self._last
        self._last += silence
        self.content["updated"] = now()
        self.content["longest_silence"] = round(max(silence, self.content.get("longest_silence", 0)), 1)
        for key, value in values.items():
            old = self.content.get(key)
            self.content[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, Mapping) else value
        self.write()

    def warn(self, text: str, aloud: bool = False) -> None:
        """Adds a warning, once; `aloud` says it on the console too."""
        warnings = self.content.setdefault("warnings", [])
        if text not in warnings:
            warnings.append(text)
            if aloud:
                say(f"warning: {text}")
            self.write()

    def write(self) -> None:
        """Writes the file, where there is a folder for it.

        Raises:
            OSError: it cannot be written; FileNotFoundError where the folder is gone, which is not made again.
        """
        if self.path is None:
            return
        if not self.path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the folder of the run is gone", str(self.path))
        write_json(self.path, self.content)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's run.json; None when it has none of this script that can be read."""
    try:
        return read_run(folder / RECORD, whole=False)
    except (OSError, Unreadable):
        return None


def append_metrics(folder: Path, line: Mapping[str, Any]) -> None:
    """Adds one line to metrics.jsonl, or nothing of it where it cannot be written whole."""
    check_held(folder)
    with open(folder / METRICS, "ab", buffering=0, opener=open_file) as file:
        size, content = file.tell(), (json.dumps(line) + "\n").encode()
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(size)
            raise


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, those that are whole; none where there is no file."""
    return list(read_lines(path))


def restore_metrics(folder: Path, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Makes metrics.jsonl hold `lines`, which a checkpoint knows of: no later ones, none twice, none missing. Returns
    what it holds then.

    Where the first of them stands for many older lines, those are as the file has them.
    """
    path = folder / METRICS
    found, older = read_json_lines(path), []
    places = [place for place, line in enumerate(lines) if STANDS_FOR in line]
    if places:
        last = places[-1]
        same = [place for place, row in enumerate(found) if row.get("step") == lines[last]["step"] and "loss" in row]
        if same:
            older, found, lines = found[: same[0] + 1], found[same[0] + 1 :], lines[last + 1 :]
    kept = [old if old == new else new for old, new in zip(found, lines, strict=False)]  # keys in their old order
    restored = older + kept + lines[len(kept) :]
    if restored or found:
        write_json_lines(path, restored)
    return restored


def keep_rows_until(folder: Path, step: int) -> None:
    """Drops the samples and bad rows of later steps than `step`: a resumed run writes them again."""
    for path in (folder / SAMPLES, folder / BAD_PAIRS):
        if path.is_file():
            write_json_lines(path, [row for row in read_json_lines(path) if row.get("step", 0) <= step])


def now() -> str:
    """The time as run.json holds it (UTC, ISO 8601)."""
    return time.strftime(TIME, time.gmtime())


def seconds_at(text: str | None) -> float | None:
    """Seconds since 1970 of a time as run.json holds it."""
    try:
        return float(calendar.timegm(time.strptime(text or "", TIME)))
    except (TypeError, ValueError, OverflowError):
        return None
