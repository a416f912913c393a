"""Whether a run that goes on is the run that began: its data, token ids, models, settings, precision and batch.

Each checkpoint holds what the run was like when it was saved. What differs now and would change what the run means is
refused, unless --allow_changes names it; then it is said, and recorded in every later checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.loading import PreferenceData
from ..errors import UserError
from ..models.identity import identify_model
from ..models.sources import ModelSource, find_model
from ..models.templates import TEMPLATE_DATE
from ..models.untrusted import refuse_pickles
from ..run.checkpoints import ResumePoint, find_resume_point, set_aside
from ..run.processes import count_processes
from ..run.record import read_record
from ..run.state import IDENTITY, read_kept, restoring
from ..runtime import Precision, is_main_process, read_versions, say
from ..settings.changes import ALL_SETTINGS, CANNOT_CHANGE, FREE_TO_CHANGE, GROUPS, WORLD
from ..settings.data import DataSettings
from ..settings.training import STAGES, Settings
from .launch import gather_from_all, with_deepspeed
from .preparation import Rows
from .reference_cache import hash_rows

CHANGES = "changes"  # in what a checkpoint keeps
# Settings that say where something is: what it is counts, wherever it lies by now.
PLACES = {"dataset_name", "model_name_or_path", "model_revision", "adapter_name_or_path", "ref_model_name_or_path"}
PLACES |= {"chat_template"}
# Settings from which other token ids of the same rows follow, and those from which other rows do.
OF_IDS = {"max_length", "truncation"}
OF_ROWS = {field.name for field in dataclasses.fields(DataSettings)} - OF_IDS | {"seed"}
DEFAULTS = {field.name: field.default for stage in STAGES.values() for field in dataclasses.fields(stage)}
PROBE = "The quick brown fox: jumps over 13 lazy dogs!\n\n  \u00e9\u4e2d"
LIBRARIES = ("torch", "transformers", "trl", "peft")


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
        UserError: a checkpoint was named that a run cannot go on from.
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
    outcome = gather_from_all(outcome)[0]  # reading large checkpoints takes longer than others usually wait
    if isinstance(outcome, UserError):
        raise outcome
    checkpoint = outcome.checkpoint
    if checkpoint is not None and not with_deepspeed(settings):  # which writes pickles of its own, and reads them
        refuse_pickles("--resume_from_checkpoint", checkpoint)
    return checkpoint


def check_continuation(
    folder: Path | None,
    checkpoint: Path | None,
    data: PreferenceData,
    rows: Rows,
    source: ModelSource,
    settings: Settings,
    precision: Precision,
) -> Continuation | None:
    """What the run is; where it goes on from a checkpoint, compared with that. None in a dry run.

    Raises:
        UserError: each change that would alter what the run means, and is not allowed.
    """
    if folder is None:
        return None
    now = identify_run(data, rows, source, settings, precision)
    allowed = settings.run.allow_changes
    if checkpoint is None:
        _say_unused(allowed, frozenset())
        return Continuation(now)
    kept = read_kept(checkpoint)
    before = kept.get(IDENTITY) or identify_by_record(read_record(folder) or {})
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


def identify_run(
    data: PreferenceData, rows: Rows, source: ModelSource, settings: Settings, precision: Precision
) -> dict[str, Any]:
    """What the run means, as JSON: small, and the same wherever its files lie."""
    sides = [side for side in (rows.train, rows.held_out) if side is not None]
    columns = [name for name in rows.train.column_names if name.endswith("_ids")]
    reference = settings.model.ref_model_name_or_path if settings.verb == "train" else None
    training = settings.training
    identity = {
        "settings": settings.flat(),
        "data": data.fingerprint,
        "rows": [len(rows.train), len(rows.held_out) if rows.held_out is not None else 0],
        "ids": [hash_rows(side, columns) for side in sides],
        "tokenizer": hash_tokenizer(rows.tokenizer, rows.end_ids),
        TEMPLATE_DATE: rows.template_date,
        "model": identify_model(source),
        "base": identify_model(dataclasses.replace(source, adapter=None)) if source.adapter else None,
        "reference": identify_model(find_model("--ref_model_name_or_path", reference)) if reference else None,
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


def find_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Name for --allow_changes -> what changed; of all that would alter what the run means."""
    changes = dict(_changed_settings(before, now))
    of_rows = OF_ROWS | ({"max_steps"} if now["settings"].get("streaming") else set())
    for name, text in _changed_rows(before, now):
        follows = of_rows if name == "data" else of_rows | OF_IDS
        if follows.isdisjoint(changes):
            changes[name] = text
    changes |= dict(_changed_models(before, now))
    if before.get("precision", now["precision"]) != now["precision"]:
        changes["precision"] = f"computed in {before['precision']} before, in {now['precision']} now"
    old, new = (_pairs_per_step(part) for part in (before, now))
    if old is not None and old != new:
        changes[WORLD] = f"{old} rows per optimizer step before ({_words(before)}), {new} now ({_words(now)})"
    return changes


