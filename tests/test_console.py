"""What becomes of the console and of the process that starts the script: no traceback, nothing lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from shared import runs
from shared.pairs import make_pairs, write_lines
from shared.runs import ROOT, read_record

from utils import progress
from utils.runtime import quiet_loaded_libraries

needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such streams and signals")
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def start(*arguments, environment=None, **options) -> subprocess.Popen:
    """The script in a process of its own, both streams piped as bytes unless `options` say otherwise."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT} | options
    command = [sys.executable, ROOT / "advanced_dpo_script.py", *map(str, arguments)]
    return runs.start(command, env=os.environ | (environment or {}), **options)


def training(model: Path, data: Path, output: Path, steps: int) -> list:
    quick = ["--per_device_train_batch_size", 4, "--logging_steps", 1, "--dtype", "float32"]
    return ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", output, "--max_steps", steps, *quick]


PHASES = """
import sys, time
sys.path.insert(0, sys.argv[1])
from utils.console import open_console
from utils.progress import phase
from utils.runtime import say
open_console()
with phase("scoring", 40, "pairs") as shown:
    shown.reach(10)
    time.sleep(0.2)
    shown.reach(20)
    say("a line of the log that is wider than the terminal is broken between its words, not within one of them")
    say("next:\\n  a command that is wider than the terminal stays in one line, so that a person can copy it whole")
    with phase("evaluating"):
        print("a warning", file=sys.stderr)
"""


def run_phases(**environment) -> list[str]:
    """What a terminal of 80 columns gets of PHASES."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    others = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "RANK")}
    process = runs.start([sys.executable, "-c", PHASES, ROOT], stdout=theirs, stderr=theirs, env=others | environment)
    os.close(theirs)
    received = b""
    try:
        while part := os.read(ours, 65536):
            received += part
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait(60) == 0, received
    return received.decode().split("\r\n")


@needs_posix
def test_a_status_line_stands_below_all_lines_of_a_terminal_and_goes_without_a_trace():
    lines = run_phases(TERM="xterm")
    shown = [line.rpartition("\x1b[K")[2] for line in lines]  # what is left of each once all is written
    assert shown == [
        "a line of the log that is wider than the terminal is broken between its words,",
        "      not within one of them",
        "next:",
        "  a command that is wider than the terminal stays in one line, so that a person can copy it whole",
        "a warning",
        "",
    ]
    painted = [part.rstrip("\r") for line in lines for part in line.split("\x1b[K")]
    bar = "scoring [###############...............] 20 of 40 pairs, "
    assert any(part.startswith(bar) and part.endswith(" left") for part in painted)
    assert "evaluating ..." in painted
    assert painted.index("evaluating ...") < painted.index("a warning")
    assert max(len(part) for part in painted if "scoring" in part) < 80


@needs_posix
def test_a_terminal_that_cannot_and_a_pipe_get_plain_lines():
    assert "\x1b" not in "".join(run_phases(TERM="dumb"))
    piped = runs.start([sys.executable, "-c", PHASES, ROOT], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = piped.communicate(timeout=60)
    assert (out.decode().count("\n"), err) == (3, b"a warning\n")


def test_a_phase_that_lasts_says_so_in_a_pipe_and_in_the_main_process_alone(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def work() -> None:
        with progress.phase("scoring", 100, "pairs") as shown:
            for seconds in (19.5, 0.5, 29.5, 0.5):
                now[0] += seconds
                shown.advance(10)

    work()
    lines = ["scoring: 20 of 100 pairs, 1.0/s, 1:20 left", "scoring: 40 of 100 pairs, 1.2 s each, 1:15 left"]
    assert capsys.readouterr().err.splitlines() == lines
    monkeypatch.setenv("RANK", "1")
    work()
    assert capsys.readouterr().err == ""


@needs_posix
def test_training_goes_on_when_its_reader_leaves_and_is_deaf_to_what_it_was_started_to_ignore(
    tiny_model, pairs_file, tmp_path
):
    def deafen():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    run = start(*training(tiny_model, pairs_file, tmp_path / "run", 30), preexec_fn=deafen)
    for line in run.stdout:
        if re.match(rb" *step +2/", line):
            break
    run.stdout.close()
    run.send_signal(signal.SIGHUP)
    run.send_signal(signal.SIGINT)
    err = run.stderr.read().decode()
    assert run.wait(60) == 0, err
    assert err == ""
    record = read_record(tmp_path / "run")
    assert (record["status"], record["step"]) == ("finished", 30)


@needs_posix
def test_a_closed_terminal_stops_a_run_and_its_state_is_saved(tiny_model, tmp_path):
    """And where the encoding is ASCII, what it lacks is shown as escapes."""
    pairs = [pair | {"prompt": f"{pair['prompt']} \u597d"} for pair in make_pairs(40)]
    data = write_lines(tmp_path / "\u5c0d.jsonl", pairs)
    shows = ["--sample_during_eval", "--num_eval_samples", 1, "--sample_max_new_tokens", 2]
    run = start(
        *training(tiny_model, data, tmp_path / "run", 10**5), *shows,
        environment={"PYTHONIOENCODING": "ascii"}, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip
    out = b""
    for line in run.stdout:
        out += line
        if re.match(rb" *step +3/", line):
            for _ in range(3):  # the shell and the system send one each
                run.send_signal(signal.SIGHUP)
            break
    out += run.stdout.read()
    assert run.wait(60) == 130, run.stderr.read()
    assert run.stderr.read() == b""
    assert b"\\u597d" in out
    assert b"its state is saved; to resume:" in out
    record = read_record(tmp_path / "run")
    assert record["status"] == "interrupted"
    assert (tmp_path / "run" / f"checkpoint-{record['step']}").is_dir()


@needs_posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_results_that_cannot_be_printed_are_one_message(tmp_path):
    with open("/dev/full", "w") as full:
        status = start("status", tmp_path, stdout=full)
        _, err = status.communicate(timeout=60)
    assert status.returncode == 2
    assert err.decode() == "warning: nothing more can be printed: stdout: No space left on device\n"


@needs_posix
def test_streams_that_are_closed_from_the_start(tmp_path):
    def close_all():
        for number in range(3):
            os.close(number)

    config = tmp_path / "run.yaml"
    wrote = start("init", "--situation", "cpu_trial", "--output_file", config, preexec_fn=close_all)
    assert (*wrote.communicate(timeout=60), wrote.returncode) == (b"", b"", 0)
    assert config.read_text(encoding="utf-8").startswith("# ")
    assert "wrote" not in config.read_text(encoding="utf-8"), "what was printed went into no file"
    code = "from utils.console import open_console\nopen_console()\nfrom utils.chatting.terminal import read_stdin\n"
    code += "try:\n    read_stdin()\nexcept Exception as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, preexec_fn=lambda: os.close(0))
    assert done.stdout.startswith(b"stdin is empty: pipe a message in"), done.stderr


@needs_posix
def test_a_handler_of_a_signal_may_print_while_something_is_printed():
    code = """
