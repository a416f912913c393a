"""The story of a training run, stage by stage: every stage is a room and computes for itself."""

from __future__ import annotations

import dataclasses
import tempfile
from datetime import datetime
from pathlib import Path

from ..arguments import check_adapter_flags, command_line
from ..data.loading import load_pairs
from ..data.tokenizing import PAIR_COLUMNS, SFT_COLUMNS
from ..distributed import one_first
from ..errors import gather
from ..interruptions import stop_if_asked
from ..models.loading import load_policy, load_tokenizer
from ..models.reference import choose_reference, load_reference
from ..models.sources import find_policy
from ..run.lock import FolderLock
from ..run.processes import count_processes
from ..runtime import Precision, choose_precision, find_device, set_seed
from ..settings.training import Settings
from .carrying_on import attach_continuation
from .checks import check_settings, find_sharding
from .config import rows_of_run
from .context import Run
from .continuation import check_continuation, choose_checkpoint
from .description import describe_data, describe_start
from .finishing import finish_run
from .folder import choose_moment, find_folder
from .launch import join_processes, lost_processes_explained
from .making import make_imitation_trainer, make_preference_trainer
from .recording import begin_record
from .rows import check_steps, prepare_rows
from .running import start_run
from .tracking import prepare_trackers


def train(settings: Settings) -> None:
    """The verbs `train` (policy and reference) and `sft` (imitation of completions) -> adapter or full model."""
    run_training(settings)


def run_training(settings: Settings) -> Run:
    """The stages of training, in a folder that no other run writes into; returns the run that was finished."""
    with lost_processes_explained(), FolderLock() as lock:
        return run_stages(settings, lock)


def run_stages(settings: Settings, lock: FolderLock) -> Run:
    """The stages that both kinds of training share, in order."""
    set_seed(settings.training.seed)
    precision = choose_precision(settings.model.dtype, find_device())
    join_processes(settings, precision)

    moment = choose_moment(settings)
    with one_first():  # reads and tokenizes; the others find it in the cache
        run = read_run(settings, precision, lock, moment)
    stop_if_asked()
    describe_data(run)
    check_steps(run.rows, settings)
    run = dataclasses.replace(run, checkpoint=choose_checkpoint(run.folder, settings))
    continuation = check_continuation(run)

    policy = load_policy(run.source, settings, precision)
    sharded = bool(find_sharding(settings))
    plan = choose_reference(settings, run.source, precision.dtype, len(run.rows.train), count_processes(), sharded)
    reference = load_reference(plan, settings.model, precision)
    stop_if_asked()
    if run.folder is not None:
        prepare_trackers(settings, run.folder)
    with tempfile.TemporaryDirectory() as nowhere:
        folder = run.folder or Path(nowhere)
        if run.learns_pairs:
            trainer = make_preference_trainer(run, policy, reference, folder)
        else:
            trainer = make_imitation_trainer(run, policy, folder)
        del reference  # the trainer holds its model now, or has let go of it
        describe_start(run, trainer, plan)
        attach_continuation(run, trainer, continuation)
        live = start_run(run, trainer, plan)
        live.train()
        finish_run(live)
    return run


def read_run(settings: Settings, precision: Precision, lock: FolderLock, moment: datetime) -> Run:
    """What is asked for, found and made into token ids, with every fault of the first look at once."""
    processes = settings.trainer_fields.get("dataset_num_proc")
    folder, source, data, _ = gather(
        lambda: find_folder(settings, lock),
        lambda: find_policy(settings.model),
        lambda: load_pairs(settings.data, settings.verb, settings.training.seed, processes, rows_of_run(settings)),
        lambda: check_settings(settings),
    )
    check_adapter_flags(settings, source.adapter is not None)
    tokenizer = load_tokenizer(source, settings.model)
    columns = PAIR_COLUMNS if settings.verb == "train" else SFT_COLUMNS
    rows = prepare_rows(data, tokenizer, source, settings, columns, moment)
    record = begin_record(settings, precision, source, data, rows, command_line(settings))
    return Run(settings, precision, source, data, rows, folder, record=record)
