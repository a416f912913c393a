"""Layers compiled one by one, for --torch_compile.

The layers of a model are alike: what is compiled for one serves all of them. A model compiled as a whole would be
compiled anew for every batch, since attention over a packed row is cut where its pairs end. Here that is one operator
that the compiler does not look into (on a GPU it is FlexAttention, which it knows), and what else a batch says of
itself is prepared before the compiled part begins. Sizes are symbols, so that rows of any length share the code.

What generates text, with a cache that grows by a token at a time, is not compiled.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from . import cpu_attention
from .last_layer import LeftOut
from .shared_prefix import PairLayout, added_to_scores

MOST_GRAPHS = 64  # of one function: layers may differ, and each is computed with and without gradient, adapter, ...


class CompiledLayers:
    """The layers of a model, compiled when they are first computed, and on and on with what was compiled.

    Args:
        model: a causal language model whose layers take gradient checkpointing one by one.
        left_out: what layers leave out, by layer.
        padded: whether batches are padded rows; else packed ones alone are computed by compiled code.
        options: what torch.compile is given.

    Raises:
        ValueError: the model has no such layers.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        left_out: Mapping[torch.nn.Module, LeftOut],
        padded: bool,
        options: Mapping[str, Any],
    ) -> None:
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise ValueError("the model has no layers that can be compiled one by one")
        self.count = len(layers)
        self.padded, self.active = padded, True
        self.served = 0  # calls of layers that were computed by compiled code
        # Where attention looks for its window; a mask that no layer needs is made in vain.
        modules = [module for layer in layers for module in layer.modules()]
        configs = [module.config for module in modules if hasattr(module, "config")]
        self.windows = {getattr(place, "sliding_window", None) for place in (*modules, *configs)}
        import torch._inductor.config as inductor  # the compiler, which other runs need not import

        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
        torch._dynamo.config.optimize_ddp = False  # which cuts graphs at the buckets of gradients
        # What belongs to modules may have another size each time: the rows that the last layer computes.
        torch._dynamo.config.force_nn_module_property_static_shapes = False
        # Numbers between two operations keep the format that they have without a compiler: otherwise policy and
        # reference, compiled apart, would round apart.
        inductor.emulate_precision_casts = True
        torch.fx.experimental._config.use_duck_shape = False  # sizes that are equal by chance would be taken to be one
        for layer in layers:
            layer.forward = _CompiledForward(layer, self, left_out.get(layer), {**options, "dynamic": True})

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """Within the context the layers compute their own code, not what was compiled."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def serve(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
        """Whether compiled code computes a layer that is called with these arguments."""
        caching = any(isinstance(value, Cache) for value in (*arguments, *options.values()))
        if not self.active or caching or not (self.padded or options.get("pair_layout") is not None):
            return False
        self.served += 1
        return True


class _CompiledForward:
    """The forward of a layer: compiled where that serves, and recomputed in the backward pass where that is asked."""

    def __init__(
        self,
        layer: GradientCheckpointingLayer,
        layers: CompiledLayers,
        left_out: LeftOut | None,
        options: dict[str, Any],
    ) -> None:
        self.layer, self.layers, self.left_out = layer, layers, left_out
        own = type(layer).forward
        # Some releases of transformers recompute within `forward`, others around it.
        self.recomputes = own.__code__.co_name == "forward_with_checkpointing"
        self.compiled = torch.compile(types.MethodType(own.__wrapped__ if self.recomputes else own, layer), **options)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not self.layers.serve(arguments, options):
            return type(self.layer).forward(self.layer, *arguments, **options)
        if self.recomputes and self.layer.gradient_checkpointing and self.layer.training:
            return self.layer._gradient_checkpointing_func(functools.partial(self._compute, **options), *arguments)
        return self._compute(*arguments, **options)

    def _compute(self, *arguments: Any, **options: Any) -> Any:
        layout: PairLayout | None = options.get("pair_layout")
        device = next(value for value in (*arguments, *options.values()) if isinstance(value, Tensor)).device
        if layout is not None and layout.flex:
            for window in self.layers.windows:
                layout.block_mask(window, device)
        if self.left_out is not None:
            self.left_out.note(layout, device)
        return self.compiled(*arguments, **options)


@functools.lru_cache(maxsize=1)  # for all layers, forward and backward
def _layout_of(lengths: tuple[tuple[int, int, int], ...], filling: int) -> PairLayout:
    return PairLayout(lengths, filling=filling)


def _parts(table: Tensor, scaling: float | None, window: int | None) -> tuple[Any, ...]:
    """What attention pair by pair is told, from the table of the row (`PairLayout.table`)."""
    *lengths, (filling, _, _) = map(tuple, table.tolist())
    layout = _layout_of(tuple(lengths), filling)
    return list(layout.spans()), functools.partial(added_to_scores, layout, window=window), scaling, window


@torch.library.custom_op("preference::attend", mutates_args=())
def attend(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, scaling: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """`cpu_attention.attend_pair_by_pair` as one operator, which also gives the normalizers, (1, heads, tokens)."""
    return cpu_attention.attend(query, key, value, *_parts(table, scaling, window))


@attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, scaling: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    _, heads, tokens, width = query.shape
    return query.new_empty(1, tokens, heads, width), query.new_empty(1, heads, tokens, dtype=torch.float32)


@torch.library.custom_op("preference::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor,
    normalizers: Tensor,
    table: Tensor,
    scaling: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradient by query, key and value."""
    saved = (query, key, value, row, normalizers)
    found = cpu_attention.attend_backward(grad, saved, *_parts(table, scaling, window))
    by_query, by_key, by_value = (part.contiguous() for part in found)
    return by_query, by_key, by_value


@attend_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, table, ctx.scaling, ctx.window = inputs
    ctx.save_for_backward(query, key, value, *output, table)


def _backward(ctx: Any, grad: Tensor, _normalizers: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.preference.attend_backward(grad, *ctx.saved_tensors, ctx.scaling, ctx.window)
    return *found, None, None, None


attend.register_autograd(_backward, setup_context=_keep)
