"""What single values of the verb plan cannot show."""

from __future__ import annotations

from collections.abc import Iterator

from .candidate import Candidate, Check


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
    sharding, offload, several = candidate["sharding"], candidate["offload"], candidate["num_devices"] > 1
    if offload is None and sharding not in (None, "none") and not several:
        yield f"{candidate.label('sharding')}: needs several devices to divide among; give --num_devices"
    able = OFFLOADING.get(offload, ())
    if not several:
        able = tuple(name for name in able if name.startswith("zero"))  # FSDP does not run in one process
    if offload is not None and sharding is not None and sharding not in able:
        where = "" if several else " on one device"
        yield f"{candidate.label('offload')} {offload}{where}: takes --sharding {' or '.join(able)}, not {sharding}"


# What can hold in main memory what --offload names.
OFFLOADING = {"optimizer": ("zero2", "zero3"), "weights": ("zero3", "fsdp2")}

PLAN_CHECKS: dict[Check, tuple[str, ...]] = {
    planned_model: (),
    planned_device: ("gpu", "gpu_memory", "gpu_tflops"),
    planned_sharding: ("sharding", "num_devices", "offload"),
}
