"""Attention over a whole packed row in one FlexAttention call: how the shared-prefix layout computes on a GPU.

A block mask, made from the lengths on the host, names the 128 x 128 blocks that hold anything to attend to; within
them three bounds for each query decide. The kernel is compiled a few times at the start, for rows of any length.

Kept from it is what would have it compiled again and again, until torch gives up and computes the plain way, in memory
that grows with the square of the tokens: a row has several blocks always, and what differs between layers is in tensors
instead of numbers (`tests/engine/test_flex.py` counts).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from .tables import send

BLOCK = 128
Lengths = tuple[int, int, int]  # tokens of prompt, chosen and rejected


def filling_of(tokens: int) -> int:
    """What a row of so many tokens is filled up with: to whole blocks, two at least."""
    return max(-tokens % BLOCK, 2 * BLOCK - tokens)


def fewest_filling(tokens: int) -> int:
    """What it must be filled up with: a row of one block is taken for one of generation, for which there is another
    kernel, and not one for every model."""
    return max(0, BLOCK + 1 - tokens)


@functools.cache
def _kernel(compiled: bool) -> Callable[..., Any]:
    if compiled:
        return compile_kernel()
    return flex_attention


def compile_kernel(**options: Any) -> Callable[..., Any]:
    """FlexAttention to be compiled as it is called, by `options` of torch.compile. Where it cannot be, calls raise."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.optimize_ddp = False  # which cuts graphs at the buckets of gradients
    torch.fx.experimental._config.use_duck_shape = False  # sizes that are equal by chance would be taken to be one
    return torch.compile(flex_attention, dynamic=True, fullgraph=True, **options)


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
    device = query.device
    if torch.is_autocast_enabled(device.type):  # as for torch's own attention; rotated ones are float32 then
        dtype = torch.get_autocast_dtype(device.type)
        query, key, value = (part.to(dtype) for part in (query, key, value))
    options: dict[str, Any] = {"block_mask": mask, "scale": scaling, "enable_gqa": True}
    if softcap is not None:
        # Traced, it is made in what is compiled around it.
        capping = _capping.__wrapped__ if torch.compiler.is_compiling() else _capping
        options["score_mod"] = capping(softcap, device)
    kernel = _kernel(query.is_cuda and not torch.compiler.is_compiling())
    if sinks is None:
        return kernel(query, key, value, **options)
    attended, found = kernel(query, key, value, **options, return_aux=AuxRequest(lse=True))
    # A sink takes part in the softmax and adds no value: the rest keeps the share exp(lse) / (exp(lse) + exp(sink)).
    share = torch.sigmoid(found.lse - sinks.float().view(1, -1, 1))
    return attended * share.unsqueeze(-1).to(attended.dtype)


@functools.cache
def _capping(softcap: float, device: torch.device) -> Callable[..., Tensor]:
    limit = torch.tensor(softcap, device=device)  # a number would not be compiled

    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return limit * torch.tanh(score / limit)

    return cap


def make_block_mask(lengths: Sequence[Lengths], filling: int, window: int | None, device: torch.device) -> BlockMask:
    """Which tokens of a packed row see which.

    A token sees those of its own pair that stand before it and belong to the prompt or to its own completion, with
    `window` only those less than so many positions back. Each of the `filling` tokens at the end sees itself.
    """
    firsts, ends, owns = bounds(lengths, filling, window)
    tokens = len(owns)
    starts = np.arange(0, tokens, BLOCK)
    count, blocks = len(starts), np.arange(len(starts))
    # All that the queries of a block see lies between the first key that one of them sees and the block itself.
    lowest = np.minimum.reduceat(np.where(firsts < ends, np.minimum(firsts, owns), owns), starts) // BLOCK
    seen = np.minimum(lowest[:, None] + blocks, count - 1)
    tables = [firsts, ends, owns, blocks - lowest + 1, seen]
    first, end, own, counts, indices = send([torch.from_numpy(table.astype(np.int32)) for table in tables], device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ((key >= first[query]) & (key < end[query])) | ((key >= own[query]) & (key <= query))

    return BlockMask.from_kv_blocks(
        counts.view(1, 1, -1),
        indices.view(1, 1, count, -1),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(tokens, tokens),
    )


def bounds(lengths: Sequence[Lengths], filling: int, window: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which keys each token of the row sees, by three numbers of shape (tokens,): of its prompt those from `first` to
    before `end`, and those from `own` to itself. A prompt's own tokens have no prompt beside."""
    sizes = np.array(lengths).ravel()  # of the parts, as they stand in the row
    part = np.repeat(np.arange(len(sizes)), sizes)
    begins = np.cumsum(sizes) - sizes
    prompt = part - part % 3
    row = np.arange(len(part))
    behind = np.where(part % 3 == 0, 0, sizes[prompt])
    position = row - begins[part] + behind
    farthest = position - (window or len(part)) + 1  # the first position that is near enough
    first = begins[prompt] + np.maximum(farthest, 0)
    end = begins[prompt] + behind
    own = begins[part] + np.maximum(farthest - behind, 0)
    filled = np.arange(len(part), len(part) + filling)
    first, end, own = (np.concatenate([values, filled]) for values in (first, end, own))
    return first, end, own
