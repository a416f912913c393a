"""How long tokenized rows are, counted in Arrow: of a million rows no million of Python lists is made."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

BATCH = 10_000


def count_row_tokens(rows: Dataset, names: Sequence[str]) -> np.ndarray:
    """Tokens of each row in the columns `names` together, shape (rows,), int64."""
    tables = rows.select_columns(list(names)).with_format("arrow").iter(batch_size=BATCH)
    parts = [sum(pc.list_value_length(table[name]).to_numpy().astype(np.int64) for name in names) for table in tables]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def read_numbers(rows: Dataset, name: str) -> np.ndarray:
    """A column of numbers, or of yes and no, shape (rows,)."""
    return rows.select_columns([name]).with_format("arrow")[:][name].to_numpy()


def longest_first(lengths: np.ndarray) -> np.ndarray:
    """Indices of rows, those of one length in their order."""
    return np.argsort(-lengths, kind="stable")
