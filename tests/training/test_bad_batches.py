"""Steps whose loss or gradient is not finite: the run stops with their rows, or leaves a bounded number of them out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared.pairs import make_pairs, write_lines
from shared.runs import ROOT, read_metrics, read_record

from utils.run.state import load_state

BAD = 7  # the pair whose loss is not finite


@pytest.fixture(scope="module")
def holed(model_without_a_tilde, tmp_path_factory):
    """A model that has no number for one token, and pairs of which one holds it."""
    folder, token = model_without_a_tilde
    pairs = make_pairs(24)
    pairs[BAD]["prompt"] = "~ it was"
    return folder, write_lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs), token


@pytest.fixture
def train(run_script, holed, tmp_path):
    """Trains on the pairs, two epochs of six steps; returns the exit code, what was printed, and the folder."""
    model, data, _ = holed

    def run(*flags, verb="train", folder="run"):
        output = tmp_path / folder
        usual = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2,
                 "logging_steps": 5, "save_steps": 1}  # fmt: skip
        rest = [part for name, value in usual.items() if f"--{name}" not in flags for part in (f"--{name}", value)]
        code, out, err = run_script(
            verb, "--model_name_or_path", model, "--dataset_name", data, "--output_dir", output,
            "--validation_split", "none", "--learning_rate", 5e-3, *rest, *flags,
        )  # fmt: skip
        return code, out + err, output

    return run


def sound(weights: dict, token: int) -> dict:
    """The weights without the row of the token that has no number."""
    weights["model.embed_tokens.weight"][token] = 0
    return weights


def bad_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "bad_pairs.jsonl").read_text().splitlines()]


WAYS = [["train"], ["sft"]]
SLOW_WAYS = [["train", "--max_tokens_per_batch", 60], ["train", "--use_lora"]]


@pytest.mark.parametrize(
    "way",
    WAYS + [pytest.param(way, marks=pytest.mark.slow) for way in SLOW_WAYS],
    ids=lambda way: " ".join(map(str, way)),
)
def test_a_step_is_left_out_and_leaves_no_trace_but_its_count(way, train, holed):
    verb, *flags = way
    code, out, folder = train("--skip_bad_batches", 2, *flags, verb=verb)
    assert code == 0, out
    record, lines = read_record(folder), read_metrics(folder)
    first, second = record["skipped_steps"]
    assert 1 <= first <= 6 < second <= 12, "once an epoch"
    shown = [line for line in out.splitlines() if "left out step" in line]
    assert [f"{n} of at most 2 such steps" in line for n, line in enumerate(shown, 1)] == [True, True]
    assert all("pairs.jsonl line 8" in line for line in shown)
    assert [line["step"] for line in lines if "bad_rows" in line] == [first, second]
    training = [line for line in lines if "learning_rate" in line]
    assert training[-1]["skipped_steps"] == 2
    assert all(isinstance(line["loss"], float) for line in training)
    seen = 48 - 8  # of the pairs of two epochs those of two steps are missing
    if verb == "train":
        assert sum(line["pairs"] for line in training) == seen
    (warning,) = record["warnings"]
    assert "2 optimizer steps" in warning
    assert warning in (folder / "report.html").read_text(encoding="utf-8").replace("&#x27;", "'")
    assert [(row["step"], row["row"], row["loss"], row["of"]) for row in bad_rows(folder)] == [
        (first, BAD, "nan", 4), (second, BAD, "nan", 4)]  # fmt: skip
    assert bad_rows(folder)[0]["prompt"] == "~ it was"
    for step in (first, second):
        name = "adapter_model.safetensors" if "--use_lora" in flags else "model.safetensors"
        if step == 1:
            continue
        before, after = (load_file(folder / f"checkpoint-{n}" / name) for n in (step - 1, step))
        if "--use_lora" not in flags:
            before, after = sound(before, holed[2]), sound(after, holed[2])
        assert all(torch.equal(before[key], after[key]) for key in before)
        states = [load_state(folder / f"checkpoint-{n}", "optimizer") for n in (step - 1, step)]
        moments = [state["optimizer"]["state"] for state in states]
        assert all(torch.equal(moments[0][k][n], moments[1][k][n]) for k in moments[0] for n in ("exp_avg", "step")
                   if not moments[0][k][n].isnan().any())  # fmt: skip
        assert [state["scheduler"]["last_epoch"] for state in states] == [step - 1, step], "the schedule goes on"


def test_the_loss_that_is_logged_is_that_of_the_steps_that_were_taken(train):
    """Of sft, whose loss is a mean over steps: with a line for each step and with one for all of them."""
    code, out, each = train("--skip_bad_batches", 2, "--logging_steps", 1, "--save_steps", 100, verb="sft")
    assert code == 0, out
    code, out, whole = train("--skip_bad_batches", 2, "--logging_steps", 12, "--save_steps", 100, verb="sft",
                             folder="whole")  # fmt: skip
    assert code == 0, out
    losses = [line["loss"] for line in read_metrics(each) if "loss" in line]
    assert len(losses) == 10
    (line,) = [line for line in read_metrics(whole) if "loss" in line]
    assert line["loss"] == pytest.approx(sum(losses) / 10, rel=1e-5)


def test_one_more_than_allowed_stops_the_run_and_says_how_to_go_on(train):
    code, out, folder = train("--skip_bad_batches", 1)
    assert code == 2
    (fault,) = [line for line in out.splitlines() if line.startswith("error: ")]
    assert "1 such steps were left out before (--skip_bad_batches 1)" in fault
    assert f"Look at the rows in {folder / 'bad_pairs.jsonl'}" in fault
    assert len(bad_rows(folder)) == 2
    assert "--resume_from_checkpoint auto --skip_bad_batches 10" in fault
    assert "--allow_changes learning_rate" in fault
    record = read_record(folder)
    assert (record["status"], len(record["skipped_steps"])) == ("failed", 1)
    code, out, folder = train("--resume_from_checkpoint", "auto", "--skip_bad_batches", 10)
    assert code == 0, out
    assert len(read_record(folder)["skipped_steps"]) == 2
    assert len(bad_rows(folder)) == 2, "the row of the step that stopped the run is written once"


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_a_resumed_run_counts_on_and_is_the_uninterrupted_one(verb, train, holed, tmp_path):
    code, out, whole = train("--skip_bad_batches", 3, verb=verb)
    assert code == 0, out
    first, second = read_record(whole)["skipped_steps"]
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    for path in part.glob("checkpoint-*"):
        if int(path.name.partition("-")[2]) > second - 1:
            shutil.rmtree(path)
    (part / "model.safetensors").unlink()
    (part / "run.json").write_text(json.dumps(read_record(part) | {"status": "running"}))
    code, out, part = train("--skip_bad_batches", 3, "--resume_from_checkpoint", "auto", verb=verb, folder="part")
    assert code == 0, out
    a, b = (sound(load_file(folder / "model.safetensors"), holed[2]) for folder in (whole, part))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert read_metrics(whole) == read_metrics(part)
    assert read_record(part)["skipped_steps"] == [first, second]
    assert read_record(part)["warnings"] == read_record(whole)["warnings"]
    assert bad_rows(part) == bad_rows(whole)


@pytest.mark.parametrize("limit", [0, 2], ids=["stops", "leaves out"])
def test_a_gradient_that_is_not_finite_though_the_losses_are(limit, run_script, tiny_model, tmp_path, monkeypatch):
    from utils.training.trainer import PreferenceTrainer

    original = PreferenceTrainer.compute_loss

    def spoil(self, *arguments, **options):
        loss = original(self, *arguments, **options)
        if self.state.global_step in (2, 3):
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss

    monkeypatch.setattr(PreferenceTrainer, "compute_loss", spoil)
    data = write_lines(tmp_path / "pairs.jsonl", make_pairs(24))
    code, _, err = run_script("--model_name_or_path", tiny_model, "--dataset_name", data, "--output_dir",
                                tmp_path / "run", "--max_steps", 5, "--per_device_train_batch_size", 4,
                                "--skip_bad_batches", limit, "--logging_steps", 1)  # fmt: skip
    rows = bad_rows(tmp_path / "run")
    if limit:
        assert code == 0, err
        assert read_record(tmp_path / "run")["skipped_steps"] == [3, 4]
        assert len(rows) == 8
        assert [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line] == [1, 2, 5]
    else:
        assert code == 2
        assert "the losses of its 4 rows are finite, their gradient is not" in err
        assert "no checkpoint was saved yet" in err
        assert "--overwrite_output_dir --skip_bad_batches 10" in err
        assert len(rows) == 4
        assert all(isinstance(row["loss"], float) for row in rows)


def test_no_row_is_blamed_for_weights_that_are_broken(run_script, tiny_model, pairs_file, tmp_path, monkeypatch):
    from utils.training.callbacks import RunWatcher

    taken = RunWatcher.on_step_end

    def spoil(self, args, state, control, model, **options):
        if state.global_step == 3:
            next(model.parameters()).data[:2] = torch.nan
        return taken(self, args, state, control, model=model, **options)

    monkeypatch.setattr(RunWatcher, "on_step_end", spoil)
    code, out, err = run_script("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--max_steps", 6,
                                "--output_dir", tmp_path / "run", "--save_steps", 2,
                                "--skip_bad_batches", 5)  # fmt: skip
    assert code == 2
    assert "of the trained weights are no longer finite after step 3; nothing is saved from there on" in err
    assert f"the weights of the newest checkpoint, {tmp_path / 'run' / 'checkpoint-2'}, are finite" in err
    assert "left out" not in out + err
    assert not (tmp_path / "run" / "bad_pairs.jsonl").exists()
    assert not (tmp_path / "run" / "checkpoint-4").exists()


def test_a_dry_run_writes_no_rows(train, tmp_path):
    code, out, folder = train("--dry_run", "--per_device_train_batch_size", 24)
    assert code == 2
    assert "bad_pairs" not in out
    assert not folder.exists()


def test_deepspeed_cannot_leave_steps_out(train, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    code, out, _ = train("--skip_bad_batches", 2)
    assert code == 2
    assert "error: --skip_bad_batches: DeepSpeed takes the optimizer step before" in out


@pytest.mark.slow
@pytest.mark.parametrize("script", ["advanced_dpo_script.py", "tests/programs/sharded.py"])
def test_two_processes_leave_out_the_same_step(script, holed, tmp_path):
    model, data, token = holed
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, "train",
               "--model_name_or_path", model, "--dataset_name", data, "--output_dir", folder, "--max_steps", 8,
               "--validation_split", "none", "--per_device_train_batch_size", 2, "--skip_bad_batches", 2,
               "--logging_steps", 3, "--save_steps", 4, "--dtype", "float32"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record = read_record(folder)
    assert record["skipped_steps"]
    assert record["step"] == 8
    assert [row["row"] for row in bad_rows(folder)] == [BAD] * len(record["skipped_steps"])
    weights = sound(load_file(folder / "model.safetensors"), token)
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.fixture
def float16_scaler(monkeypatch):
    """The scaler that float16 has on a GPU, where on a CPU the libraries make none; and what makes gradients overflow
    in the first so many steps."""
    from transformers import Trainer

    from utils.training.trainer import PreferenceTrainer

    made, compute_loss, create = [], PreferenceTrainer.compute_loss, Trainer.create_accelerator_and_postprocess

    def make(self):
        create(self)
        made.append(torch.amp.GradScaler("cpu", init_scale=2.0**24))
        self.accelerator.scaler, self.accelerator.native_amp = made[-1], True

    def overflow(steps):
        def spoil(self, *arguments, **options):
            loss = compute_loss(self, *arguments, **options)
            if self.state.global_step < steps:
                loss.register_hook(lambda gradient: gradient * torch.inf)
            return loss

        monkeypatch.setattr(PreferenceTrainer, "compute_loss", spoil)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", make)
    monkeypatch.setattr("utils.training.checks._check_precision", lambda settings: None)  # refuses it on a CPU
    return made, overflow


@pytest.fixture
def train_sound(run_script, tiny_model, tmp_path):
    """Trains on good pairs, forty steps in float16."""
    data = write_lines(tmp_path / "pairs.jsonl", make_pairs(24))
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", data, "--output_dir", tmp_path / "run"]
    flags += ["--dtype", "float16", "--max_steps", 40, "--validation_split", "none"]
    return lambda: run_script(*flags, "--per_device_train_batch_size", 4)


def test_what_float16s_scaler_leaves_out_is_no_bad_batch(float16_scaler, train_sound, tmp_path):
    made, overflow = float16_scaler
    overflow(3)
    code, out, err = train_sound()
    assert code == 0, out + err
    assert 1 < made[-1].get_scale() <= 2.0**21
    assert "skipped_steps" not in read_record(tmp_path / "run")
    assert not (tmp_path / "run" / "bad_pairs.jsonl").exists()


def test_a_gradient_that_no_scale_of_float16_fixes_is_a_bad_batch(float16_scaler, train_sound):
    float16_scaler[1](100)
    code, _, err = train_sound()
    assert code == 2
    assert "diverged in step 25: the losses of its 4 rows are finite, their gradient is not" in err
    assert "a smaller float16 loss scale does not fix it" in err


@pytest.mark.usefixtures("float16_scaler")
def test_under_float16_a_loss_that_is_not_finite_is_a_bad_batch(train, holed):
    code, out, folder = train("--dtype", "float16", "--skip_bad_batches", 2)
    assert code == 0, out
    steps = read_record(folder)["skipped_steps"]
    assert len(steps) == 2
    assert [row["row"] for row in bad_rows(folder)] == [BAD, BAD]
    before, after = (sound(load_file(folder / f"checkpoint-{n}" / "model.safetensors"), holed[2])
                     for n in (steps[1] - 1, steps[1]))  # fmt: skip
    assert all(torch.equal(before[name], after[name]) for name in before)
