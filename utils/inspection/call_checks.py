"""Checks of conversations with tools and reasoning: calls, their results, and thoughts."""

from __future__ import annotations

import numpy as np

from ..data.call_faults import CALL_FAULTS
from .findings import NOTE, PROBLEM, Finding, find_pairs
from .scanning import Scan
from .subject import Subject

SIDES = ("chosen", "rejected")
ADVICE = {
    "unreadable_call": "A model would learn to write calls that no program can run; correct them.",
    "undeclared_tool": "A model would learn to call what is not there; declare the tool, or correct the call.",
    "missing_argument": "A model would learn calls that fail; correct them, or the tool's list of required arguments.",
    "result_without_call": "Add the call before it, or remove it; ids of call and result must be the same.",
    "call_without_result": "Add the result behind it, or end the conversation with the call.",
    "open_think": "A model would learn not to end its reasoning; close the tag, or remove the reasoning.",
}


def check_calls(subject: Subject, scan: Scan) -> list[Finding]:
    """Faults of calls, results and reasoning. Those of a rejected reply alone may be why it is the rejected one."""
    findings = []
    for number, (name, title) in enumerate(CALL_FAULTS.items()):
        concerned, of_rejected = (
            np.flatnonzero((scan.call_faults >> np.uint16(number + shift)) & np.uint16(1))
            for shift in (0, len(CALL_FAULTS))
        )
        findings += [
            *find_pairs(
                subject, name, PROBLEM, title, f"{ADVICE[name]} --remove bad_calls leaves them out.", concerned,
            ),
            *find_pairs(
                subject, f"rejected_{name}", NOTE, f"{title}, in the rejected reply alone",
                "Right where that is what it is rejected for; else correct it.", of_rejected,
            ),
        ]  # fmt: skip
    reasons = {side: characters > 0 for side, characters in scan.reasoning.items()}
    chosen_alone, rejected_alone = (reasons[side] & ~reasons[other] for side, other in (SIDES, SIDES[::-1]))
    return [
        *findings,
        *find_pairs(
            subject, "one_sided_reasoning", NOTE, "reasoning on one side only",
            "A model may learn whether to reason in place of what is better; give both sides reasoning, or neither.",
            np.flatnonzero(chosen_alone | rejected_alone),
            chosen=int(chosen_alone.sum()), rejected=int(rejected_alone.sum()),
        ),
        *find_pairs(
            subject, "calls_without_tools", NOTE, "tool calls in a row that declares no tools",
            "The chat template is given none: a model learns to call what it was not told of; add them as 'tools'.",
            np.flatnonzero(scan.calls_without_tools),
        ),
        *find_pairs(
            subject, "tools_twice", NOTE, "a system text that lists the tools which the row declares as well",
            "The chat template writes them once more; take them out of the system text, or leave the column out.",
            np.flatnonzero(scan.tools_twice),
        ),
    ]  # fmt: skip
