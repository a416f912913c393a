"""One run per folder: of several starters one has it, a dead one's lock is taken over, one not seen is respected."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from shared.forked import Forked
from shared.pairs import make_pairs, write_lines
from shared.runs import ROOT, read_record, start

from utils.errors import UserError
from utils.run.checkpoints import begin_checkpoint
from utils.run.folder import clear_run
from utils.run.lock import FolderLock, check_not_held, read_owner
from utils.run.metrics import append_metrics
from utils.run.names import LOCK, REPORT
from utils.run.processes import identify_process, is_alive
from utils.run.record import RunRecord, now
from utils.run.writing import FolderLost, write_text
from utils.training.callbacks import RunWatcher

STARTER = """
import sys, time
from pathlib import Path
from utils.errors import UserError
from utils.run.lock import FolderLock
print("ready", flush=True)
start = float(sys.stdin.readline())
with FolderLock() as lock:
    time.sleep(max(0, start - time.time()))
    try:
        lock.take(Path(sys.argv[1]))
    except UserError as error:
        print("refused", error)
    else:
        print("taken", flush=True)
        sys.stdin.read()
"""


def start_together(folder: Path, count: int) -> list[subprocess.Popen]:
    """Processes that take the folder at one moment, as soon as all have come so far."""
    starters = [start_one([sys.executable, "-c", STARTER, str(folder)]) for _ in range(count)]
    for starter in starters:
        assert starter.stdout.readline() == "ready\n"
    moment = time.time() + 0.1
    for starter in starters:
        starter.stdin.write(f"{moment}\n")
        starter.stdin.flush()
    return starters


def start_one(command: list[str]) -> subprocess.Popen:
    return start(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def owner(**changes) -> dict:
    return {**identify_process(), "since": now(), "command": "advanced_dpo_script.py train", **changes}


def ticks_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def of_parent() -> dict:
    """What identifies the process that started this one."""
    pid = os.getppid()
    return {"pid": pid, "started": psutil.Process(pid).create_time()} | (
        {"ticks": ticks_of(pid)} if sys.platform.startswith("linux") else {}
    )


def elsewhere(**changes) -> dict:
    return owner(host="node7", machine=["node7", "another boot", "pid:[1]"], **changes)


def leave_lock(folder: Path, content: dict | str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.fixture
def gone():
    """The identity of a process that has ended."""
    code = "import json; from utils.run.processes import identify_process; print(json.dumps(identify_process()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {**json.loads(done.stdout), "since": now()}


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_not_held(folder)
    (fault,) = caught.value.faults
    return fault


@pytest.mark.parametrize("left_behind", [False, True], ids=["free", "a dead run's"])
def test_of_several_that_start_together_exactly_one_has_the_folder(left_behind, gone, tmp_path):
    for attempt in range(2):
        folder = tmp_path / f"run-{attempt}"
        if left_behind:
            leave_lock(folder, gone)
        starters = start_together(folder, 6)
        answers = [process.stdout.readline() for process in starters]
        taken = [process for process, line in zip(starters, answers, strict=True) if line.rstrip().endswith("over")]
        lines = [(p, p.stdout.readline() if p in taken else a) for p, a in zip(starters, answers, strict=True)]
        winners = [process for process, line in lines if line == "taken\n"]
        assert len(winners) == 1, answers
        assert len(taken) == int(left_behind)
        assert all(f"process {winners[0].pid} on" in line for process, line in lines if process not in winners)
        for process in starters:
            process.communicate("", timeout=60)
        assert not folder.exists() or list(folder.iterdir()) == [], "the lock goes with its run"


def test_a_folder_is_made_for_the_lock_and_goes_with_it_when_nothing_is_in_it(tmp_path):
    with FolderLock() as lock:
        lock.take(tmp_path / "a" / "b")
        assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [LOCK]
    assert list(tmp_path.iterdir()) == []
    with FolderLock() as lock:
        lock.take(tmp_path / "a" / "b")
        (tmp_path / "a" / "note").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "note"]


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EIO, "disk error"),
                                              (errno.ENOTCONN, "transport endpoint is not connected")])  # fmt: skip
def test_a_disk_that_takes_no_lock_is_one_message(number, said, tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError) as caught, FolderLock() as lock:
        lock.take(tmp_path / "run")
    (fault,) = caught.value.faults
    assert fault.startswith(f"--output_dir {tmp_path / 'run'}: {said}")
    assert "--resume_from_checkpoint auto" in fault
    assert list(tmp_path.iterdir()) == [], "nothing of it is left"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_the_lock_goes_however_the_run_ends(error, tmp_path):
    def run():
        with FolderLock() as lock:
            lock.take(tmp_path)
            raise error

    with pytest.raises(error):
        run()
    assert not (tmp_path / LOCK).exists()


def test_a_lock_of_another_run_is_not_removed(tmp_path):
    with FolderLock() as lock:
        lock.take(tmp_path)
        leave_lock(tmp_path, elsewhere())
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "node7"


def test_without_hard_links_it_is_taken_all_the_same(gone, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(1, "not supported")

    monkeypatch.setattr(os, "link", refuse)
    leave_lock(tmp_path, gone)
    with FolderLock() as lock:
        lock.take(tmp_path)
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        with pytest.raises(FileExistsError):
            os.open(tmp_path / LOCK, os.O_CREAT | os.O_EXCL)
    assert list(tmp_path.iterdir()) == []


def test_a_dead_owner_is_no_owner_and_is_said(gone, tmp_path, capsys):
    check_not_held(leave_lock(tmp_path, gone))
    assert read_owner(tmp_path) is None
    with FolderLock() as lock:
        lock.take(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"lock: process {gone['pid']}, which wrote into {tmp_path} since {gone['since']}, is gone")


def test_another_process_of_the_same_number_is_no_owner(tmp_path):
    parent = os.getppid()
    leave_lock(tmp_path, owner(**of_parent() | {"ticks": ticks_of(parent) - 1}))
    check_not_held(tmp_path)
    leave_lock(tmp_path, owner(**of_parent()))
    assert f"process {parent} on" in refusal(tmp_path)
    assert read_owner(tmp_path)["pid"] == parent


@pytest.mark.parametrize("seconds", [-3600, -5, 5, 3600])
def test_a_clock_that_was_set_makes_no_live_run_a_dead_one(seconds, tmp_path):
    lock = owner(**of_parent())
    leave_lock(tmp_path, lock | {"started": lock["started"] + seconds})
    assert f"process {os.getppid()} on" in refusal(tmp_path)
    assert is_alive(lock | {"started": lock["started"] + seconds})


CLOCK = """
import re, subprocess, sys
from pathlib import Path
folder, seconds, stat = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
def move(match):
    return f"btime {int(match[1]) + seconds}"
