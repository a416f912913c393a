"""Plans of sft: a step on paper against steps that the trainer takes, padding, and the verb as a person meets it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from shared.models import save_tiny_tokenizer
from shared.ways import CONFIG, LORA, make_real
from transformers import AutoTokenizer
from trl import SFTConfig

from utils.arguments import parse_arguments
from utils.planning.padded import mean_padded_length
from utils.planning.paper_model import Way
from utils.planning.walk import ACTIVATIONS, Meter, walk_step
from utils.training.trainer import ImitationTrainer

ROWS = ((40, 20), (25, 33), (60, 5))
SFT_LORA = replace(LORA, reference="none")
SFT_FULL = replace(SFT_LORA, use_lora=False)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def take_steps(way: Way, tokenizer, folder) -> Meter:
    """What is held and computed while the trainer takes two steps on a micro-batch of ROWS."""
    meter = Meter(CONFIG.vocab_size)
    rows = [{"prompt_ids": [5] * prompt, "completion_ids": [6] * tokens} for prompt, tokens in ROWS]
    rows = [{**row, "length": sum(map(len, row.values())), "row": index} for index, row in enumerate(rows)]
    with meter:
        model = make_real(way)
        trainer = ImitationTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(folder),
                max_steps=2,
                per_device_train_batch_size=len(ROWS),
                gradient_checkpointing=way.checkpointing,
                max_length=None,
                bf16=way.dtype == torch.bfloat16,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                optim=way.optim,
            ),
            lora_dropout=0.0,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        meter.moments.clear()
        meter.flops = 0
        trainer.train()
    return meter


@pytest.mark.parametrize(
    "way",
    [
        SFT_FULL,
        SFT_LORA,
        replace(SFT_LORA, checkpointing=True),
        replace(SFT_FULL, checkpointing=True),
        replace(SFT_LORA, dtype=torch.bfloat16),
        replace(SFT_FULL, dtype=torch.bfloat16),
    ],
    ids=["full", "lora", "lora, checkpointing", "full, checkpointing", "lora, bfloat16", "full, bfloat16"],
)
def test_a_step_on_paper_holds_and_computes_what_the_trainer_does(way, tokenizer, tmp_path):
    meter, walk = take_steps(way, tokenizer, tmp_path), walk_step(way, ROWS)
    assert walk.peak == pytest.approx(meter.at_peak.total(), rel=0.01)
    assert 2 * walk.flops == meter.flops


def test_padding_costs_what_rows_do():
    even, uneven = ((40, 25),) * 3, ((40, 25), (10, 10), (10, 10))
    plain, padded = walk_step(SFT_FULL, even), walk_step(SFT_FULL, uneven)
    assert padded.tokens == plain.tokens == 3 * 65
    assert padded.parts[ACTIVATIONS] == pytest.approx(plain.parts[ACTIVATIONS], rel=0.01)
    assert padded.flops < plain.flops  # the output head reads completion tokens alone


def test_mean_padded_lengths_are_those_of_all_batches():
    lengths = [3, 9, 4, 4, 7, 12]
    for batch in (1, 2, 4, 6):
        every = [max(rows) for rows in itertools.combinations(lengths, batch)]
        assert mean_padded_length(lengths, batch) == pytest.approx(sum(every) / len(every))
    assert mean_padded_length(lengths, 50) == 12


def test_a_plan_is_of_what_is_said():
    model = ["--model_name_or_path", "m"]
    assert parse_arguments(["plan", "sft", *model, "--completion_column", "text"]).verb == "plan sft"
    assert parse_arguments(["plan", "train", *model]).verb == parse_arguments(["plan", *model]).verb == "plan"


def test_a_config_says_what_the_plan_is_of(tmp_path):
    config = tmp_path / "sft.yaml"
    config.write_text("verb: sft\nmodel_name_or_path: m\nlearning_rate: 2e-5\n", encoding="utf-8")
    assert parse_arguments(["plan", "--config", str(config)]).verb == "plan sft"
    assert parse_arguments(["plan", "train", "--config", str(config)]).verb == "plan"


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["plan", "--completion_column", "text"], "is a flag of the verb sft, not of plan; plan sft takes it"),
        (["plan", "sft", "--beta", "0.1"], "--beta: is a flag of the verb train and evaluate, not of plan sft"),
        (["plan", "sft", "--packing"], "--packing: cannot be set here: sft trains on padded batches"),
        (["plan", "sft", "--use_4bit"], "--use_4bit: 4-bit weights cannot be trained; add --use_lora"),
    ],
)
def test_flags_are_those_of_what_is_planned(run_script, words, fault):
    code, _, err = run_script(*words, "--model_name_or_path", "m")
    assert code == 2
    assert fault in err


def test_the_plan_of_sft_as_a_person_meets_it(run_script, tiny_model, pairs_file, tmp_path):
    shape = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2, "--num_train_epochs", 3)
    flags = ("plan", "sft", "--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--gpu", "L4", *shape)
    code, out, err = run_script(*flags, "--json_file", tmp_path / "plan.json")
    assert code == 0, err
    assert "rows x micro-batches" in out
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["steps"] == -(-record["train_rows"] * 3 // 8)
    assert all(choice["parts"]["reference"] == 0 for choice in record["choices"])
    settings = parse_arguments(record["command"].split()[2:])
    assert (settings.verb, settings.training.num_train_epochs) == ("sft", 3)


def test_a_plan_of_sft_corrected_by_real_steps(run_script, tiny_model, pairs_file, tmp_path):
    flags = ("plan", "sft", "--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--use_lora")
    code, out, err = run_script(*flags, "--measure", "--json_file", tmp_path / "plan.json")
    assert code == 0, err
    assert "(measured)" in out
    assert json.loads((tmp_path / "plan.json").read_text())["choices"][0]["fits"]
