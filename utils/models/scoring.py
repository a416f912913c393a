"""Log-probs of completions, from one forward pass in which only completion tokens are put to the output head.

The model's own forward does everything, so that each architecture's scaling or capping of logits is kept; a hook in
front of the output head leaves out the hidden states of prompts and padding, whose logits nobody reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TokenScores:
    """What a forward pass says of each completion token; tensors of shape (rows, length - 1), zero elsewhere."""

    log_probs: Tensor  # nats, float32
    right: Tensor  # whether the token is the likeliest one
    log_sum_sq_probs: Tensor | None  # log of the sum of squared probabilities, where asked for
    auxiliary: Tensor | None  # load-balancing loss of a mixture of experts, a scalar, where asked for


def score_tokens(
    model: torch.nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    *,
    with_squares: bool = False,
    with_auxiliary: bool = False,
) -> TokenScores:
    """Scores the completion tokens of padded rows with one forward pass.

    Args:
        model: a causal language model, wrapped or not.
        input_ids, attention_mask, completion_mask: shape (rows, length); a row's first token is never scored.
        with_squares: also give `log_sum_sq_probs` (without gradient).
        with_auxiliary: also ask the model for its load-balancing loss.
    """
    mask = completion_mask[:, 1:].bool()
    options: dict[str, Any] = {"output_router_logits": True} if with_auxiliary else {}
    with _only_positions_before(model, mask):
        outputs = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **options)
    logits = outputs.logits.squeeze(0).float()  # (tokens, vocabulary)
    labels = input_ids[:, 1:][mask]
    normalizer = logits.logsumexp(dim=-1)
    log_probs = logits.gather(1, labels.unsqueeze(1)).squeeze(1) - normalizer
    squares = None
    if with_squares:
        squares = _spread(((2 * logits).logsumexp(dim=-1) - 2 * normalizer).detach(), mask)
    return TokenScores(
        log_probs=_spread(log_probs, mask),
        right=_spread((logits.detach().argmax(dim=-1) == labels).float(), mask),
        log_sum_sq_probs=squares,
        auxiliary=outputs.aux_loss if with_auxiliary else None,
    )


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """The values of the masked positions, in the shape of the mask, zero elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


@contextlib.contextmanager
def _only_positions_before(model: torch.nn.Module, mask: Tensor) -> Iterator[None]:
    """Within the context the output head sees only the hidden states that predict a masked token.

    `mask` has shape (rows, length - 1) and speaks of tokens 1 and later; the hidden state before each predicts it.
    """

    def select(head: torch.nn.Module, inputs: Mapping[int, Tensor]) -> tuple[Tensor]:
        hidden = inputs[0]
        # Virtual tokens of prompt-learning adapters stand in front of the real ones; nothing follows the last token.
        positions = F.pad(mask, (hidden.size(1) - mask.size(1) - 1, 1))
        return (hidden[positions.to(hidden.device)].unsqueeze(0),)

    handle = output_head(model).register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def output_head(model: torch.nn.Module) -> torch.nn.Module:
    """The module that turns hidden states into logits, inside whatever wraps the model."""
    while not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):
        model = model.module
    return model.get_output_embeddings()
