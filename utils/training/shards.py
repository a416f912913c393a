"""Weights and optimizer states that lie in shards in several processes, to and from whole tensors.

What is saved is whole, in the files of a run of one process, so that any number of processes goes on from it. One
tensor at a time is put together, and only the main process keeps it, in CPU memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ..models.loading import TRAINED_ADAPTER
from ..runtime import is_main_process


def whole_state(state: Any) -> Any:
    """A nested state with its shards put together, in the main process; others get None for them.

    Every process must call it, since all have a part.
    """
    if isinstance(state, DTensor):
        with torch.no_grad():
            whole = state.full_tensor()
        return whole.cpu() if is_main_process() else None
    if isinstance(state, Mapping):
        return {key: whole_state(value) for key, value in state.items()}
    return [whole_state(value) for value in state] if isinstance(state, list) else state


def shard_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of a tensor that all processes have, laid out as the parameter is."""
    if not isinstance(parameter, DTensor) or whole.shape != parameter.shape:
        return whole
    whole = whole.to(parameter.device_mesh.device_type)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def shard_optimizer_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole state of the optimizer with its tensors in the shards of the parameters that they belong to."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sharded = {
        number: {
            name: shard_like(value, parameters[number]) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": sharded}


def fill_shards(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies whole tensors into the parameters of the same names, each process its shard.

    Raises:
        KeyError: a parameter has no value.
    """
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shard_like(values[name].to(parameter.dtype), parameter))


def whole_weights(model: torch.nn.Module) -> dict[str, Tensor | None]:
    """The weights of a sharded model by name, in the main process; of a model with an adapter, those of the adapter."""
    if isinstance(model, PeftModel):
        return whole_state({name: value for name, value in model.named_parameters() if value.requires_grad})
    return whole_state(model.state_dict())


def load_weights(model: PreTrainedModel | PeftModel, checkpoint: Path) -> None:
    """Puts the weights of a checkpoint into a sharded model: of a model with an adapter, into the adapter."""
    parameters = dict(model.named_parameters())
    if isinstance(model, PeftModel):
        saved_as = get_peft_model_state_dict(
            model, parameters, adapter_name=TRAINED_ADAPTER, save_embedding_layers=False
        )
        fill_shards(saved_as, load_peft_weights(str(checkpoint), device="cpu"))
        return
    # Through the library: an architecture may have other names in its files than in memory.
    saved = type(model).from_pretrained(checkpoint, dtype=torch.float32)
    fill_shards(parameters, dict(saved.named_parameters()))
