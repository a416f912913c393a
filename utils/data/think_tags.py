"""The tags that models write around their thoughts."""

from __future__ import annotations

import re


class Tags:
    """The tags around thoughts that go by one name; `more_open`, `more_close` are further spellings (no groups)."""

    def __init__(self, name: str, more_open: str = "", more_close: str = "") -> None:
        self.open = rf"(?:<\|?(?:\w+:)?{name}\|?>|<\|(?i:start|begin(?:_of)?)_{name}\|>{more_open})"
        self.close = rf"(?:<(?:/\|?|\|/)(?:\w+:)?{name}\|?>|<\|(?i:end(?:_of)?)_{name}\|>{more_close})"
        self.opening = re.compile(rf"\s*{self.open}")  # a text that begins with a think block
        self.anywhere = re.compile(self.open)
        self.closing = re.compile(self.close)
        self.closed = re.compile(rf"\s*{self.close}")  # what follows thoughts
        self.opened = re.compile(rf"{self.open}(\s*)\Z")  # a prompt that ends inside a think block
        self.empty_block = re.compile(rf"{self.open}\s*{self.close}\s*\Z")  # or with one without thoughts
        self.empty = re.compile(rf"{self.open}\s*{self.close}\s*")
        self.own_block = re.compile(rf"\s*{self.open}(?!\s*{self.close})")  # a text that begins with thoughts


# A reply may have tags of one kind behind a prompt that ends with the other's.
KINDS = (
    Tags("(?i:think(?:ing)?)", r"|\[THINK\]|\u25c1think\u25b7", r"|\[/THINK\]|\u25c1/think\u25b7"),
    Tags("(?i:thoughts?|reason(?:ing)?|reflection|scratchpad)"),
)
TAG = re.compile("|".join(f"{kind.open}|{kind.close}" for kind in KINDS))
BEGINNINGS = ("<", "[", "\u25c1")  # characters of which each tag has one, at its beginning
CLOSING = re.compile("|".join(kind.close for kind in KINDS))


def split_thoughts(text: str) -> tuple[str, str]:
    """The thoughts in tags that a text begins with, and the answer behind them. The opening tag may be in a prompt."""
    if not any(mark in text for mark in BEGINNINGS):
        return "", text
    closing = CLOSING.search(text)
    if closing is not None:
        return TAG.sub("", text[: closing.start()]).strip(), text[closing.end() :].lstrip()
    if any(tags.own_block.match(text) for tags in KINDS):
        return TAG.sub("", text).strip(), ""
    return "", text
