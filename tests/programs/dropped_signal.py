"""The script, asked to stop where Python drops what a signal's handler raises: in a finalizer.

    python tests/programs/dropped_signal.py PLACE [flags of advanced_dpo_script.py]

SIGTERM comes when PLACE is come to: a package that is imported, or a function (its whole name) that is called.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from pydoc import locate

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "advanced_dpo_script.py"


class Asking:
    """Asks this process to stop when it is let go of."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):  # within which Python runs the signal's handler
            pass


class AskingAtImport:
    """Of `sys.meta_path`: asks when a package is looked for, which others then find."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name == self.package:
            Asking()


def ask_at_call(name: str) -> None:
    """Has a function ask before it does its work."""
    owner, _, attribute = name.rpartition(".")
    real = getattr(locate(owner), attribute)

    def called(*arguments, **options):
        Asking()
        return real(*arguments, **options)

    setattr(locate(owner), attribute, called)


if __name__ == "__main__":
    place, sys.argv = sys.argv[1], [SCRIPT, *sys.argv[2:]]
    sys.path.insert(0, str(ROOT))
    if "." in place:
        ask_at_call(place)
    else:
        sys.meta_path.insert(0, AskingAtImport(place))
    runpy.run_path(str(ROOT / SCRIPT), run_name="__main__")
