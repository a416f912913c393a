"""The program as a person starts it: the script in its repository, or the command of an installed copy."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError

SCRIPT = "advanced_dpo_script.py"
COMMAND, PACKAGE = "dpo-train", "advanced_dpo"  # what setup.py and pyproject.toml call it where it is installed
NEEDED = ("numpy", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "scipy")
HERE = Path(__file__).resolve().parents[1]
INSTALLED = not (HERE.parent / SCRIPT).is_file()
ROOT = HERE if INSTALLED else HERE.parent  # examples/ lies here


def path_from_here(name: str, folder: str | Path = ".") -> str:
    """A file that comes with the program, as it is reached from the working folder, or from another."""
    return name if os.path.realpath(folder) == str(ROOT) else str(ROOT / name)


def name_of_program(folder: str | Path = ".") -> str:
    """The script as it is reached from the working folder, or from another; the command where it is installed."""
    return COMMAND if INSTALLED else path_from_here(SCRIPT, folder)


def join_command(arguments: Sequence[str], launcher: Sequence[str] = ("python",), program: str | None = None) -> str:
    """The command line that starts the program with these arguments.

    Args:
        launcher: the words in front of the script: `python`, or those of `accelerate launch` or torchrun.
        program: as `name_of_program` gives it; by default, from here.
    """
    program = program or name_of_program()
    if program == COMMAND:
        return shlex.join([*([COMMAND] if list(launcher) == ["python"] else [*launcher, "-m", PACKAGE]), *arguments])
    return shlex.join([*launcher, program, *arguments])


def check_installed() -> None:
    """Looks for the packages that every verb with a model imports, before the first of them is.

    Raises:
        UserError: one is not installed.
    """
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(explain_missing(missing[0]))


def explain_missing(package: str) -> str:
    """One line: this Python lacks the package, and what to run instead."""
    found = f"the package {package} is not installed for {sys.executable}"
    if INSTALLED:
        return f"{found}: pip install {package}"
    for python in (".venv/bin/python", ".venv/Scripts/python.exe"):
        if (ROOT / python).is_file() and Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
            return f"{found}. Run {path_from_here(python)} {name_of_program()} ..., or activate .venv first"
    requirements = path_from_here("requirements.txt")
    return f"{found}. Run `make demo`, which makes .venv with all it needs, or pip install -r {requirements}"


def words_of_launcher(words: Sequence[str]) -> list[str] | None:
    """The words of a process's command line up to the program; None where it does not start the program."""
    for number, word in enumerate(words):
        as_module = word in ("-m", "--module") and words[number + 1 : number + 2] == [PACKAGE]
        if as_module or Path(word).name in (SCRIPT, COMMAND):
            return [before for before in words[:number] if before not in ("--no-python", "--no_python")]
    return None
