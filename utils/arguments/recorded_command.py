"""The command of a run that its record tells, to be shown for copying. A record may come from anybody: of it only what
was checked becomes part of a command, and what in that command would run code is named beside it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..run.processes import command_to_go_on
from ..run.program import ROOT, name_of_program
from .config_file import Entry
from .parsing import NAMES_CODE, read_words

MOST_PROCESSES = 100_000
# How the script is started in several processes, each with what may stand behind it: options, and their values.
LAUNCHES = (
    ("accelerate", "launch"),
    ("python", "-m", "accelerate.commands.launch"),
    ("torchrun",),
    ("python", "-m", "torch.distributed.run"),
)
SWITCHES = {"--multi_gpu", "--cpu", "--use_fsdp", "--use_deepspeed", "--standalone", "--same_network"}
OPTIONS = {
    *("--num_processes", "--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port"),
    *("--mixed_precision", "--gpu_ids", "--num_cpu_threads_per_process", "--rdzv_backend", "--rdzv_endpoint"),
    *("--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port", "--rdzv_id", "--max_restarts"),
}
CONFIG_FILE = "--config_file"
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:,\[\]-]*")


def check_arguments(record: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The words of the command line that a record tells, and what in them would run code or send something away.

    Raises:
        UserError: it tells none, or one that the script does not take.
    """
    words = list(record.get("arguments") or ())
    if not words:
        raise UserError("its record does not say which arguments it was started with")
    verb, entries = read_words(words)
    if verb != record["verb"]:
        raise UserError(f"its record is of a run of {record['verb']}, and tells a command of {verb}")
    return words, [_written(entry) for entry in entries.values() if _is_doubtful(entry)]


def _is_doubtful(entry: Entry) -> bool:
    if entry.texts and entry.texts[0].lower() in ("false", "no", "0", "off", "none", "null"):
        return False
    kernel = entry.name == "attn_implementation" and any("/" in text for text in entry.texts)
    return kernel or entry.name in NAMES_CODE or entry.name == "push_to_hub"


def _written(entry: Entry) -> str:
    return " ".join([f"--{entry.name}", *entry.texts])


def build_command(record: Mapping[str, Any], folder: Path, resume: bool) -> tuple[str | None, tuple[str, ...]]:
    """The command that goes on with the run in `folder`, as it can be typed here, and what is to be known of it first.

    It starts this script, with the run's own arguments where the script takes them, by a launcher of which every word
    is known; None where the arguments are not such.
    """
    try:
        words, named = check_arguments(record)
    except UserError as error:
        return None, (f"no command is shown: {error.faults[0]}",)
    process = record.get("process") or {}
    where = process.get("working_folder") or os.getcwd()
    place = folder.resolve()
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--output_dir" and (equals or index + 1 < len(words)):
            value = value if equals else words[index + 1]
            if Path(where, value).expanduser().resolve() != place:  # the run was moved since
                words[index + (not equals)] = f"{name}={place}" if equals else str(place)
    launcher, config = _check_launcher(process.get("launcher") or ())
    notes = [f"{text} is part of it, and runs code or sends data that the record names" for text in [*named, *config]]
    if launcher is None:
        notes.append("its record names another launcher, which is not shown")
    started = {
        "processes": min(process.get("processes") or 1, MOST_PROCESSES),
        "launcher": launcher,
        "script": name_of_program(where),
    }
    command = command_to_go_on(words, started, resume)
    if os.path.realpath(where) != os.path.realpath(os.getcwd()):
        command = f"cd {shlex.quote(where)} && {command}"
    return command, tuple(notes)


def _check_launcher(words: Sequence[str]) -> tuple[list[str] | None, list[str]]:
    """The words of a launcher, and those among them that name a file which may start programs of its own; None for
    words that are not all known."""
    if not words:
        return [], []
    start = next((one for one in LAUNCHES if tuple(words[: len(one)]) == one), None)
    if start is None:
        return None, []
    named, waiting = [], None  # the option whose value comes next
    for word in words[len(start) :]:
        name, equals, value = word.partition("=")
        if waiting is not None:
            name, value = waiting, word
        name = "--" + name.removeprefix("--").replace("-", "_") if name.startswith("--") else name
        if name in SWITCHES and not equals and waiting is None:
            continue
        if name not in OPTIONS and name != CONFIG_FILE:
            return None, []
        if waiting is None and not equals:
            waiting = name
            continue
        waiting = None
        if name == CONFIG_FILE and not _is_of_script(value):
            named.append(f"{name} {value}")
        elif name != CONFIG_FILE and not PLAIN.fullmatch(value):
            return None, []
    return (None, []) if waiting is not None else (list(words), named)


def _is_of_script(path: str) -> bool:
    """Whether a launcher's config is one of those that come with the script."""
    return ROOT / "examples" / "accelerate" in Path(os.path.abspath(path)).resolve().parents
