"""The last layer makes of a prompt's tokens their keys and values alone: nothing reads what else it would make of them.

Only the positions that predict a token of a response reach the output head. Behind the attention of the last layer
every token is on its own, so queries, output projection and MLP are computed there for the tokens that are read. In a
model of 8 layers, half of whose tokens are prompts, that is a twentieth of all operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from .shared_prefix import PairLayout

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
    return LeftOut(layers[-1], attention, parts, where_it_pays) if parts else None


def _attention_of(layer: torch.nn.Module) -> torch.nn.Module | None:
    return next((child for child in layer.children() if type(child).__name__.endswith("Attention")), None)


def _has_experts(mlp: torch.nn.Module) -> bool:
    return any("expert" in name for name, _ in mlp.named_modules())


class LeftOut:
    """What the last layer leaves out; its attention comes before the parts that ask, also when it is recomputed."""

    def __init__(
        self, layer: torch.nn.Module, attention: torch.nn.Module, parts: list[torch.nn.Module], where_it_pays: bool
    ) -> None:
        self.layer, self.where_it_pays = layer, where_it_pays
        self._rows: Tensor | None = None  # of the row at hand that are computed; None: all
        self._tokens = 0  # of that row
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

    def _note(self, _module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        layout: PairLayout | None = options.get("pair_layout")
        if torch.compiler.is_compiling():  # it was noted before, and is taken from what a call is given
            self._rows = layout.rows_of_last if layout is not None else None
            return
        hidden = next(value for value in (*arguments, *options.values()) if isinstance(value, Tensor))
        self.note(layout, hidden.device)

    def note(self, layout: PairLayout | None, device: torch.device) -> None:
        """Says which row the layer is about to compute; None: something else."""
        self._rows, self._tokens = None, 0
        if layout is not None:
            rows = layout.read_rows(device)
            if not self.where_it_pays or len(rows) <= MOST_READ * layout.tokens:
                self._rows, self._tokens = rows, layout.tokens
            object.__setattr__(layout, "rows_of_last", self._rows)

    def rows_read(self, hidden: Tensor) -> Tensor | None:
        """Which rows of hidden states, shape (1, tokens, width), are to be computed; None: all."""
        if self._rows is None or hidden.dim() != 3 or hidden.size(0) != 1:
            return None
        # Compiled code, which is made for rows of any length, takes it from what it was made from.
        return self._rows if torch.compiler.is_compiling() or hidden.size(1) == self._tokens else None


class _InPart:
    """The forward of a module that treats each token on its own, for those that are read; zero for the others."""

    def __init__(self, whole: Callable[..., Tensor], left_out: LeftOut) -> None:
        self.whole, self.left_out = whole, left_out

    def __call__(self, hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
        rows = self.left_out.rows_read(hidden)
        if rows is None:
            return self.whole(hidden, *arguments, **options)
        made = self.whole(hidden.index_select(1, rows), *arguments, **options)
        return made.new_zeros(1, hidden.size(1), made.size(-1)).index_copy_(1, rows, made)
