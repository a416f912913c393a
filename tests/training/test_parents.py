"""What the trainers override of transformers and TRL: an upgrade that changes it names what to read.

After reading, `python tests/training/test_parents.py` records the parents as they are now.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).with_name("parents.json")
LIBRARIES = ("transformers", "trl")


def is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "utils"


def overrides() -> Iterator[tuple[type, str, type]]:
    """A class of ours, the name of what it overrides, and a class of a library that has it: all of them, since each may
    call the next."""
    from utils.training.trainer import ImitationTrainer, PreferenceTrainer

    for trainer in (PreferenceTrainer, ImitationTrainer):
        order = trainer.__mro__[:-1]  # without object
        for own in filter(is_ours, order):
            for name in [name for name in vars(own) if name == "__init__" or not name.startswith("__")]:
                for parent in order[order.index(own) :]:
                    if name in vars(parent) and not is_ours(parent):
                        yield own, name, parent


def describe(value: Any) -> dict[str, str]:
    """The parameters and a hash of the source of a method; of anything else, what it is."""
    value = value.fget if isinstance(value, property) else inspect.unwrap(getattr(value, "__func__", value))
    if not inspect.isfunction(value):
        return {"value": repr(value)}
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = [
        f"{marks.get(part.kind, '')}{part.name}{'' if part.default is part.empty else '=...'}"
        for part in inspect.signature(value).parameters.values()
    ]
    source = textwrap.dedent(inspect.getsource(value))
    return {"parameters": ", ".join(parameters), "sha256": hashlib.sha256(source.encode()).hexdigest()}


def parents() -> dict[str, Any]:
    """What is overridden, as it is in the libraries that are installed."""
    found = {f"{parent.__module__}.{parent.__name__}.{name}": describe(vars(parent)[name])
             for _, name, parent in overrides()}  # fmt: skip
    return {"versions": {name: version(name) for name in LIBRARIES}, "overridden": dict(sorted(found.items()))}


def test_what_is_overridden_is_as_it_was_read():
    recorded, now = json.loads(RECORDED.read_text(encoding="utf-8")), parents()
    before, found = recorded["overridden"], now["overridden"]
    changed = sorted(name for name in before.keys() | found.keys() if before.get(name) != found.get(name))
    if not changed:
        return
    said = ", ".join(f"{name} {number}" for name, number in now["versions"].items())
    told = f"{said}: read what is overridden there, then record it ({RECORDED.name}): {', '.join(changed)}"
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pinned = {name: re.search(rf"^{name}==([\w.]+)", requirements, re.M)[1] for name in LIBRARIES}  # of a new Python
    if now["versions"] not in (pinned, recorded["versions"]):
        pytest.skip(told)  # an older Python gets older releases
    pytest.fail(told)


def test_overrides_take_what_their_parents_take():
    for own, name, parent in overrides():
        ours, theirs = vars(own)[name], vars(parent)[name]
        if name == "__init__" or not inspect.isfunction(ours) or not inspect.isfunction(theirs):
            continue
        parts, signature = inspect.signature(theirs).parameters.values(), inspect.signature(ours)
        if any(part.kind == part.VAR_POSITIONAL for part in parts):
            continue  # passes on what it gets
        try:
            signature.bind(*[None] * len(parts))
        except TypeError:
            signature.bind(None, **dict.fromkeys([part.name for part in parts][1:]))  # one that is called by names


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(ROOT))
    RECORDED.write_text(json.dumps(parents(), indent=2) + "\n", encoding="utf-8")