def _changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    old, new = before.get("settings", {}), now["settings"]
    free = FREE_TO_CHANGE | {"per_device_train_batch_size", "gradient_accumulation_steps"}
    free |= PLACES if "model" in before else set()
    for name in sorted({*old, *new} - free):
        # A flag that a former version of the script did not have was at its default.
        if old.get(name, DEFAULTS.get(name)) != new.get(name) and (name in old or new.get(name)):
            yield name, f"--{name} was {_written(old.get(name))}, is {_written(new.get(name))}"


def _written(value: Any) -> str:
    """A setting as it is written on the command line."""
    if value is None:
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _changed_rows(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if before.get("data", now["data"]) != now["data"]:
        counts = ""
        if "rows" in before:
            counts = " ({:,} rows to train on and {:,} held out before".format(*before["rows"])
            counts += ", {:,} and {:,} now)".format(*now["rows"])
        yield "data", f"the data set has other content{counts}"
        if before.get("tokenizer", now["tokenizer"]) != now["tokenizer"]:
            yield "tokenizer", "the tokenizer is another: its vocabulary, template or special tokens"
    elif before.get("ids", now["ids"]) != now["ids"]:
        yield "tokenizer", _why_other_ids(before, now)


def _why_other_ids(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if before.get("tokenizer") != now["tokenizer"]:
        return "the tokenizer gives other ids for the same texts (its vocabulary or template is another)"
    date, former = now.get(TEMPLATE_DATE), before.get(TEMPLATE_DATE)
    if date is not None and date != former:
        return f"the chat template writes the date, which was {former or 'not recorded'} then and is {date} now"
    return (
        "the same texts give other ids; vocabulary and template are what they were, so it is the version of this "
        "script or of a library"
    )


def _changed_models(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if before.get("model", now["model"]) != now["model"]:
        if before["model"]["config"] != now["model"]["config"]:
            yield "architecture", "the model that training started from is another (its config says other things)"
        else:
            yield "model", "the model that training started from has other weights"
    if before.get("reference", now["reference"]) != now["reference"]:
        both = before["reference"] and now["reference"]
        other = "has other weights" if both else "is given now" if now["reference"] else "is no longer given"
        yield "reference", f"the reference model (--ref_model_name_or_path) {other}"


def _pairs_per_step(identity: Mapping[str, Any]) -> int | None:
    if identity.get("batch") is None:
        return None
    batch, accumulation, processes = identity["batch"]
    return batch * accumulation * processes


def _words(identity: Mapping[str, Any]) -> str:
    """`4 x 2 x 1 process`: how the rows of a step are divided."""
    batch, accumulation, processes = identity["batch"]
    return f"{batch} x {accumulation} x {processes} process{'es' if processes > 1 else ''}"


def describe_free_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs and leaves the meaning as it is, though not every last bit."""
    if before.get("batch") and before["batch"] != now["batch"] and _pairs_per_step(before) == _pairs_per_step(now):
        yield (
            f"the {_pairs_per_step(now)} rows of an optimizer step are divided in another way ({_words(now)}, before "
            f"{_words(before)}): the same run, up to the rounding of sums"
        )
    if before.get("device", now["device"]) != now["device"]:
        yield f"begun on {before['device']}, goes on on {now['device']}: the same run, up to rounding"
    for name in sorted(PLACES):
        old, new = (part.get("settings", {}).get(name) for part in (before, now))
        if "model" in before and old != new and None not in (old, new):
            yield f"--{name} was {old}, is {new}: what is there is the same"


def differing_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Libraries whose numbers may differ in the last bits from those of the versions that the run began with."""
    old, new = before.get("versions") or {}, now["versions"]
    other = [name for name in LIBRARIES if name in old and _release(old[name]) != _release(new[name])]
    if other:
        names = ", ".join(f"{name} {old[name]} before, {new[name]} now" for name in other)
        yield f"other versions ({names}): the run goes on, bit for bit only with those that it began with"


def _release(version: str) -> list[str]:
    return str(version).split(".")[:2]


def _is_allowed(name: str, allowed: Sequence[str]) -> bool:
    if name in CANNOT_CHANGE:
        return False
    return name in allowed or (name not in GROUPS and ALL_SETTINGS in allowed)


def _refuse(name: str, text: str, checkpoint: Path) -> str:
    start = f"--resume_from_checkpoint: {checkpoint.name} is of a run that differs: {text}. "
    if name in CANNOT_CHANGE:
        return f"{start}What was saved does not fit: resume with the same value, or start a new run in another folder"
    return (
        f"{start}Resume with what it began with, choose another --output_dir, or pass --allow_changes {name} to go on "
        "as it is now"
    )


def _say_unused(allowed: Sequence[str], used: frozenset[str]) -> None:
    """Names that had nothing to allow, which is nothing of the run and so not in its record."""
    used = used | {ALL_SETTINGS} if any(name not in GROUPS for name in used) else used
    free = dict.fromkeys(FREE_TO_CHANGE, "may change without it")
    for name in dict.fromkeys(allowed):
        if name not in used:
            say(f"warning: --allow_changes {name}: {free.get(name, 'nothing of it has changed')}")
