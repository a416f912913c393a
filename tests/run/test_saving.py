"""The run folder: nothing half written, states that come back as they were, and no folder spoiled."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from utils.errors import UserError
from utils.run.checkpoints import find_checkpoints, find_resume_point
from utils.run.folder import check_output_folder, clear_run, remove_leftovers
from utils.run.lock import FolderLock
from utils.run.metrics import append_metrics, keep_rows_until, read_json_lines, restore_metrics
from utils.run.names import HALF_WRITTEN, LOCK, OWN_FILES
from utils.run.record import RunRecord, now, read_record
from utils.run.writing import create_file, move_into_place, unused_name, write_json, write_json_lines, write_text

SETTINGS = {"seed": 1, "output_dir": "a"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def make_checkpoint(folder: Path, step: int, complete: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.arange(4.0)}, checkpoint / "model.safetensors")
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
    assert read_record(tmp_path) == {}


def test_metrics_are_what_the_checkpoint_knows_of(tmp_path):
    events = [
        {"step": 0, "held_out_loss": 0.7},
        {"step": 5, "loss": 0.6, "note": "é\u2028"},
        {"step": 10, "loss": None},
    ]
    for event in events:
        append_metrics(tmp_path, event)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "held_o')  # the run died while it wrote

    def restored(lines: list[dict]) -> list[dict]:
        restore_metrics(tmp_path, lines)
        return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").split("\n") if line]

    assert restored(events) == events
    append_metrics(tmp_path, {"step": 10, "held_out_loss": 0.4})
    assert restored(events) == events, "a line of the same step, which came after the checkpoint"
    assert restored(events[:2]) == events[:2]
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nhalf')
    assert restored(events) == events, "lines that were lost or changed"
    (tmp_path / "metrics.jsonl").unlink()
    assert restored(events) == events
    assert restored([]) == []


def test_metrics_that_a_checkpoint_holds_as_means_stay_as_they_are_in_the_file(tmp_path):
    lines = [{"step": step, "loss": step / 10, "learning_rate": 0.1} for step in range(1, 7)]
    lines.insert(4, {"step": 4, "held_out_loss": 0.3})
    for line in [*lines, {"step": 7, "loss": 0.7}]:
        append_metrics(tmp_path, line)
    known = [{"step": 4, "loss": 0.25, "learning_rate": 0.1, "lines": 4}, *lines[4:]]
    path = tmp_path / "metrics.jsonl"
    restore_metrics(tmp_path, known)
    assert read_json_lines(path) == lines
    path.unlink()
    restore_metrics(tmp_path, known)
    assert read_json_lines(path) == known, "where they are lost, their mean is what is left"


def test_a_line_that_cannot_be_written_whole_leaves_nothing(tmp_path, monkeypatch):
    import builtins

    append_metrics(tmp_path, {"step": 1})

    class Full:
        """A file on a disk that has room for three more bytes."""

        def __init__(self, *arguments, **options):
            self.file, self.room = open(*arguments, **options), 3

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            if not self.room:
                raise OSError(28, "No space left on device")
            self.room -= self.file.write(content[: self.room])
            return 3

    open = builtins.open
    with monkeypatch.context() as broken:
        broken.setattr(builtins, "open", Full)
        with pytest.raises(OSError, match="No space"):
            append_metrics(tmp_path, {"step": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_samples_and_bad_rows_are_kept_up_to_a_step(tmp_path):
    rows = [{"step": 5, "id": "a"}, {"step": 9, "id": "b"}, {"step": 10, "id": "c"}]
    for name in ("samples.jsonl", "bad_pairs.jsonl"):
        write_json_lines(tmp_path / name, rows)
    keep_rows_until(tmp_path, 9)
    for name in ("samples.jsonl", "bad_pairs.jsonl"):
        assert [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] == rows[:2]


def test_nothing_to_keep_is_no_fault(tmp_path):
    keep_rows_until(tmp_path, 5)
    restore_metrics(tmp_path, [])
    assert names(tmp_path) == set()


def test_a_folder_that_is_gone_is_not_made_again(tmp_path):
    record = RunRecord({"status": "running"})
    folder = tmp_path / "run"
    folder.mkdir()
    record.write_to(folder)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        record.update(step=3)
    assert not folder.exists()


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
    assert find_resume_point(tmp_path, None).checkpoint is None
    assert find_resume_point(tmp_path, "auto").checkpoint is None
    make_checkpoint(tmp_path, 9)
    make_checkpoint(tmp_path, 10)
    make_checkpoint(tmp_path, 11, complete=False)
    assert find_resume_point(tmp_path, None).checkpoint is None
    assert find_resume_point(tmp_path, "auto").checkpoint == tmp_path / "checkpoint-10"
    assert find_resume_point(tmp_path, str(tmp_path / "checkpoint-9")).checkpoint == tmp_path / "checkpoint-9"


def test_resume_path_may_be_relative(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "run", 9)
    monkeypatch.chdir(tmp_path)
    assert find_resume_point(Path("run"), "run/checkpoint-9").checkpoint == tmp_path / "run" / "checkpoint-9"


def test_resuming_from_an_incomplete_checkpoint_is_refused(tmp_path):
    make_checkpoint(tmp_path, 11, complete=False)
    for name, fault in (
        ("checkpoint-11", "it has no manifest.json and no trainer_state.json"),
        ("checkpoint-3", "there is no such folder"),
    ):
        wish = str(tmp_path / name)
        with pytest.raises(UserError) as caught:
            find_resume_point(tmp_path, wish)
        assert str(caught.value) == (
            f"--resume_from_checkpoint {wish}: cannot be resumed from: {fault}; pass auto to start without one"
        )
    make_checkpoint(tmp_path, 9)
    with pytest.raises(UserError, match=f"the newest good one in {tmp_path} is checkpoint-9$"):
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
def test_a_run_that_was_killed_in_its_first_write_leaves_a_folder_to_begin_in(
    resume, run_script, tiny_model, pairs_file, tmp_path
):
    for name in (".run.json.4711.tmp", ".run.lock.4711.tmp"):
        (tmp_path / name).write_text('{"sta')
    check(tmp_path, resume=resume)
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--max_steps", 1)
    resuming = ("--resume_from_checkpoint", "auto") if resume else ()
    code, _, err = run_script(*flags, *resuming, "--output_dir", tmp_path)
    assert code == 0, err
    assert read_record(tmp_path)["status"] == "finished"
    assert not list(tmp_path.glob(".*.tmp"))


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
    for name in (
        *(name for name in OWN_FILES if name != "run.json" and "[" not in name),
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ):
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
    (make_checkpoint(tmp_path, 6)).rename(tmp_path / "checkpoint-6.damaged")
    (make_checkpoint(tmp_path, 8)).rename(tmp_path / ".checkpoint-8.partial")
    (tmp_path / ".model.safetensors.17.tmp").write_text("half")
    clear_run(tmp_path)
    kept = {"run.json", "data", "checkpoint-best", "my-checkpoint-3", "checkpoint-7", LOCK}  # the lock is its own
    assert names(tmp_path) == {*foreign, *kept}
    assert read_record(tmp_path)["status"] == "failed", "its record stays, for the next one to replace"
    assert "another run was replacing it" in read_record(tmp_path)["failure"]
    assert all((tmp_path / name / "run.json").read_text() == "mine" for name in ("data", "checkpoint-best"))


def test_a_start_without_a_checkpoint_leaves_damaged_ones(tmp_path):
    make_checkpoint(tmp_path, 6).rename(tmp_path / "checkpoint-6.damaged")
    clear_run(tmp_path, damaged=False)
    assert names(tmp_path) == {"checkpoint-6.damaged"}


def test_only_our_own_leftovers_are_removed(tmp_path):
    for name in (
        ".run.json.12.tmp",
        ".model-00001-of-00002.safetensors.9.tmp",
        ".thesis.tex.12.tmp",
        "run.json.12.tmp",
    ):
        (tmp_path / name).write_text("half")
    for name in (".checkpoint-3.partial", ".checkpoint-3.former", ".model.partial", ".git", ".checkpoint-x.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == {
        ".model-00001-of-00002.safetensors.9.tmp", ".thesis.tex.12.tmp", "run.json.12.tmp", ".git",
        ".checkpoint-x.partial",
    }  # fmt: skip


def test_clearing_nothing_is_no_fault(tmp_path):
    clear_run(tmp_path / "nowhere")
    clear_run(tmp_path)
    assert not (tmp_path / "nowhere").exists()


def test_nothing_is_written_through_a_link_that_another_planted(tmp_path):
    victim = tmp_path / "another person's"
    victim.write_text("kept")
    planted = tmp_path / "planted"
    planted.symlink_to(victim)
    with pytest.raises(FileExistsError):
        create_file(planted)
    for name in (f".run.json.{os.getpid()}.tmp", f".run.lock.{os.getpid()}.tmp"):  # what could once be foreseen
        (tmp_path / name).symlink_to(victim)
    write_json(tmp_path / "run.json", {"status": "running"})
    with FolderLock() as lock:
        lock.take(tmp_path)
        assert not (tmp_path / "run.lock").is_symlink()
    assert victim.read_text() == "kept"
    assert not (tmp_path / "run.json").is_symlink()
    assert len({unused_name(tmp_path / "x") for _ in range(100)}) == 100
    assert all(HALF_WRITTEN.fullmatch(unused_name(tmp_path / "x").name) for _ in range(100))


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="Windows knows no such flag")
def test_nothing_is_added_to_a_file_behind_a_link(tmp_path):
    victim = tmp_path / "another person's"
    victim.write_text("kept")
    (tmp_path / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(OSError, match=r"symbolic links: .*metrics\.jsonl"):
        append_metrics(tmp_path, {"step": 1})
    assert victim.read_text() == "kept"


# What outlives a power cut


@pytest.fixture
def calls(monkeypatch):
    """What the disk is asked for, in order: ("flush" or "place", path)."""
    made, fsync = [], os.fsync

    def note_flush(number):
        made.append(("flush", Path(os.readlink(f"/proc/self/fd/{number}"))))
        fsync(number)

    def noting(move):
        def moved(source, target, **options):
            made.append(("place", Path(target)))
            move(source, target, **options)

        return moved

    monkeypatch.setattr(os, "fsync", note_flush)
    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, noting(getattr(os, name)))
    return made


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads the names of open files where Linux has them")
def test_moved_files_and_their_names_are_on_the_disk(tmp_path, calls):
    """Files before they are moved, and the folder, which holds their names, after the last of them."""
    folder, made = tmp_path / "run", tmp_path / "run" / ".made"
    (made / "inner").mkdir(parents=True)
    for name in ("one", "inner/two"):
        (made / name).write_text(name)
    move_into_place(made, folder)
    files = [("flush", made / "inner/two"), ("flush", made / "one")]
    places = [("place", folder / "inner/two"), ("place", folder / "one")]
    assert calls == [*files, *places, ("flush", folder), ("flush", folder / "inner")]
    assert (folder / "inner/two").read_text() == "inner/two"
    assert not made.exists()
