"""Plans: a step on paper against a step, whole models against few layers, and the verb as a person meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from shared.forked import Forked
from shared.models import save_tiny_model
from shared.runs import ROOT, start_script
from shared.ways import CONFIG, FULL, LORA, PAIRS, make_real
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from utils.arguments import parse_arguments
from utils.engine.shared_prefix import PairLayout
from utils.errors import UserError
from utils.planning.estimate import (
    SHARDED,
    Division,
    _share_of_device,
    estimate,
    layers_alike,
    pad_pairs,
    walk_all_layers,
    with_layers,
)
from utils.planning.hardware import GIB, SHEETS, Device, find_device_by_name
from utils.planning.launching import words_before_script
from utils.planning.measuring import as_measured
from utils.planning.paper_model import make_policy
from utils.planning.planning import _asked_way, _Planner
from utils.planning.summary import explain_best
from utils.planning.walk import (
    ACTIVATIONS,
    ADAPTER,
    GRADIENTS,
    LOGITS,
    OPTIMIZER,
    REFERENCE,
    WEIGHTS,
    Meter,
    take_micro_batch,
    walk_step,
)
from utils.planning.walk import PARTS as ALL_PARTS
from utils.planning.work import Subject, Work, place_of_reference, read_subject
from utils.runtime import readable_bytes
from utils.settings.verbs import PlanSettings


@pytest.mark.parametrize(
    "way",
    [
        FULL,
        LORA,
        replace(LORA, checkpointing=True),
        replace(LORA, dtype=torch.bfloat16),
        replace(FULL, dtype=torch.bfloat16),
    ],
    ids=["full", "lora", "lora, checkpointing", "lora, bfloat16", "full, bfloat16"],
)
def test_a_step_on_paper_holds_and_computes_what_a_step_does(way):
    model, meter = make_real(way), Meter(CONFIG.vocab_size)
    with meter:
        meter.mark([*model.parameters(), *model.buffers()], WEIGHTS)
        layout = PairLayout(PAIRS, kept={} if way.checkpointing else None)
        take_micro_batch(way, model, None, layout, real=True)
        first = meter.flops
    walk = walk_step(way, PAIRS)
    gradients = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4
    assert walk.peak - walk.parts[OPTIMIZER] == pytest.approx(meter.at_peak.total(), rel=0.02, abs=gradients * 0.02)
    assert walk.flops == first


def test_parts_are_those_of_the_model():
    for way in (FULL, replace(LORA, dtype=torch.bfloat16)):
        model, walk = make_real(way), walk_step(way, PAIRS, micro_batches=2)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        adapter = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "lora_" in n)
        whole = sum(p.numel() * p.element_size() for p in model.parameters())
        buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        assert walk.parts[WEIGHTS] == whole - adapter + buffers
        assert walk.parts[ADAPTER] == adapter
        assert walk.parts[GRADIENTS] == pytest.approx(trained * 4, rel=0.2)
        assert walk.parts[OPTIMIZER] == pytest.approx(trained * 8, rel=0.01)
        assert walk.trainable == trained
        assert walk.parameters == sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)


def test_a_second_model_a_second_micro_batch_and_longer_pairs_cost_what_they_hold():
    plain = walk_step(FULL, PAIRS)
    with_reference = walk_step(replace(FULL, reference="model"), PAIRS)
    assert with_reference.parts[REFERENCE] == plain.parts[WEIGHTS]
    assert with_reference.flops > plain.flops
    assert walk_step(FULL, PAIRS, micro_batches=2).parts[GRADIENTS] > plain.parts[GRADIENTS]
    doubled = walk_step(FULL, PAIRS * 2)
    grown = (doubled.parts[ACTIVATIONS] + doubled.parts[LOGITS]) / (plain.parts[ACTIVATIONS] + plain.parts[LOGITS])
    assert grown == pytest.approx(2, rel=0.1)
    assert walk_step(replace(FULL, optim="adamw_8bit"), PAIRS).parts[OPTIMIZER] == 2 * plain.trainable
    assert walk_step(replace(FULL, optim="sgd"), PAIRS).parts[OPTIMIZER] == 0


def test_four_bits_hold_half_a_byte_a_weight():
    way = replace(LORA, in_4bit=True, dtype=torch.bfloat16)
    walk, plain = walk_step(way, PAIRS), walk_step(replace(way, in_4bit=False), PAIRS)
    layers = AutoModelForCausalLM.from_config(CONFIG).model.layers
    linear = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    saved = plain.parts[WEIGHTS] - walk.parts[WEIGHTS]
    assert saved == pytest.approx(linear * (2 - 0.516), rel=0.01)
    assert walk.parameters == plain.parameters


@pytest.mark.parametrize("way", [LORA, replace(FULL, checkpointing=True)], ids=["lora", "full, checkpointing"])
def test_few_layers_tell_of_all(way):
    few, all_of_them = walk_all_layers(way, PAIRS, 2), walk_step(way, PAIRS, 2)
    assert few.peak == pytest.approx(all_of_them.peak, rel=0.01)
    assert (few.flops, few.parameters, few.trainable) == (
        all_of_them.flops,
        all_of_them.parameters,
        all_of_them.trainable,
    )


def test_layers_that_attend_in_two_ways_are_all_walked_through():
    shape = {
        name: getattr(CONFIG, name)
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
        )
    }
    mixed = replace(LORA, config=Gemma2Config(head_dim=16, sliding_window=7, **shape))
    assert len(set(mixed.config.layer_types)) == 2
    assert not layers_alike(mixed)
    assert layers_alike(LORA)


def test_several_devices_hold_a_share_each():
    alone = estimate(FULL, PAIRS, 1, base=0)
    zero2 = estimate(FULL, PAIRS, 1, base=0, division=Division("zero2", 4))
    fsdp2 = estimate(FULL, PAIRS, 1, base=0, division=Division("fsdp2", 4))
    assert zero2.parts[OPTIMIZER] == -(-alone.parts[OPTIMIZER] // 4)
    assert zero2.parts[WEIGHTS] == alone.parts[WEIGHTS]
    assert fsdp2.parts[WEIGHTS] == -(-alone.parts[WEIGHTS] // 4)
    assert fsdp2.parts["gathered layers"] > 0
    assert fsdp2.peak < zero2.peak < alone.peak


def test_several_devices_hold_what_their_engines_hold():
    """By hand, of N trained parameters on 4 devices: Adam has 8 bytes each; DDP keeps buckets of the gradients' size;
    DeepSpeed in 16 bits has weights of 2 bytes and the float32 ones in its optimizer's share."""
    half = replace(FULL, dtype=torch.bfloat16)
    n = walk_step(half, PAIRS).trainable
    ddp = estimate(half, PAIRS, 1, base=0, division=Division(devices=4)).parts
    assert ddp["gradient buckets"] == 4 * n
    assert ddp[WEIGHTS] == pytest.approx(4 * n, rel=0.01)
    zero2, zero3 = (estimate(half, PAIRS, 1, base=0, division=Division(f"zero{stage}", 4)).parts for stage in (2, 3))
    assert zero2[WEIGHTS] == pytest.approx(2 * n, rel=0.01)
    assert zero2[OPTIMIZER] == pytest.approx(12 * n / 4, rel=0.01)
    assert zero3[WEIGHTS] == pytest.approx(2 * n / 4, rel=0.01)
    fsdp2 = estimate(half, PAIRS, 1, base=0, division=Division("fsdp2", 4)).parts
    assert fsdp2[WEIGHTS] == pytest.approx(4 * n / 4, rel=0.01)
    assert fsdp2[OPTIMIZER] == pytest.approx(8 * n / 4, rel=0.01)
    layer = sum(parameter.numel() for parameter in make_policy(half).model.layers[0].parameters())
    assert fsdp2["gathered layers"] == 2 * 2 * layer, "the one at work and the next, whole, in 16 bits"
    walk = walk_all_layers(half, PAIRS, 1)
    moment = walk.moments["first"]  # of the backward pass, when all gradients are there
    shared, _ = _share_of_device(moment, half, walk, Division("zero1", 4))
    assert shared[GRADIENTS] == moment[GRADIENTS] // 2 > n, "16 bits each"


