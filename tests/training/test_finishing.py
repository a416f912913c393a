"""The end of a run: what is said of what it leaves."""

from __future__ import annotations

import re
import shlex

from shared.runs import read_record

from utils.arguments import parse_arguments
from utils.report.run_verdict import describe_run


def test_a_full_model_is_no_adapter_whatever_else_lies_in_its_folder(run_script, tiny_model, pairs_file, tmp_path):
    folder = tmp_path / "run"
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", folder)
    quick = ("--max_steps", 1, "--validation_split", "none", "--overwrite_output_dir")
    assert run_script(*flags, *quick)[0] == 0
    (folder / "about_adapters.txt").write_text("mine")
    code, out, err = run_script(*flags, *quick)
    assert code == 0, out + err
    assert f"model, tokenizer and record (run.json): {folder}" in out
    code, out, err = run_script(*flags, *quick, "--use_lora")
    assert code == 0, out + err
    assert f"adapter, tokenizer and record (run.json): {folder}" in out


def test_a_run_says_what_it_does_what_came_of_it_and_what_to_type_next(run_script, tiny_model, pairs_file, tmp_path):
    folder = tmp_path / "a run"
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--per_device_train_batch_size", 2)
    flags += ("--gradient_accumulation_steps", 3, "--use_lora", "--warmup_steps", 0.5, "--learning_rate", 1e-3)
    code, out, err = run_script(*flags, "--max_steps", 4, "--output_dir", folder)
    assert code == 0, out + err
    assert out.startswith(f"train: {tiny_model}: loading libraries\ndata: ")
    record = read_record(folder)
    counts = [record["model"][name] for name in ("trainable_parameters", "parameters")]
    share = f"{100 * counts[0] / counts[1]:.3g}%"
    assert f"policy: {tiny_model}, {counts[0]:,} of {counts[1]:,} parameters trained ({share})" in out
    longest = record["data"]["max_length"]
    assert f"batch: 6 pairs per step (2 per device x 3 accumulation steps), up to {longest} tokens each\n" in out
    assert "steps: 4, 2 of warm-up to a learning rate of 0.001\n" in out
    verdict, _, rest = out.partition("next:\n")
    assert verdict.endswith(f"{describe_run(record)[0]}\n")
    commands = [shlex.split(line) for line in rest.splitlines()]
    assert [words[2:4] for words in commands] == [
        [verb, str(folder)] for verb in ("evaluate", "compare", "chat", "merge")
    ]
    for words in commands:
        assert parse_arguments(words[2:]).model.model_name_or_path == str(folder)


def test_a_dry_run_says_how_long_the_real_one_takes(run_script, tiny_model, pairs_file):
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--per_device_train_batch_size", 4)
    code, out, err = run_script(*flags, "--num_train_epochs", 2, "--dry_run")
    assert code == 0, out + err
    steps = re.search(r"^steps: (\d+) in 2 epochs, ", out, re.MULTILINE)[1]
    rows = int(re.search(r"(\d+) rows to train on", out)[1])
    assert int(steps) == 2 * -(-rows // 4)
    assert re.search(
        rf"dry run: every stage works; nothing was saved\n +peak memory [\d.]+ [GM]iB, [\d.]+ s per step; the run has "
        rf"{steps} steps: at most about [\d:]+ of training", out
    )  # fmt: skip
