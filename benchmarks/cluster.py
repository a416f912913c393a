"""On paper: 8 to 512 GPUs, from counted operations, drawn lengths and published link speeds. Nothing here is measured.

    python benchmarks/cluster.py
    python benchmarks/cluster.py --models 8B --lengths dialogue --pairs_per_step 1024 --efficiency 0.5

Strong scaling keeps the pairs of an optimizer step, weak scaling the pairs of a GPU. Operations and memory of a step
are those that `plan` counts; how the pairs fall on processes is drawn from lengths of real pairs and shared out by the
code that shares them out in training. Every number that is assumed stands in front of the tables. Writes
runs/bench/cluster.md and cluster.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from utils.training.shares import share_out  # noqa: E402

GIB = 2**30
NODE = 8  # GPUs that NVLink joins
DRAWS = 20  # optimizer steps whose lengths are drawn for each row
COUNTS = (8, 16, 32, 64, 128, 256, 512)
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at once (PyTorch's bucket_cap_mb)
TRAININGS, LENGTHS = ("full", "LoRA"), ("dialogue", "instructions")
MEASURE = (1024, 512, 512)  # tokens of the pairs by which operations and activations are counted
STOPS = 0.5  # scaling has stopped where a GPU does less than this share of what it does in the best run

SHAPES = json.loads((HERE / "shapes.json").read_text(encoding="utf-8"))
USUAL = ("1B", "8B", "70B")  # of them


@dataclass(frozen=True)
class Cluster:
    """GPUs and links; rates in FLOP/s and bytes/s of one GPU in one direction, latencies in seconds.

    The defaults are of eight H100 SXM a node. From NVIDIA's data sheets: 989 TFLOP/s (bfloat16, dense), 80 GB at 3.35
    TB/s, NVLink 4 with 900 GB/s in both directions together, and of the DGX H100 one ConnectX-7 a GPU at 400 Gb/s (NDR
    InfiniBand). The two latencies, of a hop within a collective, and the shares are assumed.
    """

    memory: float = 80 * GIB
    rate: float = 989e12
    memory_rate: float = 3.35e12
    nvlink: float = 450e9
    infiniband: float = 50e9
    nvlink_latency: float = 3e-6
    infiniband_latency: float = 8e-6
    efficiency: float = 0.4  # of `rate`, where a micro-batch is large
    link_efficiency: float = 0.8
    overlap: float = 1.0  # share of the computing that communication can go on behind: 1 is the bound, 0 the other


@dataclass(frozen=True)
class Model:
    """What training takes that does not depend on how many do it: counted by `plan`'s walk through a step.

    Bytes by what they are; `share_bytes` are those that FSDP2 divides, `own_bytes` those that every GPU has, of which
    `per_token` come with each token of a micro-batch.
    """

    name: str
    training: str
    parameters: int
    trainable: int
    layers: int
    flops_per_token: float
    share_bytes: float
    own_bytes: float
    per_token: float
    gathered_bytes: float  # of the layers that are whole under FSDP2
    forwards: int  # passes through the weights of a micro-batch, forward or recomputed: policy, reference


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step, the mean over draws, taken apart: what it needs, and why it takes longer."""

    gpus: int
    pairs: int
    sharding: str
    micro_batch: int  # pairs, at most
    seconds: float
    ideal: float  # operations at the stated efficiency, evenly shared
    few_tokens: float  # micro-batches so small that reading the weights takes longer than computing
    imbalance: float  # waiting for the process with the most tokens
    communication: float  # bytes that are not hidden behind computing
    latency: float  # hops that are not
    optimizer: float
    unhidden: float = 0.0  # seconds of the whole step where no communication is hidden

    @property
    def rate_per_gpu(self) -> float:
        """Pairs per second."""
        return self.pairs / self.seconds / self.gpus

    @property
    def limit(self) -> str:
        """What costs most beside the operations themselves."""
        losses = {
            "too few tokens per GPU": self.few_tokens,
            "imbalance": self.imbalance,
            "communication": self.communication,
            "latency": self.latency,
            "optimizer": self.optimizer,
        }
        return max(losses, key=losses.__getitem__)


