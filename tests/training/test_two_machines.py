"""Two machines, as two network namespaces joined by a cable: the launch, one of them lost, and going on."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shared.runs import ROOT, read_metrics, read_record, start

pytestmark = pytest.mark.slow
FREE_PORT = 29600


def can_make_namespaces() -> bool:
    """Whether this user may: root on Linux, with the tools of iproute2."""
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"dpo-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return made


@pytest.fixture(scope="module")
def machines():
    """The names of two namespaces, with the addresses 10.77.0.1 and 10.77.0.2 at the ends of one cable."""
    if not can_make_namespaces():
        pytest.skip("needs root and network namespaces")
    names = [f"dpo{number}-{os.getpid()}" for number in range(2)]
    ends = [f"dpo{number}x{os.getpid()}"[:15] for number in range(2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    for name in names:
        ip("netns", "add", name)
    ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
    for number, (name, end) in enumerate(zip(names, ends, strict=True)):
        ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", end)
        for device in (end, "lo"):
            ip("-n", name, "link", "set", device, "up")
    yield list(zip(names, ends, strict=True))
    for name in names:
        kill_all(name)
        subprocess.run(["ip", "netns", "delete", name], check=False)


def kill_all(name: str) -> None:
    """Kills what runs on a machine at once, the launcher with its processes."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True).stdout
    for pid in map(int, found.split()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def launch(machines, launcher: str, *flags) -> list[subprocess.Popen]:
    """The same command on both machines, as docs/scaling.md has it."""
    started = []
    for number, (name, end) in enumerate(machines):
        words = {
            "torchrun": f"torchrun --nnodes 2 --nproc_per_node 1 --node_rank {number} --master_addr 10.77.0.1 "
            f"--master_port {FREE_PORT}",
            "accelerate": "accelerate launch --config_file examples/accelerate/two_nodes.yaml --num_processes 2 "
            f"--main_process_ip 10.77.0.1 --main_process_port {FREE_PORT} --machine_rank {number}",
        }[launcher].split()
        words[0] = str(Path(sys.executable).parent / words[0])
        started.append(
            start(
                ["ip", "netns", "exec", name, *words, "advanced_dpo_script.py", *map(str, flags)],
                cwd=ROOT,
                env=os.environ | {"GLOO_SOCKET_IFNAME": end},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def finish(started: list[subprocess.Popen], seconds: int = 240) -> list[tuple[int, str, str]]:
    results = []
    for process in started:
        out, err = process.communicate(timeout=seconds)
        results.append((process.returncode, out, err))
    return results


def read_until(process: subprocess.Popen, machine: str, text: str, seconds: int = 150) -> Iterator[str]:
    """The lines of its stderr up to one with the text; kills all on its machine where that does not come in time."""
    timer = threading.Timer(seconds, kill_all, [machine])
    timer.start()
    for line in process.stderr:
        yield line
        if text in line:
            break
    timer.cancel()


def flags_for(tiny_model, pairs_file, folder: Path, *more) -> list:
    return ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", folder, "--dtype",
            "float32", "--learning_rate", 5e-3, "--logging_steps", 1, *more]  # fmt: skip


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_machines_are_the_run_of_one_process(machines, launcher, run_script, tiny_model, pairs_file, tmp_path):
    more = ("--max_steps", 4)
    started = launch(machines, launcher, *flags_for(tiny_model, pairs_file, tmp_path / "two", *more),
                     "--per_device_train_batch_size", 2)  # fmt: skip
    for code, _, err in finish(started):
        assert code == 0, err
    one = flags_for(tiny_model, pairs_file, tmp_path / "one", *more)
    assert run_script(*one, "--per_device_train_batch_size", 4)[0] == 0
    for line, other in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert other == pytest.approx(line, abs=1e-4)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
@pytest.mark.parametrize("lost", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("how", ["killed", "cable"])
def test_a_lost_machine_ends_the_run_and_one_goes_on(
    machines, launcher, lost, how, run_script, tiny_model, pairs_file, tmp_path
):
    more = ("--max_steps", 150, "--save_steps", 50, "--save_total_limit", 2, "--lr_scheduler_type", "constant")
    flags = flags_for(tiny_model, pairs_file, tmp_path / "run", *more)
    size = ("--per_device_train_batch_size", 2, "--ddp_timeout", 20)
    started = launch(machines, launcher, *flags, *size)
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / "checkpoint-50" / "trainer_state.json").is_file():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in started), finish(started)
        time.sleep(0.1)
    time.sleep(0.3)  # it trains again: while one writes a checkpoint, the other waits for it much longer
    name, end = machines[lost]
    if how == "killed":
        kill_all(name)
        code, _, err = finish([started[1 - lost]], 100)[0]
        assert code == 1, err
    else:
        subprocess.run(["ip", "-n", name, "link", "set", end, "down"], check=True)
        err = "".join(read_until(started[1 - lost], machines[1 - lost][0], "--resume_from_checkpoint auto"))
        for machine, _ in machines:  # its launcher still waits some minutes for the other one's
            kill_all(machine)
        subprocess.run(["ip", "-n", name, "link", "set", end, "up"], check=True)
    finish([started[lost]])
    assert "another process of this run ended or stopped responding" in err
    assert "is safe. To resume" in err
    assert "--resume_from_checkpoint auto" in err
    # On one machine, with the pairs per step that it had.
    again = [*flags, "--per_device_train_batch_size", 4, "--ddp_timeout", 20, "--resume_from_checkpoint", "auto"]
    code, out, err = run_script(*again)
    assert code == 0, err
    assert "resuming from" in out
    assert read_record(tmp_path / "run")["step"] == 150
