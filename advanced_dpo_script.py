#!/usr/bin/env python
"""Fine-tunes a language model on preference pairs with DPO: LoRA, 4-bit or all weights, on CPU or GPU.

    python advanced_dpo_script.py [train] --model_name_or_path M --dataset_name D --output_dir O [flags]
    python advanced_dpo_script.py VERB [flags]; `VERB --help` lists the flags of each

Exit codes: 0 done, 2 to be mended (every fault is named), 3 `data` found problems, 130 interrupted, 1 anything else.

The story of a run, stage by stage; every stage is a room under utils/ and computes for itself.
"""

from __future__ import annotations

import dataclasses
import errno
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from utils.arguments import check_adapter_flags, command_line, parse_arguments
from utils.console import lost_output, open_console, reader_left
from utils.errors import Interrupted, LocalError, ProcessLost, UserError, gather, in_one_line
from utils.flags import INIT, SAVES, SCORES_ROWS, STATUS, acts_as
from utils.interruptions import interrupt_on_signals, stop_if_asked
from utils.memory import LESS_MEMORY, keep_freed_memory, ran_out_of_memory
from utils.paths import read_path
from utils.processes import check_launch_variables, forget_lone_rank, tell_launcher
from utils.runtime import is_main_process, make_visible, quiet_libraries, say
from utils.settings import Settings

if TYPE_CHECKING:
    from utils.folder_lock import FolderLock
    from utils.training.running import Run


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
    run_training(settings)


def sft(settings: Settings) -> None:
    """Supervised fine-tuning, stage one: a model that imitates completions -> adapter or full model."""
    run_training(settings)


def data(settings: Settings) -> int:
    """What is in preference data and what is wrong with it -> summary, page, JSON, clean pairs; 3 for problems."""
    if settings.generation.generate:
        return make_pairs(settings)
    from utils.inspection.inspecting import inspect_data
    from utils.inspection.publishing import publish

    stop_if_asked()
    record = inspect_data(settings)
    publish(record, settings.inspection)
    return record["exit_code"]


def make_pairs(settings: Settings) -> int:
    """Preference data made: prompts -> responses of a model -> scores -> pairs."""
    from utils.making import make_pairs
    from utils.runtime import quiet_loaded_libraries

    quiet_loaded_libraries()
    stop_if_asked()
    make_pairs(settings)
    return 0


def compare(settings: Settings) -> None:
    """Two models on the same prompts: responses side by side -> judges -> win rates, rows, page."""
    from utils.comparing.comparing import compare_models
    from utils.runtime import quiet_loaded_libraries

    quiet_loaded_libraries()
    stop_if_asked()
    compare_models(settings, command_line(settings))


def plan(settings: Settings) -> None:
    """What a run of these settings would need, what fits, how long it takes -> summary, JSON, a ready command."""
    from utils.planning.measuring import as_measured, read_measurement
    from utils.planning.planning import choose_device, make_plan
    from utils.planning.publishing import publish
    from utils.planning.work import read_subject
    from utils.runtime import quiet_loaded_libraries

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
    from utils.merging.merging import merge
    from utils.runtime import quiet_loaded_libraries

    quiet_loaded_libraries()
    stop_if_asked()
    merge(settings)


def chat(settings: Settings) -> int:
    """A conversation with a model in the terminal, or one message and its answer."""
    from utils.chatting.chatting import chat
    from utils.runtime import quiet_loaded_libraries

    quiet_loaded_libraries()
    stop_if_asked()
    return chat(settings)


def evaluate(settings: Settings) -> None:
    """A tuned model against its reference on pairs it was not trained on -> metrics, one row per pair, page."""
    from utils.evaluation.evaluating import evaluate_model
    from utils.runtime import quiet_loaded_libraries

    quiet_loaded_libraries()
    stop_if_asked()
    evaluate_model(settings, command_line(settings))


def status(settings: Settings) -> None:
    """The runs under a folder -> a table, JSON, or a page that compares them."""
    from utils.status.publishing import publish
    from utils.status.state import read_runs

    publish(read_runs(read_path(settings.status.folder)), settings.status)


