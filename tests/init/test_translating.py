"""Configs of other tools, translated line by line, and run."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import yaml
from shared.pairs import make_pairs, write_lines

import advanced_dpo_script
from utils.arguments import parse_arguments
from utils.errors import UserError
from utils.init.translating import translate_config

# Written for this test in each tool's schema; MODEL and PAIRS are filled in.
CONFIGS = {
    "Axolotl": """
base_model: MODEL
tokenizer_type: AutoTokenizer
load_in_4bit: false
rl: ipo
rl_beta: 0.3
datasets:
  - path: PAIRS
    ds_type: json
    split: train
    type: user_defined.default
    field_prompt: prompt
    field_chosen: chosen
    field_rejected: rejected
val_set_size: 0.2
output_dir: out
adapter: lora
lora_r: 4
lora_alpha: 8
lora_target_linear: true
sequence_len: 96
pad_to_sequence_len: true
wandb_project:
micro_batch_size: 2
num_epochs: 2
optimizer: adamw_torch
lr_scheduler: constant
learning_rate: 3e-4
bf16: false
fp16:
warmup_ratio: 0.25
evals_per_epoch: 2
saves_per_epoch: 1
""",
    "LLaMA-Factory": """
stage: dpo
do_train: true
model_name_or_path: MODEL
finetuning_type: lora
lora_rank: 4
lora_target: q_proj,v_proj
pref_beta: 0.2
pref_loss: hinge
pref_ftx: 0.5
dataset: own_pairs
dataset_dir: FOLDER
template: qwen
cutoff_len: 96
preprocessing_num_workers: 1
val_size: 0.2
output_dir: out
plot_loss: true
bf16: false
fp16: false
per_device_train_batch_size: 2
learning_rate: 3.0e-4
""",
    "alignment-handbook": """
model_name_or_path: MODEL
torch_dtype: float32
dataset_mixer:
  PAIRS: 0.5
preprocessing_num_workers: 1
beta: 0.05
loss_type: sigmoid
do_eval: true
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
max_length: 96
max_prompt_length: 48
optim: adamw_torch
output_dir: out
report_to: [tensorboard]
run_name: mine
warmup_ratio: 0.1
""",
    "TRL": """
model_name_or_path: MODEL
dataset_name: PAIRS
dataset_train_split: train
use_peft: true
lora_r: 4
load_in_8bit: false
dtype: float32
max_length: 96
precompute_ref_log_probs: true
output_dir: out
no_remove_unused_columns: true
""",
    "ms-swift": """
rlhf_type: dpo
model: MODEL
tuner_type: lora
dataset:
  - PAIRS#30
