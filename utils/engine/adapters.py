"""LoRA layers that compute the same as PEFT's in fewer passes over memory, and DoRA's norms without rounding."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.other import transpose
from torch import Tensor


def speed_up_lora(model: torch.nn.Module) -> None:
    """Lets the plain LoRA layers of a model put base and update together within a product.

    PEFT computes W x, then B A x, then its multiple, then the sum, each a pass over memory that the backward pass
    repeats. Here the sum is part of the last product (y = (scale * A x) B^T + W x), and the scale is put where the
    numbers are few. The base's product, the largest, comes last: of a layer that the backward pass computes again it
    keeps nothing, so that at the layer's end it is left out.
    """
    for module in model.modules():
        if isinstance(module, lora.LoraLayer) and type(module) in _plain_layers() and not module.lora_variant:
            module.forward = types.MethodType(_forward, module)


def _plain_layers() -> tuple[type, ...]:
    """The second only where bitsandbytes is installed, which is imported here."""
    return lora.Linear, getattr(lora, "Linear4bit", lora.Linear)


def keep_dora_norms(model: torch.nn.Module) -> None:
    """Lets DoRA layers compute the norms of their weights in float32, in whatever format the weights are.

    An output is scaled by its magnitude, which is float32, over this norm. PEFT rounds the norm to the format of the
    weights, which in bfloat16 scales each output of a fresh adapter by up to 0.4%: the policy would not begin as its
    reference.
    """
    for module in model.modules():
        if isinstance(module, DoraLinearLayer) and type(module).get_weight_norm is DoraLinearLayer.get_weight_norm:
            module.get_weight_norm = types.MethodType(_norm_in_float32, module)


@torch.no_grad()
def start_dora_magnitudes(model: torch.nn.Module) -> None:
    """Sets the magnitudes of fresh DoRA layers to the norms of their weights once more, after `keep_dora_norms`.

    PEFT sets them before that, rounded.
    """
    for module in (module for module in model.modules() if isinstance(module, lora.LoraLayer)):
        for name, magnitude in module.lora_magnitude_vector.items():
            embeds = name in module.lora_embedding_A
            down = module.lora_embedding_A[name] if embeds else module.lora_A[name].weight
            up = module.lora_embedding_B[name] if embeds else module.lora_B[name].weight
            magnitude.update_layer(
                base_layer=module.get_base_layer(), lora_A=down, lora_B=up, scaling=module.scaling[name]
            )


def _norm_in_float32(
    layer: DoraLinearLayer, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None
) -> Tensor:
    """The norm of each output's weights, shape (outputs,), of base and update together."""
    weight = transpose(weight, layer.fan_in_fan_out).float()
    return torch.linalg.norm(weight + scaling * lora_weight.float(), dim=1)


def _forward(layer: Any, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    if layer.disable_adapters and not (layer.merged_adapters or options):
        return layer.base_layer(x, *arguments)
    active = layer.active_adapters
    if len(active) != 1 or active[0] not in layer.lora_A or layer.merged_adapters or arguments or options:
        return type(layer).forward(layer, x, *arguments, **options)
    flat, base, scale = x.flatten(0, -2), layer.base_layer, layer.scaling[active[0]]
    down, up, dropout = (parts[active[0]] for parts in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    casts = torch.is_autocast_enabled(x.device.type)
    computed_in = torch.get_autocast_dtype(x.device.type) if casts else x.dtype
    if _is_plain(base) and base.weight.dtype == computed_in and (casts or down.weight.dtype == computed_in):
        flat = flat.to(computed_in)
        inner = down(dropout(flat)) * scale  # here the scale meets the fewest numbers
        # In the memory of the update, which nothing else reads.
        result = F.linear(inner, up.weight, base.bias).addmm_(flat, base.weight.t())
    else:
        result = base(flat)
        inner = down(dropout(flat if casts else layer._cast_input_dtype(flat, down.weight.dtype))) * scale
        result = result.to(inner.dtype).addmm_(inner, up.weight.to(inner.dtype).t()).to(result.dtype)
    if up.bias is not None:
        result = result + scale * up.bias.to(result.dtype)
    return result.view(*x.shape[:-1], -1)


def _is_plain(base: torch.nn.Module) -> bool:
    """Whether a layer is its product and nothing else."""
    watched = base._forward_pre_hooks or base._forward_hooks or "forward" in vars(base)
    return type(base) is torch.nn.Linear and not watched
