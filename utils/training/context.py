"""One run: what was asked for, what was found, and where it goes; handed from stage to stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data.loading import PreferenceData
from ..models.sources import ModelSource
from ..run.record import RunRecord, read_record
from ..runtime import Precision
from ..settings.training import Settings
from .progress import Stopwatch
from .rows import Rows


@dataclass(frozen=True)
class Run:
    """A run, from when its rows are read.

    `folder` is None where nothing is left behind: in a dry run, and where a trainer only scores. `checkpoint` is what a
    resumed run goes on from.
    """

    settings: Settings
    precision: Precision
    source: ModelSource
    data: PreferenceData
    rows: Rows
    folder: Path | None = None
    checkpoint: Path | None = None
    record: RunRecord = field(default_factory=lambda: RunRecord({}))
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def learns_pairs(self) -> bool:
        """Whether pairs are trained on, as against single responses."""
        return self.settings.verb == "train"

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained, a new one or one that training continues."""
        return self.settings.lora.use_lora or self.source.adapter is not None

    @cached_property
    def former(self) -> Mapping[str, Any]:
        """The record that the folder held before, where --resume_from_checkpoint is given; else empty."""
        if self.folder is None or self.settings.run.resume_from_checkpoint is None:
            return {}
        return read_record(self.folder)
