"""What libraries raise over the files that they read, as one readable line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..engine.memory import ran_out_of_memory
from ..errors import UserError
from .untrusted import explain_library

Loaded = TypeVar("Loaded")


def translating(fault: str, load: Callable[[], Loaded]) -> Loaded:
    """What `load` returns; the libraries' complaints about the files they read become one readable line.

    Every kind of exception: what a file from elsewhere makes a library stumble over has no end.
    """
    try:
        return load()
    except UserError:
        raise
    except Exception as error:
        if ran_out_of_memory(error):
            raise
        raise UserError(f"{fault}: {explain_library(error)}") from error
