"""Checkpoints that are whole or not there: damage to every file is found and said, and nothing is lost to a new one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from utils.errors import UserError
from utils.run.checkpoints import (
    begin_checkpoint,
    find_checkpoints,
    find_fault,
    find_resume_point,
    finish_checkpoint,
    is_of_model,
    prune_checkpoints,
    set_aside,
    unfinished_checkpoint,
)
from utils.run.folder import check_output_folder
from utils.run.manifests import MANIFEST, find_damage, write_manifest
from utils.training.checkpointing import CheckpointWriter

FILES = ("model.safetensors", "config.json", "optimizer.safetensors", "trainer_state.json", "shards/0.distcp", MANIFEST)


def save_checkpoint(folder: Path, step: int, best: int | None = None) -> Path:
    """A small checkpoint, saved as a trainer does it."""
    folder.mkdir(exist_ok=True)
    begin_checkpoint(folder, step)
    partial = unfinished_checkpoint(folder, step)
    for name in ("model", "optimizer"):
        save_file({"weight": torch.arange(64.0) + step}, partial / f"{name}.safetensors")
    (partial / "config.json").write_text('{"hidden_size": 32}')
    (partial / "shards").mkdir()
    (partial / "shards" / "0.distcp").write_bytes(bytes(range(256)))
    state = {"global_step": step, "best_model_checkpoint": f"/elsewhere/checkpoint-{best}" if best else None}
    (partial / "trainer_state.json").write_text(json.dumps(state))
    return finish_checkpoint(folder, step)


def flip(path: Path, place: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_checkpoint_has_its_name_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    seen = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)

        def watched(what, *more, real=real, name=name):
            path = Path(os.readlink(f"/proc/self/fd/{what}")) if isinstance(what, int) else Path(what)
            seen.append((name, path.relative_to(tmp_path).as_posix(), (tmp_path / "checkpoint-3").exists()))
            return real(what, *more)

        monkeypatch.setattr(os, name, watched)
    save_checkpoint(tmp_path, 3)
    renamed = seen.index(("rename", ".checkpoint-3.partial", False))
    flushed = {path for name, path, _ in seen[:renamed] if name == "fsync"}
    assert {f".checkpoint-3.partial/{name}" for name in FILES[:-1]} <= flushed
    assert {".checkpoint-3.partial", ".checkpoint-3.partial/shards"} <= flushed, "names are on the disk too"
    assert any(MANIFEST in path for path in flushed)
    assert seen[-1] == ("fsync", ".", True)
    assert find_fault(tmp_path / "checkpoint-3") is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut off", "flipped", "emptied", "removed", "longer"])
@pytest.mark.parametrize("large", [False, True], ids=["one by one", "in threads"])
def test_damage_to_any_file_is_found_and_named(name, damage, large, tmp_path, monkeypatch):
    if large:
        monkeypatch.setattr("utils.run.manifests.LARGE", 0)
    checkpoint = save_checkpoint(tmp_path, 3)
    path = checkpoint / name
    size = path.stat().st_size
    if damage == "cut off":
        os.truncate(path, size - 1 if name != MANIFEST else size // 2)
    elif damage == "flipped":
        flip(path)
    elif damage == "emptied":
        os.truncate(path, 0)
    elif damage == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b"x")
    fault = find_fault(checkpoint)
    if (name, damage) == (MANIFEST, "removed"):
        assert fault is None, "one of before there were manifests looks the same"
        (note,) = find_resume_point(tmp_path, "auto").notes
        assert "its content cannot be checked" in note
        return
    assert fault is not None
    assert name in fault
    if name != MANIFEST:
        expected = {"cut off": f"{size - 1:,} bytes instead of {size:,}", "flipped": "its SHA-256 differs",
                    "emptied": f"0 bytes instead of {size:,}", "removed": "is missing",
                    "longer": f"{size + 1:,} bytes instead of {size:,}"}  # fmt: skip
        assert expected[damage] in fault
        # Sizes are looked at everywhere, contents only where a run goes on.
        assert bool(find_checkpoints(tmp_path)) == (damage == "flipped")


def test_every_bit_of_a_manifest_counts(tmp_path):
    checkpoint = save_checkpoint(tmp_path, 3)
    content = (checkpoint / MANIFEST).read_bytes()
    for place in range(0, len(content), 7):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            (checkpoint / MANIFEST).write_bytes(changed)
            assert find_fault(checkpoint) is not None, (place, bit)


def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_damaged_ones_are_set_aside(tmp_path, capsys):
    for step in (2, 4, 6, 8):
        save_checkpoint(tmp_path, step)
    flip(tmp_path / "checkpoint-8" / "model.safetensors")
    os.truncate(tmp_path / "checkpoint-6" / "optimizer.safetensors", 10)
    (tmp_path / "checkpoint-6.damaged").mkdir()
    point = find_resume_point(tmp_path, "auto")
    assert point.checkpoint == tmp_path / "checkpoint-4"
    assert names(tmp_path) >= {"checkpoint-8", "checkpoint-6"}, "looking changes nothing"
    set_aside(point)
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4", "checkpoint-6.damaged", "checkpoint-6.damaged-2",
                               "checkpoint-8.damaged"}  # fmt: skip
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        "checkpoint-8 is damaged: model.safetensors has changed since it was saved (its SHA-256 differs); "
        "it is renamed to checkpoint-8.damaged"
    )
    assert "optimizer.safetensors has 10 bytes instead of" in said[1]
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


def test_a_damaged_checkpoint_that_is_named_is_refused_with_the_reason(tmp_path):
    for step in (2, 4):
        save_checkpoint(tmp_path, step)
    flip(tmp_path / "checkpoint-4" / "optimizer.safetensors")
    with pytest.raises(UserError) as caught:
        find_resume_point(tmp_path, str(tmp_path / "checkpoint-4"))
    assert "optimizer.safetensors has changed since it was saved" in str(caught.value)
    assert str(caught.value).endswith(f"the newest good one in {tmp_path} is checkpoint-2")
    assert (tmp_path / "checkpoint-4").is_dir()


def test_one_whose_best_model_is_lost_comes_after_one_that_has_its_own(tmp_path):
    for step, best in ((2, 2), (4, 2), (6, 6), (8, 6)):
        save_checkpoint(tmp_path, step, best)
    assert find_resume_point(tmp_path, "auto").checkpoint == tmp_path / "checkpoint-8"
    flip(tmp_path / "checkpoint-6" / "model.safetensors")
    point = find_resume_point(tmp_path, "auto")
    assert point.checkpoint == tmp_path / "checkpoint-4"
    assert "checkpoint-8 is good, but the best model it refers to is missing" in point.notes
    for step in (2, 4):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    assert find_resume_point(tmp_path, "auto").checkpoint == tmp_path / "checkpoint-8", "better than nothing"


def test_a_finished_run_with_models_alone_says_why_it_cannot_be_resumed(tmp_path):
    begin_checkpoint(tmp_path, 4)
    (unfinished_checkpoint(tmp_path, 4) / "trainer_state.json").write_text('{"global_step": 4}')
    finish_checkpoint(tmp_path, 4)
    (tmp_path / "run.json").write_text('{"verb": "train", "status": "finished", "settings": {}}')
    with pytest.raises(UserError, match=r"checkpoints \(checkpoint-4\) hold the model alone.*--save_only_model"):
        check_output_folder(tmp_path, "train", resume=True, overwrite=False)
    shutil.rmtree(tmp_path / "checkpoint-4")
    with pytest.raises(UserError, match="finished run without checkpoints, so there is nothing to resume"):
        check_output_folder(tmp_path, "train", resume=True, overwrite=False)


def test_a_model_alone_is_no_checkpoint_to_go_on_from_and_is_not_damaged(tmp_path):
    save_checkpoint(tmp_path, 2)
    begin_checkpoint(tmp_path, 4)
    (unfinished_checkpoint(tmp_path, 4) / "trainer_state.json").write_text('{"global_step": 4}')
    finish_checkpoint(tmp_path, 4)
    point = find_resume_point(tmp_path, "auto")
    assert point.checkpoint == tmp_path / "checkpoint-2"
    assert not point.damaged
    with pytest.raises(UserError, match="--save_only_model"):
        find_resume_point(tmp_path, str(tmp_path / "checkpoint-4"))


def test_old_checkpoints_go_once_the_new_one_is_read_back(tmp_path):
    for step in (2, 4, 6, 8):
        save_checkpoint(tmp_path, step)
    save_checkpoint(tmp_path, 10).rename(tmp_path / "checkpoint-10.damaged")
    (tmp_path / "checkpoint-1-mine").mkdir()
    newest, best = tmp_path / "checkpoint-8", tmp_path / "checkpoint-2"
    os.truncate(newest / "optimizer.safetensors", 10)
    with pytest.raises(
        OSError, match=r"checkpoint-8 was written, but reads back differently: optimizer.safetensors has 10"
    ):
        prune_checkpoints(newest, 2, best)
    assert len(find_checkpoints(tmp_path)) == 3
    newest = save_checkpoint(tmp_path, 8)
    prune_checkpoints(newest, None, best)
    assert len(find_checkpoints(tmp_path)) == 4
    prune_checkpoints(newest, 3, best)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]
    prune_checkpoints(newest, 1, best)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-8"]
    prune_checkpoints(newest, 1, None)
    assert names(tmp_path) == {"checkpoint-8", "checkpoint-10.damaged", "checkpoint-1-mine"}


def test_later_ones_that_a_run_went_back_from_go_first(tmp_path):
    for step in (2, 4, 8, 10):
        save_checkpoint(tmp_path, step)
    prune_checkpoints(save_checkpoint(tmp_path, 6), 3, None)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_in_which_order_checkpoints_go(tmp_path):
    """First those that the run went back from, then those of stops that were asked for, then the others: each oldest
    first."""
    for step in (2, 4, 6, 8, 12, 14):
        save_checkpoint(tmp_path, step)
    newest, left, gone = save_checkpoint(tmp_path, 10), names(tmp_path), []
    for most in range(6, 0, -1):
        prune_checkpoints(newest, most, None, stops=(6, 8, 14))
        gone += [int(name.rpartition("-")[2]) for name in left - names(tmp_path)]
        left = names(tmp_path)
    assert gone == [14, 12, 6, 8, 2, 4]
    assert left == {"checkpoint-10"}


def test_a_best_checkpoint_that_is_not_there_takes_no_place(tmp_path):
    for step in (2, 4, 6):
        newest = save_checkpoint(tmp_path, step)
    prune_checkpoints(newest, 2, tmp_path / "checkpoint-3")
    assert names(tmp_path) == {"checkpoint-4", "checkpoint-6"}


def test_a_user_of_the_model_reads_what_is_of_the_model(tmp_path):
    checkpoint = save_checkpoint(tmp_path, 3)
    flip(checkpoint / "optimizer.safetensors")
    assert find_fault(checkpoint, reads=is_of_model) is None
    flip(checkpoint / "model.safetensors")
    assert "model.safetensors" in find_fault(checkpoint, reads=is_of_model)
    of_training = ("optimizer", "scheduler", "scaler", "random_state_0", "log_state_1")
    assert not any(is_of_model(f"{name}.json") or is_of_model(f"{name}.safetensors") for name in of_training)


def test_a_lost_manifest_is_damage_where_the_version_that_saved_it_wrote_one(tmp_path):
    checkpoint = save_checkpoint(tmp_path, 3)
    (checkpoint / MANIFEST).unlink()
    path = checkpoint / "trainer_state.json"
    kept = {"stateful_callbacks": {"dpo_run": {"args": {}, "attributes": {"identity": {"data": "1"}}}}}
    path.write_text(json.dumps(json.loads(path.read_text()) | kept))
    assert find_fault(checkpoint) == "manifest.json is missing, so its content cannot be checked"
    assert find_resume_point(tmp_path, "auto").checkpoint is None


def test_a_file_that_the_manifest_does_not_list_is_damage(tmp_path):
    checkpoint = save_checkpoint(tmp_path, 3)
    (checkpoint / ".DS_Store").write_text("a file manager's")
    assert find_fault(checkpoint) is None
    (checkpoint / "shards" / "1.distcp").write_text("from elsewhere")
    assert find_fault(checkpoint) == "shards/1.distcp is not in its manifest.json"
    (checkpoint / "shards" / "1.distcp").unlink()
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["files"]["optimizer.safetensors"]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    flip(checkpoint / "optimizer.safetensors")
    assert find_fault(checkpoint) == "optimizer.safetensors is not in its manifest.json"


def test_a_checkpoint_of_before_there_were_manifests_is_taken_where_its_files_are_whole(tmp_path):
    checkpoint = save_checkpoint(tmp_path, 3)
    (checkpoint / MANIFEST).unlink()
    assert find_resume_point(tmp_path, "auto").checkpoint == checkpoint
    size = (checkpoint / "model.safetensors").stat().st_size
    for length in (0, 5, size - 1):
        os.truncate(checkpoint / "model.safetensors", length)
        assert "model.safetensors is truncated" in find_fault(checkpoint)
        assert find_resume_point(tmp_path, "auto").checkpoint is None


STATE = {"global_step": 3, "epoch": 1.5, "max_steps": 9, "log_history": [{"step": 1, "loss": 0.7, "margin": None}],
         "best_metric": 0.5, "best_model_checkpoint": None, "stateful_callbacks": {}}  # fmt: skip


@pytest.mark.parametrize(
    "odd",
    [
        {"epoch": "1"}, {"epoch": -1}, {"global_step": 4}, {"global_step": 3.5}, {"global_step": []},
        {"max_steps": []}, {"best_model_checkpoint": 5}, {"best_model_checkpoint": ["a"]}, {"best_global_step": "x"},
        {"best_metric": {}}, {"log_history": {}}, {"log_history": [3]}, {"log_history": [{"loss": 1.0}]},
        {"log_history": [{"step": 1, "loss": "x"}]}, {"log_history": [{"step": [], "loss": 1.0}]},
        {"stateful_callbacks": []}, {"stateful_callbacks": {"dpo_run": []}},
        {"stateful_callbacks": {"dpo_run": {"attributes": {"stops": 5}}}},
        {"stateful_callbacks": {"dpo_run": {"attributes": {"identity": []}}}},
        {"train_batch_size": "8"}, {"trial_params": 3}, {"num_train_epochs": None, "total_flos": "x"},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_a_state_that_no_trainer_writes_is_damage(tmp_path, odd):
    begin_checkpoint(tmp_path, 3)
    partial = unfinished_checkpoint(tmp_path, 3)
    (partial / "optimizer.safetensors").write_bytes(b"x")
    (partial / "trainer_state.json").write_text(json.dumps(STATE))
    assert find_fault(finish_checkpoint(tmp_path, 3)) is None
    begin_checkpoint(tmp_path, 3)
    (partial / "optimizer.safetensors").write_bytes(b"x")
    (partial / "trainer_state.json").write_text(json.dumps(STATE | odd))
    assert find_fault(finish_checkpoint(tmp_path, 3)).startswith("trainer_state.json ")
    assert find_resume_point(tmp_path, "auto").checkpoint is None


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_weights_that_are_not_finite_are_not_saved(run_script, tiny_model, pairs_file, tmp_path, verb):
    code, _, err = run_script(
        verb, "--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--max_steps", 4, "--save_steps", 1,
        "--learning_rate", 3e38, "--lr_scheduler_type", "constant", "--warmup_steps", 0,
        "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert code == 2
    assert "finite after step 1; nothing is saved from there on; no checkpoint was saved yet. Try a smaller " in err
    assert "--learning_rate (it is 3e+38)" in err
    for path in (tmp_path / "run").rglob("*.safetensors"):
        if "optimizer" not in path.name and "state" not in path.name:
            assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


def test_a_single_weight_that_is_not_finite_is_enough():
    policy = torch.nn.Linear(3, 2)
    args, bad_batches = SimpleNamespace(learning_rate=1e-3), SimpleNamespace(what_is_safe=lambda: "nothing")
    state = SimpleNamespace(global_step=7)
    writer = CheckpointWriter(SimpleNamespace(policy=policy, args=args, state=state, bad_batches=bad_batches), None)
    writer.check_weights()
    policy.weight.data[1, 2] = torch.inf
    with pytest.raises(UserError, match="1 of the trained weights are no longer finite after step 7"):
        writer.check_weights()
    writer.broken_before = 1
    writer.check_weights()
    policy.bias.requires_grad_(False)[0] = torch.nan
    writer.check_weights()


def test_a_checkpoint_of_odd_identity_is_one_message(run_script, tiny_model, pairs_file, tmp_path):
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--save_steps", 1, "--output_dir")
    assert run_script(*flags, tmp_path / "run", "--max_steps", 1)[0] == 0
    checkpoint = tmp_path / "run" / "checkpoint-1"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    identity = state["stateful_callbacks"]["dpo_run"]["attributes"]["identity"]
    for odd in ({"model": 3}, {"settings": []}, {"batch": [1]}, {"rows": "x", "data": 0}):
        state["stateful_callbacks"]["dpo_run"]["attributes"]["identity"] = identity | odd
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        (checkpoint / MANIFEST).unlink()
        write_manifest(checkpoint, 1)
        more = ("--max_steps", 2, "--resume_from_checkpoint", checkpoint, "--allow_changes", "max_steps")
        code, _, err = run_script(*flags, tmp_path / "run", *more)
        assert (code, err.count("\n")) == (2, 1), (odd, err)
        assert f"{checkpoint}: cannot be resumed from: trainer_state.json cannot be used: stateful_callbacks" in err, (
            odd
        )
    del state["stateful_callbacks"]  # which no trainer leaves out; the state is saved again all the same
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, 1)
    code, _, err = run_script(*flags, tmp_path / "run", *more)
    assert code == 0, err


def test_of_many_damaged_files_three_are_named_and_the_others_counted(tmp_path):
    for name in "abcdef":
        (tmp_path / name).write_text("whole")
    write_manifest(tmp_path, 1)
    for name in "abcde":
        (tmp_path / name).write_text("other")
    other = "has changed since it was saved (its SHA-256 differs)"
    assert find_damage(tmp_path, 1) == ", ".join(f"{name} {other}" for name in "abc") + ", and 2 more files"
    (tmp_path / "d").write_text("whole")
    (tmp_path / "e").write_text("whole")
    assert find_damage(tmp_path, 1) == ", ".join(f"{name} {other}" for name in "abc")
