"""Attention over a packed row on a CPU: the fused kernel, pair by pair, with nothing kept but what it was given.

Scores, softmax and sums are computed in float32, whatever the format of the row: for texts of this length that is
faster than 16-bit products on processors that have them, and more exact. Autograd would keep a copy of each piece of
the row, and of each prompt's keys and values twice; here the backward pass cuts the row again.

Memory grows with the tokens, not with their square. A completion behind its prompt attends to the prompt and to itself
in two calls that need no mask, put together by their normalizers: softmax over both is the mean of the two, weighted by
the shares exp(normalizer) of the whole, and the backward pass of each call is exact when it is given the normalizer and
the values of the whole. Under a sliding window, blocks of queries attend to the keys they see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Lengths = tuple[int, int, int]  # tokens of prompt, chosen and rejected
Spans = Sequence[tuple[int, Lengths]]  # the start of each pair, and its lengths
Mask = Callable[[int, int, int], Tensor]
FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = f"{FORWARD}_backward"
SHORT = 256  # tokens of a pair: up to here one call with a mask is faster than one for each text
BLOCK = 512  # queries that attend in one call under a sliding window
Pieces = tuple[slice, ...]  # of the row


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel computes these: on a CPU, all heads of one width, the numbers of a head side by side."""
    return (
        query.device.type == "cpu"
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and query.size(-1) == key.size(-1) == value.size(-1)
        and all(hasattr(torch.ops.aten, name) for name in (FORWARD, BACKWARD))
    )


def attend_pair_by_pair(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    mask: Mask,
    scaling: float | None,
    window: int | None,
    kept: Kept | None = None,
) -> Tensor:
    """The attended values, shape (1, tokens, heads, width), of a packed row of pairs.

    Args:
        query: shape (1, heads, tokens, width); key and value may have fewer heads, each shared by a group.
        mask: gives, from (prompt, chosen, rejected), what is added to the scores of the tokens of a whole short pair.
            Float32, shape (tokens, tokens).
        window: a token of a long pair sees only those less than so many positions before it, and itself.
        kept: where the layer, which is computed again in the backward pass, finds what it attended to.
    """
    return _PairByPair.apply(query, key, value, spans, mask, scaling, window, kept)


class Kept:
    """The attended values and normalizers of a layer from its forward pass until the backward pass computes it again.

    They are as small as the layer's input, which checkpointing keeps, and attention is the slowest part to compute.
    """

    def __init__(self) -> None:
        self._found: tuple[Tensor, Tensor] | None = None
        self._version = 0

    def take(self) -> tuple[Tensor, Tensor] | None:
        """What was kept, in a backward pass, once; None where there is nothing, or somebody wrote over it."""
        if not _in_backward_pass() or self._found is None:
            return None
        found, self._found = self._found, None
        return found if found[0]._version == self._version else None

    def put(self, attended: Tensor, normalizers: Tensor) -> None:
        """Keeps them, in a forward pass."""
        if not _in_backward_pass():
            self._found, self._version = (attended.detach(), normalizers), attended._version


def _in_backward_pass() -> bool:
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks


@dataclass(frozen=True)
class _Text:
    """Tokens that attend together. Of each call: where its keys stand in the row, and its options."""

    own: slice
    calls: tuple[tuple[Pieces, dict[str, Any]], ...]


class _PairByPair(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spans: Spans,
        mask: Mask,
        scaling: float | None,
        window: int | None,
        kept: Kept | None,
    ) -> Tensor:
        found = kept.take() if kept is not None else None
        row, normalizers = found or attend(query, key, value, spans, mask, scaling, window)
        if kept is not None and any(ctx.needs_input_grad):
            kept.put(row, normalizers)
        ctx.save_for_backward(query, key, value, row, normalizers)
        ctx.arguments = (spans, mask, scaling, window)
        return row

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *attend_backward(grad, ctx.saved_tensors, *ctx.arguments), *[None] * 5


