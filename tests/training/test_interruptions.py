"""What ends a run before its time: one message with what is safe, and a run that goes on as if nothing had been."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared.forked import Forked
from shared.runs import ROOT, read_metrics, read_record, start_script

from utils.errors import ProcessLost
from utils.run.checkpoints import remove_checkpoint
from utils.run.state import save_state
from utils.run.writing import write_json
from utils.training.callbacks import RunWatcher
from utils.training.failures import explain_failure
from utils.training.launch import explain_lost_process
from utils.training.tally import load_log_state

FLAGS = ["--max_steps", 12, "--per_device_train_batch_size", 4, "--learning_rate", 5e-3, "--save_steps", 4,
         "--eval_steps", 5, "--logging_steps", 3, "--dtype", "float32"]  # fmt: skip
DROPPED = "tests/programs/dropped_signal.py"
GO_ON = ("--resume_from_checkpoint", "auto")


def slow(*values):
    """A case that need not be looked at every day."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def whole(tiny_model, pairs_file, tmp_path_factory) -> Path:
    """The run that nothing disturbed."""
    import advanced_dpo_script

    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert advanced_dpo_script.main([str(word) for word in flags(tiny_model, pairs_file, folder)]) == 0
    return folder


def flags(model: Path, data: Path, folder: Path) -> list:
    return ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", folder, *FLAGS]


@pytest.fixture
def run(run_script, tiny_model, pairs_file, tmp_path):
    """Runs in a folder of its own: (*more flags) -> exit code, what was said, what was complained of."""

    def go(*more, folder=tmp_path / "part"):
        return run_script(*flags(tiny_model, pairs_file, folder), *more)

    return go


def assert_same_run(one: Path, other: Path) -> None:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a), "bit for bit"
    newest = one / "checkpoint-12"
    for path in newest.iterdir():
        if path.name not in ("trainer_state.json", "manifest.json"):  # which hold times
            assert path.read_bytes() == (other / "checkpoint-12" / path.name).read_bytes(), path.name
    assert read_metrics(one) == read_metrics(other)
    records = [read_record(folder) for folder in (one, other)]
    for key in ("status", "metrics", "step", "steps", "early_stopping"):
        assert records[0].get(key) == records[1].get(key), key
    assert (one / "held_out_pairs.jsonl").read_bytes() == (other / "held_out_pairs.jsonl").read_bytes()
    assert not [path for path in other.iterdir() if path.name.startswith(".")], "nothing half made is left"


def assert_one_message(err: str, *words: str) -> None:
    assert "Traceback" not in err
    assert err.count("error: ") == 1, err
    for word in (*words, "--resume_from_checkpoint auto"):
        assert word in err


def stop_at(monkeypatch, step: int, act) -> None:
    """Does something after the step was taken."""
    taken = RunWatcher.on_step_end

    def on_step_end(self, args, state, control, **options):
        if state.global_step == step:
            act(self)
        return taken(self, args, state, control, **options)

    monkeypatch.setattr(RunWatcher, "on_step_end", on_step_end)


