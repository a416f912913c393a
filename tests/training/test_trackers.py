"""Experiment trackers, read back with the libraries' own readers: names, steps, a record that a resume continues."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from shared.forked import Forked
from shared.pairs import make_pairs, write_lines
from shared.runs import read_record

from utils.settings.training import TRACKERS
from utils.training.tracking import say_how_to_upload

QUICK = ["--per_device_train_batch_size", 4, "--logging_steps", 1, "--learning_rate", 5e-3, "--max_steps", 6,
         "--save_steps", 2, "--eval_steps", 3]  # fmt: skip
BLOCK = 32768  # of the LevelDB log that a .wandb file is


def read_wandb(path: Path) -> Iterator:
    """The records of a .wandb file, as W&B's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = path.read_bytes(), 7, b""
    while place < len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def read_history(path: Path) -> tuple[str, list[str], dict[int, dict[str, object]]]:
    """The id, the tags, and what is logged at each step."""
    run, rows = None, {}
    for record in read_wandb(path):
        if record.WhichOneof("record_type") == "run":
            run = record.run
        elif record.WhichOneof("record_type") == "history":
            items = {(item.key or ".".join(item.nested_key)): item.value_json for item in record.history.item}
            rows[record.history.step.num] = {name: json.loads(value) for name, value in items.items()}
    assert run is not None
    return run.run_id, list(run.tags), rows


@pytest.fixture(scope="module")
def resumed(tiny_model, tmp_path_factory) -> Path:
    """A run with W&B offline and TensorBoard, and the same again from its checkpoint at step 2 of 6."""
    import advanced_dpo_script

    folder = tmp_path_factory.mktemp("tracked")
    data = write_lines(folder / "pairs.jsonl", make_pairs(40))
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", data, "--output_dir", folder / "run", *QUICK,
             "--report_to", "tensorboard", "--f_divergence_type", "js_divergence", "--use_wandb",
             "--wandb_tags", "small", "first", "--wandb_entity", "someone", "--cost_per_hour", 7200]  # fmt: skip
    environment = {"HOME": str(folder), "NETRC": str(folder / "none")}
    for more in ([], ["--resume_from_checkpoint", "auto"]):
        said = io.StringIO()
        with mock.patch.dict(os.environ, environment), contextlib.redirect_stdout(said):
            assert advanced_dpo_script.main([str(word) for word in (*flags, *more)]) == 0
        if not more:
            shutil.copy(folder / "run" / "run.json", folder / "first.json")
            for name in ("checkpoint-4", "checkpoint-6"):
                shutil.rmtree(folder / "run" / name)
    (folder / "out.txt").write_text(said.getvalue())
    return folder / "run"


def test_trackers_are_those_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(TRACKERS) <= set(INTEGRATION_TO_CALLBACK)


def test_a_resumed_run_continues_its_wandb_record(resumed):
    parts = sorted((resumed / "wandb").glob("offline-run-*/*.wandb"))
    assert len(parts) == 2
    (first, tags, before), (second, _, after) = map(read_history, parts)
    assert first == second == read_record(resumed)["wandb_run_id"]
    assert sorted(tags) == ["first", "small"]
    assert sorted(before) == [0, 1, 2, 3, 4, 5, 6]
    assert sorted(after) == [3, 4, 5, 6]
    assert before[4]["train/loss"] == after[4]["train/loss"]
    folders = " ".join(str(path.parent) for path in parts)
    assert f"wandb sync {folders}" in (resumed.parent / "out.txt").read_text()


def test_parts_that_begin_in_one_second_are_all_uploaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    names = ("offline-run-20260101_000000-abc", "offline-run-20260101_000000-abc-1", "offline-run-20260101_000000-abcd")
    for name in names:
        (tmp_path / "wandb" / name).mkdir(parents=True)
    say_how_to_upload(SimpleNamespace(run=SimpleNamespace(use_wandb=True)), tmp_path, "abc")
    said = capsys.readouterr().out.split()
    assert [Path(word).name for word in said if "offline-run" in word] == list(names[:2])


def test_time_and_cost_are_those_of_all_parts(resumed):
    first, both = (
        json.loads((resumed.parent / "first.json").read_text())["resources"],
        read_record(resumed)["resources"],
    )
    assert both["seconds"] > first["seconds"] + both["train_seconds"]
    assert both["cost"] == pytest.approx(both["seconds"] * 2)


def test_names_are_the_same_in_every_tracker_and_in_the_file(resumed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in lines for name in line} - {"step"}
    expected = {
        f"eval/{name.removeprefix('held_out_')}" if name.startswith("held_out_") else f"train/{name}" for name in names
    }
    _, _, rows = read_history(sorted((resumed / "wandb").glob("offline-run-*/*.wandb"))[0])
    assert expected <= {name for row in rows.values() for name in row}
    events = EventAccumulator(str(resumed / "tensorboard"))
    events.Reload()
    assert expected <= set(events.Tags()["scalars"])


def test_a_tensorboard_log_has_no_step_twice_after_a_resume(resumed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(list((resumed / "tensorboard").glob("events*"))) == 2
    events = EventAccumulator(str(resumed / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("eval/loss")] == [0, 3, 6]
    (shown,) = events.Tensors("args/text_summary")[0].tensor_proto.string_val
    assert json.loads(shown)["f_divergence_type"] == "js_divergence", "the settings of the run"


def test_samples_are_a_table_in_wandb_and_a_text_in_tensorboard(tmp_path, monkeypatch):
    import wandb
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback
    from transformers.trainer_callback import CallbackHandler

    from utils.settings.training import RunSettings
    from utils.training.trackers import StepwiseWandb, log_samples

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = wandb.init(project="dpo", id="abc", dir=tmp_path)
    callbacks = [StepwiseWandb(RunSettings(), "abc"), TensorBoardCallback(SummaryWriter(str(tmp_path / "tb")))]
    handler = CallbackHandler(callbacks, None, None, None, None)

    class Trainer:
        callback_handler = handler

    rows = [
        {"step": 4, "prompt": "Hello <b>", "response": "there\nyou", "ended": True},
        {"step": 4, "prompt": [{"role": "user", "content": "Hi"}], "response": "Ho", "ended": False},
    ]
    log_samples(Trainer(), rows, 4)
    run.finish()
    (table,) = tmp_path.rglob("*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["step", "prompt", "response", "ended"]
    assert content["data"][1] == ["4", "User: Hi", "Ho", "False"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    (text,) = events.Tensors("samples/text_summary")
    assert text.step == 4
    assert b"Hello <b>" in text.tensor_proto.string_val[0]


def test_trackers_that_cannot_write_are_a_line_each_and_the_run_goes_on(tiny_model, pairs_file, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(full)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        (full / "fill").write_bytes(bytes(4096))
        where = {"TENSORBOARD_LOGGING_DIR": str(full / "tb"), "WANDB_DIR": str(full), "WANDB_MODE": "offline"}
        names = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", tmp_path / "run")
        process = Forked(*names, "--report_to", "tensorboard", "--use_wandb", *QUICK, **where)
        out, err = process.communicate()
    finally:
        subprocess.run(["umount", str(full)], check=True)
    assert process.returncode == 0, err
    assert "Traceback" not in out + err
    assert "Logging error" not in out + err
    said = [line for line in (out + err).splitlines() if "failed and is switched off" in line]
    assert sorted(line.split()[1] for line in said) == ["tensorboard", "wandb"]
    assert read_record(tmp_path / "run")["status"] == "finished"
