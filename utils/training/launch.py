"""Several processes: whether their launch can work, how they meet, take turns, and the message when one is lost."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..arguments import command_line
from ..distributed import PATIENCE, meet
from ..errors import ProcessLost, UserError, gather
from ..run.bounded import Unreadable, read_json
from ..run.checkpoints import find_checkpoints
from ..run.kinds import check
from ..run.processes import command_to_go_on, count_processes, is_alive, launched_with
from ..run.program import join_command, path_from_here
from ..run.record import read_record
from ..run.records import KEPT_STATE
from ..runtime import Precision, find_device, is_main_process
from ..settings.training import Settings

# What the libraries say when a process that they wait for is gone.
SIGNS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "gloo/",
    "nccl",
    "timed out",
    "tcpstore",
)
KEPT_BY_DEEPSPEED = "optimizer.json"  # in a checkpoint: says so, where DeepSpeed keeps the optimizer
COMPILING = ("torch_compile_backend", "torch_compile_mode")
FSDP_CONFIG = "examples/accelerate/fsdp2.yaml"


def check_one_device(settings: Settings) -> None:
    """A plain `python` start uses one GPU; which one, or that all shall be used, is the person's to say."""
    count = torch.cuda.device_count()
    if count > 1 and "WORLD_SIZE" not in os.environ:
        config = path_from_here("examples/accelerate/ddp.yaml")
        start = ["accelerate", "launch", "--config_file", config, "--num_processes", str(count)]
        torchrun = join_command(["..."], ["torchrun", "--nproc_per_node", str(count)])
        raise UserError(
            f"this machine has {count} GPUs, and a plain start uses one of them. To use them all, each with as many "
            f"pairs per step as here:\n  {join_command(command_line(settings), start)}\n"
            f"`{torchrun}` is the same; where the model does not fit one GPU, name "
            f"{path_from_here(FSDP_CONFIG)}. To use one GPU, set CUDA_VISIBLE_DEVICES=0"
        )


def check_launch(settings: Settings) -> None:
    """Refuses what the launcher was told and this script cannot do.

    Raises:
        UserError: a plain start on several GPUs; sequences or matrices split over processes; the first version of
            FSDP; DeepSpeed that is not installed.
    """
    gather(lambda: check_one_device(settings), _check_parallelism, _check_fsdp, lambda: _check_deepspeed(settings))


def with_deepspeed(settings: Settings) -> bool:
    """Whether the run is DeepSpeed's, by the launcher's config or by --deepspeed."""
    return launched_with("DEEPSPEED") or bool(settings.trainer_fields.get("deepspeed"))


