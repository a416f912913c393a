"""Training steps without the walks through all modules that the libraries take in each."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ..engine.switches import Switches, trained_already


class SparingSteps(Trainer):
    """The part of both trainers that looks once for what every step asks of the model's modules."""

    _switches: tuple[torch.nn.Module, Switches] | None = None  # and the model that they were found in
    _has_trained = False  # a step, for which all of the model was put in training mode
    _flops_of_token: int | None = None

    @property
    def switches(self) -> Switches:
        """Those of the model that is trained, inside whatever wraps it."""
        if self._switches is None or self._switches[0] is not self.model:  # what unwraps also walks through all modules
            self._switches = self.model, Switches(self.accelerator.unwrap_model(self.model))
        return self._switches[1]

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Forward and backward of a micro-batch, of a model that is in training mode from the step before on."""
        already = trained_already(model, self.switches.model) if self._has_trained else contextlib.nullcontext()
        with already:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._has_trained = True
        return loss

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """As its parent estimates it, who counts all weights for each batch."""
        if self._flops_of_token is None:
            self._flops_of_token = super().floating_point_ops({"input_ids": torch.zeros(1)})
        return self._flops_of_token * (inputs["input_ids"].numel() if "input_ids" in inputs else 0)
