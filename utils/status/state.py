"""The state of a run, from its record: whether it is running, its progress, its metrics, and the command to resume."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments.recorded_command import build_command
from ..run.checkpoints import find_checkpoints
from ..run.lock import read_owner
from ..run.names import LOCK, METRICS
from ..run.processes import is_alive, patience_seconds
from ..run.record import seconds_at
from ..run.records import LINE, read_lines
from ..runtime import readable_seconds
from .finding import Foreign, FoundRun, find_runs

DIED = "died"  # the record says that it runs, and its process is gone
HELD_OUT = "held_out_"


@dataclass(frozen=True)
class RunStatus:
    """A run as a person asks for it. What the record does not say is None, or empty."""

    name: str  # its folder, as seen from the one that was asked for
    folder: str
    verb: str
    state: str  # finished, running, interrupted, failed or died
    note: str | None  # what the state needs to be understood
    step: int | None
    steps: int | None
    seconds_left: float | None
    started: str | None  # UTC, ISO 8601
    updated: str | None
    seconds: float | None  # how long it took, or takes by now
    cost: float | None
    held_out_before: Mapping[str, float]
    held_out: Mapping[str, float]  # the newest evaluation
    warnings: tuple[str, ...]
    to_go_on: str | None  # the command
    before_going_on: tuple[str, ...]  # what is to be known before it is typed
    checkpoints: tuple[str, ...]
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Overview:
    """The runs of a folder, and what lies there beside them: names of folders, each with what it is."""

    folder: str
    runs: tuple[RunStatus, ...]
    foreign: tuple[tuple[str, str], ...]


def read_runs(folder: Path) -> Overview:
    """Every run in `folder` and some levels below it, newest first.

    Raises:
        UserError: there is no such folder.
    """
    at = time.time()
    found = find_runs(folder)
    runs = [read_status(run, _name_of(run.folder, folder), at) for run in found if isinstance(run, FoundRun)]
    foreign = tuple((_name_of(item.folder, folder), item.why) for item in found if isinstance(item, Foreign))
    runs.sort(key=lambda run: (run.updated or "", run.started or ""), reverse=True)
    return Overview(str(folder), tuple(runs), foreign)


def _name_of(run: Path, folder: Path) -> str:
    try:
        name = str(run.relative_to(folder))
    except ValueError:  # the run whose checkpoint was named
        name = "."
    return run.resolve().name if name == "." else name


def read_status(run: FoundRun, name: str, at: float) -> RunStatus:
    """The state of a run at a time (seconds since 1970)."""
    record, folder = run.record, run.folder
    state, note = _find_state(record, at)
    owner = read_owner(folder) if state != "running" else None
    if owner is not None and is_alive(owner):
        state, note = "running", f"process {owner['pid']} has locked the folder, and has not started training yet"
    elif owner is not None and owner.get("started") != (record.get("process") or {}).get("started"):
        who = f"process {owner.get('pid')} on {owner.get('host')}"
        note = "; ".join(filter(None, (note, f"its {LOCK} is of {who}, which cannot be seen from here")))
    updated = text_of(record, "updated") or text_of(record, "started")
    checkpoints = find_checkpoints(folder)
    left = number_of(record, "seconds_left")
    silence = _seconds_since(updated, at)
    runs = state == "running"
    steps = [number_of(record, key) for key in ("step", "steps")]
    warnings = record.get("warnings")
    command, notes = (
        (None, ()) if state in ("running", "finished") else build_command(record, folder, bool(checkpoints))
    )
    return RunStatus(
        name=name,
        folder=str(folder),
        verb=record["verb"],
        state=state,
        note=note,
        step=None if steps[0] is None else int(steps[0]),
        steps=None if steps[1] is None else int(steps[1]),
        seconds_left=max(0.0, left - (silence or 0.0)) if runs and left is not None else None,
        started=text_of(record, "started"),
        updated=updated,
        seconds=_seconds_taken(record, at if runs else None),
        cost=number_of(record, "resources", "cost"),
        held_out_before=_numbers(mapping_of(record, "metrics", "held_out_before")),
        held_out=_numbers(mapping_of(record, "metrics", "held_out")) or read_last_evaluation(folder),
        warnings=tuple(str(warning) for warning in warnings) if isinstance(warnings, list) else (),
        to_go_on=command,
        before_going_on=notes,
        checkpoints=tuple(path.name for path in checkpoints),
        record=record,
    )


def _find_state(record: Mapping[str, Any], at: float) -> tuple[str, str | None]:
    if record["status"] != "running":
        return record["status"], text_of(record, "failure")
    process = mapping_of(record, "process")
    alive = is_alive(process)
    host = text_of(record, "process", "host") or "its machine"
    if alive:
        return "running", None
    if alive is False:
        return DIED, f"its process ({process['pid']} on {host}) is gone"
    silence = _seconds_since(text_of(record, "updated") or text_of(record, "started"), at)
    usual = number_of(record, "longest_silence")
    if silence is None:
        return DIED, f"its record does not say when {host} was heard of last"
    ago = readable_seconds(silence)
    if silence <= patience_seconds(usual):
        return "running", f"on {host}; last heartbeat {ago} ago"
    before = f", longest gap before: {readable_seconds(usual)}" if usual is not None else ""
    return DIED, f"silent for {ago}{before}; its process is on {host} and cannot be seen from here"


def _seconds_taken(record: Mapping[str, Any], at: float | None) -> float | None:
    """Of all its parts, setup left out where the record knows it; `at` is now, for a run that goes on."""
    measured = number_of(record, "resources", "seconds")
    if measured is not None:
        since = _seconds_since(text_of(record, "updated"), at) if at is not None else None
        return measured + (since or 0.0)
    began = number_of(record, "process", "started")
    began = began if began is not None else seconds_at(text_of(record, "started"))
    end = at if at is not None else seconds_at(text_of(record, "updated"))
    return None if began is None or end is None else max(0.0, end - began)


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that can be read, each with its `step`; a line that is being written cannot yet."""
    return list(read_lines(folder / METRICS, LINE))


def read_last_evaluation(folder: Path) -> dict[str, float]:
    """The metrics of the newest evaluation of a run that has not ended."""
    lines = [line for line in read_events(folder) if f"{HELD_OUT}loss" in line and line["step"] > 0]
    last = lines[-1] if lines else {}
    return _numbers({name.removeprefix(HELD_OUT): last[name] for name in last if name.startswith(HELD_OUT)})


def _seconds_since(text: str | None, at: float) -> float | None:
    then = seconds_at(text)
    return None if then is None else max(0.0, at - then)


def mapping_of(record: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The mapping at a path of keys; an empty one where the record has none there."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def number_of(record: Mapping[str, Any], *keys: str) -> float | None:
    """The number at a path of keys; None where there is no finite one."""
    value = mapping_of(record, *keys[:-1]).get(keys[-1])
    return value if _is_number(value) else None


def text_of(record: Mapping[str, Any], *keys: str) -> str | None:
    """The text at a path of keys; None where there is none."""
    value = mapping_of(record, *keys[:-1]).get(keys[-1])
    return value if isinstance(value, str) else None


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): value for name, value in metrics.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # no inf, no nan
