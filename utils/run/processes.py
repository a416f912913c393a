"""The process of a run: how it is recognised, whether it lives, and the command that resumes its run."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import LocalError
from .program import join_command, name_of_program, words_of_launcher

# Commands that start the script in processes -> how they are written down; and the modules that `python -m` runs so.
LAUNCHERS = {"accelerate": ("accelerate",), "accelerate-launch": ("accelerate", "launch"), "torchrun": ("torchrun",)}
LAUNCHING_MODULES = ("accelerate.commands.launch", "accelerate.commands.accelerate_cli", "torch.distributed.run")
# Options of the first start that do not belong to its continuation, and how many words each takes.
DROPPED = {"--overwrite_output_dir": 1, "--resume_from_checkpoint": 2}
PATIENCE = 600.0  # seconds of silence that any run may need, for a checkpoint or an evaluation
PATIENCE_AT_FIRST = 3600.0  # the same before a run has shown how long it is silent
TIMES_ITS_OWN = 5  # a run is given up after so many times its own longest silence
RANKS = ("RANK", "LOCAL_RANK")


def identify_process() -> dict[str, Any]:
    """This process, as run.json holds it.

    `machine` is equal in processes that see each other's ids: on one host, since it was switched on, in one container.
    `ticks` is when the process began, counted since then, which no change of the clock moves; None where the system
    does not tell. `started` is the same by the clock, in seconds since 1970.
    """
    import psutil

    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "machine": _identify_machine(),
        "started": psutil.Process().create_time(),
        "ticks": _read_ticks(os.getpid()),
        "working_folder": os.getcwd(),
        "script": name_of_program(),
        "processes": count_processes(),
        "launcher": _read_launcher(),
    }


def _read_launcher() -> list[str]:
    """The words with which a launcher was started, up to the script; none where they cannot be seen."""
    import psutil

    try:
        return launcher_of(psutil.Process().parent().cmdline())
    except (psutil.Error, AttributeError):
        return []


def launcher_of(words: Sequence[str]) -> list[str]:
    """The words of `accelerate launch` or torchrun in the command line of the process above this one, up to the script;
    none where that started this one in another way."""
    before = words_of_launcher(words) or []
    for number, word in enumerate(before):
        if Path(word).name in LAUNCHERS:
            return [*LAUNCHERS[Path(word).name], *before[number + 1 :]]
    launched = "TORCHELASTIC_RUN_ID" in os.environ or any(word in LAUNCHING_MODULES for word in before)
    return ["python", *before[1:]] if before and launched else []


def tell_launcher(reason: str) -> None:
    """Leaves why this process ends where torchrun (and so `accelerate launch`) looks for it, to say it at its end."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        told = {"message": reason, "extraInfo": {"py_callstack": reason, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": told}), encoding="utf-8")


def is_alive(process: Mapping[str, Any]) -> bool | None:
    """Whether a process that was identified still runs; None where it cannot be seen from here.

    A process that has the same id by now, but began at another time, is another one.
    """
    import psutil

    if not isinstance(process.get("pid"), int) or process.get("machine") != _identify_machine():
        return None
    try:
        found = psutil.Process(process["pid"])
        if process.get("ticks") is not None:
            same = _read_ticks(found.pid) == process["ticks"]
        else:  # not Linux, or a record of an earlier version
            same = abs(found.create_time() - float(process.get("started") or 0)) < 2
        return same and found.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False
    except (psutil.AccessDenied, TypeError):
        return None


def on_same_kernel(process: Mapping[str, Any]) -> bool:
    """Whether a process that was identified ran on this machine since it was switched on, in whatever container."""
    machine, boot = process.get("machine"), _identify_machine()[1]
    return boot is not None and isinstance(machine, list) and machine[1:2] == [boot]