stat.write_text(re.sub(r"btime (\\d+)", move, Path("/proc/stat").read_text()))
subprocess.run(["mount", "--bind", stat, "/proc/stat"], check=True)
from utils.run.lock import check_not_held, read_owner
print(read_owner(folder)["pid"])
check_not_held(folder)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="namespaces are Linux's")
def test_a_run_is_known_where_the_system_says_that_it_was_switched_on_at_another_time(tmp_path):
    """Which is what setting the clock changes, and what every time of a process is counted from."""
    inside = ["unshare", "--mount"]
    mount = [*inside, "sh", "-c", "mount --bind /dev/null /proc/stat"]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("nothing may be mounted here")
    (other,) = start_together(tmp_path, 1)
    assert other.stdout.readline() == "taken\n"
    for seconds in (-5, 3600):
        command = [*inside, sys.executable, "-c", CLOCK, tmp_path, str(seconds), tmp_path / "stat"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.stdout == f"{other.pid}\n", done.stderr
        assert f"process {other.pid} on" in done.stderr.splitlines()[-1]
        assert "UserError" in done.stderr
    other.communicate("", timeout=60)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="namespaces are Linux's")
def test_a_run_in_another_container_is_seen_by_its_lock_and_taken_over_when_it_was_killed(tmp_path, capsys):
    inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespace may be made here")
    with start_one([*inside, sys.executable, "-c", STARTER, str(tmp_path)]) as process:
        process.stdin.write("0\n")
        process.stdin.flush()
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "taken\n"]
        lock = json.loads((tmp_path / LOCK).read_text())
        assert (lock["pid"], lock["locked"]) == (1, True)
        assert is_alive(lock) is None
        assert "process 1 on" in refusal(tmp_path)
        assert read_owner(tmp_path) == lock
        process.kill()
        process.wait()  # with which the namespace ends, before its stdin does and lets it go in good order
    assert (tmp_path / LOCK).is_file()
    for _ in range(200):  # the namespace ends a moment after the process that made it
        if read_owner(tmp_path) is None:
            break
        time.sleep(0.02)
    with FolderLock() as own:
        own.take(tmp_path)
    assert "lock: process 1, which wrote into" in capsys.readouterr().out


