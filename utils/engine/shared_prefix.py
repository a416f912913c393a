"""Pairs without padding, each prompt computed once: the shared-prefix layout and its attention.

A batch of pairs is one row of tokens: prompt, chosen, rejected, next prompt, ... Positions restart with each prompt,
and those of the rejected completion continue from the prompt's end. A token attends to its own pair's prompt and to
the earlier tokens of its own completion. Every token thus sees exactly what it would see in a row of its own.

The model's own code runs unchanged; it calls `shared_prefix_attention` for its attention while `shared_prefix_active`
holds, and hands the layout through as a keyword argument.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from . import cpu_attention
from .counted import plain_ids
from .cpu_attention import Kept
from .flex import attend_over_row, make_block_mask
from .tables import RowTables, send

NAME = "shared_prefix"
READ_MULTIPLE = 32  # tokens: bfloat16 products on a CPU are slower at other lengths
LARGEST_MASK = 2**21  # numbers: a longer text attends in blocks
Lengths = tuple[int, int, int]  # tokens of prompt, chosen and rejected


@dataclass(frozen=True)
class PairLayout:
    """Where each pair's prompt and completions stand in the packed row.

    `flex` chooses one FlexAttention call over the row in place of calls for each pair. `filling` tokens that nobody
    reads end the row. `masks` remembers what layers share; `kept`, what each attended to until the backward pass
    computes it again (None: it does not). `uncounted` are the row indices of completion tokens that do not count
    (utils/engine/counted.py): they are attended to, and of what is read in the end they are left out.
    """

    lengths: tuple[Lengths, ...]
    flex: bool = False
    filling: int = 0
    uncounted: tuple[int, ...] = ()
    masks: dict[Any, Any] = field(default_factory=dict, compare=False)
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict, compare=False)  # by window
    table: Tensor = field(init=False, compare=False)  # the lengths, and behind them (filling, 0, 0): for operators
    # For compiled code: the rows that the last layer computes, where those are fewer than all.
    rows_of_last: Tensor | None = field(init=False, default=None, compare=False)
    kept: dict[torch.nn.Module, Kept] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", torch.tensor([*self.lengths, (self.filling, 0, 0)]))

    def spans(self) -> Iterator[tuple[int, Lengths]]:
        """The start of each pair in the row, with its lengths."""
        start = 0
        for lengths in self.lengths:
            yield start, lengths
            start += sum(lengths)

    def kept_of(self, attention: torch.nn.Module | None) -> Kept | None:
        """What this layer attended to, where layers are computed again."""
        return None if self.kept is None or attention is None else self.kept.setdefault(attention, Kept())

    def block_mask(self, window: int | None, device: torch.device) -> BlockMask:
        """The mask for FlexAttention, made once for all layers with this window."""
        if window not in self.block_masks:
            self.block_masks[window] = make_block_mask(self.lengths, self.filling, window, device)
        return self.block_masks[window]

    @property
    def tokens(self) -> int:
        """Length of the packed row."""
        return sum(map(sum, self.lengths)) + self.filling

    @property
    def tokens_padded(self) -> int:
        """Tokens of the same pairs as a padded batch of 2 x pairs rows."""
        longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in self.lengths)
        return 2 * len(self.lengths) * longest

    def position_ids(self) -> Tensor:
        """Position of each token in its own text, shape (1, tokens)."""
        parts = []
        for prompt, chosen, rejected in self.lengths:
            parts += [torch.arange(prompt + chosen), torch.arange(prompt, prompt + rejected)]
        return torch.cat([*parts, torch.zeros(self.filling, dtype=torch.long)]).unsqueeze(0)

    def predictors(self) -> Tensor:
        """Row index of the token that predicts each completion token, chosen completions of all pairs first."""
        chosen_parts, rejected_parts = [], []
        for start, (prompt, chosen, rejected) in self.spans():
            last = start + prompt - 1
            chosen_parts.append(torch.arange(last, last + chosen))
            rejected_parts += [torch.tensor([last]), torch.arange(last + chosen + 1, last + chosen + rejected)]
        return torch.cat(chosen_parts + rejected_parts)[self._counted()]

    def targets(self) -> Tensor:
        """Row index of each completion token, in the order of `predictors`."""
        chosen_parts, rejected_parts = [], []
        for start, (prompt, chosen, rejected) in self.spans():
            begin = start + prompt
            chosen_parts.append(torch.arange(begin, begin + chosen))
            rejected_parts.append(torch.arange(begin + chosen, begin + chosen + rejected))
        return torch.cat(chosen_parts + rejected_parts)[self._counted()]

    def _counted(self) -> Tensor | slice:
        """Which of all completion tokens count, chosen completions of all pairs first."""
        if not self.uncounted:
            return slice(None)
        row = torch.ones(self.tokens, dtype=torch.bool)
        row[list(self.uncounted)] = False
        return row[dataclasses.replace(self, uncounted=()).targets()]

    def read_rows(self, device: torch.device | str = "cpu") -> Tensor:
        """Row indices of the tokens whose hidden states are read in the end (`predictors`), each once and in order,
        filled up with others to a multiple of READ_MULTIPLE where there are as many. Kept on each device."""
        if ("read", device) not in self.masks:
            read = np.zeros(self.tokens, dtype=bool)  # not a tensor: on paper those have no values
            for start, (prompt, chosen, rejected) in self.spans():
                begin = start + prompt
                read[begin - 1 : begin + chosen - 1] = read[begin + chosen : begin + chosen + rejected - 1] = True
            read[np.flatnonzero(~read)[: -int(read.sum()) % READ_MULTIPLE]] = True
            self.masks["read", device] = send([torch.from_numpy(np.flatnonzero(read))], torch.device(device))[0]
        return self.masks["read", device]

    def completion_lengths(self) -> Tensor:
        """Tokens of each completion that count, shape (2 x pairs,), chosen first."""
        return torch.tensor(self._sizes())

    def _sizes(self) -> list[int]:
        """The same as numbers: tensors on paper have no values."""
        chosen: list[int] = []
        rejected: list[int] = []
        for start, (prompt, first, second) in self.spans():
            middle = start + prompt + first
            for sizes, begin, length in ((chosen, start + prompt, first), (rejected, middle, second)):
                sizes.append(length - sum(begin <= place < begin + length for place in self.uncounted))
        return chosen + rejected

    @property
    def longest_completion(self) -> int:
        """Tokens that count of the completion with most of them."""
        return max(self._sizes())

    def tables(self, device: torch.device) -> RowTables:
        """Where the tokens stand, on a device; made once for each."""
        if ("tables", device) not in self.masks:
            longest, lengths = self.longest_completion, self.completion_lengths()
            places = [torch.arange(row * longest, row * longest + size) for row, size in enumerate(self._sizes())]
            own = [self.predictors(), self.targets(), torch.cat(places), lengths.cumsum(0) - 1, lengths]
            self.masks["tables", device] = RowTables(*send([self.position_ids(), *own], device))
        return self.masks["tables", device]


def pack_pairs(
    pairs: Sequence[tuple[list[int], list[int], list[int]]], flex: bool = False, filling: int = 0, keeps: bool = False
) -> tuple[Tensor, PairLayout]:
    """The packed row of token ids, shape (1, tokens), and its layout.

    Args:
        pairs: ids of prompt, chosen and rejected of each pair, with those that do not count as -1 - id; none may be
            empty.
        flex: whether to attend with FlexAttention.
        filling: tokens that nobody reads, at the end of the row.
        keeps: whether what is attended to is kept for layers that are computed again.
    """
    ids = [token for pair in pairs for part in pair for token in part]
    uncounted = tuple(place for place, token in enumerate(ids) if token < 0)
    ids = plain_ids(ids)
    row = torch.tensor([ids + ids[:1] * filling])
    lengths = tuple((len(prompt), len(chosen), len(rejected)) for prompt, chosen, rejected in pairs)
    return row, PairLayout(lengths, flex, filling, uncounted, kept={} if keeps else None)


def shared_prefix_attention(
    module: torch.nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    pair_layout: PairLayout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over a packed row: pair by pair, or in one call where the layout says so.

    Args:
        query: shape (1, heads, tokens, width); key and value may have fewer heads, each shared by a group.
        sliding_window: a token sees only the tokens less than this many positions before it, and itself.
        softcap: scores are capped as softcap * tanh(score / softcap).
        s_aux: one learned sink score per head, which takes part in the softmax and adds no value.

    Returns:
        The attended values, shape (1, tokens, heads, width), and no weights.
    """
    if pair_layout is None:
        raise ValueError("the shared-prefix attention needs the layout of the packed row")
    if pair_layout.flex and not dropout:
        mask = pair_layout.block_mask(sliding_window, query.device)
        attended = attend_over_row(query, key, value, mask, scaling=scaling, softcap=softcap, sinks=s_aux)
        return attended.transpose(1, 2), None
    if softcap is None and s_aux is None and not dropout and cpu_attention.takes(query, key, value):
        if torch.compiler.is_compiling():  # utils/engine/compiled.py
            arguments = (query, key, value, pair_layout.table, scaling, sliding_window)
            return torch.ops.preference.attend(*arguments)[0], None
        added = functools.partial(added_to_scores, pair_layout, window=sliding_window)
        spans = list(pair_layout.spans())
        kept = pair_layout.kept_of(module)
        attended = cpu_attention.attend_pair_by_pair(query, key, value, spans, added, scaling, sliding_window, kept)
        return attended, None
    options = {"scaling": scaling, "dropout": dropout, "softcap": softcap, "sinks": s_aux}
    return _attend_pair_by_pair(pair_layout, query, key, value, sliding_window, options), None


