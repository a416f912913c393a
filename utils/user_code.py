"""Functions of a person's own, named as file.py:function: loaded when they are named, their failures in one line."""

from __future__ import annotations

import builtins
import importlib.util
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError
from .run.paths import read_path

ROOT = Path(__file__).resolve().parent.parent


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
    _let_own_utils_be_found(path.parent.resolve())
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


class _ImportOfTheirs:
    """In place of `__import__`: a file in a folder that has a `utils` of its own gets that one, all others ours.

    Only one of the two can be in `sys.modules`: theirs is while such a file imports it, and is kept here afterwards.
    """

    def __init__(self) -> None:
        self.plain = builtins.__import__
        self.modules: dict[str, dict[str, Any]] = {}  # folder -> what was imported there as utils and utils.x
        self.lock = threading.RLock()
        self.at_work = False

    def __call__(
        self, name: str, globals: Any = None, locals: Any = None, fromlist: Sequence[str] = (), level: int = 0
    ) -> Any:
        folder = None
        if level == 0 and name.partition(".")[0] == "utils":
            file = str((globals or {}).get("__file__"))
            folder = max((folder for folder in self.modules if _lies_in(file, folder)), key=len, default=None)
        if folder is None:
            return self.plain(name, globals, locals, fromlist, level)
        with self.lock:
            if self.at_work:  # for a module of theirs that is being imported
                return self.plain(name, globals, locals, fromlist, level)
            self.at_work, ours, path = True, _take_utils(), sys.path
            sys.modules.update(self.modules[folder])
            sys.path = [folder, *(place for place in path if place != str(ROOT))]
            try:
                return self.plain(name, globals, locals, fromlist, level)
            finally:
                self.modules[folder] = _take_utils()
                sys.modules.update(ours)
                self.at_work, sys.path = False, path


def _let_own_utils_be_found(folder: Path) -> None:
    """Lets files in the folder import a `utils` that lies there, though the script has one too.

    It has to be a hook of `import`: a person's adapter, scorer or judge is a file beside their own code, which the
    script cannot ask them to rename; `utils` is the name that most projects have, this one too; and their file may
    import it at any time, within a function also, when ours is long in `sys.modules`. It is set only once such a folder
    is met, and an installed copy, or one that a program with a `utils` of its own imports, has another name and never
    needs it.
    """
    if __name__.partition(".")[0] != "utils":  # an installed copy has another name
        return
    if folder == ROOT or not ((folder / "utils.py").is_file() or (folder / "utils").is_dir()):
        return
    if not isinstance(builtins.__import__, _ImportOfTheirs):
        builtins.__import__ = _ImportOfTheirs()
    builtins.__import__.modules.setdefault(str(folder), {})


def _lies_in(file: str, folder: str) -> bool:
    """Whether a file is one of the person's, of this folder; the script itself may lie below it."""
    script_is_below = str(ROOT).startswith(folder + os.sep)
    return file.startswith(folder + os.sep) and not (script_is_below and file.startswith(str(ROOT) + os.sep))


def _take_utils() -> dict[str, Any]:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "utils"}


def describe_failure(error: BaseException, path: Path, with_text: bool = True) -> str:
    """The error in one line: its name, its text, and the last line of the file at `path` that it passed."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    text = " ".join(str(error).split())[:200] if with_text else ""
    where = f" at {path.name} line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{': ' * bool(text)}{text}{where}"
