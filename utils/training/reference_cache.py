"""The reference's log-probs on disk, found again by everything that can change them and by nothing else.

A sweep over beta, the loss, the learning rate or the output folder scores the reference once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load, save
from torch import Tensor
from transformers import PretrainedConfig

from ..run.writing import flush_folder, replacing
from ..runtime import read_versions, say

# What a config says of where the model came from, not of what it computes.
NAMES_IN_CONFIG = ("_name_or_path", "transformers_version", "architectures", "use_cache")
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def cache_folder() -> Path:
    """Beside the data sets' cache, which HF_DATASETS_CACHE and HF_HOME move."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "reference_log_probs"


def hash_model(tensors: Iterable[tuple[str, Tensor]], config: PretrainedConfig, how: dict[str, Any]) -> str:
    """A key of a model: its weights, its config and `how` it computes (precision, layout, ...).

    Args:
        tensors: every weight that takes part, by name; those in 4 bits with the tensors that scale them.
    """
    digest = hashlib.sha256()
    said = {name: value for name, value in config.to_dict().items() if name not in NAMES_IN_CONFIG}
    versions = {name: version for name, version in read_versions().items() if name in LIBRARIES}
    digest.update(json.dumps([said, how, versions], sort_keys=True, default=str).encode())
    for name, value in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def hash_rows(dataset: Dataset, columns: Iterable[str]) -> str:
    """A key of the token ids in `columns`, in order."""
    digest = hashlib.sha256()
    for batch in dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=1000):
        for name in columns:
            lists = batch.column(name).combine_chunks()
            digest.update(name.encode())
            digest.update(lists.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            digest.update(lists.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def load_columns(key: str, names: Sequence[str], rows: int) -> dict[str, np.ndarray] | None:
    """The columns saved under `key`, each (rows,) in float64; None where there are none, or (which is said) where they
    are not what was saved."""
    path = cache_folder() / f"{key}.safetensors"
    if not os.path.lexists(path):
        return None
    try:
        content = path.read_bytes()
        columns = {name: values.numpy() for name, values in load(content).items()}
        said = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["sha256"]
        kinds = {name: (values.dtype, values.shape) for name, values in columns.items()}
        if kinds != dict.fromkeys(names, (np.dtype(np.float64), (rows,))):
            fault = "other columns"
        else:
            fault = None if said == _hash_columns(key, columns) else "its hash is another"
    except OSError as error:
        fault = error.strerror or str(error)
    except Exception as error:  # damaged bytes can make the readers raise anything
        fault = type(error).__name__
    if fault is None:
        return columns
    say(f"warning: the reference's log-probs in {path} are not what was saved ({fault}); they are scored again")
    return None


def save_columns(key: str, columns: dict[str, np.ndarray]) -> None:
    """Saves columns of numbers under `key`, in one step. A disk that cannot hold them is said: they are only kept to
    save time."""
    columns = {name: np.asarray(values, np.float64) for name, values in columns.items()}
    path = cache_folder() / f"{key}.safetensors"
    content = save(
        {name: torch.from_numpy(values) for name, values in columns.items()},
        {"sha256": _hash_columns(key, columns)},
    )
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        with replacing(path) as beside:
            beside.write_bytes(content)
        flush_folder(path.parent)
    except OSError as error:
        say(
            f"warning: the reference's log-probs cannot be cached in {path.parent} ({error.strerror or error}); "
            "a later run scores them again"
        )


def _hash_columns(key: str, columns: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(key.encode())
    for name, values in sorted(columns.items()):
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
