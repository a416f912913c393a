"""Attention over a packed row on a CPU: the fused kernel, text by text, with nothing kept but what it was given.

Scores, softmax and sums are computed in float32, whatever the format of the row: for texts of this length that is
faster than 16-bit products on processors that have them, and more exact. Autograd would keep a copy of each piece of
the row, and of each prompt's keys and values twice; here the backward pass cuts the row again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Spans = Sequence[tuple[int, tuple[int, int, int]]]  # of each pair: its start; tokens of prompt, chosen, rejected
Mask = Callable[[int, int], Tensor | None]  # from the keys before the first query, and the queries
FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = f"{FORWARD}_backward"


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel computes these: on a CPU, all heads of one width."""
    return (
        query.device.type == "cpu"
        and query.size(-1) == key.size(-1) == value.size(-1)
        and all(hasattr(torch.ops.aten, name) for name in (FORWARD, BACKWARD))
    )


def attend_text_by_text(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, mask: Mask, scaling: float | None
) -> Tensor:
    """The attended values, shape (1, tokens, heads, width), of a packed row of pairs.

    Args:
        query: shape (1, heads, tokens, width); key and value may have fewer heads, each shared by a group.
        mask: gives what is added to the scores of a text's last queries, float32; None for a plain causal square.
    """
    return _TextByText.apply(query, key, value, spans, mask, scaling)


class _TextByText(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, spans, mask, scaling):
        attend = getattr(torch.ops.aten, FORWARD)
        row = query.new_empty(1, query.size(2), query.size(1), query.size(3))
        attended = row.transpose(1, 2)
        normalizers = []
        for text in _texts(spans):
            queries, keys, values = _read(query, text[-1:]), _read(key, text), _read(value, text)
            part, normalizer = attend(queries, keys, values, **_options(text, mask, scaling))
            attended[:, :, text[-1]] = part
            normalizers.append(normalizer)
        ctx.save_for_backward(query, key, value, row, *normalizers)
        ctx.spans, ctx.mask, ctx.scaling = spans, mask, scaling
        return row

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, row, *normalizers = ctx.saved_tensors
        attend_backward = getattr(torch.ops.aten, BACKWARD)
        grad, attended = grad.transpose(1, 2), row.transpose(1, 2)
        gradients = [torch.empty_like(part) for part in (query, key, value)]
        chosen: list[Tensor] = []
        for text, normalizer in zip(_texts(ctx.spans), normalizers, strict=True):
            by_query, by_key, by_value = attend_backward(
                _read(grad, text[-1:]),
                _read(query, text[-1:]),
                _read(key, text),
                _read(value, text),
                _read(attended, text[-1:]),
                normalizer,
                **{"dropout_p": 0.0, "is_causal": False} | _options(text, ctx.mask, ctx.scaling),
            )
            gradients[0][:, :, text[-1]] = by_query
            if len(text) == 1:  # prompt and chosen
                chosen = [by_key, by_value]
                continue
            prompt = text[0].stop - text[0].start
            for target, first, second in zip(gradients[1:], chosen, (by_key, by_value), strict=True):
                first[:, :, :prompt] += second[:, :, :prompt]
                target[:, :, text[0].start : text[1].start] = first
                target[:, :, text[1]] = second[:, :, prompt:]
        return *gradients, None, None, None


def _texts(spans: Spans) -> list[tuple[slice, ...]]:
    """Where in the row the keys of each text stand, two texts to a pair; the last piece is also its queries."""
    texts: list[tuple[slice, ...]] = []
    for start, (prompt, chosen, rejected) in spans:
        middle = start + prompt + chosen
        texts += [(slice(start, middle),), (slice(start, start + prompt), slice(middle, middle + rejected))]
    return texts


def _read(row: Tensor, pieces: Sequence[slice]) -> Tensor:
    """Pieces of the row behind one another, in float32."""
    parts = [row[:, :, piece] for piece in pieces]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).float()


def _options(text: tuple[slice, ...], mask: Mask, scaling: float | None) -> dict:
    size = text[-1].stop - text[-1].start
    added = mask(text[0].stop - text[0].start if len(text) > 1 else 0, size)
    return {"is_causal": True, "scale": scaling} if added is None else {"attn_mask": added, "scale": scaling}
