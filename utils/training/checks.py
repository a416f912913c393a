"""What can be refused before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import UserError, gather
from ..models.quantization import check_4bit
from ..models.sources import find_model
from ..run.bounded import read_json
from ..run.processes import launched_with
from ..runtime import find_device
from ..settings.training import Settings
from .launch import check_launch, with_deepspeed
from .pushing import check_login
from .tracking import check_trackers

CONFIG_FILES = ("deepspeed", "fsdp_config", "accelerator_config", "liger_kernel_config")
MOST_CONFIG_BYTES = 2**20


def check_settings(settings: Settings) -> None:
    """What can be refused before anything is loaded: 4-bit without its library, a missing tracker or reference."""
    checks: list[Callable[[], object]] = [
        lambda: check_trackers(settings),
        lambda: check_launch(settings),
        lambda: _check_offloading(settings),
    ]
    checks.append(lambda: _check_precision(settings))
    checks += [lambda: _check_sampling(settings), lambda: _check_skipping(settings)]
    checks.append(lambda: _check_named_files(settings))
    if settings.trainer_fields.get("push_to_hub"):
        checks.append(lambda: check_login("--push_to_hub"))
    if settings.model.use_4bit:
        checks.append(check_4bit)
    named = settings.model.named_reference
    if named is not None:
        checks.append(lambda: find_model(*named))
    gather(*checks)


def _check_named_files(settings: Settings) -> None:
    """Configs for the libraries that are named as files, which these would read without a limit."""
    faults = []
    for name in CONFIG_FILES:
        value = settings.trainer_fields.get(name)
        try:
            if isinstance(value, str) and os.path.exists(value):
                read_json(Path(value), MOST_CONFIG_BYTES)
        except (OSError, ValueError) as error:
            faults.append(f"--{name} {value}: {getattr(error, 'strerror', None) or error}; name a JSON file")
    if faults:
        raise UserError(*faults)


def _check_precision(settings: Settings) -> None:
    if settings.model.dtype == "float16" and find_device().type == "cpu":
        raise UserError("--dtype float16: is not trained in on a CPU; pass bfloat16 or float32, or leave it out")


def _check_offloading(settings: Settings) -> None:
    if settings.trainer_fields.get("activation_offloading") and not torch.cuda.is_available():
        raise UserError("--activation_offloading moves activations from a GPU to CPU memory; there is no GPU here")


def find_sharding(settings: Settings) -> list[str]:
    """What lays the weights in parts in several processes, by name; empty where nothing does."""
    sharded = [engine for engine in ("FSDP", "DEEPSPEED") if launched_with(engine)]
    return sharded + [f"--{name}" for name in ("fsdp", "deepspeed") if settings.trainer_fields.get(name)]


def _check_sampling(settings: Settings) -> None:
    """A model whose weights lie in parts in several processes cannot write in one of them."""
    sharded = find_sharding(settings)
    if settings.run.sample_during_eval and sharded:
        raise UserError(
            f"--sample_during_eval: with {sharded[0]} the weights are sharded over processes, and none of them can "
            "generate; leave it out, and sample from the trained model"
        )


def _check_skipping(settings: Settings) -> None:
    if settings.training.skip_bad_batches and with_deepspeed(settings):
        raise UserError(
            "--skip_bad_batches: DeepSpeed takes the optimizer step before its gradient can be checked; leave it out"
        )
