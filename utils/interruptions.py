"""Ctrl-C and SIGTERM outside of the training loop: raised as KeyboardInterrupt, and noted.

What a handler raises in a finalizer, or in a callback of a weak reference or of the locks of imports, Python prints and
drops. So the note is looked at too: between the stages of a run, and between the batches that it scores.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

_asked = False


def interrupt_on_signals() -> None:
    """From here on Ctrl-C and SIGTERM interrupt this process; one that was started deaf to Ctrl-C stays so."""
    signal.signal(signal.SIGTERM, _ask)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _ask)
    sys.unraisablehook = _report_dropped


def stop_if_asked() -> None:
    """Raises the KeyboardInterrupt of a signal that has come, and whose own was dropped."""
    if _asked:
        raise KeyboardInterrupt


def _ask(number: int, frame: FrameType | None) -> NoReturn:
    global _asked
    _asked = True
    raise KeyboardInterrupt


def _report_dropped(dropped: sys.UnraisableHookArgs) -> None:
    """Prints what was dropped, as Python does; of an interruption, which is noted, there is nothing to say."""
    if not (_asked and issubclass(dropped.exc_type, KeyboardInterrupt)):
        sys.__unraisablehook__(dropped)