@torch.compiler.disable
def _attend_pair_by_pair(
    pair_layout: PairLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sliding_window: int | None,
    options: dict[str, Any],
) -> Tensor:
    """The same by calls for each text, for what no faster way takes: soft-capping, sinks, dropout, some GPUs."""
    key, value = (part.repeat_interleave(query.size(1) // key.size(1), dim=1) for part in (key, value))

    def attend(query: Tensor, key: Tensor, value: Tensor, offset: int) -> Tensor:
        return _attend_text(pair_layout, query, key, value, offset, sliding_window, **options)

    # Split, not sliced: the gradients of all pieces are then put together once, instead of added up one by one.
    pieces = [size for p, c, r in pair_layout.lengths for size in (p + c, r)] + [pair_layout.filling]
    queries, keys, values = (part.split(pieces, dim=2) for part in (query, key, value))
    parts = []
    for index, (prompt, _, _) in enumerate(pair_layout.lengths):
        first, second = 2 * index, 2 * index + 1
        parts.append(attend(queries[first], keys[first], values[first], 0))
        seen_keys, seen_values = (
            torch.cat([part[first][:, :, :prompt], part[second]], dim=2) for part in (keys, values)
        )
        parts.append(attend(queries[second], seen_keys, seen_values, prompt))
    parts.append(torch.zeros_like(queries[-1][..., :1]).expand(-1, -1, -1, value.size(-1)))
    return torch.cat(parts, dim=2).transpose(1, 2)


def _mask(layout: PairLayout, offset: int, length: int, like: Tensor, window: int | None) -> Tensor | None:
    """Which of `offset + length` keys each of the last `length` positions sees; None for a plain causal square."""
    if offset == 0 and (window is None or window >= length):
        return None
    if window is not None and window >= offset + length:
        window = None
    name = (offset, length, window)
    if name not in layout.masks:
        layout.masks[name] = _seen(offset, length, window, like.device)
    return layout.masks[name]


def _seen(offset: int, length: int, window: int | None, device: torch.device) -> Tensor:
    queries = torch.arange(offset, offset + length, device=device).unsqueeze(1)
    keys = torch.arange(offset + length, device=device)
    seen = keys <= queries
    return seen if window is None else seen & (queries - keys < window)


def added_to_scores(layout: PairLayout, prompt: int, chosen: int, rejected: int, window: int | None) -> Tensor:
    """What is added to the scores of a pair's tokens so that each sees what it may, float32: 0 there, minus infinity
    elsewhere."""
    name = ("added", prompt, chosen, rejected, window)
    if name in layout.masks:
        return layout.masks[name]
    part = torch.cat([torch.full((size,), number) for number, size in enumerate((prompt, chosen, rejected))])
    position = PairLayout(((prompt, chosen, rejected),)).position_ids()[0]
    seen = ((part == 0) | (part == part.unsqueeze(1))) & (position <= position.unsqueeze(1))
    if window is not None:
        seen &= position.unsqueeze(1) - position < window
    layout.masks[name] = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    return layout.masks[name]


def _attend_text(
    layout: PairLayout, query: Tensor, key: Tensor, value: Tensor, offset: int, window: int | None, **options: Any
) -> Tensor:
    """Attention of one text whose first `offset` tokens are keys alone. A long one attends in blocks of queries, which
    the backward pass computes again: scores, or a mask, of the whole text would grow with the square of its tokens."""
    length, keys = query.size(2), key.size(2)
    plain = options["softcap"] is None and options["sinks"] is None
    fused = plain and query.is_cuda and offset == 0 and (window is None or window >= length)
    if fused or length * keys <= LARGEST_MASK:
        return _attend(query, key, value, _mask(layout, offset, length, query, window), **options)
    size, parts = max(1, LARGEST_MASK // keys), []
    for begin in range(0, length, size):
        end = min(begin + size, length)
        nearest = 0 if window is None else max(0, offset + begin - window + 1)
        seen = _seen(offset + begin - nearest, end - begin, window, query.device)
        block = (query[:, :, begin:end], *(part[:, :, nearest : offset + end] for part in (key, value)), seen)
        parts.append(checkpoint(_attend, *block, use_reentrant=False, **options))
    return torch.cat(parts, dim=2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of one text, shape (1, heads, queries, width)."""
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=mask is None, scale=scaling)
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.size(-1) ** -0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(scores.size(0), -1, scores.size(2), 1).to(scores.dtype)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)[..., : key.size(2)]
    return F.dropout(weights, dropout) @ value


# No mask function is registered beside it: transformers then makes no mask, and the layout says all there is to say.
AttentionInterface.register(NAME, shared_prefix_attention)


@contextlib.contextmanager
def shared_prefix_active(model: torch.nn.Module, name: str = NAME) -> Iterator[None]:
    """Within the context, forward and backward passes of the model attend in the shared-prefix way.

    `name` is that of another attention function for the same layout.
    """
    configs = _configs_of(model)
    before = [getattr(config, "_attn_implementation", None) for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, former in zip(configs, before, strict=True):
            config._attn_implementation_internal = former


_CONFIGS: weakref.WeakKeyDictionary[torch.nn.Module, list[Any]] = weakref.WeakKeyDictionary()


def _configs_of(model: torch.nn.Module) -> list[Any]:
    """The configs of a model's modules, each once; found in one walk, since every training step asks."""
    if model not in _CONFIGS:
        found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
        _CONFIGS[model] = list(found.values())
    return _CONFIGS[model]
