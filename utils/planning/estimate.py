"""What a way of training needs: a step walked through with few layers, then all layers and all devices."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .hardware import Device, in_glibc_before
from .padded import PartLengths
from .padded import attention_flops as padded_attention_flops
from .paper_model import Way, make_policy
from .walk import (
    ACTIVATIONS,
    ADAPTER,
    FORWARD,
    GRADIENTS,
    LOGITS,
    OPTIMIZER,
    PARTS,
    REFERENCE,
    WEIGHTS,
    Walk,
    attention_flops,
    walk_step,
)

# Layers that are walked through where all are alike: at a single one the peak may be the head's, at two that of the
# first layer, whose input needs no gradient.
FEW = (3, 4)
MARGIN = 1.05  # of a GPU's memory: what its allocator leaves unused between blocks
# On a CPU, what the C library holds unused, per byte of activations and logits that a step without checkpointing has at
# its peak (with it, as many blocks come and go), as measured runs have it (docs/planning.md). In glibc before 2.39
# aligned blocks, as all of PyTorch's are, leave remainders when they are freed that keep others from fitting there (its
# bug 30723). Where all weights are trained, their gradients fill some of the room.
HEAP, HEAP_ALL_WEIGHTS = (0.5, 0.35) if in_glibc_before(2, 39) else (0.1, 0.1)
COMES_AND_GOES = (ACTIVATIONS, LOGITS)
# What each kind of sharding divides among the devices.
SHARDED = {
    "none": (),
    "zero1": (OPTIMIZER,),
    "zero2": (OPTIMIZER, GRADIENTS),
    "zero3": (OPTIMIZER, GRADIENTS, WEIGHTS, REFERENCE, ADAPTER),
    "fsdp2": (OPTIMIZER, GRADIENTS, WEIGHTS, REFERENCE, ADAPTER),
}
DEEPSPEED = ("zero1", "zero2", "zero3")
# What is offloaded to CPU memory: of ZeRO the gradients go there with the optimizer.
OFFLOADED = {"optimizer": (OPTIMIZER, GRADIENTS), "weights": (OPTIMIZER, GRADIENTS, WEIGHTS, REFERENCE, ADAPTER)}


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device at the moment when most is held, by part, and operations of one micro-batch."""

    way: Way
    batch: int  # pairs of a micro-batch; of sft, rows
    micro_batches: int  # of an optimizer step, on each device
    parts: Mapping[str, int]
    host: Mapping[str, int]  # of what is offloaded to CPU memory instead, for each device
    base: int  # what is held beside: the process, or the device's context
    spare: int  # what an allocator holds and nothing uses
    flops: int
    tokens: int
    parameters: int
    trainable: int

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.parts.values()) + self.spare + self.base

    def at_tokens(self, tokens: int) -> float:
        """About the peak with fewer tokens in a micro-batch: what grows with them grows in proportion."""
        held = self.base + sum(self.parts.get(part, 0) for part in (WEIGHTS, ADAPTER, REFERENCE, OPTIMIZER))
        return held + (self.peak - held) * tokens / self.tokens

    def fits(self, device: Device) -> bool:
        """Whether the device holds it."""
        return self.peak <= device.memory


@dataclass(frozen=True)
class Division:
    """How the parts of a step are divided among devices (SHARDED), and what is offloaded to CPU memory (OFFLOADED)."""

    sharding: str = "none"
    devices: int = 1
    offload: str | None = None


ALONE = Division()


def estimate(
    way: Way,
    pairs: Sequence[PartLengths],
    micro_batches: int,
    base: int,
    division: Division = ALONE,
    kept: int = 0,
) -> Estimate:
    """What a step takes whose micro-batches are all like these pairs; of sft, like these rows.

    Args:
        base: bytes that are held beside the model.
        kept: bytes that a reference leaves behind when it was scored ahead.

    Raises:
        UserError: the model cannot be made from its config, or not be walked through.
    """
    walk = walk_all_layers(way, pairs, micro_batches)
    shares = [_share_of_device(parts, way, walk, division) for parts in walk.moments.values()]
    parts = max((parts for parts, _ in shares), key=lambda parts: sum(parts.values()))
    host = {part: max(waiting[part] for _, waiting in shares) for part in shares[0][1]}
    if kept:
        parts["reference log-probs"] = kept
    flops = walk.flops + (padded_attention_flops if way.imitates else attention_flops)(way.config, pairs)
    spare = (
        round(sum(parts.values()) * (MARGIN - 1)) if way.on_gpu else _unused_by_heap(way, pairs, micro_batches, walk)
    )
    counts = (flops, walk.tokens, walk.parameters, walk.trainable)
    return Estimate(way, len(pairs), micro_batches, parts, host, base, spare, *counts)


