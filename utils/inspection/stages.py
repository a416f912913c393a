"""The verb `data`: what is in preference data and what is wrong with it, or, with --generate, new pairs."""

from __future__ import annotations

from ..settings.data import GenerationSettings, InspectionSettings
from ..settings.training import Settings


def look_at_data(settings: Settings) -> int:
    """Data -> summary, page, JSON, clean pairs; returns 3 where there are problems."""
    if settings.of(GenerationSettings).generate:
        return _make_pairs(settings)
    from .inspecting import inspect_data
    from .publishing import publish

    record = inspect_data(settings)
    publish(record, settings.of(InspectionSettings))
    return record["exit_code"]


def _make_pairs(settings: Settings) -> int:
    """Prompts -> responses of a model -> scores -> pairs."""
    from ..responses.making import make_pairs
    from ..runtime import quiet_loaded_libraries

    quiet_loaded_libraries()
    make_pairs(settings)
    return 0
