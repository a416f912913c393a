"""Two texts that begin alike, as TRL's implicit prompt in plain texts: what both begin with is the prompt."""

from __future__ import annotations

import re
import unicodedata

# A mark of a turn, which no cut goes through: <|im_start|>, </s>, [INST], ### Response:, and those of transcripts.
MARK = re.compile(
    r"<\|[^<>\n]{1,40}?\|>|</?\w[^<>\n]{0,39}>|\[/?[A-Z_]{1,20}\]|^#{1,6} [^\n]{1,40}?:|\n\n(?:Human|Assistant):",
    re.MULTILINE,
)
NEAR = 64  # characters around a cut in which a mark would begin and end
OWN_WORD = "\u2e80"  # from here on (CJK, kana) a character is a word of its own: no spaces part them


def find_prompt(one: str, other: str) -> str:
    """What both texts begin with, up to a whole word; a space in front of the next word belongs to the replies."""
    end = _count_common(one, other)
    while end and any(_cuts_word(text, end) for text in (one, other)):
        end -= 1
    for text in (one, other):
        marks = MARK.finditer(text, max(0, end - NEAR), end + NEAR)
        end = next((mark.start() for mark in marks if mark.start() < end < mark.end()), end)
    return one[:end].removesuffix(" ") if one[:end].strip() else ""


def _count_common(one: str, other: str) -> int:
    """Characters that both texts begin with, by halves: texts may be long."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _cuts_word(text: str, end: int) -> bool:
    if end >= len(text):
        return False
    before, behind = text[end - 1], text[end]
    if unicodedata.combining(behind):
        return True
    return before.isalnum() and behind.isalnum() and max(before, behind) < OWN_WORD
