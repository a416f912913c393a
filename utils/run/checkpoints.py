"""The checkpoints of a run: which are complete, which one a run resumes from, and how a new one is written.

A checkpoint is written under a name that nothing takes for one, flushed to the disk, described by a manifest, and gets
its own name in one step. Whatever has that name is whole, or was damaged later, which the manifest shows.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..runtime import say
from .bounded import Unreadable
from .manifests import MANIFEST, find_damage, forget_cached, write_manifest
from .names import CHECKPOINT, SET_ASIDE, TRAINER_STATE, step_in_name
from .records import read_trainer_state
from .state import IDENTITY, read_kept, read_state_there
from .writing import check_held, flush_folder

# Of the training alone: whoever only uses the model does not read them.
OF_TRAINING = ("optimizer", "scheduler", "scaler", "random_state", "log_state", TRAINER_STATE)


@dataclass(frozen=True)
class ResumePoint:
    """Where a run resumes from (None: from its beginning), and what was found on the way there."""

    checkpoint: Path | None
    damaged: tuple[tuple[Path, str], ...] = ()  # newest first, each with what is wrong with it
    notes: tuple[str, ...] = ()


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that a run can resume from, oldest first, by the names and sizes of their files."""
    return [path for path in _named(folder) if is_complete(path)]


def find_models_alone(folder: Path) -> list[Path]:
    """The checkpoints that hold a model without the optimizer's state, from which no run can resume, oldest first."""
    return [path for path in _named(folder) if not _has_optimizer(path)]


def _named(folder: Path) -> list[Path]:
    """What has the name of a checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (step_in_name(path.name), path))


def checkpoint_step(checkpoint: Path) -> int:
    """The step at which it was saved, as the trainer's state says.

    Raises:
        UserError: the state cannot be read.
    """
    try:
        step = read_trainer_state(checkpoint / TRAINER_STATE).get("global_step")
        if step is None:
            raise Unreadable("it has no global_step")
        return step
    except (OSError, Unreadable) as error:
        raise UserError(
            f"{checkpoint}: its {TRAINER_STATE} cannot be read back ({str(error)[:200]}); resume from an earlier "
            "checkpoint, or start over"
        ) from None


def preference_step(checkpoint: Path) -> int | None:
    """The step of a checkpoint of preference training, ours or another trainer's; None for anything else."""
    state = read_state_there(checkpoint)
    lines = state.get("log_history") or ()
    return state.get("global_step") if any("margin" in name for line in lines for name in line or ()) else None


def is_complete(checkpoint: Path) -> bool:
    """Whether a run can resume from it, as far as the names and sizes of its files tell."""
    return find_fault(checkpoint, reads=lambda name: False) is None and _has_optimizer(checkpoint)


def _has_optimizer(checkpoint: Path) -> bool:
    return any(checkpoint.rglob("*optim*"))  # ours, FSDP's and DeepSpeed's


def is_of_model(name: str) -> bool:
    """Whether a file of a checkpoint is one that a user of its model reads."""
    return "/" not in name and not name.startswith(OF_TRAINING)


def find_fault(checkpoint: Path, reads: Callable[[str], bool] = lambda name: True) -> str | None:
    """What is wrong with the files of a checkpoint; None where it is whole.

    A checkpoint of an earlier version, which kept nothing of the run's identity, has no manifest; of such a one only
    half-written files can be told. Any other without a manifest has lost it.

    Args:
        reads: the files, by name, whose content is compared with its hash; all by default.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    if SET_ASIDE.fullmatch(checkpoint.name):
        return "it was found damaged earlier, and renamed"
    if CHECKPOINT.fullmatch(checkpoint.name) is None:
        return "its name is not that of a checkpoint (checkpoint-N)"
    step = step_in_name(checkpoint.name)
    if (checkpoint / MANIFEST).exists():
        fault = find_damage(checkpoint, step, reads)
    elif not (checkpoint / TRAINER_STATE).is_file():
        fault = f"it has no {MANIFEST} and no {TRAINER_STATE}"
    elif IDENTITY in read_kept(checkpoint):
        fault = f"{MANIFEST} is missing, so its content cannot be checked"
    else:
        fault = next(filter(None, map(_find_end, sorted(checkpoint.rglob("*")))), None)
    return fault or (_find_state_fault(checkpoint, step) if reads(TRAINER_STATE) else None)


def _find_state_fault(checkpoint: Path, step: int) -> str | None:
    """What in the trainer's state is not what a trainer writes, and would end a run that goes on in its middle; the
    manifest may be of the same hand."""
    try:
        state = read_trainer_state(checkpoint / TRAINER_STATE)
    except (OSError, Unreadable) as error:
        return f"{TRAINER_STATE} cannot be used: {error}"
    found = state.get("global_step", step)
    return f"{TRAINER_STATE} is of step {found}" if found != step else None


def _find_end(path: Path) -> str | None:
    """Whether a file ends before what its own format promises."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length >= path.stat().st_size:
                    raise ValueError("the header would be longer than the file")
                parts = json.loads(file.read(length))
            ends = [part["data_offsets"][1] for name, part in parts.items() if name != "__metadata__"]
            if path.stat().st_size != 8 + length + max(ends, default=0):
                return f"{path.name} is truncated"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{path.name} is truncated or cannot be read"
    return None


