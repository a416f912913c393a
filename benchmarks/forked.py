"""Runs of the script in processes that are forked from one that has imported everything: what takes seconds once.

Each run is `advanced_dpo_script.main` with its own arguments, in a process of its own, so that a SIGKILL is one.
Nothing is computed in the process that forks.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300.0  # seconds after which a process that should end is said to hang
# What appears in a run's folder in moments that are rare: the beginning of its name.
MOMENTS = (".checkpoint-", "checkpoint-", ".model.partial", ".run.json.", ".report.html.", ".held_out_pairs", "metrics",
           ".samples.jsonl.", ".metrics.jsonl.", "model.safetensors")  # fmt: skip


def import_everything() -> None:
    """What a run imports, before the first fork."""
    sys.path.insert(0, str(ROOT))
    import datasets  # noqa: F401
    import torch

    import utils.responses.making
    import utils.training.stages  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # else the collector of each process would copy all of these pages


@dataclass
class Started:
    """The processes of one run, and where each writes what it says."""

    pids: list[int]
    outputs: list[Path]
    codes: dict[int, int] = field(default_factory=dict)  # process id -> exit code, negative for a signal

    def look(self) -> bool:
        """Whether any process still runs."""
        for pid in self.pids:
            if pid not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def send(self, number: int, which: Sequence[int]) -> None:
        """Sends a signal to those of the processes that still run."""
        for pid in which:
            if pid not in self.codes:
                os.kill(pid, number)

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """The exit codes, in order; what runs on after so long is killed, and its code is None."""
        ends = time.monotonic() + seconds
        while self.look() and time.monotonic() < ends:
            time.sleep(0.005)
        hung = [pid for pid in self.pids if pid not in self.codes]
        self.send(signal.SIGKILL, hung)
        for pid in hung:
            os.waitpid(pid, 0)
        return [self.codes.get(pid) for pid in self.pids]

    def end_others(self, seconds: float = 30.0) -> bool:
        """What a launcher does when a process is gone: ends those that do not end by themselves. Whether it had to."""
        late = False
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if number is not None and self.look():
                self.send(number, self.pids)
                late = True
            ends = time.monotonic() + seconds
            while self.look() and time.monotonic() < ends:
                time.sleep(0.005)
        return late

    def said(self) -> str:
        """All that the processes wrote, stdout and stderr."""
        there = [path for path in self.outputs if path.exists()]  # not yet, where it was killed at once
        return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in there)


def start(arguments: Sequence[object], output: Path, processes: int = 1, before: Callable | None = None) -> Started:
    """Starts the script in so many processes, forked; `before` is called in each of them first."""
    environment = {}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]),
                           "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}  # fmt: skip
    pids, outputs = [], []
    for rank in range(processes):
        outputs.append(output.with_name(f"{output.name}-{rank}.txt"))
        own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _run(arguments, outputs[-1], own, before)
        pids.append(pid)
    return Started(pids, outputs)


def _run(arguments: Sequence[object], output: Path, environment: dict[str, str], before: Callable | None) -> None:
    code = 1
    try:
        os.environ.update(environment)
        number = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(number, 1)
        os.dup2(number, 2)
        from utils.interruptions import interrupt_on_signals

        interrupt_on_signals()
        if before is not None:
            before()
        import advanced_dpo_script

        code = advanced_dpo_script.main([str(word) for word in arguments])
    except KeyboardInterrupt:  # asked to stop before the script had begun
        code = 130
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start_plain(arguments: Sequence[object], output: Path, processes: int = 1) -> Started:
    """Starts the script as a person does: `python`, or `torchrun`, whose processes are its own to look after."""
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words += [str(ROOT / "advanced_dpo_script.py"), *map(str, arguments)]
    place = output.with_name(f"{output.name}-plain.txt")
    with open(place, "wb") as file:
        child = subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    child.returncode = 0  # it is waited for here, by its id
    return Started([child.pid], [place])


def wait_for_moment(started: Started, folder: Path, draw: random.Random, usual: float) -> str:
    """Waits for a random moment of a run: after a time, or when something appears in its folder. Says which."""
    ends = time.monotonic() + draw.uniform(0, usual)
    name = draw.choice(MOMENTS) if draw.random() < 0.6 else None
    nth, delay = draw.randint(1, 4), draw.choice((0, 0.001, 0.003, 0.01, 0.05))
    seen: set[tuple[str, int]] = set()
    while started.look() and time.monotonic() < ends:
        if name is None:
            time.sleep(0.002)
            continue
        appeared = {(entry, _size(folder / entry)) for entry in _names(folder) if entry.startswith(name)} - seen
        seen |= appeared
        nth -= bool(appeared)
        if nth <= 0:
            time.sleep(delay)
            return f"{name}* appears"
    return "after a time" if name is None else f"{name}* did not appear"


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.name.startswith("metrics") else path.stat().st_ino
    except OSError:
        return -1
