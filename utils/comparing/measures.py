"""What is counted in a comparison: wins with their interval, and how the responses of each model read."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..inspection.texts import refuses
from ..responses.generation import Continuation

Z = 1.959964  # of a 95% interval
REPEATED_WORDS = 4
# Scripts that are written without spaces: each character counts as a word.
UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


def count_outcomes(outcomes: Sequence[float | None]) -> dict[str, Any]:
    """Wins, ties, losses and the win rate with its 95% interval; ties count half, None is not judged.

    The interval is Wilson's, over prompts. Ties have less variance than the wins and losses that it allows for, so
    with them it is wider than it need be, never narrower.
    """
    judged = [outcome for outcome in outcomes if outcome is not None]
    counts = {"wins": judged.count(1), "ties": judged.count(0.5), "losses": judged.count(0)}
    rate = sum(judged) / len(judged) if judged else None
    return {
        **counts,
        "judged": len(judged),
        "not_judged": len(outcomes) - len(judged),
        "win_rate": rate,
        "interval": wilson_interval(rate, len(judged)) if rate is not None else None,
    }


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share of so many."""
    middle = share + Z**2 / (2 * count)
    reach = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    scale = 1 + Z**2 / count
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def find_words(text: str) -> list[str]:
    """The words of a text, in small letters and without punctuation."""
    return WORD.findall(text.casefold())


def describe_responses(written: Sequence[Continuation]) -> dict[str, Any]:
    """Lengths, endings, repetition, variety and refusals of a model's responses."""
    words = [find_words(row.text) for row in written]
    tokens = [len(row.ids) for row in written]
    repeated = [share for share in map(share_repeated, words) if share is not None]
    return {
        "responses": len(written),
        "mean_tokens": statistics.fmean(tokens),
        "median_tokens": statistics.median(tokens),
        "mean_words": statistics.fmean(map(len, words)),
        "ended": statistics.fmean(row.ended for row in written),
        "empty": statistics.fmean(not row.text.strip() for row in written),
        "repeated": statistics.fmean(repeated) if repeated else None,
        "distinct_1": share_distinct(words, 1),
        "distinct_2": share_distinct(words, 2),
        "refusals": statistics.fmean(refuses(row.text) for row in written),
    }


def share_repeated(words: Sequence[str]) -> float | None:
    """The share of a text's runs of four words that stood in it before; None for a text of fewer words."""
    runs = list(_runs(words, REPEATED_WORDS))
    return 1 - len(set(runs)) / len(runs) if runs else None


def share_distinct(texts: Iterable[Sequence[str]], length: int) -> float | None:
    """The share of different ones among all runs of so many words in all texts together; None without any."""
    runs = [run for words in texts for run in _runs(words, length)]
    return len(set(runs)) / len(runs) if runs else None


def _runs(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[place : place + length]) for place in range(len(words) - length + 1))
