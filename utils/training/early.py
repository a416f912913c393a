"""What is refused before the libraries are imported: names of folders, files and packages that are not there."""

from __future__ import annotations

import os
from importlib.util import find_spec
from os.path import expanduser
from pathlib import Path

from ..data.wishes import check_there, source_names
from ..errors import UserError, gather
from ..models.adapter_config import read_adapter_config
from ..models.quantization import check_4bit
from ..models.sources import check_places
from ..run.folder import check_output_folder
from ..run.lock import check_not_held
from ..run.names import ADAPTER_CONFIG
from ..run.paths import read_path
from ..settings.training import Settings
from .tracking import check_trackers


def check_early(settings: Settings) -> None:
    """The faults of a training run that can be seen within a second, all at once; the stages look again, and closer.

    Raises:
        UserError: the output folder is in use; a model, its reference or the data is not there; a package is missing.
    """
    gather(
        lambda: check_folder(settings),
        lambda: check_places(settings.model),
        lambda: check_there(settings.data.dataset_name) if settings.data.dataset_name else None,
        lambda: check_trackers(settings),
        lambda: check_4bit() if settings.model.use_4bit and find_spec("bitsandbytes") is None else None,
    )


def check_folder(settings: Settings) -> Path | None:
    """The output folder; None in a dry run.

    Raises:
        UserError: it holds something that this run would spoil, or another run writes there.
    """
    if settings.run.dry_run:
        return None
    folder = read_path(settings.run.output_dir).resolve()
    _check_inputs_outside(folder, settings)
    named = settings.run.resume_from_checkpoint
    if named is not None and named != "auto":
        checkpoint = read_path(named).resolve()
        if checkpoint.parent != folder:
            raise UserError(
                f"--resume_from_checkpoint {checkpoint}: not a checkpoint of the run in --output_dir {folder}; "
                "to start a new run from its weights, name it with --model_name_or_path"
            )
    check_not_held(folder)
    check_content(folder, settings)
    return folder


def check_content(folder: Path, settings: Settings) -> None:
    """Refuses an output folder with something in it that this run would spoil."""
    resume = settings.run.resume_from_checkpoint is not None
    check_output_folder(folder, settings.verb, resume, settings.run.overwrite_output_dir)


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
