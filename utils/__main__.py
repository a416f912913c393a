"""The command: argv to settings, the verb that they name, and the exit code that it ends with."""

from __future__ import annotations

import dataclasses
import errno
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from .arguments import command_line, parse_arguments
from .console import lost_output, open_console, reader_left
from .engine.memory import LESS_MEMORY, keep_freed_memory, ran_out_of_memory
from .errors import Interrupted, LocalError, ProcessLost, UserError, gather, in_one_line
from .interruptions import interrupt_on_signals, stop_if_asked
from .run.paths import read_path
from .run.processes import check_launch_variables, forget_lone_rank, tell_launcher
from .runtime import is_main_process, make_visible, quiet_libraries, say
from .settings.flags import INIT, SAVES, SCORES_ROWS, STATUS, acts_as
from .settings.training import Settings


def main(argv: list[str] | None = None) -> int:
    """Runs the verb that the arguments name. Returns the exit code, as above."""
    forget_lone_rank()
    try:
        settings = parse_arguments(sys.argv[1:] if argv is None else argv)
        if settings.verb not in (*STATUS, *INIT):  # which look at files alone
            check_launch_variables(several=acts_as(settings.verb) in SCORES_ROWS)
        warn_of_code(settings)
        quiet_libraries()
        keep_freed_memory()
        return VERBS[settings.verb](settings) or results_lost(settings.verb)
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
        say("interrupted; nothing was lost that had been saved before")
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            report_faults(UserError(f"{str(error.filename)[:60]}...: too long for the name of a file or folder"))
            return 2
        if ran_out_of_memory(error):
            report_faults(LocalError(f"memory ran out ({in_one_line(error)}). What helps: {LESS_MEMORY}"))
            return 2
        print(make_visible(traceback.format_exc()), end="", file=sys.stderr, flush=True)
        return 1


def warn_of_code(settings: Settings) -> None:
    """Says, before anything is loaded, that code from elsewhere will run."""
    if settings.model.trust_remote_code and is_main_process():
        name = make_visible(str(settings.model.model_name_or_path))
        print(f"warning: --trust_remote_code runs Python code that comes with {name}", file=sys.stderr, flush=True)


def results_lost(verb: str) -> int:
    """Exit code 2 where the results of a verb that only prints them could not be printed (a full disk); 0 otherwise.

    A reader that leaves (`| head`) has seen what it wanted.
    """
    return 2 if lost_output() is not None and not reader_left() and verb not in SAVES else 0


def report_faults(error: UserError) -> None:
    """Prints what is to be mended, one line per fault, from the main process, or from the only one that knows it."""
    if not is_main_process() and not isinstance(error, LocalError):
        time.sleep(3)  # a launcher stops all processes when the first one ends; let the main one speak before that
        return
    lines = [f"error: {make_visible(fault)}" for fault in error.faults]
    print("\n".join(lines), file=sys.stderr, flush=True)
    tell_launcher("\n".join(lines))


def train(settings: Settings) -> None:
    """Direct preference optimization: policy and reference -> adapter or full model."""
    from .training.stages import run_training

    run_training(settings)


def sft(settings: Settings) -> None:
    """Supervised fine-tuning, stage one: a model that imitates completions -> adapter or full model."""
    from .training.stages import run_training

    run_training(settings)


def data(settings: Settings) -> int:
    """What is in preference data and what is wrong with it -> summary, page, JSON, clean pairs; 3 for problems."""
    if settings.generation.generate:
        return make_pairs(settings)
    from .inspection.inspecting import inspect_data
    from .inspection.publishing import publish

    stop_if_asked()
    record = inspect_data(settings)
    publish(record, settings.inspection)
    return record["exit_code"]


def make_pairs(settings: Settings) -> int:
    """Preference data made: prompts -> responses of a model -> scores -> pairs."""
    from .responses.making import make_pairs
    from .runtime import quiet_loaded_libraries

    quiet_loaded_libraries()
    stop_if_asked()
    make_pairs(settings)
    return 0


def compare(settings: Settings) -> None:
    """Two models on the same prompts: responses side by side -> judges -> win rates, rows, page."""
    from .comparing.comparing import compare_models
    from .runtime import quiet_loaded_libraries

    quiet_loaded_libraries()
    stop_if_asked()
    compare_models(settings, command_line(settings))


def plan(settings: Settings) -> None:
    """What a run of these settings would need, what fits, how long it takes -> summary, JSON, a ready command."""
    from .planning.measuring import as_measured, read_measurement
    from .planning.planning import choose_device, make_plan
    from .planning.publishing import publish
    from .planning.work import read_subject
    from .runtime import quiet_loaded_libraries
    from .training.stages import run_training

    quiet_loaded_libraries()
    stop_if_asked()
    run = dataclasses.replace(settings, verb=acts_as(settings.verb))
    (device, dtype), subject = gather(lambda: choose_device(run), lambda: read_subject(run))
    measured = read_measurement(run_training(as_measured(run, subject))) if settings.plan.measure else None
    made = make_plan(run, device, dtype, subject, measured)
    words = command_line(made.settings) if made.settings is not None else None
    publish(made, settings, words)


def merge(settings: Settings) -> None:
    """An adapter and its base -> one model, compared with the two."""
    from .merging.merging import merge
    from .runtime import quiet_loaded_libraries

    quiet_loaded_libraries()
    stop_if_asked()
    merge(settings)


def chat(settings: Settings) -> int:
    """A conversation with a model in the terminal, or one message and its answer."""
    from .chatting.chatting import chat
    from .runtime import quiet_loaded_libraries

    quiet_loaded_libraries()
    stop_if_asked()
    return chat(settings)


def evaluate(settings: Settings) -> None:
    """A tuned model against its reference on pairs it was not trained on -> metrics, one row per pair, page."""
    from .evaluation.evaluating import evaluate_model
    from .runtime import quiet_loaded_libraries

    quiet_loaded_libraries()
    stop_if_asked()
    evaluate_model(settings, command_line(settings))


def status(settings: Settings) -> None:
    """The runs under a folder -> a table, JSON, or a page that compares them."""
    from .status.publishing import publish
    from .status.state import read_runs

    publish(read_runs(read_path(settings.status.folder)), settings.status)


def init(settings: Settings) -> None:
    """A commented config for a situation -> a file for --config."""
    from .init.writing import write_config

    write_config(settings)


VERBS: dict[str, Callable[[Settings], int | None]] = {
    "train": train,
    "sft": sft,
    "data": data,
    "plan": plan,
    "plan sft": plan,
    "evaluate": evaluate,
    "compare": compare,
    "merge": merge,
    "chat": chat,
    "status": status,
    "init": init,
}


def run() -> NoReturn:
    """The command as a process: its streams and signals are made ready first. Ends with the exit code of `main`."""
    open_console()
    interrupt_on_signals()
    sys.exit(main())


if __name__ == "__main__":
    run()
