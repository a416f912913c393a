"""How far a phase of the work is: a status line on a terminal; elsewhere a plain line from time to time."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from .console import paints_status, show_status, terminal_width
from .runtime import is_main_process, make_visible, readable_seconds

PAINT_SECONDS = 0.1  # between two states of the status line
FIRST_SECONDS, PLAIN_SECONDS = 20.0, 30.0  # before the first plain line of a phase, and between two of them
WIDEST_BAR, NARROWEST_BAR = 30, 8

_phases: list[Phase] = []  # that are under way: within one that trains, one that evaluates


class Phase:
    """Something that lasts: `done` of `total`, where that is known."""

    def __init__(self, what: str, total: int | None, unit: str, plain: bool) -> None:
        self.what, self.total, self.unit, self.plain = what, total, unit, plain
        self.done = self.begun_at = 0
        self.left: float | None = None  # seconds, where the caller knows better than the rate so far
        self.begun = time.monotonic()
        self._painted, self._spoken = 0.0, self.begun + FIRST_SECONDS - PLAIN_SECONDS

    def begin_at(self, done: int, total: int) -> None:
        """Says anew how much there is, and how much of it was done before."""
        self.done = self.begun_at = done
        self.total, self.begun = total, time.monotonic()
        self.paint()

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self.reach(self.done + count)

    def reach(self, done: int, left: float | None = None) -> None:
        """So many are done in all; `left` seconds are still to come."""
        self.done, self.left = done, left
        now = time.monotonic()
        if paints_status():
            if now - self._painted >= PAINT_SECONDS or done == self.total:
                self.paint()
        elif self.plain and now - self._spoken >= PLAIN_SECONDS and is_main_process():
            self._spoken = now
            print(make_visible(self.describe()), file=sys.stderr, flush=True)

    def paint(self) -> None:
        """Shows the phase in the status line, where there is one."""
        self._painted = time.monotonic()
        if is_main_process():
            show_status(make_visible(self.describe(terminal_width())))

    def describe(self, width: int = 0) -> str:
        """The phase in one line; with a bar where `width` columns leave room for it."""
        if not self.total:
            return f"{self.what} ..." if not self.done else f"{self.what}: {self.done:,} {self.unit}"
        parts = [f"{self.done:,} of {self.total:,} {self.unit}"]
        new, seconds = self.done - self.begun_at, time.monotonic() - self.begun
        if new > 0 and seconds > 0:
            rate = new / seconds
            parts.append(f"{rate:,.1f}/s" if rate >= 1 else f"{1 / rate:,.1f} s each")
            left = (self.total - self.done) / rate if self.left is None else self.left
            parts.append(f"{readable_seconds(left)} left")
        text = ", ".join(parts)
        room = min(width - len(self.what) - len(text) - 5, WIDEST_BAR)
        if room < NARROWEST_BAR:
            return f"{self.what}: {text}"
        full = min(room * self.done // self.total, room)
        return f"{self.what} [{'#' * full}{'.' * (room - full)}] {text}"


@contextlib.contextmanager
def phase(what: str, total: int | None = None, unit: str = "", plain: bool = True) -> Iterator[Phase]:
    """Shows within it how far the work is; `plain` False where other lines tell it off a terminal."""
    under_way = Phase(what, total, unit, plain)
    _phases.append(under_way)
    under_way.paint()
    try:
        yield under_way
    finally:
        _phases.remove(under_way)
        if _phases:
            _phases[-1].paint()
        else:
            show_status("")
