"""--torch_compile: the layers of policy and reference are compiled, and proven before they train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch._dynamo.utils import counters
from transformers import Trainer

from ..engine.compiled import CompiledLayers
from ..engine.last_layer import LeftOut
from ..engine.proving import describe_error, find_fault_of_compiled
from ..errors import UserError
from ..runtime import say


class CompilesLayers(Trainer):
    """The part of both trainers that compiles layers one by one, where their parent would compile the whole model."""

    compiled_layers = 0  # of the policy
    compiled_in_pieces = False  # with parts in between that the compiler does not take
    _compile_options: dict[str, Any] | None = None  # what torch.compile is given, where it is asked for

    def create_accelerator_and_postprocess(self) -> None:
        """As its parent, but what wraps models does not compile them as a whole."""
        super().create_accelerator_and_postprocess()
        plugin = self.accelerator.state.dynamo_plugin
        if plugin.backend != DynamoBackend.NO:
            self._compile_options = plugin.to_kwargs()
            plugin.backend = DynamoBackend.NO

    @property
    def compiles(self) -> bool:
        """Whether layers are compiled."""
        return self._compile_options is not None

    def compile_layers(
        self, batch: Mapping[str, Any], left_out: Mapping[torch.nn.Module, LeftOut] | None = None
    ) -> None:
        """Compiles the layers of each model where that is asked for, and computes a batch both ways.

        Args:
            batch: in the layout that is trained in.
            left_out: what last layers leave out, by layer.

        Raises:
            UserError: they cannot be compiled, or compute something else then.
        """
        if self._compile_options is None:
            return
        say("compiling the layers, once for rows of any length (--torch_compile); this takes a minute or two")
        breaks = counters["graph_break"].total()
        fault = next(filter(None, (self._compile(model, batch, left_out or {}) for model in self.models())), None)
        fault = self.agree(fault)
        self.compiled_in_pieces = counters["graph_break"].total() > breaks
        if fault is not None:
            raise UserError(
                f"--torch_compile: the layers of this model cannot be compiled here ({fault}); leave it out"
            )

    def _compile(self, model: torch.nn.Module, batch: Mapping[str, Any], left_out: Mapping[Any, LeftOut]) -> str | None:
        try:
            layers = CompiledLayers(model, left_out, "layout" not in batch, self._compile_options)
        except Exception as error:  # what torch makes of a backend or a mode, too
            return describe_error(error)
        if model is self.model:
            self.compiled_layers = layers.count
        fault = find_fault_of_compiled(model, batch, self.trial(), layers.plain)
        return fault if fault or layers.served else "they are called with a cache"