def attend(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, mask: Mask, scaling: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """The attended values, shape (1, tokens, heads, width), and the normalizers, (1, heads, tokens), float32.

    Arguments as in `attend_pair_by_pair`; without gradient.
    """
    kernel = getattr(torch.ops.aten, FORWARD)
    queries, keys, values = query.float(), key.float(), value.float()
    row = queries.new_empty(1, query.size(2), query.size(1), query.size(3))
    attended = row.transpose(1, 2)
    normalizers, own = [], slice(0, 0)
    for text in _texts(spans, mask, scaling, window):
        own = text.own
        found = [
            kernel(queries[:, :, own], _read(keys, pieces), _read(values, pieces), **options)
            for pieces, options in text.calls
        ]
        attended[:, :, own], normalizer = found[0] if len(found) == 1 else _together(*found)
        normalizers.append(normalizer)
    row[:, own.stop :] = 0  # what fills the row up
    normalizers.append(queries.new_zeros(*queries.shape[:2], query.size(2) - own.stop))
    return row.to(query.dtype), torch.cat(normalizers, dim=-1)


def attend_backward(
    grad: Tensor,
    saved: tuple[Tensor, ...],
    spans: Spans,
    mask: Mask,
    scaling: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient by query, key and value, from that of the attended values.

    Args:
        saved: query, key and value, the attended values and the normalizers.
    """
    query, key, value, row, normalizers = saved
    kernel = getattr(torch.ops.aten, BACKWARD)
    grad, attended = grad.transpose(1, 2).float(), row.transpose(1, 2).float()
    queries, keys, values = query.float(), key.float(), value.float()
    by_query, by_key, by_value = (torch.zeros_like(part, dtype=torch.float32) for part in (query, key, value))
    for text in _texts(spans, mask, scaling, window):
        own = text.own
        for pieces, options in text.calls:
            by_own, *by_rest = kernel(
                grad[:, :, own],
                queries[:, :, own],
                _read(keys, pieces),
                _read(values, pieces),
                attended[:, :, own],
                normalizers[:, :, own].contiguous(),
                **{"dropout_p": 0.0, "is_causal": False} | options,
            )
            by_query[:, :, own] += by_own
            for target, gradient in zip((by_key, by_value), by_rest, strict=True):
                _add_to(target, pieces, gradient)
    return by_query.to(query.dtype), by_key.to(key.dtype), by_value.to(value.dtype)


def _texts(spans: Spans, mask: Mask, scaling: float | None, window: int | None) -> Iterator[_Text]:
    """What attends together, in the order of the row; one mask at a time is in memory."""
    plain, causal = {"scale": scaling}, {"scale": scaling, "is_causal": True}
    for start, (prompt, chosen, rejected) in spans:
        middle, end = start + prompt + chosen, start + prompt + chosen + rejected
        before, first, second = slice(start, start + prompt), slice(start, middle), slice(middle, end)
        if end - start <= SHORT:
            options = {"scale": scaling, "attn_mask": mask(prompt, chosen, rejected)}
            yield _Text(slice(start, end), (((slice(start, end),), options),))
        elif window is None or window >= prompt + max(chosen, rejected):
            yield _Text(first, (((first,), causal),))
            yield _Text(second, (((before,), plain), ((second,), causal)))
        else:
            yield from _blocks((first,), 0, scaling, window)
            yield from _blocks((before, second), prompt, scaling, window)


def _blocks(text: Pieces, offset: int, scaling: float | None, window: int) -> Iterator[_Text]:
    """The last piece of a text in blocks, each with the keys that its window reaches. `offset`: tokens before it."""
    length = text[-1].stop - text[-1].start
    for begin in range(0, length, BLOCK):
        own = slice(text[-1].start + begin, text[-1].start + min(begin + BLOCK, length))
        here = torch.arange(offset + begin, offset + begin + own.stop - own.start)
        nearest = max(0, offset + begin - window + 1)
        keys = torch.arange(nearest, int(here[-1]) + 1)
        distance = here.unsqueeze(1) - keys
        added = torch.zeros(distance.shape).masked_fill_((distance < 0) | (distance >= window), -torch.inf)
        pieces: Pieces = (slice(text[-1].start + max(0, nearest - offset), own.stop),)
        if nearest < offset:
            pieces = (slice(text[0].start + nearest, text[0].stop), *pieces)
        yield _Text(own, ((pieces, {"scale": scaling, "attn_mask": added}),))


def _together(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attended values and normalizers over the keys of two calls."""
    normalizer = torch.logaddexp(one[1], other[1])
    return torch.lerp(other[0], one[0], (one[1] - normalizer).exp_().unsqueeze(-1)), normalizer


def _read(row: Tensor, pieces: Pieces) -> Tensor:
    parts = [row[:, :, piece] for piece in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _add_to(row: Tensor, pieces: Pieces, gradient: Tensor) -> None:
    sizes = [piece.stop - piece.start for piece in pieces]
    for piece, part in zip(pieces, gradient.split(sizes, dim=2), strict=True):
        row[:, :, piece] += part
