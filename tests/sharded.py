"""The script under FSDP2 on CPUs: accelerate offers sharding to accelerators alone, torch shards anywhere.

    torchrun --nproc_per_node 2 tests/sharded.py [flags of advanced_dpo_script.py]

Only accelerate's choice of the kind of distribution is overruled; wrapping, saving and clipping are its own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ |= {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

as_before = AcceleratorState.__init__


def shard(self, *arguments, fsdp_plugin=None, **options) -> None:
    """Chooses FSDP where accelerate would choose replicas."""
    as_before(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # where accelerate keeps it too


AcceleratorState.__init__ = shard

if __name__ == "__main__":
    from torch.distributed.tensor import DTensor
    from transformers import TrainerCallback
    from transformers import trainer as transformers_trainer

    import advanced_dpo_script

    class Witness(TrainerCallback):
        """Writes down whether the parameters that train are shards: one file a process in the output folder."""

        def on_train_end(self, args, state, control, model=None, **_):
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            sharded = bool(trained) and all(isinstance(parameter, DTensor) for parameter in trained)
            Path(args.output_dir, f"sharded-{args.process_index}").write_text(str(sharded))

    transformers_trainer.DEFAULT_CALLBACKS.append(Witness)
    sys.exit(advanced_dpo_script.main(sys.argv[1:]))