def _read_ticks(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine was switched on; None where the system does not tell."""
    try:
        # The name of the program, in parentheses, may hold spaces and parentheses itself.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def patience_seconds(longest_silence: float | None) -> float:
    """After how many seconds without a word a run is given up, where its process cannot be seen."""
    return PATIENCE_AT_FIRST if longest_silence is None else max(PATIENCE, TIMES_ITS_OWN * longest_silence)


def _identify_machine() -> list[str | None]:
    parts: list[str | None] = [socket.gethostname(), None, None]
    try:
        parts[1] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        parts[2] = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        pass
    return parts


def command_to_go_on(
    arguments: Sequence[str],
    process: Mapping[str, Any],
    resume: bool = True,
    other: Sequence[str] = (),
) -> str:
    """The command line that resumes a run, from the arguments it was started with and, as run.json holds it, the
    process it was: how many, from which launcher, by which name the script is reached.

    With `resume` false there is no checkpoint to resume from: the command starts it again. `other` is a flag with its
    value, which takes the place of the former one.
    """
    dropped = DROPPED | ({other[0]: len(other)} if other else {})
    if not resume and "--allow_changes" in arguments:  # there is nothing to allow in a new start
        names = list(itertools.takewhile(_is_value, arguments[list(arguments).index("--allow_changes") + 1 :]))
        dropped |= {"--allow_changes": 1 + len(names)}
    words, skipped = [], 0
    for word in arguments:
        name = word.partition("=")[0]
        if skipped:
            skipped -= 1
        elif name in dropped:
            skipped = dropped[name] - 1 if name == word else 0
        else:
            words.append(word)
    words += ["--resume_from_checkpoint", "auto"] if resume else ["--overwrite_output_dir"]
    words += other
    count, launcher = process.get("processes") or 1, process.get("launcher")
    if not (isinstance(launcher, list) and launcher and all(isinstance(word, str) for word in launcher)):
        launcher = ["accelerate", "launch", "--num_processes", str(int(count))] if count != 1 else ["python"]
    script = process.get("script")
    return join_command(words, launcher, script if isinstance(script, str) else None)


def forget_lone_rank() -> None:
    """Drops a RANK without a WORLD_SIZE: no launcher set it, and this process would take itself for one of several."""
    if "WORLD_SIZE" not in os.environ:
        os.environ.pop("RANK", None)


def check_launch_variables(several: bool) -> None:
    """Refuses what a launcher would not have set: numbers that are none, or some of its variables without the others.

    Args:
        several: whether the verb can run in several processes.

    Raises:
        LocalError: one fault for each; every process says its own.
    """
    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", *RANKS)
    numbers = {name: os.environ[name] for name in names if os.environ.get(name, "-1") != "-1"}  # -1: without a launcher
    least = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    faults = [
        f"{name} is {text!r}: must be a whole number of {least.get(name, 0)} or more, which accelerate launch and "
        "torchrun set; unset it, or start with one of them"
        for name, text in numbers.items()
        if not (re.fullmatch(r"[0-9]{1,9}", text) and int(text) >= least.get(name, 0))
    ]
    if faults:
        raise LocalError(*faults)
    if not several:
        return
    given = "WORLD_SIZE" if count_processes() > 1 else "LOCAL_RANK" if "LOCAL_RANK" in numbers else None
    if given is None:
        return
    missing = [name for name in ("WORLD_SIZE", *RANKS) if name not in numbers]
    missing += [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise LocalError(
            f"{given} is {numbers[given]}, and the variables that a launcher sets with it are missing "
            f"({', '.join(missing)}): start several processes with accelerate "
            f"launch or torchrun, or unset {given} to run one"
        )
    if int(numbers["RANK"]) >= count_processes():
        raise LocalError(f"RANK is {numbers['RANK']}: must be below WORLD_SIZE, which is {count_processes()}")


def launched_with(engine: str) -> bool:
    """Whether `accelerate launch` was told to use FSDP, DEEPSPEED or PARALLELISM_CONFIG."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true"


def count_processes() -> int:
    """The processes of this run, as launchers say it."""
    return max(1, int(os.environ.get("WORLD_SIZE", "1")))


def _is_value(word: str) -> bool:
    return not word.startswith("--")
