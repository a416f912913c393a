"""Several processes of the script, as a launcher starts them, from one process that has the libraries in memory.

Importing them takes most of the time of a short run, and a launcher has every process do it. Here a server of
`multiprocessing` does it once, and each process is forked from it (where the system cannot fork, it is started anew);
from there on it is the script, with the variables that `torchrun` or `accelerate launch` would give it.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from shared.runs import ROOT


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
    words = ["--config_file", str(path), "--num_processes", str(count), "advanced_dpo_script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    own = {name: value for name, value in prepare_multi_gpu_env(arguments).items() if os.environ.get(name) != value}
    return {name: value for name, value in own.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def run_together(
    count: int,
    folder: Path,
    *arguments,
    script: str = "advanced_dpo_script.py",
    config: str | None = None,
    environments: Mapping[int, Mapping[str, str]] | None = None,
    seconds: float = 280,
) -> Ended:
    """Runs a script in `count` processes and waits for all; when one fails the others are ended, as launchers do.

    Args:
        folder: where what they write to the terminal is kept.
        config: by its name in examples/accelerate, for `accelerate launch`; None for `torchrun`.
        environments: further variables by rank.
    """
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    context.set_forkserver_preload(["shared.preloaded"])
    common = dict(os.environ) | told_by(config, count) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(count):
        own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | dict((environments or {}).get(rank, {}))
        words = (script, list(map(str, arguments)), own, str(folder / f"rank{rank}"))
        started.append(context.Process(target=_be_one, args=words, daemon=True))
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")])):
            started[-1].start()
    codes = _wait(started, time.monotonic() + seconds)
    written = ["".join(_read(folder / f"rank{rank}.{name}") for rank in range(count)) for name in ("out", "err")]
    return Ended(next((code for code in codes if code), 0), *written)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(started: list, deadline: float) -> list[int]:
    """The exit codes, in the order in which the processes ended."""
    codes, left = [], list(started)
    while left:
        ended = [process for process in left if process.exitcode is not None]
        codes += [process.exitcode for process in ended]
        left = [process for process in left if process not in ended]
        if any(codes) or time.monotonic() > deadline:
            for process in left:
                process.join(10)  # the others may have something to say of it
                process.kill()
                process.join()
            return codes or [-9]
        time.sleep(0.02)
    return codes


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _be_one(script: str, arguments: list[str], environment: dict[str, str], terminal: str) -> None:
    """Becomes the script."""
    for number, name in ((1, "out"), (2, "err")):
        with open(f"{terminal}.{name}", "w") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(script, run_name="__main__")
