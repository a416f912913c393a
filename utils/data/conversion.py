"""Rows of any known shape -> one shape.

`prompt`, `chosen`, `rejected` (sft: `prompt`, `completion`), all texts or all message lists; `row`, the index in the
source; `reason`, why the row cannot be trained on (else null); and `tools`, a JSON text, where the source has any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets.fingerprint import Hasher

from utils.data import checks as checks_module
from utils.data import columns as columns_module
from utils.data import schemas as schemas_module
from utils.data import turns as turns_module
from utils.data.checks import find_fault
from utils.data.columns import reach
from utils.data.files import quiet
from utils.data.schemas import SHAPES, Reading, Shape
from utils.data.turns import BadRow
from utils.errors import UserError

MESSAGE_FEATURES = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})


def convert_rows(rows: datasets.Dataset, reading: Reading, num_proc: int | None = None) -> datasets.Dataset:
    """The rows in the one shape, in order, cached by content. A row that cannot be read has a `reason`, no values.

    Raises UserError when a column of the reading is missing, as it may be in a held-out split.
    """
    needed = [path if path in rows.column_names else path.partition(".")[0] for path in reading.columns.values()]
    missing = [name for name in needed if name not in rows.column_names]
    if missing:
        raise UserError(
            f"column '{missing[0]}' is missing in the held-out split, which has: {', '.join(rows.column_names)}; "
            "name another with --validation_split, or none"
        )
    source = rows.select_columns([name for name in rows.column_names if name in needed])
    plan = {
        "columns": dict(reading.columns),
        "shape": reading.shape.name,
        "replies": reading.replies,
        "labels": reading.labels,
    }
    fingerprint = Hasher.hash((source._fingerprint, plan, _hash_code()))
    with quiet(source.data.nbytes):
        return source.map(
            _convert_batch,
            batched=True,
            with_indices=True,
            fn_kwargs=plan,
            remove_columns=source.column_names,
            features=_features(reading),
            num_proc=num_proc,
            new_fingerprint=fingerprint,
            cache_file_name=_cache_file(source, fingerprint),
            desc="Reading the rows",
        )


def _features(reading: Reading) -> datasets.Features:
    value = datasets.Value("string") if reading.is_text else MESSAGE_FEATURES
    features = dict.fromkeys(("prompt", *reading.outputs), value)
    if "tools" in reading.columns:
        features["tools"] = datasets.Value("string")
    return datasets.Features({**features, "row": datasets.Value("int64"), "reason": datasets.Value("string")})


def _hash_code() -> str:
    """The code is part of the cache's key: the library pickles functions by name and would miss a change in them."""
    files = (__file__, *(module.__file__ for module in (checks_module, columns_module, schemas_module, turns_module)))
    return Hasher.hash([Path(file).read_bytes() for file in files])


def _cache_file(rows: datasets.Dataset, fingerprint: str) -> str | None:
    """A file in the library's own cache: left to itself it would write beside the rows, into the user's folder."""
    if not rows.cache_files:
        return None
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "converted_rows"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"{fingerprint}.arrow")


def _convert_batch(
    batch: Mapping[str, list],
    indices: list[int],
    columns: Mapping[str, str],
    shape: str,
    replies: tuple[str, ...],
    labels: Mapping[str, str],
) -> dict[str, list]:
    known = next(known for known in SHAPES if known.name == shape)
    values = (*labels, *(("tools",) if "tools" in columns else ()))
    output: dict[str, list] = {name: [] for name in (*values, "row", "reason")}
    for position, index in enumerate(indices):
        row = {name: column[position] for name, column in batch.items()}
        try:
            converted = _convert_row(row, known, columns, replies, labels)
            reason = find_fault(converted, labels, known.prompt_may_be_empty)
        except BadRow as error:
            converted, reason = {}, str(error)
        for name in values:
            output[name].append(converted.get(name))
        output["row"].append(index)
        output["reason"].append(reason)
    return output


def _convert_row(
    row: Mapping[str, Any],
    shape: Shape,
    columns: Mapping[str, str],
    replies: tuple[str, ...],
    labels: Mapping[str, str],
) -> dict[str, Any]:
    """One row in the one shape. Raises BadRow when it cannot be read."""
    parts = {part: reach(row, path) for part, path in columns.items()}
    sides = [shape.split(parts, reply, columns) for reply in replies]
    for reply, (_, answer) in zip(replies, sides, strict=True):
        if isinstance(answer, list) and any(turn["role"] != "assistant" for turn in answer):
            raise BadRow(f"'{columns[reply]}' has a turn that is not the assistant's")
    # A missing reply is for the checks to report: its side has no prompt to compare.
    prompts = [prompt for prompt, answer in sides if answer is not None]
    if len(prompts) == 2 and prompts[0] != prompts[1]:
        raise BadRow(f"the two {'transcripts' if shape.is_transcript else 'sides'} differ before the last reply")
    prompt = prompts[0] if prompts else sides[0][0]
    values = (prompt, *(answer for _, answer in sides))
    return {**dict(zip(labels, values, strict=True)), "tools": _tools_text(parts.get("tools"))}


def _tools_text(tools: Any) -> str | None:
    """Tools as a JSON text; the nulls that a table adds for the fields of other rows are taken out again."""
    if tools is None or isinstance(tools, str):
        return tools or None
    return json.dumps(_without_nulls(tools), ensure_ascii=False) if tools else None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
