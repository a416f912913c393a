"""What each training step switches in a model: its adapter, the recomputation of its layers, training mode.

The libraries' own contexts walk through every module each time. With LoRA on all linear layers of a deep model that is
thousands of modules, several times a step, in which a GPU waits (`benchmarks/overhead.py`). Here the few that have a
switch are found once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from trl.trainer.utils import use_adapter

RECOMPUTES = "gradient_checkpointing"  # what modules call it


class Switches:
    """The switches of a model whose modules stay the same from here on."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model = model
        modules = list(model.modules())
        self._adapted = [module for module in modules if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        # Not by hasattr: PEFT's wrappers answer for what they wrap.
        self._recomputed = [
            module for module in modules if RECOMPUTES in vars(module) or hasattr(type(module), RECOMPUTES)
        ]
        self._layers = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]

    @contextlib.contextmanager
    def adapter(self, name: str | None) -> Iterator[None]:
        """Within the context the model computes with this adapter; None: without any.

        For passes without gradient: which weights are trained stays as it was.
        """
        config = self.model.peft_config[self.model.active_adapter]
        if config.is_prompt_learning or config.is_adaption_prompt:  # they do more than layers of their own
            with use_adapter(self.model, name):
                yield
            return
        attribute = "_disable_adapters" if name is None else "_active_adapter"
        before = [getattr(module, attribute) for module in self._adapted]
        for module in self._adapted:
            setattr(module, attribute, True if name is None else _active(module, name))
        try:
            yield
        finally:
            for module, value in zip(self._adapted, before, strict=True):
                setattr(module, attribute, value)

    @contextlib.contextmanager
    def nothing_recomputed(self) -> Iterator[None]:
        """Within the context no layer is recomputed in a backward pass: for passes without one."""
        switched_on = [module for module in self._recomputed if getattr(module, RECOMPUTES)]
        for module in switched_on:
            setattr(module, RECOMPUTES, False)
        try:
            yield
        finally:
            for module in switched_on:
                setattr(module, RECOMPUTES, True)

    def keep_last_layer(self) -> None:
        """Leaves the last layer out of gradient checkpointing: the backward pass begins with it, and needs at once
        what would be thrown away."""
        if self._layers:
            setattr(self._layers[-1], RECOMPUTES, False)


@contextlib.contextmanager
def trained_already(*models: torch.nn.Module) -> Iterator[None]:
    """Within the context `train()` does not walk through models that are in training mode: a model, and what it wraps.

    For models whose modules are in one mode, all together.
    """
    trained = list({id(model): model for model in models}.values()) if all(model.training for model in models) else []
    for model in trained:
        vars(model)["train"] = functools.partial(_stay, model)
    try:
        yield
    finally:
        for model in trained:
            del model.train


def _stay(model: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    return model if mode == model.training else type(model).train(model, mode)


def _active(module: torch.nn.Module, name: str) -> list[str]:
    """What is active in a module where this adapter is in the model; a wrapped module may have no copy of it."""
    return [] if isinstance(module, AuxiliaryTrainingWrapper) and name not in module._adapters else [name]
