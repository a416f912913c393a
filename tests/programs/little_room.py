"""The script with room for so many tokens of a micro-batch, and no more, in one of its processes.

    torchrun --nproc_per_node 2 tests/programs/little_room.py TOKENS [flags of advanced_dpo_script.py]

Memory runs out in the backward pass of larger micro-batches in the process with rank 1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    import torch

    import advanced_dpo_script
    from utils.training.trainer import PreferenceTrainer

    compute_loss = PreferenceTrainer.compute_loss

    def limited(self, model, inputs, *arguments, **options):
        loss = compute_loss(self, model, inputs, *arguments, **options)
        if os.environ.get("RANK") == "1" and inputs["input_ids"].numel() > int(sys.argv[1]):
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

            def run_out(_):
                handle.remove()
                raise torch.OutOfMemoryError("CUDA out of memory.")

            handle = trained[len(trained) // 2].register_hook(run_out)
        return loss

    PreferenceTrainer.compute_loss = limited
    sys.exit(advanced_dpo_script.main(sys.argv[2:]))
