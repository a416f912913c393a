"""`from advanced_dpo import train` in the repository, as in an installed copy, whose package has this name."""

import os
import sys

FOLDER = os.path.dirname(os.path.realpath(__file__))
if FOLDER not in sys.path:
    sys.path.insert(0, FOLDER)

from utils.api import FinishedRun, Interrupted, ProcessLost, UserError, sft, train  # noqa: E402

__all__ = ["FinishedRun", "Interrupted", "ProcessLost", "UserError", "sft", "train"]
