"""The files of a model folder or hub repository, one at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..run.bounded import Unreadable, read_json


def read_json_file(name: str, file: str, revision: str | None) -> dict[str, Any] | None:
    """The JSON object in `file` of a model folder or hub repository; None when it has no such file."""
    path = find_file(name, file, revision)
    if path is None:
        return None
    try:
        content = read_json(path)
    except (OSError, Unreadable) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object")
    return content


def find_file(name: str, file: str, revision: str | None) -> Path | None:
    """Where `file` of a model folder or hub repository is on the disk; None when it has no such file."""
    path = os.path.join(name, file) if os.path.isdir(name) else find_hub_file(name, file, revision)
    return Path(path) if path is not None and os.path.exists(path) else None


def find_hub_file(name: str, file: str, revision: str | None) -> str | None:
    """Where a file of a hub repository lies in the cache, fetched where it was not; None where there is none."""
    from transformers.utils import cached_file

    try:
        return cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except (OSError, ValueError):
        return None
