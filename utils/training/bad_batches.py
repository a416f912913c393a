"""Optimizer steps whose loss or gradient is not finite: seen before the step, said with their rows, left out or not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.identity import pair_id
from ..data.lengths import read_numbers
from ..data.loading import PreferenceData
from ..data.places import SHOWN, Place, list_places
from ..distributed import gather, sum_of
from ..errors import UserError
from ..run.checkpoints import find_checkpoints
from ..run.metrics import append_metrics
from ..run.names import BAD_PAIRS
from ..run.processes import command_to_go_on
from ..run.record import RunRecord
from ..run.state import keep_in_checkpoints, kept_in_checkpoint
from ..run.writing import FolderLost, check_held, open_file
from ..runtime import is_main_process, say

KEY = "left_out"  # in what a checkpoint keeps: the steps
SUGGESTED = 10  # steps, where the person is told of --skip_bad_batches


def losses_by_row(parts: Sequence[tuple[list[int], Tensor]]) -> dict[int, float]:
    """`row` -> its loss, of all micro-batches of an optimizer step, in all processes."""
    found = {row: loss for rows, losses in parts for row, loss in zip(rows, losses.tolist(), strict=True)}
    return {row: loss for part in gather(found) for row, loss in part.items()}


@dataclass
class BadBatches:
    """What becomes of such steps in a run: the first `allowed` are left out, the next one stops it.

    A step that is left out counts as a step: its rows were seen, and the schedule of the learning rate goes on. The
    weights and the optimizer's moments stay as they were.
    """

    allowed: int
    data: PreferenceData
    record: RunRecord
    folder: Path | None  # None in a dry run
    left_out: list[int] = field(default_factory=list)  # steps

    def restore(self, state: Any) -> None:
        """Goes on from the count of the checkpoint that the trainer's state was read from."""
        self.left_out = list(kept_in_checkpoint(state, KEY) or [])

    def leave_out(self, step: int, losses: Mapping[int, float], state: Any, cause: str | None = None) -> None:
        """Records that a step is left out.

        Args:
            losses: `row` -> loss, of the step.
            state: the trainer's, which checkpoints hold.
            cause: what else is known of it.

        Raises:
            UserError: as many as are allowed were left out before.
        """
        what = describe_step(step, losses, self.data.place) + (f"; {cause}" if cause else "")
        self._write_rows(step, losses)
        if len(self.left_out) >= self.allowed:
            raise UserError(f"training diverged in {what}. {self._advise(step, losses)}")
        self.left_out.append(step)
        keep_in_checkpoints(state, KEY, self.left_out)
        say(f"  left out {what} ({len(self.left_out)} of at most {self.allowed} such steps)")
        count = sum(not math.isfinite(loss) for loss in losses.values())
        line = {"step": step, "skipped_steps": len(self.left_out), "bad_rows": count}
        state.log_history.append(line)  # from which a resumed run restores its metrics
        if self.folder is not None and is_main_process():
            append_metrics(self.folder, line)
        self.note()

    def note(self) -> None:
        """Puts the steps that were left out so far into the record, and a warning that counts them."""
        warnings = self.record.content.get("warnings", [])
        self.record.content["warnings"] = [old for old in warnings if not old.startswith("not finite, left out")]
        if not self.left_out:
            return
        numbers = ", ".join(map(str, self.left_out[:SHOWN])) + (", ..." if len(self.left_out) > SHOWN else "")
        text = f"not finite, left out (at most {self.allowed}): {len(self.left_out)} optimizer steps ({numbers})"
        self.record.content["skipped_steps"] = list(self.left_out)
        self.record.warn(f"{text}; their rows are in {BAD_PAIRS}")

    def _write_rows(self, step: int, losses: Mapping[int, float]) -> None:
        """Adds the rows that are to blame to the file that holds them with their texts."""
        if self.folder is None or not is_main_process():
            return
        lines = [json.dumps(row, ensure_ascii=True) + "\n" for row in self._find_rows(step, losses)]
        try:
            check_held(self.folder)
            with open(self.folder / BAD_PAIRS, "a", encoding="utf-8", opener=open_file) as file:
                file.writelines(lines)
        except FolderLost:
            raise
        except OSError as error:
            self.record.warn(f"{BAD_PAIRS} could not be written ({error.strerror})", aloud=True)

    def _find_rows(self, step: int, losses: Mapping[int, float]) -> list[dict[str, Any]]:
        bad = _rows_to_blame(losses)
        numbers = read_numbers(self.data.train, "row")
        found = []
        for row in bad:
            texts = self.data.train[int(np.flatnonzero(numbers == row)[-1])]
            said = {name: texts[name] for name in ("prompt", "chosen", "rejected", "completion") if name in texts}
            loss = losses[row]
            why = {"loss": loss if math.isfinite(loss) else str(loss), "of": len(losses)}
            found.append({"step": step, "id": pair_id(texts), "row": row, "place": self.data.place(row), **why, **said})
        return found

    def _advise(self, step: int, losses: Mapping[int, float]) -> str:
        """What is safe, and what to try."""
        checkpoints = find_checkpoints(self.folder) if self.folder is not None else []
        taken = f"That step was not taken: the weights stayed as after step {step - 1}; {self.what_is_safe()}."
        if self.left_out:
            taken += f" {len(self.left_out)} such steps were left out before (--skip_bad_batches {self.allowed})."
        count = sum(not math.isfinite(loss) for loss in losses.values())
        look = f" Look at the rows in {self.folder / BAD_PAIRS}:" if self.folder is not None else " Look at the rows:"
        advice = f"{look} fix or remove them. If they are good," if count < len(losses) else " The weights diverged:"
        text = f"{taken}{advice} try a smaller --learning_rate, a smaller --max_grad_norm, or --dtype float32"
        return text + (f". {self._how_to_go_on(bool(checkpoints))}" if self.folder is not None else "")

    def what_is_safe(self) -> str:
        """The newest checkpoint, whose weights were looked at before they were saved."""
        checkpoints = find_checkpoints(self.folder) if self.folder is not None else []
        newest = f"the weights of the newest checkpoint, {checkpoints[-1]}, are finite" if checkpoints else None
        return newest or "no checkpoint was saved yet"

    def _how_to_go_on(self, resume: bool) -> str:
        more = ["--skip_bad_batches", str(max(SUGGESTED, 2 * self.allowed))]
        command = command_to_go_on(self.record.content["arguments"], self.record.content["process"], resume, more)
        changes = " (changed settings need --allow_changes learning_rate, changed rows --allow_changes data)"
        return f"To resume and leave out such steps: {command}{changes if resume else ''}"


