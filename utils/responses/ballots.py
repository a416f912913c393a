"""Votes on matches of two responses, on the disk as they are cast, and as preference rows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..run.writing import write_json_lines
from .scorers import Prompt

BALLOTS = "ballots.jsonl"  # every vote ever cast in the folder, to go on with
VOTES = "votes.jsonl"  # those with a winner, as preference rows


@dataclass(frozen=True)
class Match:
    """A prompt with the responses of both models."""

    prompt: Prompt
    a: str
    b: str
    told: Mapping[str, str] = field(default_factory=dict)  # what the prompt's template is given beside it (JSON texts)

    @property
    def key(self) -> str:
        """What the match is called on disk: the same for the same texts."""
        parts = [self.prompt, self.a, self.b, *([self.told] if self.told else [])]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def as_pair(self, outcome: float) -> dict[str, Any] | None:
        """A preference row of a match that A (1) or B (0) won; None without a winner, or with an empty response, of
        which nothing can be learnt."""
        if outcome == 0.5 or not (self.a.strip() and self.b.strip()):
            return None
        texts = (self.a, self.b) if outcome == 1 else (self.b, self.a)
        as_messages = ([{"role": "assistant", "content": text}] for text in texts)
        chosen, rejected = texts if isinstance(self.prompt, str) else as_messages
        return {"prompt": self.prompt, "chosen": chosen, "rejected": rejected, **self.told}


@dataclass(frozen=True)
class Ballot:
    """A vote on a match: 1 where A's response won, 0 where B's did, 0.5 for neither."""

    match: Match
    outcome: float
    both_bad: bool = False  # of those for neither

    def as_row(self) -> dict[str, Any]:
        """A line of ballots.jsonl."""
        more = {"both_bad": True} if self.both_bad else {}
        match = {name: value for name, value in dataclasses.asdict(self.match).items() if name != "told" or value}
        return {"outcome": self.outcome, **more, **match}


def read_ballots(folder: Path) -> dict[str, Ballot]:
    """The votes that were cast in a folder before, by the key of their match.

    Raises:
        UserError: its files of votes are none of this script.
    """
    path, advice = folder / BALLOTS, "move it away, or choose another --output_dir"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        if (folder / VOTES).exists():
            raise UserError(f"{folder / VOTES}: has no votes of this script (no {BALLOTS}); {advice}") from None
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {advice}") from None
    ballots = {}
    try:
        for row in (json.loads(line) for line in lines if line):
            match, outcome = Match(row["prompt"], row["a"], row["b"], dict(row.get("told", {}))), row["outcome"]
            match.as_pair(outcome)
            if outcome not in (0, 0.5, 1):
                raise ValueError(outcome)
            ballots[match.key] = Ballot(match, outcome, row.get("both_bad") is True)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: has no votes of this script; {advice}") from None
    return ballots


class Ballots:
    """The votes of one comparison: which matches are shown in which order, on which side, and how they were judged.

    Outcomes are 1 where A's response won, 0 where B's did, 0.5 for neither. Matches of equal responses are not shown.
    Votes that were cast in the folder on other matches (another seed, another model) are kept.
    """

    def __init__(self, matches: Sequence[Match], folder: Path, seed: int) -> None:
        self._folder = folder
        draw = random.Random(f"votes {seed}")
        self._matches = {match.key: match for match in matches}
        self.shown = [key for key, match in self._matches.items() if match.a.strip() != match.b.strip()]
        draw.shuffle(self.shown)
        self._a_is_left = {key: draw.random() < 0.5 for key in self.shown}
        self._cast = read_ballots(folder)

    @property
    def outcomes(self) -> dict[str, float]:
        """How each match was judged that was, by its key."""
        voted = {key: self._cast[key].outcome for key in self.shown if key in self._cast}
        return {key: 0.5 for key in self._matches if key not in self._a_is_left} | voted

    @property
    def both_bad(self) -> int:
        """How many matches were judged to have two bad responses."""
        return sum(key in self._cast and self._cast[key].both_bad for key in self.shown)

    def waiting(self) -> list[int]:
        """The places of matches without a vote."""
        return [place for place, key in enumerate(self.shown) if key not in self._cast]

    def sides(self, place: int) -> tuple[Match, str, str]:
        """The match at a place with its left and its right response."""
        key = self.shown[place]
        match = self._matches[key]
        return (match, match.a, match.b) if self._a_is_left[key] else (match, match.b, match.a)

    def choice(self, place: int) -> str | None:
        """How the match was judged."""
        key = self.shown[place]
        if key not in self._cast:
            return None
        outcome = self._cast[key].outcome
        if outcome == 0.5:
            return "bad" if self._cast[key].both_bad else "tie"
        return "left" if (outcome == 1) == self._a_is_left[key] else "right"

    def vote(self, key: str, choice: str) -> None:
        """Has a vote on the disk, then counts it.

        Raises:
            KeyError: there is no such match or choice.
            OSError: the files cannot be written.
        """
        left = self._a_is_left[key]
        outcome = {"left": float(left), "right": float(not left), "tie": 0.5, "bad": 0.5}[choice]
        cast = self._cast | {key: Ballot(self._matches[key], outcome, choice == "bad")}
        write_json_lines(self._folder / BALLOTS, [ballot.as_row() for ballot in cast.values()])
        self._cast = cast
        pairs = [ballot.match.as_pair(ballot.outcome) for ballot in cast.values()]
        write_json_lines(self._folder / VOTES, [pair for pair in pairs if pair is not None])