def init(settings: Settings) -> None:
    """A commented config for a situation -> a file for --config."""
    from utils.situations.writing import write_config

    write_config(settings)


def run_training(settings: Settings) -> Run:
    """The stages of training, in a folder that no other run writes into; returns the run that was finished."""
    from utils.folder_lock import FolderLock
    from utils.training.launch import losses_explained

    with losses_explained(), FolderLock() as lock:
        return run_stages(settings, lock)


def run_stages(settings: Settings, lock: FolderLock) -> Run:
    """The stages that both kinds of training share, in order."""
    from utils.data.loading import load_pairs
    from utils.data.tokenizing import PAIR_COLUMNS, SFT_COLUMNS
    from utils.models.loading import build_reference, load_policy, load_tokenizer
    from utils.models.sources import find_policy
    from utils.processes import count_processes
    from utils.runtime import choose_precision, find_device, quiet_loaded_libraries, set_seed
    from utils.tracking import prepare_trackers
    from utils.training.carrying_on import attach_continuation
    from utils.training.config import rows_of_run
    from utils.training.continuation import check_continuation, choose_checkpoint
    from utils.training.description import describe_data, describe_start
    from utils.training.finishing import finish_run
    from utils.training.launch import join_processes, one_first
    from utils.training.preparation import (
        check_settings,
        check_steps,
        choose_moment,
        find_folder,
        find_sharding,
        make_imitation_trainer,
        make_preference_trainer,
        prepare_rows,
    )
    from utils.training.reference import scores_ahead
    from utils.training.running import start_run

    learns_pairs = settings.verb == "train"
    quiet_loaded_libraries()
    stop_if_asked()
    set_seed(settings.training.seed)
    precision = choose_precision(settings.model.dtype, find_device())
    join_processes(settings, precision)

    processes = settings.trainer_fields.get("dataset_num_proc")
    moment = choose_moment(settings)
    with one_first():  # reads and tokenizes; the others find it in the cache
        folder, source, data, _ = gather(
            lambda: find_folder(settings, lock),
            lambda: find_policy(settings.model),
            lambda: load_pairs(settings.data, settings.verb, settings.training.seed, processes, rows_of_run(settings)),
            lambda: check_settings(settings),
        )
        check_adapter_flags(settings, source.adapter is not None)
        tokenizer = load_tokenizer(source, settings.model)
        columns = PAIR_COLUMNS if learns_pairs else SFT_COLUMNS
        rows = prepare_rows(data, tokenizer, source, settings, columns, moment)
    stop_if_asked()
    describe_data(data, rows)
    check_steps(rows, settings)
    resume_from = choose_checkpoint(folder, settings)
    continuation = check_continuation(folder, resume_from, data, rows, source, settings, precision)

    policy = load_policy(source, settings, precision)
    reference = None
    if learns_pairs:
        adapts = settings.lora.use_lora or source.adapter is not None
        ahead = scores_ahead(settings, adapts, len(rows.train), count_processes())
        reference = build_reference(source, settings, precision, ahead, sharded=bool(find_sharding(settings)))
    stop_if_asked()
    if folder is not None:
        prepare_trackers(settings, folder)
    with tempfile.TemporaryDirectory() as nowhere:
        make_trainer = make_preference_trainer if learns_pairs else make_imitation_trainer
        trainer = make_trainer(policy, reference, rows, source, settings, precision, folder or Path(nowhere))
        # The trainer holds the reference's model now, and may have let go of it.
        reference = reference and reference.in_words(trainer.scored_ahead)
        warnings = [*rows.warnings, *describe_start(trainer, reference, source, settings, precision)]
        warnings += attach_continuation(trainer, continuation)
        run = start_run(
            trainer,
            reference,
            source,
            data,
            rows,
            settings,
            precision,
            folder,
            resume_from,
            command_line(settings),
            warnings,
        )
        run.train()
        finish_run(run)
    return run


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

if __name__ == "__main__":
    open_console()
    interrupt_on_signals()
    sys.exit(main())
