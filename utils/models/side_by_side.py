"""Several models to use in turn. Those on the same base share its weights: one is held, the adapters are switched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel
from trl.trainer.utils import use_adapter

from ..runtime import Precision
from ..settings.training import ModelSettings
from .loading import load_frozen, put_adapter
from .sources import ModelSource


@dataclass(frozen=True)
class Wanted:
    """A model to load: where it is, the flag that named it, and whether its base is held in 4 bits."""

    flag: str
    source: ModelSource
    in_4bit: bool = False

    @property
    def base(self) -> tuple[str, str | None, bool, str | None]:
        """What it shares with another that has the same: its base, unless its adapter changes that."""
        own = self.source.adapter if self.source.changes_base else None
        return self.source.base, self.source.revision, self.in_4bit, own


@dataclass(frozen=True)
class Contender:
    """A model that may share its weights with others; `adapter` is the one it computes with, None without."""

    model: PreTrainedModel | PeftModel
    adapter: str | None

    @contextlib.contextmanager
    def active(self) -> Iterator[PreTrainedModel | PeftModel]:
        """The model, computing as this one within the context."""
        if not isinstance(self.model, PeftModel):
            yield self.model
            return
        with use_adapter(self.model, self.adapter):
            yield self.model


def load_side_by_side(
    wanted: Mapping[str, Wanted], settings: ModelSettings, precision: Precision
) -> dict[str, Contender]:
    """A contender per name, in evaluation mode, on the device, in the computing precision.

    Raises:
        UserError: one of them cannot be loaded.
    """
    held: dict[tuple[str, str | None, bool, str | None], PreTrainedModel | PeftModel] = {}
    contenders = {}
    # A base is loaded with its first adapter: put on later, an adapter would be one without a model to belong to.
    for name, wish in sorted(wanted.items(), key=lambda item: item[1].source.adapter is None):
        adapter = wish.source.adapter and f"adapter_{name}"
        if wish.base not in held:
            held[wish.base] = load_frozen(wish.flag, wish.source, settings, precision, wish.in_4bit, adapter)
        elif adapter is not None:
            put_adapter(held[wish.base], wish.source, adapter)
        contenders[name] = Contender(held[wish.base], adapter)
    for model in held.values():
        model.requires_grad_(False).eval()
    return {name: contenders[name] for name in wanted}
