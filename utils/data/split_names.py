"""Which of the splits that a source has is trained on, and which is held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ..errors import UserError
from ..settings.data import DataSettings
from .files import FileRows

TRAIN_NAMES = {"train": ("train", "train_prefs"), "sft": ("train", "train_sft", "train_prefs")}
HELD_OUT_NAMES = ("test", "validation", "val", "eval", "dev", "test_prefs")

ReadSplit = Callable[[], FileRows]
Split = TypeVar("Split")  # what reads one: a ReadSplit, or a stream


@dataclass(frozen=True)
class Collection(Generic[Split]):
    """The splits that a source has, each read when asked for. `aliases` are further names that are understood."""

    splits: Mapping[str, Split]
    aliases: Mapping[str, Split] = field(default_factory=dict)

    def find(self, name: str) -> Split | None:
        """What reads the split of that name; None where there is none."""
        return self.splits.get(name) or self.aliases.get(name)


def held_out_wish(validation_split: str | None) -> float | str | None:
    """What --validation_split asks for: None (not given), "none", a fraction, or the name of a split.

    Raises UserError for a number that is no fraction.
    """
    if validation_split is None:
        return None
    if validation_split.strip().lower() == "none":
        return "none"
    try:
        fraction = float(validation_split)
    except ValueError:
        return validation_split
    if not 0 < fraction < 1:
        raise UserError(
            f"--validation_split is {validation_split}: "
            "must be a fraction above 0 and below 1, the name of a split, or none"
        )
    return fraction


def training_split(settings: DataSettings, verb: str, collection: Collection[Any]) -> str:
    """The split to train on: the one asked for, else one of that name, else the only one."""
    names = list(collection.splits)
    asked = settings.dataset_split
    if asked is not None:
        if collection.find(asked) is None:
            raise UserError(_missing_split("--dataset_split", asked, names, settings.dataset_name))
        return asked
    for name in TRAIN_NAMES.get(verb, TRAIN_NAMES["train"]):
        if name in names:
            return name
    if len(names) == 1:
        return names[0]
    raise UserError(
        f"--dataset_split is missing: {settings.dataset_name} has no train split; it has: {', '.join(names)}"
    )


def _missing_split(flag: str, asked: str, names: list[str], source: str) -> str:
    if "[" in asked:
        return f"{flag} {asked}: slices are not supported; name a split ({', '.join(names)}) and use --max_samples"
    return f"{flag} {asked}: no such split in {source}; it has: {', '.join(names)}"


def held_out_split(settings: DataSettings, train: str, collection: Collection[Any]) -> str | None:
    """The split to hold out: the one asked for, or by default one that is made for it."""
    wish = held_out_wish(settings.validation_split)
    names = list(collection.splits)
    if wish is None:
        like_train = [train.replace("train", word) for word in ("test", "validation", "eval") if "train" in train]
        return next((n for n in (*like_train, *HELD_OUT_NAMES) if n in names and n != train), None)
    if isinstance(wish, float) or wish == "none":
        return None
    if wish == train:
        raise UserError(
            f"--validation_split {wish}: is the training split of {settings.dataset_name} too; "
            "name another, a fraction, or none"
        )
    if collection.find(wish) is None:
        raise UserError(_missing_split("--validation_split", wish, names, settings.dataset_name))
    return wish
