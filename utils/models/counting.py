"""How many parameters a model has, and in how many bits each of them is held: told by the tensors themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

STANDS_FOR = "stands_for"  # on a parameter of a model on paper: how many numbers it has packed into its own

NEARLY_ALL = 0.9  # of the weights: what is left are embeddings, the head and norms


@dataclass(frozen=True)
class Counts:
    """Parameters of a model, those of adapters on it included.

    `adapter` counts the adapters' own. `in_4bit` counts the numbers that are held in 4 bits. `wide` names the largest
    weights with three dimensions (fused experts) that a base with weights in 4 bits still holds in 16 or 32.
    """

    total: int
    trainable: int
    adapter: int
    in_4bit: int
    wide: tuple[str, ...]

    @property
    def share_in_4bit(self) -> float:
        """The share of the base's numbers that is held in 4 bits."""
        return self.in_4bit / max(self.total - self.adapter, 1)

    def describe_4bit(self) -> str:
        """`on a 4-bit base`, with the true share where that is not nearly all; empty without weights in 4 bits."""
        if not self.in_4bit:
            return ""
        if self.share_in_4bit >= NEARLY_ALL:
            return " on a 4-bit base"
        return f" on a 4-bit base ({self.share_in_4bit:.0%} of its weights are in 4 bits)"

    def record(self) -> dict[str, int | float]:
        """For run.json."""
        counts: dict[str, int | float] = {"parameters": self.total, "trainable_parameters": self.trainable}
        if self.in_4bit:
            counts |= {"parameters_in_4bit": self.in_4bit, "share_in_4bit": self.share_in_4bit}
        return counts


def count_parameters(model: torch.nn.Module) -> Counts:
    """Counts the numbers that the model computes with, not the bytes that they are packed in; shared ones once."""
    total = trainable = adapter = in_4bit = 0
    wide: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        size = numbers_in(parameter)
        total += size
        trainable += size if parameter.requires_grad else 0
        adapter += size if "lora_" in name else 0
        if is_in_4bit(parameter):
            in_4bit += size
        elif parameter.dim() == 3 and "lora_" not in name:
            wide[name.removeprefix("base_model.model.").replace("base_layer.", "")] = size
    largest = sorted(wide, key=lambda name: -wide[name])
    return Counts(total, trainable, adapter, in_4bit, tuple(largest) if in_4bit else ())


def numbers_in(parameter: torch.Tensor) -> int:
    """How many numbers a parameter stands for; packed ones carry what they were packed from."""
    state = getattr(parameter, "quant_state", None)  # of bitsandbytes
    if state is not None and getattr(state, "shape", None) is not None:
        return torch.Size(state.shape).numel()
    stands_for = getattr(parameter, STANDS_FOR, None)
    if stands_for is not None:
        return stands_for
    return getattr(parameter, "ds_numel", None) or parameter.numel()  # DeepSpeed's, whose own tensor is empty


def is_in_4bit(parameter: torch.Tensor) -> bool:
    """Whether the numbers of a parameter are packed two to a byte."""
    if getattr(parameter, "quant_state", None) is not None:
        return True
    return getattr(parameter, STANDS_FOR, 0) > parameter.numel()
