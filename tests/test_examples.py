"""examples/configs: every file parses, and runs dry with a small model of its architecture and rows of its form."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from shared.models import save_tiny_tokenizer
from shared.pairs import make_pairs, write_lines
from shared.runs import ROOT

from utils.arguments import parse_arguments

CONFIGS = {path.stem: path for path in sorted((ROOT / "examples" / "configs").glob("*.yaml"))}
README = (ROOT / "examples" / "configs" / "README.md").read_text(encoding="utf-8")
RUN_BY_DEFAULT = ("llama31_8b_pilot_shp", "pythia_2.8b_hh_ipo", "zephyr_7b_dpo")  # one of each architecture
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=False)]


def messages_row(pair: dict) -> dict:
    sides = {side: turns(pair["prompt"], pair[side]) for side in ("chosen", "rejected")}
    return sides | {"score_chosen": 8.0, "score_rejected": 3.0}


def transcripts_row(pair: dict) -> dict:
    return {side: f"\n\nHuman: {pair['prompt']}\n\nAssistant:{pair[side]}" for side in ("chosen", "rejected")}


def webgpt_row(pair: dict) -> dict:
    question = {"dataset": "eli5", "id": pair["prompt"], "full_text": pair["prompt"]}
    answers = {"answer_0": pair["chosen"], "score_0": 0.5, "answer_1": pair["rejected"], "score_1": -0.5}
    return {"question": question} | answers


def shp_row(pair: dict) -> dict:
    texts = {"history": pair["prompt"], "human_ref_A": pair["chosen"], "human_ref_B": pair["rejected"]}
    return texts | {"post_id": pair["prompt"], "labels": 1, "score_A": 9, "score_B": 3, "score_ratio": 3.0}


ROWS = {
    "trl-lib/ultrafeedback_binarized": messages_row,
    "HuggingFaceH4/ultrafeedback_binarized": lambda pair: {"prompt": pair["prompt"]} | messages_row(pair),
    "HuggingFaceH4/ultrachat_200k": lambda pair: {"messages": turns(pair["prompt"], pair["chosen"])},
    "Anthropic/hh-rlhf": transcripts_row,
    "openai/webgpt_comparisons": webgpt_row,
    "stanfordnlp/SHP": shp_row,
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict[str, Path]:
    """A random model of each architecture, with the context of a large one; and an adapter as stage one leaves it."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    root, made = tmp_path_factory.mktemp("stand-ins"), {}
    for name in ("Llama", "Mistral", "GPTNeoX"):
        size = save_tiny_tokenizer(root / name)
        config = getattr(transformers, f"{name}Config")(
            vocab_size=size, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, pad_token_id=2, **SHAPE
        )
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        model.save_pretrained(root / name)
        made[name] = root / name
    base = transformers.AutoModelForCausalLM.from_pretrained(made["Llama"])
    adapter = get_peft_model(base, LoraConfig(r=64, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    adapter.save_pretrained(root / "adapter")
    save_tiny_tokenizer(root / "adapter")
    return made | {"adapter": root / "adapter"}


def stand_in_of(name: str, values: dict) -> str:
    """Which stand-in takes the place of the config's model."""
    if name == "llama2_7b_24gb_dpo":
        return "adapter"
    model = values["model_name_or_path"].lower()
    kinds = {"llama": "Llama", "pythia": "GPTNeoX", "mistral": "Mistral", "zephyr": "Mistral"}
    return next(kind for word, kind in kinds.items() if word in model)


def save_rows(values: dict, folder: Path) -> Path:
    """Rows in the form of the config's data, with the splits that it names."""
    make = ROWS[values["dataset_name"]]
    train, test = values.get("dataset_split", "train"), values.get("validation_split", "test")
    folder.mkdir()
    for name, seed in ((train, 0), (test, 1)):
        rows = [make({**pair, "prompt": f"{pair['prompt']} {name}"}) for pair in make_pairs(12, seed)]
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_parses_and_is_explained(name):
    path = CONFIGS[name]
    settings = parse_arguments(["--config", str(path)])
    text = path.read_text(encoding="utf-8")
    assert settings.verb == ("sft" if "verb: sft" in text else "train")
    values = yaml.safe_load(text)
    assert values["output_dir"].startswith("runs/")
    assert f"--config examples/configs/{path.name}" in text, "the command that uses it"
    assert f"[{path.name}]({path.name})" in README, "its line in the README"


@pytest.mark.parametrize(
    "name", [name if name in RUN_BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_every_config_runs_dry(name, stand_ins, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    values = yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))
    model, data = stand_ins[stand_in_of(name, values)], save_rows(values, tmp_path / "data")
    changed = ("--model_name_or_path", model, "--dataset_name", data, "--dtype", "float32", "--dry_run")
    code, out, err = run_script("--config", CONFIGS[name], *changed)
    assert code == 0, err
    assert "dry run: every stage works" in out
    assert "12 rows to train on, 12 held out" in " ".join(out.split()) or values["dataset_name"].startswith("openai")


@pytest.mark.parametrize(
    "name", [name if name in RUN_BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_every_config_plans(name, stand_ins, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    values = yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))
    model, data = stand_ins[stand_in_of(name, values)], save_rows(values, tmp_path / "data")
    changed = ("--model_name_or_path", model, "--dataset_name", data, "--gpu_memory", 24, "--gpu_tflops", 100)
    code, out, err = run_script("plan", "--config", CONFIGS[name], *changed)
    assert code == 0, err
    assert re.search(r"^model: .* parameters, .* trained", out, flags=re.MULTILINE)
    assert f"python advanced_dpo_script.py {values.get('verb', 'train')} " in out, "a ready command"


def test_stage_two_goes_on_where_stage_one_ends():
    values = {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in CONFIGS.items()}
    assert values["llama2_7b_24gb_dpo"]["model_name_or_path"] == values["llama2_7b_24gb_sft"]["output_dir"]
    for loss in ("dpo", "cdpo", "ipo"):
        stage = values[f"pythia_2.8b_hh_{loss}"]
        assert stage["model_name_or_path"] == values["pythia_2.8b_hh_sft"]["output_dir"]
        assert stage["per_device_train_batch_size"] * stage["gradient_accumulation_steps"] * 4 == 64


def test_the_zephyr_template_writes_what_zephyr_reads(stand_ins):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stand_ins["Mistral"])
    template = (ROOT / "examples" / "configs" / "zephyr_chat_template.jinja").read_text(encoding="utf-8")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n"


def test_every_launcher_and_file_that_a_config_names_exists():
    for path in [*CONFIGS.values(), ROOT / "examples" / "configs" / "README.md"]:
        for name in re.findall(r"examples/[\w./-]+\.(?:yaml|jinja|sh)", path.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{path.name} names {name}"
    assert json.dumps(sorted(CONFIGS)) == json.dumps(sorted(re.findall(r"\[([\w.]+)\.yaml\]", README)))
