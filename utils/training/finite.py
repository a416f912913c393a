"""A gradient that is not finite: seen before the optimizer step, and said with the rows that it came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.checkpoints import find_checkpoints
from utils.data.places import SHOWN, Place, list_places
from utils.errors import UserError


def losses_by_row(parts: Sequence[tuple[list[int], Tensor]], world_size: int) -> dict[int, float]:
    """`row` -> its loss, of all micro-batches of an optimizer step, in all processes."""
    found = {row: loss for rows, losses in parts for row, loss in zip(rows, losses.tolist(), strict=True)}
    if world_size > 1:
        gathered: list[dict[int, float]] = [{}] * world_size
        torch.distributed.all_gather_object(gathered, found)
        found = {row: loss for part in gathered for row, loss in part.items()}
    return found


def describe_step(step: int, losses: dict[int, float], place: Place, folder: Path) -> UserError:
    """What to say of a step that was not taken because its gradient is not finite.

    Args:
        losses: `row` -> loss, of the step.
    """
    bad = [row for row, loss in losses.items() if not torch.isfinite(torch.tensor(loss))]
    named, count = bad or list(losses), len(bad)
    where = list_places([place(row) for row in named[:SHOWN]], len(named))
    if 0 < count < len(losses):
        what = f"the loss of {count} of its {len(losses)} rows is not finite ({where})"
        advice = "Look at these rows: mend or remove them. If they are good,"
    elif count:
        what = f"the loss of all its {count} rows is not finite ({where})"
        advice = "The weights had gone too far:"
    else:
        what = f"the losses of its {len(losses)} rows are finite, their gradient is not ({where})"
        advice = "If these rows are good,"
    return UserError(
        f"training came apart in step {step}: {what}. That step was not taken: the weights stayed as after step "
        f"{step - 1}{_last_good(folder)}. {advice} try a smaller --learning_rate, a smaller --max_grad_norm, or "
        "--dtype float32"
    )


def _last_good(folder: Path) -> str:
    checkpoints = find_checkpoints(folder)
    return f"; the newest checkpoint, {checkpoints[-1]}, is sound" if checkpoints else "; no checkpoint was saved yet"
