"""--sample_during_eval: what the policy writes at each evaluation, without a trace in what is trained."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from shared.pairs import make_pairs, write_lines
from shared.runs import ROOT, read_metrics, read_record
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.responses.generation import sample_continuations
from utils.settings.verbs import SamplingSettings
from utils.training.samples import show_samples

QUICK = ["--per_device_train_batch_size", 4, "--learning_rate", 5e-3, "--logging_steps", 2, "--max_steps", 4]
SAMPLE = ["--sample_during_eval", "--num_eval_samples", 3, "--sample_max_new_tokens", 12]


def read_samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize(
    ("verb", "kind"),
    [
        ("train", ["--gradient_checkpointing", "--dtype", "bfloat16"]),
        pytest.param(
            "train",
            ["--use_lora", "--use_4bit", "--lora_dropout", 0.2, "--gradient_checkpointing"],
            marks=pytest.mark.slow,
        ),
        ("sft", ["--use_lora", "--lora_dropout", 0.2]),
    ],
    ids=["full, autocast, checkpointing", "lora on 4 bits, dropout, checkpointing", "sft, lora, dropout"],
)
def test_training_is_bit_for_bit_the_same_with_samples(verb, kind, run_script, tiny_model, pairs_file, tmp_path):
    flags = [verb, "--model_name_or_path", tiny_model, "--dataset_name", pairs_file, *QUICK, "--eval_steps", 2, *kind]
    for name, more in (("with", SAMPLE), ("without", [])):
        code, _, err = run_script(*flags, *more, "--output_dir", tmp_path / name)
        assert code == 0, err
    sampled, plain = weights_of(tmp_path / "with"), weights_of(tmp_path / "without")
    assert all(torch.equal(sampled[name], plain[name]) for name in plain)
    assert read_metrics(tmp_path / "with") == read_metrics(tmp_path / "without")
    assert [row["step"] for row in read_samples(tmp_path / "with")] == [0, 0, 0, 2, 2, 2, 4, 4, 4]
    assert not (tmp_path / "without" / "samples.jsonl").exists()


def test_the_samples_are_those_of_the_policy_at_that_step(run_script, tiny_model, pairs_file, tmp_path):
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, *QUICK, "--seed", 5, "--use_lora"]
    code, out, err = run_script(*flags, *SAMPLE, "--output_dir", tmp_path / "run", "--dtype", "float32")
    assert code == 0, err
    rows = read_samples(tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    prompts = [row["prompt"] for row in rows if row["step"] == 0]
    assert len(set(prompts)) == 3
    places = [json.loads(line) for line in (tmp_path / "run" / "held_out_pairs.jsonl").read_text().splitlines()]
    held_out = {make_pairs(60)[pair["row"]]["prompt"] for pair in places}
    assert set(prompts) <= held_out
    for step in (0, 4):
        model = base if step == 0 else PeftModel.from_pretrained(base, tmp_path / "run")
        written = sample_continuations(model, tokenizer, prompts, SamplingSettings(max_new_tokens=12), seed=5)
        expected = [
            {"step": step, "prompt": prompt, "response": answer.text, "ended": answer.ended}
            for prompt, answer in zip(prompts, written, strict=True)
        ]
        assert [row for row in rows if row["step"] == step] == expected
    assert rows[:3] != [row | {"step": 0} for row in rows[-3:]], "training changed what is written"
    assert out.count("    writes  ") == 6


def test_messages_are_answered_behind_the_template(run_script, tiny_model, tmp_path):
    pairs = [
        {"prompt": [{"role": "user", "content": pair["prompt"]}]}
        | {side: [{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")}
        for pair in make_pairs(30)
    ]
    data = write_lines(tmp_path / "pairs.jsonl", pairs)
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", data, *QUICK, *SAMPLE]
    code, out, err = run_script(*flags, "--output_dir", tmp_path / "run", "--report_to", "tensorboard")
    assert code == 0, err
    assert read_samples(tmp_path / "run")[0]["prompt"][0]["role"] == "user"
    assert "    prompt  User: On day " in out

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Tensors("samples/text_summary")] == [0, 4]
    assert b"User: On day " in events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0]


def test_after_a_resume_no_step_stands_twice(run_script, tiny_model, pairs_file, tmp_path):
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--per_device_train_batch_size", 4,
             "--learning_rate", 5e-3, "--max_steps", 8, "--save_steps", 4, "--eval_steps", 3]  # fmt: skip
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run_script(*flags, *SAMPLE, "--output_dir", whole)[0] == 0
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoint-8")  # as a run that was killed after step 6
    (part / "run.json").write_text(json.dumps(read_record(part) | {"status": "running"}))
    with open(part / "samples.jsonl", "a") as file:
        file.write('{"step": 7, "pro')
    code, _, err = run_script(*flags, *SAMPLE, "--output_dir", part, "--resume_from_checkpoint", "auto")
    assert code == 0, err
    assert read_samples(part) == read_samples(whole)
    assert [row["step"] for row in read_samples(part)] == [step for step in (0, 3, 6, 8) for _ in range(3)]
    assert run_script(*flags, "--output_dir", part, "--overwrite_output_dir")[0] == 0
    assert not (part / "samples.jsonl").exists(), "a new run replaces the samples of the former"


@pytest.mark.slow
def test_with_two_processes_one_writes(tiny_model, pairs_file, tmp_path):
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, *QUICK, *SAMPLE]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "advanced_dpo_script.py", *flags, "--output_dir", tmp_path / "two"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_samples(tmp_path / "two")] == [0, 0, 0, 4, 4, 4]
    assert done.stdout.count("    writes  ") == 6


@pytest.mark.slow
def test_samples_are_a_table_in_wandb(run_script, tiny_model, pairs_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, *QUICK, *SAMPLE, "--use_wandb"]
    try:
        code, _, err = run_script(*flags, "--output_dir", tmp_path / "run")
    finally:
        import wandb

        wandb.finish()
    assert code == 0, err
    tables = [json.loads(path.read_text()) for path in (tmp_path / "run" / "wandb").rglob("*.table.json")]
    rows = sorted(row for table in tables for row in table["data"])
    assert tables[0]["columns"] == ["step", "prompt", "response", "ended"]
    assert rows == sorted([str(value) for value in row.values()] for row in read_samples(tmp_path / "run"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--sample_during_eval", "--sample_max_new_tokens", 128],
            "no held-out prompt leaves room for --sample_max_new",
        ),
        (
            ["--sample_during_eval", "--validation_split", "none"],
            "there is nothing to evaluate with --validation_split",
        ),
        (["--num_eval_samples", 3], "--num_eval_samples: has no effect without --sample_during_eval"),
        (["--sample_during_eval", "--num_eval_samples", 0], "--num_eval_samples is 0: must be 1 or more"),
    ],
)
def test_samples_that_cannot_be_are_refused(flags, said, run_script, tiny_model, pairs_file, tmp_path):
    common = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", tmp_path / "run")
    code, _, err = run_script(*common, *flags)
    assert code == 2, err
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharded_weights_cannot_write_and_it_is_said(kind, run_script, tiny_model, pairs_file, tmp_path, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    common = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", tmp_path / "run")
    code, _, err = run_script(*common, "--sample_during_eval")
    assert code == 2
    assert f"error: --sample_during_eval: with {kind} the weights are sharded" in err


def test_on_the_console_texts_are_short_and_harmless(capsys):
    rows = [
        {"step": 1, "prompt": "p" * 500, "response": "a\n\x1b[31mred\x07\r" + "word " * 300, "ended": False},
        {"step": 1, "prompt": "q", "response": "", "ended": True},
    ]
    show_samples(rows, 64)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u24261B[31mred" in out
    assert "[1,518 characters] [stopped after 64 tokens]" in " ".join(out.split())
    assert out.splitlines()[-1] == "    writes  (nothing)"
    assert max(map(len, out.splitlines())) <= 101
    assert len(out.splitlines()) < 14
