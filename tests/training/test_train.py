"""The main job, run for real: every way of training leaves a folder that loads and says what happened."""

from __future__ import annotations

import json
import math
import re
import zipfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from shared.pairs import make_pairs, write_lines
from shared.runs import read_metrics, read_record
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from utils.arguments import parse_arguments
from utils.arguments.help_text import help_text
from utils.training.config import learning_rate

QUICK = {"per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 5e-3, "warmup_steps": 0}


@pytest.fixture
def train(run_script, tiny_model, pairs_file, tmp_path):
    """Trains into a fresh folder and returns it; more flags as wished."""

    def run(*flags, folder="run", model=tiny_model, data=pairs_file, verb="train") -> Path:
        output = tmp_path / folder
        quick = [part for name, value in QUICK.items() if f"--{name}" not in flags for part in (f"--{name}", value)]
        code, out, err = run_script(
            verb, "--model_name_or_path", model, "--dataset_name", data, "--output_dir", output, *quick, *flags
        )
        assert code == 0, out + err
        return output

    return run


def completion_log_probs(model, tokenizer, pairs: list[dict]) -> list[tuple[float, float]]:
    """Summed log-probs of chosen and rejected, the plainest way: one text at a time, no padding."""
    found = []
    for pair in pairs:
        sums = []
        for side in ("chosen", "rejected"):
            prompt = tokenizer(pair["prompt"])["input_ids"]
            ids = torch.tensor([[*tokenizer(pair["prompt"] + pair[side])["input_ids"], tokenizer.eos_token_id]])
            with torch.no_grad():
                log_probs = model(ids).logits[0, :-1].log_softmax(-1)
            chosen = log_probs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
            sums.append(chosen.sum().item())
        found.append(tuple(sums))
    return found


def held_out_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "held_out_pairs.jsonl").read_text().splitlines()]


def assert_disk_gives_the_recorded_log_probs(folder: Path, model, pairs: list[dict]):
    rows = held_out_rows(folder)
    assert rows
    found = completion_log_probs(model.eval(), AutoTokenizer.from_pretrained(folder), [pairs[r["row"]] for r in rows])
    for row, (chosen, rejected) in zip(rows, found, strict=True):
        assert chosen == pytest.approx(row["chosen_logps"], abs=2e-4)
        assert rejected == pytest.approx(row["rejected_logps"], abs=2e-4)
    mean = sum(chosen for chosen, _ in found) / len(found)
    assert read_record(folder)["metrics"]["held_out"]["chosen_logps"] == pytest.approx(mean, abs=2e-4)


