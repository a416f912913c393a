"""Model and adapter folders from elsewhere: what in them would run code or reach out of the folder is refused by name.

The libraries read no code from a folder unless --trust_remote_code says so. What is looked at here is what they would
still do for a config: load pickled weights, follow a path out of the folder, fetch a kernel that the config names.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..run.names import PICKLE_ENDINGS
from .hub_files import read_json_file

PICKLED = "can run code when they are loaded"
INDEX = "model.safetensors.index.json"
SHOWN = 3
# Keys of a config whose value may name code on the hub, by their ends.
KERNELS = ("_implementation", "_implementation_internal", "kernel_config", "hub_kernels", "use_kernels")
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
SIZES = ("hidden_size", "vocab_size", "num_attention_heads", "n_embd", "n_head", "d_model")
MOST_LAYERS = 10_000  # far above any model's; each is built before the weights are looked at
PROBABILITIES = ("dropout", "pdrop", "dropout_prob", "dropout_rate")
# What PEFT does for a value in an adapter's config, beyond building layers.
REACHES_OUT = {
    "megatron_config": "lets PEFT import the Python module that megatron_core names",
    "tokenizer_kwargs": "is passed on to the tokenizer's loader, including trust_remote_code",
    "prompt_tuning_init_state_dict_path": "names a file elsewhere to load",
    "adapters": "names further adapters to load",
    "shadow_model": "names a further model to load",
}


def check_folder(flag: str, name: str, revision: str | None = None) -> None:
    """Refuses what a folder (or hub repository) of a model, an adapter or a tokenizer holds or names and must not.

    Raises:
        UserError: a pipe or a device among the files, weights outside the folder or in pickles, a kernel to be fetched,
            a chat template named as a path, numbers of layers or shares of dropout that cannot be meant.
    """
    faults = list(_odd_files(name))
    if faults:  # reading one of them might never end
        raise UserError(*(f"{flag} {name}: {fault}" for fault in faults))
    faults = [
        *_shard_faults(read_json_file(name, INDEX, revision) or {}),
        *_config_faults(read_json_file(name, "config.json", revision) or {}),
        *_padding_faults(read_json_file(name, "config.json", revision) or {}),
        *_tokenizer_faults(read_json_file(name, "tokenizer_config.json", revision) or {}),
    ]
    if faults:
        raise UserError(*(f"{flag} {name}: {fault}" for fault in faults))


def check_adapter_config(flag: str, name: str, config: dict[str, Any]) -> None:
    """Refuses an adapter whose adapter_config.json makes PEFT import or load something else, or fail in training.

    Raises:
        UserError: one fault per such value.
    """
    faults = [
        f"{flag} {name}: {key} in its adapter_config.json {what}; remove the line if you trust the rest"
        for key, what in REACHES_OUT.items()
        if config.get(key)
    ]
    tokens = config.get("alora_invocation_tokens")
    if tokens is not None and not (isinstance(tokens, list) and all(map(_is_token_id, tokens))):
        faults.append(
            f"{flag} {name}: alora_invocation_tokens in its adapter_config.json is {json.dumps(tokens)[:80]}: "
            "must be a list of token ids or null"
        )
    if faults:
        raise UserError(*faults)


def refuse_pickles(flag: str, checkpoint: Path) -> None:
    """Refuses a checkpoint with files that are pickles by their endings; no run of this script writes any.

    Raises:
        UserError: it has some. A trainer that finds such a file in place of a safetensors one would load it.
    """
    pickled = sorted(path.name for path in checkpoint.iterdir() if path.name.lower().endswith(PICKLE_ENDINGS))
    if pickled:
        more = f" and {len(pickled) - SHOWN} more" if len(pickled) > SHOWN else ""
        raise UserError(
            f"{flag} {checkpoint}: holds pickles ({', '.join(pickled[:SHOWN])}{more}), which {PICKLED}; no run of "
            "this script writes any, and none is loaded. To start from its weights, name it with --model_name_or_path"
        )


def explain_library(error: Exception) -> str:
    """What a library says of a file that it cannot read, in one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    if "trust_remote_code" in text:
        return (
            "it comes with its own Python code, which is not run; read that code, and pass --trust_remote_code if "
            "you trust it"
        )
    if "ignore_mismatched_sizes" in text:  # the library names no tensor here
        return "its weights have other shapes than its config.json says (vocab_size, hidden_size and the like)"
    kind = re.match(
        r"Unrecognized configuration class <class '(?:.*\.)?(\w+?)(?:Config)?'>.*AutoModelForCausalLM", text
    )
    if kind:
        return (
            f"{kind[1]} is not a causal language model that transformers can load for text (models of images, sounds "
            "or encoders are not); name a causal language model, such as the text part of it saved by itself"
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "it asks for more memory than there is"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = lines[0] if lines else ""
    for line in lines[1:]:  # the reason stands on the line below
        if not said.endswith(":") and not (said == lines[0] and said.startswith("Validation error for")):
            break
        said = f"{said} {line}"
    named = type(error).__name__
    return said[:300] if isinstance(error, OSError | ValueError | ImportError) and said else f"{named}: {said}"[:300]


def _odd_files(name: str) -> Iterator[str]:
    """What in a folder is neither a file nor a folder: a library that opens a pipe waits for ever."""
    for entry in os.scandir(name) if os.path.isdir(name) else ():
        try:
            mode = entry.stat().st_mode
        except OSError:  # a link to nothing
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            yield f"{entry.name} is not a regular file (a pipe or a device); remove it"


def _shard_faults(index: dict[str, Any]) -> Iterator[str]:
    places = index.get("weight_map", {})
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        yield f"{INDEX}: its weight_map must name a file for each tensor"
        return
    wrong = sorted({place for place in places.values() if not _is_plain_name(place, ".safetensors")})
    for place in wrong[:SHOWN]:
        if place.lower().endswith(PICKLE_ENDINGS):
            yield f"{INDEX} names {place}: pickled weights, which {PICKLED}; only .safetensors are read"
        else:
            yield f"{INDEX} names {place}: only .safetensors files in the same folder are read"


def _config_faults(config: dict[str, Any]) -> Iterator[str]:
    for key, value in _items(config):
        if key.endswith(KERNELS) and "/" in json.dumps(value):
            yield (
                f"config.json: {key} is {json.dumps(value)[:80]}, a kernel that would be downloaded and run; remove "
                "the line, and name an implementation that you trust with --attn_implementation"
            )
        if key == "transformers_weights":
            yield (
                f"config.json: {key} is {json.dumps(value)[:80]}, a file to be read instead of model.safetensors, "
                "which may be a pickle; remove the line"
            )
        if key in ("torch_dtype", "dtype") and isinstance(value, str) and not _is_dtype(value):
            said = json.dumps(value)[:40]
            yield f"config.json: {key} is {said}: must be a type of PyTorch such as bfloat16; fix the line"
        if key in LAYER_COUNTS and isinstance(value, int | float) and value > MOST_LAYERS:
            yield f"config.json: {key} is {json.dumps(value)[:40]}, more layers than any model has; fix the line"
        if key in (*LAYER_COUNTS, *SIZES) and isinstance(value, int | float) and value < 1:
            yield f"config.json: {key} is {json.dumps(value)[:40]}: must be at least 1; fix the line"
        if key.endswith(PROBABILITIES) and isinstance(value, int | float) and not 0 <= value <= 1:
            yield f"config.json: {key} is {json.dumps(value)[:40]}: must be between 0 and 1; fix the line"


def _padding_faults(config: dict[str, Any]) -> Iterator[str]:
    """The padding token must be one of the vocabulary that stands beside it, or a layer cannot be built."""
    parts = [config, *(value for _, value in _items(config) if isinstance(value, dict))]
    for part in parts:
        pad, size = part.get("pad_token_id"), part.get("vocab_size")
        if pad is None or not isinstance(size, int):
            continue
        if not isinstance(pad, int) or not -size <= pad < size:
            yield (
                f"config.json: pad_token_id is {json.dumps(pad)[:40]}: must be a token of the vocabulary (below "
                f"{size}) or null; fix the line"
            )


def _tokenizer_faults(config: dict[str, Any]) -> Iterator[str]:
    templates = config.get("chat_template")
    named = [item.get("name") for item in templates if isinstance(item, dict)] if isinstance(templates, list) else []
    named += list(templates) if isinstance(templates, dict) else []
    for name in named:
        if not isinstance(name, str) or not _is_plain_name(name, ""):
            yield f"tokenizer_config.json: {name!r:.80} is not a valid name for a chat template, which becomes a file"


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of nested mappings with its value."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from item.items()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _is_dtype(name: str) -> bool:
    import torch

    return name == "auto" or isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**31


def _is_plain_name(name: str, ending: str) -> bool:
    """Whether it names a file of the same folder, on any system."""
    plain = name == os.path.basename(name) and not re.search(r"[\\/:\x00]", name)
    return plain and name not in ("", ".", "..") and name.endswith(ending)
