#!/usr/bin/env python
"""Fine-tunes a language model on preference pairs with DPO: LoRA, 4-bit or all weights, on CPU or GPU.

    python advanced_dpo_script.py [train] --model_name_or_path M --dataset_name D --output_dir O [flags]
    python advanced_dpo_script.py VERB [flags]; `VERB --help` lists the flags of each

Exit codes: 0 done, 2 user error (every fault is named), 3 `data` found problems, 130 interrupted, 1 anything else.

The command itself is utils/__main__.py; the stages of a training run are in utils/training/stages.py.
"""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder

FOLDER = os.path.dirname(os.path.realpath(__file__))
if FOLDER not in sys.path:  # PYTHONSAFEPATH and `python -I` leave it out
    sys.path.insert(0, FOLDER)


def load_package() -> str:
    """Makes the package in utils/ importable, and returns by which name.

    A program that imports this file may have a `utils` of its own, imported already or found first. That one keeps the
    name, and this package takes the one that it has where it is installed.
    """
    place = os.path.join(FOLDER, "utils", "__init__.py")
    found = sys.modules["utils"].__spec__ if "utils" in sys.modules else PathFinder.find_spec("utils")
    if found is not None and found.origin is not None and os.path.realpath(found.origin) == place:
        return "utils"
    name = "advanced_dpo"
    spec = importlib.util.spec_from_file_location(name, place)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return name


command = importlib.import_module(f"{load_package()}.__main__")
main, run = command.main, command.run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
