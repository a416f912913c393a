"""The state of a run, from its record: whether it is running, its progress, its metrics, and the command to resume."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments.recorded_command import build_command
from ..run.checkpoints import find_checkpoints
from ..run.finding import Foreign, FoundRun, find_runs
from ..run.life import find_state, seconds_since
from ..run.metrics import newest_evaluation, read_metrics
from ..run.record import seconds_at
from ..run.records import mapping_of, number_of, numbers_in, text_of


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
    state, note = find_state(folder, record, at)
    updated = text_of(record, "updated") or text_of(record, "started")
    checkpoints = find_checkpoints(folder)
    left = number_of(record, "seconds_left")
    silence = seconds_since(updated, at)
    runs = state == "running"
    evaluation = newest_evaluation(read_metrics(folder))
    evaluation.pop("step", None)
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
        held_out_before=numbers_in(mapping_of(record, "metrics", "held_out_before")),
        held_out=numbers_in(mapping_of(record, "metrics", "held_out")) or evaluation,
        warnings=tuple(str(warning) for warning in warnings) if isinstance(warnings, list) else (),
        to_go_on=command,
        before_going_on=notes,
        checkpoints=tuple(path.name for path in checkpoints),
        record=record,
    )


def _seconds_taken(record: Mapping[str, Any], at: float | None) -> float | None:
    """Of all its parts, setup left out where the record knows it; `at` is now, for a run that goes on."""
    measured = number_of(record, "resources", "seconds")
    if measured is not None:
        since = seconds_since(text_of(record, "updated"), at) if at is not None else None
        return measured + (since or 0.0)
    began = number_of(record, "process", "started")
    began = began if began is not None else seconds_at(text_of(record, "started"))
    end = at if at is not None else seconds_at(text_of(record, "updated"))
    return None if began is None or end is None else max(0.0, end - began)
