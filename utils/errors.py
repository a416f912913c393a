"""How a run fails: by a user error, by an interruption, or by the loss of a process.

UserError            every fault found, one line each; printed without a traceback, exit code 2
  LocalError         the same, known to one of several processes alone, which prints it itself
Interrupted          Ctrl-C or SIGTERM, after the state was saved; exit code 130
ProcessLost          another process of the run is gone; the message says what is safe; exit code 1
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """A user error: wrong flags, data, files or environment.

    Each fault is one line: which flag or file:line, what was found, what to do. All faults of a stage are gathered
    and raised together, so that they can be fixed in one go.
    """

    def __init__(self, *faults: str) -> None:
        if not faults:
            raise ValueError("a UserError names at least one fault")
        self.faults = faults
        super().__init__("\n".join(faults))


class LocalError(UserError):
    """A fault that the other processes of the run do not know of: the one that has it must say it."""


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; the message says how to resume."""


class ProcessLost(Exception):
    """Another process of the run ended or fell silent; the message says what is safe and how to resume.

    `spoken`: another process says so.
    """

    spoken = False


def in_one_line(error: BaseException, most: int = 300) -> str:
    """The whole text of an error in one line, for its reason may stand in any of its lines; its name where it has none.

    Of a text of more than `most` characters the middle is left out.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-most // 3 :]}"


def gather(*stages: Callable[[], Any]) -> tuple[Any, ...]:
    """What each stage returns, in order.

    Every stage is tried even when an earlier one failed, and the faults of all of them are raised as one UserError,
    so the stages must not depend on one another.
    """
    results: list[Any] = []
    faults: list[str] = []
    for stage in stages:
        try:
            results.append(stage())
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(*faults)
    return tuple(results)