def find_resume_point(output_dir: Path, wish: str | None) -> ResumePoint:
    """The checkpoint that --resume_from_checkpoint means, its files compared with the hashes of its manifest.

    Raises:
        UserError: a checkpoint was named that a run cannot resume from.
    """
    if wish is None:
        return ResumePoint(None)
    if wish == "auto":
        return _find_newest(output_dir)
    path = Path(wish).expanduser().resolve()
    fault = find_fault(path)
    if fault is None and not _has_optimizer(path):
        fault = "it holds a model alone, without the optimizer's state (--save_only_model)"
    if fault is not None:
        newest = _find_newest(output_dir).checkpoint
        hint = f"the newest good one in {output_dir} is {newest.name}" if newest else "pass auto to start without one"
        raise UserError(f"--resume_from_checkpoint {wish}: cannot be resumed from: {fault}; {hint}")
    return ResumePoint(path, notes=tuple(_note_manifest(path)))


def _find_newest(folder: Path) -> ResumePoint:
    """The newest complete checkpoint. One whose best model so far is lost ranks behind an older one with its own."""
    damaged: list[tuple[Path, str]] = []
    notes: list[str] = []
    without_best: list[Path] = []
    for path in reversed(_named(folder)):
        fault = find_fault(path)
        if fault is not None:
            damaged.append((path, fault))
            continue
        if not _has_optimizer(path):
            notes.append(f"{path.name} holds a model alone, without the optimizer's state: a run cannot resume from it")
            continue
        best = _find_best(path)
        if best is None or best == path or find_fault(best) is None:
            skipped = [f"{one.name} is good, but the best model it refers to is missing" for one in without_best]
            return ResumePoint(path, tuple(damaged), (*notes, *skipped, *_note_manifest(path)))
        without_best.append(path)
    if without_best:
        lost = f"the best model that {without_best[0].name} refers to is missing, and so is any older one"
        return ResumePoint(without_best[0], tuple(damaged), (*notes, lost))
    return ResumePoint(None, tuple(damaged), tuple(notes))


def _note_manifest(checkpoint: Path) -> Iterator[str]:
    if not (checkpoint / MANIFEST).is_file():
        yield f"{checkpoint.name} has no {MANIFEST} (an earlier version saved it): its content cannot be checked"


def _find_best(checkpoint: Path) -> Path | None:
    """The checkpoint of the best model so far, where the run keeps it."""
    best = read_state_there(checkpoint).get("best_model_checkpoint")
    name = Path(best).name if best else ""
    return checkpoint.with_name(name) if CHECKPOINT.fullmatch(name) else None


def set_aside(point: ResumePoint) -> None:
    """Renames damaged checkpoints, so that nothing counts or loads them, and says why."""
    for path, fault in point.damaged:
        number, target = 1, path.with_name(f"{path.name}.damaged")
        while target.exists():
            number += 1
            target = path.with_name(f"{path.name}.damaged-{number}")
        path.rename(target)
        say(f"{path.name} is damaged: {fault}; it is renamed to {target.name}")
    for note in point.notes:
        say(note)


def unfinished_checkpoint(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written until it is whole."""
    return folder / f".checkpoint-{step}.partial"


def begin_checkpoint(folder: Path, step: int) -> None:
    """Makes an empty folder to write the checkpoint into.

    Raises:
        OSError: it cannot be made; the folder of the run is not made again where it is gone.
    """
    check_held(folder)
    partial = unfinished_checkpoint(folder, step)
    _remove_folder(partial)
    partial.mkdir()


def finish_checkpoint(folder: Path, step: int) -> Path:
    """Gives the checkpoint its name, once everything in it is on the disk. Returns its path."""
    partial, checkpoint = unfinished_checkpoint(folder, step), folder / f"checkpoint-{step}"
    write_manifest(partial, step)
    check_held(folder)
    if checkpoint.exists():  # of a former try at this step
        remove_checkpoint(checkpoint)
    partial.rename(checkpoint)
    flush_folder(folder)
    return checkpoint


def prune_checkpoints(newest: Path, most: int | None, best: Path | None, stops: Collection[int] = ()) -> None:
    """Removes the oldest checkpoints but `most`, the newest and the best, once the newest is read back from the disk.

    Those of later steps than the newest, which a resumed run had left behind and makes again, go first, then those of
    `stops`: steps that were saved because the run was asked to stop there.

    Raises:
        OSError: the newest is not as it was written; nothing is removed then.
    """
    if most is None:
        return
    others = [path for path in _named(newest.parent) if path not in (newest, best)]
    steps = {path: step_in_name(path.name) for path in (newest, *others)}
    others.sort(key=lambda path: (steps[path] <= steps[newest], steps[path] not in stops))  # stable: oldest first
    kept = 1 + (best is not None and best != newest and best.is_dir())
    excess = others[: max(0, kept + len(others) - max(most, kept))]
    if not excess:
        return
    forget_cached(newest)
    fault = find_fault(newest)
    if fault is not None:
        raise OSError(errno.EIO, f"{newest.name} was written, but reads back differently: {fault}", str(newest))
    for path in excess:
        remove_checkpoint(path)


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint. Takes the name away first: what has it is whole at every moment."""
    check_held(checkpoint)
    former = checkpoint.with_name(f".{checkpoint.name}.former")
    _remove_folder(former)
    checkpoint.rename(former)
    _remove_folder(former)


def _remove_folder(folder: Path) -> None:
    """Removes a folder where there is one; of a link the link alone, not what it points to."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