def assert_learned(folder: Path):
    metrics = read_record(folder)["metrics"]
    assert metrics["held_out_before"]["accuracy"] == 0.5
    assert metrics["held_out_before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["held_out"]["accuracy"] > 0.8
    assert metrics["held_out"]["loss"] < metrics["held_out_before"]["loss"]


def assert_no_pickles(folder: Path):
    for path in folder.rglob("*"):
        if path.is_file():
            assert not zipfile.is_zipfile(path), f"{path} is a torch archive"
            assert path.suffix in (".json", ".jsonl", ".jinja", ".safetensors", ".html"), path


def test_full_training_leaves_a_plain_model_folder(train, tiny_model):
    folder = train("--save_steps", 5, "--num_train_epochs", 2)
    assert_learned(folder)
    assert_no_pickles(folder)
    assert_disk_gives_the_recorded_log_probs(folder, AutoModelForCausalLM.from_pretrained(folder), make_pairs(60))
    before, after = load_file(tiny_model / "model.safetensors"), load_file(folder / "model.safetensors")
    assert set(before) == set(after)
    assert all(not torch.equal(before[name], after[name]) for name in before), "every trainable parameter moves"
    assert {p.name for p in folder.glob("checkpoint-*")} >= {"checkpoint-5"}


def test_the_record_says_what_happened(train, pairs_file, tiny_model):
    folder = train("--max_steps", 4)
    record = read_record(folder)
    assert {"status", "verb", "settings", "command", "versions", "model", "data", "reference", "metrics"} <= set(record)
    assert (record["status"], record["verb"]) == ("finished", "train")
    assert record["settings"]["model_name_or_path"] == str(tiny_model)
    assert record["settings"]["max_steps"] == 4
    assert record["model"]["parameters"] == record["model"]["trainable_parameters"] > 0
    assert record["model"]["architecture"] == "LlamaForCausalLM"
    data = record["data"]
    assert data["source"].startswith(str(pairs_file))
    assert (data["train_pairs"], data["held_out_pairs"], data["dropped"], data["truncated"]) == (55, 5, {}, 0)
    names = {"loss", "accuracy", "margin", "chosen_reward", "rejected_reward"}
    assert all(names <= set(record["metrics"][part]) for part in ("train", "held_out_before", "held_out"))
    resources = record["resources"]
    assert 0 < resources["train_seconds"] < resources["seconds"]
    assert resources["pairs_per_second"] == pytest.approx(16 / resources["train_seconds"], rel=0.02)
    assert resources["peak_memory_bytes"] > 10**7
    assert record["engine"]["tokens_computed"] >= 16 * 2 * 10
    assert record["warnings"] == []


def test_metrics_have_a_line_for_each_event(train):
    lines = read_metrics(train("--max_steps", 4, "--eval_steps", 2))
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "held_out_loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    assert {"margin", "chosen_reward", "rejected_reward", "learning_rate"} <= set(training[0])
    assert training[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_lora_trains_the_adapter_and_nothing_else(train, tiny_model):
    folder = train("--use_lora", "--lora_r", 4, "--num_train_epochs", 2, "--lora_dropout", 0.1)
    assert_learned(folder)
    assert_no_pickles(folder)
    assert not [path for path in folder.rglob("*") if path.name == "ref"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 32.0, 0.1)
    adapter = load_file(folder / "adapter_model.safetensors")
    assert all(value.dtype == torch.float32 and value.abs().sum() > 0 for value in adapter.values())
    assert {name.split(".")[-3] for name in adapter} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    tuned = PeftModel.from_pretrained(base, folder)
    assert_disk_gives_the_recorded_log_probs(folder, tuned, make_pairs(60))
    merged = tuned.unload().state_dict()
    assert all(torch.equal(frozen[name], merged[name]) for name in frozen)
    record = read_record(folder)
    assert record["reference"] == "the base model, with the adapter disabled, scored once before training"
    assert record["model"]["trainable_parameters"] == sum(value.numel() for value in adapter.values())


def test_lora_on_4_bits_is_real_nf4_with_double_quantization(train, tiny_model, monkeypatch):
    import bitsandbytes as bnb

    from utils.models import loading
    from utils.training import stages

    seen = []
    original = stages.load_policy

    def spy(*arguments):
        model = original(*arguments)
        seen.extend(module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit))
        return model

    monkeypatch.setattr(stages, "load_policy", spy)
    folder = train("--use_lora", "--use_4bit", "--lora_r", 4, "--num_train_epochs", 2)
    assert len(seen) == 14
    assert all(layer.weight.dtype == torch.uint8 for layer in seen)
    assert all(layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested for layer in seen)
    assert_learned(folder)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantized = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=nf4, device_map={"": "cpu"})
    loading.keep_quantized_weights(quantized)
    assert_disk_gives_the_recorded_log_probs(folder, PeftModel.from_pretrained(quantized, folder), make_pairs(60))


@torch.no_grad()
def test_evaluation_leaves_4_bit_weights_as_they_are(tiny_model, pairs_file, tmp_path, monkeypatch):
    """Where the processor has bfloat16, bitsandbytes would repack them, with coarser scales."""
    from utils.arguments import parse_arguments
    from utils.models.loading import load_policy
    from utils.models.sources import find_model
    from utils.runtime import Precision

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    settings = parse_arguments(
        [
            *["--use_lora", "--use_4bit", "--dry_run", "--model_name_or_path"],
            str(tiny_model),
            "--dataset_name",
            str(pairs_file),
        ]
    )
    source = find_model("--model_name_or_path", str(tiny_model))
    model = load_policy(source, settings, Precision(torch.float32, torch.device("cpu"), ""))
    ids = torch.arange(3, 23).unsqueeze(0)
    weights = [module.weight for module in model.modules() if type(module).__name__ == "Linear4bit"]
    before = [weight.clone() for weight in weights]
    training, evaluating = (model.train(mode)(input_ids=ids).logits for mode in (True, False))
    assert torch.equal(training, evaluating)
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    assert all(weight.quant_state.nested for weight in weights)


