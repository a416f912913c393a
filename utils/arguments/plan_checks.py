"""What single values of the verb plan cannot show."""

from __future__ import annotations

from collections.abc import Iterator

from utils.arguments.candidate import Candidate, Check


def planned_model(candidate: Candidate) -> Iterator[str]:
    if candidate["model_name_or_path"] is None and "model_name_or_path" not in candidate.broken:
        yield "--model_name_or_path is missing: name a hub model, or a folder with its config.json"
    if candidate["measure"] and candidate["dataset_name"] is None:
        yield f"{candidate.label('measure')}: takes steps on real pairs; name them with --dataset_name"


def planned_device(candidate: Candidate) -> Iterator[str]:
    for name in candidate.given("gpu_memory", "gpu_tflops"):
        if candidate["gpu"] is not None:
            yield f"{candidate.label(name)}: --gpu says what the device has; leave out one of the two"
    if (candidate["gpu_memory"] is None) != (candidate["gpu_tflops"] is None):
        yield "--gpu_memory and --gpu_tflops describe a device together; give both"
    if candidate["measure"] and candidate.given("gpu", "gpu_memory", "gpu_tflops"):
        yield f"{candidate.label('measure')}: measures this machine, not another; leave out one of the two"


def planned_sharding(candidate: Candidate) -> Iterator[str]:
    if candidate["sharding"] not in (None, "none") and candidate["num_devices"] == 1:
        yield f"{candidate.label('sharding')}: needs several devices to divide among; give --num_devices"


PLAN_CHECKS: dict[Check, tuple[str, ...]] = {
    planned_model: (),
    planned_device: ("gpu", "gpu_memory", "gpu_tflops"),
    planned_sharding: ("sharding", "num_devices"),
}
