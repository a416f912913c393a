"""Pairs to a file, in the explicit-prompt form that any trainer reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

from ..errors import UserError
from ..run.writing import replacing
from .calls import plain_turns
from .conversion import WHOLE_TURNS
from .row_cache import map_rows

COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs", "score_chosen", "score_rejected", "source")


def write_pairs(path: Path, pairs: datasets.Dataset) -> None:
    """Writes the pairs, with COLUMNS alone, as JSON lines or Parquet, by the ending, in one step.

    Parquet has one type for all messages of a column, and calls may hold anything: columns of messages with more than
    their text are written there as JSON texts, which are read back as they were.

    Raises:
        UserError: the file cannot be written.
    """
    rows = pairs.select_columns([name for name in COLUMNS if name in pairs.column_names])
    try:
        with replacing(path) as beside:
            if path.suffix.lower() == ".parquet":
                _without_extra(rows).to_parquet(beside)
                return
            with open(beside, "w", encoding="utf-8") as file:
                for batch in rows.iter(1000):
                    for values in zip(*batch.values(), strict=True):
                        file.write(json.dumps(_without_null(dict(zip(batch, values, strict=True))), ensure_ascii=False))
                        file.write("\n")
    except OSError as error:
        raise UserError(f"--output_file {path}: cannot be written ({error.strerror})") from None


def _without_extra(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with columns of whole turns as the JSON texts of their messages."""
    names = [name for name, kind in rows.features.items() if kind == WHOLE_TURNS]
    if not names:
        return rows
    features = datasets.Features({**rows.features, **dict.fromkeys(names, datasets.Value("string"))})
    return map_rows(
        rows, _as_texts, names, doing="writing", batched=True, features=features, fn_kwargs={"names": names}
    )


def _as_texts(batch: dict[str, list[Any]], names: list[str]) -> dict[str, list[Any]]:
    return {name: [json.dumps(plain_turns(turns), ensure_ascii=False) for turns in batch[name]] for name in names}


def _without_null(row: dict[str, Any]) -> dict[str, Any]:
    return {name: plain_turns(value) for name, value in row.items() if value is not None}
