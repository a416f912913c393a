"""Log-probs of completions, from one forward pass in which only completion tokens are put to the output head.

The model's own forward does everything, so that each architecture's scaling or capping of logits is kept; a hook in
front of the output head leaves out the hidden states of prompts and padding, whose logits nobody reads.

A batch is either padded (`input_ids`, `attention_mask`, `completion_mask`: one row per completion) or packed
(`input_ids`, `layout`: all pairs in one row, see `utils/engine/shared_prefix.py`). A padded one may say by `PLACES`
where its completion tokens are, for tensors that have no values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .head import MARK, HeadScores, KeptLogits, LogitShape, score_by_head, scores_in_chunks
from .shared_prefix import PairLayout

Batch = Mapping[str, Any]
PLACES = "completion_places"  # rows and columns of the completion tokens that something stands before, two tensors


@dataclass(frozen=True)
class TokenScores:
    """What a forward pass says of each completion token; tensors of shape (rows, length), zero outside `mask`."""

    mask: Tensor  # 1 on completion tokens
    log_probs: Tensor  # nats, float32
    right: Tensor | None  # whether the token is the likeliest one, where asked for
    log_sum_sq_probs: Tensor | None  # log of the sum of squared probabilities, where asked for
    last_ids: Tensor  # id of each completion's last token, shape (rows,)
    auxiliary: Tensor | None  # load-balancing loss of a mixture of experts, a scalar, where asked for
    divergence: Tensor | None  # KL from the other model's distribution over the next token, nats, where asked for
    logits: KeptLogits | None  # where asked for


@dataclass(frozen=True)
class Comparison:
    """What two models' distributions over the next token are compared by: one pass keeps its logits for the other."""

    keep: bool = False
    copied: bool = False  # the head's weight is whole only during the pass, as in sharded models
    against: KeptLogits | None = None

    def add_to(self, scores: HeadScores, logits: KeptLogits) -> None:
        """Adds to the scores of a pass its logits, or their divergence from the other's."""
        scores.logits = logits if self.keep else None
        scores.divergence = logits.divergence_from(self.against) if self.against is not None else None


def score_tokens(
    model: torch.nn.Module,
    batch: Batch,
    *,
    with_right: bool = False,
    with_squares: bool = False,
    with_auxiliary: bool = False,
    comparison: Comparison | None = None,
) -> TokenScores:
    """Scores the completion tokens of a batch with one forward pass.

    Args:
        model: a causal language model, wrapped or not.
        with_right: also give `right`.
        with_squares: also give `log_sum_sq_probs` (without gradient).
        with_auxiliary: also ask the model for its load-balancing loss.
        comparison: also keep the logits, or also give `divergence` from another model's.
    """
    read = _read_packed if "layout" in batch else _read_padded
    inputs, mask, places, labels, last_ids, select = read(batch)
    options: dict[str, Any] = {"output_router_logits": True} if with_auxiliary else {}
    asked = {"with_right": with_right, "with_squares": with_squares}
    head = output_head(model)
    if not scores_in_chunks(head):
        with _head_sees(head, select):
            outputs = model(**inputs, use_cache=False, **options)
        logits = outputs.logits.squeeze(0).float()
        scores = _score_logits(logits, labels, **asked)
        if comparison is not None:
            comparison.add_to(scores, KeptLogits(logits.detach()))
    else:
        with _head_scores(head, select, labels, asked, comparison) as found:
            outputs = model(**inputs, use_cache=False, **options)
        scores = found[0]
        # What the model made of the scores says nothing; it ties them to the model's output, as sharding needs it.
        scores.log_probs = scores.log_probs + 0.0 * outputs.logits.view(-1).float()
    return TokenScores(
        mask=mask.long(),
        log_probs=_spread(scores.log_probs, places, mask),
        right=_spread_asked(scores.right, places, mask),
        log_sum_sq_probs=_spread_asked(scores.log_sum_sq_probs, places, mask),
        last_ids=last_ids,
        auxiliary=outputs.aux_loss if with_auxiliary else None,
        divergence=_spread_asked(scores.divergence, places, mask),
        logits=scores.logits,
    )


def _score_logits(logits: Tensor, labels: Tensor, *, with_right: bool, with_squares: bool) -> HeadScores:
    """The same from logits of shape (tokens, vocabulary), whatever the model's own code made of its head's output."""
    log_probs = LogProbsOf.apply(logits, labels)
    with torch.no_grad():
        return HeadScores(
            log_probs,
            (logits.argmax(dim=-1) == labels).float() if with_right else None,
            (2 * logits).logsumexp(dim=-1) - 2 * logits.logsumexp(dim=-1) if with_squares else None,
        )


