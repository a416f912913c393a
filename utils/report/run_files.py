"""What a run folder tells, as far as it is there: its record, its metrics, its held-out rows and its samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..run.metrics import HELD_OUT, newest_evaluation, read_metrics
from ..run.names import EXAMPLES, PAIRS, SAMPLES
from ..run.record import read_record
from ..run.records import ROW, read_lines

MOST_POINTS = 400  # of a curve: more than a screen shows
MOST_LINES = 800  # of training that are held at once: of a longer run only every second, fourth, ... line is


@dataclass(frozen=True)
class RunFiles:
    """The files of a run as rows; each may be empty, while it trains or where it was not asked for."""

    folder: Path
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def is_preference(self) -> bool:
        """Whether pairs were trained on, as against single responses."""
        return self.record.get("verb") != "sft"

    @property
    def last_step(self) -> float:
        """The last step of which there are metrics; 1 when there are none."""
        return max((line.get("step", 0) for line in self.metrics), default=0) or 1

    def trained(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a metric of the training lines, thinned to what a chart can show."""
        lines = [line for line in self.metrics if "learning_rate" in line]
        return thin_out(_points(lines, name))

    def held_out(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a metric of the evaluations."""
        return thin_out(_points(self.metrics, f"{HELD_OUT}{name}"))


def read_run(folder: Path) -> RunFiles:
    """The files of the run in `folder`."""
    files = [list(read_lines(folder / name, ROW)) for name in (PAIRS, EXAMPLES, SAMPLES)]
    metrics, record = read_thinned(folder), read_record(folder)
    so_far = newest_evaluation(metrics)
    if so_far and record.get("status") != "finished":
        record["metrics"] = {**(record.get("metrics") or {}), "held_out_so_far": so_far}
    return RunFiles(folder, record, metrics, *files)


def read_thinned(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of training at most `MOST_LINES` and the last: a long run has too many."""
    kept: list[tuple[int, dict[str, Any]]] = []  # with the line's number among those of training, -1 for others
    count, every, last = 0, 1, None
    for line in read_metrics(folder):
        if "learning_rate" not in line:
            kept.append((-1, line))
            continue
        last = line
        if count % every == 0:
            kept.append((count, line))
        count += 1
        if count > MOST_LINES * every:
            every *= 2
            kept = [(number, line) for number, line in kept if number % every == 0 or number < 0]
    lines = [line for _, line in kept]
    return lines if last is None or any(line is last for line in lines) else [*lines, last]


def thin_out(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` points: the means of as many neighbours as that takes."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _points(lines: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    found = {line["step"]: line[name] for line in lines if isinstance(line.get(name), int | float) and "step" in line}
    return sorted(found.items())
