"""Which folders under a folder hold runs: ours by their record, those of others by what they left."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .bounded import Unreadable
from .names import CHECKPOINT, RECORD, SET_ASIDE, TRAINER_STATE, step_in_name
from .record import find_run_folder
from .records import read_run, read_trainer_state

DEPTH = 4  # levels of folders below the one that is named
NO_RUNS_IN = ("wandb", "tensorboard", "__pycache__", "node_modules")


@dataclass(frozen=True)
class FoundRun:
    """A folder with the record of a run of this script."""

    folder: Path
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Foreign:
    """A folder that looks like one of a run and is none of this script's; or that cannot be looked into."""

    folder: Path
    why: str


def find_runs(folder: Path) -> list[FoundRun | Foreign]:
    """What lies in `folder` and up to DEPTH levels below it, but not within checkpoints, by path.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise UserError(f"FOLDER {folder}: {what}; name the folder that your runs are in")
    of_run = find_run_folder(folder.resolve())
    return list(_look_into(folder if of_run == folder.resolve() else of_run, DEPTH, set()))


def _look_into(folder: Path, levels: int, seen: set[str]) -> Iterator[FoundRun | Foreign]:
    place = os.path.realpath(folder)
    if place in seen:  # a link to a folder that was already looked into
        return
    seen.add(place)
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        found = _read_folder(folder, [name for name in names if CHECKPOINT.fullmatch(name)])
    except OSError as error:
        yield Foreign(folder, f"cannot be looked into ({error.strerror})")
        return
    if found is not None:
        yield found
    for name in names:
        of_run = CHECKPOINT.fullmatch(name) or SET_ASIDE.fullmatch(name)
        if levels and not (name.startswith(".") or name in NO_RUNS_IN or of_run):
            yield from _look_into(folder / name, levels - 1, seen)


def _read_folder(folder: Path, checkpoints: list[str]) -> FoundRun | Foreign | None:
    if (folder / RECORD).is_file():
        return _read_record(folder)
    states = [folder / name / TRAINER_STATE for name in ["", *sorted(checkpoints, key=step_in_name)]]
    states = [path for path in states if path.is_file()]
    return Foreign(folder, _describe_trainer_state(folder, states[-1])) if states else None


def _read_record(folder: Path) -> FoundRun | Foreign:
    try:
        return FoundRun(folder, read_run(folder / RECORD))
    except OSError as error:
        return Foreign(folder, f"its {RECORD} cannot be read ({error.strerror})")
    except Unreadable as error:
        return Foreign(folder, f"its {RECORD} is incomplete, or not written by this script: {error}")


def _describe_trainer_state(folder: Path, path: Path) -> str:
    place = path.relative_to(folder)
    try:
        state = read_trainer_state(path)
        step = f"{state['global_step']:,}"
    except (OSError, Unreadable, LookupError, TypeError):  # the last two: it does not say its step
        return f"has no {RECORD}, and a {place} that cannot be read"
    of = f" of {state['max_steps']:,}" if state.get("max_steps") else ""
    return f"has no {RECORD}; by its {place} another trainer's run, at step {step}{of}"
