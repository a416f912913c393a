"""Texts to typed values, by the annotation of a field: one reader for the command line and the config file.

Every value arrives as text (or as a list of texts), so that `--beta 5e-5`, `beta: 5e-5` and `"beta": 5e-5` mean the
same. A text that does not fit raises ValueError with the end of a sentence: "must be a whole number".
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

YES_NO = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
NULL_WORDS = ("none", "null")


@dataclass(frozen=True)
class ValueType:
    """What an annotation accepts: `scalars` of SCALAR_READERS, a list of `item`, None if `optional`.

    `others` are names that it cannot read, of enums for example; `literals` are the values of a Literal.
    """

    scalars: tuple[str, ...] = ()
    item: str | None = None
    optional: bool = False
    literals: tuple[Any, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """The end of "must be ..."."""
        kinds = [DESCRIPTIONS[name] for name in SCALAR_READERS if name in self.scalars]
        if self.item:
            kinds.append(f"one or more of: {DESCRIPTIONS[self.item]}")
        return " or ".join([*kinds, *(str(literal).lower() for literal in self.literals)])


def annotated_type(annotation: ast.expr | str) -> ValueType:
    """The ValueType of an annotation, given as text or as parsed; `list[int] | None`, `Optional[str]` and so on."""
    scalars, item, optional, literals, others = [], None, False, (), []
    for member in _union_members(annotation):
        match member:
            case ast.Constant(value=None):
                optional = True
            case ast.Name(id=name) if name in SCALAR_READERS:
                scalars.append(name)
            case ast.Name(id="list" | "List" | "tuple" | "Tuple"):
                item = "str"
            case ast.Subscript(value=ast.Name(id="list" | "List" | "tuple" | "Tuple"), slice=inner):
                first = inner.elts[0] if isinstance(inner, ast.Tuple) else inner
                item = first.id if isinstance(first, ast.Name) and first.id in SCALAR_READERS else None
            case ast.Subscript(value=ast.Name(id="dict" | "Dict")):
                scalars.append("dict")
            case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
                members = inner.elts if isinstance(inner, ast.Tuple) else [inner]
                literals = tuple(ast.literal_eval(value) for value in members)
            case ast.Name(id=name):
                others.append(name)
    return ValueType(tuple(scalars), item, optional, literals, tuple(others))


def _union_members(annotation: ast.expr | str) -> Iterator[ast.expr]:
    match annotation:
        case str(text) | ast.Constant(value=str(text)):
            yield from _union_members(ast.parse(text, mode="eval").body)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            yield from _union_members(left)
            yield from _union_members(right)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            yield from _union_members(inner)
            yield ast.Constant(value=None)
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=members)):
            for member in members:
                yield from _union_members(member)
        case _:
            yield annotation


def read_text(kind: ValueType, text: str) -> Any:
    """The value that one text stands for. Raises ValueError when it is none of what `kind` accepts."""
    word = text.strip().lower()
    if kind.optional and word in NULL_WORDS:
        return None
    for literal in kind.literals:
        if word == str(literal).lower():
            return literal
    if "dict" in kind.scalars and word.startswith("{"):
        return _read_mapping(text)
    for name, read in SCALAR_READERS.items():
        if name in kind.scalars:
            try:
                return read(text)
            except ValueError:
                continue
    raise ValueError(f"must be {kind.description}")


def read_list(kind: ValueType, texts: Sequence[str], split: bool) -> list[Any] | None:
    """The list that the texts stand for: one text may hold a JSON list, or with `split` items between commas or spaces.

    Raises ValueError when an item is not of `kind.item`.
    """
    if kind.optional and len(texts) == 1 and texts[0].strip().lower() in NULL_WORDS:
        return None
    if len(texts) == 1 and texts[0].lstrip().startswith("["):
        texts = [as_text(item) for item in _read_json_list(texts[0])]
    elif split:
        texts = [piece for text in texts for piece in re.split(r"[,\s]+", text) if piece]
    return [read_text(ValueType((kind.item,)), text) for text in texts]


def as_text(value: Any) -> str:
    """The text that reads back as `value` (a JSON value)."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, allow_nan=False)


def as_texts(value: Any) -> list[str]:
    """The texts that read back as `value`: one per item of a tuple, JSON for a list."""
    if isinstance(value, list):
        return [json.dumps(value)]
    if not isinstance(value, tuple):
        return [as_text(value)]
    texts = [as_text(item) for item in value]
    ambiguous = any(re.search(r"[,\s]|^\[", text) or text.lower() in ("", *NULL_WORDS) for text in texts)
    return [json.dumps(value)] if ambiguous or not texts else texts


def is_number(text: str) -> bool:
    """Whether the text is a number as a person writes it, nan and inf among them."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_yes_no(text: str) -> bool:
    if text.strip().lower() not in YES_NO:
        raise ValueError
    return YES_NO[text.strip().lower()]


def _read_whole_number(text: str) -> int:
    # int() alone would take "1_000" and "٣", and gives up on thousands of digits with a ValueError of its own.
    if not re.fullmatch(r"\s*[+-]?[0-9]+\s*", text):
        raise ValueError
    return int(text)


def _read_number(text: str) -> float:
    if "_" in text or not math.isfinite(number := float(text)):
        raise ValueError
    return number


def _read_mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"must be {DESCRIPTIONS['dict']} ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"must be {DESCRIPTIONS['dict']}")
    return value


def _read_json_list(text: str) -> list[Any]:
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"must be a JSON list or plain words ({error})") from None
    return value


# In the order in which a union is tried; str comes last, because it takes everything.
SCALAR_READERS: dict[str, Callable[[str], Any]] = {
    "dict": _read_mapping,
    "bool": _read_yes_no,
    "int": _read_whole_number,
    "float": _read_number,
    "str": str,
}
DESCRIPTIONS = {
    "dict": 'a JSON object such as {"key": 1}',
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
}
