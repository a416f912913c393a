"""Functions of a person's own, named as file.py:function: loaded when they are named, their failures in one line."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.paths import read_path


def path_of(spec: str) -> Path:
    """The file of "file.py:function"."""
    return read_path(spec.rpartition(":")[0]).absolute()


def load_function(flag: str, spec: str) -> Callable[..., Any]:
    """The function that `flag` names as "file.py:function".

    Raises:
        UserError: there is no such file or function, or the file cannot be run.
    """
    flag, name, path = f"{flag} {spec}", spec.rpartition(":")[2], path_of(spec)
    if ":" not in spec or not name.isidentifier():
        raise UserError(f"{flag}: must be file.py:function")
    if not path.is_file():
        raise UserError(f"{flag}: there is no file {path}")
    module_spec = importlib.util.spec_from_file_location(f"user_code_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{flag}: {path} is no Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.path.insert(0, str(path.parent.resolve()))  # as for a script, so that it can import what lies beside it
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # sys.exit would end the run, as done where it gives 0
        raise UserError(f"{flag}: {path.name} cannot be run: {describe_failure(error, path)}") from None
    finally:
        sys.path.remove(str(path.parent.resolve()))
    function = getattr(module, name, None)
    if not callable(function):
        named = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{flag}: {path.name} has no function {name}; it has: {', '.join(named) or 'none'}")
    return function


def describe_failure(error: BaseException, path: Path, with_text: bool = True) -> str:
    """The error in one line: its name, its text, and the last line of the file at `path` that it passed."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    text = " ".join(str(error).split())[:200] if with_text else ""
    where = f" at {path.name} line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{': ' * bool(text)}{text}{where}"
