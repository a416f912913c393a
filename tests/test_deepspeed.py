"""DeepSpeed in two processes on CPUs; skipped where it is not installed.

    pip install deepspeed && DS_ACCELERATOR=cpu python -m pytest tests/test_deepspeed.py -m slow

Its operators are compiled when they are first used, which takes a compiler and a minute.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT, read_metrics, read_record
from test_processes import assert_same_run, flags_for, free_port, pretend_interrupted

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("way", [[], ["--use_lora"]], ids=["full", "lora"])
def test_zero_is_the_run_of_one_process_and_is_resumed(stage, way, run_script, tiny_model, pairs_file, tmp_path):
    pytest.importorskip("deepspeed")
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--max_steps", 8, "--save_steps", 3, *way]
    start = ["accelerate.commands.launch", "--config_file", f"examples/accelerate/deepspeed_zero{stage}.yaml"]

    def launch(processes: int, *flags) -> subprocess.CompletedProcess:
        words = [sys.executable, "-m", *start, "--num_processes", processes, "--main_process_port", free_port()]
        words += ["advanced_dpo_script.py", *flags_for(tiny_model, pairs_file, two, *more), "--ddp_backend", "gloo"]
        environment = os.environ | {"DS_ACCELERATOR": "cpu"}
        return subprocess.run(
            [*map(str, words), *map(str, flags)],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip

    done = launch(2, "--per_device_train_batch_size", 4)
    assert done.returncode == 0, done.stderr
    assert run_script(*flags_for(tiny_model, pairs_file, one, *more), "--per_device_train_batch_size", 8)[0] == 0
    assert read_record(two)["engine"]["shared_prefix"] is True
    assert_same_run(one, two)

    pretend_interrupted(two, 3)
    refused = launch(4, "--per_device_train_batch_size", 2, "--resume_from_checkpoint", "auto")
    assert "was written by DeepSpeed in 2 processes" in refused.stderr
    done = launch(2, "--per_device_train_batch_size", 4, "--resume_from_checkpoint", "auto")
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(two)) == len(read_metrics(one))
    assert_same_run(one, two)