def test_full_training_with_4_bits_holds_a_reference_that_stays_in_them(train, run_script, tiny_model):
    folder = train("--use_4bit", "--num_train_epochs", 2, "--precompute_ref_log_probs", "false")
    record = read_record(folder)
    assert record["reference"].startswith("a frozen copy of the initial weights in 4 bits")
    assert record["model"]["trainable_parameters"] == record["model"]["parameters"]
    assert record["metrics"]["held_out_before"]["margin"] != 0, "a quantized reference is not quite the policy"
    assert record["metrics"]["held_out"]["accuracy"] > 0.8
    weights = load_file(folder / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_a_separate_reference_is_what_rewards_are_measured_against(train, tiny_model, other_model):
    folder = train("--ref_model_name_or_path", other_model, "--max_steps", 1)
    pairs = make_pairs(60)
    tokenizer = AutoTokenizer.from_pretrained(other_model)
    rows = held_out_rows(folder)
    other = AutoModelForCausalLM.from_pretrained(other_model).eval()
    expected = completion_log_probs(other, tokenizer, [pairs[row["row"]] for row in rows])
    for row, (chosen, rejected) in zip(rows, expected, strict=True):
        assert row["ref_chosen_logps"] == pytest.approx(chosen, abs=2e-4)
        assert row["chosen_reward"] == pytest.approx(0.1 * (row["chosen_logps"] - chosen), abs=1e-4)
        assert row["margin"] == pytest.approx(
            0.1 * (row["chosen_logps"] - chosen - row["rejected_logps"] + rejected), abs=1e-4
        )
        assert row["loss"] == pytest.approx(math.log1p(math.exp(-row["margin"])), abs=1e-5)


def test_swapping_the_columns_flips_the_margin(train, other_model):
    flags = ("--ref_model_name_or_path", other_model, "--max_steps", 1)
    straight = read_record(train(*flags, folder="a"))["metrics"]["held_out_before"]
    swapped = read_record(train(*flags, "--chosen_column", "rejected", "--rejected_column", "chosen", folder="b"))[
        "metrics"
    ]["held_out_before"]
    assert straight["margin"] != 0
    assert swapped["margin"] == pytest.approx(-straight["margin"], abs=1e-6)
    assert swapped["accuracy"] == pytest.approx(1 - straight["accuracy"])
    assert swapped["chosen_reward"] == pytest.approx(straight["rejected_reward"], abs=1e-6)


@pytest.mark.parametrize("bits", [[], ["--use_4bit"]], ids=["full-precision", "4-bit"])
def test_sft_adapter_then_dpo_continues_it_against_its_frozen_copy(train, tiny_model, bits):
    stage1 = train("--use_lora", "--lora_r", 4, *bits, "--num_train_epochs", 2, folder="sft", verb="sft")
    first = read_record(stage1)["metrics"]
    assert first["held_out"]["loss"] < first["held_out_before"]["loss"]
    stage2 = train("--max_steps", 6, *bits, folder="dpo", model=stage1)
    record = read_record(stage2)
    assert record["reference"] == f"a frozen copy of the adapter that training starts from ({stage1})"
    assert record["metrics"]["held_out_before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert record["metrics"]["held_out_before"]["margin"] == 0
    adapter = load_file(stage1 / "adapter_model.safetensors")
    assert record["model"]["trainable_parameters"] == sum(value.numel() for value in adapter.values())
    config = json.loads((stage2 / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert not (stage2 / "ref").exists()
    if not bits:
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), stage2)
        assert_disk_gives_the_recorded_log_probs(stage2, tuned, make_pairs(60))


def test_full_sft_then_dpo_starts_from_its_folder(train):
    stage1 = train("--max_steps", 4, folder="sft", verb="sft")
    stage2 = train("--max_steps", 2, folder="dpo", model=stage1)
    assert read_record(stage2)["metrics"]["held_out_before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_accumulation_and_batch_size_do_not_change_the_result(train, verb):
    """Seven steps of four pairs with a tail of two: every split into micro-batches gives the same weights."""
    results = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        folder = train(
            "--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation,
            "--max_samples", 33, "--per_device_eval_batch_size", batch, "--validation_split", "0.1",
            folder=f"{batch}x{accumulation}", verb=verb,
        )  # fmt: skip
        results.append((load_file(folder / "model.safetensors"), read_record(folder)["metrics"], read_metrics(folder)))
    (weights, metrics, lines), *others = results
    assert len([line for line in lines if "loss" in line]) == 8
    for other_weights, other_metrics, other_lines in others:
        for name, value in weights.items():
            assert torch.allclose(value, other_weights[name], atol=2e-4), name
        for part in ("train", "held_out"):
            assert other_metrics[part] == pytest.approx(metrics[part], abs=2e-3)
        for line, other in zip(lines, other_lines, strict=True):
            assert other.get("loss") == pytest.approx(line.get("loss"), abs=1e-4)
            assert other.get("grad_norm", 0) == pytest.approx(line.get("grad_norm", 0), rel=2e-3)


@pytest.mark.parametrize("engine", ["shared_prefix", "padded"])
def test_a_limit_of_tokens_changes_micro_batches_and_nothing_else(train, engine):
    flags = ("--engine", engine, "--max_samples", 33, "--validation_split", "0.1")
    whole = train(*flags, "--per_device_train_batch_size", 4, folder="whole")
    parts = train(*flags, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2,
                  "--max_tokens_per_batch", 90, folder="parts")  # fmt: skip
    for line, other in zip(read_metrics(whole), read_metrics(parts), strict=True):
        assert other.get("loss") == pytest.approx(line.get("loss"), abs=1e-4)
        assert other.get("grad_norm", 0) == pytest.approx(line.get("grad_norm", 0), rel=2e-3)
        assert other.get("pairs") == line.get("pairs")
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(torch.allclose(a[name], b[name], atol=2e-4) for name in a)
    a, b = (read_record(folder)["metrics"]["held_out"] for folder in (whole, parts))
    assert a == pytest.approx(b, abs=2e-3)
    if engine == "padded":
        assert read_record(parts)["engine"]["tokens_computed"] < read_record(whole)["engine"]["tokens_computed"]


def test_a_pair_over_the_limit_of_tokens_is_refused(run_script, tiny_model, pairs_file, tmp_path):
    code, _, err = run_script("--model_name_or_path", tiny_model, "--dataset_name", pairs_file,
                              "--output_dir", tmp_path / "run", "--max_tokens_per_batch", 20)  # fmt: skip
    assert code == 2
    assert "--max_tokens_per_batch is 20, but the longest pair alone takes" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_sft_learns_the_mean_over_completion_tokens(train, tiny_model, pairs_file, loss):
    folder = train("--max_steps", 1, "--per_device_train_batch_size", 60, "--validation_split", "none",
                   "--loss_type", loss, verb="sft")  # fmt: skip
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    losses = []
    for pair in map(json.loads, pairs_file.read_text().splitlines()):
        prompt = tokenizer(pair["prompt"]).input_ids
        ids = torch.tensor([prompt + tokenizer(pair["chosen"], add_special_tokens=False).input_ids + [1]])
        log_probs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        losses += (-log_probs * (log_probs.exp() if loss == "dft" else 1)).tolist()
    line = next(line for line in read_metrics(folder) if "loss" in line)
    assert line["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert line["tokens"] == len(losses)


def test_batches_of_similar_length_can_be_asked_for(train):
    folder = train("--max_steps", 2, "--train_sampling_strategy", "group_by_length")
    assert read_record(folder)["status"] == "finished"


def test_precomputed_reference_changes_nothing_but_memory(train):
    flags = ("--max_steps", 5)
    plain = train(*flags, folder="plain")
    ahead = train(*flags, "--precompute_ref_log_probs", folder="ahead")
    a, b = (load_file(folder / "model.safetensors") for folder in (plain, ahead))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    a, b = (read_record(folder)["metrics"]["held_out"] for folder in (plain, ahead))
    assert a == pytest.approx(b, abs=1e-4)


def test_a_precomputed_reference_is_rounded_as_the_policy_is(train):
    """At step 0 the policy is its reference to the last bit, in 16 bits too."""
    stage1 = train("--max_steps", 4, "--use_lora", folder="sft", verb="sft")
    flags = ("--dtype", "bfloat16", "--max_steps", 1, "--precompute_ref_log_probs")
    before = read_record(train(*flags, folder="dpo", model=stage1))["metrics"]["held_out_before"]
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert before["accuracy"] == 0.5


def test_dropout_on_a_continued_adapter_is_recorded_with_it(train):
    stage1 = train("--max_steps", 2, "--use_lora", folder="sft", verb="sft")
    stage2 = train("--max_steps", 2, "--lora_dropout", 0.25, folder="dpo", model=stage1)
    assert json.loads((stage2 / "adapter_config.json").read_text())["lora_dropout"] == 0.25
    assert read_record(stage2)["metrics"]["held_out_before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_wpo_weights_count_in_the_held_out_loss_as_in_training(train, tmp_path):
    """With one batch of the rows that are held out too, and no step worth the name, both are the weighted ln 2."""
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        write_lines(data / f"{split}.jsonl", make_pairs(30))
    flags = ("--use_weighting", "--max_steps", 1, "--learning_rate", 1e-12, "--per_device_train_batch_size", 30)
    metrics = read_record(train(*flags, data=data))["metrics"]
    assert metrics["held_out"]["loss"] != pytest.approx(math.log(2), abs=0.01)
    assert metrics["train"]["loss"] == pytest.approx(metrics["held_out"]["loss"], rel=1e-5)


def test_gradient_checkpointing_gives_the_same_weights(train):
    plain, checkpointed = (
        load_file(train("--max_steps", 3, "--use_lora", *flags, folder=name) / "adapter_model.safetensors")
        for name, flags in (("plain", []), ("checkpointed", ["--gradient_checkpointing"]))
    )
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-6) for name in plain)


@pytest.mark.parametrize(
    "flags",
    [["--use_dora"], ["--use_rslora"], ["--lora_target_modules", "q_proj,v_proj"], ["--dtype", "bfloat16"]],
    ids=lambda flags: flags[0],
)
def test_ways_of_adapting(train, tiny_model, flags):
    folder = train("--use_lora", "--max_steps", 3, *flags)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["use_dora"] == ("--use_dora" in flags)
    assert config["use_rslora"] == ("--use_rslora" in flags)
    if "q_proj,v_proj" in flags:
        assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder)
    if "bfloat16" not in flags:
        assert_disk_gives_the_recorded_log_probs(folder, tuned, make_pairs(60))


def test_any_field_of_dpo_config_is_a_flag(train):
    lines = read_metrics(train("--max_steps", 3, "--max_grad_norm", 1e-9, "--optim", "sgd"))
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses == pytest.approx([math.log(2)] * 3, abs=1e-5), "so small a step cannot move the loss"


def test_a_config_file_gives_the_same_run_as_its_flags(train, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("use_lora: true\nlora_r: 4\nmax_steps: 3\n")
    by_file = train("--config", config, folder="file")
    by_flags = train("--use_lora", "--lora_r", 4, "--max_steps", 3, folder="flags")
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (by_file, by_flags))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_named_splits_are_used_as_they_are(train, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_lines(data / "train.jsonl", make_pairs(20))
    write_lines(data / "test.jsonl", make_pairs(30)[20:])
    record = read_record(train("--max_steps", 1, data=data))
    assert (record["data"]["train_pairs"], record["data"]["held_out_pairs"]) == (20, 10)


def test_nothing_held_out_still_trains(train):
    record = read_record(train("--validation_split", "none", "--max_steps", 2))
    assert (record["data"]["train_pairs"], record["data"]["held_out_pairs"]) == (60, 0)
    assert set(record["metrics"]) == {"train"}


def test_long_pairs_are_counted(train, tmp_path):
    pairs = make_pairs(20)
    pairs[3]["prompt"] = "word " * 80 + pairs[3]["prompt"]
    for row in (5, 7, 9):
        pairs[row]["chosen"] = " lovely" * 60
    record = read_record(train("--max_length", 48, "--max_steps", 1, data=write_lines(tmp_path / "p.jsonl", pairs)))
    assert record["data"]["truncated"] == 4
    assert "15% of the pairs are truncated to --max_length 48" in record["warnings"][0]
    assert record["data"]["train_pairs"] + record["data"]["held_out_pairs"] == 20


def test_dry_run_goes_through_every_stage_and_leaves_nothing(run_script, tiny_model, pairs_file, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    output = tmp_path / "run"
    code, out, err = run_script(
        "--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", output, "--dry_run",
        "--use_lora", "--num_train_epochs", 3,
    )  # fmt: skip
    assert code == 0, err
    assert "step 1/1" in out
    assert "nothing was saved" in out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_the_learning_rate_is_the_one_that_the_help_says_unless_it_is_given(verb):
    words = [verb, "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
    said = re.findall(r"\d+e-\d+", help_text(verb, "learning_rate"))
    settings = parse_arguments(words)
    assert [learning_rate(settings, adapts) for adapts in (False, True)] == list(map(float, said))
    assert learning_rate(parse_arguments([*words, "--learning_rate", "3e-7"]), adapts=True) == 3e-7
