"""A --config file, YAML or JSON, as the texts that the same settings would have on the command line.

YAML is read as nodes, not as values: `eval_strategy: no` stays "no", `5e-5` stays "5e-5", and a key that stands
twice is seen. Only what is nested (a mapping for a trainer field) is turned into values here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UserError, in_one_line
from ..run.bounded import Unreadable, count_parts, parts_of_yaml, read_bytes
from ..run.paths import read_path
from .flag_values import as_text

MOST_ITEMS = 100_000  # of one setting
MOST_BYTES = 2**20
MOST_SETTINGS = 1000  # several times as many as there are
SHOWN = 20  # keys that stand twice


@dataclass(frozen=True)
class Entry:
    """One setting as the person wrote it. `label` is how a fault names it: `--beta`, or `run.yaml: beta`."""

    name: str
    label: str
    texts: tuple[str, ...] = ()
    shape: Literal["text", "list", "mapping", "null"] = "text"


def read_config(path: str) -> list[Entry]:
    """The entries of the file, in its order. Raises UserError when it cannot be read or is no mapping."""
    try:
        text = read_bytes(read_path(path), MOST_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); --config takes a YAML or JSON file") from None
    except Unreadable as error:
        raise UserError(f"{path}: {error}; --config takes a YAML or JSON file") from None
    except ValueError:  # UnicodeDecodeError, or a NUL in the path
        raise UserError(f"{path}: is not UTF-8 text; --config takes a YAML or JSON file") from None
    read = _read_json if path.lower().endswith(".json") else _read_yaml
    try:
        return _entries(path, list(read(path, text)))
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply") from None


def _entries(path: str, items: list[tuple[str, Any]]) -> list[Entry]:
    _check_count(path, len(items))
    entries: dict[str, Entry] = {}
    faults = []
    for key, value in items:
        name = key.replace("-", "_")
        if name in entries:
            faults.append(f"{path}: {key} is given twice")
        entries[name] = read_entry(name, f"{path}: {key}", value)
    if faults:
        raise UserError(*faults)
    return list(entries.values())


def _check_count(path: str, count: int) -> None:
    if count > MOST_SETTINGS:
        raise UserError(f"{path}: holds {count:,} settings, more than exist; --config takes those of one run")


def read_entry(name: str, label: str, value: Any) -> Entry:
    """The entry of one value, as JSON or YAML holds it. Raises UserError for what is neither text nor number."""
    if count_parts(value, _parts_of, MOST_ITEMS) > MOST_ITEMS:
        raise UserError(f"{label}: holds more than {MOST_ITEMS:,} items, or refers to itself")
    try:
        if value is None:
            return Entry(name, label, shape="null")
        if isinstance(value, dict):
            return Entry(name, label, (as_text(value),), "mapping")
        if isinstance(value, list):
            return Entry(name, label, tuple(as_text(item) for item in value), "list")
        return Entry(name, label, (as_text(value),))
    except (TypeError, ValueError):  # a date, a set, not-a-number or a reference to itself
        raise UserError(f"{label}: has a value that is not text, a number, true/false, a list or a mapping") from None


def _parts_of(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _read_json(path: str, text: str) -> Iterator[tuple[str, Any]]:
    repeated: list[str] = []

    def pairs_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        repeated.extend(key for key, count in counts.items() if count > 1)
        return dict(pairs)

    try:
        values = json.loads(text, object_pairs_hook=pairs_once)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: is not valid JSON ({error.msg})") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f'{path}: must be a mapping such as {{"beta": 0.1}}')
    if repeated:
        raise UserError(*(f"{path}: {key} is given twice" for key in repeated[:SHOWN]))
    yield from values.items()


def _read_yaml(path: str, text: str) -> Iterator[tuple[str, Any]]:
    try:
        import yaml
    except ImportError:
        raise UserError(f"{path}: reading YAML needs PyYAML: pip install pyyaml, or write the file as .json") from None

    try:
        loader = _strict_loader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}: must be a mapping, one `name: value` per line")
        _check_count(path, len(root.value))
        if count_parts(root, parts_of_yaml, MOST_ITEMS) > MOST_ITEMS:
            raise UserError(
                f"{path}: its anchors and merge keys expand to more than {MOST_ITEMS:,} values, or to themselves"
            )
        seen: dict[str, int] = {}
        for key, value in root.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{path} line {line}: the key must be the name of a setting")
            if key.value in seen:
                raise UserError(f"{path} line {line}: {key.value} is given twice (also on line {seen[key.value]})")
            seen[key.value] = line
            yield key.value, _yaml_value(loader, value)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or in_one_line(error)
        raise UserError(f"{path}{where}: is not valid YAML ({reason})") from None
    except ValueError as error:  # what a tag promises and the value does not keep, such as `!!int x`
        raise UserError(f"{path}: is not valid YAML ({error})") from None


def _yaml_value(loader: Any, node: Any) -> Any:
    """Scalars as the text in the file, one level into lists; mappings and deeper lists as values."""
    if node.id == "scalar":
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if node.id == "sequence":
        return [_yaml_value(loader, item) if item.id == "scalar" else _nested(loader, item) for item in node.value]
    return _nested(loader, node)


def _nested(loader: Any, node: Any) -> Any:
    """The value of a node. Raises ValueError, or an error of YAML, for a tag whose promise the value does not keep."""
    try:
        return loader.construct_object(node, deep=True)
    except (LookupError, AttributeError, ArithmeticError) as error:  # `!!bool x`, `!!int ""`, `!!timestamp x`
        raise ValueError(f"a value does not match its tag: {type(error).__name__}: {error}") from None


def _strict_loader(text: str) -> Any:
    """A safe YAML loader that reads 5e-5 as a number (YAML 1.1 wants 5.0e-5) and refuses a key that stands twice."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and counts[key.value] > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            return super().construct_mapping(node, deep)

    number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return StrictLoader(text)
