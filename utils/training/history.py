"""The trainer's own log, which every checkpoint holds: kept small in a long run, without losing what is made of it."""

from __future__ import annotations

from typing import Any

from ..run.metrics import STANDS_FOR

MOST_LINES = 200  # of training
FOLDED = 100


def fold_history(history: list[dict[str, Any]], counted: str) -> None:
    """Where there are more than `MOST_LINES` lines of training, puts one in the place of the oldest `FOLDED`.

    That line has their means, each weighted by its `counted` items, the items of all, and else what the last of them
    has: a mean over all lines stays what it was. Lines of evaluations stay. A resumed run folds at the same lines.
    """
    places = [place for place, line in enumerate(history) if "loss" in line and counted in line]
    if len(places) <= MOST_LINES:
        return
    lines = [history[place] for place in places[:FOLDED]]
    weights = [line[counted] for line in lines]
    total, last = sum(weights), lines[-1]
    names = [name for name in last if name != "step" and all(isinstance(line.get(name), float) for line in lines)]
    means = {name: sum(line[name] * w for line, w in zip(lines, weights, strict=True)) / total for name in names}
    kept: dict[str, Any] = {name: last[name] for name in ("learning_rate", "epoch", "skipped_steps") if name in last}
    count = sum(line.get(STANDS_FOR, 1) for line in lines)
    history[places[FOLDED - 1]] = {**last, **means, **kept, counted: total, STANDS_FOR: count}
    folded = set(places[: FOLDED - 1])
    history[:] = [line for place, line in enumerate(history) if place not in folded]
