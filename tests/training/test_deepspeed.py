"""DeepSpeed in two processes on CPUs; skipped where it is not installed.

    pip install deepspeed && DS_ACCELERATOR=cpu python -m pytest tests/training/test_deepspeed.py -m slow

Its operators are compiled when they are first used, which takes a compiler and a minute.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from shared.forked import free_port
from shared.runs import ROOT, assert_same_run, pretend_interrupted, read_metrics, read_record

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
HELD = "--precompute_ref_log_probs=false"
WAYS = {
    "full": [],
    "full, another reference": ["--ref_model_name_or_path", "OTHER", HELD],
    "lora": ["--use_lora"],
    "lora, another reference": ["--use_lora", "--ref_model_name_or_path", "OTHER", HELD],
}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_zero_is_the_run_of_one_process_and_is_resumed(
    stage, way, run_script, tiny_model, other_model, pairs_file, tmp_path
):
    pytest.importorskip("deepspeed")
    one, two = tmp_path / "one", tmp_path / "two"
    named = [other_model if word == "OTHER" else word for word in WAYS[way]]
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--learning_rate", 5e-3, "--dtype",
             "float32", "--logging_steps", 1, "--max_steps", 8, "--save_steps", 3, *named]  # fmt: skip
    start = ["accelerate.commands.launch", "--config_file", f"examples/accelerate/deepspeed_zero{stage}.yaml"]

    def launch(processes: int, *more) -> subprocess.CompletedProcess:
        words = [sys.executable, "-m", *start, "--num_processes", processes, "--main_process_port", free_port()]
        words += ["advanced_dpo_script.py", *flags, "--output_dir", two, "--ddp_backend", "gloo", *more]
        return subprocess.run(
            list(map(str, words)), cwd=ROOT, env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True,
            text=True, timeout=400, check=False,
        )  # fmt: skip

    done = launch(2, "--per_device_train_batch_size", 4)
    assert done.returncode == 0, done.stderr
    assert "in each of 2 processes (sharded by DeepSpeed)" in done.stdout
    code, _, err = run_script(*flags, "--output_dir", one, "--per_device_train_batch_size", 8)
    assert code == 0, err
    assert read_record(two)["engine"]["shared_prefix"] is True
    assert_same_run(one, two)
    if "another" in way:
        return

    pretend_interrupted(two, 3)
    refused = launch(4, "--per_device_train_batch_size", 2, "--resume_from_checkpoint", "auto")
    assert "was written by DeepSpeed in 2 processes" in refused.stderr
    done = launch(2, "--per_device_train_batch_size", 4, "--resume_from_checkpoint", "auto")
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(two)) == len(read_metrics(one))
    assert_same_run(one, two)
