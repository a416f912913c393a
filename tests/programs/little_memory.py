"""The script on a machine that runs out of memory: a limit is set on the process when training begins.

    python tests/programs/little_memory.py MEBIBYTES [flags of advanced_dpo_script.py]

Beyond so many mebibytes more than the process then has, the system gives it none (RLIMIT_DATA; Linux).
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    import psutil
    from transformers import TrainerCallback
    from transformers import trainer as transformers_trainer

    import advanced_dpo_script

    class Limit(TrainerCallback):
        """Sets the limit before the first step."""

        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 0:
                from utils.engine.memory import release_memory

                release_memory()
                most = psutil.Process().memory_info().data + int(sys.argv[1]) * 2**20
                resource.setrlimit(resource.RLIMIT_DATA, (most, most))

    transformers_trainer.DEFAULT_CALLBACKS.append(Limit)
    sys.exit(advanced_dpo_script.main(sys.argv[2:]))
