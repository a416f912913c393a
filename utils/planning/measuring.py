"""Two real steps on the longest pairs: what a plan is corrected by."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..runtime import peak_memory_bytes
from ..settings.training import Settings
from ..training.context import Run
from .work import Subject, place_of_reference


@dataclass(frozen=True)
class Measured:
    """Bytes at the peak (of the process on a CPU, of tensors on a GPU), and seconds of an optimizer step."""

    peak: int
    step_seconds: float


def as_measured(settings: Settings, subject: Subject) -> Settings:
    """The settings of a dry run that computes what the run would compute in each step.

    Its two steps on the longest pairs would not decide where the reference is as the whole run does: they are told.
    """
    training = settings.training
    if settings.verb == "train":
        place = place_of_reference(settings, settings.lora.use_lora or subject.adapts, subject.work)
        training = dataclasses.replace(training, precompute_ref_log_probs=place == "ahead")
    run = dataclasses.replace(settings.run, dry_run=True, resume_from_checkpoint=None, report_to=(), use_wandb=False)
    return dataclasses.replace(settings, training=training, run=run)


def read_measurement(run: Run) -> Measured:
    """What the two steps of a dry run took."""
    return Measured(peak_memory_bytes(run.precision.device), run.stopwatch.seconds / 2)
