"""metrics.jsonl and the other files of rows that grow while a run trains, and what of them a resumed run keeps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .names import BAD_PAIRS, METRICS, SAMPLES
from .records import LINE, read_lines
from .writing import check_held, open_file, write_json_lines

HELD_OUT = "held_out_"  # in front of the names of metrics of held-out rows
STANDS_FOR = "lines"  # the key of a line of metrics in the place of others: how many they were


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


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl that can be read, each with its `step`; a line that is being written cannot yet."""
    return read_lines(folder / METRICS, LINE)


def newest_evaluation(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics of the newest evaluation after the first step, by their names without `held_out_`, and its `step`;
    empty where there was none yet."""
    last: Mapping[str, Any] = {}
    for line in lines:
        if f"{HELD_OUT}loss" in line and line["step"] > 0:
            last = line
    found = {name.removeprefix(HELD_OUT): value for name, value in last.items() if name.startswith(HELD_OUT)}
    return {"step": last["step"], **found} if last else {}


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