@pytest.mark.parametrize("step", [2, slow(4), slow(5), slow(7)])
def test_a_stop_between_two_log_lines_leaves_no_trace(run, whole, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        stop_at(patch, step, lambda watcher: setattr(watcher, "asked_to_stop", True))
        code, out, _ = run()
    assert code == 130
    assert f"interrupted at step {step}, its state is saved; to resume:" in out
    assert "warning" not in out
    assert read_record(tmp_path / "part")["step"] == step
    assert (tmp_path / "part" / f"checkpoint-{step}").is_dir()
    code, out, err = run(*GO_ON)
    assert code == 0, err
    if step not in (4, 8, 12):
        shutil.rmtree(tmp_path / "part" / f"checkpoint-{step}")
    assert_same_run(whole, tmp_path / "part")


def test_a_stop_of_sft_between_two_log_lines_leaves_no_trace(run_script, tiny_model, pairs_file, tmp_path, monkeypatch):
    """Whose loss in the log is the trainer's own."""

    def run(folder: Path, *more) -> int:
        own = ["--max_steps", 5, "--logging_steps", 3, "--learning_rate", 5e-3, "--validation_split", "none"]
        where = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", folder]
        return run_script("sft", *where, *own, *more)[0]

    assert run(tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 2, lambda watcher: setattr(watcher, "asked_to_stop", True))
        assert run(tmp_path / "part") == 130
    assert run(tmp_path / "part", *GO_ON) == 0
    lines = read_metrics(tmp_path / "whole")
    assert [line["step"] for line in lines] == [3, 5]
    assert read_metrics(tmp_path / "part") == lines


needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")


@pytest.fixture
def run_with_dropped_signal(tiny_model, pairs_file, tmp_path):
    """Runs the script in `part`, asked to stop where Python drops what is raised, a package that is imported or a
    function: (place) -> its exit code, and what it wrote to both streams."""

    def go(place: str) -> tuple[int, str, str]:
        arguments = [place, *flags(tiny_model, pairs_file, tmp_path / "part"), "--precompute_ref_log_probs"]
        own = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}  # where no scores lie
        started_by = Forked if "." in place else start_script  # which imports all packages
        process = started_by(*arguments, script=DROPPED, **own)
        out, err = process.communicate()
        return process.returncode, out, err

    return go


@needs_signals
@pytest.mark.parametrize(
    ("place", "next_said"),
    [
        ("peft", "data:"),
        slow("utils.models.loading.load_tokenizer", "data:"),
        slow("utils.models.reference.load_reference", "scoring"),
        slow("utils.training.reference.ReferenceScores.score", "model:"),
        ("utils.training.running.attach_trackers", "held out before"),
    ],
)
def test_a_stop_that_python_drops_while_the_run_starts_ends_it(run_with_dropped_signal, tmp_path, place, next_said):
    code, out, err = run_with_dropped_signal(place)
    assert code == 130, out + err
    assert out.endswith("interrupted; everything saved before is intact\n")
    assert next_said not in out
    assert "Traceback" not in err
    assert not (tmp_path / "part").exists()


@needs_signals
@pytest.mark.parametrize("verb", ["merge", slow("compare"), slow("generate")])
def test_a_stop_that_python_drops_in_another_verb_ends_it(verb, tiny_model, pairs_file, tmp_path, run):
    """Before it has written anything."""
    code, out, err = run("--use_lora")
    assert code == 0, out + err
    made, named = tmp_path / "made.jsonl", ["--model_name_or_path", tmp_path / "part"]
    sampling = ["--num_prompts", 4, "--max_new_tokens", 4]
    place, *words = {
        "compare": ["utils.comparing.comparing.choose_fitting", "compare", *named, *sampling, "--output_dir", made],
        "merge": ["utils.merging.merging.score_texts", "merge", *named, "--output_dir", made],
        "generate": [
            *["utils.responses.making._sample", "data", *named, "--generate", "--dataset_name", pairs_file, *sampling],
            *["--scorer", ROOT / "examples/demo/scorer.py:score", "--output_file", made],
        ],
    }[verb]
    process = Forked(place, *words, script=DROPPED)
    out, err = process.communicate()
    assert process.returncode == 130, out + err
    assert out.endswith("interrupted; everything saved before is intact\n")
    assert "Traceback" not in err
    assert not made.exists()


@needs_signals
def test_a_stop_that_python_drops_while_the_run_finishes_ends_it(run_with_dropped_signal, tmp_path):
    code, out, err = run_with_dropped_signal("utils.training.finishing.evaluate_last")
    assert code == 130, out + err
    assert "interrupted at step 12, its state is saved; to resume:" in out
    assert "Traceback" not in err
    assert read_record(tmp_path / "part")["status"] == "interrupted"
    assert not (tmp_path / "part" / "model.safetensors").exists()


