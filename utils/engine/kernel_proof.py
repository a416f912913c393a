"""Proves FlexAttention where the model is not yet on the device that will compute: by its attention alone.

Sharded models are tried on the host, attention pair by pair. What their layers ask of attention is noted then, and the
same is asked of both ways on the device, with random queries, keys and values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from .flex import filling_of
from .memory import ran_out_of_memory
from .proving import GRADIENT, Trial, describe_error
from .scoring import score_tokens
from .shared_prefix import Lengths, PairLayout, shared_prefix_active, shared_prefix_attention

NOTING = "shared_prefix_noted"
STEPS = 8  # rounding steps of a 16-bit format by which two right ways may be apart, as a share of the norm


@dataclass(frozen=True)
class AttentionCall:
    """What a layer asks of attention: (heads, width) of queries, keys and values, and options; sinks on the host."""

    shapes: tuple[tuple[int, int], ...]
    options: tuple[tuple[str, Any], ...]
    sinks: tuple[float, ...] | None

    @classmethod
    def of(cls, tensors: Sequence[Tensor], options: Mapping[str, Any]) -> AttentionCall:
        """From the tensors, shape (1, heads, tokens, width), and keyword arguments of a call."""
        named = {name: options.get(name) for name in ("scaling", "sliding_window", "softcap")}
        sinks = options.get("s_aux")
        return cls(
            tuple((part.size(1), part.size(3)) for part in tensors),
            tuple(named.items()),
            tuple(sinks.flatten().tolist()) if sinks is not None else None,
        )


_noted: set[AttentionCall] | None = None


def _note(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    if _noted is not None:
        _noted.add(AttentionCall.of((query, key, value), options))
    return shared_prefix_attention(module, query, key, value, mask, **options)


AttentionInterface.register(NOTING, _note)


@contextlib.contextmanager
def _noting(model: torch.nn.Module) -> Iterator[set[AttentionCall]]:
    global _noted
    _noted = set()
    try:
        with shared_prefix_active(model, NOTING):
            yield _noted
    finally:
        _noted = None


@torch.no_grad()
def attention_calls(model: torch.nn.Module, packed: Mapping[str, Any], trial: Trial) -> set[AttentionCall]:
    """What the layers of a model ask of attention for a packed row: each different call once."""
    device = next(model.parameters()).device
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in packed.items()}
    with trial.on(model), _noting(model) as found:
        score_tokens(model, batch)
    return found


def find_fault_of_kernel(
    calls: set[AttentionCall], lengths: tuple[Lengths, ...], device: torch.device, trial: Trial
) -> str | None:
    """Computes calls over a row of these pairs both ways on a device; None when values and gradients agree, else why
    FlexAttention is not used."""
    allowed = GRADIENT if trial.step is None else STEPS * trial.step
    try:
        for call in sorted(calls, key=repr):
            one, other = (_computed(call, lengths, flex, device, trial) for flex in (False, True))
            share = max(((a - b).norm() / a.norm()).item() for a, b in zip(one, other, strict=True))
            if not share <= allowed:
                return f"its attention differs by {share:.2g} of its norm"
    except Exception as error:
        if ran_out_of_memory(error):
            raise
        return f"it fails ({describe_error(error)})"
    return None


def _computed(
    call: AttentionCall, lengths: tuple[Lengths, ...], flex: bool, device: torch.device, trial: Trial
) -> list[Tensor]:
    """The attended values and their gradients by queries, keys and values; what fills the row up is left out."""
    tokens = sum(map(sum, lengths))
    layout = PairLayout(lengths, flex, filling_of(tokens))
    draw = torch.Generator().manual_seed(0)  # the same both ways
    query, key, value = (
        torch.randn(1, heads, layout.tokens, width, generator=draw).to(device).requires_grad_()
        for heads, width in call.shapes
    )
    options = dict(call.options)
    if call.sinks is not None:
        options["s_aux"] = torch.tensor(call.sinks, device=device)
    with trial.computing():
        attended, _ = shared_prefix_attention(None, query, key, value, None, pair_layout=layout, **options)
    attended = attended[:, :tokens].float()
    weights = torch.randn(attended.shape, generator=draw).to(device)
    gradients = torch.autograd.grad((attended * weights).sum(), (query, key, value))
    return [attended.detach(), *(gradient[:, :, :tokens].float() for gradient in gradients)]
