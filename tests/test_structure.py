"""The house: imports run one way, the floor stands on nothing of ours, and tests stand by what they test."""

from __future__ import annotations

import ast
import fnmatch
import re
import sys
from pathlib import Path

import pytest
from shared.runs import ROOT

from utils.settings.registry import ROWS

UTILS = ROOT / "utils"
# Each room may import those before it in this table.
FLOOR = ["errors", "console", "interruptions", "runtime", "libraries", "engine", "objectives"]
ORDER = [
    *FLOOR,
    "progress",
    "distributed",
    "settings",
    "run",
    "arguments",
    "user_code",
    "report",
    "status",
    "data",
    "models",
    "responses",
    "inspection",
    "training",
    "api",
]
STORIES = {verb.run.partition(":")[0] for verb in ROWS}
# Beyond that order stand the rooms of single verbs, which may import any of those before and are imported by none.
OF_VERBS = {story.partition(".")[0] for story in STORIES} - set(ORDER)
# Tables, which any room may read: they import the standard library alone.
TABLES = {"data.layouts"}
FILES = sorted(UTILS.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(UTILS).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports, its own left out; all imports within utils/ are relative."""
    found, depth = set(), len(path.relative_to(UTILS).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.partition(".")[0] == "utils"], path
        elif isinstance(node, ast.ImportFrom):
            assert node.level or (node.module or "").partition(".")[0] != "utils", f"{path}: import relatively"
            if node.level == depth and node.module not in TABLES:
                found |= {node.module.partition(".")[0]} if node.module else {alias.name for alias in node.names}
    return found - {room(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = room(path)
    if own == "__init__":
        assert not imported_rooms(path)
        return
    beyond = own in {*OF_VERBS, "__main__"}
    assert own in ORDER or beyond, f"{own} is a new room: give it a place in ORDER, or a row in the registry of verbs"
    for other in imported_rooms(path):
        assert other in ORDER, f"{own} must not import {other}"
        assert beyond or ORDER.index(other) < ORDER.index(own), f"{own} must not import {other}"


@pytest.mark.parametrize("name", sorted(TABLES))
def test_tables_import_the_standard_library_alone(name):
    path = UTILS / f"{name.replace('.', '/')}.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.names[0].name if isinstance(node, ast.Import) else "." * node.level + (node.module or "")
            assert module.partition(".")[0] in sys.stdlib_module_names, module


@pytest.mark.parametrize("name", FLOOR)
def test_the_floor_imports_nothing_of_ours(name):
    for path in FILES:
        assert room(path) != name or not imported_rooms(path)


def test_only_the_story_of_a_verb_knows_all_stages():
    for path in set(FILES) - {UTILS / f"{story.replace('.', '/')}.py" for story in STORIES}:
        assert len({"data", "models", "training", "arguments"} & {room(path), *imported_rooms(path)}) < 4, path


def test_every_test_file_is_named_where_tests_of_its_room_are():
    """In tests/README.md: a room's files under its heading, and nothing that is not there."""
    _, *parts = re.split(r"^## ", (ROOT / "tests" / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = {part.partition("\n")[0].strip("`/"): re.findall(r"`(test_[\w*]+\.py)`", part) for part in parts}
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    folders = {file.parent.name for file in files} - {"tests"}
    assert {name for name in named if (UTILS / name).is_dir()} == folders
    for file in files:
        names = named["Of no single room" if file.parent.name == "tests" else file.parent.name]
        assert any(fnmatch.fnmatch(file.name, name) for name in names), file
    for name in (name for names in named.values() for name in names):
        assert any(fnmatch.fnmatch(file.name, name) for file in files), name


def test_no_test_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not re.match(r"conftest$|test_|tests\b", node.module or ""), path