@pytest.mark.parametrize("way", [LORA, replace(FULL, reference="model")], ids=["lora", "full, reference"])
def test_with_fewer_tokens_what_does_not_hang_on_them_stays(way):
    needs = estimate(way, PAIRS, 1, base=1000)
    held = sum(needs.parts[part] for part in (WEIGHTS, ADAPTER, REFERENCE, OPTIMIZER)) + 1000
    assert needs.at_tokens(needs.tokens) == needs.peak
    assert needs.at_tokens(0) == held
    assert needs.at_tokens(needs.tokens // 2) == pytest.approx((needs.peak + held) / 2, rel=0.01)


@pytest.mark.parametrize("way", [FULL, replace(LORA, dtype=torch.bfloat16)], ids=["full, float32", "lora, bfloat16"])
def test_what_each_sharding_divides_and_offloading_moves(way):
    """In these ways DeepSpeed keeps no second copy of the weights."""
    walk, parts = walk_step(way, PAIRS), dict.fromkeys(ALL_PARTS, 1000)
    model = {WEIGHTS, REFERENCE, ADAPTER}
    divided = {"none": set(), "zero1": {OPTIMIZER}, "zero2": {OPTIMIZER, GRADIENTS}}
    divided |= {sharding: {OPTIMIZER, GRADIENTS, *model} for sharding in ("zero3", "fsdp2")}
    for sharding, named in divided.items():
        shared, host = _share_of_device(parts, way, walk, Division(sharding, 4))
        assert {part: shared[part] for part in parts} == parts | dict.fromkeys(named, 250)
        assert host == {}
    for offload, moved in {"optimizer": {OPTIMIZER, GRADIENTS}, "weights": {OPTIMIZER, GRADIENTS, *model}}.items():
        shared, host = _share_of_device(parts, way, walk, Division("zero3", 4, offload))
        assert host == dict.fromkeys(moved, 250)
        assert moved.isdisjoint(shared)


def test_a_reference_of_another_size_holds_its_own_weights():
    larger = LlamaConfig(**{**CONFIG.to_dict(), "hidden_size": 128, "intermediate_size": 320})
    way = replace(FULL, reference="model", reference_config=larger)
    weights = sum(p.numel() * 4 for p in AutoModelForCausalLM.from_config(larger).parameters())
    for walk in (walk_step(way, PAIRS), walk_all_layers(way, PAIRS, 1)):
        assert walk.parts[REFERENCE] == pytest.approx(weights, rel=0.01)
    assert walk_step(way, PAIRS).flops > walk_step(replace(FULL, reference="model"), PAIRS).flops


def test_padded_rows_put_as_many_tokens_through_the_model():
    assert pad_pairs([(40, 20, 30), (10, 5, 5)]) == [(90, 20, 30), (130, 5, 5)]
    assert sum(map(sum, pad_pairs(PAIRS))) == PairLayout(PAIRS).tokens_padded
    assert walk_step(FULL, pad_pairs(PAIRS)).parts[ACTIVATIONS] > walk_step(FULL, PAIRS).parts[ACTIVATIONS]


def test_what_takes_all_of_a_device_fits_it():
    needs, device = estimate(FULL, PAIRS, 1, base=0), find_device_by_name("L4")
    assert needs.fits(replace(device, memory=needs.peak))
    assert not needs.fits(replace(device, memory=needs.peak - 1))


def test_devices_are_found_by_name():
    assert find_device_by_name("nvidia a100-80gb").memory == 80 * GIB
    assert find_device_by_name("h100").name == "H100 80GB"
    assert all(isinstance(find_device_by_name(name), Device) for name in SHEETS)


@pytest.fixture(scope="module")
def model_without_weights(tmp_path_factory):
    """A folder with a config and a tokenizer, as much as a plan reads of a hub model."""
    folder = save_tiny_model(tmp_path_factory.mktemp("plan") / "model", seed=1)
    (folder / "model.safetensors").unlink()
    return folder


def test_the_plan_of_a_large_model_needs_its_config_alone(run_script, tmp_path):
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    ).save_pretrained(tmp_path)
    flags = ("plan", "--model_name_or_path", tmp_path, "--gpu", "RTX 4090", "--max_length", 1024)
    flags += ("--per_device_train_batch_size", 1)
    code, out, err = run_script(*flags, "--json_file", tmp_path / "plan.json")
    assert code == 0, err
    record = json.loads((tmp_path / "plan.json").read_text())
    asked, *others = record["choices"]
    assert asked["name"] == "full, checkpointing"
    assert asked["parameters"] == 8_030_261_248
    assert not asked["fits"]
    assert asked["parts"]["weights"] == pytest.approx(8_030_261_248 * 4, rel=0.001)
    assert any(choice["fits"] and choice["name"].startswith("LoRA on 4 bits") for choice in others)
    assert "without --dataset_name every pair is assumed to be as long as --max_length (1,024)" in out
    (best,) = (choice for choice in others if choice["best"])
    (starred,) = (line for line in out.splitlines() if line.startswith("* ") and " x " in line)
    assert starred[2:].startswith(best["name"])
    assert f"the best that fits: {best['name']} (nothing that trains as requested (full) fits; " in out
    settings = parse_arguments(record["command"].split()[2:])
    assert (settings.verb, settings.lora.use_lora, settings.model.use_4bit) == ("train", True, True)


