"""Whether a table that the library read says what its file says, or what it was made of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.json

from ..errors import UserError, in_one_line
from .opening import open_binary
from .places import Place
from .scanning import whole_rows

LIBRARY_BLOCK = 10 << 20  # of a JSON file; the types of the first are those of all
CHECKED_BLOCK = 32 << 20
# JSON schemas and arguments of calls, in which a null or 1 for 1.0 says something else.
TOOLS = (
    "tools",
    "functions",
    "chosen_tools",
    "rejected_tools",
    "tool_calls",
    "function_call",
    "arguments",
    "chat_template_kwargs",
    "documents",
)


def find_changed_texts(rows: datasets.Dataset) -> str | None:
    """A column that the library itself read, or wrote, in which it may have changed texts.

    Where a field holds values of several types it decodes those that are texts: '"Yes"' is then Yes, '42' a number.
    """
    for name, kind in rows.features.items():
        for chunk in rows.data.column(name).chunks:
            for stored in _stored_json(chunk, kind):
                if any(
                    text is not None and text[:1] not in ("{", "[") for text in stored.cast(pa.string()).to_pylist()
                ):
                    return name
    return None


def describe_changed_texts(column: str) -> str:
    """What is wrong with such a column, for messages."""
    return (
        f"'{column}' mixes texts with values of other types, and the datasets library changes such texts as it reads "
        "or writes them"
    )


def holds_json(kind: Any) -> bool:
    """Whether the library holds values of several types in a column of this type."""
    if isinstance(kind, dict):
        return any(map(holds_json, kind.values()))
    return holds_json(kind.feature) if hasattr(kind, "feature") else type(kind).__name__ == "Json"


def _stored_json(array: pa.Array, kind: Any) -> Iterator[pa.Array]:
    """The arrays in which the library holds values of several types as JSON."""
    if isinstance(kind, dict):
        for name, inner in kind.items():
            yield from _stored_json(array.field(name), inner)
    elif hasattr(kind, "feature"):
        yield from _stored_json(array.flatten(), kind.feature)
    elif type(kind).__name__ == "Json":
        yield array.storage if isinstance(array, pa.ExtensionArray) else array


def is_exact(features: Any, name: str = "") -> bool:
    """Whether values of these types are what their file says.

    False where the library holds values of several types in one column, and where nested tools and calls become
    columns of a table: that adds nulls for what other rows have, and turns 1 into 1.0.
    """
    if isinstance(features, dict):
        return name not in TOOLS and all(is_exact(kind, name) for name, kind in features.items())
    if hasattr(features, "feature"):
        return is_exact(features.feature, name)
    return type(features).__name__ != "Json"


def is_misread(rows: datasets.Dataset, paths: Sequence[Path]) -> bool:
    """Whether the library changed what these JSON files say.

    Texts that look like dates become timestamps; a whole table in one object becomes a single row; and what stands
    behind a block or a file of texts alone becomes text: numbers, objects, and dates in another form than theirs.
    """
    if any(_has_timestamp(field.type) for field in rows.data.table.schema):
        return True
    size = max(path.stat().st_size for path in paths)
    in_one_block = len(paths) == 1 and size <= LIBRARY_BLOCK and paths[0].suffix.lower() != ".gz"
    if not in_one_block and not _is_as_written(rows.data.table, paths):
        return True
    return len(rows) == len(paths) and any(whole_rows(path) is not None for path in paths)


def _is_as_written(table: pa.Table, paths: Sequence[Path]) -> bool:
    """Whether a table holds the values of these files of JSON lines as they are written."""
    known = pa.schema([field for field in table.schema if not pa.types.is_null(field.type)])
    parse = pyarrow.json.ParseOptions(explicit_schema=known, unexpected_field_behavior="ignore")
    table, read = table.select(known.names), 0
    try:
        for path in paths:
            with open_binary(path) as file:
                if file.read(1) == b"[":
                    return len(paths) == 1  # an array is one block
                file.seek(0)
                for batch in pyarrow.json.open_json(file, pyarrow.json.ReadOptions(block_size=CHECKED_BLOCK), parse):
                    if not pa.Table.from_batches([batch]).equals(table.slice(read, len(batch))):
                        return False
                    read += len(batch)
    except pa.ArrowException:
        return False
    return read == len(table)


def _has_timestamp(kind: pa.DataType) -> bool:
    return pa.types.is_temporal(kind) or any(_has_timestamp(kind.field(i).type) for i in range(kind.num_fields))


def check_texts(rows: datasets.Dataset, place: Place, fault: str) -> None:
    """Raises UserError where a table holds bytes that are no text, which some readers let through, and where."""
    for name, column in zip(rows.data.table.column_names, rows.data.table.columns, strict=True):
        before = 0
        for chunk in column.chunks:
            try:
                chunk.validate(full=True)
            except pa.ArrowException as error:
                index = re.search(r"at string index (\d+)", str(error))
                flat = index and (pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type))
                where = f"{place(before + int(index[1]))}, column '{name}'" if flat else f"column '{name}'"
                raise UserError(f"{fault}: damaged at {where} ({in_one_line(error)}). Make or copy it again.") from None
            before += len(chunk)
