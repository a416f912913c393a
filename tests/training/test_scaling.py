"""What benchmarks say of growth: fits with known answers, clusters on paper at their limits, the short run itself."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import datasets
import numpy as np
import pytest
from shared.runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from cluster import (
    COUNTS,
    Cluster,
    Model,
    all_reduce_seconds,
    choose_step,
    compute_seconds,
    count_model,
    describe_end,
    peak_bytes,
    ring_seconds,
    simulate,
)
from scaling_summary import beyond_first, compare_growth, draw, fit_exponent, make_tables

from utils.data.lengths import count_row_tokens, longest_first, read_numbers
from utils.training.batches import PAIR_IDS, PairCollator

LENGTHS = [120, 300, 80, 2000, 400, 150, 700, 90]
MODEL = Model("made up", "full", 8 * 10**9, 8 * 10**9, 32, 6.4e10, 1.3e11, 2e9, 1e6, 2e9, 2)
LINKS = Cluster(nvlink=100e9, infiniband=10e9, nvlink_latency=1e-6, infiniband_latency=5e-6, link_efficiency=1.0)
FREE = replace(LINKS, nvlink=1e30, infiniband=1e30, nvlink_latency=0.0, infiniband_latency=0.0)


def take_step(model=MODEL, gpus=16, pairs=64, sharding="fsdp2", cluster=LINKS, lengths=LENGTHS, micro_batch=2):
    return simulate(model, gpus, pairs, micro_batch, sharding, lengths, cluster, draws=3)


def test_exponents_of_known_growth():
    sizes = [1, 10, 100, 1000]
    assert fit_exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert fit_exponent([2, 8], [5, 5]) == pytest.approx(0)
    assert beyond_first([7.0, 8.0, 17.0]) == [1.0, 10.0]


@pytest.mark.parametrize(
    ("cost", "meaning"),
    [
        (lambda flops: 2 * flops, "linear in its operations"),
        (lambda flops: 50 + flops / 100, "fixed costs still weigh at the end"),
        (lambda flops: flops**1.3, "grows faster than its operations"),
    ],
)
def test_growth_is_judged_by_its_end(cost, meaning):
    operations = [1.0, 8.0, 64.0, 512.0]
    assert compare_growth(operations, [cost(flops) for flops in operations])["meaning"] == meaning


def make_results() -> dict:
    steps = [
        {"value": n, "pairs": n, "tokens": 128 * n, "flops": 1e9 * n, "wall": 0.2 * n, "cpu": 0.1 * n, "bytes": n << 20}
        for n in (1, 2, 4)
    ]
    starts = []
    for count in (1000, 10_000, 100_000, 1_000_000):
        cost = {
            "start_wall": 20.0,
            "start_cpu": 10 + count * 1e-4,
            "own_peak": (400 << 20) + 100 * count,
            "peak": 1 << 30,
        }
        starts.append(
            {"value": count, "file_bytes": 200 * count, **dict.fromkeys(("first", "second", "streaming"), cost)}
        )
    processes = [
        {"value": 1, "fixed_in": "each", "pairs": 8, "wall": 1.0, "cpu": 0.8, "bytes": 1 << 20},
        {"value": 2, "fixed_in": "each", "pairs": 16, "wall": 1.0, "cpu": 2.4, "bytes": 1 << 20},
        {"value": 2, "fixed_in": "all", "pairs": 8, "wall": 0.5, "cpu": 1.0, "bytes": 1 << 20},
    ]
    return {"machine": "m", "batch": steps, "length": steps, "model": steps, "pairs": starts,
            "processes": processes}  # fmt: skip


def test_tables_say_what_was_measured():
    text = make_tables(make_results())
    assert "| 4 | 512 | 4 | 0.400 | 10.00 | 1,280 | 100.0 | 0.800 | 4 |" in text
    assert "to the power 1.00, between the last two points 1.00: linear in its operations." in text
    assert "- empty cache: 100.0 microseconds and 100 bytes a pair; beyond the start on 1,000" in text
    assert "| 2 | each | 16 | 1.000 | 16.00 | 0.1500 | 1.50x | 1 |" in text


def test_the_plot_has_a_panel_for_each_axis(tmp_path):
    draw(make_results(), tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert drawn.count('id="axes_') == 6
    draw({"batch": make_results()["batch"]}, tmp_path / "one.svg")
    assert (tmp_path / "one.svg").read_text(encoding="utf-8").count('id="axes_') == 1


def test_bytes_of_a_ring_by_hand():
    # 8 GB to 16 GPUs in two nodes: 7/8 of it at 100 GB/s within a node; half of each GPU's eighth at 10 GB/s between.
    assert ring_seconds(8e9, 16, LINKS) == pytest.approx((max(7 / 100, 0.5 / 10), 7e-6 + 5e-6))
    assert ring_seconds(8e9, 512, LINKS)[0] == pytest.approx(63 / 64 / 10)
    assert ring_seconds(8e9, 2, LINKS) == pytest.approx((4 / 100, 1e-6))
    # A gradient of 4 buckets: there and back.
    assert all_reduce_seconds(100 * 2**20, 2, LINKS) == pytest.approx((100 * 2**20 / 100e9, 2 * 4 * 1e-6))


def test_small_micro_batches_take_what_reading_the_weights_takes():
    operations, more = compute_seconds(10, MODEL, LINKS)
    assert operations == pytest.approx(10 * 6.4e10 / (989e12 * 0.4))
    assert operations + more == pytest.approx((2 * 3 * 8e9 + 8 * 8e9) / 3.35e12)
    assert compute_seconds(100_000, MODEL, LINKS)[1] == 0
    assert compute_seconds(0, MODEL, LINKS) == (0, 0)


def test_a_step_by_hand():
    # Two GPUs, pairs of 1000 tokens, one each: even, 0.16 s of computing, of which 3 of 4 passes hide the gradients.
    step = take_step(gpus=2, pairs=2, sharding="ddp", lengths=[1000], micro_batch=1)
    computing = 1000 * 6.4e10 / (989e12 * 0.4)
    gradients = 2 * 32e9 / 2 / 100e9
    hops = 2 * -(-32e9 // (25 * 2**20)) * 1e-6
    assert step.ideal == pytest.approx(computing)
    assert (step.few_tokens, step.imbalance) == pytest.approx((0, 0))
    assert step.communication + step.latency == pytest.approx(gradients + hops - 0.75 * computing)
    assert step.optimizer == pytest.approx(32 * 8e9 / 3.35e12)
    assert step.limit == "communication"


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_one_gpu_waits_for_nobody(sharding):
    step = take_step(gpus=1, pairs=8, sharding=sharding)
    assert (step.imbalance, step.communication, step.latency) == pytest.approx((0, 0, 0))


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_with_free_links_imbalance_alone_is_left(sharding):
    step, free = take_step(sharding=sharding), take_step(sharding=sharding, cluster=FREE)
    assert step.communication > 0
    assert (free.communication, free.latency) == pytest.approx((0, 0))
    assert free.imbalance == step.imbalance > 0
    even = take_step(sharding=sharding, cluster=FREE, lengths=[5000])
    assert even.seconds == pytest.approx(even.ideal + even.optimizer)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_worse_links_and_less_overlap_are_never_faster(sharding):
    draw = random.Random(5)
    for _ in range(20):
        gpus = draw.choice(COUNTS[:4])
        good = replace(LINKS, nvlink=draw.uniform(1e10, 1e12), infiniband=draw.uniform(1e9, 1e11))
        for name, factor in (("nvlink", 0.5), ("infiniband", 0.5), ("nvlink_latency", 2), ("infiniband_latency", 2),
                             ("overlap", 0.5), ("link_efficiency", 0.5)):  # fmt: skip
            worse = replace(good, **{name: getattr(good, name) * factor})
            pair = [take_step(gpus=gpus, sharding=sharding, cluster=cluster).seconds for cluster in (good, worse)]
            assert pair[0] <= pair[1] * (1 + 1e-9), (name, gpus)
    sent = [ring_seconds(1e9, gpus, LINKS)[0] for gpus in (1, 2, 4, *COUNTS)]
    assert sent == sorted(sent)


def test_the_parts_of_a_step_are_all_of_it_and_operations_are_shared_out():
    steps = [take_step(gpus=gpus, pairs=512, micro_batch=1) for gpus in COUNTS]
    for step in steps:
        parts = (step.ideal, step.few_tokens, step.imbalance, step.communication, step.latency, step.optimizer)
        assert step.seconds == pytest.approx(sum(parts))
        assert min(parts) >= -1e-12
    assert [step.ideal * step.gpus for step in steps] == pytest.approx([steps[0].ideal * 8] * len(steps))
    assert describe_end(steps).startswith("scales to 512 GPUs (")
    assert describe_end([take_step(gpus=gpus, pairs=gpus * 2) for gpus in (1, 512)]).startswith("stops at 512 GPUs: ")
    assert describe_end([]) == "fits none of these numbers of GPUs"


def test_what_does_not_fit_is_divided_made_smaller_or_left_out():
    roomy, tight = (replace(LINKS, memory=size * 2**30) for size in (1000, 80))
    assert choose_step(MODEL, 8, 64, 8, [400], roomy).sharding == "ddp"
    divided = choose_step(MODEL, 8, 64, 8, LENGTHS, tight)
    assert (divided.sharding, divided.micro_batch) == ("fsdp2", 8)
    assert divided.unhidden >= divided.seconds
    heavy = replace(MODEL, per_token=2e7)
    smaller = choose_step(heavy, 8, 64, 8, LENGTHS, tight)
    assert smaller.micro_batch < 8
    assert peak_bytes(heavy, sum(sorted(LENGTHS)[-smaller.micro_batch :]), 8) <= tight.memory
    assert choose_step(replace(MODEL, own_bytes=1e12), 8, 64, 8, LENGTHS, tight) is None
    assert choose_step(MODEL, 8, 7, 8, LENGTHS, tight) is None


@pytest.mark.slow
@pytest.mark.parametrize("training", ["full", "LoRA"])
def test_a_counted_model_is_the_planned_one(training):
    from transformers import AutoConfig

    from utils.planning.estimate import estimate
    from utils.planning.paper_model import Way
    from utils.settings.training import LoraSettings

    model = count_model("1B", training)
    assert model.parameters == 1_235_814_400
    lora = training == "LoRA"
    assert (5 if lora else 6) * model.parameters < model.flops_per_token < 9 * model.parameters
    import cluster
    import torch

    config = AutoConfig.for_model(**cluster.SHAPES["1B"], max_position_embeddings=8192)
    way = Way(config, torch.bfloat16, lora, False, LoraSettings(use_lora=lora), True, "policy" if lora else "ahead",
              on_gpu=True)  # fmt: skip
    planned = estimate(way, [(1024, 512, 512)] * 6, 1, base=round(0.8 * 2**30))
    # Of all weights the gradients are not all there yet when most activations are; here they are counted together.
    assert planned.peak * 0.97 <= peak_bytes(model, 6 * 2048, 1) <= planned.peak * (1.05 if lora else 1.4)
    assert planned.flops / planned.tokens == pytest.approx(model.flops_per_token, rel=0.01)


def test_lengths_are_those_of_the_lists():
    draw = random.Random(1)
    columns = {name: [[1] * draw.randrange(9) for _ in range(25_000)] for name in ("prompt_ids", "chosen_ids")}
    rows = datasets.Dataset.from_dict({**columns, "length": [draw.randrange(50) for _ in range(25_000)]})
    for part in (rows, rows.select(range(3, 25_000, 7)), rows.select([]), rows.select([24_999, 0])):
        expected = [len(a) + len(b) for a, b in zip(part["prompt_ids"], part["chosen_ids"], strict=True)]
        assert count_row_tokens(part, ["prompt_ids", "chosen_ids"]).tolist() == expected
        numbers = read_numbers(part, "length")
        assert numbers.tolist() == part["length"][:]
        assert longest_first(numbers).tolist() == sorted(range(len(part)), key=lambda index: -numbers[index])
    assert longest_first(np.array([3, 9, 3])).tolist() == [1, 0, 2]


def test_counting_lengths_holds_a_few_bytes_a_row():
    draw = random.Random(2)
    ids = [list(range(draw.randrange(300, 330))) for _ in range(100)]
    rows = datasets.Dataset.from_dict(dict.fromkeys(PAIR_IDS, ids * 300))
    collator = PairCollator(pad_token_id=0)
    collator.packs = True
    tracemalloc.start()
    try:
        counts = collator.token_counts(rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert list(counts[:100]) == [3 * len(row) for row in ids]
    assert peak < 30 * len(rows)  # a list of integers alone has 36


@pytest.mark.slow
def test_the_quick_benchmark_measures_every_axis(tmp_path):
    command = [sys.executable, "benchmarks/scaling.py", "--quick", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=3000)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))
    for axis in ("batch", "length", "model"):
        assert all(point["cpu"] > 0 and point["wall"] > 0 and point["bytes"] > 0 for point in results[axis])
    assert results["batch"][-1]["flops"] > results["batch"][0]["flops"]
    assert [point["value"] for point in results["pairs"]] == [1_000, 10_000]
    assert {(point["value"], point["fixed_in"]) for point in results["processes"]} == {
        (1, "each"),
        (2, "each"),
        (2, "all"),
    }
    assert (tmp_path / "scaling.svg").stat().st_size > 10_000
    assert "Seconds of CPU grow as operations to the power" in (tmp_path / "scaling.md").read_text(encoding="utf-8")