def test_the_command_is_of_a_row_and_the_reason_is_said():
    def explain(best, *others):
        """The first is the one that was asked for."""
        device = SimpleNamespace(memory=10)
        choices = [
            SimpleNamespace(name=name, asked=not place, sharding="none", batch=batch,
                            needs=SimpleNamespace(batch=batch, fits=lambda _, size=size: size <= 10))
            for place, (name, batch, size) in enumerate(others)
        ]  # fmt: skip
        chosen = choices[best] if best is not None else None
        work = SimpleNamespace(kind="pairs")
        return explain_best(
            SimpleNamespace(asked=choices[0], others=choices[1:], best=chosen, device=device, work=work)
        )

    assert explain(0, ("LoRA", 8, 9)) == "the best that fits: as asked: LoRA (it fits)"
    slower = ("LoRA, checkpointing", 8, 5)
    assert explain(0, ("LoRA", 8, 9), slower).endswith("(it fits, and no equivalent row is faster)")
    assert explain(1, slower, ("LoRA", 8, 9)).endswith(
        "LoRA (the requested settings fit too, and this is equivalent with less compute)"
    )
    assert explain(1, ("LoRA", 8, 11), ("LoRA", 4, 9)).endswith(
        "LoRA (the requested settings do not fit; this is equivalent, 4 pairs at a time and fits)"
    )
    assert explain(1, ("full", 8, 11), ("LoRA", 8, 9)).endswith(
        "(nothing that trains as requested (full) fits; of what fits, it needs the least compute)"
    )
    assert explain(None, ("full", 8, 11)).startswith("nothing fits; use a larger device")


