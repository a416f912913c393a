"""Bounds of time and memory for what a file from elsewhere makes a library compute."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any


class TimeIsUp(BaseException):
    """What was computed took longer than it may. No Exception: libraries catch those, and would go on."""


@contextlib.contextmanager
def bounded(seconds: float, memory_bytes: int) -> Iterator[None]:
    """Ends what runs within after so many seconds (TimeIsUp), or when it takes so much more memory (MemoryError).

    Both where the system knows how: the time in the main thread, the memory on Unix. An alarm clock that runs already
    goes on afterwards; one that rings sooner is left alone.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_memory_bounded(memory_bytes))
        stack.enter_context(_time_bounded(seconds))
        yield


@contextlib.contextmanager
def _time_bounded(seconds: float) -> Iterator[None]:
    able = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    left, interval = signal.getitimer(signal.ITIMER_REAL) if able else (0.0, 0.0)
    if not able or 0 < left <= seconds:
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeIsUp

    began = time.monotonic()
    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # and every second again, should it have been caught
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 0.001), interval)


@contextlib.contextmanager
def _memory_bounded(memory_bytes: int) -> Iterator[None]:
    try:
        import resource

        import psutil

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = psutil.Process().memory_info().vms + memory_bytes
        limits = [value for value in (limit, soft, hard) if value != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    except (ImportError, OSError, ValueError):  # not Unix, or not allowed
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
