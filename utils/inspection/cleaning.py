"""The pairs that are worth training on, in the explicit-prompt form that any trainer reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..errors import UserError
from ..run.writing import replacing
from .findings import Finding
from .subject import Subject

ALWAYS = ("duplicate", "repeated", "both_ways")
REMOVES = {
    "ties": ("tie",),
    "score_contradictions": ("score_contradiction",),
    "near_duplicates": ("near_duplicate",),
    "broken_text": ("control", "encoding"),
    "held_out_prompts": ("held_out_prompt",),
    "overlap": ("overlap", "near_overlap"),
    "too_long": ("too_long", "equal_when_cut", "equal_as_tokens", "template_refuses", "template_loses"),
}
COLUMNS = ("prompt", "chosen", "rejected", "tools", "score_chosen", "score_rejected", "source")


def choose_clean(subject: Subject, findings: Sequence[Finding], remove: Sequence[str]) -> tuple[np.ndarray, dict]:
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


def write_pairs(path: Path, pairs: datasets.Dataset) -> None:
    """Writes `prompt`, `chosen`, `rejected` (`tools`, `source`) as JSON lines or Parquet, by the ending, in one step.

    Raises:
        UserError: the file cannot be written.
    """
    rows = pairs.select_columns([name for name in COLUMNS if name in pairs.column_names])
    try:
        with replacing(path) as beside:
            if path.suffix.lower() == ".parquet":
                rows.to_parquet(beside)
                return
            with open(beside, "w", encoding="utf-8") as file:
                for batch in rows.iter(1000):
                    for values in zip(*batch.values(), strict=True):
                        file.write(json.dumps(_without_null(dict(zip(batch, values, strict=True))), ensure_ascii=False))
                        file.write("\n")
    except OSError as error:
        raise UserError(f"--output_file {path}: cannot be written ({error.strerror})") from None


def _without_null(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}
