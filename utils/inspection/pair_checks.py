"""Checks of the pairs themselves: rows without a pair, copies, contradictions, labels that look wrong, broken text.

Each returns a list of findings, empty where there is nothing to say.
"""

from __future__ import annotations

import numpy as np

from ..data.places import SHOWN
from ..data.ranking import LEFT_OUT
from .findings import EXAMPLES, NOTE, PROBLEM, Finding, excerpts, find_pairs, with_example
from .scanning import Scan
from .similarity import ALIKE, group_alike
from .subject import Subject, read_scores
from .texts import FORMS, STAINS

ANSWER_WORDS = 10  # from which a response counts as an answer


def check_bad_rows(subject: Subject) -> list[Finding]:
    """Lines that hold no row, and rows that hold no pair: `train` stops at them or skips them, or, where they are
    good rows that make no pair (ties and their like), leaves them out in any case."""
    findings = []
    for reason, count in subject.unreadable.items():
        lines = [part.source.unreadable[reason] for part in subject.sources if reason in part.source.unreadable]
        places = [place for one in lines for place in one.places][:SHOWN]
        detail = next((one.detail for one in lines if one.detail), "")
        title = f"a line that cannot be read: {reason}{f' (the first: {detail})' if detail else ''}"
        findings.append(Finding("unreadable", PROBLEM, title, "Fix or remove them.", count, places))
    reasons = dict.fromkeys(reason for part in subject.parts for reason in part.bad)
    for reason in reasons:
        places, examples, count = [], [], 0
        for part in subject.parts:
            positions = part.bad.get(reason, np.zeros(0, dtype=int))
            count += len(positions)
            for position in positions[:SHOWN]:
                row = part.rows[int(position)]
                places.append(part.place(row["row"]))
                examples.append({"place": places[-1]} | excerpts(row))
        severity, kind = (NOTE, "left_out") if reason in LEFT_OUT else (PROBLEM, _kind(reason))
        advice = {
            NOTE: "train leaves them out and counts them; nothing to do.",
            PROBLEM: "Fix or remove them; train skips fewer than 1%, and more with --on_bad_rows skip.",
        }[severity]
        title = f"no pair in the row: {reason}"
        findings.append(
            Finding(kind, severity, title, advice, count, places[:SHOWN], examples[:EXAMPLES], {"reason": reason})
        )
    return findings


def check_sources(subject: Subject) -> list[Finding]:
    """Content that is not read, and rows whose own column calls them held out."""
    return [
        Finding(remark.name, PROBLEM, remark.title, remark.advice, remark.rows)
        for part in subject.sources
        for remark in part.reading.remarks
    ]


def _kind(reason: str) -> str:
    if " equals " in reason:
        return "identical"
    return "empty" if reason.endswith(("is empty", "is missing")) else "unreadable"


def check_copies(subject: Subject, scan: Scan) -> list[Finding]:
    """The same pair again; the same pair with its sides exchanged; pairs that are nearly the same as an earlier one."""
    splits = subject.in_training_split.astype(np.uint64)
    _, first, groups = np.unique(scan.pair_keys ^ splits, return_index=True, return_inverse=True)
    firsts = first[groups]
    copied = firsts != np.arange(len(scan))
    elsewhere = copied & (subject.source_of != subject.source_of[firsts])
    _, sides = np.unique(scan.sides_keys ^ splits, return_inverse=True)
    orders = np.zeros(sides.max() + 1 if len(sides) else 0, dtype=np.int64)
    np.add.at(orders, sides[~copied], 1)
    both_ways = np.flatnonzero(orders[sides] > 1)
    like = group_alike(scan.pair_signatures)
    alike = (like != np.arange(len(scan))) & ~copied & (splits == splits[like])
    alike[both_ways] = False
    repeated = find_pairs(
        subject, "repeated", PROBLEM, "a duplicate of a pair in an earlier source (ignoring whitespace)",
        "train keeps both, so they count twice; --output_file keeps the first.",
        np.flatnonzero(elsewhere),
    )  # fmt: skip
    return [
        *find_pairs(
            subject, "duplicate", PROBLEM, "a duplicate of an earlier pair (ignoring whitespace)",
            "A duplicate counts twice, and may be both held out and trained on; --output_file keeps the first.",
            np.flatnonzero(copied & ~elsewhere),
        ),
        *(_show_first(finding, subject, firsts) for finding in repeated),
        *find_pairs(
            subject, "both_ways", PROBLEM, "contradictory labels: the same pair with both preferences",
            "They cancel out, and one of the two labels is wrong; --output_file leaves out both.",
            both_ways,
        ),
        *find_pairs(
            subject, "near_duplicate", NOTE,
            f"a near-duplicate of an earlier pair (about {ALIKE:.0%} of their word trigrams)",
            "They add little; --remove near_duplicates leaves them out.",
            np.flatnonzero(alike),
        ),
    ]  # fmt: skip


