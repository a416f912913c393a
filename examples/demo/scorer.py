"""The true sentiment of a demo review, from the words that the grammar knows: no model, no guessing.

    score(prompt, completion) -> float in [-1, 1]; above 0 is positive, 0 says nothing either way

Works sentence by sentence on any text: adjectives and phrases of `lexicon.json` count by strength, degrees raise or
lower them, negations turn them ("not bad" is mildly good), and what stands against a "but" or an "although" counts
less than what it gives way to. A sentence with no known word counts nothing. This file needs nothing but its lexicon.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

LEXICON = json.loads(Path(__file__).with_name("lexicon.json").read_text(encoding="utf-8"))

STRENGTHS = {"+2": 0.9, "+1": 0.5, "-1": -0.5, "-2": -0.9}
MORE, LESS = 1.2, 0.7
FLIPPED = -0.6  # "not brilliant" is milder than "dull"
OPPOSITE = -0.9  # "anything but dull"
CONCEDED = 0.25  # weight of "the room was small" in "although the room was small, we slept well"
ASIDE = 0.35  # weight of a whole sentence that only qualifies the others: "Still, the room was small."
REACH_WORDS = 4  # "not a very good" negates "good"; a negation further back does not
DEGREE_WORDS = 2


def score(prompt: str, completion: str) -> float:
    """The sentiment of the completion, from -1 (bad) to 1 (good). The prompt is neutral and does not count."""
    total = weights = 0.0
    for sentence in _sentences(completion):
        if value := score_sentence(sentence):
            weight = ASIDE if ASIDES.search(sentence) else 1.0
            total, weights = total + weight * value, weights + weight
    return total / weights if weights else 0.0


def is_positive(prompt: str, completion: str) -> bool:
    """Whether the completion is, on the whole, a good review."""
    return score(prompt, completion) > 0


def score_sentence(sentence: str) -> float:
    """The sentiment of one sentence, from -1 to 1."""
    total = 0.0
    for clause, weight in _clauses(sentence):
        values = _opinions(_mark(clause))
        if values:
            total += weight * sum(values) / len(values)
    return max(-1.0, min(1.0, total))


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+|\n+", text.strip()) if part]


def _clauses(sentence: str) -> list[tuple[str, float]]:
    """The clauses with their weights: 1, or CONCEDED for those that the sentence gives way on."""
    sentence = re.sub(r"\banything but\b", "far from", sentence.lower())
    sentence = re.sub(r"\bnothing but\b", "", sentence)
    conceded, claimed = "", sentence
    turn = re.search(r"\b(?:but|yet)\b", sentence)
    although = re.search(r"\b(?:although|though|despite|in spite of)\b", sentence)
    if turn:
        conceded, claimed = sentence[: turn.start()], sentence[turn.end() :]
    elif although and (comma := sentence.find(",", although.end())) >= 0:
        conceded = sentence[although.end() : comma]
        claimed = sentence[: although.start()] + sentence[comma:]
    elif although:
        conceded, claimed = sentence[although.end() :], sentence[: although.start()]
    parts = [(part, CONCEDED) for part in conceded.split(",")] + [(part, 1.0) for part in claimed.split(",")]
    return _balanced([(part, weight) for part, weight in parts if part.strip()])


def _balanced(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Weights such that the opinions of equal standing are averaged, whichever commas stand between them."""
    telling = [weight for part, weight in parts if _opinions(_mark(part))]
    return [(part, weight / max(1, telling.count(weight))) for part, weight in parts]


def _mark(clause: str) -> list[str | float]:
    """The clause as a list of words in which every opinion is a number and every known phrase one item."""

    def value(match: re.Match[str]) -> str:
        return f" {VALUES[match.group(0)]} "

    clause = re.sub(r"[^a-z0-9' -]", " ", clause)
    clause = RATING.sub(lambda match: f" {_rating(*match.groups())} ", clause)
    clause = KNOWN.sub(value, IDIOMS.sub(" ", clause))
    clause = DEGREES.sub(lambda match: " " + match.group(0).replace(" ", "_") + " ", clause)
    clause = NEGATORS.sub(lambda match: " " + match.group(0).replace(" ", "_") + " ", clause)
    return [float(word) if re.fullmatch(r"-?\d\.\d+", word) else word for word in clause.split()]


def _opinions(words: list[str | float]) -> list[float]:
    """The values of the opinions among the words, after degrees and negations."""
    values = []
    for position, word in enumerate(words):
        if not isinstance(word, float):
            continue
        before = words[max(0, position - REACH_WORDS) : position]
        while any(isinstance(item, float) for item in before):  # a negation reaches the next opinion only
            before = before[1:]
        degree = next((DEGREE[item] for item in reversed(before[-DEGREE_WORDS:]) if item in DEGREE), 1.0)
        turn = next((NEGATOR[item] for item in reversed(before) if item in NEGATOR), 1.0)
        values.append(max(-1.0, min(1.0, word * degree)) * turn)
    return values


def _rating(points: str, out_of: str) -> str:
    middle = (NUMBERS.index(out_of) + 1) / 2
    return f"{(NUMBERS.index(points) - middle) / middle:.3f}"


def _split(text: str) -> list[str]:
    return text.split(", ")


def _any_of(phrases: list[str]) -> re.Pattern[str]:
    """A pattern for whole phrases, the longest first."""
    ordered = sorted(set(phrases), key=len, reverse=True)
    return re.compile(r"(?<![\w'-])(?:" + "|".join(map(re.escape, ordered)) + r")(?![\w'-])")


def _read_values() -> dict[str, str]:
    groups = [*LEXICON["adjectives"].values(), LEXICON["cues"]]
    return {
        word: f"{STRENGTHS[strength]:.3f}"
        for group in groups
        for strength, words in group.items()
        for word in _split(words)
    }


ASIDES = re.compile(r"^(?:Still,|Only\b)|, however\b")
NUMBERS = _split(LEXICON["numbers"])
VALUES = _read_values()
KNOWN = _any_of(list(VALUES))
IDIOMS = _any_of(_split(LEXICON["idioms"]))
RATING = re.compile(rf"\b({'|'.join(NUMBERS)}) (?:points |stars )?out of (five|ten)\b")
NEGATOR = {word.replace(" ", "_"): FLIPPED for word in _split(LEXICON["negators"]["flip"])}
NEGATOR |= {word.replace(" ", "_"): OPPOSITE for word in _split(LEXICON["negators"]["opposite"])}
NEGATORS = _any_of([word.replace("_", " ") for word in NEGATOR])
DEGREE = {word.replace(" ", "_"): MORE for word in _split(LEXICON["degrees"]["more"])}
DEGREE |= {word.replace(" ", "_"): LESS for word in _split(LEXICON["degrees"]["less"])}
DEGREES = _any_of([word.replace("_", " ") for word in DEGREE])
