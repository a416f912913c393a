"""A finding: what is wrong, or worth knowing, with how many pairs, and where the first of them stand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data.places import SHOWN
from ..data.turns import show_value
from .subject import Subject

PROBLEM, NOTE = "problem", "note"
EXAMPLES = 3
EXCERPT = 400  # characters of a text that an example shows


@dataclass(frozen=True)
class Finding:
    """`title` says what was found, to be read after the count; `advice` what follows from it.

    `pairs` are positions among the good pairs, all that are concerned; `leave_out` those of them that cleaning removes.
    """

    name: str
    severity: str
    title: str
    advice: str
    count: int
    places: list[str] = field(default_factory=list)
    examples: list[dict[str, str]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    pairs: np.ndarray | None = None
    leave_out: np.ndarray | None = None

    def as_record(self) -> dict[str, Any]:
        """The finding for JSON: all but the positions."""
        names = ("name", "severity", "count", "title", "advice", "details", "places", "examples")
        return {name: getattr(self, name) for name in names}


def find_pairs(
    subject: Subject,
    name: str,
    severity: str,
    title: str,
    advice: str,
    pairs: np.ndarray,
    leave_out: np.ndarray | None = None,
    **details: Any,
) -> list[Finding]:
    """The finding about good pairs at these positions; none when there are no such pairs."""
    pairs = np.asarray(pairs)
    if len(pairs) == 0:
        return []
    return [
        Finding(
            name,
            severity,
            title,
            advice,
            len(pairs),
            [subject.find_place(int(pair)) for pair in pairs[:SHOWN]],
            [show_pair(subject, int(pair)) for pair in pairs[:EXAMPLES]],
            details,
            pairs,
            pairs if leave_out is None else leave_out,
        )
    ]


def show_pair(subject: Subject, pair: int) -> dict[str, str]:
    """A pair for people: where it stands and the beginnings of its texts."""
    return {"place": subject.find_place(pair)} | excerpts(subject.pairs[pair])


def excerpts(row: dict[str, Any]) -> dict[str, str]:
    """The beginnings of a row's texts; a prompt's end, which the responses answer to."""
    shown = {}
    for name in ("prompt", "chosen", "rejected"):
        if row.get(name) is None:
            continue
        text = show_value(row[name])
        cut = text[-EXCERPT:] if name == "prompt" else text[:EXCERPT]
        dots = "" if len(cut) == len(text) else "…"
        shown[name] = dots + cut if name == "prompt" else cut + dots
    return shown


def with_example(finding: Finding, number: int, **texts: str) -> Finding:
    """The finding with more said in one of its examples."""
    examples = [dict(example) for example in finding.examples]
    examples[number] |= texts
    return dataclasses.replace(finding, examples=examples)


def count_problems(findings: Iterable[Finding]) -> int:
    """How many findings are problems."""
    return sum(finding.severity == PROBLEM for finding in findings)
