"""Texts with nothing wrong with them, and what the verb `data` found in some."""

from __future__ import annotations

import random

from utils.data.places import list_places

WORDS = [a + b for a in ("ba", "ce", "di", "fo", "gu", "la", "me", "ni") for b in ("ron", "sel", "tam", "vik", "wod")]


def make_texts(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs with nothing wrong with them, and nothing in common."""
    draw = random.Random(seed)

    def say(length: int) -> str:
        return " ".join(draw.choices(WORDS, k=length)).capitalize() + "."

    return [{"prompt": say(12), "chosen": say(14), "rejected": say(14)} for _ in range(count)]


def counts_of(record: dict) -> dict[str, int]:
    return {finding["name"]: finding["count"] for finding in record["findings"]}


def places_of(record: dict, name: str) -> str:
    finding = next(finding for finding in record["findings"] if finding["name"] == name)
    return list_places(finding["places"], finding["count"])
