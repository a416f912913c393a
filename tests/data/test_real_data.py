"""Real preference data and a real pretrained model, end to end. Skipped where they are absent."""

from __future__ import annotations

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from shared.runs import REAL_DATA, read_record
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.arguments import parse_arguments
from utils.data.encoding import PromptEncoder
from utils.data.loading import load_pairs
from utils.data.tokenizing import PAIR_COLUMNS, tokenize_rows
from utils.responses.generation import sample_continuations
from utils.settings.verbs import SamplingSettings

MODEL = REAL_DATA / "models" / "stories260K"
PREFERENCES = REAL_DATA / "preferences"

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="no real data here (set DPO_REAL_DATA)")

SOURCES = {
    "hh_rlhf": [],
    "ultrafeedback_prompt_strings": [],
    "ultrafeedback_trl_lib": [],
    "ultrafeedback_h4": [],
    "orca_openai_format": [],
    "orca_openai_format mapped": [
        "--prompt_column", "input.messages",
        "--chosen_column", "preferred_output",
        "--rejected_column", "non_preferred_output",
    ],
    "llamafactory/dpo_en_demo.json": [],
    "oasst_trees": ["--pairs_per_prompt", 3],
    "stack_exchange_paired": [],
}  # fmt: skip
STEP = ["--max_steps", 1, "--max_samples", 12, "--max_length", 192, "--on_bad_rows", "skip", "--logging_steps", 1,
        "--per_device_train_batch_size", 2, "--use_lora"]  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_every_form_reaches_a_training_step(run_script, tmp_path, source):
    data = PREFERENCES / source.split()[0]
    flags = ("--model_name_or_path", MODEL, "--dataset_name", data, *SOURCES[source], *STEP)
    code, _, err = run_script(*flags, "--output_dir", tmp_path / "run")
    assert code == 0, err
    record = read_record(tmp_path / "run")
    assert record["status"] == "finished"
    assert record["data"]["train_pairs"] + record["data"]["held_out_pairs"] >= 12
    assert record["metrics"]["held_out_before"]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    if "transcript" in record["data"]["reading"]:
        turns = [{"role": "user", "content": "Hi"}]
        shown = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert shown == "<s>\n\nHuman: Hi\n\nAssistant:"