def _check_parallelism() -> None:
    if not launched_with("PARALLELISM_CONFIG"):
        return
    split = {"tp": "tensor parallelism", "cp": "context parallelism", "sp": "sequence parallelism"}
    sizes = {name: os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1") for name in split}
    faults = [
        f"parallelism_config_{name}_size is {size}: {split[name]} is not supported, as each process computes whole "
        f"sequences of pairs of its own; leave it out, and shard the model with {FSDP_CONFIG}"
        for name, size in sizes.items()
        if size != "1"
    ]
    if faults:
        raise UserError(*faults)


def _check_fsdp() -> None:
    if launched_with("FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            f"fsdp_version is {os.environ.get('FSDP_VERSION', '1')}: only version 2 is supported; set `fsdp_version: 2`"
            f" under fsdp_config, as in {FSDP_CONFIG}"
        )


def _check_deepspeed(settings: Settings) -> None:
    if not with_deepspeed(settings):
        return
    compiles = [f"--{name}" for name in COMPILING if settings.trainer_fields.get(name)]
    compiles += ["--torch_compile"] if settings.training.torch_compile else []
    compiles += ["dynamo_backend"] if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no" else []
    if compiles:
        raise UserError(
            f"{compiles[0]}: DeepSpeed gathers weights within the layers, which then "
            f"cannot be compiled; leave it out, or launch with {FSDP_CONFIG}"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"DeepSpeed is asked for and not installed: run `pip install deepspeed`, or launch with {FSDP_CONFIG}"
        )
    if find_device().type == "cpu":
        wants = {"--dtype float32": settings.model.dtype == "float32"}
        wants["--ddp_backend gloo"] = settings.trainer_fields.get("ddp_backend") == "gloo"
        missing = [flag for flag, given in wants.items() if not given]
        if missing:
            raise UserError(*[f"DeepSpeed on CPUs needs {flag}: add it" for flag in missing])


def check_resumable(checkpoint: Path, deepspeed: bool) -> None:
    """Refuses a checkpoint that DeepSpeed wrote, in files of its own, where this launch cannot read it; and under
    DeepSpeed all others.

    Raises:
        UserError: it was written by the other engine, or DeepSpeed's by another number of processes.
    """
    try:
        written = check(read_json(checkpoint / KEPT_BY_DEEPSPEED), KEPT_STATE)
    except (OSError, Unreadable) as error:
        raise UserError(f"{checkpoint}: its {KEPT_BY_DEEPSPEED} cannot be used ({error}); it is damaged") from None
    processes = written.get("processes") if written.get("deepspeed") else None
    if (processes is not None) != deepspeed:
        writer, reader = ("DeepSpeed", "with DeepSpeed") if processes else ("another engine", "without DeepSpeed")
        raise UserError(f"{checkpoint} was written by {writer}, and can only be resumed from {reader}")
    if processes not in (None, count_processes()):
        raise UserError(
            f"{checkpoint} was written by DeepSpeed in {processes} processes, and can only be resumed in as many, "
            f"not in {count_processes()}. {FSDP_CONFIG} resumes in any number"
        )


def join_processes(settings: Settings, precision: Precision) -> None:
    """Meets the other processes of the run, where there are any. Precision is --dtype's, not the launcher's."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # the trainer's configuration says it
    if count_processes() == 1:
        return
    seconds = settings.trainer_fields.get("ddp_timeout", PATIENCE)
    patience = timedelta(seconds=seconds)
    options: dict[str, Any] = {"timeout": patience, "backend": settings.trainer_fields.get("ddp_backend")}
    PartialState(cpu=precision.device.type == "cpu" and not launched_with("DEEPSPEED"), **options)
    meet(patience)


def lost_a_process(error: BaseException) -> bool:
    """Whether it was raised because another process of the run is gone."""
    text = str(error).lower()
    return count_processes() > 1 and isinstance(error, RuntimeError) and any(sign in text for sign in SIGNS)


@contextlib.contextmanager
def lost_processes_explained() -> Iterator[None]:
    """Where a process is lost outside of training, of which the run itself tells more, the others say that."""
    try:
        yield
    except RuntimeError as error:
        if not lost_a_process(error):
            raise
        lost = ProcessLost("another process of this run ended before training began: see its last lines")
        lost.spoken = not is_main_process()
        raise lost from error


def explain_lost_process(
    error: BaseException, record: Mapping[str, Any], folder: Path | None, step: int
) -> ProcessLost | None:
    """What was raised because another process is gone, as one message; None for any other error.

    Args:
        record: what run.json holds; `folder` is None in a dry run.
        step: the last one that was taken.
    """
    return ProcessLost(_describe_lost_process(record, folder, step)) if lost_a_process(error) else None


def _describe_lost_process(record: Mapping[str, Any], folder: Path | None, step: int) -> str:
    checkpoints = find_checkpoints(folder) if folder is not None else []
    command = command_to_go_on(record["arguments"], record["process"], bool(checkpoints))
    safe = f"everything up to {checkpoints[-1].name} is safe" if checkpoints else "no checkpoint was saved yet"
    return (
        f"after step {step} another process of this run ended or stopped responding (it was killed, ran out of memory, "
        f"or its machine is gone: see its last lines); {safe}. To {'resume' if checkpoints else 'start again'}, with "
        f"as many processes, or another number with the same pairs per optimizer step:\n  {command}"
    )


def speaks(folder: Path | None) -> bool:
    """Whether this process says that another one is lost: on each machine the first, or where that was the main one and
    is gone, the second."""
    if is_main_process():
        return True
    if os.environ.get("GROUP_RANK", "0") != "0":  # of the machine
        return os.environ.get("LOCAL_RANK") == "0"
    record = read_record(folder) if folder is not None else {}  # of the main process
    return os.environ.get("LOCAL_RANK") == "1" and not is_alive(record.get("process") or {})
