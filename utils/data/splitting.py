"""Training and held-out rows, so that no prompt is in both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import datasets
import numpy as np
from sklearn.model_selection import GroupShuffleSplit

from utils.data.sources import held_out_wish
from utils.errors import UserError

DEFAULT_FRACTION = 0.1
DEFAULT_MOST_ROWS = 1000
ATTEMPTS = 8
CLOSE_ENOUGH = 0.1  # of the wished number of rows

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Split:
    """`shared_prompts`: how many held-out prompts also occur in training; 0 unless the held-out split was given."""

    train: datasets.Dataset
    held_out: datasets.Dataset | None
    shared_prompts: int


def split_rows(
    rows: datasets.Dataset, held_out_rows: datasets.Dataset | None, validation_split: str | None, seed: int
) -> Split:
    """Hold out what --validation_split asks for: nothing, the split `held_out_rows`, or a share of the rows.

    A share is drawn by prompt, so that no prompt is on both sides; both sides keep the order of the rows.

    Raises UserError when there are too few rows or prompts to hold any out.
    """
    wish = held_out_wish(validation_split)
    if wish == "none":
        return Split(rows, None, 0)
    if held_out_rows is not None and not isinstance(wish, float):
        return Split(rows, held_out_rows, count_shared(_prompts(rows), _prompts(held_out_rows)))
    if isinstance(wish, str):
        raise UserError(f"--validation_split {wish}: the data has no such split")
    groups = number_groups(_prompts(rows))
    if len(rows) < 2 or groups.max() == 0:
        what = "1 row" if len(rows) == 1 else f"{len(rows)} rows that share one prompt"
        raise UserError(f"nothing can be held out of {what}: add data, or pass --validation_split none")
    wished = round(wish * len(rows)) if wish else min(DEFAULT_MOST_ROWS, round(DEFAULT_FRACTION * len(rows)))
    train, held_out = divide(groups, max(1, wished), seed)
    return Split(rows.select(train), rows.select(held_out), 0)


def _prompts(rows: datasets.Dataset) -> Iterator[Prompt]:
    """The prompt of each row; of a text without one (for sft) the text, of which two copies must not be parted."""
    columns = ["prompt"] + (["completion"] if "completion" in rows.column_names else [])
    for batch in rows.select_columns(columns).iter(batch_size=1000):
        for prompt, text in zip(batch["prompt"], batch.get("completion", batch["prompt"]), strict=True):
            yield prompt or text


def number_groups(prompts: Iterable[Prompt]) -> np.ndarray:
    """The group of each prompt: 0, 1, 2, ... in the order in which the groups first occur."""
    numbers: dict[bytes, int] = {}
    keys = (blake2b(group_key(prompt).encode(), digest_size=16).digest() for prompt in prompts)
    return np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), dtype=np.int64)


def group_key(prompt: Prompt) -> str:
    """What must not be on both sides: a text, or the system and first user turns; case and spacing do not count."""
    if isinstance(prompt, str):
        return _normalise(prompt)
    first_user = next((i for i, turn in enumerate(prompt) if turn["role"] == "user"), len(prompt) - 1)
    opening = [turn for turn in prompt[:first_user] if turn["role"] == "system"] + prompt[first_user : first_user + 1]
    return "\0".join(_normalise(turn["content"]) for turn in opening)


def prompt_key(prompt: Prompt) -> str:
    """The whole prompt; case and spacing do not count."""
    if isinstance(prompt, str):
        return _normalise(prompt)
    return "\0".join(f"{turn['role']} {_normalise(turn['content'])}" for turn in prompt)


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split())


def count_shared(train: Iterable[Prompt], held_out: Iterable[Prompt]) -> int:
    """How many different held-out prompts also occur in training."""
    wanted = {prompt_key(prompt) for prompt in held_out}
    return len(wanted & {prompt_key(prompt) for prompt in train})


def divide(groups: np.ndarray, wished_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row indices of the two sides, ascending: whole groups are held out, about `wished_rows` rows in all.

    One seed always shuffles the groups alike, so more held-out groups mean more rows and the count can be searched.
    A few further shuffles are tried where large groups keep it off the wish.
    """
    best: tuple[np.ndarray, np.ndarray] | None = None
    for attempt in range(ATTEMPTS):
        sides = _search(groups, wished_rows, (seed + attempt * 7919) % 2**32)
        if best is None or abs(len(sides[1]) - wished_rows) < abs(len(best[1]) - wished_rows):
            best = sides
        if abs(len(best[1]) - wished_rows) <= CLOSE_ENOUGH * wished_rows:
            break
    assert best is not None
    return np.sort(best[0]), np.sort(best[1])


def _search(groups: np.ndarray, wished_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    def hold_out(count: int) -> tuple[np.ndarray, np.ndarray]:
        splitter = GroupShuffleSplit(n_splits=1, test_size=count, random_state=seed)
        return next(splitter.split(groups, groups=groups))

    fewest, most = 1, int(groups.max())  # at least one group stays for training
    while fewest < most:
        middle = (fewest + most) // 2
        if len(hold_out(middle)[1]) >= wished_rows:
            most = middle
        else:
            fewest = middle + 1
    reached = hold_out(fewest)
    if fewest == 1:
        return reached
    short = hold_out(fewest - 1)
    closer = abs(len(short[1]) - wished_rows) < abs(len(reached[1]) - wished_rows)
    return short if closer else reached
