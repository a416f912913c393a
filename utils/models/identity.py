"""Which weights a model has, told from a little of them: the same wherever the files lie, and quick at any size."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from ..run.names import ADAPTER_CONFIG
from .hub_files import find_file, read_json_file
from .sources import WEIGHT_FILES, ModelSource

BLOCK = 2**16  # bytes
BLOCKS = 64  # that are read of each file, evenly spread over it
# What configs say of where files came from, not of what is computed.
UNSAID = {"_name_or_path", "transformers_version", "use_cache", "base_model_name_or_path", "revision", "peft_version"}


def identify_model(source: ModelSource) -> dict[str, str]:
    """Hashes that name a model: its `config` (and an adapter's), and its `weights` (and an adapter's).

    Of each file of weights count its name, its size, its header (names, types and shapes of the tensors) and 64 blocks
    of 64 KiB. Training, merging or quantizing changes all weights, so every such change is seen; a change of single
    numbers between the blocks is not.
    """
    parts = [(source.base, source.revision, "config.json", _weight_files(source.base, source.revision))]
    if source.adapter is not None:
        parts.append((source.adapter, source.adapter_revision, ADAPTER_CONFIG, ["adapter_model.safetensors"]))
    configs, weights = hashlib.sha256(), hashlib.sha256()
    for name, revision, config, files in parts:
        said = {
            key: value for key, value in (read_json_file(name, config, revision) or {}).items() if key not in UNSAID
        }
        configs.update(json.dumps(said, sort_keys=True).encode())
        for file in files:
            weights.update(file.encode())
            _hash_file(weights, find_file(name, file, revision))
    return {"config": configs.hexdigest()[:32], "weights": weights.hexdigest()[:32]}


def _weight_files(name: str, revision: str | None) -> list[str]:
    whole, index = WEIGHT_FILES
    if find_file(name, whole, revision) is not None:
        return [whole]
    parts = (read_json_file(name, index, revision) or {}).get("weight_map", {})
    return sorted({str(part) for part in parts.values()})


def _hash_file(digest: hashlib._Hash, path: Path | None) -> None:
    if path is None:
        return
    size = os.path.getsize(path)
    digest.update(f"{size}".encode())
    with open(path, "rb") as file:
        header = min(int.from_bytes(file.read(8), "little"), size)  # bytes
        digest.update(file.read(header))
        rest = max(size - 8 - header, 0)
        if rest <= BLOCK * BLOCKS:
            digest.update(file.read())
            return
        for number in range(BLOCKS):
            file.seek(size - rest + (rest - BLOCK) * number // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
