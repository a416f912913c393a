"""Training and held-out rows, so that no prompt is in both and none ever changes sides.

A hash of the seed and the prompt gives each prompt a number between 0 and 1; it is held out where that lies below the
wished fraction. The rows around it do not matter: rows that are added, fixed, dropped or put in another order leave
all others where they were, and one prompt in two sources is on one side. The share held out is the fraction up to
chance: for n prompts and a fraction f the standard deviation is sqrt(n f (1 - f)) prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from typing import Any

import datasets
import numpy as np

from ..errors import UserError
from .calls import said_by
from .split_names import held_out_wish

DEFAULT_FRACTION = 0.1
DEFAULT_MOST_ROWS = 1000
SPARE = f"set aside: their prompts are kept out of training, and {DEFAULT_MOST_ROWS:,} held-out rows are evaluated"

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Split:
    """`shared_prompts`: how many held-out prompts also occur in training; 0 unless the held-out split was given.

    `spare`: rows that are on neither side, because fewer held-out rows are enough.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset | None
    shared_prompts: int
    spare: int = 0


def split_rows(
    rows: datasets.Dataset, held_out_rows: datasets.Dataset | None, validation_split: str | None, seed: int
) -> Split:
    """Hold out what --validation_split asks for: nothing, the split `held_out_rows`, or a share of the rows.

    A share is drawn by prompt, or by the column `group` where there is one, which is then removed; both sides keep the
    order of the rows. Without a wish a tenth is kept out of training, and of it no more than 1000 rows are evaluated.

    Raises UserError when there are too few rows or prompts to hold any out.
    """
    wish = held_out_wish(validation_split)
    if wish == "none":
        return Split(without_group(rows), None, 0)
    if held_out_rows is not None and not isinstance(wish, float):
        shared = count_shared_prompts(rows, held_out_rows)
        return Split(without_group(rows), without_group(held_out_rows), shared)
    if isinstance(wish, str):
        raise UserError(f"--validation_split {wish}: the data has no such split")
    numbers = number_rows(rows, seed)
    if len(rows) < 2 or (numbers == numbers[0]).all():
        what = "1 row" if len(rows) == 1 else f"{len(rows)} rows that share one prompt"
        raise UserError(f"cannot hold out a part of {what}: add data, or pass --validation_split none")
    held_out = choose_held_out(numbers, wish or DEFAULT_FRACTION, _sources(rows))
    evaluated = held_out if wish else _lowest(numbers, held_out, DEFAULT_MOST_ROWS)
    train, other = (without_group(rows.select(np.flatnonzero(mask))) for mask in (~held_out, evaluated))
    shared = count_shared_prompts(train, other) if "group" in rows.column_names else 0
    return Split(train, other, shared, int(held_out.sum() - evaluated.sum()))


def advise_on_spare(rows: int) -> str:
    """What to pass for the spare ones of so many rows to be trained on, or evaluated, as a phrase."""
    share = DEFAULT_MOST_ROWS / rows
    fraction = next(digit / 10**n for n in count(2) for digit in (5, 2, 1) if digit / 10**n <= share)
    return (
        f"--validation_split {fraction:g} trains on nearly all of them; "
        f"--validation_split {DEFAULT_FRACTION:g} evaluates all of them"
    )


def join_splits(splits: Sequence[Split]) -> Split:
    """Several splits as one, each side in the order of `row`."""
    trains = [split.train for split in splits]
    held_out = [split.held_out for split in splits if split.held_out is not None]
    train, other = _in_order(trains), _in_order(held_out) if held_out else None
    shared = splits[0].shared_prompts if len(splits) == 1 else count_shared_prompts(train, other)
    return Split(train, other, shared, sum(split.spare for split in splits))


def _in_order(tables: Sequence[datasets.Dataset]) -> datasets.Dataset:
    if len(tables) == 1:
        return tables[0]
    rows = datasets.concatenate_datasets(list(tables))
    return rows.select(np.argsort(np.array(rows["row"][:]), kind="stable"))


