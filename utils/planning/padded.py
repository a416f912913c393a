"""Micro-batches of sft on paper: rows of a prompt and a completion, padded to the longest of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..engine.scoring import PLACES, score_tokens
from .paper_model import Way

PartLengths = tuple[int, ...]  # tokens of prompt, chosen and rejected of a pair; of sft, of prompt and completion


def padded_tokens(rows: Sequence[PartLengths]) -> int:
    """What a micro-batch of these rows puts through the model."""
    return len(rows) * max(map(sum, rows))


def mean_padded_length(lengths: Sequence[int], batch: int) -> float:
    """Tokens that a row takes, padding included, on average over shuffled micro-batches of so many rows."""
    ordered, count = np.sort(np.asarray(lengths, dtype=np.float64)), len(lengths)
    batch = min(batch, count)
    # The share of batches that hold none of the rows longer than the k-th: C(k, batch) / C(count, batch).
    ranks, share = np.arange(1, count + 1), np.ones(count)
    for drawn in range(batch):
        share *= np.clip(ranks - drawn, 0, None) / (count - drawn)
    return float(ordered @ np.diff(share, prepend=0.0))


def take_rows(way: Way, policy: torch.nn.Module, rows: Sequence[PartLengths]) -> None:
    """Forward and backward pass of one micro-batch, as `ImitationTrainer` computes it."""
    shape = (len(rows), max(map(sum, rows)))
    completion = sum(tokens for _, tokens in rows)
    ones = torch.ones(shape, dtype=torch.long)
    places = tuple(torch.zeros(completion, dtype=torch.long) for _ in range(2))
    batch = {"input_ids": ones, "attention_mask": ones.clone(), "completion_mask": ones.clone(), PLACES: places}
    with torch.autocast("cpu", way.dtype, enabled=way.dtype != torch.float32):
        log_probs = score_tokens(policy, batch, with_right=True).log_probs
    (-log_probs).sum().backward()


def attention_flops(config: Any, rows: Sequence[PartLengths]) -> int:
    """Operations of the attention of one micro-batch, forward and backward, over all of the padded rows: what walking
    through does not count."""
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    seen = len(rows) * max(map(sum, rows)) ** 2
    return round(7 * 2 * text.num_attention_heads * width * seen * text.num_hidden_layers)