@pytest.mark.parametrize(
    ("count", "text"),
    [(500, "0.5 KiB"), (520_000, "0.5 MiB"), (64 * 2**20, "64 MiB"), (int(0.3 * 2**30), "0.3 GiB"), (0, "0 KiB"),
     (24 * 2**30, "24 GiB"),
     (int(9.5 * 2**30), "9.5 GiB")],
)  # fmt: skip
def test_sizes_are_written_in_a_unit_that_fits(count, text):
    assert readable_bytes(count) == text


def test_steps_time_and_cost_come_from_the_data(run_script, model_without_weights, pairs_file, tmp_path):
    shape = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2, "--num_train_epochs", 3)
    model, data = ("--model_name_or_path", model_without_weights), ("--dataset_name", pairs_file)
    flags = ("plan", *model, *data, "--gpu", "L4", *shape)
    code, out, err = run_script(*flags, "--cost_per_hour", 2, "--json_file", "-")
    assert code == 0, err
    record = json.loads(out)
    assert record["steps"] == -(-record["train_pairs"] * 3 // 8)
    asked = record["choices"][0]
    assert asked["cost"] == pytest.approx(asked["seconds"] / 3600 * 2)
    code, out, err = run_script(*flags, "--efficiency", 0.1, "--json_file", "-")
    assert code == 0, err
    assert json.loads(out)["choices"][0]["seconds"] == pytest.approx(4 * asked["seconds"])


@pytest.fixture
def planner(tiny_model, pairs_file):
    """Makes what plans ways of training, on an L4, for sixteen pairs of two lengths."""

    def make(*flags) -> _Planner:
        words = ["plan", "--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--gpu", "L4", *flags]
        settings = parse_arguments([str(word) for word in words])
        pairs = [(60, 30, 30)] * 8 + [(20, 10, 10)] * 8
        return _Planner(settings, find_device_by_name("L4"), Work(pairs, 0, known=True), 0)

    return make


@pytest.mark.parametrize("flags", [(), ("--engine", "padded"), ("--torch_compile",)], ids=" ".join)
def test_the_last_layer_leaves_out_prompts_where_training_does(flags, planner):
    planned = planner(*flags)
    subject = Subject(SimpleNamespace(adapter=None, stored=lambda: None), CONFIG, None, planned.work)
    way = _asked_way(planned.settings, subject, torch.float32, planned.device)
    assert way.whole_last_layer is ("padded" in flags)
    in_part, whole = (walk_step(replace(FULL, whole_last_layer=whole), PAIRS) for whole in (False, True))
    assert in_part.flops < whole.flops


def test_a_limit_of_tokens_makes_smaller_micro_batches(planner):
    whole = planner("--per_device_train_batch_size", 4).choose(FULL, 4)
    limited = planner("--per_device_train_batch_size", 4, "--max_tokens_per_batch", 140).choose(FULL, 4)
    assert (whole.needs.batch, whole.needs.micro_batches) == (4, 1)
    assert (limited.batch, limited.needs.batch, limited.needs.micro_batches) == (4, 1, 4)
    assert limited.needs.parts[ACTIVATIONS] < whole.needs.parts[ACTIVATIONS] / 2
    with pytest.raises(UserError, match="the longest pair alone takes 120 tokens"):
        planner("--max_tokens_per_batch", 100).choose(FULL, 8)


def test_smaller_micro_batches_make_the_same_optimizer_step(planner):
    assert [planner("--per_device_train_batch_size", size)._smaller(size) for size in (8, 6, 5, 9)] == [4, 3, 1, 3]


def test_the_reference_is_where_training_has_it(planner):
    def reference(*flags, adapts=False) -> str:
        made = planner("--per_device_train_batch_size", 4, *flags)
        return place_of_reference(made.settings, adapts, made.work)

    assert reference() == "ahead"
    assert reference("--max_steps", 4) == "ahead"  # 4 x 4 pairs are all
    assert reference("--max_steps", 3) == "model"
    assert reference("--precompute_ref_log_probs", "false") == "model"
    assert reference(adapts=True) == "policy"


def test_each_way_is_listed_once(planner):
    small = replace(FULL, config=with_layers(CONFIG, 1), in_4bit=True)  # --use_4bit without LoRA: of the reference
    made = planner("--use_4bit", "--per_device_train_batch_size", 1)
    asked = made.choose(small, 1, asked=True)
    names = [choice.name for choice in (asked, *made.others(asked))]
    assert len(names) == len(set(names)) == 6


def test_padded_batches_are_planned_as_such(planner):
    flags = ("--per_device_train_batch_size", 4)
    shared, padded = planner(*flags).choose(FULL, 4), planner(*flags, "--engine", "padded").choose(FULL, 4)
    assert (shared.needs.tokens, padded.needs.tokens) == (4 * 120, 4 * 180)


@pytest.mark.parametrize(
    ("flags", "ahead"),
    [
        ((), True),
        (("--max_steps", 1), False),
        (("--use_lora",), False),
        (("--use_lora", "--num_train_epochs", 2), True),
        (("--precompute_ref_log_probs", "true", "--use_lora"), True),
    ],
)
def test_measured_steps_have_the_reference_where_the_run_has_it(tiny_model, pairs_file, flags, ahead):
    words = ["plan", "--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--measure", *flags]
    settings = replace(parse_arguments([str(word) for word in words]), verb="train")
    subject = read_subject(settings)
    assert as_measured(settings, subject).training.precompute_ref_log_probs is ahead
    adapting = replace(subject, source=replace(subject.source, adapter="an adapter"))
    twice = "--precompute_ref_log_probs" in flags or "--num_train_epochs" in flags
    assert as_measured(settings, adapting).training.precompute_ref_log_probs is twice


def read_launch(words: list[str]):
    assert words[:2] == ["accelerate", "launch"]
    return _validate_launch_command(launch_command_parser().parse_args([*words[2:], "script.py"]))[0]


def test_the_launcher_is_told_by_flags_it_has(planner):
    plan = planner("--num_devices", 2).settings.of(PlanSettings)
    for sharding in SHARDED:
        arguments = read_launch(words_before_script(plan, sharding, in_4bit=False))
        assert arguments.num_processes == 2
        kinds = {"fsdp2": arguments.use_fsdp, "none": not arguments.use_fsdp and not arguments.use_deepspeed}
        assert kinds.get(sharding, arguments.use_deepspeed and f"zero{arguments.zero_stage}" == sharding)


def test_what_waits_in_main_memory_leaves_the_device(planner):
    way = replace(FULL, on_gpu=True)
    plain = estimate(way, PAIRS, 1, base=0, division=Division("zero2", 2))
    optimizer = estimate(way, PAIRS, 1, base=0, division=Division("zero2", 2, "optimizer"))
    trained = walk_all_layers(replace(FULL, on_gpu=True), PAIRS, 1).trainable
    assert optimizer.host[OPTIMIZER] == plain.parts[OPTIMIZER]
    assert 0.5 * 4 * trained / 2 < optimizer.host[GRADIENTS] <= 4 * trained / 2
    assert optimizer.parts == {part: size for part, size in plain.parts.items() if part not in (OPTIMIZER, GRADIENTS)}
    assert optimizer.peak < plain.peak
    weights = estimate(replace(FULL, on_gpu=True), PAIRS, 1, base=0, division=Division("zero3", offload="weights"))
    assert weights.host[WEIGHTS] == plain.parts[WEIGHTS]
    assert WEIGHTS not in weights.parts
    assert weights.parts["gathered layers"] > 0
    for offload, sharding, count in (("optimizer", "zero2", 1), ("weights", "zero3", 1), ("weights", "fsdp2", 2)):
        planned = planner("--num_devices", count, "--offload", offload)
        choice = planned.choose(replace(FULL, on_gpu=True), 4)
        assert choice.sharding == sharding
        arguments = read_launch(words_before_script(planned.settings.of(PlanSettings), sharding, in_4bit=False))
        assert arguments.num_processes == count
        if sharding == "fsdp2":
            assert str(arguments.fsdp_offload_params).lower() == "true"
        else:
            assert arguments.offload_optimizer_device == "cpu"
            assert (arguments.offload_param_device == "cpu") is (offload == "weights")


def test_most_may_be_held_at_another_moment_once_it_is_divided():
    """Of short pairs the gradients are what a step has most of; among many devices, its activations."""
    way, pairs = replace(FULL, on_gpu=True), [(12, 6, 6)]
    whole = estimate(way, pairs, 1, base=0).parts
    among_many = estimate(way, pairs, 1, base=0, division=Division("fsdp2", 1000)).parts
    assert whole[GRADIENTS] > 0
    most = max(parts[ACTIVATIONS] + parts[LOGITS] for parts in walk_all_layers(way, pairs, 1).moments.values())
    assert most == among_many[ACTIVATIONS] + among_many[LOGITS] > whole[ACTIVATIONS] + whole[LOGITS]


def test_a_reference_that_was_scored_ahead_leaves_its_head_in_main_memory(planner):
    planned = planner()
    assert planned._kept(FULL) == 0  # nothing is held out
    planned.work = replace(planned.work, held_out_tokens=50)
    assert planned._kept(FULL) == 0  # it waits beside the GPU
    planned.device = replace(planned.device, is_gpu=False)
    head = CONFIG.vocab_size * CONFIG.hidden_size * 4
    kept, lora = planned._kept(FULL), planned._kept(replace(LORA, reference="ahead"))
    assert kept - lora == head
    assert lora == planned.work.held_out_tokens * CONFIG.hidden_size * 4
    assert planned._kept(replace(FULL, reference="model")) == 0
    with_it, without = (estimate(FULL, PAIRS, 1, base=0, kept=size) for size in (kept, 0))
    assert with_it.peak - without.peak == kept


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("flags", [("--offload", "optimizer"), ("--activation_offloading",)], ids=" ".join)
def test_without_a_gpu_nothing_is_moved_from_one(run_script, tiny_model, flags):
    code, _, err = run_script("plan", "--model_name_or_path", tiny_model, *flags)
    assert code == 2
    assert f"{flags[0]}: moves from a GPU to CPU memory" in err


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_that_wait_in_main_memory_are_those_of_all_layers_but_a_few(checkpointing):
    way = replace(LORA, on_gpu=True, checkpointing=checkpointing)
    plain, moved = walk_all_layers(way, PAIRS, 1), walk_all_layers(replace(way, offloads_activations=True), PAIRS, 1)
    assert moved.peak < plain.peak
    forward = plain.moments["forward"][ACTIVATIONS]
    assert moved.offloaded + moved.moments["forward"][ACTIVATIONS] == forward
    deeper = replace(way, config=with_layers(way.config, 2 * CONFIG.num_hidden_layers))
    deeper.config.num_hidden_layers = 2 * CONFIG.num_hidden_layers
    deep = walk_all_layers(replace(deeper, offloads_activations=True), PAIRS, 1)
    assert deep.moments["forward"][ACTIVATIONS] == moved.moments["forward"][ACTIVATIONS]
    assert deep.offloaded > 1.9 * moved.offloaded


def test_a_plan_corrected_by_real_steps(run_script, tiny_model, pairs_file, tmp_path):
    flags = ("plan", "--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--use_lora")
    code, out, err = run_script(*flags, "--measure", "--json_file", tmp_path / "plan.json")
    assert code == 0, err
    assert "(measured)" in out
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["measured"]
    assert record["choices"][0]["fits"]
    assert record["choices"][0]["bytes"] > 100 * 2**20  # this process
    assert f"--dataset_name {pairs_file}" in record["command"]


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ([], "--model_name_or_path is missing"),
        (["--model_name_or_path", "x", "--measure"], "--measure: takes steps on real pairs"),
        (["--model_name_or_path", "x", "--gpu_memory", "24"], "--gpu_memory and --gpu_tflops describe a device"),
        (["--model_name_or_path", "x", "--sharding", "fsdp2"], "--sharding: needs several devices"),
        (["--model_name_or_path", "x", "--offload", "weights", "--sharding", "zero2"], "needs --sharding zero3, not"),
        (
            ["--model_name_or_path", "x", "--offload", "optimizer", "--sharding", "fsdp2", "--num_devices", 2],
            "zero2 or",
        ),
        (["--model_name_or_path", "x", "--gpu", "ZX81"], "--gpu is 'ZX81': must be one of T4, "),
        (["--model_name_or_path", "./nowhere", "--gpu", "L4"], "--model_name_or_path ./nowhere"),
    ],
)
def test_what_cannot_be_planned_is_said(run_script, flags, fault):
    code, _, err = run_script("plan", *flags)
    assert code == 2
    assert fault in err
    assert "Traceback" not in err


