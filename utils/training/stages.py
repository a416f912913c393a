"""The story of a training run, stage by stage: every stage is a room and computes for itself."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..arguments import check_adapter_flags, command_line
from ..data.loading import load_pairs
from ..data.tokenizing import PAIR_COLUMNS, SFT_COLUMNS
from ..distributed import one_first
from ..errors import gather
from ..interruptions import stop_if_asked
from ..models.loading import build_reference, load_policy, load_tokenizer
from ..models.sources import find_policy
from ..run.lock import FolderLock
from ..run.processes import count_processes
from ..runtime import choose_precision, find_device, set_seed
from ..settings.training import Settings
from .carrying_on import attach_continuation
from .checks import check_settings, find_sharding
from .config import rows_of_run
from .continuation import check_continuation, choose_checkpoint
from .description import describe_data, describe_start
from .finishing import finish_run
from .folder import choose_moment, find_folder
from .launch import join_processes, lost_processes_explained
from .making import make_imitation_trainer, make_preference_trainer
from .reference import scores_ahead
from .rows import check_steps, prepare_rows
from .running import Run, start_run
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
    learns_pairs = settings.verb == "train"
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
