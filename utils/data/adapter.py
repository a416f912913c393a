"""--dataset_adapter file.py:function: a person's own function from a row to pairs. Runs only when it is named."""

from __future__ import annotations

import ast
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..user_code import describe_failure, load_function, path_of
from .calls import BadRow
from .ranking import ADAPTER_SKIPS
from .scanning import name_of

# Errors that speak of the code and not of the data: their texts are few, and say what to fix.
OF_THE_CODE = (KeyError, AttributeError, NameError, TypeError, ImportError)


@functools.cache
def load_adapter(spec: str) -> Callable[[dict[str, Any]], Any]:
    """The function that "file.py:function" names. Raises UserError when there is none."""
    return load_function("--dataset_adapter", spec)


def read_code(spec: str) -> bytes:
    """What the file of an adapter says, and the files beside it that it imports, for the key of a cache."""
    first = path_of(spec)
    found: dict[Path, bytes] = {}
    waiting = [first]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found[path] = path.read_bytes()
            waiting += [file for name in _imported_names(found[path]) for file in _files_of(first.parent, name)]
    return b"".join(content for _, content in sorted(found.items()))


def _imported_names(code: bytes) -> Iterator[str]:
    """The first words of what a file imports, anywhere in it."""
    with contextlib.suppress(SyntaxError, ValueError):  # which running it says
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.partition(".")[0]


def _files_of(folder: Path, name: str) -> list[Path]:
    """The files of a module or package of that name in the folder."""
    file = folder / f"{name}.py"
    return [*([file] if file.is_file() else []), *sorted((folder / name).rglob("*.py"))]


def run_adapter(spec: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pairs that the adapter makes of one row.

    Raises BadRow when it leaves the row out, fails, or gives something else.
    """
    try:
        made = load_adapter(spec)(dict(row))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        failure = describe_failure(error, path_of(spec), with_text=isinstance(error, OF_THE_CODE))
        raise BadRow(f"the adapter failed: {failure}") from None
    made = [made] if isinstance(made, Mapping) else made
    if made is None or made == []:
        raise BadRow(ADAPTER_SKIPS)
    if not isinstance(made, list | tuple) or not all(isinstance(pair, Mapping) for pair in made):
        found = name_of(made[0] if isinstance(made, list | tuple) else made)
        raise BadRow(f"the adapter gave {found}, not a pair (a dict with prompt, chosen, rejected), a list, or None")
    return [dict(pair) for pair in made]
