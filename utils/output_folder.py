"""What a run may do to --output_dir: whether it may write there, and what it may remove."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.checkpoints import find_checkpoints
from utils.errors import UserError
from utils.saving import CHECKPOINT, OWN_FILES, RECORD, RESULT_FOLDER, RESULTS, is_result, read_record

# Settings that may differ between the parts of one run: they change how it is run, not what it computes.
FREE_TO_CHANGE = frozenset(
    {
        "resume_from_checkpoint",
        "overwrite_output_dir",
        "output_dir",
        "dry_run",
        "report_to",
        "use_wandb",
        "wandb_project",
        "wandb_run_name",
        "wandb_entity",
        "wandb_tags",
        "cost_per_hour",
        "max_kl",
        "logging_steps",
        "save_steps",
        "eval_steps",
        "save_total_limit",
        "sample_during_eval",
        "num_eval_samples",
        "sample_max_new_tokens",
        "per_device_eval_batch_size",
        "max_tokens_per_batch",  # the pairs of an optimizer step stay what they are
        "auto_batch_size",
        "dataset_num_proc",
        "dataloader_num_workers",
    }
)


def check_output_folder(
    output_dir: Path, verb: str, settings: Mapping[str, Any], resume: bool, overwrite: bool
) -> None:
    """Refuses a folder whose content this run would spoil.

    Raises:
        UserError: the folder holds another run, or files that are not a run's; or it cannot be written.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir}: a file of that name exists")
    check_writable(output_dir)
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
        return
    record = read_record(output_dir)
    if record is None:
        raise UserError(
            f"--output_dir {output_dir}: not empty, and not a run of this script (no {RECORD}). Choose another folder"
        )
    if overwrite:
        return
    if resume and record.get("status") == "finished" and not find_checkpoints(output_dir):
        raise UserError(
            f"--output_dir {output_dir}: holds a finished run without checkpoints, so there is nothing to resume. "
            "Choose another folder, or pass --overwrite_output_dir to replace it"
        )
    if not resume:
        go_on = "pass --resume_from_checkpoint auto to continue it, " if record.get("status") != "finished" else ""
        raise UserError(
            f"--output_dir {output_dir}: holds a run ({record.get('verb')}, {record.get('status')}). Choose another "
            f"folder, {go_on}or pass --overwrite_output_dir to replace it"
        )
    _check_same_run(output_dir, record, verb, settings)


def _check_same_run(output_dir: Path, record: Mapping[str, Any], verb: str, settings: Mapping[str, Any]) -> None:
    if record.get("verb") != verb:
        raise UserError(f"--resume_from_checkpoint: {output_dir} holds a run of {record.get('verb')}, not of {verb}")
    before = record.get("settings") or {}
    now = json.loads(json.dumps(dict(settings), default=str))
    faults = [
        f"--{name} is {now.get(name)!r}, but the run in {output_dir} began with {before.get(name)!r}: "
        "resume with the same value, or choose another --output_dir"
        for name in sorted(set(before) | set(now))
        if name not in FREE_TO_CHANGE and before.get(name) != now.get(name)
    ]
    if faults:
        raise UserError(*faults)


def check_writable(output_dir: Path) -> None:
    """Refuses a folder that cannot be written or made."""
    existing = next(path for path in (output_dir, *output_dir.resolve().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError:
        raise UserError(f"--output_dir {output_dir}: {existing} cannot be written to; choose another folder") from None


@contextlib.contextmanager
def no_empty_folder_left(output_dir: Path | None) -> Iterator[None]:
    """Removes a folder that was made within the context when that fails before anything is in it."""
    existed = output_dir is None or output_dir.exists()
    try:
        yield
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):
                output_dir.rmdir()
        raise


def clear_run(output_dir: Path) -> None:
    """Removes what a former run wrote into the folder, and nothing else."""
    if not output_dir.is_dir():
        return
    for path in list(output_dir.iterdir()):
        if path.is_dir() and CHECKPOINT.fullmatch(path.name):
            shutil.rmtree(path)
        elif RESULT_FOLDER.fullmatch(path.name) and path.is_dir():
            _clear_results(path)
        elif path.name in OWN_FILES or re.fullmatch(r"model-\d+-of-\d+\.safetensors", path.name):
            path.unlink()


def _clear_results(folder: Path) -> None:
    """Removes what verbs found of a run that is replaced, and their folder where nothing else (votes, say) is in it."""
    for verb, names in RESULTS.items():
        if is_result(folder / names[0], verb):
            for name in names:
                (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()