def ring_seconds(size: float, gpus: int, cluster: Cluster) -> tuple[float, float]:
    """Seconds of an all-gather, or of a reduce-scatter, of `size` bytes: of the bytes, and of the hops.

    Each GPU takes in (g - 1) / g of the bytes from the g of its node, and each node (n - 1) / n of them from the other
    n - 1, over the cards of all its g GPUs; the two go on at the same time, and the slower one counts. A ring has g - 1
    hops within a node and n - 1 between nodes. (Patarasuk and Yuan 2009, bandwidth-optimal all-reduce; the bus
    bandwidths of NVIDIA's nccl-tests count in the same way.)
    """
    near = min(gpus, NODE)
    nodes = -(-gpus // NODE)
    within = size * (near - 1) / near / (cluster.nvlink * cluster.link_efficiency)
    between = size / near * (nodes - 1) / nodes / (cluster.infiniband * cluster.link_efficiency)
    hops = (near - 1) * cluster.nvlink_latency + (nodes - 1) * cluster.infiniband_latency
    return max(within, between), hops


def all_reduce_seconds(size: float, gpus: int, cluster: Cluster) -> tuple[float, float]:
    """Seconds of DDP's all-reduce of `size` bytes: a reduce-scatter and an all-gather, the hops for each bucket.

    (Li et al. 2020, PyTorch Distributed, arXiv 2006.15704.)
    """
    transfer, hops = ring_seconds(size, gpus, cluster)
    return 2 * transfer, 2 * hops * max(1, -(-size // BUCKET))


def compute_seconds(tokens: float, model: Model, cluster: Cluster) -> tuple[float, float]:
    """Seconds of a micro-batch on a GPU: its operations, and what reading the weights adds where that takes longer.

    A roofline (Williams et al. 2009): each pass reads all weights once, in two bytes each; the backward pass writes the
    gradients of what is trained besides, in four, and reads them to add to them.
    """
    if not tokens:
        return 0.0, 0.0
    operations = model.flops_per_token * tokens / (cluster.rate * cluster.efficiency)
    reading = (2 * model.parameters * (model.forwards + 1) + 8 * model.trainable) / cluster.memory_rate
    return operations, max(0.0, reading - operations)


def optimizer_seconds(model: Model, sharers: int, cluster: Cluster) -> float:
    """AdamW in float32: reads weight, gradient and two moments, writes weight and moments, 28 bytes a parameter; and
    the gradient's norm before, 4."""
    return 32 * model.trainable / sharers / cluster.memory_rate


def peak_bytes(model: Model, tokens: float, sharing: int) -> float:
    """Bytes at the peak of a GPU; `sharing` GPUs divide what FSDP2 divides, 1 for DDP."""
    gathered = model.gathered_bytes if sharing > 1 else 0.0
    return model.own_bytes + model.per_token * tokens + model.share_bytes / sharing + gathered


def exposed(transfer: float, hops: float, hidden_behind: float) -> tuple[float, float]:
    """What of a communication is not hidden behind so many seconds of computing: of its bytes, of its hops."""
    left = max(0.0, transfer + hops - hidden_behind)
    whole = transfer + hops
    return (left * transfer / whole, left * hops / whole) if whole else (0.0, 0.0)


def simulate(
    model: Model,
    gpus: int,
    pairs: int,
    micro_batch: int,
    sharding: str,
    lengths: Sequence[int],
    cluster: Cluster,
    draws: int = DRAWS,
) -> Step:
    """An optimizer step of so many pairs, whose lengths are drawn; micro-batches of at most `micro_batch` pairs."""
    draw = random.Random(0)
    slots = -(-pairs // (gpus * micro_batch))
    steps = []
    for _ in range(draws):
        sizes = draw.choices(lengths, k=pairs)
        shares = share_out(sizes, gpus, slots, micro_batch)
        tokens = [[sum(sizes[at] for at in share) for share in slot] for slot in shares]
        steps.append((_ddp_step if sharding == "ddp" else _fsdp_step)(tokens, model, gpus, cluster))
    means = [statistics.mean(column) for column in zip(*steps, strict=True)]
    update = optimizer_seconds(model, 1 if sharding == "ddp" else gpus, cluster)
    return Step(gpus, pairs, sharding, micro_batch, sum(means) + update, *means, update)


def _ddp_step(tokens: list[list[int]], model: Model, gpus: int, cluster: Cluster) -> tuple[float, ...]:
    """Whole copies: processes meet once, in an all-reduce that goes on during the last backward pass.

    The backward pass and its recomputation are three of the passes through the weights, where a backward pass counts
    for two; what of the all-reduce takes longer than they do in the last micro-batch is waited for.
    """
    found = [[compute_seconds(own, model, cluster) for own in slot] for slot in tokens]
    per_process = [[sum(part) for part in zip(*own, strict=True)] for own in zip(*found, strict=True)]
    slowest = max(map(sum, per_process))
    ideal, few = (statistics.mean(column) for column in zip(*per_process, strict=True))
    last = cluster.overlap * min(sum(part) for part in found[-1]) * 3 / (2 + model.forwards)
    transfer, hops = all_reduce_seconds(4 * model.trainable, gpus, cluster) if gpus > 1 else (0.0, 0.0)
    return ideal, few, slowest - ideal - few, *exposed(transfer, hops, last)


def _fsdp_step(tokens: list[list[int]], model: Model, gpus: int, cluster: Cluster) -> tuple[float, ...]:
    """Shares of everything: each pass gathers each layer, while the layer before it computes; all wait for all.

    Weights are gathered in two bytes for each forward pass and once more for the backward pass, gradients of what is
    trained are scattered in four, in every micro-batch; the first layer's gathering is never hidden. (Zhao et al. 2023,
    PyTorch FSDP, arXiv 2304.11277; the volume is that of ZeRO-3, Rajbhandari et al. 2020, arXiv 1910.02054.)
    """
    ideal = few = waiting = sent = hopped = 0.0
    gathers = model.forwards + 1
    layer, hops = ring_seconds(2 * model.parameters / model.layers, gpus, cluster)
    scatter, _ = ring_seconds(4 * model.trainable / model.layers, gpus, cluster)
    for slot in tokens:
        own = [compute_seconds(count, model, cluster) for count in slot]
        slowest = max(map(sum, own))
        mean, mean_few = (statistics.mean(column) for column in zip(*own, strict=True))
        ideal, few, waiting = ideal + mean, few + mean_few, waiting + slowest - mean - mean_few
        if gpus > 1:
            collectives = (gathers + 1) * model.layers
            behind = cluster.overlap * slowest * (1 - 1 / collectives)
            parts = exposed((gathers * layer + scatter) * model.layers, collectives * hops, behind)
            sent, hopped = sent + parts[0], hopped + parts[1]
    return ideal, few, waiting, sent, hopped


def choose_step(
    model: Model, gpus: int, pairs: int, most: int, lengths: Sequence[int], cluster: Cluster
) -> Step | None:
    """Whole copies where they fit, unless shares are faster by a tenth, in the largest micro-batches that the memory
    holds; None where nothing fits, or there are fewer pairs than GPUs."""
    if pairs < gpus:
        return None
    longest = sorted(lengths, reverse=True)
    found = []
    for sharding in ("ddp", "fsdp2"):
        batch = min(most, pairs // gpus)
        while batch and peak_bytes(model, sum(longest[:batch]), gpus if sharding == "fsdp2" else 1) > cluster.memory:
            batch //= 2
        if batch:
            step = simulate(model, gpus, pairs, batch, sharding, lengths, cluster)
            bare = simulate(model, gpus, pairs, batch, sharding, lengths, replace(cluster, overlap=0.0))
            found.append(replace(step, unhidden=bare.seconds))
    return min(found, key=lambda step: step.seconds * (1.1 if step.sharding == "fsdp2" else 1), default=None)


@cache
def count_model(name: str, training: str) -> Model:
    """The model of a shape by walking through a step on paper, with checkpointing, in bfloat16; the reference of full
    training is scored ahead, that of LoRA is the base with the adapter off. All gradients and activations are counted
    as if they met, which is a little more than `plan` says.
    """
    import warnings

    import torch
    from transformers import AutoConfig

    from utils.planning.estimate import MARGIN, SHARDED, walk_all_layers
    from utils.planning.hardware import find_device_by_name
    from utils.planning.paper_model import Way
    from utils.planning.walk import ACTIVATIONS, GRADIENTS, LOGITS, attention_flops
    from utils.runtime import quiet_libraries, quiet_loaded_libraries
    from utils.settings.training import LoraSettings

    quiet_libraries()
    quiet_loaded_libraries()
    warnings.simplefilter("ignore", FutureWarning)
    config = AutoConfig.for_model(**SHAPES[name], max_position_embeddings=8192)
    lora = training == "LoRA"
    way = Way(config, torch.bfloat16, lora, False, LoraSettings(use_lora=lora), True, "policy" if lora else "ahead",
              on_gpu=True)  # fmt: skip
    step = walk_all_layers(way, [MEASURE] * 4, 1)
    # What comes with tokens is counted where hardly any gradients are: with them the peak is at another moment.
    adapted = replace(way, use_lora=True, lora=LoraSettings(use_lora=True), reference="policy")
    few, many = (walk_all_layers(adapted, [MEASURE] * count, 1).parts for count in (4, 8))
    small, large = (parts[ACTIVATIONS] + parts[LOGITS] for parts in (few, many))
    per_token = (large - small) / (4 * sum(MEASURE))
    held = sum(step.parts[part] for part in SHARDED["fsdp2"] if part != GRADIENTS)
    reserved = find_device_by_name("H100 80GB").reserved
    return Model(
        name=name,
        training=training,
        parameters=step.parameters,
        trainable=step.trainable,
        layers=config.num_hidden_layers,
        flops_per_token=(step.flops + attention_flops(config, [MEASURE] * 4)) / step.tokens,
        share_bytes=(held + 4 * step.trainable) * MARGIN,
        own_bytes=(small - per_token * 4 * sum(MEASURE)) * MARGIN + reserved,
        per_token=per_token * MARGIN,
        gathered_bytes=4 * step.largest_layer * MARGIN,  # two layers in two bytes a parameter
        forwards=3 if lora else 2,  # policy, its recomputation, reference
    )


def describe_end(steps: Sequence[Step]) -> str:
    """Where these runs, by their numbers of GPUs, stop scaling, and why, as a phrase: beyond the best, the first
    where a GPU does less than STOPS of what it does there."""
    if not steps:
        return "fits none of these numbers of GPUs"
    best = max(steps, key=lambda step: step.rate_per_gpu)
    for step in steps[steps.index(best) :]:
        if step.rate_per_gpu < STOPS * best.rate_per_gpu:
            return f"stops at {step.gpus} GPUs: {step.limit}"
    last = steps[-1]
    share = last.rate_per_gpu / best.rate_per_gpu
    return f"scales to {last.gpus} GPUs ({share:.0%} of the best work per GPU; most is lost to {last.limit})"


def main() -> None:
    """Every model, both kinds of scaling: prints the tables and writes them."""
    options = parse_arguments()
    cluster = replace(Cluster(), efficiency=options.efficiency)
    table = json.loads((HERE / "lengths.json").read_text(encoding="utf-8"))
    lengths = {kind: [sum(parts) for parts in table[kind]] for kind in options.lengths}
    lines, ends, record = [], ["| model | pairs | scaling | |", "| --- | --- | --- | --- |"], []
    for name, training, lengths_of, kind in product(options.models, TRAININGS, lengths, ("strong", "weak")):
        model = count_model(name, training)
        steps = [
            step
            for gpus in options.gpus
            if (
                step := choose_step(
                    model, gpus, _pairs(options, kind, gpus), options.batch, lengths[lengths_of], cluster
                )
            )
        ]
        lines += make_table(f"{name}, {training}, {lengths_of}, {kind} scaling", steps)
        ends.append(f"| {name}, {training} | {lengths_of} | {kind} | {describe_end(steps)} |")
        record.append({"model": asdict(model), "lengths": lengths_of, "kind": kind, "end": describe_end(steps),
                       "steps": [asdict(step) for step in steps]})  # fmt: skip
    text = "\n".join([*list_assumptions(options, cluster, lengths), *ends, "", *lines]) + "\n"
    print(text)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "cluster.md").write_text(text, encoding="utf-8")
    whole = {"cluster": asdict(cluster), "runs": record}
    (options.output_dir / "cluster.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(USUAL))
    parser.add_argument("--gpus", nargs="+", type=int, default=list(COUNTS), help="numbers of GPUs")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS), help="whose lengths are drawn")
    parser.add_argument("--pairs_per_step", type=int, default=512, help="of strong scaling")
    parser.add_argument(
        "--batch", type=int, default=8, help="pairs of a micro-batch at most; of a GPU, in weak scaling"
    )
    parser.add_argument("--efficiency", type=float, default=Cluster.efficiency, help="share of the GPU's rate")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/bench"), help="where the results go")
    return parser.parse_args()


def _pairs(options: argparse.Namespace, kind: str, gpus: int) -> int:
    return options.pairs_per_step if kind == "strong" else options.batch * gpus


def list_assumptions(options: argparse.Namespace, cluster: Cluster, lengths: dict[str, list[int]]) -> list[str]:
    """What the tables rest on, as a list."""
    return [
        "Calculated, not measured. Assumed:",
        "",
        f"- GPUs: {cluster.rate / 1e12:.0f} TFLOP/s in bfloat16, of which training reaches {cluster.efficiency:.0%}; "
        f"{cluster.memory / GIB:.0f} GiB at {cluster.memory_rate / 1e12:.2f} TB/s (data sheet of the H100 SXM).",
        f"- Links of each GPU, in one direction: {cluster.nvlink / 1e9:.0f} GB/s to the {NODE} of its node (NVLink 4: "
        f"900 GB/s both ways), {cluster.infiniband / 1e9:.0f} GB/s between nodes (NDR InfiniBand, 400 Gb/s a GPU), of "
        f"which {cluster.link_efficiency:.0%} is reached; a hop takes {cluster.nvlink_latency * 1e6:.0f} and "
        f"{cluster.infiniband_latency * 1e6:.0f} microseconds.",
        "- DDP all-reduces the float32 gradients of what is trained in a ring, in buckets of 25 MiB, behind the last "
        "backward pass; FSDP2 gathers each layer's weights in two bytes for every pass and scatters gradients in four, "
        "behind the layer before. DDP is taken where it fits, unless FSDP2 is faster by a tenth. How much is hidden "
        "behind computing is a bound: the last column is the step where nothing is.",
        "- Memory and operations as `plan` counts them: bfloat16, checkpointing, the reference of full training scored "
        "ahead, that of LoRA the base with its adapter off. A micro-batch reads all weights once a pass.",
        f"- Pairs: {DRAWS} steps with lengths drawn from real ones ("
        + "; ".join(
            f"{name}: mean {statistics.mean(own):.0f} tokens, longest {max(own):,}" for name, own in lengths.items()
        )
        + f"), shared out as training shares them out; micro-batches of at most {options.batch} pairs; "
        f"{options.pairs_per_step} pairs a step in strong scaling, {options.batch} a GPU in weak.",
        "- Reading data, evaluation, saving and failures take no time.",
        "",
    ]


def make_table(title: str, steps: Sequence[Step]) -> list[str]:
    """The rows of one model's runs, with what they lose to what."""
    lines = [f"**{title}**: {describe_end(steps)}", ""]
    if not steps:
        return lines
    best = max(step.rate_per_gpu for step in steps)
    lines += [
        "| GPUs | pairs a step | as | micro-batch | s a step | pairs/s | per GPU, beside the best | operations | "
        "few tokens | imbalance | communication | latency | optimizer | s, nothing hidden |",
        "|" + " --- |" * 14,
    ]
    for step in steps:
        parts = (step.ideal, step.few_tokens, step.imbalance, step.communication, step.latency, step.optimizer)
        shares = " | ".join(f"{part / step.seconds:.0%}" for part in parts)
        lines.append(
            f"| {step.gpus} | {step.pairs:,} | {step.sharding} | {step.micro_batch} | {step.seconds:.3f} | "
            f"{step.pairs / step.seconds:,.0f} | {step.rate_per_gpu / best:.0%} | {shares} | {step.unhidden:.3f} |"
        )
    return [*lines, ""]


if __name__ == "__main__":
    main()
