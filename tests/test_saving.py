"""The run folder: nothing half written, states that come back as they were, and no folder spoiled."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from utils.checkpoints import find_checkpoints, find_resume_point
from utils.errors import UserError
from utils.output_folder import check_output_folder, clear_run
from utils.saving import (
    LOCK,
    OWN_FILES,
    RunRecord,
    append_metrics,
    keep_metrics_until,
    now,
    read_record,
    write_json,
    write_json_lines,
    write_text,
)

SETTINGS = {"seed": 1, "output_dir": "a"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def make_checkpoint(folder: Path, step: int, complete: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_text("")
    if complete:
        (checkpoint / "optimizer.json").write_text("{}")
        (checkpoint / "trainer_state.json").write_text("{}")
    return checkpoint


def make_run(folder: Path, status: str = "interrupted", verb: str = "train", settings: dict | None = None) -> Path:
    RunRecord({"verb": verb, "status": status, "settings": settings or SETTINGS}).write_to(folder)
    return folder


# Files


def test_text_is_written_and_folders_are_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "file.txt", "é\nlast line\n")
    assert (tmp_path / "a" / "b" / "file.txt").read_bytes() == "é\nlast line\n".encode()
    assert names(tmp_path / "a" / "b") == {"file.txt"}


def test_file_that_fails_half_way_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_text(path, "old")

    def fail(*arguments):
        raise OSError("the disk is full")

    for culprit in ("fsync", "replace"):
        with monkeypatch.context() as broken:
            broken.setattr(os, culprit, fail)
            with pytest.raises(OSError, match="disk is full"):
                write_text(path, "new")
        assert path.read_text() == "old"
        assert names(tmp_path) == {"run.json"}
    with pytest.raises(TypeError):
        write_text(path, 3)
    assert path.read_text() == "old"
    assert names(tmp_path) == {"run.json"}


def test_new_content_is_flushed_before_it_takes_the_place_of_the_old(tmp_path, monkeypatch):
    path, seen = tmp_path / "run.json", []
    write_text(path, "old")
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def watched(*arguments, real=real, name=name):
            (beside,) = set(tmp_path.iterdir()) - {path}
            seen.append((name, path.read_text(), beside.read_text()))
            return real(*arguments)

        monkeypatch.setattr(os, name, watched)
    write_text(path, "new")
    assert seen == [("fsync", "old", "new"), ("replace", "old", "new")]
    assert path.read_text() == "new"


def test_json_is_readable_by_people_and_holds_what_json_has_no_word_for(tmp_path):
    write_json(tmp_path / "a.json", {"path": Path("x"), "text": "é\ud83d", "list": [1, 2.5, None, True]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "é" in text
    assert text.endswith("}\n")
    assert json.loads(text) == {"path": "x", "text": "é\ud83d", "list": [1, 2.5, None, True]}


def test_json_lines_are_one_object_per_line(tmp_path):
    rows = [{"row": 1, "text": "two\nlines"}, {"row": 2, "text": "é\u2028"}]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == rows
    write_json_lines(tmp_path / "rows.jsonl", [])
    assert (tmp_path / "rows.jsonl").read_text() == ""


# run.json and metrics.jsonl


def test_record_is_rewritten_at_every_update(tmp_path):
    record = RunRecord({"status": "running", "metrics": {"train": {"loss": 1}}, "data": {"rows": 3}})
    record.write_to(tmp_path)
    record.write()
    assert read_record(tmp_path)["status"] == "running"
    record.update(status="finished", metrics={"held_out": {"loss": 2}}, data={"rows": 4}, resources={"seconds": 1})
    written = read_record(tmp_path)
    assert written.pop("updated").endswith("Z")
    assert written.pop("longest_silence") >= 0
    assert written == {
        "status": "finished",
        "metrics": {"train": {"loss": 1}, "held_out": {"loss": 2}},
        "data": {"rows": 4},
        "resources": {"seconds": 1},
    }


def test_record_holds_each_warning_once(tmp_path):
    record = RunRecord({})
    record.write_to(tmp_path)
    for text in ("slow", "full", "slow"):
        record.warn(text)
    record.write()
    assert read_record(tmp_path)["warnings"] == ["slow", "full"]


def test_record_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RunRecord({"status": "running"}).update(status="finished")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("content", [None, "", "{", "[1]", b"\xff\xff"])
def test_record_that_cannot_be_read_is_none(content, tmp_path):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_record(tmp_path) is None


def test_metrics_are_kept_up_to_a_step(tmp_path):
    events = [{"step": 0, "held_out_loss": 0.7}, {"step": 5, "loss": 0.6, "note": "é\u2028"}, {"step": 10, "loss": 0.5}]
    for event in events:
        append_metrics(tmp_path, event)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "held_o')  # the run died while it wrote

    def kept(step: int) -> list[dict]:
        keep_metrics_until(tmp_path, step)
        return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").split("\n") if line]

    assert kept(10) == events
    assert kept(9) == events[:2]
    assert kept(9) == events[:2]
    append_metrics(tmp_path, {"step": 10, "loss": 0.4})
    assert kept(10) == [*events[:2], {"step": 10, "loss": 0.4}]
    assert kept(-1) == []


def test_no_metrics_to_keep_is_no_fault(tmp_path):
    keep_metrics_until(tmp_path, 5)
    assert names(tmp_path) == set()


def test_time_is_utc_to_the_second():
    assert len(now()) == len("2025-01-31T23:59:59Z")
    assert now().endswith("Z")


# Checkpoints


def test_checkpoints_are_the_complete_ones_oldest_first(tmp_path):
    for step in (10, 9, 100):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 200, complete=False)
    for name in ("checkpoint-x", "checkpoint-5.tmp", "old-checkpoint-1", "checkpoint-"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-300").write_text("a file")
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert find_checkpoints(tmp_path / "nowhere") == []


def test_resuming_starts_from_the_newest_complete_checkpoint(tmp_path):
    assert find_resume_point(tmp_path, None) is None
    assert find_resume_point(tmp_path, "auto") is None
    make_checkpoint(tmp_path, 9)
    make_checkpoint(tmp_path, 10)
    make_checkpoint(tmp_path, 11, complete=False)
    assert find_resume_point(tmp_path, None) is None
    assert find_resume_point(tmp_path, "auto") == tmp_path / "checkpoint-10"
    assert find_resume_point(tmp_path, str(tmp_path / "checkpoint-9")) == tmp_path / "checkpoint-9"


def test_resume_path_may_be_relative(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "run", 9)
    monkeypatch.chdir(tmp_path)
    assert find_resume_point(Path("run"), "run/checkpoint-9") == tmp_path / "run" / "checkpoint-9"


def test_resuming_from_an_incomplete_checkpoint_is_refused(tmp_path):
    make_checkpoint(tmp_path, 11, complete=False)
    for wish in (str(tmp_path / "checkpoint-11"), str(tmp_path / "checkpoint-3")):
        with pytest.raises(UserError) as caught:
            find_resume_point(tmp_path, wish)
        assert str(caught.value) == (
            f"--resume_from_checkpoint {wish}: not a complete checkpoint (no trainer_state.json); "
            "pass auto to start without one"
        )
    make_checkpoint(tmp_path, 9)
    with pytest.raises(UserError, match=f"the newest in {tmp_path} is checkpoint-9$"):
        find_resume_point(tmp_path, str(tmp_path / "checkpoint-11"))


# The output folder


def check(folder: Path, verb: str = "train", resume: bool = False, overwrite: bool = False) -> None:
    check_output_folder(folder, verb, resume, overwrite)


def faults(folder: Path, **options) -> tuple[str, ...]:
    before = sorted(folder.rglob("*")) if folder.is_dir() else folder.exists()
    with pytest.raises(UserError) as caught:
        check(folder, **options)
    assert (sorted(folder.rglob("*")) if folder.is_dir() else folder.exists()) == before
    return caught.value.faults


@pytest.mark.parametrize("resume", [False, True])
def test_fresh_and_empty_folders_are_fine(resume, tmp_path):
    check(tmp_path, resume=resume)
    check(tmp_path / "new", resume=resume)
    check(tmp_path / "a" / "b" / "c", resume=resume)
    assert names(tmp_path) == set()  # checked, not made


@pytest.mark.parametrize("resume", [False, True])
def test_folder_with_other_files_is_refused(resume, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    (fault,) = faults(tmp_path, resume=resume)
    assert fault.startswith(
        f"--output_dir {tmp_path}: not empty, and not a run of this script (no run.json). Choose another folder"
    )
    (again,) = faults(tmp_path, overwrite=True)
    assert again == fault, "nobody's files are ours to overwrite"


def test_folder_with_a_run_is_refused(tmp_path):
    (fault,) = faults(make_run(tmp_path / "stopped", "interrupted"))
    assert fault == (
        f"--output_dir {tmp_path / 'stopped'}: holds a run (train, interrupted). Choose another folder, pass "
        "--resume_from_checkpoint auto to continue it, or pass --overwrite_output_dir to replace it"
    )
    (fault,) = faults(make_run(tmp_path / "done", "finished"))
    assert fault == (
        f"--output_dir {tmp_path / 'done'}: holds a run (train, finished). Choose another folder, "
        "or pass --overwrite_output_dir to replace it"
    )
    check(tmp_path / "done", overwrite=True)
    check(tmp_path / "done", overwrite=True, verb="sft")


def test_same_run_may_be_resumed(tmp_path):
    make_run(tmp_path)
    check(tmp_path, resume=True)


def test_resuming_another_verb_is_refused(tmp_path):
    make_run(tmp_path, verb="sft")
    assert faults(tmp_path, resume=True) == (f"--resume_from_checkpoint: {tmp_path} holds a run of sft, not of train",)


@pytest.mark.parametrize("overwrite", [False, True])
def test_file_in_the_way_is_refused(overwrite, tmp_path):
    file = tmp_path / "out"
    file.write_text("mine")
    assert faults(file, overwrite=overwrite) == (f"--output_dir {file}: a file of that name exists",)
    file.chmod(0o755)
    (fault,) = faults(file / "deeper", overwrite=overwrite)
    assert fault == f"--output_dir {file / 'deeper'}: {file} cannot be written to; choose another folder"
    assert file.read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("name", ["", "new", "new/deeper"])
def test_folder_that_cannot_be_written_is_refused(name, tmp_path):
    tmp_path.chmod(0o555)
    try:
        (fault,) = faults(tmp_path / name)
        assert fault.endswith(f"{tmp_path} cannot be written to; choose another folder")
    finally:
        tmp_path.chmod(0o755)


def test_relative_folder_is_checked_where_it_would_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(Path("new/deeper"))
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in faults(Path("file/deeper"))[0]


# Replacing a run


def test_clearing_removes_a_run_and_nothing_else(tmp_path):
    make_run(tmp_path, "finished")
    for name in (*OWN_FILES, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (tmp_path / name).write_text("")
    make_checkpoint(tmp_path, 5)
    make_checkpoint(tmp_path, 10, complete=False)
    foreign = (
        "thesis.tex",
        "my-model.safetensors",
        "model-1.safetensors",
        "runs.json",
        "pairs.jsonl",
        "config.json.old",
    )
    for name in foreign:
        (tmp_path / name).write_text("mine")
    for name in ("data", "checkpoint-best", "my-checkpoint-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("mine")
    (tmp_path / "checkpoint-7").write_text("a file")
    clear_run(tmp_path)
    kept = {"data", "checkpoint-best", "my-checkpoint-3", "checkpoint-7", LOCK}  # the lock is of the run that clears
    assert names(tmp_path) == {*foreign, *kept}
    assert all((tmp_path / name / "run.json").read_text() == "mine" for name in ("data", "checkpoint-best"))


def test_clearing_nothing_is_no_fault(tmp_path):
    clear_run(tmp_path / "nowhere")
    clear_run(tmp_path)
    assert not (tmp_path / "nowhere").exists()
