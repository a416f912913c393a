"""What a run used so far, and how long it will take yet."""

from __future__ import annotations

import time
from functools import cached_property
from typing import Any

from ..runtime import peak_memory_bytes
from .context import Run
from .progress import count_tokens, seconds_left
from .trainer import RunTrainer


class Usage:
    """Time, tokens and cost of a run, by its trainer's counts and its stopwatch."""

    def __init__(self, run: Run, trainer: RunTrainer) -> None:
        self.run, self.trainer = run, trainer
        earlier = (run.former.get("resources") or {}).get("seconds") or 0.0 if run.checkpoint is not None else 0.0
        self._made = time.perf_counter() - earlier  # seconds that the run took before it was resumed
        self.begun_at = 0  # the step at which this part of the run began

    @property
    def wall_seconds(self) -> float:
        """Seconds since the run began, evaluations and all."""
        return time.perf_counter() - self._made

    def resources(self) -> dict[str, Any]:
        """What the run used so far, its parts before a resume included: seconds, GPU hours and cost. Of this part
        alone: seconds of the training loop, rows and tokens of the data per second, and peak memory in bytes."""
        seconds, wall, device = self.run.stopwatch.seconds, self.wall_seconds, self.run.precision.device
        device_hours = self.trainer.args.world_size * wall / 3600
        price = self.run.settings.run.cost_per_hour
        return {
            "seconds": wall,
            "train_seconds": seconds,
            "pairs_per_second": self._rows_seen() / seconds if seconds else 0.0,
            "tokens_per_second": self.tokens_seen() / seconds if seconds else 0.0,
            "peak_memory_bytes": peak_memory_bytes(device),
            "gpu_hours": device_hours if device.type == "cuda" else 0.0,
            "cost": device_hours * price if price is not None else None,
        }

    def tokens_seen(self) -> int:
        """Tokens of the data trained on in this part of the run, in all processes."""
        return self.trainer.tally.seen_so_far(self.trainer.args.world_size)

    def seconds_left(self) -> float:
        """How long the run will take yet, from its speed so far."""
        args, state, of_schedule = self.trainer.args, self.trainer.state, self.tokens_in_data * self._passes()
        return seconds_left(args, state, self.run.stopwatch, self.begun_at, self.tokens_seen(), of_schedule)

    @cached_property
    def tokens_in_data(self) -> int:
        """Tokens of one pass over the rows that are trained on."""
        return count_tokens(self.run.rows.train)

    def _passes(self) -> float:
        """How often the schedule goes through the data."""
        args = self.trainer.args
        if args.max_steps <= 0:
            return args.num_train_epochs
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return self.trainer.state.max_steps * step / len(self.run.rows.train)

    def _rows_seen(self) -> float:
        state = self.trainer.state
        done = state.global_step - self.begun_at
        return len(self.run.rows.train) * self._passes() * done / max(state.max_steps, 1)