def plan_and_train(
    folder: Path, model: Path, data: Path, flags: tuple[str, ...], start: Callable = start_script
) -> tuple[int, int]:
    """Planned and measured peak of a run whose micro-batch is all its pairs, bytes; each in a process of its own."""
    shared = ["--model_name_or_path", model, "--dataset_name", data, "--per_device_train_batch_size", 8, *flags]
    shared += ["--num_train_epochs", 3, "--validation_split", "none"]
    for words in (
        ["plan", *shared, "--json_file", folder / "plan.json"],
        ["train", *shared, "--output_dir", folder / "run", "--save_strategy", "no"],
    ):
        process = start(*words)
        _, err = process.communicate()
        assert process.returncode == 0, err
    planned = json.loads((folder / "plan.json").read_text())["choices"][0]["bytes"]
    return planned, json.loads((folder / "run" / "run.json").read_text())["resources"]["peak_memory_bytes"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU run holds")
@pytest.mark.parametrize(
    ("flags", "start"),
    [
        pytest.param(("--use_lora",), Forked, id="lora, forked"),
        pytest.param(("--use_lora",), start_script, id="lora", marks=pytest.mark.slow),
        pytest.param((), start_script, id="full", marks=pytest.mark.slow),
    ],
)
def test_a_small_run_holds_what_was_planned(tmp_path, tiny_model, flags, start):
    data = tmp_path / "pairs.jsonl"
    rows = ({"prompt": f"question {n}", "chosen": f" yes {n}", "rejected": f" no {n}"} for n in range(8))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    planned, measured = plan_and_train(tmp_path, tiny_model, data, flags, start)
    assert planned == pytest.approx(measured, rel=0.15)


def test_the_peak_of_a_process_is_its_own_and_not_of_the_one_that_started_it():
    code = "from types import SimpleNamespace; from utils.runtime import peak_memory_bytes as peak; "
    code += "print(peak(SimpleNamespace(type='cpu')))"
    much = b"x" * 400_000_000
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0 < int(ended.stdout) < len(much) // 2


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU run holds")
@pytest.mark.parametrize(
    "flags",
    [
        ("--use_lora", "--dtype", "float32"),
        ("--use_lora", "--dtype", "float32", "--gradient_checkpointing"),
        ("--use_lora", "--dtype", "bfloat16"),
        ("--dtype", "float32"),
    ],
    ids=" ".join,
)
def test_a_run_of_31m_parameters_holds_what_was_planned(tmp_path, monkeypatch, flags):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from run import Case, choose_lengths, save_model, write_pairs

    save_model(tmp_path / "model", "31M")
    write_pairs(tmp_path / "pairs.jsonl", choose_lengths(Case(), 8))
    planned, measured = plan_and_train(tmp_path, tmp_path / "model", tmp_path / "pairs.jsonl", flags)
    assert planned == pytest.approx(measured, rel=0.15)
