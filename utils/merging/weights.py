"""Adapters on their base, and their base with them in it: added in float32, rounded once to the format of the files."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError, in_one_line
from ..models.loading import load_frozen, put_adapter
from ..models.sources import ModelSource, read_end_ids
from ..models.trained import TrainedModel
from ..models.translating import translating
from ..run.writing import let_umask_decide
from ..runtime import Precision, find_device
from ..settings.training import ModelSettings

FLAG = "--model_name_or_path"
ROOM = 1.3  # memory that a model is given, in sizes of its weights


def read_config(source: ModelSource, settings: ModelSettings) -> PretrainedConfig:
    """The config of the base."""
    return translating(
        f"{FLAG} {source.base}: its config cannot be read",
        lambda: AutoConfig.from_pretrained(
            source.base, revision=source.revision, trust_remote_code=settings.trust_remote_code
        ),
    )


def choose_saved_dtype(wish: str, config: PretrainedConfig) -> torch.dtype:
    """The format of the merged weights: as asked, else that of the base's files."""
    if wish != "auto":
        return getattr(torch, wish)
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def choose_computing(config: PretrainedConfig, stored: torch.dtype, settings: ModelSettings) -> Precision:
    """Where and in what the models are compared: in float32 where the memory allows it, else as they are stored."""
    size = count_parameters(config, settings)
    devices = list(dict.fromkeys((find_device(), torch.device("cpu"))))
    for device in devices:
        for dtype in dict.fromkeys((torch.float32, stored)):
            if size * dtype.itemsize * ROOM < free_memory_bytes(device):
                return Precision(dtype, device, "")
    return Precision(stored, devices[-1], "")


def count_parameters(config: PretrainedConfig, settings: ModelSettings) -> int:
    """The parameters of a model with this config, without making it."""
    with torch.device("meta"):
        model = translating(
            f"{FLAG}: no model can be built from its config",
            lambda: AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code),
        )
    return sum(parameter.numel() for parameter in model.parameters())


def free_memory_bytes(device: torch.device) -> int:
    """The memory that is free on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def load_base(trained: TrainedModel, settings: ModelSettings, computing: Precision) -> PreTrainedModel:
    """The base of an adapter with its own weights, in the format that `computing` says."""
    if trained.source.stored() is not None:
        return load_base_as_trained(trained, settings, computing)
    base = dataclasses.replace(trained.source, adapter=None)
    return load_frozen(FLAG, base, settings, computing, in_4bit=False)


def load_base_as_trained(trained: TrainedModel, settings: ModelSettings, computing: Precision) -> PreTrainedModel:
    """The base of an adapter with the 4-bit weights that it was trained on, written out in the format of `computing`.

    They are what the run multiplied with: quantized from the format that it computed in, and read back into it.
    """
    dtype = getattr(torch, trained.record.get("precision") or "float32", None)
    run = dataclasses.replace(computing, dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32)
    base = dataclasses.replace(trained.source, adapter=None)
    model = load_frozen(FLAG, base, settings, run, in_4bit=True).dequantize()
    model._weight_conversions = None  # of packed weights; saving would pack again
    return model.to(computing.dtype).requires_grad_(False).eval()


def adapt(model: PreTrainedModel, source: ModelSource) -> PeftModel:
    """The base with its adapter on it.

    Raises:
        UserError: the adapter is not one of weights that are added to the base's.
    """
    model = put_adapter(model, source).requires_grad_(False).eval()
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        kind = source.adapter_config().get("peft_type", "adapter")
        raise UserError(f"{FLAG} {source.name}: {kind} has no weights that can be merged into its base")
    return model


@torch.no_grad()
def merge_adapter(model: PeftModel, source: ModelSource, dtype: torch.dtype, safe: bool) -> PreTrainedModel:
    """The base with the adapter in its weights, all of it in `dtype`; `model` is used up.

    Each matrix is merged in float32 and rounded once. Weights that stand in two places (tied embeddings) remain one,
    unless the adapter changes one of the two only.

    Raises:
        UserError: PEFT cannot merge this adapter, or what comes of it are not finite numbers.
    """
    shared = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, layer in [item for item in model.named_modules() if isinstance(item[1], BaseTunerLayer)]:
        base = layer.get_base_layer()
        for part, parameter in list(base.named_parameters(recurse=False)):
            if shared[id(parameter)] > 1:
                parameter = torch.nn.Parameter(parameter.clone(), requires_grad=False)
                setattr(base, part, parameter)
            parameter.data = parameter.data.float()
        try:
            layer.merge(safe_merge=safe)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise UserError(f"{FLAG} {source.name}: cannot be merged at {plain_name(name)}: {error}") from None
        for parameter in base.parameters(recurse=False):
            if not torch.isfinite(parameter).all():
                raise UserError(
                    f"{FLAG} {source.name}: merging gives weights that are not finite, in {plain_name(name)}; "
                    "the adapter is broken"
                )
            parameter.data = _rounded(parameter.data, dtype, plain_name(name))
    merged = model.merge_and_unload()
    _part_repeated_layers(merged)
    _round(merged, dtype)
    return merged


def _part_repeated_layers(model: PreTrainedModel) -> None:
    """Gives layers that an adapter repeated (PEFT's layer_replication) weights of their own, to be saved as such."""
    tied = {id(model.get_input_embeddings().weight)}
    known: set[int] = set()
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) in known - tied:
            place, _, part = name.rpartition(".")
            setattr(model.get_submodule(place), part, torch.nn.Parameter(parameter.clone(), requires_grad=False))
        known.add(id(parameter))


def plain_name(name: str) -> str:
    """The name of a module in the base, from its name under the adapter."""
    return name.removeprefix("base_model.model.")


def _round(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Every other number of the model in `dtype`, but for parts that its architecture computes in float32 only."""
    kept = {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    if dtype == torch.float16:
        kept |= {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point() and kept.isdisjoint(name.split(".")):
            value.data = _rounded(value.data, dtype, name)
    model.config.dtype = dtype


def _rounded(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    rounded = values.to(dtype)
    if torch.isinf(rounded).any() and torch.isfinite(values).all():
        largest, most = values.abs().max().item(), torch.finfo(dtype).max
        raise UserError(
            f"--dtype {str(dtype).removeprefix('torch.')}: has a maximum of {most:.0f}, and {name} has {largest:.3g}; "
            "pass --dtype bfloat16 or float32"
        )
    return rounded


def save_merged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: ModelSource,
    folder: Path,
    max_shard_size: str,
) -> list[str]:
    """Writes the model with tokenizer and generation config; returns the names of the Python files of its own code.

    Generation stops at every token that ends a reply, in plain transformers too.
    """
    generation = model.generation_config
    if generation is not None:
        ends = sorted(read_end_ids(source.base, source.revision, tokenizer))
        own = generation.eos_token_id
        named: list[Any] = own if isinstance(own, list) else [own]
        if ends and not set(ends) <= set(named):
            generation.eos_token_id = ends if len(ends) > 1 else ends[0]
        if generation.pad_token_id is None:
            generation.pad_token_id = tokenizer.pad_token_id
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    except ValueError as error:
        raise UserError(f"the merged model cannot be saved: {in_one_line(error)}") from None
    tokenizer.save_pretrained(folder)
    let_umask_decide(*folder.glob("*.safetensors"))
    return sorted(path.name for path in folder.glob("*.py"))
