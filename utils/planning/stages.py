"""The verb `plan`: what a run of these settings would need, what fits, how long it takes."""

from __future__ import annotations

import dataclasses

from ..arguments import command_line
from ..errors import gather
from ..settings.registry import acts_as
from ..settings.training import Settings
from ..settings.verbs import PlanSettings
from ..training.stages import run_training
from .measuring import as_measured, read_measurement
from .planning import choose_device, make_plan
from .publishing import publish
from .work import read_subject


def plan(settings: Settings) -> None:
    """Settings -> summary, JSON, a command that is ready to be typed."""
    run = dataclasses.replace(settings, verb=acts_as(settings.verb))
    (device, dtype), subject = gather(lambda: choose_device(run), lambda: read_subject(run))
    measures = settings.of(PlanSettings).measure
    measured = read_measurement(run_training(as_measured(run, subject))) if measures else None
    made = make_plan(run, device, dtype, subject, measured)
    words = command_line(made.settings) if made.settings is not None else None
    publish(made, settings, words)
