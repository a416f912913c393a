"""Data folders from elsewhere: what in them names files of other places is refused, before the library follows it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..errors import UserError
from ..run.bounded import Unbounded, Unreadable, count_parts, parts_of_yaml, read_bytes, read_json

MOST_README_BYTES = 2**22
MOST_PARTS = 1_000_000  # of the configurations in it
READERS = ("arrow", "csv", "json", "parquet", "text")  # of the library's own, those that read tables of text
SHOWN = 3


def check_data_folder(flag: str, folder: Path) -> None:
    """Refuses a data folder whose own records name files outside it, or addresses; and broken tables.

    Raises:
        UserError: one fault per name, or the first broken table.
    """
    named = _named_files(folder)
    try:
        wrong = [
            f"{flag}: {file} names {name!r:.80}; only files within the folder are read"
            for file, name in named
            if _leads_out(name)
        ]
    except Unbounded as error:
        raise UserError(f"{flag}: in {folder}, {error}") from None
    if wrong:
        raise UserError(*dict.fromkeys(wrong[:SHOWN]))
    for path in sorted(folder.rglob("*.arrow")):
        _check_arrow(flag, path)


def _check_arrow(flag: str, path: Path) -> None:
    """The library maps these files into memory and believes their offsets; a wrong one ends the process."""
    try:
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                batch.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{flag}: {path.name} is not a complete Arrow table ({said[:200]})") from None


def check_reader(flag: str, builder: Any) -> None:
    """Refuses data that the library reads in another way than as tables of text.

    Raises:
        UserError: it would open archives, images and the like.
    """
    module = type(builder).__module__
    reader = module.rpartition(".")[2]
    if ".packaged_modules." in module and reader not in READERS:
        raise UserError(f"{flag}: {reader} data, which is not supported; use .jsonl[.gz], .json[.gz], .csv or .parquet")


def _named_files(folder: Path) -> Iterator[tuple[str, str]]:
    """The names in the records of a folder: of a saved data set, and of a repository's configurations."""
    for path in (folder / "state.json", *folder.glob("*/state.json")):
        state = _read_json(path)
        for item in state.get("_data_files") or () if isinstance(state, dict) else ():
            if isinstance(item, dict):
                yield str(path.relative_to(folder)), str(item.get("filename"))
    splits = _read_json(folder / "dataset_dict.json")
    for name in splits.get("splits") or () if isinstance(splits, dict) else ():
        yield "dataset_dict.json", str(name)
    for name in ("README.md", ".huggingface.yaml"):
        for item in _configurations(folder / name):
            for key in ("data_files", "data_dir"):
                yield from ((name, text) for text in _texts(item.get(key), "path"))


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except Unbounded as error:
        raise Unbounded(f"{path.name} {error}") from None
    except (OSError, Unreadable):
        return None  # the library says what is wrong with it


def _configurations(path: Path) -> list[dict[str, Any]]:
    import yaml

    try:
        text = read_bytes(path, MOST_README_BYTES).decode("utf-8")
        head = re.match(r"\s*---[^\n]*\n(.*?)\n---", text, re.DOTALL) if path.suffix == ".md" else None
        loader = yaml.SafeLoader(head[1] if head else "" if path.suffix == ".md" else text)
        root = loader.get_single_node()
        if root is None:
            return []
        if count_parts(root, parts_of_yaml, MOST_PARTS) > MOST_PARTS:
            raise Unbounded(f"has references that expand to more than {MOST_PARTS:,} values")
        content = loader.construct_document(root)
    except Unbounded as error:
        raise Unbounded(f"{path.name} {error}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return []
    items = content.get("configs") if isinstance(content, dict) else None
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def _texts(value: Any, key: str) -> Iterator[str]:
    """The texts of a list, a mapping (where it has `key`, of that alone), or of lists of these."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, dict):
            waiting += [item[key]] if key in item else item.values()


def _leads_out(name: str) -> bool:
    parts = re.split(r"[\\/]", name)
    return "::" in name or ":" in parts[0] or os.path.isabs(name) or ".." in parts or name.startswith("~")
