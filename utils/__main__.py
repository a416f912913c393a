"""The command: argv to settings, the verb that they name, and the exit code that it ends with."""

from __future__ import annotations

import errno
import importlib.util
import signal
import sys
import time
import traceback
from typing import NoReturn

from .api import carry_out
from .arguments import parse_arguments
from .console import lost_output, open_console, reader_left
from .engine.memory import LESS_MEMORY, ran_out_of_memory
from .errors import Interrupted, LocalError, ProcessLost, UserError, in_one_line
from .interruptions import interrupt_on_signals
from .run.processes import forget_lone_rank, tell_launcher
from .run.program import explain_missing
from .runtime import fit_terminal, is_main_process, make_visible, say
from .settings.flags import SAVES
from .settings.registry import VERBS


def main(argv: list[str] | None = None) -> int:
    """Runs the verb that the arguments name.

    Returns the exit code: 0 done, 2 user errors, 3 problems that `data` found, 130 interrupted, 1 anything else.
    """
    forget_lone_rank()
    try:
        settings = parse_arguments(sys.argv[1:] if argv is None else argv)
        return carry_out(settings) or results_lost(settings.verb)
    except UserError as error:
        report_faults(error)
        return 2
    except Interrupted as stop:
        say(str(stop))
        return 130
    except ProcessLost as lost:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends what ends by itself
        if not lost.spoken:
            print(f"error: {lost}", file=sys.stderr, flush=True)
            tell_launcher(f"error: {lost}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; everything saved before is intact")
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            report_faults(UserError(f"{str(error.filename)[:60]}...: too long for the name of a file or folder"))
            return 2
        if isinstance(error, ModuleNotFoundError) and (package := missing_package(error)):
            report_faults(UserError(explain_missing(package)))
            return 2
        if ran_out_of_memory(error):
            report_faults(LocalError(f"memory ran out ({in_one_line(error)}). What helps: {LESS_MEMORY}"))
            return 2
        print(make_visible(traceback.format_exc()), end="", file=sys.stderr, flush=True)
        return 1


def missing_package(error: ModuleNotFoundError) -> str | None:
    """The name of the package that is not installed; None where the package is there and lacks a module."""
    package = (error.name or "").partition(".")[0]
    return package if package and importlib.util.find_spec(package) is None else None


def results_lost(verb: str) -> int:
    """Exit code 2 where the results of a verb that only prints them could not be printed (a full disk); 0 otherwise.

    A reader that leaves (`| head`) has seen what it wanted.
    """
    return 2 if lost_output() is not None and not reader_left() and SAVES not in VERBS[verb].does else 0


def report_faults(error: UserError) -> None:
    """Prints user errors, one line per fault, from the main process, or from the only one that knows it."""
    if not is_main_process() and not isinstance(error, LocalError):
        time.sleep(3)  # a launcher stops all processes when the first one ends; let the main one speak before that
        return
    lines = [f"error: {make_visible(fault)}" for fault in error.faults]
    print(fit_terminal("\n".join(lines), sys.stderr), file=sys.stderr, flush=True)
    tell_launcher("\n".join(lines))


def run() -> NoReturn:
    """The command as a process: its streams and signals are made ready first. Ends with the exit code of `main`."""
    open_console()
    interrupt_on_signals()
    sys.exit(main())


if __name__ == "__main__":
    run()
