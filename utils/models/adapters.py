"""LoRA layers that compute the same as PEFT's in fewer passes over memory."""

from __future__ import annotations

import types
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor


def speed_up_lora(model: torch.nn.Module) -> None:
    """Lets the plain LoRA layers of a model add their update within the product that makes it.

    PEFT computes W x, then B A x, then its multiple, then the sum, each a pass over memory that the backward pass
    repeats. Here the sum is part of the second product (y = W x + (scale * A x) B^T), and the scale is put where the
    numbers are few.
    """
    plain = (lora.Linear, getattr(lora, "Linear4bit", lora.Linear))  # the second only where bitsandbytes is installed
    for module in model.modules():
        if type(module) in plain and not module.lora_variant:
            module.forward = types.MethodType(_forward, module)


def _forward(layer: Any, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    adapter = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    if layer.disable_adapters or layer.merged or adapter not in layer.lora_A or arguments or options:
        return type(layer).forward(layer, x, *arguments, **options)
    flat = x.flatten(0, -2)
    result = layer.base_layer(flat)
    dtype = result.dtype
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    if not torch.is_autocast_enabled(x.device.type):  # else the product itself casts, once
        flat = layer._cast_input_dtype(flat, down.weight.dtype)
    inner = down(layer.lora_dropout[adapter](flat)) * layer.scaling[adapter]  # here the scale meets the fewest numbers
    # In the memory of the base's output, which nothing else reads.
    result = result.to(inner.dtype).addmm_(inner, up.weight.to(inner.dtype).t())
    if up.bias is not None:
        result = result + layer.scaling[adapter] * up.bias
    return result.to(dtype).view(*x.shape[:-1], -1)
