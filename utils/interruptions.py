"""Ctrl-C, SIGTERM and SIGHUP outside of the training loop: raised as KeyboardInterrupt, and noted.

What a handler raises in a finalizer, or in a callback of a weak reference or of the locks of imports, Python prints and
drops. So the note is looked at too: between the stages of a run, and between the batches that it scores.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

# What asks a process to stop. SIGHUP says that its terminal was closed; Windows has none.
STOPPING = tuple(
    number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None
)

_asked = False


def interrupt_on_signals() -> None:
    """From here on Ctrl-C, SIGTERM and SIGHUP interrupt this process; those that it was started to ignore (by nohup, or
    by a script for what it starts in the background) it ignores to its end."""
    for number in heeded_signals():
        signal.signal(number, _ask)
    sys.unraisablehook = _report_dropped


def heeded_signals() -> list[int]:
    """Those of STOPPING that this process does not ignore."""
    return [number for number in STOPPING if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def let_no_second_hangup_count(number: int) -> None:
    """After a SIGHUP ignores the next ones: a terminal that is closed sends several, by its shell and by the system."""
    if number == getattr(signal, "SIGHUP", None):
        signal.signal(number, signal.SIG_IGN)


def stop_if_asked() -> None:
    """Raises the KeyboardInterrupt of a signal that has come, and whose own was dropped."""
    if _asked:
        raise KeyboardInterrupt


def _ask(number: int, frame: FrameType | None) -> NoReturn:
    global _asked
    _asked = True
    let_no_second_hangup_count(number)
    raise KeyboardInterrupt


def _report_dropped(dropped: sys.UnraisableHookArgs) -> None:
    """Prints what was dropped, as Python does; of an interruption, which is noted, there is nothing to say."""
    if not (_asked and issubclass(dropped.exc_type, KeyboardInterrupt)):
        sys.__unraisablehook__(dropped)
