"""What a prompt or a pair is, in a few bytes: the same in every run, file and process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any


def hash_value(value: Any, size: int = 16) -> bytes:
    """A hash of a text or a list of messages, in `size` bytes."""
    return blake2b(json.dumps(value, ensure_ascii=True).encode(), digest_size=size).digest()


def pair_id(row: Mapping[str, Any]) -> str:
    """16 characters that name what a row says (prompt and replies), wherever it was read."""
    names = ("prompt", "chosen", "rejected", "completion")
    return hash_value([row[name] for name in names if name in row], 8).hex()
