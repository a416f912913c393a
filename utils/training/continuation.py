"""Whether a resumed run is the run that began: its data, token ids, models, settings, precision and batch.

Each checkpoint holds what the run was like when it was saved. What differs now and would change what the run means is
refused, unless --allow_changes names it; then it is said, and recorded in every later checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..distributed import LONG, gather
from ..errors import UserError
from ..models.identity import identify_model
from ..models.sources import find_model
from ..models.templates import TEMPLATE_DATE
from ..models.untrusted import refuse_pickles
from ..run.checkpoints import ResumePoint, find_resume_point, set_aside
from ..run.processes import count_processes
from ..run.state import IDENTITY, read_kept, restoring
from ..runtime import is_main_process, read_versions, say
from ..settings.changes import ALL_SETTINGS, CANNOT_CHANGE, FREE_TO_CHANGE, GROUPS
from ..settings.training import Settings
from .context import Run
from .differences import describe_free_changes, differing_versions, find_changes
from .launch import with_deepspeed
from .reference_cache import hash_rows

CHANGES = "changes"  # in what a checkpoint keeps
PROBE = "The quick brown fox: jumps over 13 lazy dogs!\n\n  \u00e9\u4e2d"


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What checkpoints hold of a run, and what is to be said of one that goes on.

    `changes` are sentences on what --allow_changes let pass, now or in an earlier part; `changed` are the names of it,
    now; `warnings` belong into the record.
    """

    identity: Mapping[str, Any]
    changes: tuple[str, ...] = ()
    changed: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()


def choose_checkpoint(folder: Path | None, settings: Settings) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means, the same in all processes; damaged ones on the way to it are
    set aside. None for a start from the beginning, and in a dry run.

    Raises:
        UserError: a checkpoint was named that a run cannot resume from.
    """
    wish = settings.run.resume_from_checkpoint
    if folder is None or wish is None:
        return None
    outcome: ResumePoint | UserError | None = None
    if is_main_process():
        try:
            outcome = find_resume_point(folder, wish)
            set_aside(outcome)
        except UserError as error:
            outcome = error
    outcome = gather(outcome, LONG)[0]  # reading large checkpoints takes longer than others usually wait
    if isinstance(outcome, UserError):
        raise outcome
    checkpoint = outcome.checkpoint
    if checkpoint is not None and not with_deepspeed(settings):  # which writes pickles of its own, and reads them
        refuse_pickles("--resume_from_checkpoint", checkpoint)
    return checkpoint


def check_continuation(run: Run) -> Continuation | None:
    """What the run is; where it goes on from a checkpoint, compared with that. None in a dry run.

    Raises:
        UserError: each change that would alter what the run means, and is not allowed.
    """
    if run.folder is None:
        return None
    now, checkpoint = identify_run(run), run.checkpoint
    allowed = run.settings.run.allow_changes
    if checkpoint is None:
        _say_unused(allowed, frozenset())
        return Continuation(now)
    kept = read_kept(checkpoint)
    before = kept.get(IDENTITY) or identify_by_record(run.former)
    with restoring(checkpoint, "trainer_state.json"):
        found = find_changes(before, now)
    passed = {name: text for name, text in found.items() if _is_allowed(name, allowed)}
    refused = [_refuse(name, text, checkpoint) for name, text in found.items() if name not in passed]
    if refused:
        raise UserError(*refused)
    with restoring(checkpoint, "trainer_state.json"):
        notes, versions = list(describe_free_changes(before, now)), list(differing_versions(before, now))
    for text in notes:
        say(f"note: {text}")
    new = tuple(f"from {checkpoint.name} on, by --allow_changes: {text}" for text in passed.values())
    changes = (*kept.get(CHANGES, ()), *new)
    warnings = (*changes, *versions)
    for warning in warnings:
        say(f"warning: {warning}")
    _say_unused(allowed, frozenset(passed))
    return Continuation(now, changes, frozenset(passed), warnings)


def identify_run(run: Run) -> dict[str, Any]:
    """What the run means, as JSON: small, and the same wherever its files lie."""
    rows, source, settings, precision = run.rows, run.source, run.settings, run.precision
    sides = [side for side in (rows.train, rows.held_out) if side is not None]
    columns = [name for name in rows.train.column_names if name.endswith("_ids")]
    reference = settings.model.named_reference if settings.verb == "train" else None
    training = settings.training
    identity = {
        "settings": settings.flat(),
        "data": run.data.fingerprint,
        "rows": [len(rows.train), len(rows.held_out) if rows.held_out is not None else 0],
        "ids": [hash_rows(side, columns) for side in sides],
        "tokenizer": hash_tokenizer(rows.tokenizer, rows.end_ids),
        TEMPLATE_DATE: rows.template_date,
        "model": identify_model(source),
        "base": identify_model(dataclasses.replace(source, adapter=None)) if source.adapter else None,
        "reference": identify_model(find_model(*reference)) if reference else None,
        "precision": precision.name,
        "device": precision.device.type,
        "batch": [training.per_device_train_batch_size, training.gradient_accumulation_steps, count_processes()],
        "versions": read_versions(),
    }
    return json.loads(json.dumps(identity, default=str))


def identify_by_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """As much of it as run.json tells, for a checkpoint that does not say it itself."""
    settings, data = record.get("settings") or {}, record.get("data") or {}
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    batch = [*(settings.get(name) for name in names), (record.get("process") or {}).get("processes", 1)]
    found = {"settings": settings, "data": data.get("fingerprint"), "versions": record.get("versions")}
    found |= {"precision": record.get("precision"), "batch": batch if None not in batch else None}
    return {name: value for name, value in found.items() if value is not None}


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int]) -> str:
    """What the tokenizer makes of texts: its vocabulary, its template, its special tokens, the ids of a sentence."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, sorted(end_ids)]
    said = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, special, tokenizer(PROBE)["input_ids"]]
    return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()[:32]


def _is_allowed(name: str, allowed: Sequence[str]) -> bool:
    if name in CANNOT_CHANGE:
        return False
    return name in allowed or (name not in GROUPS and ALL_SETTINGS in allowed)


def _refuse(name: str, text: str, checkpoint: Path) -> str:
    start = f"--resume_from_checkpoint: {checkpoint.name} is of a run that differs: {text}. "
    if name in CANNOT_CHANGE:
        return f"{start}The checkpoint does not fit: resume with the same value, or start a new run in another folder"
    return (
        f"{start}Resume with the original settings, choose another --output_dir, or pass --allow_changes {name} to "
        "continue as it is now"
    )


def _say_unused(allowed: Sequence[str], used: frozenset[str]) -> None:
    """Names that had nothing to allow, which is nothing of the run and so not in its record."""
    used = used | {ALL_SETTINGS} if any(name not in GROUPS for name in used) else used
    free = dict.fromkeys(FREE_TO_CHANGE, "may change without it")
    for name in dict.fromkeys(allowed):
        if name not in used:
            say(f"warning: --allow_changes {name}: {free.get(name, 'nothing of it has changed')}")
