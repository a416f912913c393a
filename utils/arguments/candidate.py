"""Settings whose values were read one by one, as the checks of them all together see them."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..run.names import ADAPTER_CONFIG
from ..settings.training import Settings


@dataclass(frozen=True)
class Candidate:
    """Settings whose values were read one by one, not yet known to fit together.

    `labels` says how the person wrote each given name; `broken` are names whose value could not be read.
    """

    settings: Settings
    labels: Mapping[str, str]
    broken: frozenset[str]
    adapter_found: bool | None = None  # whether the model is known to carry an adapter

    @cached_property
    def values(self) -> dict[str, Any]:
        return self.settings.flat()

    def __getitem__(self, name: str) -> Any:
        return self.values.get(name)

    def label(self, name: str) -> str:
        return self.labels.get(name, f"--{name}")

    def given(self, *names: str) -> list[str]:
        """Those of the names that the person set to something; None asks for the default."""
        return [name for name in names if name in self.settings.given and self[name] is not None]

    @property
    def has_adapter(self) -> bool:
        """Whether training is known to continue an adapter, be it on its own or as the model."""
        if self.adapter_found is not None:
            return self.adapter_found
        folder = os.path.expanduser(self["model_name_or_path"] or "")
        return self["adapter_name_or_path"] is not None or os.path.isfile(os.path.join(folder, ADAPTER_CONFIG))

    @property
    def may_have_adapter(self) -> bool:
        """The same, or not known yet: what a hub repository holds shows later."""
        name = self["model_name_or_path"] or ""
        unknown = self.adapter_found is None and "/" in name and not os.path.isdir(os.path.expanduser(name))
        return self.has_adapter or unknown


@dataclass(frozen=True)
class Check:
    """Yields a fault for each thing that is wrong with the settings as a whole. It is left out where one of the
    settings that it rests on could not be read, so that one mistake is reported once."""

    faults: Callable[[Candidate], Iterator[str]]
    rests_on: tuple[str, ...]

    def __call__(self, candidate: Candidate) -> Iterator[str]:
        return self.faults(candidate)


def check(*rests_on: str) -> Callable[[Callable[[Candidate], Iterator[str]]], Check]:
    """Makes a check of a function that yields faults."""
    return lambda faults: Check(faults, rests_on)