def _share_of_device(
    parts: Mapping[str, int], way: Way, walk: Walk, division: Division
) -> tuple[dict[str, int], dict[str, int]]:
    """What one device holds of the parts of a step at some moment, and what waits for it in CPU memory."""
    parts, sharding, devices = dict(parts), division.sharding, division.devices
    host = {ACTIVATIONS: walk.offloaded} if walk.offloaded else {}
    if sharding in DEEPSPEED and way.dtype != torch.float32 and not way.use_lora:
        # DeepSpeed computes on 16-bit weights with gradients in 16 bits; its optimizer has the float32 weights.
        parts[OPTIMIZER] += parts[WEIGHTS]
        parts[WEIGHTS] //= 2
        parts[GRADIENTS] //= 2
    for part in SHARDED[sharding]:
        parts[part] = -(-parts[part] // devices)
    if sharding == "none" and devices > 1:
        parts["gradient buckets"] = 4 * walk.trainable  # in which DistributedDataParallel adds them up
    for part in OFFLOADED.get(division.offload, ()):
        host[part] = parts.pop(part)
    if WEIGHTS in SHARDED[sharding] and (devices > 1 or WEIGHTS in host):
        width = torch.finfo(way.dtype).bits // 8
        parts["gathered layers"] = 2 * walk.largest_layer * width  # the one at work and the one that comes next
    return parts, host


def _unused_by_heap(way: Way, pairs: Sequence[PartLengths], micro_batches: int, walk: Walk) -> int:
    if way.checkpointing:
        walk = walk_all_layers(replace(way, checkpointing=False), pairs, micro_batches)
    share = HEAP if way.use_lora else HEAP_ALL_WEIGHTS
    return round(sum(walk.parts[part] for part in COMES_AND_GOES) * share)


def pad_pairs(pairs: Sequence[PartLengths]) -> list[PartLengths]:
    """Lengths that put as many tokens through the model as padded rows, two for each pair, and as many to the head."""
    longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in pairs)
    return [(2 * longest - chosen - rejected, chosen, rejected) for _, chosen, rejected in pairs]


def walk_all_layers(way: Way, pairs: Sequence[PartLengths], micro_batches: int) -> Walk:
    """A step with all layers: where they are alike, by walking through few of them twice. Each is taken once."""
    key = (repr(way), way.config.to_json_string(), tuple(pairs), min(micro_batches, 2))
    if key not in _taken:
        _taken[key] = _walk_all_layers(way, pairs, micro_batches)
    return _taken[key]


_taken: dict[Any, Walk] = {}


def _walk_all_layers(way: Way, pairs: Sequence[PartLengths], micro_batches: int) -> Walk:
    layers = way.config.get_text_config().num_hidden_layers
    if layers <= FEW[1] or not layers_alike(way):
        return walk_step(way, pairs, micro_batches)
    low, high = (walk_step(replace(way, config=with_layers(way.config, count)), pairs, micro_batches) for count in FEW)

    def reach(at_low: float, at_high: float) -> int:
        return round(at_low + (at_high - at_low) * (layers - FEW[0]))

    moments = {
        phase: {part: reach(parts[part], high.moments[phase][part]) for part in PARTS}
        for phase, parts in low.moments.items()
    }
    offloaded = 0
    if way.offloads_activations:  # a layer's are moved while the next ones compute
        offloaded = moments[FORWARD][ACTIVATIONS] - high.moments[FORWARD][ACTIVATIONS]
        moments = {phase: {**parts, ACTIVATIONS: high.moments[phase][ACTIVATIONS]} for phase, parts in moments.items()}

    return Walk(
        moments=moments,
        offloaded=offloaded,
        flops=reach(low.flops, high.flops),
        tokens=low.tokens,
        parameters=reach(low.parameters, high.parameters),
        trainable=reach(low.trainable, high.trainable),
        largest_layer=low.largest_layer,
    )


def layers_alike(way: Way) -> bool:
    """Whether all layers of the model have the same parameters and attend in the same way."""
    types = getattr(way.config.get_text_config(), "layer_types", None) or []
    if len(set(types)) > 1:
        return False
    model = make_policy(replace(way, use_lora=False, in_4bit=False, checkpointing=False))
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    shapes = {tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()) for layer in layers}
    return len(layers) == way.config.get_text_config().num_hidden_layers and len(shapes) == 1


def with_layers(config: PretrainedConfig, count: int) -> PretrainedConfig:
    """The config of the same model with fewer layers."""
    fewer = copy.deepcopy(config)
    text: Any = fewer.get_text_config()
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    return fewer
