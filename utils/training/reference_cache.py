"""The reference's log-probs on disk, found again by everything that can change them and by nothing else.

A sweep over beta, the loss, the learning rate or the output folder scores the reference once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from utils.runtime import read_versions
from utils.saving import replacing

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
        digest.update(value.detach().contiguous().flatten().view(torch.uint8).cpu().numpy())
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


def load_columns(key: str) -> dict[str, np.ndarray] | None:
    """The columns saved under `key`; None when there are none that can be read."""
    try:
        return {name: values.numpy() for name, values in load_file(cache_folder() / f"{key}.safetensors").items()}
    except (OSError, SafetensorError):
        return None


def save_columns(key: str, columns: dict[str, np.ndarray]) -> None:
    """Saves columns of numbers under `key`, in one step."""
    with replacing(cache_folder() / f"{key}.safetensors") as beside:
        save_file({name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}, beside)
