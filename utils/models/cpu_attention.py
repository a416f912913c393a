"""Attention over a packed row on a CPU: the fused kernel, pair by pair, with nothing kept but what it was given.

Scores, softmax and sums are computed in float32, whatever the format of the row: for texts of this length that is
faster than 16-bit products on processors that have them, and more exact. Autograd would keep a copy of each piece of
the row, and of each prompt's keys and values twice; here the backward pass cuts the row again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Lengths = tuple[int, int, int]  # tokens of prompt, chosen and rejected
Spans = Sequence[tuple[int, Lengths]]  # the start of each pair, and its lengths
Mask = Callable[[int, int, int], Tensor | None]
FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = f"{FORWARD}_backward"
SHORT = 320  # tokens of a pair: up to here one call with a mask is faster than one for each text


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel computes these: on a CPU, all heads of one width, the numbers of a head side by side."""
    return (
        query.device.type == "cpu"
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and query.size(-1) == key.size(-1) == value.size(-1)
        and all(hasattr(torch.ops.aten, name) for name in (FORWARD, BACKWARD))
    )


def attend_pair_by_pair(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, mask: Mask, scaling: float | None
) -> Tensor:
    """The attended values, shape (1, tokens, heads, width), of a packed row of pairs.

    Args:
        query: shape (1, heads, tokens, width); key and value may have fewer heads, each shared by a group.
        mask: gives, from (prompt, chosen, rejected), what is added to the scores of the tokens of a whole pair; with
            0 for chosen, of a completion that stands behind a prompt; with 0 for rejected too, of one text, where
            None is a plain causal square. Float32, shape (queries, keys).
    """
    return _PairByPair.apply(query, key, value, spans, mask, scaling)


class _PairByPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, spans, mask, scaling):
        attend = getattr(torch.ops.aten, FORWARD)
        queries, keys, values = query.float(), key.float(), value.float()
        row = queries.new_empty(1, query.size(2), query.size(1), query.size(3))
        attended = row.transpose(1, 2)
        normalizers = []
        for text, options in _texts(spans, mask, scaling):
            part, normalizer = attend(queries[:, :, text[-1]], _read(keys, text), _read(values, text), **options)
            attended[:, :, text[-1]] = part
            normalizers.append(normalizer)
        row[:, text[-1].stop :] = 0  # what fills the row up
        row = row.to(query.dtype)
        ctx.save_for_backward(query, key, value, row, torch.cat(normalizers, dim=-1))
        ctx.arguments = (spans, mask, scaling)
        return row

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, row, normalizers = ctx.saved_tensors
        attend_backward = getattr(torch.ops.aten, BACKWARD)
        grad, attended = grad.transpose(1, 2).float(), row.transpose(1, 2).float()
        queries, keys, values = query.float(), key.float(), value.float()
        by_query, by_key, by_value = (torch.empty_like(part, dtype=torch.float32) for part in (query, key, value))
        for text, options in _texts(*ctx.arguments):
            own = text[-1]
            by_own, *by_rest = attend_backward(
                grad[:, :, own],
                queries[:, :, own],
                _read(keys, text),
                _read(values, text),
                attended[:, :, own],
                normalizers[:, :, own].contiguous(),
                **{"dropout_p": 0.0, "is_causal": False} | options,
            )
            by_query[:, :, own] = by_own
            for target, gradient in zip((by_key, by_value), by_rest, strict=True):
                if len(text) > 1:  # a prompt that its chosen completion saw before
                    prompt = text[0].stop - text[0].start
                    target[:, :, text[0]] += gradient[:, :, :prompt]
                    gradient = gradient[:, :, prompt:]
                target[:, :, own] = gradient
        for gradient in (by_query, by_key, by_value):
            gradient[:, :, own.stop :] = 0
        return by_query.to(query.dtype), by_key.to(key.dtype), by_value.to(value.dtype), None, None, None


def _texts(spans: Spans, mask: Mask, scaling: float | None) -> list[tuple[tuple[slice, ...], dict[str, Any]]]:
    """Of each call: where its keys stand in the row, the last piece being also its queries; and its options."""
    calls: list[tuple[tuple[slice, ...], Tensor | None]] = []
    for start, (prompt, chosen, rejected) in spans:
        middle, end = start + prompt + chosen, start + prompt + chosen + rejected
        if end - start <= SHORT:
            calls.append(((slice(start, end),), mask(prompt, chosen, rejected)))
        else:
            calls.append(((slice(start, middle),), mask(prompt + chosen, 0, 0)))
            calls.append(((slice(start, start + prompt), slice(middle, end)), mask(prompt, 0, rejected)))
    return [
        (pieces, {"scale": scaling, "is_causal": True} if added is None else {"scale": scaling, "attn_mask": added})
        for pieces, added in calls
    ]


def _read(row: Tensor, pieces: Sequence[slice]) -> Tensor:
    parts = [row[:, :, piece] for piece in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
