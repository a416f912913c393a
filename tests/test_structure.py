"""The house: imports run one way, and the floor stands on nothing of ours."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

# Each room may import those before it in its own line of this table, and the floor.
FLOOR = [
    "errors",
    "bounded",
    "flags",
    "data_settings",
    "use_settings",
    "settings",
    "console",
    "runtime",
    "memory",
    "interruptions",
]
ORDER = [
    *FLOOR,
    "paths",
    "pushing",
    "user_code",
    "allowed_changes",
    "arguments",
    "records",
    "saving",
    "manifests",
    "kept",
    "checkpoints",
    "output_folder",
    "state",
    "processes",
    "recorded_command",
    "folder_lock",
    "tracking",
    "report",
    "status",
    "situations",
    "data",
    "models",
    "runs",
    "inspection",
    "drawing",
    "generation",
    "scorers",
    "chatting",
    "judging",
    "ballots",
    "voting",
    "making",
    "training",
    "comparing",
    "planning",
    "merging",
    "evaluation",
]
FILES = sorted((ROOT / "utils").rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT / "utils").parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("utils.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = room(path)
    if own == "__init__":
        assert not imported_rooms(path)
        return
    assert own in ORDER, f"{own} is a new room: give it a place in ORDER"
    for other in imported_rooms(path) - {own}:
        assert other in ORDER
        assert ORDER.index(other) < ORDER.index(own), f"{own} must not import {other}"


@pytest.mark.parametrize("name", FLOOR)
def test_the_floor_imports_nothing_of_ours(name):
    assert imported_rooms(ROOT / "utils" / f"{name}.py") <= {"flags", "data_settings", "use_settings"} - {name}


def test_only_the_script_knows_all_stages():
    for path in FILES:
        assert len({"data", "models", "training", "arguments"} & imported_rooms(path)) < 4, path
