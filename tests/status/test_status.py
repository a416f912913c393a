"""The verb `status`: finished, running, killed and foreign runs, as they really lie there."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from shared.forked import Forked
from shared.runs import ROOT, read_record, set_back

from utils.arguments import parse_arguments
from utils.run.finding import FoundRun
from utils.run.metrics import newest_evaluation
from utils.run.processes import command_to_go_on, identify_process, is_alive
from utils.run.records import Unreadable, read_run
from utils.settings.flags import USES_MODEL
from utils.settings.registry import ROWS
from utils.settings.verbs import StatusSettings
from utils.status.page import make_page
from utils.status.publishing import as_json
from utils.status.state import Overview, read_runs, read_status
from utils.status.table import describe_progress, summarize

LONG = ("--max_steps", 100_000, "--save_steps", 3, "--save_total_limit", 1, "--logging_steps", 1, "--eval_steps", 4)


@pytest.fixture(scope="module")
def finished(tiny_model, pairs_file, tmp_path_factory) -> Path:
    """A folder with a finished run of each verb, one of them a level deeper."""
    import advanced_dpo_script

    root = tmp_path_factory.mktemp("runs")
    common = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--max_steps", 4, "--save_steps", 2,
              "--logging_steps", 1, "--eval_steps", 2, "--learning_rate", 5e-3, "--use_lora"]  # fmt: skip
    for verb, name in (("train", "dpo"), ("sft", "stages/sft")):
        assert advanced_dpo_script.main([str(w) for w in (verb, *common, "--output_dir", root / name)]) == 0
    set_back(root / "dpo", minutes=1)
    return root


def start_long_run(tiny_model, pairs_file, folder: Path, steps: int) -> Forked:
    """A run that would take hours, once it has taken some steps."""
    process = Forked("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--dtype", "auto",
                           "--per_device_train_batch_size", 2, "--output_dir", folder, *LONG)  # fmt: skip
    for line in process.stdout:
        if line.strip().startswith(f"step {steps:>6}/"):
            return process
    raise AssertionError(process.stderr.read())


def lines_of(run_script, *arguments) -> list[str]:
    code, out, err = run_script("status", *arguments)
    assert code == 0, err
    return out.splitlines()


def row_of(lines: list[str], name: str) -> str:
    (row,) = (line for line in lines if line.startswith(f"{name} "))
    return " ".join(row.split())


def test_finished_runs_have_a_row_each_newest_first(finished, run_script):
    lines = lines_of(run_script, finished)
    held_out = read_record(finished / "dpo")["metrics"]["held_out"]
    assert f"train finished 4/4 100% accuracy 50% -> {held_out['accuracy']:.0%} {held_out['margin']:+.3f}" in row_of(
        lines, "dpo"
    )
    assert "sft finished 4/4 100% perplexity" in row_of(lines, "stages/sft")
    assert [line.split()[0] for line in lines[:3]] == ["run", "stages/sft", "dpo"]
    assert f"2 runs in {finished}: 2 finished" in lines
    assert "checkpoint-2" not in "".join(lines)


def test_everything_is_in_the_json(finished, run_script):
    code, out, err = run_script("status", "--json", finished)
    assert (code, err) == (0, "")
    content = json.loads(out)
    run = next(run for run in content["runs"] if run["name"] == "dpo")
    assert run["record"] == read_record(finished / "dpo")
    assert run["held_out"] == run["record"]["metrics"]["held_out"]
    assert (run["step"], run["steps"], run["checkpoints"]) == (4, 4, ["checkpoint-2", "checkpoint-4"])


@pytest.mark.parametrize("name", ["dpo", "dpo/checkpoint-2"])
def test_a_run_or_its_checkpoint_may_be_named_itself(finished, run_script, name):
    lines = lines_of(run_script, finished / name)
    assert "finished" in row_of(lines, "dpo")


def test_a_run_is_running_then_died(tiny_model, pairs_file, tmp_path, run_script):
    process = start_long_run(tiny_model, pairs_file, tmp_path / "runs" / "long", steps=5)
    try:
        lines = lines_of(run_script, tmp_path / "runs")
        words = row_of(lines, "long").split()
        assert words[:3] == ["long", "train", "running"]
        assert int(words[3].split("/")[0]) >= 4
        assert "left" in lines[0]
        assert "accuracy 50% -> " in row_of(lines, "long"), "the newest evaluation"
        assert not any("--resume_from_checkpoint" in line for line in lines)
    finally:
        process.kill()
        process.wait()
    lines = lines_of(run_script, tmp_path / "runs")
    assert row_of(lines, "long").split()[2] == "died"
    said = next(line for line in lines if line.startswith("long: died: its process ("))
    assert f"({process.pid} on " in said
    words = command_to_go_on_in(lines, "long")
    settings = parse_arguments(words)
    assert (settings.run.resume_from_checkpoint, settings.model.dtype) == ("auto", "auto")
    assert settings.run.output_dir == str(tmp_path / "runs" / "long")


@pytest.mark.slow
def test_the_printed_command_goes_on_with_a_run_that_died(tiny_model, pairs_file, tmp_path, run_script):
    process = start_long_run(tiny_model, pairs_file, tmp_path / "long", steps=5)
    process.kill()
    process.wait()
    again = Forked(*command_to_go_on_in(lines_of(run_script, tmp_path), "long"))
    try:
        assert any(line.startswith("resuming from ") for line in again.stdout), again.stderr.read()
    finally:
        again.kill()
        again.wait()


def command_to_go_on_in(lines: list[str], name: str) -> list[str]:
    """The arguments of the command that is printed for a run."""
    said = next(number for number, line in enumerate(lines) if line.startswith(f"{name}: "))
    assert lines[said + 1].startswith("  to resume from checkpoint-")
    words = shlex.split(lines[said + 2])
    assert words[:2] == ["python", "advanced_dpo_script.py"]
    return words[2:]


def test_a_run_that_came_apart_says_why(tiny_model, pairs_file, tmp_path, run_script):
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--learning_rate", 1e30)
    assert run_script(*flags, "--max_steps", 9, "--logging_steps", 1, "--output_dir", tmp_path / "wild")[0] == 2
    lines = lines_of(run_script, tmp_path)
    assert row_of(lines, "wild").split()[2] == "failed"
    said = next(line for line in lines if line.startswith("wild: failed: training diverged"))
    how, command = lines[lines.index(said) + 1 :]
    assert how == "  it has no checkpoint; to start it again:"
    assert "--overwrite_output_dir" in command


def test_what_is_not_ours_is_said_in_a_line(finished, tmp_path, run_script):
    runs = shutil.copytree(finished, tmp_path / "runs")
    half = (runs / "dpo" / "run.json").read_text()[:200]
    foreign = {
        "half/run.json": half,
        "list/run.json": "[1, 2]",
        "other/run.json": '{"status": "done", "name": "someone else\'s"}',
        "deep/run.json": "[" * 100_000,
        "trl/checkpoint-30/trainer_state.json": '{"global_step": 30, "max_steps": 900}',
        "trl/checkpoint-9/trainer_state.json": '{"global_step": 9, "max_steps": 900}',
        "odd/trainer_state.json": '{"global_step": null}',
        "notes/readme.txt": "nothing of a run",
        "far/a/b/c/d/e/run.json": (runs / "dpo" / "run.json").read_text(),
    }
    for name, text in foreign.items():
        path = runs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (runs / "binary").mkdir()
    (runs / "binary" / "run.json").write_bytes(b"\xff\xfe\x00")
    (runs / "again").symlink_to(runs / "dpo")
    (runs / "loop").symlink_to(runs)
    lines = lines_of(run_script, runs)
    assert f"2 runs in {runs}: 2 finished" in lines
    others = lines[lines.index("not counted:") + 1 :]
    assert [line.split(":")[0].strip() for line in others] == ["binary", "deep", "half", "list", "odd", "other", "trl"]
    assert others[-1].endswith("by its checkpoint-30/trainer_state.json another trainer's run, at step 30 of 900")
    assert "incomplete, or not written by this script" in others[2]


def test_folders_without_runs(tmp_path, run_script, monkeypatch):
    assert lines_of(run_script, tmp_path) == [f"no runs of this script in {tmp_path}"]
    (tmp_path / "file").write_text("")
    for name, said in (("nowhere", "no such folder"), ("file", "is a file")):
        code, _, err = run_script("status", tmp_path / name)
        assert (code, err) == (2, f"error: FOLDER {tmp_path / name}: {said}; name the folder that your runs are in\n")
    monkeypatch.chdir(tmp_path)
    code, _, err = run_script("status")
    assert (code, err.startswith("error: FOLDER runs: no such folder")) == (2, True)


def test_every_fault_of_the_command_line_is_named(tmp_path, run_script):
    code, _, err = run_script("status", "--report", "page.txt", tmp_path, "more", "--json", "maybe", "--seed", 3)
    assert code == 2
    others = [verb.name for verb in ROWS if USES_MODEL in verb.does]
    assert err.splitlines() == [
        "error: 'more': is an unexpected value; write --name value",
        "error: --json is 'maybe': must be true or false",
        f"error: --seed: is a flag of the verb {', '.join(others[:-1])} and {others[-1]}, not of status",
        "error: --report is page.txt: must end in .html or .htm",
    ]
    code, _, err = run_script("status", tmp_path, "--folder", tmp_path)
    assert (code, err) == (2, "error: --folder is given twice: leave one of them out\n")


@pytest.mark.parametrize(
    ("words", "folder"),
    [([], "runs"), (["a"], "a"), (["--json", "a"], "a"), (["a", "--json"], "a"), (["--json", "true", "a"], "a"),
     (["--report", "p.html", "a"], "a"), (["--folder", "a"], "a"), (["--folder=a", "--json"], "a")],
)  # fmt: skip
def test_the_folder_may_stand_anywhere(words, folder):
    assert parse_arguments(["status", *words]).of(StatusSettings).folder == folder


def test_the_examples_of_the_help_parse(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["status", "--help"])
    examples = capsys.readouterr().out.split("example:\n")[1].splitlines()
    for line in examples:
        assert parse_arguments(shlex.split(line)[2:]).of(StatusSettings).folder == "runs"


def elsewhere(record: dict, **changes) -> dict:
    """The record of a run that goes on, on a machine that cannot be seen from here."""
    process = record["process"] | {"machine": ["far-away", None, None], "host": "far-away"}
    return record | {"status": "running", "process": process} | changes


@pytest.mark.parametrize(
    ("silence", "silent_before", "state"),
    [(60, 5, "running"), (590, 5, "running"), (700, 5, "died"), (700, 600, "running"), (3500, 600, "died"),
     (3000, None, "running"), (4000, None, "died")],
)  # fmt: skip
def test_on_another_machine_a_run_is_judged_by_its_own_silence(finished, silence, silent_before, state):
    at = time.time()
    updated = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at - silence))
    record = elsewhere(read_record(finished / "dpo"), updated=updated, longest_silence=silent_before, seconds_left=100)
    status = read_status(FoundRun(finished / "dpo", record), "dpo", at)
    assert status.state == state
    assert "far-away" in status.note
    assert (status.seconds_left is None) == (state == "died")
    if state == "running":
        assert status.seconds_left == pytest.approx(max(0, 100 - silence), abs=2), "less what went by since it was said"


def test_the_time_of_a_run_that_goes_on_is_that_of_all_its_parts(finished):
    at = time.time()
    updated = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at - 30))
    record = read_record(finished / "dpo") | {"status": "running", "updated": updated, "resources": {"seconds": 5000.0}}
    record["process"] = identify_process()  # began a moment ago: the run was resumed
    assert read_status(FoundRun(finished / "dpo", record), "dpo", at).seconds == pytest.approx(5030, abs=2)


def test_the_newest_evaluation_of_a_run_is_one_of_training():
    """That before the first step is told apart from it."""
    lines = [{"step": step, "held_out_loss": 0.7 - step / 100, "loss": 1.0} for step in (0, 4, 8)]
    assert newest_evaluation(lines[:1]) == {}
    assert newest_evaluation([*lines, {"step": 9, "loss": 0.5}]) == {"step": 8, "loss": pytest.approx(0.62)}


def test_more_steps_than_were_planned_are_all_of_them(finished):
    record = read_record(finished / "dpo") | {"step": 6, "steps": 4}
    assert describe_progress(read_status(FoundRun(finished / "dpo", record), "dpo", time.time())) == "6/4 100%"


def test_a_process_is_known_again_and_another_of_its_id_is_not():
    own = identify_process()
    assert is_alive(own)
    assert is_alive(own | {"ticks": own["ticks"] - 1}) is False
    assert is_alive(own | {"started": own["started"] - 60}), "the clock was set since"
    assert is_alive(own | {"ticks": None}), "as an earlier version recorded it, and where there are no ticks"
    assert is_alive(own | {"ticks": None, "started": own["started"] - 60}) is False
    assert is_alive(own | {"machine": ["other", None, None]}) is None
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked how: a zombie
    ended = {"pid": child.pid, "ticks": None, "started": psutil.Process(child.pid).create_time()}
    assert is_alive(own | ended) is False
    child.wait()
    assert is_alive(own | {"pid": child.pid}) is False


def test_the_printed_command_finds_the_script_from_any_folder(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert identify_process()["script"] == "advanced_dpo_script.py"
    monkeypatch.chdir(tmp_path)
    record = read_record(finished / "dpo") | {"status": "interrupted", "process": identify_process()}
    command = read_status(FoundRun(finished / "dpo", record), "dpo", time.time()).to_go_on
    assert Path(shlex.split(command)[1]).is_file()


def test_a_run_that_was_moved_goes_on_where_it_is(finished, tmp_path):
    moved = shutil.copytree(finished / "dpo", tmp_path / "moved")
    record = read_record(moved) | {"status": "interrupted"}
    record["process"] |= {"working_folder": "/somewhere else"}
    command = read_status(FoundRun(moved, record), "moved", time.time()).to_go_on
    script = shlex.quote(str(ROOT / "advanced_dpo_script.py"))  # not one of that name in the folder that is named
    assert command.startswith(f"cd '/somewhere else' && python {script} train ")
    words = shlex.split(command)
    assert words[words.index("--output_dir") + 1] == str(moved)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["train", "--dtype", "auto", "--resume_from_checkpoint", "o/checkpoint-3"], ["train", "--dtype", "auto"]),
        (["train", "--overwrite_output_dir", "--engine", "auto"], ["train", "--engine", "auto"]),
        (["train", "--resume_from_checkpoint=-x", "--beta", "1"], ["train", "--beta", "1"]),
    ],
)
@pytest.mark.parametrize("launcher", [{}, {"launcher": []}], ids=["of before", "that could not be seen"])
def test_the_command_that_goes_on_keeps_all_other_settings(given, expected, launcher):
    words = shlex.split(command_to_go_on(given, {"processes": 2} | launcher))
    assert words[:5] == ["accelerate", "launch", "--num_processes", "2", "advanced_dpo_script.py"]
    assert words[5:] == [*expected, "--resume_from_checkpoint", "auto"]


def mangle(value, dice: random.Random):
    """The value with something in it replaced by what is not expected there."""
    junk = [None, True, -1, 10**400, 1e308, "x\x1b[2J\n", [], {}, [{}], {"a": []}, "NaN", float("nan")]
    if dice.random() < 0.15 or not isinstance(value, dict | list) or not value:
        return dice.choice(junk)
    changed = copy.copy(value)
    key = dice.choice(list(value) if isinstance(value, dict) else range(len(value)))
    changed[key] = mangle(value[key], dice)
    return changed


def test_no_record_of_a_run_ends_in_a_traceback(finished, tmp_path):
    dice, at = random.Random(0), time.time()
    original = read_record(finished / "dpo")
    (tmp_path / "metrics.jsonl").write_text('{"step": "x"}\n{"step": 3, "held_out_loss": [1], "loss": NaN}\n{"st')
    (tmp_path / "samples.jsonl").write_text('{"prompt": [1, {"role": null}]}\n[]\n{"prompt": {}, "response": []}')
    refused = 0
    for number in range(400):
        record = original
        for _ in range(dice.randint(1, 2)):
            for key in dice.sample(list(original), 1):
                record = record | {key: mangle(original[key], dice)}
        settings = record["settings"] if isinstance(record["settings"], dict) else {}
        record |= {"status": dice.choice(["running", "failed"]), "verb": "train", "settings": settings}
        (tmp_path / "run.json").write_text(json.dumps(record))
        try:
            record = read_run(tmp_path / "run.json")
        except Unreadable:
            refused += 1
            continue
        overview = Overview("runs", (read_status(FoundRun(tmp_path, record), "run\x1b[2J", at),), ())
        assert not any("\x1b" in line or "\n" in line for line in summarize(overview))
        json.dumps(as_json(overview), allow_nan=False)
        if number % 4 == 0:
            other = dataclasses.replace(overview.runs[0], name="other", record=original)
            assert "\x1b" not in make_page(dataclasses.replace(overview, runs=(*overview.runs, other)))
    assert 50 < refused < 380


def test_links_and_unreadable_folders_do_not_hide_the_rest(finished, tmp_path):
    (tmp_path / "linked").symlink_to(finished)
    overview = read_runs(tmp_path)
    assert {run.name for run in overview.runs} == {"linked/dpo", "linked/stages/sft"}
