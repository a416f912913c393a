"""The checkpoints of a run: which are complete, and which one a resumed run goes on from."""

from __future__ import annotations

import json
from pathlib import Path

from utils.errors import UserError
from utils.saving import CHECKPOINT, TRAINER_STATE


def find_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first: those with the trainer's state, which is written last."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found) if is_complete(path)]


def checkpoint_step(checkpoint: Path) -> int:
    """The step at which it was saved, as the trainer's state says.

    Raises:
        UserError: the state cannot be read.
    """
    try:
        return int(json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{checkpoint}: its {TRAINER_STATE} cannot be read back ({str(error)[:200]}); resume from an earlier "
            "checkpoint, or start anew"
        ) from None


def is_complete(checkpoint: Path) -> bool:
    """Whether a run can go on from it: it has the trainer's state, and an optimizer's."""
    return (checkpoint / TRAINER_STATE).is_file() and any(checkpoint.glob("optimizer*"))


def find_resume_point(output_dir: Path, wish: str | None) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means; None for a start from the beginning.

    Raises:
        UserError: the path is no complete checkpoint.
    """
    if wish is None:
        return None
    if wish == "auto":
        checkpoints = find_checkpoints(output_dir)
        return checkpoints[-1] if checkpoints else None
    path = Path(wish).expanduser().resolve()
    if not is_complete(path):
        newest = find_checkpoints(output_dir)
        hint = f"the newest in {output_dir} is {newest[-1].name}" if newest else "pass auto to start without one"
        raise UserError(f"--resume_from_checkpoint {wish}: not a complete checkpoint (no {TRAINER_STATE}); {hint}")
    return path
