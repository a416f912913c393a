"""How a planned run is started: the words before the script's name."""

from __future__ import annotations

from ..run.program import path_from_here
from ..settings.verbs import PlanSettings

# Files of examples/accelerate for each kind of sharding; ZeRO-1 has none, as ZeRO-2 takes less and is as fast.
CONFIGS = {"none": "ddp", "zero2": "deepspeed_zero2", "zero3": "deepspeed_zero3", "fsdp2": "fsdp2"}
ZERO1 = [
    "--use_deepspeed",
    "--zero_stage",
    "1",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]


def words_before_script(plan: PlanSettings, sharding: str, in_4bit: bool) -> list[str]:
    """`python`, or `accelerate launch` with a launch config of the project where there is one."""
    if plan.num_devices == 1 and plan.offload is None:
        return ["python"]
    config = CONFIGS.get(sharding)
    if config == "fsdp2" and in_4bit:
        config = "fsdp2_qlora"
    words = ["--config_file", path_from_here(f"examples/accelerate/{config}.yaml")] if config else ZERO1
    if plan.offload is not None and sharding == "fsdp2":
        words = [*words, "--fsdp_offload_params", "true"]
    elif plan.offload is not None:
        words = [*words, "--offload_optimizer_device", "cpu"]
        words += ["--offload_param_device", "cpu"] if plan.offload == "weights" else []
    return ["accelerate", "launch", *words, "--num_processes", str(plan.num_devices)]
