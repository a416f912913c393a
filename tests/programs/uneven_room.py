"""The script with --auto_batch_size, where each process has room for so many tokens in a micro-batch.

    torchrun --nproc_per_node 2 tests/programs/uneven_room.py TOKENS_OF_THE_FIRST TOKENS_OF_THE_SECOND [flags]

What a size takes and how fast it is are given numbers; what is computed is what the script computes. Training a larger
micro-batch than there is room for runs out of memory.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
PER_TOKEN = 2**30 // 100  # bytes

if __name__ == "__main__":
    import torch

    import advanced_dpo_script
    from utils.training import batch_size
    from utils.training.trainer import PreferenceTrainer

    room = int(sys.argv[1 + int(os.environ["RANK"])])
    compute_part, measure_speed, computed = PreferenceTrainer.compute_part, batch_size._Search._measure_speed, []

    class Counted(batch_size.Peak):
        def __exit__(self, *_):
            super().__exit__()
            self.bytes = PER_TOKEN * computed[-1]

    def limited(self, model, part, *arguments):
        if part["input_ids"].numel() > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute_part(self, model, part, *arguments)

    def counted(self, batch):
        computed.append(batch["input_ids"].numel())
        measure_speed(self, batch)
        return 1000.0 * computed[-1]  # the more, the faster

    PreferenceTrainer.compute_part = limited
    batch_size.Peak = Counted
    batch_size._Search._room = lambda _: PER_TOKEN * room
    batch_size._Search._measure_speed = counted
    sys.exit(advanced_dpo_script.main(sys.argv[3:]))
