"""What a run is measured against: settings and a start on one side, the plan of its reference on the other."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch

from utils.arguments import parse_arguments
from utils.models.reference import NO_REFERENCE, ReferencePlan, choose_reference, choose_reference_of_run
from utils.models.sources import ModelSource
from utils.models.trained import TrainedModel

BASE = ModelSource("base", None, None, "base")
ADAPTER = ModelSource("base", "stage1", None, "base")
OTHER = ModelSource("other", None, None, "other")
B16, F32 = torch.bfloat16, torch.float32
NAMED, AHEAD = "--ref_model_name_or_path other", ", scored once before training"
OFF = "the base model, with the adapter disabled"
COPY = "a frozen copy of the initial weights"
OF_STAGE1 = "a frozen copy of the adapter that training starts from (stage1)"
NOT_AHEAD = "--precompute_ref_log_probs false"


def settings_of(flags: str, verb: str = "train"):
    words = [verb, "--model_name_or_path", "base", "--dataset_name", "pairs.jsonl", "--output_dir", "run"]
    return parse_arguments([*words, *flags.split()])


def choose(flags: str, start: ModelSource = BASE, verb: str = "train", batch=(1, 1), **how) -> ReferencePlan:
    """For 100 pairs in one process, in batches of 1, computed in bfloat16."""
    steps = " --per_device_train_batch_size {} --gradient_accumulation_steps {}".format(*batch)
    settings = settings_of(flags + steps, verb)
    return choose_reference(settings, start, B16, 100, how.pop("processes", 1), find=lambda flag, name: OTHER, **how)


PLANS = [
    # flags, start -> kind, source, how, in 4 bits, a model of its own, its format, scored ahead
    ("", BASE, ("start", BASE, COPY + AHEAD, False, True, F32, True)),
    (NOT_AHEAD, BASE, ("start", BASE, COPY, False, True, F32, False)),
    ("--max_steps 100", BASE, ("start", BASE, COPY + AHEAD, False, True, F32, True)),
    ("--max_steps 99", BASE, ("start", BASE, COPY, False, True, F32, False)),
    ("--dry_run", BASE, ("start", BASE, COPY, False, True, F32, False)),
    ("--sync_ref_model", BASE, ("start", BASE, COPY, False, True, F32, False)),
    ("--use_4bit", BASE, ("start", BASE, "the initial weights" + AHEAD, False, False, F32, True)),
    ("--use_4bit --max_steps 1", BASE, ("start", BASE, "the initial weights" + AHEAD, False, False, F32, True)),
    (f"--use_4bit {NOT_AHEAD}", BASE, ("start", BASE, COPY + " in 4 bits", True, True, B16, False)),
    ("--use_lora", BASE, ("base", BASE, OFF, False, False, None, False)),
    ("--use_lora --num_train_epochs 2", BASE, ("base", BASE, OFF + AHEAD, False, False, None, True)),
    ("--use_lora --use_4bit", BASE, ("base", BASE, OFF, True, False, None, False)),
    ("", ADAPTER, ("adapter", ADAPTER, OF_STAGE1, False, False, None, False)),
    ("--use_4bit --num_train_epochs 2", ADAPTER, ("adapter", ADAPTER, OF_STAGE1 + AHEAD, True, False, None, True)),
    (NAMED, BASE, ("model", OTHER, "other, frozen" + AHEAD, False, True, F32, True)),
    (f"{NAMED} --use_lora", BASE, ("model", OTHER, "other, frozen" + AHEAD, False, True, B16, True)),
    (f"{NAMED} --use_lora {NOT_AHEAD}", BASE, ("model", OTHER, "other, frozen", False, True, B16, False)),
    (f"{NAMED} --use_4bit", BASE, ("model", OTHER, "other in 4 bits, frozen" + AHEAD, True, True, B16, True)),
    (f"{NAMED} --max_steps 9", ADAPTER, ("model", OTHER, "other, frozen", False, True, B16, False)),
    (f"{NAMED} --use_4bit --max_steps 9", BASE, ("model", OTHER, "other in 4 bits, frozen", True, True, B16, False)),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "start", "planned"), PLANS)
def test_settings_and_start_decide_the_reference(flags, start, planned):
    names = ("kind", "source", "how", "in_4bit", "own_model", "dtype", "ahead")
    assert set(names) == {field.name for field in fields(ReferencePlan)}
    plan = choose(flags, start)
    assert tuple(getattr(plan, name) for name in names) == planned
    assert plan.is_start is (plan.kind != "model")
    assert plan.is_rounded is (plan.how == COPY + " in 4 bits")


@pytest.mark.parametrize(
    ("flags", "start", "place"),
    [
        ("", BASE, "ahead"),
        (NOT_AHEAD, BASE, "model"),
        ("--use_lora", BASE, "policy"),
        (NOT_AHEAD, ADAPTER, "policy"),
        (f"{NAMED} --use_lora {NOT_AHEAD}", BASE, "model"),
    ],
)
def test_the_plan_says_what_computes_the_reference_in_each_step(flags, start, place):
    assert choose(flags, start).place == place


def test_larger_steps_pass_through_the_pairs_sooner():
    assert not choose("--max_steps 50").ahead
    for larger in ({"processes": 2}, {"batch": (2, 1)}, {"batch": (1, 2)}):
        assert choose("--max_steps 50", **larger).ahead
        assert not choose("--max_steps 49", **larger).ahead


def test_weights_that_lie_in_parts_do_not_score_ahead_themselves():
    whole, sharded = choose("--use_4bit"), choose("--use_4bit", sharded=True)
    assert (whole.own_model, sharded) == (False, replace(whole, own_model=True))


@pytest.mark.parametrize("flags", ["", "--use_lora", "--use_lora --use_4bit"])
def test_sft_has_no_reference(flags):
    plan = choose(flags, verb="sft")
    assert plan is NO_REFERENCE
    assert (plan.place, plan.is_start, plan.own_model, plan.ahead) == ("none", False, False, False)
    assert plan.as_record() == {"reference": None, "reference_model": None}


def test_the_record_says_where_the_reference_is():
    kept = {"base": "base", "adapter": "stage1", "revision": None, "tokenizer": "base", "adapter_revision": None}
    record = choose("--use_4bit", ADAPTER).as_record()
    assert record == {"reference": OF_STAGE1, "reference_model": kept | {"in_4bit": True}}
    trained = TrainedModel(ADAPTER, None, record)
    assert (trained.reference, trained.reference_in_4bit, trained.has_reference) == (ADAPTER, True, True)


TUNED = ModelSource("base", "tuned", None, "base")
WHOLE = ModelSource("whole", None, None, "whole")
STAGE1 = "the adapter stage1 on the same base"
RUN = {"verb": "train", "settings": {}, "reference_model": {"base": "base", "in_4bit": False}}


@pytest.mark.parametrize(
    ("policy", "record", "flags", "reference", "planned"),
    [
        (TUNED, RUN, "", BASE, ("base", "the base model base, with the adapter disabled", False, False, None)),
        (TUNED, RUN, "--use_4bit", ADAPTER, ("adapter", STAGE1 + " in 4 bits", True, False, None)),
        (TUNED, RUN, "", OTHER, ("model", "other", False, True, B16)),
        (TUNED, RUN, "", replace(BASE, revision="v2"), ("model", "base", False, True, B16)),
        (WHOLE, RUN, "", BASE, ("model", "base", False, True, F32)),
        (WHOLE, {}, "", BASE, ("model", "base", False, True, B16)),
        (WHOLE, RUN, "--use_4bit", BASE, ("model", "base in 4 bits", True, True, B16)),
    ],
)  # fmt: skip
def test_the_reference_of_a_model_that_is_evaluated(policy, record, flags, reference, planned):
    trained = TrainedModel(policy, None, record)
    plan = choose_reference_of_run(trained, reference, settings_of(flags), B16)
    assert (plan.kind, plan.how, plan.in_4bit, plan.own_model, plan.dtype) == planned
    assert plan.source == reference
    assert not plan.ahead


@pytest.mark.parametrize("changed", [{"init_lora_weights": "pissa"}, {"bias": "all"}])
def test_a_base_that_an_adapter_changes_is_not_shared(tmp_path, changed):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8} | changed))
    plain, changes = TUNED, ModelSource("base", str(tmp_path), None, "base")
    for policy, reference in ((changes, BASE), (changes, plain), (plain, changes)):
        plan = choose_reference_of_run(TrainedModel(policy, None, RUN), reference, settings_of(""), B16)
        assert (plan.kind, plan.own_model) == ("model", True)


@pytest.mark.parametrize(("flags", "in_4bit"), [("", False), (NAMED, True)])
def test_a_reference_is_in_the_bits_of_its_run_and_one_that_is_named_in_those_of_the_flag(flags, in_4bit):
    """Of a run of all weights under --use_4bit, whose own reference scored ahead in whole numbers."""
    settings = settings_of(f"{flags} --use_4bit")
    settings = replace(settings, given=settings.given - {"use_4bit"})  # as it is when the record of the run says so
    plan = choose_reference_of_run(TrainedModel(WHOLE, None, RUN), OTHER, settings, B16)
    assert plan.in_4bit is in_4bit
