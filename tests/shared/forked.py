"""The script in processes of its own, forked from one that has the libraries in memory.

Importing them takes most of the time of a short run. Here a server of `multiprocessing` does it once, and each process
is forked from it (where the system cannot fork, it is started anew); from there on it is the script, with its own
arguments, environment, streams and signals. What depends on what happens while the libraries are imported is started
by `start_script` (`shared/runs.py`).
"""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import signal
import socket
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from shared.runs import ROOT, SCRIPT

PATIENCE = 280.0  # seconds until a process that should end is killed


class Forked:
    """One process, with what tests use of `subprocess.Popen`; its streams are text.

    Args:
        arguments: of the script.
        script: what it becomes.
        before: is called in it first; a function of a module.
        environment: further variables.
    """

    def __init__(
        self,
        *arguments: object,
        script: str = SCRIPT,
        before: Callable[[], object] | None = None,
        **environment: str,
    ):
        context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
        context.set_forkserver_preload(["shared.preloaded"])
        ours, theirs = zip(*(context.Pipe(duplex=False) for _ in range(2)), strict=True)
        words = (script, list(map(str, arguments)), dict(os.environ) | environment, theirs, before)
        self._process = context.Process(target=_be_one, args=words, daemon=True)
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")])):
            self._process.start()
        for end in theirs:
            end.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(end.fileno()), errors="replace") for end in ours)
        weakref.finalize(self, _close, self.stdout, self.stderr, *ours)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """The exit code, once it has ended; what it writes meanwhile must fit in a pipe, or be read."""
        self._process.join(seconds)
        if self.returncode is None:
            self.kill()
            self._process.join()
        return self.returncode

    def communicate(self, seconds: float = PATIENCE) -> tuple[str, str]:
        """What it still writes to both streams, once it has ended."""
        with ThreadPoolExecutor() as readers:
            written = [readers.submit(stream.read) for stream in (self.stdout, self.stderr)]
            self.wait(seconds)
        return written[0].result(), written[1].result()


def _close(*streams: Any) -> None:
    for stream in streams:
        stream.close()


def take_terminal(name: str) -> None:
    """Makes a terminal the one of this process, its three streams included."""
    os.setsid()
    handle = os.open(name, os.O_RDWR)  # the first that a session opens is its own
    for number in range(3):
        os.dup2(handle, number)
    os.close(handle)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115


def read_from(path: Path) -> None:
    """Makes a file the standard input of this process."""
    with open(path, "rb") as file:
        os.dup2(file.fileno(), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115


@dataclass(frozen=True)
class Ended:
    """How the processes ended: the first exit code that is not 0, and what all of them wrote, in order of rank."""

    returncode: int
    stdout: str
    stderr: str


def told_by(config: str | None, count: int) -> dict[str, str]:
    """The variables that `accelerate launch` gives each process for a config of examples/accelerate."""
    if config is None:
        return {}
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = ROOT / "examples" / "accelerate" / f"{config}.yaml"
    words = ["--config_file", str(path), "--num_processes", str(count), SCRIPT]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    own = {name: value for name, value in prepare_multi_gpu_env(arguments).items() if os.environ.get(name) != value}
    return {name: value for name, value in own.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def run_together(
    count: int, *arguments: object, script: str = SCRIPT, config: str | None = None, seconds: float = PATIENCE
) -> Ended:
    """Runs a script in `count` processes and waits for all; when one fails the others are ended, as launchers do.

    Args:
        config: by its name in examples/accelerate, for `accelerate launch`; None for `torchrun`.
    """
    common = told_by(config, count) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
    started = [
        Forked(*arguments, script=script, **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)
    ]
    with ThreadPoolExecutor(2 * count) as readers:
        streams = [[process.stdout for process in started], [process.stderr for process in started]]
        written = [[readers.submit(stream.read) for stream in of_kind] for of_kind in streams]
        codes = _wait(started, time.monotonic() + seconds)
    stdout, stderr = ("".join(text.result() for text in of_kind) for of_kind in written)
    return Ended(next((code for code in codes if code), 0), stdout, stderr)


def free_port() -> int:
    """A port of this machine that nobody listens on, and that the system gives to nobody who asks for any port: else
    another test could have it before the processes that are told of it do."""
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(15000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _wait(started: list[Forked], deadline: float) -> list[int]:
    """The exit codes, in the order in which the processes ended."""
    codes: list[int] = []
    left = list(started)
    while left:
        ended = [process for process in left if process.returncode is not None]
        codes += [process.returncode for process in ended]
        left = [process for process in left if process not in ended]
        if any(codes) or time.monotonic() > deadline:
            for process in left:
                process.wait(10)  # the others may have something to say of it
            return codes or [-signal.SIGKILL]
        time.sleep(0.02)
    return codes


def _be_one(
    script: str,
    arguments: list[str],
    environment: dict[str, str],
    streams: tuple[Connection, Connection],
    before: Callable[[], object] | None,
) -> None:
    """Becomes the script."""
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    if "HF_DATASETS_CACHE" in environment:  # which is read when the library is imported
        sys.modules["datasets"].config.HF_DATASETS_CACHE = Path(environment["HF_DATASETS_CACHE"])
    os.chdir(ROOT)
    sys.argv = [script, *arguments]
    sys.path[:0] = [str(ROOT / Path(script).parent), str(ROOT)]
    if before is not None:
        before()
    runpy.run_path(script, run_name="__main__")
