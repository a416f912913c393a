"""Forty commands as other tools take them, from the verb on: what comes of each here."""

from __future__ import annotations

import shlex

import pytest

from utils.arguments import parse_arguments
from utils.errors import UserError

M, D, OUT = "model_name_or_path", "dataset_name", "output_dir"
THREE = "--model_name_or_path m --dataset_name d --output_dir o"
# tool, command -> the settings it gives (a mapping), or what its faults say (texts)
COMMANDS = [
    ("TRL", f"dpo {THREE}", {M: "m", D: "d", OUT: "o"}),
    ("TRL", f"dpo {THREE} --use_peft --lora_r 32 --lora_alpha 16", {"use_lora": True, "lora_r": 32}),
    ("TRL", f"{THREE} --load_in_4bit --use_peft", {"use_4bit": True, "use_lora": True}),
    ("TRL", f"{THREE} --dataset_train_split train_prefs", {"dataset_split": "train_prefs"}),
    ("TRL", f"{THREE} --dataset_test_split test_prefs", {"validation_split": "test_prefs"}),
    ("TRL", f"{THREE} --torch_dtype bfloat16 --bf16", {"dtype": "bfloat16"}),
    ("TRL", f"{THREE} --bf16 false --fp16", {"dtype": "float16"}),
    ("TRL", f"{THREE} --learning_rate 5.0e-7 --warmup_ratio 0.1", {"learning_rate": 5e-7, "warmup_steps": 0.1}),
    ("TRL", f"{THREE} --max_length 1024 --max_prompt_length 512", ("--max_length limits prompt and response",)),
    ("TRL", f"{THREE} --rpo_alpha 1.0", ("--loss_type sigmoid sft --loss_weights 1 ALPHA",)),
    ("TRL", f"{THREE} --loss_type simpo", ("every loss here reads a reference",)),
    ("TRL", f"{THREE} --loss_type ipo --beta 0.1", {"loss_type": ("ipo",), "beta": 0.1}),
    ("TRL", f"{THREE} --generate_during_eval --eval_steps 50", {"sample_during_eval": True, "eval_steps": 50}),
    ("TRL", f"{THREE} --evaluation_strategy steps --eval_steps 50", {"eval_strategy": "steps"}),
    ("TRL", f"sft {THREE} --max_seq_length 512", {"max_length": 512}),
    ("TRL", f"grpo {THREE}", ("it is not supported",)),
    ("TRL", f"kto {THREE}", ("it is not supported",)),
    ("Axolotl", "train config.yml", ("a config is given as --config config.yml",)),
    ("Axolotl", "preprocess --dataset d", ("data --dataset_name d --output_file pairs.jsonl",)),
    ("Axolotl", f"{THREE} --adapter qlora --micro_batch_size 2", {"use_4bit": True, "per_device_train_batch_size": 2}),
    ("Axolotl", f"{THREE} --val_set_size 0.05 --sequence_len 2048", {"validation_split": "0.05", "max_length": 2048}),
    ("LLaMA-Factory", "train examples/dpo.yaml", ("a config is given as --config examples/dpo.yaml",)),
    ("LLaMA-Factory", f"{THREE} --pref_loss sigmoid --pref_beta 0.1", {"loss_type": ("sigmoid",), "beta": 0.1}),
    ("LLaMA-Factory", f"{THREE} --finetuning_type lora --lora_rank 8", {"use_lora": True, "lora_r": 8}),
    ("LLaMA-Factory", f"{THREE} --quantization_bit 4", {"use_4bit": True}),
    ("LLaMA-Factory", f"{THREE} --quantization_bit 8", ("training on 8-bit weights is not supported",)),
    ("LLaMA-Factory", f"{THREE} --cutoff_len 512 --val_size 200", ("--validation_split takes a fraction",)),
    ("LLaMA-Factory", "export --adapter_name_or_path a", ("merge --model_name_or_path RUN",)),
    ("ms-swift", "rlhf --rlhf_type dpo --model m --dataset d", ("train --model_name_or_path m --dataset_name d",)),
    ("ms-swift", f"{THREE} --tuner_type full --split_dataset_ratio 0.01", {"validation_split": "0.01"}),
    ("ms-swift", f"{THREE} --train_type longlora", ("LoRA is the only adapter",)),
    ("ms-swift", "infer --model m", ("chat --model_name_or_path m",)),
    ("OpenRLHF", "--pretrain m --dataset d --save_path o --max_len 512", {M: "m", OUT: "o", "max_length": 512}),
    ("OpenRLHF", f"{THREE} --zero_stage 3", ("launch with a config of examples/accelerate",)),
    ("Hydra", "model=m loss.beta=0.2", ("write --model m;", "write --beta 0.2;", "is missing")),
    ("Unsloth", "--model_name m --dataset hh-rlhf --output o --lr 2e-4", {D: "Anthropic/hh-rlhf"}),
    ("another card", "prepare-dataset --source webgpt --limit 1000", (
        "data --dataset_name openai/webgpt_comparisons --output_file pairs.jsonl --max_samples 1000",
    )),
    ("another card", "init --model X --dataset hh-rlhf", (
        "init --situation one_24gb_qlora --model_name_or_path X --dataset_name Anthropic/hh-rlhf",
    )),
    ("another card", "train --epochs 5", ("--model_name_or_path is missing", "--dataset_name", "--output_dir")),
    ("another card", "evaluate", ("evaluate runs/demo",)),
    ("another card", "compare", ("compare runs/demo",)),
    ("another card", "status", {"folder": "runs"}),
]  # fmt: skip


@pytest.mark.parametrize(("tool", "command", "answer"), COMMANDS, ids=[command for _, command, _ in COMMANDS])
def test_a_command_of_another_tool_works_or_is_answered(tool, command, answer):
    if isinstance(answer, dict):
        values = parse_arguments(shlex.split(command)).flat()
        assert {name: values[name] for name in answer} == answer
        return
    with pytest.raises(UserError) as error:
        parse_arguments(shlex.split(command))
    assert all(any(said in fault for fault in error.value.faults) for said in answer), error.value.faults
    assert all("did you mean" not in fault for fault in error.value.faults)