def test_of_a_folder_that_was_removed_and_made_again_nothing_more_is_written(tmp_path):
    folder = tmp_path / "run"
    with FolderLock() as lock:
        lock.take(folder)
        record = RunRecord({"status": "running"})
        record.write_to(folder)
        shutil.rmtree(folder)
        with pytest.raises(FileNotFoundError):
            record.update(step=1)
        (other,) = start_together(folder, 1)
        assert other.stdout.readline() == "taken\n"
        before = (folder / LOCK).read_bytes()
        writes = {
            "record": lambda: record.update(step=1),
            "metrics": lambda: append_metrics(folder, {"step": 1}),
            "page": lambda: write_text(folder / REPORT, "page"),
            "checkpoint": lambda: begin_checkpoint(folder, 1),
            "former": lambda: clear_run(folder),
        }
        for name, write in writes.items():
            with pytest.raises(FolderLost, match=r"its run.lock is that of another run, which writes there now"):
                write()
            assert [path.name for path in folder.iterdir()] == [LOCK], name
        other.communicate("", timeout=60)
        folder.mkdir(exist_ok=True)
        with pytest.raises(FolderLost, match=r"its run\.lock was removed"):
            record.update(step=1)
        leave_lock(folder, before.decode())
    assert (folder / LOCK).read_bytes() == before, "only one's own lock is removed"


def test_a_run_whose_folder_was_given_to_another_stops_with_one_message(
    run_script, tiny_model, pairs_file, tmp_path, monkeypatch
):
    folder, kept = tmp_path / "run", {}
    log = RunWatcher.on_log

    def replace_then_log(self, args, state, control, **more):
        if state.global_step == 3 and not kept:
            shutil.rmtree(folder)
            leave_lock(folder, elsewhere())
            (folder / "run.json").write_text('{"verb": "train", "status": "running", "settings": {}}')
            kept.update({path.name: path.read_bytes() for path in folder.iterdir()})
        return log(self, args, state, control, **more)

    monkeypatch.setattr(RunWatcher, "on_log", replace_then_log)
    code, _, err = run_script("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--max_steps", 6,
                                "--logging_steps", 1, "--save_steps", 2, "--output_dir", folder)  # fmt: skip
    assert code == 2
    (line,) = err.splitlines()
    assert (
        f"--output_dir {folder}: its run.lock is that of another run, which writes there now. This run stopped " in line
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept


def test_an_owner_on_another_machine_is_respected_and_described(tmp_path):
    leave_lock(tmp_path, elsewhere(pid=77))
    text = refusal(tmp_path)
    assert "process 77 on node7 writes into it since 20" in text
    assert "cannot be seen from here" in text
    assert f"if the run is dead, remove {tmp_path / LOCK}" in text
    assert "probably gone" not in text


def test_an_owner_that_was_silent_for_long_is_probably_gone_and_respected_still(tmp_path):
    before = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 5000))
    lock = elsewhere(since=before)
    record = RunRecord({"verb": "train", "status": "running", "settings": {}, "process": lock})
    record.content |= {"longest_silence": 30.0, "updated": before}
    record.write_to(tmp_path)
    leave_lock(tmp_path, lock)
    text = refusal(tmp_path)
    assert "last heartbeat was 1:23:2" in text
    assert "its longest gap before was 0:30: it is probably dead" in text
    record.update(step=3)
    assert "probably gone" not in refusal(tmp_path)


