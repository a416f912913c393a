"""What fits where: models of seven sizes on four kinds of machine, by the planner, nothing downloaded.

    python benchmarks/plan.py --table            some minutes; prints the table and writes it to runs/bench/

Shapes of published models (shapes.json: Qwen2.5 0.5B, 14B and 32B, Llama 3.2 1B and 3B, Llama 3.1 8B and 70B); pairs
with lengths of real instructions; 32 pairs an optimizer step on each device.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from utils.planning.estimate import Division, Estimate, estimate  # noqa: E402
from utils.planning.hardware import GIB, Device, find_device_by_name  # noqa: E402
from utils.planning.paper_model import Way  # noqa: E402
from utils.settings.training import LoraSettings  # noqa: E402

SHAPES = json.loads((HERE / "shapes.json").read_text(encoding="utf-8"))
MACHINES = {
    "1 x 24 GB": ("RTX 4090", 1),
    "1 x 80 GB": ("H100 80GB", 1),
    "8 x 80 GB": ("H100 80GB", 8),
    "4 nodes x 8 x 80 GB": ("H100 80GB", 32),
}
STEP = 32  # pairs of an optimizer step on each device
BATCHES = (8, 4, 2, 1)
EFFICIENCY = 0.4
KINDS = {"full": (False, False), "LoRA": (True, False), "QLoRA": (True, True)}
LENGTHS = [tuple(pair) for pair in json.loads((HERE / "lengths.json").read_text(encoding="utf-8"))["instructions"]]
COLUMNS = ("model", "machine", "the best that fits", "GiB", "by part, GiB", "pairs/s")
HEADER = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]


def make_table() -> Iterator[str]:
    """The rows, one after the other."""
    pairs = sorted((p for p in LENGTHS if p[0] + max(p[1:]) <= 1024 and min(p) > 1), key=sum, reverse=True)
    mean = sum(map(sum, pairs)) / len(pairs)
    yield from HEADER
    for model, shape in SHAPES.items():
        for machine, (name, count) in MACHINES.items():
            yield row(model, machine, find_best(shape, find_device_by_name(name), count, pairs), count, name, mean)


def find_best(shape: dict, device: Device, count: int, pairs: list) -> tuple[str, str, Estimate] | None:
    """All weights before an adapter, that before 4 bits; the largest micro-batch; recomputing only where it must be."""
    config = AutoConfig.for_model(**shape)
    for kind, (use_lora, in_4bit) in KINDS.items():
        for sharding in ["none", "fsdp2"] if count > 1 else ["none"]:
            for batch in BATCHES:
                for checkpointing in (False, True):
                    reference = "policy" if use_lora else "ahead"
                    way = Way(
                        config, torch.bfloat16, use_lora, in_4bit, LoraSettings(), checkpointing, reference, on_gpu=True
                    )
                    longest = [pairs[index] for index in range(batch)]
                    needs = estimate(way, longest, STEP // batch, device.reserved, Division(sharding, count))
                    if needs.fits(device):
                        return kind, sharding, replace(needs, way=way)
                    held = sum(needs.parts[part] for part in ("weights", "adapter", "optimizer", "reference"))
                    if held + needs.base > device.memory:
                        break  # no micro-batch is small enough
                else:
                    continue
                break
    return None


def row(model: str, machine: str, best: tuple | None, count: int, name: str, mean: float) -> str:
    """One line of the table. `mean`: tokens of a pair on average."""
    if best is None:
        return f"| {model} | {machine} | nothing | | | |"
    kind, sharding, needs = best
    words = [kind, *(["checkpointing"] if needs.way.checkpointing else [])]
    words += [sharding] if sharding != "none" else ["DDP"] if count > 1 else []
    words.append(f"micro-batches of {needs.batch}")
    parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in needs.parts.items() if size > 0.05 * GIB)
    rate = find_device_by_name(name).rate * EFFICIENCY * count
    speed = rate / (needs.flops / needs.tokens * mean)
    return f"| {model} | {machine} | {', '.join(words)} | {needs.peak / GIB:.1f} | {parts} | {speed:,.1f} |"
