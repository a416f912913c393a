"""What a run writes: its record, its metrics, its checkpoints. Everything is written beside, flushed, then renamed.

Nothing in a run folder is a pickle: tensors are safetensors, everything else is JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.runtime import say

RECORD = "run.json"
METRICS = "metrics.jsonl"
PAIRS = "held_out_pairs.jsonl"
EXAMPLES = "held_out_examples.jsonl"
SAMPLES = "samples.jsonl"
REPORT = "report.html"
EVALUATION_FILES = ("evaluation.json", "evaluation_pairs.jsonl", "evaluation.html")  # record, rows, page
COMPARISON_FILES = ("comparison.json", "comparison.jsonl", "comparison.html")
RESULTS = {"evaluate": EVALUATION_FILES, "compare": COMPARISON_FILES}
TRAINER_STATE = "trainer_state.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
RESULT_FOLDER = re.compile(r"(evaluation|comparison)(-checkpoint-\d+)?")

# What a run of this script puts into its folder, and so what --overwrite_output_dir may remove from it.
OWN_FILES = (
    RECORD,
    METRICS,
    PAIRS,
    EXAMPLES,
    SAMPLES,
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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; what was written there takes the place of `path` in one step, or nothing does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        let_umask_decide(beside)
        with open(beside, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


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
    except (OSError, ValueError, LookupError, TypeError):
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
        """Writes the file, where there is a folder for it."""
        if self.path is not None:
            write_json(self.path, self.content)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's run.json; None when it has none that can be read."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def append_metrics(folder: Path, line: Mapping[str, Any]) -> None:
    """Adds one line to metrics.jsonl."""
    with open(folder / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, those that are whole; none where there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the nothing behind the last line, or a line that was being written when the run died
            continue
    return [row for row in rows if isinstance(row, dict)]


def keep_metrics_until(folder: Path, step: int) -> None:
    """Drops the metrics and samples of later steps than `step`: a resumed run writes them again."""
    for path in (folder / METRICS, folder / SAMPLES):
        if path.is_file():
            write_json_lines(path, [row for row in read_json_lines(path) if row.get("step", 0) <= step])


def now() -> str:
    """The time as run.json holds it (UTC, ISO 8601)."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
