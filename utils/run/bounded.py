"""Small files that may come from anybody: regular files of a bounded size, read whole, and JSON of a bounded depth."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MOST_BYTES = 2**26  # of any record or config; the index of the largest models has some 2**24
MOST_DEPTH = 64  # levels of lists and mappings within one another


class Unreadable(ValueError):
    """A file is not read; the text is the end of a sentence that begins with its name."""


class Unbounded(Unreadable):
    """The same of a file whose reading might take all the time or memory there is."""


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a file.

    Raises:
        Unbounded: it is not a regular file (a pipe would be waited for, a device has no end), or has more than `most`
            bytes.
        OSError: the system refuses it.
    """
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise Unbounded("is not a regular file (a pipe or a device)")
    if found.st_size > most:
        raise Unbounded(f"has {found.st_size:,} bytes; at most {most:,} are read")
    # Without waiting: a file of /proc may have no end, and another may have been put in its place since.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        content = file.read(most + 1)
    if content is None:
        raise Unbounded("is not a regular file (its content is still to come)")
    if len(content) > most:  # a file of /proc, which has no size
        raise Unbounded(f"has more than {most:,} bytes")
    return content


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
    """What a JSON file holds.

    Raises:
        Unreadable: as for `read_bytes`; or it is no JSON, or nested too deeply.
        OSError: the system refuses it.
    """
    return parse_json(read_bytes(path, most))


def parse_json(content: bytes) -> Any:
    """What a JSON text holds. Raises Unreadable where it is none, or nested too deeply."""
    try:
        value = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise Unreadable("is not UTF-8 text") from None
    except RecursionError:
        raise Unbounded("is nested too deeply") from None
    except ValueError as error:  # also for a number of thousands of digits
        raise Unreadable(f"is not valid JSON ({error})") from None
    if is_deep(value):
        raise Unbounded(f"is nested more than {MOST_DEPTH} levels deep")
    return value


def count_parts(root: Any, parts_of: Callable[[Any], Sequence[Any]], most: int) -> int:
    """How many parts a value has where what is referred to several times counts as often; `most` + 1 where it has more
    than `most`, or holds itself. Takes time in proportion to what is written, not to what it stands for.

    Args:
        parts_of: the values right within a value.
    """
    counts: dict[int, int] = {}
    within: set[int] = set()
    waiting = [(root, False)]
    while waiting:
        value, done = waiting.pop()
        if done:
            within.discard(id(value))
            parts = parts_of(value)
            counts[id(value)] = min(len(parts) + sum(counts[id(part)] for part in parts), most + 1)
        elif id(value) in within:
            return most + 1
        elif id(value) not in counts:
            within.add(id(value))
            waiting.append((value, True))
            waiting += [(part, False) for part in parts_of(value)]
    return counts[id(root)]


def parts_of_yaml(node: Any) -> list[Any]:
    """The nodes right within a node of a YAML file; a merge key has its mappings as parts."""
    if node.id == "mapping":
        return [part for pair in node.value for part in pair]
    return list(node.value) if node.id == "sequence" else []


def is_deep(value: Any) -> bool:
    """Whether lists and mappings are nested more than MOST_DEPTH levels deep, or hold themselves."""
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        inner: dict[int, Any] = {}  # by identity: what is referred to twice is looked at once
        for item in level:
            if isinstance(item, dict | list):
                children = item.values() if isinstance(item, dict) else item
                inner |= {id(child): child for child in children if isinstance(child, dict | list)}
        if not inner:
            return False
        level = list(inner.values())
    return True
