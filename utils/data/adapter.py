"""--dataset_adapter file.py:function: a person's own function from a row to pairs. Runs only when it is named."""

from __future__ import annotations

import functools
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.data.ranking import ADAPTER_SKIPS
from utils.data.scanning import name_of
from utils.data.turns import BadRow
from utils.errors import UserError

# Errors that speak of the code and not of the data: their texts are few, and say what to mend.
OF_THE_CODE = (KeyError, AttributeError, NameError, TypeError)


@functools.cache
def load_adapter(spec: str) -> Callable[[dict[str, Any]], Any]:
    """The function that "file.py:function" names.

    Raises UserError when there is no such file or function, or the file cannot be run.
    """
    flag = f"--dataset_adapter {spec}"
    _, colon, name = spec.rpartition(":")
    path = _file_of(spec)
    if not colon or not name.isidentifier():
        raise UserError(f"{flag}: must be file.py:function, a function from a row to a pair")
    if not path.is_file():
        raise UserError(f"{flag}: there is no file {path}")
    module_spec = importlib.util.spec_from_file_location(f"dataset_adapter_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{flag}: {path} is no Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.path.insert(0, str(path.parent.resolve()))  # as for a script, so that it can import what lies beside it
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # sys.exit would end the run, as done where it gives 0
        raise UserError(f"{flag}: {path.name} cannot be run: {_describe(error, path)}") from None
    finally:
        sys.path.remove(str(path.parent.resolve()))
    function = getattr(module, name, None)
    if not callable(function):
        named = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{flag}: {path.name} has no function {name}; it has: {', '.join(named) or 'none'}")
    return function


def read_code(spec: str) -> bytes:
    """What the file of an adapter says, for the key of a cache."""
    return _file_of(spec).read_bytes()


def _file_of(spec: str) -> Path:
    return Path(spec.rpartition(":")[0]).expanduser().absolute()


def run_adapter(spec: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pairs that the adapter makes of one row.

    Raises BadRow when it leaves the row out, fails, or gives something else.
    """
    try:
        made = load_adapter(spec)(dict(row))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise BadRow(f"the adapter failed: {_describe(error, _file_of(spec))}") from None
    made = [made] if isinstance(made, Mapping) else made
    if made is None or made == []:
        raise BadRow(ADAPTER_SKIPS)
    if not isinstance(made, list | tuple) or not all(isinstance(pair, Mapping) for pair in made):
        found = name_of(made[0] if isinstance(made, list | tuple) else made)
        raise BadRow(f"the adapter gave {found}, not a pair (a dict with prompt, chosen, rejected), a list, or None")
    return [dict(pair) for pair in made]


def _describe(error: BaseException, path: Path) -> str:
    """The error's name, its text where that speaks of the code, and the last line of the adapter that it passed."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    text = f": {str(error)[:80]}" if isinstance(error, (*OF_THE_CODE, SyntaxError, ImportError)) else ""
    where = f" at {path.name} line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{text}{where}"
