"""The folder of a run: which one, whether the run may write there, and what a run that it holds already recorded."""

from __future__ import annotations

import os
from datetime import datetime
from os.path import expanduser
from pathlib import Path
from typing import Any

from ..data.mixing import source_names
from ..distributed import LONG, gather
from ..errors import UserError
from ..models.adapter_config import read_adapter_config
from ..models.templates import recorded_moment
from ..run.checkpoints import find_checkpoints
from ..run.folder import check_output_folder
from ..run.lock import FolderLock, check_not_held
from ..run.names import ADAPTER_CONFIG
from ..run.paths import read_path
from ..run.record import read_record
from ..settings.training import Settings


def find_folder(settings: Settings, lock: FolderLock) -> Path | None:
    """The output folder, checked and locked for this run; None in a dry run.

    Raises:
        UserError: it holds something that this run would spoil, or another run writes there.
    """
    if settings.run.dry_run:
        return None
    folder = read_path(settings.run.output_dir).resolve()
    _check_inputs_outside(folder, settings)
    resume = settings.run.resume_from_checkpoint is not None
    if resume and settings.run.resume_from_checkpoint != "auto":
        checkpoint = read_path(settings.run.resume_from_checkpoint).resolve()
        if checkpoint.parent != folder:
            raise UserError(
                f"--resume_from_checkpoint {checkpoint}: not a checkpoint of the run in --output_dir {folder}; "
                "to start a new run from its weights, name it with --model_name_or_path"
            )
    check_not_held(folder)
    about = (folder, settings.verb, resume, settings.run.overwrite_output_dir)
    check_output_folder(*about)
    lock.take(folder)
    check_output_folder(*about)  # once more: from here on nobody else changes it
    return folder


def _check_inputs_outside(folder: Path, settings: Settings) -> None:
    """What a run reads must not lie where it writes: its own result would take its place."""
    model = settings.model
    flag, reference = model.named_reference or ("--ref_model_name_or_path", None)
    inputs = {
        "model_name_or_path": model.model_name_or_path,
        "adapter_name_or_path": model.adapter_name_or_path,
        flag.removeprefix("--"): reference,
    }
    for name in tuple(inputs):
        if inputs[name] is not None and (Path(inputs[name]) / ADAPTER_CONFIG).is_file():
            config = read_adapter_config(inputs[name]) or {}
            inputs[f"{name} (its base model)"] = config.get("base_model_name_or_path")
    faults = []
    data = [("dataset_name", name) for name in source_names(settings.data.dataset_name)]
    for name, value in [*inputs.items(), *data]:
        if not isinstance(value, str) or not os.path.exists(expanduser(value)):
            continue
        path = Path(expanduser(value)).resolve()
        if path == folder or folder in path.parents:
            faults.append(f"--output_dir {folder}: holds --{name} {value}, which the result would overwrite")
    if faults:
        raise UserError(*faults)


def choose_moment(settings: Settings) -> datetime:
    """What a chat template that writes the date is told: what the run that is resumed was told, else now. The same in
    all processes.

    Raises:
        UserError: the record of the run is none.
    """
    now = gather(datetime.now(), LONG)[0]
    folder = settings.run.output_dir
    before = read_former_record(settings, read_path(folder).resolve()) if folder is not None else {}
    return recorded_moment(before) or now


def read_former_record(settings: Settings, folder: Path) -> dict[str, Any]:
    """The record of the run that is resumed; empty where one begins."""
    wish = settings.run.resume_from_checkpoint
    return (read_record(folder) or {}) if wish is not None and find_checkpoints(folder) else {}