def test_signals_are_noted_and_nothing_else_is_silenced():
    code = """
import signal
from utils.interruptions import interrupt_on_signals
class Failing:
    def __del__(self):
        raise KeyboardInterrupt if interrupting else ValueError("of a finalizer")
signal.signal(signal.SIGINT, signal.SIG_IGN)
interrupt_on_signals()
assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "a shell's background"
for interrupting in (False, True):  # the interruption is no signal's
    Failing()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ValueError: of a finalizer" in done.stderr
    assert "KeyboardInterrupt" in done.stderr


def test_what_was_counted_since_the_last_line_goes_to_the_processes_that_go_on(tmp_path):
    names = [f"log_state_{rank}" for rank in range(2)]
    for rank, name in enumerate(names):
        state = {"steps": 2, "loss": torch.tensor(1.0 + rank), "sums": {"margin": torch.tensor(0.1 * 3**rank)}}
        save_state(tmp_path, name, state)

    def load(rank: int, world_size: int) -> tuple[int, float, dict[str, float]]:
        state = load_log_state(tmp_path, rank, world_size, torch.device("cpu"))
        return state.steps, float(state.loss), {name: float(value) for name, value in state.sums.items()}

    exact = [{"margin": float(torch.tensor(value))} for value in (0.1, 0.1 * 3)]
    assert [load(rank, 2) for rank in range(2)] == [(2, 1.0, exact[0]), (2, 2.0, exact[1])], "each its own, bit for bit"
    assert load(0, 1) == (2, 1.5, {"margin": pytest.approx(0.4)})
    loads = [load(rank, 3) for rank in range(3)]
    assert [loss for _, loss, _ in loads] == [1.5] * 3, "of which a line has the mean"
    assert [sums for _, _, sums in loads] == [{"margin": pytest.approx(0.4)}, {}, {}], "of which a line has the sum"


@pytest.mark.slow
def test_a_stop_in_an_epoch_that_is_evaluated_at_its_end(run, tmp_path, monkeypatch):
    more = ["--eval_strategy", "epoch", "--logging_strategy", "epoch"]
    short = ["--num_train_epochs", 2]  # of 14 steps: the second is cut off by --max_steps 12
    assert run(*more, *short, folder=tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 6, lambda watcher: setattr(watcher, "asked_to_stop", True))
        assert run(*more, *short)[0] == 130
    assert [line["step"] for line in read_metrics(tmp_path / "part") if "held_out_loss" in line] == [0]
    code, _, err = run(*more, *short, *GO_ON)
    assert code == 0, err
    assert_same_run(tmp_path / "whole", tmp_path / "part")


EARLY = ["--max_steps", 12, "--per_device_train_batch_size", 4, "--learning_rate", 0.02, "--save_steps", 1,
         "--eval_steps", 2, "--logging_steps", 3, "--dtype", "float32", "--early_stopping_patience", 1,
         "--early_stopping_metric", "accuracy"]  # fmt: skip


@pytest.fixture
def early(run_script, tiny_model, pairs_file, tmp_path):
    """A run that stopped early, left as if it had been killed before its end; what it was; and how to go on with it."""
    folder = tmp_path / "early"
    command = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, *EARLY, "--output_dir"]
    code, _, err = run_script(*command, folder)
    assert code == 0, err
    record, lines = read_record(folder), read_metrics(folder)
    assert record["early_stopping"]["stopped"]
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "run.json").write_text(json.dumps(record | {"status": "running"}))

    def go_on(folder: Path = folder) -> str:
        code, out, err = run_script(*command, folder, *GO_ON)
        assert code == 0, err
        assert (folder / "model.safetensors").read_bytes() == weights
        assert read_metrics(folder) == lines
        after = read_record(folder)
        assert (after["early_stopping"], after["metrics"]) == (record["early_stopping"], record["metrics"])
        return out

    return folder, record["early_stopping"]["step"], lines[-1]["step"], go_on


def test_an_early_stop_is_not_trained_past(early):
    folder, best, stopped_at, go_on = early
    assert (folder / f"checkpoint-{stopped_at}").is_dir(), "saved at the very step at which it stopped"
    moved = folder.rename(folder.with_name("moved"))
    out = go_on(moved)
    assert f"step {stopped_at + 1}" not in out
    assert f"the model of step {best} is kept" in out, "found where the run is now"


@pytest.mark.slow
def test_a_best_model_that_was_damaged_is_made_again(early):
    folder, best, stopped_at, go_on = early
    assert 1 < best < stopped_at, "and the one before it needs none"
    os.truncate(folder / f"checkpoint-{best}" / "model.safetensors", 100)
    out = go_on()
    assert f"checkpoint-{best} is damaged: model.safetensors has 100 bytes instead of" in out


@pytest.mark.parametrize("damage", [slow("cut off"), "flipped"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_gone_on_from(run, whole, tmp_path, damage):
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    (part / "run.json").write_text(json.dumps(read_record(part) | {"status": "running"}))
    path = part / "checkpoint-12" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 16
    path.write_bytes(content if damage == "flipped" else content[:-9])
    code, _, err = run("--resume_from_checkpoint", part / "checkpoint-12")
    assert code == 2
    assert "optimizer.safetensors has" in err
    assert "checkpoint-8" in err
    code, out, err = run(*GO_ON)
    assert code == 0, err
    assert "checkpoint-12 is damaged: optimizer.safetensors has" in out
    assert "checkpoint-8" in next(line for line in out.splitlines() if line.startswith("resuming from"))
    shutil.rmtree(part / "checkpoint-12.damaged")
    assert_same_run(whole, part)


def test_old_checkpoints_go_though_the_run_was_killed_before_it_came_to_that(run, whole, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    (part / "run.json").write_text(json.dumps(read_record(part) | {"status": "running"}))
    code, _, err = run(*GO_ON, "--save_total_limit", 2)
    assert code == 0, err
    assert sorted(path.name for path in part.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]


def test_what_a_stop_saved_goes_before_what_was_to_be_saved(run, tmp_path, monkeypatch):
    part = tmp_path / "part"
    with monkeypatch.context() as patch:
        stop_at(patch, 10, lambda watcher: setattr(watcher, "asked_to_stop", True))
        assert run("--save_total_limit", 2)[0] == 130
    assert sorted(path.name for path in part.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-8"]
    code, _, err = run(*GO_ON, "--save_total_limit", 2)
    assert code == 0, err
    assert sorted(path.name for path in part.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]


@pytest.mark.parametrize("name", ["checkpoint-12.damaged", "best"])
def test_a_folder_that_has_no_checkpoints_name_is_refused(run, run_script, tiny_model, whole, tmp_path, name):
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    (part / "run.json").write_text(json.dumps(read_record(part) | {"status": "running"}))
    (part / "checkpoint-12").rename(part / name)
    code, _, err = run("--resume_from_checkpoint", part / name)
    assert code == 2
    assert err.count("error: ") == 1
    assert "the newest good one" in err
    assert "checkpoint-8" in err
    if name != "best":
        code, _, err = run_script("chat", "--model_name_or_path", part / name, "--prompt", "hello")
        assert code == 2
        assert "found damaged and renamed" in err


def test_the_files_of_an_adapter_are_the_same_in_each_process(run, tmp_path):
    code, _, err = run("--use_lora")
    assert code == 0, err
    for folder in (tmp_path / "part", tmp_path / "part" / "checkpoint-12"):
        names = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
        assert len(names) > 6
        assert names == sorted(names), "not as Python's hashes, which each process draws anew, have them"


def test_a_damaged_model_is_not_evaluated(run_script, whole, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    path = part / "checkpoint-8" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 16
    path.write_bytes(content)
    code, _, err = run_script("evaluate", "--model_name_or_path", part / "checkpoint-8")
    assert code == 2
    assert "a damaged checkpoint: model.safetensors has changed since it was saved" in err
    assert f"its newest complete one is {part / 'checkpoint-12'}" in err


def fail_with(number: int):
    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return fail


def full_from(call: int):
    """A function's place, full from its so-manieth call on."""

    def wrap(real):
        count = 0

        def called(*arguments, **options):
            nonlocal count
            count += 1
            if count >= call:
                fail_with(errno.ENOSPC)()
            return real(*arguments, **options)

        return called

    return wrap


