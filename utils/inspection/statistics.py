"""What is in the pairs: sizes, lengths, languages, and how far shallow rules get at telling chosen from rejected."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow.compute as pc

from .findings import NOTE, Finding
from .languages import LANGUAGES
from .scanning import SIDES, Scan
from .subject import Subject
from .texts import FORMS

BINS = 24
SHOWN_STARTS = 12
FEWEST_UNLIKE = 100  # pairs that a rule must decide before it is worth a note
STRONG = 0.65  # share right from which a shallow rule is worth a note


def count_pairs(subject: Subject, scan: Scan) -> dict[str, Any]:
    """Rows, pairs, prompts and turns."""
    _, per_prompt = np.unique(scan.prompt_keys, return_counts=True)
    return {
        "rows": sum(len(part.rows) for part in subject.parts) + subject.unreadable.total(),
        "good_pairs": len(scan),
        "train_pairs": int(subject.trained.sum()),
        "held_out_pairs": int(subject.held_out.sum()),
        "set_aside_pairs": int((~subject.trained & ~subject.held_out).sum()),
        "split": subject.split,
        "distinct_prompts": len(per_prompt),
        "most_pairs_per_prompt": int(per_prompt.max(initial=0)),
        "pairs_with_several_turns": int((scan.turns > 1).sum()),
        "mean_turns_in_prompt": float(scan.turns.mean()) if len(scan) else 0.0,
    }


def count_sources(subject: Subject, scan: Scan) -> list[dict[str, Any]]:
    """What each source brings.

    `good_pairs` are its usable ones in both splits, `drawn` those in use. `repeated`: pairs drawn from its training
    split that a source before it has in its own, spacing apart.
    """
    source_of, training = subject.source_of, subject.in_training_split
    counts = []
    for number, origin in enumerate(subject.sources):
        parts = [part for part in subject.parts if part.wish == origin.wish]
        own = source_of == number
        before = np.isin(scan.pair_keys[own & training], scan.pair_keys[(source_of < number) & training])
        bad = sum((part.dropped for part in parts), Counter())
        counts.append(
            {
                "name": origin.wish.written,
                "reading": origin.reading.description,
                "rows": sum(len(part.rows) for part in parts) + sum(origin.source.dropped.values()),
                "good_pairs": sum(part.found for part in parts),
                "drawn": int(own.sum()),
                "train_pairs": int((own & subject.trained).sum()),
                "held_out_pairs": int((own & subject.held_out).sum()),
                "repeated": int(before.sum()),
                "bad_rows": dict(bad + Counter(origin.source.dropped)),
            }
        )
    return counts


def describe_lengths(scan: Scan) -> dict[str, Any]:
    """Characters and words of each side: mean, quantiles, and a histogram with bins that the sides share.

    Where replies have reasoning, characters are counted without it too.
    """
    values = {unit: {side: getattr(scan, unit)[side] for side in SIDES} for unit in ("characters", "words")}
    if _has_reasoning(scan):
        values["characters_without_reasoning"] = {side: _answer(scan, side) for side in SIDES}
    return {unit: summarize_sides(sides) for unit, sides in values.items()}


def _has_reasoning(scan: Scan) -> bool:
    return any(characters.any() for characters in scan.reasoning.values())


def _answer(scan: Scan, side: str) -> np.ndarray:
    """Characters of a side without reasoning."""
    return scan.characters[side] - scan.reasoning.get(side, 0)


def summarize_sides(values: dict[str, np.ndarray]) -> dict[str, Any]:
    """Mean, quantiles and a histogram per side; the bins widen by a constant factor and are the same for all sides."""
    largest = max(int(side.max(initial=1)) for side in values.values())
    edges = np.unique(np.rint(np.geomspace(1, largest + 1, BINS + 1)).astype(int))
    if len(edges) < 2:
        edges = np.array([1, 2])
    return {
        "edges": edges.tolist(),
        **{
            side: {
                "mean": float(numbers.mean()),
                "median": float(np.median(numbers)),
                "p95": float(np.quantile(numbers, 0.95)),
                "max": int(numbers.max()),
                "counts": np.histogram(np.clip(numbers, 1, None), edges)[0].tolist(),
            }
            for side, numbers in values.items()
        },
    }


def count_languages(scan: Scan) -> dict[str, dict[str, int]]:
    """Language -> pairs, commonest first, by the prompt and by the chosen response."""
    return {
        side: {
            LANGUAGES[number]: int(count)
            for number, count in sorted(zip(*np.unique(numbers, return_counts=True), strict=True), key=lambda x: -x[1])
        }
        for side, numbers in scan.languages.items()
    }


def measure_rules(scan: Scan) -> list[dict[str, Any]]:
    """How far a rule gets that looks at one trait of the two responses and knows nothing of the prompt.

    `unlike`: pairs whose sides differ in the trait, which the rule decides; `right`: how many of those have it on the
    chosen side; `accuracy`: over all pairs, the rest at random.
    """
    lengths = {
        "longer": ("is longer", scan.characters["chosen"] - scan.characters["rejected"]),
    }
    if _has_reasoning(scan):
        difference = _answer(scan, "chosen") - _answer(scan, "rejected")
        lengths["longer_answer"] = ("is longer without its reasoning", difference)
    forms = {
        name: (said, _bit(scan.forms["chosen"], position) - _bit(scan.forms["rejected"], position))
        for position, (name, (said, _)) in enumerate(FORMS.items())
    }
    return [_measure(name, said, difference) for name, (said, difference) in (lengths | forms).items()]


def _bit(bits: np.ndarray, position: int) -> np.ndarray:
    return ((bits >> np.uint16(position)) & np.uint16(1)).astype(np.int8)


def _measure(name: str, said: str, difference: np.ndarray) -> dict[str, Any]:
    right, wrong, count = int((difference > 0).sum()), int((difference < 0).sum()), len(difference)
    return {
        "name": name,
        "rule": f"the one that {said}",
        "unlike": right + wrong,
        "right": right,
        "accuracy": (right + (count - right - wrong) / 2) / count,
    }


def count_starts(scan: Scan) -> list[dict[str, Any]]:
    """The first words that tell the sides apart most: how many chosen and how many rejected responses begin so."""
    counts: dict[str, list[int]] = {}
    for side, column in enumerate(("chosen", "rejected")):
        for item in pc.value_counts(scan.starts[column]).to_pylist():
            counts.setdefault(item["values"], [0, 0])[side] = item["counts"]
    ranked = sorted(
        ((words, pair) for words, pair in counts.items() if words),
        key=lambda item: (-abs(item[1][0] - item[1][1]) / max(sum(item[1]), 1) ** 0.5, item[0]),
    )
    return [{"words": words, "chosen": pair[0], "rejected": pair[1]} for words, pair in ranked[:SHOWN_STARTS]]


def check_rules(rules: list[dict[str, Any]], count: int) -> list[Finding]:
    """A note for each shallow rule that decides much and is right, or wrong, strikingly often."""
    findings = []
    for rule in rules:
        share = rule["right"] / rule["unlike"] if rule["unlike"] else 0.5
        if rule["unlike"] < max(FEWEST_UNLIKE, count / 20) or max(share, 1 - share) < STRONG:
            continue
        often = "chosen" if share > 0.5 else "rejected"
        rule_share = max(share, 1 - share)
        findings.append(
            Finding(
                f"shortcut_{rule['name']}",
                NOTE,
                f"a shortcut: {rule['rule']} is {often} in {rule_share:.0%} of the pairs that differ in it",
                "A model may learn it instead of quality; watch it when you compare models.",
                rule["unlike"],
                details=rule,
            )
        )
    return findings