def _show_first(finding: Finding, subject: Subject, firsts: np.ndarray) -> Finding:
    for number in range(len(finding.examples)):
        place = subject.find_place(int(firsts[finding.pairs[number]]))
        finding = with_example(finding, number, **{"also at": place})
    return finding


def check_labels(subject: Subject, scan: Scan) -> list[Finding]:
    """Labels that scores contradict or leave open, and sides that look exchanged by what they say."""
    return [*_check_scores(subject), *_check_swapped(subject, scan)]


def _check_scores(subject: Subject) -> list[Finding]:
    findings = []
    for columns, chosen, rejected in read_scores(subject):
        findings += [
            *find_pairs(
                subject, "score_contradiction", PROBLEM, f"the rejected side scores higher ({columns})",
                "Either the label or the score is wrong; --remove score_contradictions leaves them out.",
                np.flatnonzero(chosen < rejected), columns=columns,
            ),
            *find_pairs(
                subject, "tie", PROBLEM, f"the same score on both sides ({columns})",
                "Which side is chosen is then arbitrary; --remove ties leaves them out.",
                np.flatnonzero(chosen == rejected), columns=columns,
            ),
        ]  # fmt: skip
    return findings


def _check_swapped(subject: Subject, scan: Scan) -> list[Finding]:
    declines = {
        side: (bits >> np.uint16(list(FORMS).index("refusal"))) & np.uint16(1) > 0 for side, bits in scan.forms.items()
    }
    blank = (scan.forms["chosen"] >> np.uint16(list(FORMS).index("blank"))) & np.uint16(1) > 0
    answers = ~declines["rejected"] & (scan.words["rejected"] >= ANSWER_WORDS)
    return [
        *find_pairs(
            subject, "swapped_looking", NOTE,
            f"possibly swapped: chosen refuses or is empty (N/A, I don't know), rejected answers in {ANSWER_WORDS} "
            "words or more",
            "Correct where refusing is the goal; otherwise check them.",
            np.flatnonzero(answers & (declines["chosen"] | blank)),
            declines=int((answers & declines["chosen"]).sum()), blank=int((answers & blank).sum()),
        ),
        *find_pairs(
            subject, "nearly_equal", NOTE, "the sides differ only in case, whitespace or punctuation",
            "They teach only formatting.",
            np.flatnonzero(scan.nearly_equal),
        ),
    ]  # fmt: skip


def check_ends(subject: Subject, scan: Scan) -> list[Finding]:
    """Where prompt and replies meet: replies that say the prompt again, prompts that have an answer already."""
    return [
        *find_pairs(
            subject, "repeats_prompt", NOTE, "a reply starts with the whole prompt",
            "Prompt and reply are trained on one after the other, so the prompt would be there twice; remove it "
            "of the replies, unless it is meant.",
            np.flatnonzero(scan.repeats_prompt),
        ),
        *find_pairs(
            subject, "answered_prompt", NOTE, "the prompt ends with an answer (a turn of the assistant, or the reply)",
            "The replies then continue it; if they should replace it, remove it from the prompt.",
            np.flatnonzero(scan.answered_prompt),
        ),
    ]  # fmt: skip


STAIN_WORDS = {
    "control": (PROBLEM, "control characters", "A model would learn to write them."),
    "encoding": (PROBLEM, "mojibake, as from a wrong decoding (\ufffd, Ã©, â€™)",
                 "Decode the source again, as UTF-8."),
    "html": (NOTE, "HTML tags or entities outside of code", "Convert them to text, unless intended."),
}  # fmt: skip


def check_stains(subject: Subject, scan: Scan) -> list[Finding]:
    """Characters and markup that are hardly meant."""
    findings = []
    for position, name in enumerate(STAINS):
        severity, title, advice = STAIN_WORDS[name]
        if severity == PROBLEM:
            advice += " --remove broken_text leaves them out."
        stained = np.flatnonzero((scan.stains >> np.uint16(position)) & np.uint16(1))
        findings += find_pairs(subject, name, severity, title, advice, stained)
    return findings
