"""Two processes, replicated (DDP) and sharded (FSDP2), over gloo: the numbers and the files of one process."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT, read_metrics, read_record
from safetensors.torch import load_file

# Each starts three processes; half of the table is enough for every day.
EVERY_DAY = (("lora", "replicated"), ("full, reference ahead, by tokens", "replicated"))
EVERY_DAY += (("lora, by tokens", "sharded"),)
WAYS = {
    "full": ["--precompute_ref_log_probs", "false"],
    "full, reference ahead, by tokens": ["--precompute_ref_log_probs", "--max_tokens_per_batch", 80],
    "lora": ["--use_lora"],
    "lora on 4 bits": ["--use_lora", "--use_4bit"],
    # Now one process, now the other has more micro-batches; gradients are exchanged once all the same.
    "lora, by tokens": ["--use_lora", "--max_tokens_per_batch", 44],
}


LAUNCHES = {  # with the config, the script
    "replicated": ("ddp", "advanced_dpo_script.py"),
    "sharded": ("fsdp2", "tests/sharded.py"),
}
CASES = [
    pytest.param(way, kind, id=f"{way}-{kind}", marks=() if (way, kind) in EVERY_DAY else pytest.mark.slow)
    for way in WAYS
    for kind in LAUNCHES
]


def launch(kind: str, processes: int, *flags, torchrun: bool = False) -> None:
    """A run in several processes: one that succeeds, by the commands of docs/scaling.md."""
    config, script = LAUNCHES[kind]
    config += "_qlora" if kind == "sharded" and "--use_4bit" in flags else ""
    start = ["accelerate.commands.launch", "--config_file", f"examples/accelerate/{config}.yaml"]
    start += ["--num_processes", processes, "--main_process_port", free_port()]
    if torchrun:
        start = ["torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    command = [sys.executable, "-m", *start, script, *flags]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def flags_for(model, pairs, folder, *more) -> list:
    return ["--model_name_or_path", model, "--dataset_name", pairs, "--learning_rate", 5e-3, "--logging_steps", 1,
            "--dtype", "float32", "--output_dir", folder, *more]  # fmt: skip


def assert_same_run(one, other) -> None:
    """The same curve, held-out result and artefact."""
    for line, its in zip(read_metrics(one), read_metrics(other), strict=True):
        its["epoch"] = line["epoch"]  # which the trainer counts in micro-batches
        assert its == pytest.approx(line, abs=1e-4)
    assert read_record(other)["metrics"]["held_out"] == pytest.approx(read_record(one)["metrics"]["held_out"], abs=1e-4)
    (artefact,) = (path.name for path in one.glob("*.safetensors"))
    a, b = (load_file(folder / artefact) for folder in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


@pytest.mark.parametrize(("way", "kind"), CASES)
def test_two_processes_are_the_run_of_one(way, kind, run_script, tiny_model, pairs_file, tmp_path):
    # To the end of a pass over the data, whose last step has fewer pairs than the processes take.
    more = ["--max_samples", 42, "--num_train_epochs", 1, *WAYS[way]]
    one, two = tmp_path / "one", tmp_path / "two"
    launch(kind, 2, *flags_for(tiny_model, pairs_file, two, *more), "--per_device_train_batch_size", 2,
           "--gradient_accumulation_steps", 3)  # fmt: skip
    witnesses = [path.read_text() for path in sorted(two.glob("sharded-*"))]
    assert witnesses == (["True", "True"] if kind == "sharded" else [])
    code, out, err = run_script(*flags_for(tiny_model, pairs_file, one, *more), "--per_device_train_batch_size", 12)
    assert code == 0, err
    assert read_record(two)["engine"]["shared_prefix"] is True
    assert read_record(two)["data"]["train_pairs"] % 12 == 1, out
    assert_same_run(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [True, False], ids=["torchrun", "accelerate"])
def test_four_processes_are_the_run_of_one(torchrun, run_script, tiny_model, pairs_file, tmp_path):
    one, four = tmp_path / "one", tmp_path / "four"
    more = ("--num_train_epochs", 2, "--use_lora")
    launch("replicated", 4, *flags_for(tiny_model, pairs_file, four, *more), "--per_device_train_batch_size", 2,
           torchrun=torchrun)  # fmt: skip
    assert run_script(*flags_for(tiny_model, pairs_file, one, *more), "--per_device_train_batch_size", 8)[0] == 0
    assert_same_run(one, four)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAUNCHES)
def test_sft_in_two_processes_is_the_run_of_one(kind, run_script, tiny_model, pairs_file, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = ("--max_samples", 42, "--num_train_epochs", 1)
    launch(kind, 2, "sft", *flags_for(tiny_model, pairs_file, two, *more), "--per_device_train_batch_size", 6)
    code, _, err = run_script(
        "sft", *flags_for(tiny_model, pairs_file, one, *more), "--per_device_train_batch_size", 12
    )
    assert code == 0, err
    assert_same_run(one, two)


def pretend_interrupted(folder, step: int) -> None:
    """Takes a finished run back to a checkpoint, as if it had ended there."""
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    record = read_record(folder)
    (folder / "run.json").write_text(json.dumps(record | {"status": "interrupted"}), encoding="utf-8")


RESUMED = [  # ways, kinds and processes before and after
    pytest.param("full", ("sharded", 2), ("replicated", 1), id="full-sharded-2-to-1"),
    pytest.param("lora", ("replicated", 1), ("sharded", 2), id="lora-1-to-sharded-2", marks=pytest.mark.slow),
    pytest.param("full", ("replicated", 1), ("sharded", 2), id="full-1-to-sharded-2", marks=pytest.mark.slow),
    pytest.param("lora", ("sharded", 2), ("replicated", 1), id="lora-sharded-2-to-1", marks=pytest.mark.slow),
    pytest.param("lora", ("sharded", 2), ("sharded", 2), id="lora-sharded-2-to-2", marks=pytest.mark.slow),
    pytest.param("full", ("replicated", 2), ("replicated", 1), id="full-2-to-1", marks=pytest.mark.slow),
    pytest.param("lora", ("replicated", 1), ("replicated", 2), id="lora-1-to-2", marks=pytest.mark.slow),
    pytest.param("full", ("sharded", 2), ("replicated", 4), id="full-sharded-2-to-4", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("way", "before", "after"), RESUMED)
def test_a_run_goes_on_in_another_number_of_processes(way, before, after, run_script, tiny_model, pairs_file, tmp_path):
    # Interrupted in the second pass over the data.
    more = ["--max_samples", 42, "--num_train_epochs", 2, "--save_steps", 5, *WAYS[way]]
    whole, parted = tmp_path / "whole", tmp_path / "parted"

    def train(folder, kind: str, processes: int, *others) -> None:
        flags = [*flags_for(tiny_model, pairs_file, folder, *more), "--per_device_train_batch_size", 12 // processes]
        if processes > 1:
            launch(kind, processes, *flags, *others)
        else:
            code, _, err = run_script(*flags, *others)
            assert code == 0, err

    train(whole, "replicated", 1)
    train(parted, *before)
    pretend_interrupted(parted, 5)
    names = {path.suffix for path in (parted / "checkpoint-5").iterdir()}
    assert names <= {".safetensors", ".json", ".jinja"}  # nothing is a pickle
    train(parted, *after, "--resume_from_checkpoint", "auto")
    assert_same_run(whole, parted)


def test_a_resumed_run_keeps_its_pairs_per_step(run_script, tiny_model, pairs_file, tmp_path, monkeypatch):
    flags = flags_for(tiny_model, pairs_file, tmp_path / "run", "--max_steps", 4, "--save_steps", 2)
    assert run_script(*flags, "--per_device_train_batch_size", 8)[0] == 0
    pretend_interrupted(tmp_path / "run", 2)
    resume = (*flags, "--resume_from_checkpoint", "auto")
    code, _, err = run_script(*resume, "--per_device_train_batch_size", 4)
    assert code == 2
    assert "8 rows per optimizer step before (8 x 1 x 1 process), 4 now (4 x 1 x 1 process)" in err
    assert "--allow_changes world" in err
    split = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4)
    code, _, err = run_script(*resume, *split)
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_run_with_what_is_safe(lost, tiny_model, pairs_file, tmp_path):
    flags = flags_for(tiny_model, pairs_file, tmp_path / "run", "--max_steps", 5000, "--save_steps", 5,
                      "--save_total_limit", 2, "--per_device_train_batch_size", 4)  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    started = subprocess.Popen(
        [*command, "advanced_dpo_script.py", *map(str, flags)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while not (tmp_path / "run" / "checkpoint-10" / "trainer_state.json").is_file():
            assert started.poll() is None, started.communicate()
            time.sleep(0.1)
        workers = [child for child in psutil.Process(started.pid).children() if child.environ().get("RANK")]
        next(worker for worker in workers if worker.environ()["RANK"] == str(lost)).kill()
        _, err = started.communicate(timeout=100)
    finally:
        started.kill()
    assert started.returncode == 1
    (said,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert "another process of this run ended or fell silent" in said
    assert "is safe. To go on" in said
    assert "-m torch.distributed.run --standalone --nproc_per_node 2 advanced_dpo_script.py" in err
    assert "--resume_from_checkpoint auto" in err


def test_sharding_that_does_not_happen_is_said(run_script, tiny_model, pairs_file, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--max_steps", 1)
    code, out, err = run_script(*flags, "--output_dir", tmp_path / "run")
    assert code == 0, err
    assert "warning: FSDP is configured, but nothing is sharded" in out
