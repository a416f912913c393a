"""The last layer makes of a prompt's tokens their keys and values alone: nothing reads what else it would make of them.

Only the positions that predict a token of a response reach the output head. Behind the attention of the last layer
every token is on its own, so queries, output projection and MLP are computed there for the tokens that are read. In a
model of 8 layers, half of whose tokens are prompts, that is a twentieth of all operations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from utils.models.shared_prefix import PairLayout

QUERIES, OUTPUTS = ("q_proj",), ("o_proj", "out_proj", "dense", "c_proj")  # what attention modules call them
MLP = "mlp"
MOST_READ = 0.75  # of a row: where more is read, the copies of what is read take more memory than leaving out saves


def leave_out_prompts(model: torch.nn.Module, where_it_pays: bool = False) -> LeftOut | None:
    """Lets the last layer of a causal language model leave out what is not read of packed rows.

    Other inputs (padded batches, generation) are computed in full. An MLP of experts stays whole: its load-balancing
    loss counts all tokens.

    Args:
        where_it_pays: not in rows of which nearly all is read; a trial leaves out everywhere.

    Returns:
        What says where it is done, and undoes it; None where the layer has no part of its own that could be left out.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    attention = _attention_of(layers[-1]) if layers else None
    if attention is None:
        return None
    parts = [child for name, child in attention.named_children() if name in QUERIES + OUTPUTS]
    parts += [child for name, child in layers[-1].named_children() if name == MLP and not _has_experts(child)]
    return LeftOut(attention, parts, where_it_pays) if parts else None


def _attention_of(layer: torch.nn.Module) -> torch.nn.Module | None:
    return next((child for child in layer.children() if type(child).__name__.endswith("Attention")), None)


def _has_experts(mlp: torch.nn.Module) -> bool:
    return any("expert" in name for name, _ in mlp.named_modules())


class LeftOut:
    """What the last layer leaves out; its attention comes before the parts that ask, also when it is recomputed."""

    def __init__(self, attention: torch.nn.Module, parts: list[torch.nn.Module], where_it_pays: bool):
        self.where_it_pays = where_it_pays
        self._layout: weakref.ref[PairLayout] | None = None  # of the row at hand, which lives as long as its batch
        self._handle = attention.register_forward_pre_hook(self._note, with_kwargs=True)
        self._before = [(part, part.__dict__.get("forward")) for part in parts]
        for part in parts:
            part.forward = _InPart(part.forward, self)

    def undo(self) -> None:
        """The layer computes everything again."""
        self._handle.remove()
        for part, forward in self._before:
            del part.forward
            if forward is not None:
                part.forward = forward

    def _note(self, _module: Any, _arguments: Any, options: dict[str, Any]) -> None:
        layout = options.get("pair_layout")
        self._layout = weakref.ref(layout) if layout is not None else None

    def rows_read(self, hidden: Tensor) -> Tensor | None:
        """Which rows of hidden states, shape (1, tokens, width), are to be computed; None: all."""
        layout = self._layout() if self._layout is not None else None
        if layout is None or hidden.shape[:-1] != (1, layout.tokens):
            return None
        rows = layout.read_rows(hidden.device)
        return None if self.where_it_pays and len(rows) > MOST_READ * layout.tokens else rows


class _InPart:
    """The forward of a module that treats each token on its own, for those that are read; zero for the others."""

    def __init__(self, whole: Callable[..., Tensor], left_out: LeftOut):
        self.whole, self.left_out = whole, left_out

    def __call__(self, hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
        rows = self.left_out.rows_read(hidden)
        if rows is None:
            return self.whole(hidden, *arguments, **options)
        made = self.whole(hidden.index_select(1, rows), *arguments, **options)
        return made.new_zeros(1, hidden.size(1), made.size(-1)).index_copy_(1, rows, made)
