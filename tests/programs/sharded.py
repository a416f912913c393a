"""The script under FSDP2 on CPUs: accelerate offers sharding to accelerators alone, torch shards anywhere.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 2 tests/programs/sharded.py [flags]

Only accelerate's choice of the kind of distribution is overruled; wrapping, saving and clipping are its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    import advanced_dpo_script
    from utils.runtime import quiet_libraries

    quiet_libraries()

    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor
    from transformers import TrainerCallback
    from transformers import trainer as transformers_trainer

    as_before = AcceleratorState.__init__

    def shard(self, *arguments, fsdp_plugin=None, **options) -> None:
        """Chooses FSDP where accelerate would choose replicas."""
        as_before(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # where accelerate keeps it too

    class Witness(TrainerCallback):
        """Writes down whether all parameters are shards, also frozen ones: one file a process in the output folder."""

        def on_train_end(self, args, state, control, model=None, **_):
            sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
            Path(args.output_dir, f"sharded-{args.process_index}").write_text(str(sharded))

    AcceleratorState.__init__ = shard
    transformers_trainer.DEFAULT_CALLBACKS.append(Witness)
    sys.exit(advanced_dpo_script.main(sys.argv[1:]))
