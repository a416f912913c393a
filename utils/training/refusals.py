"""What a library will not do with the settings it is given, as one readable line in place of its traceback."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType

from ..engine.memory import ran_out_of_memory
from ..errors import Interrupted, ProcessLost, UserError, in_one_line
from ..settings.training import Settings
from .launch import lost_a_process

OURS = (__name__.partition(".")[0], "advanced_dpo_script", "__main__")
PASSED_ON = ("lr_scheduler_type", "report_to", "attn_implementation", "lora_target_modules")


@contextlib.contextmanager
def refusals_explained(settings: Settings, begun: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turns an exception that a library raises within the context into a UserError that names the flags behind it.

    What our own code raises (or Python's library on its behalf), running out of memory, a process that is lost,
    and whatever happens once training has begun pass through.

    Args:
        begun: says whether training has begun: from then on a failure is no longer one of settings.
    """
    try:
        yield
    except (UserError, Interrupted, ProcessLost):
        raise
    except Exception as error:
        library = _raised_by(error.__traceback__)
        if begun() or library in OURS or ran_out_of_memory(error) or lost_a_process(error):
            raise
        message = in_one_line(error, 2000)
        raise UserError(f"{_flags_behind(message, settings)}: refused by {library}: {message}") from error


def _raised_by(trace: TracebackType | None) -> str:
    """The package whose code raised last, Python's own library left out."""
    names = [frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in traceback.walk_tb(trace)]
    return next((name for name in reversed(names) if name and name not in sys.stdlib_module_names), OURS[0])


def _flags_behind(message: str, settings: Settings) -> str:
    """The flags that a message is likely about: those it mentions, else all that were passed on to the libraries."""
    values = settings.flat()
    passed = [name for name in sorted(settings.given) if name in settings.trainer_fields or name in PASSED_ON]
    spoken = message.lower()
    mentioned = [name for name in passed if name in spoken or _mentions(spoken, values[name])]
    names = mentioned or passed
    if not names:
        return "these settings"
    shown = ", ".join(f"--{name} {_shown(values[name])}".strip() for name in names)
    return f"one of {shown}" if len(names) > 1 else shown


def _mentions(message: str, value: object) -> bool:
    words = value if isinstance(value, tuple | list) else [value]
    return any(isinstance(word, str) and len(word) > 2 and word.lower() in message for word in words)


def _shown(value: object) -> str:
    if value is True:
        return ""
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
