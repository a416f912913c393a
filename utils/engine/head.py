"""The output head over completion tokens, some at a time: log-probs without the matrix of all logits.

With a large vocabulary that matrix is the largest tensor of a training step. Here it never exists whole, and where the
head is frozen (LoRA) its gradient is made in the forward pass, in the chunk at hand, so that nothing is computed twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

MARK = "_log_probs_in_chunks"  # the attribute of a head whose chunks were proven to give the model's own log-probs
CHUNK = {"cpu": 2**22}  # logits of a chunk: what a cache holds ...
CHUNK_ELSEWHERE = 2**27  # ... or what keeps a GPU busy
SMALLEST_CHUNK = 64  # tokens: each chunk reads the whole head once


@dataclass(frozen=True)
class LogitShape:
    """What a model makes of its head's output: `softcap * tanh(scale * output / softcap)`, or `scale * output`."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitShape:
        """As the config of an architecture names it (Cohere, Granite, Gemma)."""
        config = config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(float(scale), getattr(config, "final_logit_softcapping", None))

    def apply_(self, outputs: Tensor) -> Tensor:
        """The logits, in the memory of the head's outputs."""
        if self.softcap is None:
            return outputs if self.scale == 1 else outputs.mul_(self.scale)
        return outputs.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of the logits by the head's outputs."""
        return self.scale if self.softcap is None else self.scale * (1 - (logits / self.softcap) ** 2)


@dataclass
class HeadScores:
    """Of each token, shape (tokens,): its log-prob in nats, and what else was asked for (without gradient)."""

    log_probs: Tensor
    right: Tensor | None = None  # whether it is the likeliest
    log_sum_sq_probs: Tensor | None = None  # log of the sum of squared probabilities
    divergence: Tensor | None = None  # from the distribution of another model, in nats
    logits: KeptLogits | None = None


@dataclass(frozen=True)
class KeptLogits:
    """The logits of one forward pass for tokens, to be read once more, some tokens at a time and without gradient.

    Kept as the hidden states before the head, which are far smaller; as logits where a model makes them in its own way.
    """

    states: Tensor  # (tokens, width), or the logits, (tokens, vocabulary)
    columns: Tensor | None = None  # the head's weight, (vocabulary, width); None: `states` are the logits
    bias: Tensor | None = None
    shape: LogitShape = LogitShape()

    @classmethod
    def of_head(cls, head: torch.nn.Linear, hidden: Tensor, shape: LogitShape, copied: bool) -> KeptLogits:
        """Keeps hidden states, shape (tokens, width). `copied`: the head's weight is here only for the moment."""
        weight, bias = head.weight.detach(), head.bias.detach() if head.bias is not None else None
        states = _as_computed(hidden.detach())
        columns = weight.to(states.dtype, copy=copied)
        return cls(states, columns, bias.clone() if copied and bias is not None else bias, shape)

    def at(self, device: torch.device | str, columns: Tensor | None = None) -> KeptLogits:
        """The same on a device. `columns`: the head's weight where it is there already."""
        columns = self.columns if columns is None else columns
        columns, bias = (part if part is None else part.to(device) for part in (columns, self.bias))
        return KeptLogits(self.states.to(device), columns, bias, self.shape)

    @property
    def vocabulary(self) -> int:
        return len(self.columns) if self.columns is not None else self.states.size(1)

    def rows(self, rows: slice) -> Tensor:
        """Logits of some of the tokens, (tokens, vocabulary), float32."""
        if self.columns is None:
            return self.states[rows].float()
        return _logits(self.states[rows], self.columns, self.bias, self.shape)

    @torch.no_grad()
    def divergence_from(self, other: KeptLogits) -> Tensor:
        """KL(own || other) of the distributions over the next token at each position, shape (tokens,), in nats.

        Raises:
            ValueError: the vocabularies differ.
        """
        if self.vocabulary != other.vocabulary:
            raise ValueError(f"vocabularies of {self.vocabulary} and {other.vocabulary} tokens cannot be compared")
        found = self.states.new_empty(len(self.states), dtype=torch.float32)
        with torch.autocast(self.states.device.type, enabled=False):
            for rows in _chunks(self.states, self.vocabulary):
                own, others = (torch.log_softmax(kept.rows(rows), dim=1) for kept in (self, other))
                probabilities = own.exp()
                terms = own.sub_(others.to(own.device)).mul_(probabilities)
                found[rows] = terms.masked_fill_(probabilities == 0, 0).sum(dim=1)  # 0 * log 0 is 0
        return found


