"""What single values cannot show, for the verb `evaluate`."""

from __future__ import annotations

from collections.abc import Iterator

from ..settings.verbs import READ_WITH
from .candidate import Candidate, Check


def required_model(candidate: Candidate) -> Iterator[str]:
    if candidate["model_name_or_path"] is None and "model_name_or_path" not in candidate.broken:
        yield "--model_name_or_path is missing: name the folder of a run, or any model (with --ref_model_name_or_path)"


def pairs_of_ones_own(candidate: Candidate) -> Iterator[str]:
    if candidate["dataset_name"] is not None:
        return
    for name in candidate.given(*READ_WITH):
        yield (
            f"{candidate.label(name)}: says how --dataset_name is read; add it, or leave this out to evaluate the "
            "run's own held-out pairs"
        )


EVALUATION_CHECKS: dict[Check, tuple[str, ...]] = {required_model: (), pairs_of_ones_own: ("dataset_name",)}
