"""What the libraries will not do is one line that names the flag, and nothing on the disk is touched for it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from shared.forked import Forked
from shared.runs import ROOT, read_record, start

from utils.errors import ProcessLost, UserError
from utils.runtime import readable_seconds
from utils.settings.training import Settings
from utils.training.launch import lost_processes_explained
from utils.training.refusals import refusals_explained
from utils.training.running import LiveRun


def settings(**fields) -> Settings:
    return Settings("train", trainer_fields=fields, given=frozenset(fields))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--optim galore_adamw", "--optim galore_adamw: refused by transformers"),
        ("--lr_scheduler_type cosine_with_min_lr", "--lr_scheduler_type cosine_with_min_lr: refused by"),
        ("--use_liger_kernel", "--use_liger_kernel: refused by"),
        ("--fsdp full_shard", "--fsdp full_shard: refused by"),
        ("--accelerator_config absent.json", "--accelerator_config absent.json: refused by"),
        ("--use_lora --lora_target_modules mlp", "--lora_target_modules mlp: refused by peft"),
        ("--push_to_hub", "--push_to_hub: there is no login here"),
        ("--activation_offloading", "--activation_offloading moves activations from a GPU"),
        ("--report_to neptune", "pip install neptune"),
        ("--metric_for_best_model nope", "--metric_for_best_model is 'nope': must be one of loss, accuracy"),
        (
            "--dataloader_drop_last true --per_device_train_batch_size 64",
            "the 55 rows to train on are fewer than one of 64",
        ),
        ("--seed 4294967296", "--seed is 4294967296: must be between 0 and 4294967295"),
    ],
)
def test_a_setting_that_a_library_refuses(run_script, tiny_model, pairs_file, tmp_path, flags, named):
    output = tmp_path / "run"
    code, _, err = run_script(
        "--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", output, *flags.split()
    )
    assert code == 2, err
    assert named in err
    assert len(err.strip().splitlines()) == 1, err
    assert not output.exists()


def test_a_lost_process_and_memory_that_runs_out_are_no_refusals(monkeypatch):
    library = {"__name__": "torch.distributed"}
    exec("def fail(text):\n    raise RuntimeError(text)", library)
    lost, full = "[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer", "std::bad_alloc"
    with pytest.raises(RuntimeError, match="bad_alloc"), refusals_explained(settings()):
        library["fail"](full)
    with pytest.raises(UserError, match="refused by torch"), refusals_explained(settings()):
        library["fail"](lost)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ProcessLost, match="another process of this run ended before training began"),
        lost_processes_explained(),
        refusals_explained(settings()),
    ):
        library["fail"](lost)
    with pytest.raises(RuntimeError, match="another thing"), lost_processes_explained():
        raise RuntimeError("another thing")


def test_a_refused_run_does_not_replace_the_one_before(run_script, tiny_model, pairs_file, tmp_path):
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", tmp_path / "run",
             "--max_steps", 2]  # fmt: skip
    assert run_script(*flags)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert run_script(*flags, "--overwrite_output_dir", "--optim", "galore_adamw")[0] == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before


def test_what_is_our_own_or_comes_later_is_not_explained_away():
    with pytest.raises(ValueError, match="cannot convert float NaN"), refusals_explained(settings(optim="x")):
        readable_seconds(float("nan"))
    with pytest.raises(RuntimeError), refusals_explained(settings(optim="x"), begun=lambda: True):
        torch.zeros(2).view(3)


def test_the_flags_that_a_message_mentions_are_named():
    def refuse():
        torch.nn.Linear(2, 2)(torch.zeros(3))

    with (
        pytest.raises(UserError, match="one of --a 1, --b thing: refused by torch"),
        refusals_explained(settings(a=1, b="thing")),
    ):
        refuse()
    with (
        pytest.raises(UserError, match=r"^--mat1 True|^--mat1: refused by torch"),
        refusals_explained(settings(mat1=True, other="thing")),
    ):
        refuse()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
def test_terminated_while_loading_is_interrupted_and_leaves_no_folder(tiny_model, pairs_file, tmp_path):
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", tmp_path / "run"]
    process = Forked(*flags)
    for line in process.stdout:
        if line.startswith("data:"):
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate()
    assert process.returncode == 130, out + err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_a_signal_to_one_of_two_processes_stops_both_in_good_order(tiny_model, pairs_file, tmp_path):
    import psutil

    output = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "advanced_dpo_script.py", "--model_name_or_path", tiny_model, "--dataset_name", pairs_file,
               "--output_dir", output, "--num_train_epochs", 400, "--logging_steps", 1]  # fmt: skip
    launcher = start(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in launcher.stdout:
            if line.strip().startswith("step "):
                break
        children = psutil.Process(launcher.pid).children(recursive=True)
        second = next(child for child in children if child.environ().get("RANK") == "1")
        second.send_signal(signal.SIGINT)
        launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    for _ in range(50):
        if read_record(output)["status"] != "running":
            break
        time.sleep(0.1)
    assert read_record(output)["status"] == "interrupted"
    assert list(output.glob("checkpoint-*/trainer_state.json"))


def test_a_run_that_ends_before_its_last_step_says_so():
    told = []

    def ends_at(step: int, **content):
        state = SimpleNamespace(global_step=step, max_steps=8)
        trainer = SimpleNamespace(state=state, machine=SimpleNamespace(warn=told.append))
        run = SimpleNamespace(record=SimpleNamespace(content=content), rows=SimpleNamespace(train=range(3)))
        live = SimpleNamespace(run=run, trainer=trainer, watcher=SimpleNamespace(interrupted=False))
        LiveRun._check_steps(live)

    ends_at(8)
    ends_at(5, early_stopping={"stopped": True})
    assert told == []
    ends_at(5)
    assert told == ["training ended after step 5 of 8: its rows gave no more batches"]
    with pytest.raises(UserError, match="no step was taken, of 8 that were planned: the 3 rows"):
        ends_at(0)
