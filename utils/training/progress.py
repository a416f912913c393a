"""How far a run is: seconds of training, evaluating and saving, and how many are left."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from ..data.lengths import count_row_tokens


class Stopwatch:
    """Seconds of the training loop alone: it stands still within `paused`, which counts by what it was paused for."""

    def __init__(self) -> None:
        self._total = 0.0
        self._since: float | None = None
        self._paused: defaultdict[str, float] = defaultdict(float)  # seconds
        self._pauses: Counter[str] = Counter()

    @property
    def seconds(self) -> float:
        """The seconds counted so far."""
        return self._total + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def start(self) -> None:
        """Begins or goes on counting."""
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        """Stands still until the next start."""
        self._total, self._since = self.seconds, None

    @contextlib.contextmanager
    def paused(self, reason: str) -> Iterator[None]:
        """Does not count what happens within."""
        running, begun = self._since is not None, time.perf_counter()
        self.stop()
        yield
        self._paused[reason] += time.perf_counter() - begun
        self._pauses[reason] += 1
        if running:
            self.start()

    def mean_pause(self, reason: str) -> float:
        """Seconds that a pause for this reason took on average; 0 before the first."""
        return self._paused[reason] / max(self._pauses[reason], 1)


def count_tokens(rows: Dataset) -> int:
    """Tokens of all rows, prompts and completions."""
    return int(count_row_tokens(rows, [name for name in rows.column_names if name.endswith("_ids")]).sum())


def seconds_left(args: Any, state: Any, stopwatch: Stopwatch, begun_at: int, seen: int, of_schedule: float) -> float:
    """How long the run will take yet: the tokens left at the speed so far, and the evaluations and saves left.

    Args:
        args, state: the trainer's.
        begun_at: the step at which this part of the run began.
        seen: tokens of the data trained on since then, in all processes.
        of_schedule: tokens of the data in all steps of the run.
    """
    left, done = state.max_steps - state.global_step, state.global_step - begun_at
    if left <= 0 or done <= 0 or not seen:
        return 0.0
    per_step = seen / done
    tokens = of_schedule * (1 - begun_at / state.max_steps) - seen
    # What a schedule has in all is a mean where it ends within a pass over the data.
    tokens = min(max(tokens, left * per_step / 2), left * per_step * 2)
    seconds = tokens * stopwatch.seconds / seen
    evaluations = _events_left(args.eval_strategy, state.eval_steps, state)
    saves = _events_left(args.save_strategy, state.save_steps, state)
    evaluation = stopwatch.mean_pause("evaluation") + stopwatch.mean_pause("sampling")
    return seconds + evaluations * evaluation + saves * stopwatch.mean_pause("saving")


def _events_left(strategy: str, every: int, state: Any) -> int:
    """How often something that comes every so many steps, and after the last one, is still to come."""
    if strategy != "steps" or not every:
        return 1
    return -(-state.max_steps // every) - state.global_step // every