def test_dialogues_are_answered_alike_in_any_batch_and_compared(run_script, tmp_path):
    flags = ("--model_name_or_path", MODEL, "--dataset_name", PREFERENCES / "hh_rlhf", "--max_samples", 60,
             "--max_steps", 1, "--max_length", 192, "--on_bad_rows", "skip", "--use_lora",
             "--dtype", "float32")  # fmt: skip
    assert run_script(*flags, "--output_dir", tmp_path / "run")[0] == 0
    few = ("--num_prompts", 5, "--max_new_tokens", 24)
    code, out, err = run_script("compare", "--model_name_or_path", tmp_path / "run", *few)
    assert (code, err) == (0, "")
    assert "chat template: the tokenizer's own" in out
    lines = (tmp_path / "run" / "comparison" / "comparison.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    sampling = SamplingSettings(max_new_tokens=24)
    alone = [sample_continuations(model, tokenizer, [row["prompt"]], sampling, seed=42)[0].text for row in rows]
    assert alone == [row["response"] for row in rows]
    story = sample_continuations(model, tokenizer, ["Once upon a time"], sampling, seed=1)[0]
    assert story.text.startswith((" ", ",")), "words stay apart behind a prompt of text"
    assert len(set(alone)) == len(alone) == 5


# A model of 260,000 parameters that writes children's stories learns from dialogue what is harmless, a little. From as
# many rows of UltraFeedback it learns nothing that holds for others (46% to 56% of held-out pairs in seven settings).
TRAIN = ["--max_length", 512, "--on_bad_rows", "skip", "--learning_rate", 1e-3, "--validation_split", 0.25]
WAYS = {
    "lora": ["--use_lora"],
    "lora 4-bit": ["--use_lora", "--use_4bit"],
    "full": [],
    "full 4-bit": ["--use_4bit"],
    "separate reference": ["--ref_model_name_or_path", MODEL],
}


def assert_learned(record: dict, at_least: float):
    metrics = record["metrics"]
    assert metrics["held_out_before"]["accuracy"] == pytest.approx(
        0.5, abs=0.2 if "4 bits" in record["reference"] else 0
    )
    assert metrics["held_out"]["accuracy"] > at_least
    assert metrics["held_out"]["margin"] > metrics["held_out_before"]["margin"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_training_learns_real_preferences(run_script, tmp_path, way):
    flags = ("--model_name_or_path", MODEL, "--dataset_name", PREFERENCES / "hh_rlhf", "--max_samples", 1200, *TRAIN)
    code, _, err = run_script(*flags, *WAYS[way], "--output_dir", tmp_path / "run")
    assert code == 0, err
    assert_learned(read_record(tmp_path / "run"), at_least=0.54)
    if "4-bit" not in way:
        assert_disk_gives_the_recorded_log_probs(tmp_path / "run", flags)


@torch.no_grad()
def assert_disk_gives_the_recorded_log_probs(folder, flags):
    """The folder as plain transformers and PEFT load it, one held-out text at a time."""
    settings = parse_arguments([str(flag) for flag in (*flags, "--output_dir", folder)])
    data = load_pairs(settings.data, "train", settings.training.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = PromptEncoder(tokenizer, frozenset({tokenizer.eos_token_id}))
    rows, _ = tokenize_rows(data.held_out.select(range(20)), encoder, PAIR_COLUMNS, 512, "shorten_prompt")
    is_adapter = (folder / "adapter_config.json").is_file()
    model = (AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM).from_pretrained(folder).eval()
    recorded = map(json.loads, (folder / "held_out_pairs.jsonl").read_text().splitlines())
    for row, seen in zip(rows, recorded, strict=False):
        assert row["row"] == seen["row"]
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            assert log_probs[len(row["prompt_ids"]) - 1 :].sum().item() == pytest.approx(
                seen[f"{side}_logps"], abs=2e-3
            )


@pytest.mark.slow
@pytest.mark.parametrize("source", ["orca_openai_format", "orca_openai_format mapped"])
def test_what_was_read_is_learnt(run_script, tmp_path, source):
    flags = ("--model_name_or_path", MODEL, "--dataset_name", PREFERENCES / "orca_openai_format", *SOURCES[source])
    code, _, err = run_script(*flags, *TRAIN, "--num_train_epochs", 2, "--use_lora", "--output_dir", tmp_path / "run")
    assert code == 0, err
    assert_learned(read_record(tmp_path / "run"), at_least=0.85)


@pytest.mark.slow
def test_sft_then_dpo_on_real_dialogue(run_script, tmp_path):
    data = ("--dataset_name", PREFERENCES / "hh_rlhf", "--max_samples", 300, *TRAIN)
    code, _, err = run_script("sft", "--model_name_or_path", MODEL, *data, "--use_lora", "--output_dir", tmp_path / "a")
    assert code == 0, err
    first = read_record(tmp_path / "a")["metrics"]
    assert first["held_out"]["loss"] < first["held_out_before"]["loss"]
    code, _, err = run_script("--model_name_or_path", tmp_path / "a", *data, "--output_dir", tmp_path / "b")
    assert code == 0, err
    second = read_record(tmp_path / "b")["metrics"]
    assert second["held_out_before"]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert second["train"]["accuracy"] > 0.55
    rows = [json.loads(line) for line in (tmp_path / "b" / "held_out_pairs.jsonl").read_text().splitlines()]
    assert sum(row["chosen_logps"] for row in rows) / len(rows) == pytest.approx(second["held_out"]["chosen_logps"])
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), tmp_path / "b")
    assert all(torch.isfinite(value).all() for value in tuned.state_dict().values())


@pytest.mark.parametrize(
    ("source", "known"),
    [
        ("ultrafeedback_prompt_strings", {"identical": 4, "empty": 1, "tie": 110}),
        ("hh_rlhf", {"empty": 3}),
    ],
)
def test_what_is_wrong_with_real_data_is_found(run_script, tmp_path, source, known):
    data = PREFERENCES / source
    files = ("--json_file", tmp_path / "found.json", "--output_file", tmp_path / "clean.jsonl")
    code, _, err = run_script("data", "--dataset_name", data, "--model_name_or_path", MODEL, *files)
    assert (code, err) == (3, "")
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    counts = {finding["name"]: finding["count"] for finding in found["findings"]}
    assert {name: counts[name] for name in known} == known
    assert found["tokens"]["shared_prefix_tokens"] < found["tokens"]["padded_tokens"]
    code, _, err = run_script(
        "--model_name_or_path", MODEL, "--dataset_name", tmp_path / "clean.jsonl", *STEP, "--dry_run"
    )
    assert code == 0, err