split_dataset_ratio: 0.1
torch_dtype: float32
lora_rank: 4
target_modules: all-linear
rpo_alpha: 0.1
max_length: 96
attn_impl: sdpa
output_dir: out
""",
}
# what each must have become, beside the model, the data and the folder, which all have
EXPECTED = {
    "Axolotl": {
        "use_4bit": False,
        "loss_type": ("ipo",),
        "beta": 0.3,
        "dataset_split": "train",
        "prompt_column": "prompt",
        "chosen_column": "chosen",
        "rejected_column": "rejected",
        "validation_split": "0.2",
        "use_lora": True,
        "lora_r": 4,
        "lora_alpha": 8.0,
        "lora_target_modules": ("all-linear",),
        "max_length": 96,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2.0,
        "optim": "adamw_torch",
        "dtype": "float32",
        "lr_scheduler_type": "constant",
        "learning_rate": 3e-4,
        "warmup_steps": 0.25,
        "eval_steps": 0.25,
        "save_steps": 0.5,
    },
    "LLaMA-Factory": {
        "use_lora": True,
        "lora_r": 4,
        "lora_target_modules": ("q_proj", "v_proj"),
        "beta": 0.2,
        "loss_type": ("hinge",),
        "prompt_column": "prompt",
        "chosen_column": "chosen",
        "max_length": 96,
        "rejected_column": "rejected",
        "dataset_num_proc": 1,
        "validation_split": "0.2",
        "dtype": "float32",
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-4,
    },
    "alignment-handbook": {
        "dtype": "float32",
        "dataset_num_proc": 1,
        "beta": 0.05,
        "loss_type": ("sigmoid",),
        "max_length": 96,
        "gradient_checkpointing": True,
        "optim": "adamw_torch",
        "report_to": ("tensorboard",),
        "warmup_steps": 0.1,
    },
    "TRL": {
        "dataset_split": "train",
        "use_lora": True,
        "lora_r": 4,
        "dtype": "float32",
        "max_length": 96,
        "precompute_ref_log_probs": True,
    },
    "ms-swift": {
        "use_lora": True,
        "validation_split": "0.1",
        "dtype": "float32",
        "lora_r": 4,
        "max_length": 96,
        "lora_target_modules": ("all-linear",),
        "attn_implementation": "sdpa",
    },
}
PAIRS_OF = {"alignment-handbook": ":0.5", "ms-swift": ":30"}


@pytest.fixture
def foreign(tmp_path, tiny_model):
    """Writes the config of a tool, with the model and pairs that are here, and returns its path."""
    pairs = write_lines(tmp_path / "pairs.jsonl", make_pairs(60))
    columns = {name: name for name in ("prompt", "chosen", "rejected")}
    info = {"own_pairs": {"file_name": "pairs.jsonl", "ranking": True, "columns": columns}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))

    def write(tool: str, more: str = "") -> str:
        names = {"MODEL": str(tiny_model), "PAIRS": str(pairs), "FOLDER": str(tmp_path)}
        text = re.sub("|".join(names), lambda match: names[match[0]], CONFIGS[tool] + more)
        path = tmp_path / "theirs.yaml"
        path.write_text(text.replace("output_dir: out", f"output_dir: {tmp_path / 'out'}"))
        return str(path)

    return write


@pytest.mark.parametrize("tool", CONFIGS)
def test_each_line_is_translated_or_commented_and_the_result_runs(tool, foreign, tmp_path, tiny_model, capsys):
    path, ours = foreign(tool), tmp_path / "ours.yaml"
    theirs = yaml.safe_load((tmp_path / "theirs.yaml").read_text())
    with pytest.raises(UserError) as error:
        parse_arguments(["--config", path])
    assert error.value.faults[-1].startswith(f"{path}: is a")
    assert f" {tool} config; translate it with " in error.value.faults[-1]
    assert "init --from" in error.value.faults[-1]
    assert advanced_dpo_script.main(["init", "--from", path, "--output_file", str(ours)]) == 0
    assert "to be filled in" not in capsys.readouterr().out
    text = ours.read_text()
    assert all(re.search(rf"^# {key}: .*  # \S|^{key}: |  # {key}$", text, re.MULTILINE) for key in theirs)
    settings = parse_arguments(["--config", str(ours)])
    needed = {
        "model_name_or_path": str(tiny_model),
        "dataset_name": str(tmp_path / "pairs.jsonl") + PAIRS_OF.get(tool, ""),
        "output_dir": str(tmp_path / "out"),
    }
    values = settings.flat()
    assert {name: values[name] for name in settings.given} == needed | EXPECTED[tool]
    if tool != "alignment-handbook":  # which tensorboard would follow
        code = advanced_dpo_script.main(["--config", str(ours), "--dry_run"])
        assert code == 0, capsys.readouterr().err


def test_what_is_not_taken_over_says_why(foreign):
    text = translate_config(foreign("LLaMA-Factory")).text
    assert "# pref_ftx: 0.5  # add the SFT term as a second loss: --loss_type sigmoid sft" in text
    assert "# template: qwen  # the tokenizer's own chat template is used" in text
    text = translate_config(foreign("ms-swift", "label_smoothing: 0.1\nloss_type: ipo\n")).text
    assert "# label_smoothing: 0.1  # has no effect on ipo" in text  # which the checks of our own flags say
    text = translate_config(foreign("Axolotl", "load_in_8bit: true\n")).text
    assert "# load_in_8bit: true  # training on 8-bit weights is not supported" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base_model: m\nrl: simpo\n", "rl is simpo: every loss here reads a reference"),
        ("model: m\nrlhf_type: kto\n", "rlhf_type is kto: KTO, which learns from unpaired responses, is not supported"),
        ("stage: ppo\ntemplate: x\n", "stage is ppo: it is not supported"),
        ("beta: 0.1\n", "is not a config of a known tool (Axolotl, LLaMA-Factory, ms-swift,"),
    ],
)
def test_a_config_that_cannot_be_translated(text, said, tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        translate_config(str(path))
    (fault,) = error.value.faults
    assert said in fault


@pytest.mark.parametrize("tool", CONFIGS)
def test_any_value_is_translated_or_commented(tool, foreign, tmp_path):
    theirs = yaml.safe_load(Path(foreign(tool)).read_text())
    path = tmp_path / "odd.yaml"
    dice = random.Random(0)
    for _ in range(12):
        odd = dict(theirs)
        for key in dice.sample(sorted(odd.keys() - {"rl", "stage", "rlhf_type"}), 3):
            odd[key] = dice.choice([None, "x", -1, 0.5, True, [], ["a", {"b": 1}], {"c": [None]}, [[]], ""])
        path.write_text(yaml.safe_dump(odd))
        assert translate_config(str(path)).tool == tool


def test_the_verb_is_that_of_the_tool_s_run_and_what_is_missing_is_said(tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text("base_model: m\ndatasets: [{path: x.jsonl}]\nmicro_batch_size: 1\n")
    made = translate_config(str(path))
    assert made.verb == "sft"
    assert "verb: sft" in made.text
    assert [fault.split(":")[0] for fault in made.faults] == ["--output_dir is missing"]
    path.write_text("stage: dpo\ntemplate: x\ndataset: unknown\ndataset_dir: nowhere\n")
    assert "# dataset: unknown  # there is no dataset_info.json in nowhere" in translate_config(str(path)).text