def choose_held_out(numbers: np.ndarray, fraction: float, sources: np.ndarray | None = None) -> np.ndarray:
    """Which rows are held out, by their prompts' numbers: those below `fraction`.

    A source (by its number in `sources`) with two prompts or more has some on each side: of one so small that chance
    leaves a side empty, the prompt with the lowest number is held out, or that with the highest trained on. The same
    holds of all rows together.
    """
    held_out = numbers < fraction
    for source in [*(() if sources is None else np.unique(sources)), None]:
        own = np.full(len(numbers), True) if source is None else sources == source
        lowest, highest = numbers[own].min(), numbers[own].max()
        if lowest < highest and not held_out[own].any():
            held_out |= numbers == lowest
        elif lowest < highest and held_out[own].all():
            held_out &= numbers != highest
    return held_out


def _lowest(numbers: np.ndarray, held_out: np.ndarray, most: int) -> np.ndarray:
    """Of the rows held out those with the lowest numbers: whole prompts, `most` rows at most, one prompt at least."""
    values, counts = np.unique(numbers[held_out], return_counts=True)
    kept = max(1, int(np.searchsorted(np.cumsum(counts), most, side="right")))
    return held_out & (numbers <= values[kept - 1])


def draw_numbers(groups: Iterable[str], seed: int) -> np.ndarray:
    """A number in [0, 1) for each group, the same for the same text and seed, whatever stands around it."""
    key = seed.to_bytes(8, "little")
    hashes = bytearray()  # joining them would hold every one as an object first
    for group in groups:
        hashes += blake2b(group.encode(), digest_size=8, key=key).digest()
    return np.frombuffer(hashes, dtype="<u8") / 2.0**64


def number_rows(rows: datasets.Dataset, seed: int) -> np.ndarray:
    """The number in [0, 1) of what keeps each row with others. Shape (rows,)."""
    return draw_numbers(_groups(rows), seed)


def _groups(rows: datasets.Dataset) -> Iterator[str]:
    """What keeps a row with others: its `group` of --group_by; else its prompt; for a text without one, the text."""
    names = [name for name in ("prompt", "completion", "group") if name in rows.column_names]
    for batch in rows.select_columns(names).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            if row.get("group") is not None:
                yield f"group {row['group']}"
            else:
                yield group_key(row["prompt"] or row.get("completion") or row["prompt"])


def _sources(rows: datasets.Dataset) -> np.ndarray | None:
    if "source" not in rows.column_names:
        return None
    return np.unique(np.array(rows["source"][:]), return_inverse=True)[1]


def without_group(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows without the column of --group_by, which is of no use once they are split."""
    return rows.remove_columns("group") if "group" in rows.column_names else rows


def _prompts(rows: datasets.Dataset) -> Iterator[Prompt]:
    """The prompt of each row; of a text without one (for sft) the text, of which two copies must not be parted."""
    columns = ["prompt"] + (["completion"] if "completion" in rows.column_names else [])
    for batch in rows.select_columns(columns).iter(batch_size=1000):
        for prompt, text in zip(batch["prompt"], batch.get("completion", batch["prompt"]), strict=True):
            yield prompt or text


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
    return "\0".join(f"{turn['role']} {_normalise(said_by(turn))}" for turn in prompt)


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split())


def count_shared_prompts(train: datasets.Dataset, held_out: datasets.Dataset | None) -> int:
    """How many different held-out prompts also occur in training."""
    return count_shared(_prompts(train), _prompts(held_out)) if held_out is not None else 0


def count_shared(train: Iterable[Prompt], held_out: Iterable[Prompt]) -> int:
    """How many different held-out prompts also occur in training."""
    wanted = {prompt_key(prompt) for prompt in held_out}
    return len({key for prompt in train if (key := prompt_key(prompt)) in wanted})