@pytest.mark.parametrize(
    ("place", "call"),
    [
        slow("utils.training.callbacks.append_metrics", 3),
        slow("utils.run.record.write_json", 4),  # run.json
        slow("utils.training.checkpointing.save_state", 3),  # the second checkpoint
        ("utils.run.checkpoints.write_manifest", 2),
        slow("utils.training.checkpointing.move_into_place", 1),  # the model at the end
        slow("utils.training.finishing.write_json_lines", 1),
    ],
)
def test_a_full_disk_is_one_message_and_nothing_is_lost(run, run_script, whole, tmp_path, monkeypatch, place, call):
    from pydoc import locate

    with monkeypatch.context() as full:
        full.setattr(place, full_from(call)(locate(place)))
        code, _, err = run()
    assert code == 2, err
    assert_one_message(err, "the disk is full", "Make room there")
    part = tmp_path / "part"
    assert not list(part.glob(".checkpoint*")), "a half-made checkpoint gives its room back"
    assert read_record(part)["status"] in ("failed", "running")
    code, _, err = run_script("evaluate", "--model_name_or_path", part)
    assert code == 2
    assert "did not finish" in err
    code, _, err = run(*GO_ON)
    assert code == 0, err
    assert_same_run(whole, part)


def test_a_library_that_words_a_full_disk_in_its_own_way(run, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    def save(*arguments, **options):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save)
    code, _, err = run()
    assert code == 2
    assert_one_message(err, "the disk is full", "No checkpoint was saved yet")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small disk takes Linux and root")
