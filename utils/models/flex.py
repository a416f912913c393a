"""Attention over a whole packed row in one FlexAttention call: how the shared-prefix layout computes on a GPU.

A block mask, made from the layout on the host, names the 128 x 128 blocks that hold anything to attend to; within
them a rule over pair, part and position decides. The kernel is compiled once, for rows of any length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128


@functools.cache
def _kernel(compiled: bool) -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def attend_over_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of a packed row, shape (1, heads, tokens, width); keys and values may have fewer heads.

    Compiled on a GPU; elsewhere computed the plain way, in memory that grows with the square of the tokens.
    """
    score_mod = None if softcap is None else _capping(softcap)
    attended, normalizer = _kernel(query.is_cuda)(
        query, key, value, score_mod=score_mod, block_mask=mask, scale=scaling, enable_gqa=True, return_lse=True
    )
    if sinks is None:
        return attended
    # A sink takes part in the softmax and adds no value: the rest keeps the share exp(lse) / (exp(lse) + exp(sink)).
    share = torch.sigmoid(normalizer - sinks.float().view(1, -1, 1))
    return attended * share.unsqueeze(-1).to(attended.dtype)


def _capping(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def make_block_mask(
    pair: Tensor, part: Tensor, position: Tensor, window: int | None, device: torch.device
) -> BlockMask:
    """Which tokens of a packed row see which.

    A token sees those of its own pair that stand before it and belong to the prompt or to its own completion, with
    `window` only those less than so many positions back.

    Args:
        pair, part, position: of each token, shape (tokens,), on the host: the number of its pair; 0 in a prompt, 1 in
            a chosen, 2 in a rejected completion; its position in its own text.
    """
    tokens = len(pair)
    starts = torch.arange(0, tokens, BLOCK)
    ends = (starts + BLOCK).clamp(max=tokens) - 1
    # Pairs stand in order: a block of keys holds something for a block of queries when its last pair is one of theirs.
    blocks = torch.arange(len(starts))
    occupied = (blocks.unsqueeze(0) <= blocks.unsqueeze(1)) & (pair[ends].unsqueeze(0) >= pair[starts].unsqueeze(1))
    counts = occupied.sum(dim=1, dtype=torch.int32)
    indices = occupied.int().argsort(dim=1, descending=True, stable=True).int()
    pair, part, position = (values.to(device, torch.int32) for values in (pair, part, position))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (pair[query] == pair[key]) & (key <= query)
        readable = (part[key] == 0) | (part[key] == part[query])
        near = position[query] - position[key] < (window or tokens)
        return own & readable & near

    return BlockMask.from_kv_blocks(
        counts.view(1, 1, -1).to(device),
        indices.view(1, 1, len(starts), -1).to(device),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(tokens, tokens),
    )
