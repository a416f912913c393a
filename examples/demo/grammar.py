"""A grammar of short reviews: a neutral opening, then sentences whose sentiment is decided only after it.

    rng = random.Random(7)
    review = write_review(rng)  # Review(prompt="We tried the bakery on ...", completion=" The bread ...", sentiment=1)

Words and sentence patterns are data, in `lexicon.json` (shared with the scorer) and `templates.json`. In the patterns
`|` separates alternatives, `{name}` is filled in, `^` asks for a capital; of a noun, `*` says plural, `+` a person.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
LEXICON = json.loads((HERE / "lexicon.json").read_text(encoding="utf-8"))
TEMPLATES = json.loads((HERE / "templates.json").read_text(encoding="utf-8"))
DOMAINS = tuple(TEMPLATES["domains"])

POSITIVE, NEUTRAL, NEGATIVE = 1, 0, -1
HELD_OUT_SHARE = 20  # one prompt in twenty
NEGATED_SHARE = 0.15  # of the adjectives: "not bad" for good
MAX_SENTENCES = 4  # after the opening

NOT_BAD = ("not {}", "not at all {}", "never {}", "anything but {}", "far from {}", "not in the least {}")
NOT_GOOD = ("not {}", "not very {}", "hardly {}", "not particularly {}", "anything but {}", "far from {}")
MILD_DEGREES = {
    POSITIVE: ("very", "really", "remarkably", "quite", "truly"),
    NEGATIVE: ("very", "really", "rather", "a bit", "extremely"),
}
STRONG_DEGREES = ("absolutely", "simply", "truly", "really")
RATINGS = {POSITIVE: ("eight", "nine", "ten"), NEGATIVE: ("one", "two", "three")}


@dataclass(frozen=True)
class Review:
    """`prompt` is neutral and ends with a full stop; `completion` starts with a space; `sentiment` is 1, 0 or -1."""

    prompt: str
    completion: str
    sentiment: int

    @property
    def text(self) -> str:
        """The whole review."""
        return self.prompt + self.completion


@dataclass
class Draft:
    """What one review has settled on: its domain, the person it is about, and the words it has used up."""

    rng: random.Random
    domain: str
    person: str
    strong: float  # chance of a strong adjective: some reviewers are cool, others glow
    used: set[str] = field(default_factory=set)

    def pick(self, options: tuple[str, ...]) -> str:
        """An option that this review has not used yet, where there is one."""
        fresh = [option for option in options if option not in self.used]
        choice = self.rng.choice(fresh or options)
        self.used.add(choice)
        return choice

    def fill(self, pattern: str, values: Mapping[str, str] | None = None) -> str:
        """The pattern with its slots filled, from `values` first, and a capital at its start."""

        def replace(match: re.Match[str]) -> str:
            name, capital = match.group(1), match.group(2)
            word = (values or {}).get(name) or (self.person if name == "name" else self.pick(_slot(name)))
            return _capitalise(word) if capital else word

        return _capitalise(re.sub(r"\{(\w+)(\^?)\}", replace, pattern))


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the pool that nothing is ever trained on; a property of its text alone."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_SHARE == 0


def write_prompt(rng: random.Random, domain: str | None = None) -> str:
    """A neutral opening sentence."""
    return _open(rng, domain)[1]


def write_review(rng: random.Random, sentiment: int | None = None, domain: str | None = None) -> Review:
    """A review; positive or negative with equal chance unless `sentiment` says which (or NEUTRAL)."""
    draft, prompt = _open(rng, domain)
    if sentiment is None:
        sentiment = rng.choice((POSITIVE, NEGATIVE))
    sentences = _opinions(draft, sentiment) if sentiment else []
    facts = rng.choice((1, 2, 3)) if sentiment == NEUTRAL else rng.choices((0, 1, 2), (65, 30, 5))[0]
    for _ in range(min(facts, MAX_SENTENCES - len(sentences))):
        fact = draft.fill(draft.pick(_options(TEMPLATES["domains"][draft.domain]["neutral"])))
        sentences.insert(rng.choice((0, 0, len(sentences) // 2)), fact)
    return Review(prompt, "".join(f" {sentence}" for sentence in sentences), sentiment)


def _open(rng: random.Random, domain: str | None) -> tuple[Draft, str]:
    domain = domain or rng.choice(DOMAINS)
    draft = Draft(rng, domain, rng.choice(_slot("name")), strong=rng.choice((0.1, 0.35, 0.7)))
    return draft, draft.fill(rng.choice(_options(TEMPLATES["domains"][domain]["openings"])))


def _opinions(draft: Draft, sentiment: int) -> list[str]:
    """One to three sentences of the given sentiment, perhaps one mild word against it, perhaps a verdict."""
    rng = draft.rng
    sentences = [_opinion(draft, sentiment) for _ in range(rng.choices((1, 2, 3), (15, 55, 30))[0])]
    if len(sentences) > 1 and rng.random() < 0.1:
        sentences.insert(rng.randrange(1, len(sentences)), _aspect_sentence(draft, sentiment, "against"))
    if len(sentences) < MAX_SENTENCES and rng.random() < 0.5:
        sentences.append(_verdict(draft, sentiment))
    return sentences


def _opinion(draft: Draft, sentiment: int) -> str:
    kind = draft.rng.choices(("plain", "double", "contrast", "feeling", "fixed"), (42, 20, 8, 6, 24))[0]
    if kind == "feeling":
        pattern = draft.pick(_options(TEMPLATES["frames"]["feeling"]))
        return draft.fill(pattern, {"feeling": _adjective(draft, "feeling", sentiment, negate=0)})
    if kind == "fixed":
        return draft.fill(draft.pick(_options(TEMPLATES["domains"][draft.domain][_side(sentiment)])))
    return _aspect_sentence(draft, sentiment, kind)


def _verdict(draft: Draft, sentiment: int) -> str:
    values = {
        "rating": draft.rng.choice(RATINGS[sentiment]),
        "strong": draft.pick(_words("general", 2 * sentiment)),
    }
    return draft.fill(draft.pick(_options(TEMPLATES["verdicts"][_side(sentiment)])), values)


def _aspect_sentence(draft: Draft, sentiment: int, kind: str) -> str:
    """A sentence about one aspect or two, from the frames of that kind."""
    group, noun = _aspect(draft)
    other_group, other_noun = _aspect(draft)
    patterns = _options(TEMPLATES["frames"][kind])
    if noun.endswith("+"):  # "as for the waiter, it was": no pronoun fits every person
        patterns = tuple(pattern for pattern in patterns if "{they}" not in pattern)
    pattern = draft.pick(patterns)
    np2_group = other_group if "{np2}" in pattern else group
    values = {
        **_noun_slots(draft, noun, "np", "was"),
        **_noun_slots(draft, other_noun, "np2", "was2"),
        **_noun_slots(draft, other_noun, "onp", "owas"),
        "they": "they" if noun.endswith("*") else "it",
        "were": "were" if noun.endswith("*") else "was",
        "adj": _adjective(draft, group, sentiment, negate=0 if "{adj} and" in pattern else NEGATED_SHARE),
        "adj2": draft.pick(_words(np2_group, sentiment)),
        "plain": draft.pick(_words(group, sentiment)),
        "gen": draft.pick(_words("general", sentiment)),
        "opp": draft.pick(_words(other_group, -sentiment)),
        "opp2": draft.pick(_words(group, -sentiment)),
    }
    return draft.fill(pattern, values)


def _aspect(draft: Draft) -> tuple[str, str]:
    """An aspect of the domain: the group of its adjectives and its noun with marks."""
    aspects = TEMPLATES["domains"][draft.domain]["aspects"]
    groups = {noun: group for group, nouns in aspects.items() for noun in _words_of(nouns)}
    noun = draft.pick(tuple(groups))
    return groups[noun], noun


def _noun_slots(draft: Draft, noun: str, phrase: str, verb: str) -> dict[str, str]:
    bare = noun.rstrip("*+")
    text = draft.person if bare == "{name}" else re.sub(r"\{(\w+)\}", lambda m: draft.pick(_slot(m.group(1))), bare)
    return {phrase: text, verb: "were" if noun.endswith("*") else "was"}


def _adjective(draft: Draft, group: str, sentiment: int, negate: float = NEGATED_SHARE) -> str:
    """An adjective phrase: strong or mild, with a degree or without, or the negation of its opposite."""
    rng = draft.rng
    if rng.random() < negate:
        negation = rng.choice(NOT_BAD if sentiment == POSITIVE else NOT_GOOD)
        return negation.format(draft.pick(_words(group, -sentiment)))
    strong = rng.random() < draft.strong
    word = draft.pick(_words(group, (2 if strong else 1) * sentiment))
    if rng.random() < 0.65:
        return word
    return f"{rng.choice(STRONG_DEGREES if strong else MILD_DEGREES[sentiment])} {word}"


def _side(sentiment: int) -> str:
    return "positive" if sentiment == POSITIVE else "negative"


def _words(group: str, strength: int) -> tuple[str, ...]:
    return _words_of(LEXICON["adjectives"][group][f"{strength:+d}"])


def _slot(name: str) -> tuple[str, ...]:
    return _words_of(TEMPLATES["slots"][name])


def _words_of(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


def _options(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]
