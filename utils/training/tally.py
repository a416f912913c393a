"""What is counted while a run trains: over the micro-batches of an optimizer step, and between two lines of the log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed import sum_of
from ..run.state import load_state, save_state
from .batches import ROWS, TOKENS

LOG_STATE = "log_state"  # files of what was counted since the last log line, one a process


class StepTally:
    """The counts of one process; sums stay on the device until a line is logged.

    `counted` names the items that a line's means are over. `tokens_computed` and `tokens_padded` went through the
    policy, as computed and as padded rows would have; `tokens_seen` are those of the data, padding not counted.
    """

    def __init__(self, counted: str, device: torch.device) -> None:
        self.counted, self.device = counted, device
        self.sums: dict[str, Tensor] = {}  # since the last line, by name of the metric
        self.tokens_computed = self.tokens_padded = self.tokens_seen = 0
        self.seen_by_all = 0  # tokens of the data in all processes, up to the last line
        self.losses: list[tuple[list[int], Tensor]] = []  # rows of each micro-batch of the optimizer step, (rows,)
        self._last_line = (0, 0.0)  # tokens seen and seconds of training when it was logged
        self._before_step: tuple[Tensor, dict[str, Tensor]] | None = None  # what is logged, without that step

    def note_tokens(self, computed: int, padded: int) -> None:
        """Counts what a micro-batch puts through the policy."""
        self.tokens_computed, self.tokens_padded = self.tokens_computed + computed, self.tokens_padded + padded

    def note_rows(self, batch: Mapping[str, Any], losses: Tensor) -> None:
        """Remembers, until the optimizer step, which rows a micro-batch held; `losses` has shape (rows,)."""
        self.tokens_seen += batch.get(TOKENS, 0)
        self.losses.append((batch.get(ROWS, []), losses.detach()))

    def add(self, sums: Mapping[str, Tensor], count: int | Tensor) -> None:
        """Adds a micro-batch to the sums that the next line divides by its items."""
        for name, value in {**sums, self.counted: self.on_device(count).float()}.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().to(self.device)

    def on_device(self, count: int | Tensor) -> Tensor:
        """A number on the device: made there, since one that is copied there is waited for."""
        if isinstance(count, Tensor):
            return count.to(self.device)
        return torch.full((), count, dtype=torch.int64, device=self.device)

    def count(self, items: Iterable[int | Tensor]) -> Tensor:
        """The items of an optimizer step, over its micro-batches and all processes."""
        return sum_of(self.on_device(sum(items)))

    def begin_step(self, logged_loss: Tensor) -> None:
        """An optimizer step begins; `logged_loss` is the trainer's own sum of losses since the last line."""
        self._before_step = logged_loss.clone(), dict(self.sums)

    def take_back_step(self, logged_loss: Tensor) -> None:
        """Counts as if the step had not been, and sets the trainer's sum back."""
        assert self._before_step is not None, "no step has begun"
        loss, self.sums = self._before_step
        logged_loss.copy_(loss)

    def finish_line(self, seconds: float) -> dict[str, float]:
        """The means over the items of all processes since the last line, how many items, and tokens per second.

        Args:
            seconds: of training so far.
        """
        names, tokens_before, seconds_before = sorted(self.sums), *self._last_line
        sums = torch.stack([self.sums[name] for name in names]).double()
        sums = torch.cat([sums, sums.new_tensor([self.tokens_seen - tokens_before])])
        *values, tokens = sum_of(sums).tolist()
        totals = dict(zip(names, values, strict=True))
        count, passed = totals.pop(self.counted), seconds - seconds_before
        self.sums, self._last_line = {}, (self.tokens_seen, seconds)
        self.seen_by_all += int(tokens)
        line = {name: total / count for name, total in totals.items()} | {self.counted: count}
        return line | {"tokens_per_second": tokens / passed if passed > 0 else 0.0}

    def seen_so_far(self, processes: int) -> int:
        """Tokens of the data in all processes; since the last line each is taken to have seen as much as this one."""
        return self.seen_by_all + (self.tokens_seen - self._last_line[0]) * processes

    def tokens_of_all(self) -> tuple[int, int]:
        """The tokens computed, and those of padded rows, in all processes, which ask together."""
        computed, padded = sum_of(torch.tensor([self.tokens_computed, self.tokens_padded], device=self.device)).tolist()
        return computed, padded

    def read(self) -> dict[str, Any]:
        """What has been counted so far in the optimizer step and the line."""
        return {name: _copy(getattr(self, name)) for name in COUNTS}

    def write(self, counts: Mapping[str, Any]) -> None:
        """Sets what has been counted, as `read` gave it."""
        for name, value in counts.items():
            setattr(self, name, _copy(value))


# What a step counts while it is computed: set back when it is begun anew.
COUNTS = ("sums", "losses", "tokens_computed", "tokens_padded", "tokens_seen")


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | list) else value


@dataclass(frozen=True)
class LogState:
    """What the next line of the log is to count, of what was trained before: its steps, the trainer's own sum of
    losses, and the sums of this process."""

    steps: int
    loss: Tensor
    sums: dict[str, Tensor]

    def save(self, folder: Path, process: int) -> None:
        """Adds it to a checkpoint, unless nothing was counted, so that a stop between two lines leaves no trace."""
        if self.steps:
            save_state(folder, f"{LOG_STATE}_{process}", {"steps": self.steps, "loss": self.loss, "sums": self.sums})


def load_log_state(checkpoint: Path, process: int, processes: int, device: torch.device) -> LogState | None:
    """What a checkpoint's run had counted for its next line, in any number of processes; None for nothing.

    In as many as before each has its own part back, so that sums are rounded as they would have been. A line's loss
    is the mean over processes, everything else in it comes from sums over them.
    """
    names = sorted(path.stem for path in checkpoint.glob(f"{LOG_STATE}_*.json"))
    if not names:
        return None
    if len(names) == processes:
        own = load_state(checkpoint, f"{LOG_STATE}_{process}")
        sums = {name: part.to(device) for name, part in own["sums"].items()}
        return LogState(own["steps"], own["loss"].to(device), sums)
    states = [load_state(checkpoint, name) for name in names]
    loss, sums = sum(state["loss"].to(device) for state in states) / len(states), {}
    if process == 0:
        sums = {name: sum(state["sums"][name].to(device) for state in states) for name in states[0]["sums"]}
    return LogState(states[0]["steps"], loss, sums)
