"""Where a model is: which base, which adapter, and whether what they name exists. Reads configs, loads no weights."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, gather
from ..run.checkpoints import find_fault, is_of_model
from ..run.manifests import MANIFEST, find_changed
from ..run.names import ADAPTER_CONFIG, CHECKPOINT, RECORD, SET_ASIDE
from ..run.record import find_run_folder, read_record
from ..runtime import say
from ..settings.training import ModelSettings, Settings
from .adapter_config import read_adapter_config
from .adapter_starts import changes_base, check_start
from .hub_files import find_hub_file, read_json_file
from .quantization import Stored, read_stored
from .untrusted import PICKLED, check_adapter_config, check_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
PICKLED_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "spiece.model")


# Files of a finished model that must be as the run saved them. Of others a change may be meant, and is said.
MUST_BE_SAVED = re.compile(r".*\.safetensors(\.index\.json)?|tokenizer\.(json|model)|vocab\.json|merges\.txt")
# Files that change how a model reads or answers when they are put beside it.
ADDED = ("chat_template.jinja", "added_tokens.json", "special_tokens_map.json", "generation_config.json")


@dataclass(frozen=True)
class ModelSource:
    """A base model, with an adapter on top or not. Folders are absolute, so that records of them stay true."""

    base: str
    adapter: str | None
    revision: str | None
    tokenizer: str  # where the tokenizer is: the adapter's folder when it has one, else the base
    adapter_revision: str | None = None

    @property
    def tokenizer_revision(self) -> str | None:
        """The revision of `tokenizer`."""
        return self.revision if self.tokenizer == self.base else self.adapter_revision

    def adapter_config(self) -> dict[str, Any]:
        """What the adapter's adapter_config.json says; empty without an adapter."""
        if self.adapter is None:
            return {}
        return read_adapter_config(self.adapter, self.adapter_revision) or {}

    def stored(self) -> Stored | None:
        """How the base's files hold their weights where that is in few bits; None for whole numbers."""
        return read_stored(self.base, self.revision)

    @property
    def changes_base(self) -> bool:
        """Whether its adapter, switched off, leaves something else than the base."""
        return changes_base(self.adapter_config())

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self.adapter or self.base


def find_policy(settings: ModelSettings) -> ModelSource:
    """The model to tune: a base, or a base with the adapter that training continues."""
    source = find_model("--model_name_or_path", settings.model_name_or_path, settings.model_revision)
    if settings.model_revision is not None and os.path.isdir(source.name):
        raise UserError(
            f"--model_revision {settings.model_revision}: {source.name} is a folder, which has no revisions"
        )
    if settings.adapter_name_or_path is None:
        return source
    if source.adapter is not None:
        raise UserError(
            f"--adapter_name_or_path {settings.adapter_name_or_path}: {source.adapter} is an adapter already; "
            "name its base with --model_name_or_path, or leave one of the two out"
        )
    flag, adapter = "--adapter_name_or_path", _absolute_if_local(settings.adapter_name_or_path)
    _check_place(flag, adapter, ADAPTER_CONFIG)
    if os.path.isdir(adapter):
        _check_saved(flag, Path(adapter))
    config = read_adapter_config(adapter)
    if config is None:
        if not os.path.isdir(adapter):
            _check_hub_model(flag, adapter, None, ADAPTER_CONFIG)
        raise UserError(
            f"{flag} {adapter}: no {ADAPTER_CONFIG} there, so it is not an adapter; "
            "name a folder that holds one, or leave the flag out"
        )
    _check_adapter(flag, adapter, None, config)
    return ModelSource(source.base, adapter, source.revision, adapter if _has_tokenizer(adapter) else source.tokenizer)


def check_early(settings: Settings) -> None:
    """`check_places`, for a verb that uses a model; that of a run is looked at once its record is read."""
    name = settings.model.model_name_or_path
    if name is None or not (Path(_absolute_if_local(name)) / RECORD).is_file():
        check_places(settings.model)


