"""Which pairs a model is evaluated on: those that its run held out, or others; and on which of them it was trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np

from ..data.loading import PreferenceData, add_ids, load_unsplit_pairs
from ..data.splitting import prompt_key
from ..data.wishes import source_names
from ..errors import UserError
from ..models.trained import TrainedModel
from ..settings.training import Settings
from ..settings.verbs import READ_WITH
from ..training.run_data import read_as_run


@dataclass(frozen=True)
class EvaluatedPairs:
    """The pairs, as `data.train` with an `id` each.

    `own`: whether they are those that the run held out. `unchanged`: whether the data of the run still are what it was
    trained on. `trained_on`: of each pair, whether its prompt was; both are None where that cannot be told.
    """

    data: PreferenceData
    own: bool
    unchanged: bool | None
    trained_on: np.ndarray | None  # (pairs,) bool


def find_pairs(settings: Settings, trained: TrainedModel) -> EvaluatedPairs:
    """The pairs of --dataset_name; without it, and where that names the run's own data, those that the run held out.

    Raises:
        UserError: they cannot be read, or there are none.
    """
    name = settings.data.dataset_name
    if name is None:
        return _hold_own(_read_own_or_say_why(settings, trained), trained)
    adapter = settings.data.dataset_adapter
    own = _try(lambda: read_as_run(trained, adapter)) if trained.record else None
    if _may_be_own(settings, trained, own):
        read = own if name == trained.setting("dataset_name") else _try(lambda: read_as_run(trained, adapter, name))
        if read is not None and read.held_out is not None and _is_unchanged(read, trained):
            return _hold_own(read, trained)
    data = load_unsplit_pairs(settings.data, settings.training.seed)
    pairs = add_ids(data.train)
    unchanged = None if own is None else _is_unchanged(own, trained)
    trained_on = find_trained_on(pairs, own.train) if own is not None and unchanged is not False else None
    return EvaluatedPairs(dataclasses.replace(data, train=pairs), False, unchanged, trained_on)


def _read_own_or_say_why(settings: Settings, trained: TrainedModel) -> PreferenceData:
    missing = f"--dataset_name is missing: {trained.source.name}"
    if not trained.record:
        raise UserError(f"{missing} is not the folder of a run, so nothing says what to evaluate it on; name the pairs")
    if trained.record["verb"] != "train":
        raise UserError(f"{missing} is a run of {trained.record['verb']}, which has no preference pairs; name some")
    try:
        data = read_as_run(trained, settings.data.dataset_adapter)
    except UserError as error:
        advice = (
            "the pairs of the run can no longer be read; if they have moved, say where with --dataset_name (a "
            "relative path holds in the folder where the run was started)"
        )
        raise UserError(*error.faults, advice) from None
    if data.held_out is None:
        raise UserError(f"{missing} is a run that held nothing out (--validation_split none); name pairs")
    return data


def _hold_own(data: PreferenceData, trained: TrainedModel) -> EvaluatedPairs:
    pairs = data.held_out
    seen = find_trained_on(pairs, data.train) if data.shared_prompts else np.zeros(len(pairs), dtype=bool)
    held_out = dataclasses.replace(data, train=pairs, held_out=None, place=data.held_out_place)
    return EvaluatedPairs(held_out, True, _is_unchanged(data, trained), seen)


def _may_be_own(settings: Settings, trained: TrainedModel, own: PreferenceData | None) -> bool:
    """Whether --dataset_name may be the run's own data: where it says nothing else of how to read them, and is called
    as they were, or they are not where they were."""
    name, recorded = settings.data.dataset_name, trained.setting("dataset_name")
    if recorded is None or trained.record["verb"] != "train" or settings.given & set(READ_WITH):
        return False
    called, once = ([Path(item).name for item in source_names(names)] for names in (name, recorded))
    return own is None or called == once


def _try(read: Callable[[], PreferenceData]) -> PreferenceData | None:
    try:
        return read()
    except UserError:
        return None


def _is_unchanged(data: PreferenceData, trained: TrainedModel) -> bool:
    return data.fingerprint == trained.record.get("data", {}).get("fingerprint")


def find_trained_on(pairs: datasets.Dataset, trained: datasets.Dataset) -> np.ndarray:
    """Of each pair, whether its prompt is among the `trained` ones; case and spacing do not count. Shape (pairs,)."""
    keys = [prompt_key(prompt) for prompt in pairs["prompt"]]
    wanted = set(keys)
    seen = set()
    for batch in trained.select_columns(["prompt"]).iter(batch_size=1000):
        seen |= wanted & {prompt_key(prompt) for prompt in batch["prompt"]}
    return np.array([key in seen for key in keys])
