#!/usr/bin/env python
"""Fine-tunes a language model on preference pairs with DPO: LoRA, 4-bit or all weights, on CPU or GPU.

    python advanced_dpo_script.py [train] --model_name_or_path M --dataset_name D --output_dir O [flags]
    python advanced_dpo_script.py VERB [flags]; `VERB --help` lists the flags of each

Exit codes: 0 done, 2 user error (every fault is named), 3 `data` found problems, 130 interrupted, 1 anything else.

The command itself is utils/__main__.py; the stages of a training run are in utils/training/stages.py.
"""

import os
import sys

FOLDER = os.path.dirname(os.path.realpath(__file__))
if FOLDER not in sys.path:  # PYTHONSAFEPATH and `python -I` leave it out
    sys.path.insert(0, FOLDER)

from utils.__main__ import main, run  # noqa: E402

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
