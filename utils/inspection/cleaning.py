"""Which pairs are worth training on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.call_faults import CALL_FAULTS
from .findings import Finding
from .subject import Subject

ALWAYS = ("duplicate", "repeated", "both_ways")
REMOVES = {
    "ties": ("tie",),
    "score_contradictions": ("score_contradiction",),
    "near_duplicates": ("near_duplicate",),
    "broken_text": ("control", "encoding"),
    "bad_calls": tuple(CALL_FAULTS),
    "held_out_prompts": ("held_out_prompt",),
    "overlap": ("overlap", "near_overlap"),
    "too_long": ("too_long", "equal_when_cut", "equal_as_tokens", "template_refuses", "template_loses"),
}


def choose_clean(
    subject: Subject, findings: Sequence[Finding], remove: Sequence[str]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Positions of the training splits' pairs that stay, and how many were left out for what (the first reason each).

    The held-out split of a source that has its own is not written.
    """
    names = [*ALWAYS, *(name for wish in remove for name in REMOVES[wish])]
    keep = subject.in_training_split
    removed: dict[str, int] = {}
    for part in subject.sources:
        for reason, count in part.dropped.items():
            removed[reason] = removed.get(reason, 0) + count
    for name in names:
        for finding in (finding for finding in findings if finding.name == name):
            before = int(keep.sum())
            keep[finding.leave_out] = False
            removed[name] = removed.get(name, 0) + before - int(keep.sum())
    return np.flatnonzero(keep), removed