def _rows_to_blame(losses: Mapping[int, float]) -> list[int]:
    """Those whose loss is not finite; where all are finite, every row of the step."""
    return [row for row, loss in losses.items() if not math.isfinite(loss)] or list(losses)


def describe_step(step: int, losses: Mapping[int, float], place: Place) -> str:
    """What is not finite in a step, and where its rows are."""
    bad = [row for row, loss in losses.items() if not math.isfinite(loss)]
    named = bad or list(losses)
    where = list_places([place(row) for row in named[:SHOWN]], len(named))
    if not bad:
        return f"step {step}: the losses of its {len(losses)} rows are finite, their gradient is not ({where})"
    which = f"{len(bad)} of its {len(losses)} rows" if len(bad) < len(losses) else f"all its {len(bad)} rows"
    return f"step {step}: the loss of {which} is not finite ({where})"


def find_faults(losses: Sequence[Tensor], gradient_norm: Any, device: torch.device) -> tuple[bool, bool]:
    """Whether any row's loss, and whether the gradient, is not finite; the same in all processes.

    Args:
        losses: of each micro-batch of the optimizer step, shape (rows,); a process may have had no rows of its own.
    """
    finite = [torch.isfinite(part).all() for part in losses]
    finite.append(torch.ones((), dtype=torch.bool, device=device))
    bad = (~torch.stack(finite)).any().float()
    # The one wait for a GPU in an optimizer step, at its end.
    return bool(sum_of(bad)), gradient_norm is not None and not math.isfinite(gradient_norm)