def scores_in_chunks(head: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    """Whether a head is marked to score labels in chunks, as linear layers alone are."""
    return hasattr(head, MARK)


def score_by_head(
    head: torch.nn.Linear, hidden: Tensor, labels: Tensor, shape: LogitShape, *, with_right: bool, with_squares: bool
) -> HeadScores:
    """Scores labels, shape (tokens,), from the hidden states before the head, shape (tokens, width)."""
    scores = _LogProbs.apply(_as_computed(hidden), head.weight, head.bias, labels, shape, with_right, with_squares)
    return HeadScores(scores[0], scores[1] if with_right else None, scores[2] if with_squares else None)


def _as_computed(hidden: Tensor) -> Tensor:
    """Hidden states in the format in which the head would compute here."""
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


class _LogProbs(torch.autograd.Function):
    """Log-probs of labels, float32, with their gradient by hidden states and, where they are trained, head weights.

    d log p / d logits is one-hot minus softmax. Products are computed in the format of the hidden states.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        shape: LogitShape,
        with_right: bool,
        with_squares: bool,
    ) -> tuple[Tensor, ...]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        trains_head = needs_weight or needs_bias
        log_probs = hidden.new_empty(len(labels), dtype=torch.float32)
        right, squares = (torch.empty_like(log_probs) if asked else None for asked in (with_right, with_squares))
        by_hidden = torch.empty_like(hidden) if needs_hidden and not trains_head else None
        with torch.autocast(hidden.device.type, enabled=False):
            columns = weight.to(hidden.dtype)
            for rows in _chunks(hidden, len(columns)):
                logits = _logits(hidden[rows], columns, bias, shape)
                slope = shape.slope(logits) if by_hidden is not None else 1.0
                if right is not None:
                    right[rows] = (logits.argmax(dim=1) == labels[rows]).float()
                own = logits.gather(1, labels[rows, None])[:, 0]
                largest = logits.amax(dim=1)
                powers = logits.sub_(largest[:, None]).exp_()
                total = powers.sum(dim=1)
                log_probs[rows] = own - largest - total.log()
                if squares is not None:
                    squares[rows] = powers.square().sum(dim=1).log() - 2 * total.log()
                if by_hidden is not None:
                    gradient = _one_hot_minus_(powers.div_(total[:, None]), labels[rows], slope)
                    by_hidden[rows] = gradient.to(hidden.dtype) @ columns
        ctx.shape = shape
        if trains_head:
            ctx.save_for_backward(hidden, weight, bias, labels, log_probs)
        else:
            ctx.save_for_backward(by_hidden)
        outputs = [value if value is not None else log_probs.new_empty(0) for value in (right, squares)]
        ctx.mark_non_differentiable(*outputs)
        return log_probs, *outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if len(saved) == 1:
            return (saved[0] * grad[:, None]).to(saved[0].dtype), *[None] * 6
        hidden, weight, bias, labels, log_probs = saved
        by_hidden = torch.empty_like(hidden)
        by_weight = torch.zeros_like(weight, dtype=torch.float32)
        by_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None else None
        columns = weight.to(hidden.dtype)
        for rows in _chunks(hidden, len(columns)):
            logits = _logits(hidden[rows], columns, bias, ctx.shape)
            slope = ctx.shape.slope(logits)
            normalizer = logits.gather(1, labels[rows, None]) - log_probs[rows, None]
            gradient = _one_hot_minus_(logits.sub_(normalizer).exp_(), labels[rows], slope).mul_(grad[rows, None])
            if by_bias is not None:
                by_bias += gradient.sum(dim=0)
            gradient = gradient.to(hidden.dtype)
            torch.mm(gradient, columns, out=by_hidden[rows])
            if by_weight.dtype == hidden.dtype:
                by_weight.addmm_(gradient.T, hidden[rows])
            else:
                by_weight += gradient.T @ hidden[rows]
        by_bias = by_bias.to(bias.dtype) if by_bias is not None else None
        return by_hidden, by_weight.to(weight.dtype), by_bias, *[None] * 4


@contextlib.contextmanager
def chunks_as_on(device_type: str) -> Iterator[None]:
    """Within the context, chunks on a CPU are as large as on that kind of device: for a step on paper."""
    before = CHUNK["cpu"]
    CHUNK["cpu"] = CHUNK.get(device_type, CHUNK_ELSEWHERE)
    try:
        yield
    finally:
        CHUNK["cpu"] = before


def _chunks(hidden: Tensor, vocabulary: int) -> Iterator[slice]:
    size = max(SMALLEST_CHUNK, CHUNK.get(hidden.device.type, CHUNK_ELSEWHERE) // vocabulary // 64 * 64)
    for start in range(0, len(hidden), size):
        yield slice(start, min(start + size, len(hidden)))


def _logits(hidden: Tensor, columns: Tensor, bias: Tensor | None, shape: LogitShape) -> Tensor:
    """Logits of a chunk, float32, in memory of their own.

    The product that a CPU takes in float32 lays those of one word side by side: a head has many more words than a chunk
    has tokens, and the library cuts the larger side better (1.1 to 1.6 times the speed at 64 to 256 tokens).
    """
    if bias is None and hidden.device.type == "cpu" and hidden.dtype == torch.float32:
        return shape.apply_((columns @ hidden.t()).t())
    return shape.apply_(F.linear(hidden, columns, bias.to(columns.dtype) if bias is not None else None).float())


def _one_hot_minus_(probabilities: Tensor, labels: Tensor, slope: Tensor | float) -> Tensor:
    """(one-hot - probabilities) * slope, in the memory of the probabilities."""
    gradient = probabilities.neg_()
    gradient[torch.arange(len(labels), device=labels.device), labels] += 1
    return gradient if isinstance(slope, float) and slope == 1 else gradient.mul_(slope)
