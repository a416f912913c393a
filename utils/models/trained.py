"""Models to look at: where their weights are and, for those that this script trained, the record of their run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arguments.parsing import NAMES_CODE, known_flags, read_recorded
from ..errors import UserError
from ..run.bounded import Unreadable
from ..run.checkpoints import find_checkpoints, find_fault, is_of_model
from ..run.names import RECORD
from ..run.paths import read_path
from ..run.record import find_run_folder
from ..run.records import read_run
from ..settings.training import Settings
from .sources import ModelSource, check_source, check_unchanged, find_model, read_identities


@dataclass(frozen=True)
class TrainedModel:
    """A model, with the folder and the record of its run; without both for a model that no run of this script made.

    A record may come from anybody: what it names is not loaded before `find_reference` has looked at it.
    """

    source: ModelSource
    folder: Path | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def start(self) -> ModelSource | None:
        """What its run began from, as its record says."""
        return self._recorded("start")

    @property
    def reference(self) -> ModelSource | None:
        """What a preference run was measured against; for an sft run what it began from. As its record says."""
        return self._recorded("reference_model") or self.start

    @property
    def has_reference(self) -> bool:
        """Whether its run had one: a preference run."""
        return bool(self.record.get("reference_model"))

    def find_reference(self) -> ModelSource | None:
        """The same, to be loaded: looked at like a model that a flag names.

        Raises:
            UserError: it is not there, or holds or names what is refused.
        """
        source = self.reference
        if source is not None:
            key = "reference_model" if self.has_reference else "start"
            check_source(f"{self.folder / RECORD}: its {key}", source)
            names = ("reference", "model") if key == "reference_model" else ("model",)
            check_unchanged(f"{self.folder / RECORD}: its {key}", source, read_identities(self.record), names)
        return source

    @property
    def reference_in_4bit(self) -> bool:
        """Whether the run held its reference in 4 bits."""
        recorded = self.record.get("reference_model")
        return bool(recorded.get("in_4bit")) if recorded else self.in_4bit

    @property
    def in_4bit(self) -> bool:
        """Whether the run held the weights under its adapter in 4 bits."""
        return self.source.adapter is not None and bool(self.setting("use_4bit"))

    def setting(self, name: str, otherwise: Any = None) -> Any:
        """A setting of its run, checked as a value of its flag.

        Raises:
            UserError: it is none.
        """
        recorded = self.record.get("settings", {})
        value = recorded.get(name, otherwise)
        if name not in recorded or name not in known_flags(self.record["verb"]):
            return value
        try:
            return _recorded(self, name, value)
        except (ValueError, UserError) as error:
            raise UserError(f"{self.folder / RECORD}: {name} {error}") from None

    def _recorded(self, key: str) -> ModelSource | None:
        recorded = self.record.get(key)
        if not recorded:
            return None
        names = [field.name for field in dataclasses.fields(ModelSource)]
        parts = {name: recorded.get(name) for name in names}
        source = ModelSource(**parts | {"tokenizer": parts["tokenizer"] or parts["base"]})
        former = (self.record.get("start") or recorded)["base"]
        if source.base != former or former == self.source.base or self.source.adapter is None:
            return source
        # The base was moved since, and the adapter's config says where to: see find_trained.
        tokenizer = self.source.base if source.tokenizer == former else source.tokenizer
        return dataclasses.replace(source, base=self.source.base, tokenizer=tokenizer)


def find_trained(flag: str, name: str, revision: str | None = None) -> TrainedModel:
    """The model that `flag` names: the folder of a run, one of its checkpoints, or any model or adapter.

    Raises:
        UserError: it is not there, its base is gone, its run did not finish, or its record is of another model.
    """
    if not os.path.isdir(os.path.expanduser(name)):
        return TrainedModel(find_model(flag, name, revision))
    folder = read_path(name).resolve()
    if revision is not None:
        raise UserError(f"--model_revision {revision}: {folder} is a folder, which has no revisions")
    run = find_run_folder(folder)
    if not (run / RECORD).is_file():
        return TrainedModel(find_model(flag, name))
    try:
        record = read_run(run / RECORD)
    except (OSError, Unreadable) as error:
        raise UserError(
            f"{flag} {name}: {run / RECORD} is not a valid record of a run ({error}); remove or fix it"
        ) from None
    if run == folder and record.get("status") != "finished":
        raise UserError(f"{flag} {name}: {_unfinished(folder, record)}")
    fault = find_fault(folder, reads=is_of_model) if run != folder else None
    if fault is not None:
        raise UserError(f"{flag} {name}: {_damaged(run, fault)}")
    trained = TrainedModel(find_model(flag, name), run, record)
    _check_record(flag, trained)
    return trained


def _unfinished(folder: Path, record: Mapping[str, Any]) -> str:
    checkpoints = find_checkpoints(folder)
    look = f"name its newest checkpoint, {checkpoints[-1]}, or " if checkpoints else ""
    go_on = f"finish it with --output_dir {folder} --resume_from_checkpoint auto and its other settings"
    return f"a run that did not finish ({record.get('status')}); {look}{go_on}"


def _damaged(run: Path, fault: str) -> str:
    whole = [str(path) for path in find_checkpoints(run) if find_fault(path, reads=is_of_model) is None]
    instead = f"its newest complete one is {whole[-1]}" if whole else "its run has no complete one"
    return f"a damaged checkpoint: {fault}; {instead}"


def _check_record(flag: str, trained: TrainedModel) -> None:
    start, source = trained.record.get("start"), trained.source
    if start is None:
        return
    adapts = bool(trained.setting("use_lora")) or start.get("adapter") is not None
    kinds = {True: "an adapter", False: "a full model"}
    if adapts != (source.adapter is not None):
        raise UserError(
            f"{flag} {source.name}: {kinds[not adapts]}, but its {RECORD} is of a run that trained {kinds[adapts]}; "
            "the files of two runs are mixed"
        )
    # Where the record holds hashes of the base, those tell; a copy of it elsewhere has the same.
    if adapts and not read_identities(trained.record) and source.base != start["base"] and Path(start["base"]).is_dir():
        raise UserError(
            f"{flag} {source.name}: an adapter for {source.base}, but its run trained it on {start['base']}; "
            "fix base_model_name_or_path in its adapter_config.json"
        )


def as_in_run(settings: Settings, trained: TrainedModel, names: Iterable[str]) -> Settings:
    """The settings, with those of `names` that the person did not give taken from the run's record.

    A record may come from anybody: what names code is never taken from it, and every value must be one of its flag.

    Raises:
        UserError: a value in the record is none that its flag takes, or names a kernel to be fetched and run.
    """
    recorded = trained.record.get("settings", {})
    wanted = {name for name in names if name in recorded and name not in settings.given} - NAMES_CODE
    wanted -= {name for name in wanted if recorded[name] is None and name not in known_flags(trained.record["verb"])}
    values, faults = {}, []
    for name in sorted(wanted):
        try:
            values[name] = _recorded(trained, name, recorded[name])
        except (ValueError, KeyError, TypeError, UserError) as error:
            said = "is not a setting of its verb" if isinstance(error, KeyError | TypeError) else str(error)
            faults.append(f"{trained.folder / RECORD if trained.folder else RECORD}: {name} {said}")
    if faults:
        raise UserError(*faults)
    return settings.with_values(values)


def _recorded(trained: TrainedModel, name: str, value: Any) -> Any:
    made = read_recorded(trained.record.get("verb"), name, value)
    if name == "attn_implementation" and "/" in str(made):
        raise ValueError(
            f"is {made!r:.80}, a kernel that would be downloaded and run; if you trust it, pass it as --{name} yourself"
        )
    return made
