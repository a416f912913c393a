"""How trained weights are kept: in float32, with the dropout that was asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ..models.loading import TRAINED_ADAPTER


@contextlib.contextmanager
def float32_kept(model: torch.nn.Module) -> Iterator[None]:
    """Around the making of a trainer: what is trained on 4-bit weights stays float32.

    TRL casts it to bfloat16, whose steps are so coarse that small updates vanish. Values that were there before are
    put back exactly; an adapter that the trainer adds (to the base, in place) continues in float32.
    """
    if not getattr(model, "is_loaded_in_4bit", False):
        yield
        return
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if name in before:
                parameter.data.copy_(before[name])


def set_lora_dropout(model: torch.nn.Module, probability: float) -> None:
    """Turns dropout on for the adapter that is trained. TRL turns all dropout off, adapters' too; a frozen copy of an
    adapter that serves as reference must stay without."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and TRAINED_ADAPTER in getattr(module, "lora_dropout", {}):
            module.lora_dropout[TRAINED_ADAPTER] = torch.nn.Dropout(probability) if probability else torch.nn.Identity()
    config = getattr(model, "peft_config", {}).get(TRAINED_ADAPTER)
    if hasattr(config, "lora_dropout"):
        config.lora_dropout = probability  # an adapter that training continues was saved with its former one