import signal
from utils.console import open_console
open_console()
signal.signal(signal.SIGALRM, lambda *_: print("from the handler", flush=True))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0005)
for number in range(20000):
    print("a line of the program", flush=True)
signal.setitimer(signal.ITIMER_REAL, 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"a line of the program") == 20000
    assert done.stdout.count(b"from the handler") > 10


@needs_posix
def test_a_locale_without_characters_and_names_that_are_not_text(
    run_script, pairs_file, tiny_model, tmp_path, monkeypatch
):
    named = tmp_path / os.fsdecode(b"b\xff")
    named.mkdir()
    done = start("data", "--dataset_name", pairs_file, "--report_file", "page.html", cwd=named, environment=ASCII)
    out, err = done.communicate(timeout=60)
    assert (done.returncode, err) == (0, b"")
    assert b"\\xb1" in out  # the plus-minus of a share
    assert os.listdir(named) == ["page.html"]
    monkeypatch.chdir(named)
    for output in ("run", named / "run"):
        code, _, err = run_script(*training(tiny_model, pairs_file, output, 1))
        assert code == 2
        assert "--output_dir" in err
        assert "utf-8 text" in err
        assert err.count("\n") == 1, err
    assert os.listdir(named) == ["page.html"]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x': must be a whole number of 1 or more"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0': must be a whole number of 1 or more"),
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE is 2, and the variables that a launcher sets with it are missing (RANK, LOCAL_RANK, MASTER",
        ),
        (
            {"LOCAL_RANK": "0"},
            "LOCAL_RANK is 0, and the variables that a launcher sets with it are missing (WORLD_SIZE, RANK",
        ),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK is 'x': must be a whole number of 0 or more"),
        ({"WORLD_SIZE": "x", "RANK": "1"}, "WORLD_SIZE is 'x': must be a whole number of 1 or more"),
    ],
)
def test_what_a_launcher_would_not_have_set(run_script, tiny_model, pairs_file, tmp_path, monkeypatch, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, out, err = run_script(*training(tiny_model, pairs_file, tmp_path / "run", 1))
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("error: ") == err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_rank_alone_silences_nothing(run_script, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    code, out, _ = run_script("status", tmp_path)
    assert code == 0
    assert "no runs of this script" in out


@pytest.mark.parametrize(
    ("module", "file", "said"),
    [
        ("utils", "/home/me/utils.py", "warning: utils: old data\n"),
        ("advanced_dpo.data.files", "/x/site-packages/advanced_dpo/data/files.py", "warning: advanced_dpo: old data\n"),
        ("peft.tuners", "/x/site-packages/peft/tuners/lora.py", ""),
    ],
)
def test_warnings_of_a_person_s_code_and_of_ours_are_one_line_and_those_of_libraries_are_quiet(
    module, file, said, capfd
):
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as outside of pytest
        quiet_loaded_libraries()
        for _ in range(2):
            warnings.warn_explicit("old\n  data", UserWarning, file, 3, module=module)
    assert capfd.readouterr().err == said