def check_places(settings: ModelSettings) -> None:
    """What can be said of the folders that are named for a model without a look at what lies in them.

    Raises:
        UserError: a folder is not there, or holds no model.
    """
    named = [
        ("--model_name_or_path", settings.model_name_or_path, "config.json"),
        ("--adapter_name_or_path", settings.adapter_name_or_path, ADAPTER_CONFIG),
    ]
    if settings.named_reference is not None:
        named.append((*settings.named_reference, "config.json"))
    gather(*(partial(_check_folder, flag, name, config) for flag, name, config in named if name is not None))


def _check_folder(flag: str, name: str, config: str) -> None:
    name = _absolute_if_local(name)
    _check_place(flag, name, config)
    if os.path.isdir(name) and not any((Path(name) / file).is_file() for file in (ADAPTER_CONFIG, config)):
        _check_model(flag, name, None)


def check_unchanged(place: str, source: ModelSource, recorded: Mapping[str, Any], names: Iterable[str]) -> None:
    """Compares a model with what the record of a run holds of it, under the first of some names that it has.

    Args:
        place: where it is named, to begin a message with.
        recorded: `identify_model` of the models of a run, by name.

    Raises:
        UserError: its weights are others.
    """
    from .identity import identify_model

    known = next((recorded[name] for name in names if recorded.get(name)), None)
    if known is None:  # in the record of an earlier version
        return
    now = identify_model(source)
    if known.get("weights") != now["weights"]:
        raise UserError(
            f"{place}, {source.name}, has different weights than when the run began; restore the original ones"
        )
    if known.get("config") != now["config"]:
        say(f"note: {place}, {source.name}: its config.json has changed since the run began")


def read_identities(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the record of a run holds of the models it began from: `model`, `base` under an adapter, `reference`."""
    return record.get("identity") or {}


def _check_same_base(flag: str, adapter: str, base: str, revision: str | None) -> None:
    """Compares the base of an adapter with the one that its run trained it on, where there is a record of that."""
    folder = Path(adapter)
    record = read_record(find_run_folder(folder), whole=True)
    place = f"{flag} {adapter}: its base"
    check_unchanged(place, ModelSource(base, None, revision, base), read_identities(record), ("base", "model"))


def _check_saved(flag: str, folder: Path) -> None:
    """Compares the files of a finished model with the sizes and hashes in the record of its run, and those of a
    checkpoint with its manifest.

    Raises:
        UserError: weights or vocabulary are not as the run saved them.
    """
    if CHECKPOINT.fullmatch(folder.name) and (folder / MANIFEST).is_file():
        fault = find_fault(folder, reads=is_of_model)
        if fault is not None:
            raise UserError(f"{flag} {folder}: a damaged checkpoint: {fault}; name a complete one")
    files = read_record(folder, whole=True).get("files") or {}
    try:
        saved = {str(name): (int(size), str(sha256)) for name, (size, sha256) in files.items()}
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{flag} {folder}: files in its {RECORD} cannot be read; fix or remove it") from None
    changed = find_changed(folder, saved)
    damaged = [fault for name, fault in changed.items() if MUST_BE_SAVED.fullmatch(name)]
    if damaged:
        raise UserError(
            f"{flag} {folder}: not the model that its run saved: {', '.join(damaged)}; copy it back, or make it again "
            "from a checkpoint"
        )
    for fault in changed.values():
        say(f"note: {folder.name}: {fault}")
    for name in ADDED if saved else ():
        if name not in saved and (folder / name).is_file():
            say(f"note: {folder.name}: {name} was not saved by its run, but is loaded")


def find_model(flag: str, name: str, revision: str | None = None) -> ModelSource:
    """The model that `flag` names: a folder or a hub name, of a whole model or of an adapter.

    Raises:
        UserError: it does not exist, has no weights, only pickled ones, or no tokenizer; an adapter's base is gone; or
            it reaches out of its folder (see strangers.py).
    """
    name = _absolute_if_local(name)
    _check_place(flag, name, "config.json")
    if os.path.isdir(name):
        _check_saved(flag, Path(name))
    adapter_config = read_adapter_config(name, revision)
    if adapter_config is not None:
        _check_adapter(flag, name, revision, adapter_config)
        base, base_revision = _base_of_adapter(flag, name, adapter_config)
        _check_base(flag, name, base, base_revision)
        _check_same_base(flag, name, base, base_revision)
        tokenizer = name if _has_tokenizer(name, revision) else base
        _check_tokenizer(flag, tokenizer)
        return ModelSource(base, name, base_revision, tokenizer, revision)
    _check_model(flag, name, revision)
    _check_tokenizer(flag, name)
    return ModelSource(name, None, revision, name)


def check_source(place: str, source: ModelSource) -> None:
    """Looks at a model that a record names as `find_model` does at one that a flag names.

    Args:
        place: where it is named, to begin a message with.

    Raises:
        UserError: as for `find_model`.
    """
    _check_place(place, source.base, "config.json")
    _check_model(place, source.base, source.revision)
    if source.adapter is not None:
        _check_place(place, source.adapter, ADAPTER_CONFIG)
        config = read_adapter_config(source.adapter, source.adapter_revision)
        if config is None:
            raise UserError(f"{place} {source.adapter}: no {ADAPTER_CONFIG} there, so it is not an adapter")
        _check_adapter(place, source.adapter, source.adapter_revision, config)
    if source.tokenizer not in (source.base, source.adapter):
        _check_place(place, source.tokenizer, "a tokenizer")
        check_folder(place, source.tokenizer, source.tokenizer_revision)
    _check_tokenizer(place, source.tokenizer)


def read_end_ids(base: str, revision: str | None, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a reply, by the tokenizer and the model's generation config."""
    config = read_json_file(base, "generation_config.json", revision) or {}
    named = config.get("eos_token_id")
    ids = named if isinstance(named, list) else [named]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if isinstance(i, int) and 0 <= i < len(tokenizer))


