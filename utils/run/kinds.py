"""What a value that was read must be: kinds of text, number, list and mapping, and the check of a value against one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .bounded import Unreadable

LARGEST = 1e300  # of a number: sums of a few stay finite
SMALLEST = 1e-300  # below it a number is 0: shares of it can be computed with
LARGEST_COUNT = 2**63


@dataclass(frozen=True)
class Kind:
    """What a value must be. Mappings: `keys` by name, and `rest` for every other key, without which that is left out;
    lists: `rest` for each item."""

    said: str  # the end of "must be ..."
    accepts: tuple[type, ...] = ()
    choices: tuple[Any, ...] = ()
    low: float = -LARGEST
    high: float = LARGEST
    keys: Mapping[str, Kind] = field(default_factory=dict)
    rest: Kind | None = None
    needed: tuple[str, ...] = ()  # keys without which the mapping is none
    drops: tuple[type, ...] = ()  # of a mapping: keys of these kinds are left out where they are null
    length: int | None = None  # of a list
    gaps: bool = False  # whether an item of a list may be null
    strict: bool = False  # of a mapping: whether any other key that is not of the kind of the rest is refused


TEXT = Kind("text", (str,))
YES_NO = Kind("true or false", (bool,))
NUMBER = Kind("a number", (int, float))
COUNT = Kind("a whole number from 0", (int,), low=0, high=LARGEST_COUNT)
STEP = Kind("a whole number", (int,), low=-1, high=LARGEST_COUNT)
ANY_MAPPING = Kind("a mapping", (dict,))


def list_of(item: Kind, length: int | None = None, gaps: bool = False) -> Kind:
    """A list of such items."""
    many = f"of {length} items" if length else "of any length"
    return Kind(f"a list {many}, each {item.said}", (list,), rest=item, length=length, gaps=gaps)


def mapping(item: Kind | None = None, needed: tuple[str, ...] = (), drops: tuple[type, ...] = (), **keys: Kind) -> Kind:
    """A mapping with some keys by name, and items for all others."""
    return Kind("a mapping", (dict,), keys=keys, rest=item, needed=needed, drops=drops)


def strict(item: Kind, **keys: Any) -> Kind:
    """A mapping in which nothing is passed over."""
    return replace(mapping(item, **keys), strict=True)


def one_of(*choices: str) -> Kind:
    """One of some words."""
    return Kind(f"one of {', '.join(choices)}", (str,), choices=choices)


def check(value: Any, kind: Kind) -> Any:
    """The value, with null in place of numbers that are not finite.

    Raises:
        Unreadable: it is not of this kind; the text names the first place where it is not.
    """
    return _check(value, kind, "")


def _check(value: Any, kind: Kind, place: str) -> Any:
    name = place or "it"
    if isinstance(value, float) and not math.isfinite(value) and float in kind.accepts:
        return None
    if not isinstance(value, kind.accepts) or (isinstance(value, bool) and bool not in kind.accepts):
        raise Unreadable(f"{name} is {_shown(value)}: must be {kind.said}")
    if kind.choices and value not in kind.choices:
        raise Unreadable(f"{name} is {_shown(value)}: must be {kind.said}")
    if isinstance(value, int | float):
        if not kind.low <= value <= kind.high:
            raise Unreadable(f"{name} is {_shown(value)}: must be {kind.said}, and not so large or small")
        return 0.0 if 0 < abs(value) < SMALLEST else value
    if isinstance(value, dict):
        return _check_mapping(value, kind, place)
    if isinstance(value, list) and kind.rest is not None:
        if kind.length not in (None, len(value)):
            raise Unreadable(f"{name} has {len(value):,} items: must be {kind.said}")
        items = enumerate(value)
        return [
            None if item is None and kind.gaps else _check(item, kind.rest, f"{place}[{number}]")
            for number, item in items
        ]
    return value


def _check_mapping(value: dict[str, Any], kind: Kind, place: str) -> dict[str, Any]:
    missing = [key for key in kind.needed if value.get(key) is None]
    if missing:
        raise Unreadable(f"{place or 'it'} has no {missing[0]}")
    checked = {}
    for key, inner in value.items():
        named = key in kind.keys
        expected = kind.keys.get(key, kind.rest)
        if expected is not None and inner is not None:
            try:
                inner = _check(inner, expected, f"{place}.{key[:80]}".lstrip("."))
            except Unreadable:
                if named or kind.strict:
                    raise
                continue
        kinds = expected.accepts if expected is not None and not expected.needed else ()
        if inner is not None or not set(kinds) & set(kind.drops):
            checked[key] = inner
    return checked


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else f"{str(value)[:12]}..."
    return text if len(text) <= 80 else f"{text[:80]}..."
