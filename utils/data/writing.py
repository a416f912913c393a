"""Pairs to a file, in the explicit-prompt form that any trainer reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

from ..errors import UserError
from ..run.writing import replacing
from .calls import plain_turns

COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs", "score_chosen", "score_rejected", "source")


def write_pairs(path: Path, pairs: datasets.Dataset) -> None:
    """Writes the pairs, with COLUMNS alone, as JSON lines or Parquet, by the ending, in one step.

    Raises:
        UserError: the file cannot be written.
    """
    rows = pairs.select_columns([name for name in COLUMNS if name in pairs.column_names])
    try:
        with replacing(path) as beside:
            if path.suffix.lower() == ".parquet":
                rows.to_parquet(beside)
                return
            with open(beside, "w", encoding="utf-8") as file:
                for batch in rows.iter(1000):
                    for values in zip(*batch.values(), strict=True):
                        file.write(json.dumps(_without_null(dict(zip(batch, values, strict=True))), ensure_ascii=False))
                        file.write("\n")
    except OSError as error:
        raise UserError(f"--output_file {path}: cannot be written ({error.strerror})") from None


def _without_null(row: dict[str, Any]) -> dict[str, Any]:
    return {name: plain_turns(value) for name, value in row.items() if value is not None}
