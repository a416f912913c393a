"""Which tokens of a completion count: those that the model writes, not the results of tools between its turns,
nor reasoning that is masked.

A token that does not count stands as -1 - id among the ids of its completion. So whatever keeps, cuts, hashes or
compares ids does so with the mask in them; before a model reads them, `plain_ids` gives them back. The last token of a
completion counts.
"""

from __future__ import annotations

from collections.abc import Sequence


def uncount(token: int) -> int:
    """The id of a token as it stands where it does not count."""
    return -1 - token


def plain_ids(ids: Sequence[int]) -> list[int]:
    """The ids as a model reads them."""
    return [token if token >= 0 else -1 - token for token in ids] if has_uncounted(ids) else list(ids)


def has_uncounted(ids: Sequence[int]) -> bool:
    """Whether some tokens do not count."""
    return len(ids) > 0 and min(ids) < 0


def count_tokens(ids: Sequence[int]) -> int:
    """How many tokens count."""
    return sum(token >= 0 for token in ids)