def test_a_disk_that_is_full_indeed(run, whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in (whole / "checkpoint-12").iterdir())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 5 // 2}", "full", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        code, _, err = run(folder=disk / "run")
        assert code == 2, err
        assert_one_message(err, "the disk is full", "is safe, and everything up to its step")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        code, _, err = run(*GO_ON, folder=disk / "run")
        assert code == 0, err
        assert_same_run(whole, disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        code, _, err = run(*GO_ON, folder=disk / "run")
        assert code == 2
        assert "cannot be written to" in err
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_a_report_that_cannot_be_written_stops_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.training.reporting.write_text", fail_with(errno.ENOSPC))
    code, out, err = run()
    assert code == 0, err
    assert out.count("warning: report.html could not be written: OSError") == 1


def test_a_folder_that_is_taken_away_is_not_made_again(run, whole, tmp_path, monkeypatch):
    part, away = tmp_path / "part", tmp_path / "away"
    with monkeypatch.context() as patch:
        stop_at(patch, 6, lambda watcher: part.rename(away))
        code, _, err = run()
    assert code == 2
    assert_one_message(err, f"--output_dir {part}: the folder is gone", "Restore it")
    assert not part.exists()
    away.rename(part)
    code, _, err = run(*GO_ON)
    assert code == 0, err
    assert_same_run(whole, part)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, slow(MemoryError)])
def test_out_of_memory_says_what_is_safe_and_what_needs_less(run, tmp_path, monkeypatch, kind):
    def run_out(watcher):
        raise kind("CUDA out of memory. Tried to allocate 20 GiB\nmore")

    stop_at(monkeypatch, 6, run_out)
    code, _, err = run()
    assert code == 2
    assert_one_message(err, "out of memory after step 6", "checkpoint-4 is safe", "--gradient_checkpointing")


def test_a_lost_tracker_is_a_warning(run, tmp_path, monkeypatch):
    from transformers.integrations import TensorBoardCallback

    calls = []

    def lose(self, *arguments, **options):
        calls.append(self)
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(TensorBoardCallback, "on_log", lose)
    code, out, err = run("--report_to", "tensorboard")
    assert code == 0, err
    said = "tensorboard failed and is switched off; the run continues, and metrics.jsonl has everything"
    assert out.count(f"warning: {said}") == 1
    assert len(calls) == 1
    assert any(said in text for text in read_record(tmp_path / "part")["warnings"])
    assert len(read_metrics(tmp_path / "part")) == 10