def _check_place(flag: str, name: str, config: str) -> None:
    if os.path.isfile(name):
        raise UserError(f"{flag} {name}: a file; name the folder that holds {config} and the weights")
    if looks_local(name) and not os.path.isdir(name):
        raise UserError(f"{flag} {name}: no such folder; check the path")
    if os.path.isdir(name) and SET_ASIDE.fullmatch(Path(name).name):
        raise UserError(f"{flag} {name}: a checkpoint that was found damaged and renamed; name a complete one")


def _check_base(flag: str, name: str, base: str, revision: str | None) -> None:
    """The base of an adapter; what is wrong with it is said of the adapter, which is what was named."""
    if read_adapter_config(base, revision) and not read_json_file(base, "config.json", revision):
        raise UserError(
            f"{flag} {name}: an adapter for {base}, which is an adapter itself; merge that one first, and name the "
            f"merged model as base_model_name_or_path in the {ADAPTER_CONFIG} of {name}"
        )
    try:
        _check_model(flag, base, revision)
    except UserError as error:
        faults = (fault.removeprefix(f"{flag} {base}") for fault in error.faults)
        raise UserError(*(f"{flag} {name}: its base model {base}{fault}" for fault in faults)) from None


def _check_model(flag: str, name: str, revision: str | None) -> None:
    if not os.path.isdir(name):
        _check_hub_model(flag, name, revision)
        check_folder(flag, name, revision)
        return
    if not (Path(name) / "config.json").is_file():
        raise UserError(f"{flag} {name}: no config.json there, so it is not a model folder; name one that has it")
    if any((Path(name) / file).is_file() for file in WEIGHT_FILES):
        check_folder(flag, name, revision)
        return
    if any((Path(name) / file).is_file() for file in PICKLED_FILES):
        raise UserError(
            f"{flag} {name}: only pickled weights (.bin), which {PICKLED}; "
            "convert them to safetensors with transformers' save_pretrained"
        )
    raise UserError(f"{flag} {name}: no weights there (model.safetensors); save or copy them into it")


