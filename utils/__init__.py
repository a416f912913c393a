"""Fine-tuning of language models on preference pairs. Each folder is a room; imports between rooms run one way.

Which verbs there are, and the file in which each one begins, is said in settings/registry.py.
"""

import importlib
from typing import Any

__all__ = ["FinishedRun", "Interrupted", "ProcessLost", "UserError", "sft", "train"]
__version__ = "0.9.0"


def __getattr__(name: str) -> Any:
    """What Python programs use, imported when it is asked for: `from advanced_dpo import train`."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.api"), name)