def test_after_a_power_cut_the_lock_is_taken_over(tmp_path):
    machine = identify_process()["machine"]
    cut = {"machine": [machine[0], "the boot before", machine[2]]}
    leave_lock(tmp_path, owner(**cut))
    assert "cannot be seen from here" in refusal(tmp_path), "heard of since this machine was switched on"
    earlier = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(psutil.boot_time() - 60))
    check_not_held(leave_lock(tmp_path, owner(since=earlier, **cut)))


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": 1', "[" * 10**5])
def test_a_lock_that_cannot_be_read_holds_while_it_may_be_in_the_making(content, tmp_path, capsys):
    leave_lock(tmp_path, content)
    for seconds in (0, 20, -20):  # the clocks of two machines may differ
        os.utime(tmp_path / LOCK, (0, time.time() - seconds))
        assert "another run is just starting there" in refusal(tmp_path)
    os.utime(tmp_path / LOCK, (0, time.time() - 40))
    with FolderLock() as lock:
        lock.take(tmp_path)
    assert "nothing can be read in" in capsys.readouterr().out


@pytest.mark.parametrize("junk", [{}, {"pid": "x"}, {"pid": -1, "started": "then", "since": 3, "host": None}])
def test_a_lock_with_odd_content_ends_in_no_traceback(junk, tmp_path):
    leave_lock(tmp_path, junk)
    assert "cannot be seen from here" in refusal(tmp_path)


@pytest.mark.parametrize("record", ["[" * 10**5, '{"process": {"started": 7}, "longest_silence": NaN}'])
def test_a_record_with_odd_content_ends_in_no_traceback(record, tmp_path):
    leave_lock(tmp_path, elsewhere(started=7))
    (tmp_path / "run.json").write_text(record, encoding="utf-8")
    assert "cannot be seen from here" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_in_a_locks_place_is_not_waited_for(kind, tmp_path):
    os.mkfifo(tmp_path / LOCK) if kind == "pipe" else (tmp_path / LOCK).symlink_to("/dev/zero")
    assert read_owner(tmp_path) is None


def test_status_shows_a_run_that_loads_before_it_goes_on(run_script, tmp_path):
    RunRecord({"verb": "train", "status": "interrupted", "settings": {}, "arguments": []}).write_to(tmp_path)
    assert "interrupted" in run_script("status", tmp_path)[1]
    leave_lock(tmp_path, owner(**of_parent()))
    out = run_script("status", tmp_path)[1]
    assert "running" in out
    assert f"process {os.getppid()} has locked the folder" in out
    assert "to resume" not in out
    leave_lock(tmp_path, elsewhere(pid=77, started=1.0))
    out = run_script("status", tmp_path)[1]
    assert "interrupted" in out
    assert "its run.lock is of process 77 on node7, which cannot be seen from here" in out


# With real runs


def wait_for_step(process: Forked) -> None:
    for line in process.stdout:
        if line.strip().startswith("step "):
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL to send")
def test_a_second_run_is_refused_and_a_killed_ones_folder_is_taken_over(run_script, tiny_model, tmp_path):
    data = write_lines(tmp_path / "pairs.jsonl", make_pairs(24))
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", data, "--logging_steps", 1, "--save_steps", 2,
             "--per_device_train_batch_size", 2, "--validation_split", "none", "--save_total_limit", 1]  # fmt: skip
    folder = tmp_path / "run"
    process = Forked("train", *flags, "--num_train_epochs", 2000, "--output_dir", folder)
    try:
        wait_for_step(process)
        before = json.loads((folder / LOCK).read_text())
        for verb, more in (
            ("train", ["--overwrite_output_dir"]),
            ("train", ["--resume_from_checkpoint", "auto", "--num_train_epochs", 2000]),
            ("sft", []),
        ):
            code, _, err = run_script(verb, *flags, *more, "--output_dir", folder)
            assert code == 2
            (line,) = err.splitlines()
            assert f"process {process.pid} on" in line
            assert "Two runs cannot write into one folder" in line
        code, _, err = run_script("evaluate", "--model_name_or_path", tiny_model, "--dataset_name", data,
                                  "--output_dir", folder)  # fmt: skip
        assert code == 2
        assert f"process {process.pid} on" in err
        code, out, err = run_script("status", folder)
        assert (code, "running" in out) == (0, True)
        assert json.loads((folder / LOCK).read_text()) == before
    finally:
        process.kill()
        process.communicate()
    assert (folder / LOCK).is_file()
    code, out, err = run_script("train", *flags, "--max_steps", 2, "--overwrite_output_dir", "--output_dir", folder)
    assert code == 0, err
    assert f"lock: process {process.pid}, which wrote into {folder} since {before['since']}, is gone" in out
    assert not (folder / LOCK).exists()
    assert read_record(folder)["status"] == "finished"


def test_a_run_killed_before_its_first_step_leaves_a_folder_that_can_be_used(run_script, tiny_model, tmp_path, gone):
    data = write_lines(tmp_path / "pairs.jsonl", make_pairs(24))
    folder = leave_lock(tmp_path / "run", gone)
    code, out, err = run_script("train", "--model_name_or_path", tiny_model, "--dataset_name", data, "--max_steps", 1,
                                "--output_dir", folder)  # fmt: skip
    assert code == 0, err
    assert "its lock is taken over" in out


@pytest.mark.slow
def test_a_refusal_ends_all_processes(tiny_model, tmp_path):
    data = write_lines(tmp_path / "pairs.jsonl", make_pairs(24))
    parent = psutil.Process(os.getpid())
    folder = leave_lock(tmp_path / "run", owner())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "advanced_dpo_script.py", "train", "--model_name_or_path", tiny_model, "--dataset_name", data,
               "--output_dir", folder]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"process {parent.pid} on" in line
    assert f"traceback : {line}" in done.stderr.partition("Root Cause")[2], "the launcher's own last words have it"
    assert [path.name for path in folder.iterdir()] == [LOCK]