def test_a_run_that_is_replaced_half_way_is_neither_finished_nor_unknown(run, run_script, whole, tmp_path, monkeypatch):
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    (part / "notes.txt").write_text("mine")

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("utils.run.folder.remove_checkpoint", die)
        assert run("--overwrite_output_dir", "--seed", 3)[0] == 130
    code, _, err = run_script("evaluate", "--model_name_or_path", part)
    assert code == 2
    code, _, err = run(*GO_ON, "--seed", 3)
    assert code == 2, "what is left there is of the run before"
    assert "--seed" in err
    code, _, err = run("--overwrite_output_dir", "--seed", 3)
    assert code == 0, err
    assert read_record(part)["settings"]["seed"] == 3


def test_alarms_of_before_are_known_and_said_once(run, whole, tmp_path, monkeypatch):
    def alarms(lines, limits):
        return [("late", f"an alarm of step {lines[-1]['step']}")] if lines[-1]["step"] >= 3 else []

    monkeypatch.setattr("utils.training.callbacks.find_alarms", alarms)
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoint-12")
    (part / "run.json").write_text(json.dumps(read_record(part) | {"status": "running"}))
    code, out, err = run(*GO_ON)
    assert code == 0, err
    assert "an alarm" not in out
    assert read_record(part)["warnings"] == ["an alarm of step 3"]


def test_a_lost_process_is_no_fault_of_settings(tmp_path, monkeypatch):
    error = RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:1234")
    record = {"arguments": ["train"], "process": {"processes": 2}}
    monkeypatch.setenv("WORLD_SIZE", "2")
    lost = explain_lost_process(error, record, tmp_path, 7)
    assert isinstance(lost, ProcessLost)
    assert "after step 7 another process of this run ended or stopped responding" in str(lost)
    assert str(lost).endswith("accelerate launch --num_processes 2 advanced_dpo_script.py train --overwrite_output_dir")
    assert explain_lost_process(ValueError(str(error)), record, tmp_path, 7) is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert explain_lost_process(error, record, tmp_path, 7) is None
    assert explain_failure(error, tmp_path, 7, "", "") is None
    foreign = OSError(errno.EIO, "Input/output error", "/data/pairs.arrow")
    assert explain_failure(foreign, tmp_path, 7, "", "") is None, "the data set's disk is not the folder's"


def test_an_error_without_a_path_is_the_folders_where_the_folder_was_written(tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"x")
    unlink = os.unlink

    def fail(path, **options):
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), path)

    monkeypatch.setattr(os, "unlink", fail)  # which rmtree calls with the name within the folder alone
    with pytest.raises(OSError, match="timed out") as failed:
        remove_checkpoint(checkpoint)
    monkeypatch.setattr(os, "unlink", unlink)
    message = str(explain_failure(failed.value, tmp_path, 7, "It is safe.", "go on"))
    assert message.startswith(f"--output_dir {tmp_path}: connection timed out")
    assert "the run stopped after step 7. It is safe. Fix that, then resume with:" in message

    def fail_without_number(handle):
        raise io.UnsupportedOperation("File or stream is not seekable.")  # as Python says it of a disk that fails

    monkeypatch.setattr(os, "fsync", fail_without_number)
    with pytest.raises(OSError, match="not seekable") as failed:
        write_json(tmp_path / "run.json", {})
    assert "file or stream is not seekable" in str(explain_failure(failed.value, tmp_path, 7, "", ""))
    for other in (OSError(errno.ETIMEDOUT, "timed out"), OSError(errno.ENOENT, "no such file", "data/pairs.jsonl")):
        assert explain_failure(other, tmp_path, 7, "", "") is None
    memory = OSError(errno.ENOMEM, "Cannot allocate memory")  # of a process that cannot be forked
    assert str(explain_failure(memory, tmp_path, 7, "", "")).startswith("out of memory after step 7")
