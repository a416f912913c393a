"""Pairs that a model can learn, and how they come to a file."""

from __future__ import annotations

import json
import random
from pathlib import Path

PLACES = ["cafe", "hotel", "museum", "garden", "station", "library", "market", "harbour"]
GOOD = ["lovely", "bright", "friendly", "quiet", "warm"]
BAD = ["awful", "gloomy", "rude", "noisy", "cold"]


def make_pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs with distinct prompts, completions of unequal lengths, and a preference that a model can learn."""
    draw = random.Random(seed)
    pairs = []
    for index in range(count):
        good, bad = (" ".join(draw.choices(words, k=draw.randint(1, 5))) for words in (GOOD, BAD))
        prompt = f"On day {index} we went to the {draw.choice(PLACES)} and it was"
        pairs.append({"prompt": prompt, "chosen": f" {good}.", "rejected": f" {bad}."})
    return pairs


def write_lines(path: Path, rows: list[dict]) -> Path:
    """The rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
