"""What differs between a resumed run and the run that began, and which differences change its meaning."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..models.templates import TEMPLATE_DATE
from ..settings.changes import FREE_TO_CHANGE, WORLD
from ..settings.data import DataSettings
from ..settings.training import GROUPS_OF_RUN

# Settings that say where something is: what it is counts, wherever it lies by now.
PLACES = {"dataset_name", "model_name_or_path", "model_revision", "adapter_name_or_path", "ref_model_name_or_path"}
PLACES |= {"chat_template"}
# Settings from which other token ids of the same rows follow, and those from which other rows do.
OF_IDS = {"max_length", "truncation", "chat_template_kwargs", "reasoning"}
OF_ROWS = {field.name for field in dataclasses.fields(DataSettings)} - OF_IDS | {"seed"}
# As JSON holds them.
DEFAULTS = {
    field.name: list(field.default) if isinstance(field.default, tuple) else field.default
    for group in GROUPS_OF_RUN.values()
    for field in dataclasses.fields(group)
}
LIBRARIES = ("torch", "transformers", "trl", "peft")


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
        # A flag that a former version of the script did not have was at its default; one of the trainer's was off.
        known = name in old or name in DEFAULTS
        if old.get(name, DEFAULTS.get(name)) != new.get(name) and (known or new.get(name)):
            yield name, f"--{name} was {_written(old.get(name))}, is {_written(new.get(name))}"


def _written(value: Any) -> str:
    """A setting as it is written on the command line."""
    if value is None:
        return "not given"
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _changed_rows(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if before.get("data", now["data"]) != now["data"]:
        counts = ""
        if "rows" in before:
            counts = " ({:,} rows to train on and {:,} held out before".format(*before["rows"])
            counts += ", {:,} and {:,} now)".format(*now["rows"])
        yield "data", f"the dataset has changed{counts}"
        if before.get("tokenizer", now["tokenizer"]) != now["tokenizer"]:
            yield "tokenizer", "the tokenizer has changed: its vocabulary, template or special tokens"
    elif before.get("ids", now["ids"]) != now["ids"]:
        yield "tokenizer", _why_other_ids(before, now)


def _why_other_ids(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if before.get("tokenizer") != now["tokenizer"]:
        return "the tokenizer gives different ids for the same texts (its vocabulary or template has changed)"
    date, former = now.get(TEMPLATE_DATE), before.get(TEMPLATE_DATE)
    if date is not None and date != former:
        return f"the chat template writes the date, which was {former or 'not recorded'} then and is {date} now"
    return (
        "the same texts give different ids with the same vocabulary and template, so this script or a library has "
        "another version"
    )


def _changed_models(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if before.get("model", now["model"]) != now["model"]:
        if before["model"]["config"] != now["model"]["config"]:
            yield "architecture", "the initial model has changed (its config differs)"
        else:
            yield "model", "the initial model has different weights"
    if before.get("reference", now["reference"]) != now["reference"]:
        both = before["reference"] and now["reference"]
        other = "has different weights" if both else "is given now" if now["reference"] else "is no longer given"
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
            f"the {_pairs_per_step(now)} rows of an optimizer step are divided differently ({_words(now)}, before "
            f"{_words(before)}): the same run, up to the rounding of sums"
        )
    if before.get("device", now["device"]) != now["device"]:
        yield f"begun on {before['device']}, resumed on {now['device']}: the same run, up to rounding"
    for name in sorted(PLACES):
        old, new = (part.get("settings", {}).get(name) for part in (before, now))
        if "model" in before and old != new and None not in (old, new):
            yield f"--{name} was {old}, is {new}: its content is the same"


def differing_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Libraries whose numbers may differ in the last bits from those of the versions that the run began with."""
    old, new = before.get("versions") or {}, now["versions"]
    other = [name for name in LIBRARIES if name in old and _release(old[name]) != _release(new[name])]
    if other:
        names = ", ".join(f"{name} {old[name]} before, {new[name]} now" for name in other)
        yield f"other versions ({names}): the run continues, but bit for bit only with the original versions"


def _release(version: str) -> list[str]:
    return str(version).split(".")[:2]
