"""--torch_compile: the layers of policy and reference are compiled, and proven before they train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch._dynamo.utils import counters

from ..engine.compiled import CompiledLayers
from ..engine.last_layer import LeftOut
from ..engine.proving import describe_error, find_fault_of_compiled
from ..errors import UserError
from ..runtime import say
from .machine import Machine


def take_over_compiling(accelerator: Any) -> dict[str, Any] | None:
    """What torch.compile is to be given, where that is asked for; None without. What wraps models then compiles none as
    a whole."""
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return None
    options = plugin.to_kwargs()
    plugin.backend = DynamoBackend.NO
    return options


class LayerCompiler:
    """Compiles layers one by one. `layers`: how many of the policy; `in_pieces`: with parts in between that the
    compiler does not take."""

    def __init__(self, machine: Machine, options: dict[str, Any] | None) -> None:
        self.machine, self.options = machine, options
        self.layers, self.in_pieces = 0, False

    @property
    def is_asked_for(self) -> bool:
        """Whether layers are compiled."""
        return self.options is not None

    def compile(self, batch: Mapping[str, Any], left_out: Mapping[torch.nn.Module, LeftOut] | None = None) -> None:
        """Compiles the layers of each model where that is asked for, and computes a batch both ways.

        Args:
            batch: in the layout that is trained in.
            left_out: what last layers leave out, by layer.

        Raises:
            UserError: they cannot be compiled, or compute something else then.
        """
        if self.options is None:
            return
        say("compiling the layers once, for rows of any length (--torch_compile); this takes a minute or two")
        breaks, models = counters["graph_break"].total(), self.machine.models()
        fault = next(filter(None, (self._compile(model, batch, left_out or {}) for model in models)), None)
        fault = self.machine.agree(fault)
        self.in_pieces = counters["graph_break"].total() > breaks
        if fault is not None:
            raise UserError(
                f"--torch_compile: the layers of this model cannot be compiled here ({fault}); leave it out"
            )

    def _compile(self, model: torch.nn.Module, batch: Mapping[str, Any], left_out: Mapping[Any, LeftOut]) -> str | None:
        try:
            layers = CompiledLayers(model, left_out, "layout" not in batch, self.options)
        except Exception as error:  # what torch makes of a backend or a mode, too
            return describe_error(error)
        if model is self.machine.policy:
            self.layers = layers.count
        fault = find_fault_of_compiled(model, batch, self.machine.trial(), layers.plain)
        return fault if fault or layers.served else "they are called with a cache"