class LogProbsOf(torch.autograd.Function):
    """Log-probs of labels, shape (tokens,), from logits of shape (tokens, vocabulary), both float32.

    The gradient, one-hot minus softmax, is made in one buffer of the size of the logits; autograd would make three.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        normalizer = logits.logsumexp(dim=-1)
        ctx.save_for_backward(logits, labels, normalizer)
        return logits.gather(1, labels.unsqueeze(1)).squeeze(1) - normalizer

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, labels, normalizer = ctx.saved_tensors
        softmax = (logits - normalizer.unsqueeze(1)).exp_()
        gradient = softmax.mul_(-grad.unsqueeze(1))
        return gradient.scatter_add_(1, labels.unsqueeze(1), grad.unsqueeze(1)), None


Read = tuple[dict[str, Any], Tensor, Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]]


def _read_padded(batch: Batch) -> Read:
    """Inputs of the model; mask of completion tokens, and their places in it; labels and last ids; and what of the
    hidden states the head shall see."""
    ids, attended = batch["input_ids"], batch["attention_mask"]
    mask = batch["completion_mask"][:, 1:].bool()
    rows, before = batch[PLACES] if PLACES in batch else mask.nonzero(as_tuple=True)

    def select(hidden: Tensor) -> Tensor:
        # The state before each token predicts it. Virtual tokens of prompt-learning adapters stand in front.
        in_front = hidden.size(1) - ids.size(1)
        return hidden[rows.to(hidden.device), before.to(hidden.device) + in_front]

    last_ids = ids.gather(1, attended.sum(dim=1, keepdim=True) - 1).squeeze(1)
    places = rows * mask.size(1) + before
    return {"input_ids": ids, "attention_mask": attended}, mask, places, ids[rows, before + 1], last_ids, select


def _read_packed(batch: Batch) -> Read:
    """The same for pairs in one row; the order of the tokens is the layout's, chosen completions first."""
    ids, layout = batch["input_ids"], batch["layout"]
    tables = layout.tables(ids.device)
    mask = torch.arange(layout.longest_completion, device=ids.device) < tables.lengths.unsqueeze(1)
    labels = ids[0].index_select(0, tables.targets)
    inputs = {"input_ids": ids, "position_ids": tables.positions, "pair_layout": layout}

    def select(hidden: Tensor) -> Tensor:
        return hidden[0].index_select(0, tables.predictors.to(hidden.device))

    return inputs, mask, tables.places, labels, labels.index_select(0, tables.ends), select


def _spread(values: Tensor, places: Tensor, mask: Tensor) -> Tensor:
    """The values at their places in the mask, counted row by row, zero elsewhere. Not by the mask itself, whose sum a
    GPU would have to be waited for."""
    return values.new_zeros(mask.numel()).index_copy(0, places.to(values.device), values).view(mask.shape)


def _spread_asked(values: Tensor | None, places: Tensor, mask: Tensor) -> Tensor | None:
    return None if values is None else _spread(values, places, mask)


@contextlib.contextmanager
def _head_sees(head: torch.nn.Module, select: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context the output head gets only the selected hidden states, as one row."""
    handle = head.register_forward_pre_hook(lambda _, inputs: (select(inputs[0]).unsqueeze(0),))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _head_scores(
    head: torch.nn.Linear,
    select: Callable[[Tensor], Tensor],
    labels: Tensor,
    asked: dict[str, bool],
    comparison: Comparison | None,
) -> Iterator[list[HeadScores]]:
    """Within the context the output head scores the labels, and gives log-probs, (1, tokens, 1), in place of logits."""
    found: list[HeadScores] = []
    shape: LogitShape = getattr(head, MARK)

    def forward(hidden: Tensor) -> Tensor:
        selected = select(hidden).to(head.weight.device)
        found.append(score_by_head(head, selected, labels.to(selected.device), shape, **asked))
        if comparison is not None:
            comparison.add_to(found[0], KeptLogits.of_head(head, selected, shape, comparison.copied))
        return found[0].log_probs.view(1, -1, 1)

    before = vars(head).get("forward")
    vars(head)["forward"] = forward
    try:
        yield found
    finally:
        del head.forward
        if before is not None:
            vars(head)["forward"] = before


def output_head(model: PreTrainedModel) -> torch.nn.Module:
    """The module that turns hidden states into logits, inside whatever wraps the model."""
    while not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):
        model = model.module
    return model.get_output_embeddings()


def tokens_of(batch: Batch) -> tuple[int, int]:
    """Tokens that a batch of pairs puts through the model, and those of the same pairs as padded rows."""
    layout: PairLayout | None = batch.get("layout")
    computed = batch["input_ids"].numel()
    return computed, layout.tokens_padded if layout is not None else computed