def _check_hub_model(flag: str, name: str, revision: str | None, config: str = "config.json") -> None:
    """Asks for the config of a hub model or adapter; what can go wrong is told in one line."""
    from transformers.utils import cached_file

    try:
        found = cached_file(name, config, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {name}: {_hub_fault(error, config)}") from None
    if found is None:
        raise UserError(f"{flag} {name}: {_without_config(config)}")


def _without_config(config: str) -> str:
    kind = "an adapter" if config == ADAPTER_CONFIG else "a model"
    return f"the hub repository has no {config}, so it is not {kind}; check the name"


def _hub_fault(error: BaseException, config: str = "config.json") -> str:
    """One line of advice for an error of the hub's client, found by the kinds of error that led to it."""
    kinds, seen = [], error
    while seen is not None:
        kinds.append(type(seen).__name__)
        seen = seen.__cause__ or seen.__context__
    if "GatedRepoError" in kinds:
        return "a gated model; accept its terms on its hub page, then log in with `hf auth login`"
    if "RevisionNotFoundError" in kinds:
        return "the hub has no such revision; see --model_revision"
    if "RepositoryNotFoundError" in kinds:
        return "no such folder, and no such model on the hub (a private one needs `hf auth login`)"
    # For a file that the repository lacks, transformers raises an error of its own, with none behind it.
    if kinds == ["OSError"] or "EntryNotFoundError" in kinds or "RemoteEntryNotFoundError" in kinds:
        return _without_config(config)
    if "HFValidationError" in kinds:
        return "no such folder, and not a possible hub name (owner/name)"
    return (
        "no such folder here, not in the local hub cache, and the hub cannot be reached; name a local folder or connect"
    )


def _base_of_adapter(flag: str, name: str, config: dict[str, Any]) -> tuple[str, str | None]:
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{flag} {name}: its {ADAPTER_CONFIG} names no base model (base_model_name_or_path)")
    if looks_local(base) and not os.path.isdir(expanduser(base)):
        beside = Path(name) / base
        if not beside.is_dir():
            raise UserError(
                f"{flag} {name}: an adapter for {base}, which is no longer there; "
                "move it back, or fix base_model_name_or_path in its adapter_config.json"
            )
        base = str(beside)
    revision = config.get("revision")
    if revision is not None and not isinstance(revision, str):
        raise UserError(f"{flag} {name}: revision in its {ADAPTER_CONFIG} is {revision!r:.80}: must be text or null")
    return _absolute_if_local(base), revision


def _check_adapter(flag: str, name: str, revision: str | None, config: dict[str, Any]) -> None:
    """An adapter's weights must be safetensors, here or on the hub: PEFT would load a pickle where there are none."""
    check_adapter_config(flag, name, config)
    check_start(flag, name, config)
    check_folder(flag, name, revision)  # its tokenizer's files, and those of a whole model beside it
    if os.path.isdir(name):
        found = (Path(name) / "adapter_model.safetensors").is_file()
        pickled = (Path(name) / "adapter_model.bin").is_file()
    else:
        found = find_hub_file(name, "adapter_model.safetensors", revision) is not None
        pickled = not found and find_hub_file(name, "adapter_model.bin", revision) is not None
    if not found and pickled:
        raise UserError(
            f"{flag} {name}: only pickled weights (adapter_model.bin), which {PICKLED}; "
            "convert them to safetensors with PEFT's save_pretrained"
        )
    if not found and os.path.isdir(name):
        raise UserError(
            f"{flag} {name}: an adapter without weights (adapter_model.safetensors); save or copy them into it"
        )


def _check_tokenizer(flag: str, name: str) -> None:
    if os.path.isdir(name) and not _has_tokenizer(name):
        raise UserError(f"{flag} {name}: no tokenizer there (tokenizer.json or alike); copy the base model's into it")


def _has_tokenizer(name: str, revision: str | None = None) -> bool:
    if os.path.isdir(name):
        return any((Path(name) / file).is_file() for file in TOKENIZER_FILES)
    return any(find_hub_file(name, file, revision) for file in TOKENIZER_FILES[:2])


def looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~", "\\")) or "\\" in name or (len(name) > 1 and name[1] == ":")


def _absolute_if_local(name: str) -> str:
    path = Path(expanduser(name))
    return str(path.resolve()) if os.path.exists(path) or looks_local(name) else name
