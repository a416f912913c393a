"""The few held-out rows that the report shows with their texts: those that came out best and worst."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..engine.counted import plain_ids

WORST, BEST = 5, 3
LONGEST_TEXT = 4000  # characters


def choose_examples(
    rows: Sequence[dict[str, Any]], held_out: Dataset, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The pairs with the smallest and the largest margin (of sft: the rows with the largest loss per token), with the
    texts that the model was given.

    Args:
        rows: one per held-out row, in the order of `held_out`: place and metrics.
    """
    if not rows:
        return []
    if "margin" in rows[0]:
        order = sorted(range(len(rows)), key=lambda index: rows[index]["margin"])
        names: tuple[str, ...] = ("id", "place", "margin", "chosen_reward", "rejected_reward")
    else:
        order = sorted(range(len(rows)), key=lambda index: rows[index]["logps"] / rows[index]["tokens"])
        names = ("id", "place", "logps", "tokens")
    worst = order[:WORST]
    best = [index for index in order[: -BEST - 1 : -1] if index not in worst]
    return [
        {"kind": kind, **{name: rows[index][name] for name in names}, **_texts(held_out[index], tokenizer)}
        for kind, chosen in (("worst", worst), ("best", best if "margin" in rows[0] else []))
        for index in chosen
    ]


def _texts(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    texts = {
        name.removesuffix("_ids"): tokenizer.decode(plain_ids(ids))
        for name, ids in row.items()
        if name.endswith("_ids")
    }
    return {
        name: text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ... ({len(text):,} characters)"
        for name, text in texts.items()
    }
