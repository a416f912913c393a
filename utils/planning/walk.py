"""One optimizer step on paper: the real model and the real engine, on tensors that have a shape and no memory.

Forward pass, backward pass and optimizer are carried out by PyTorch's fake tensors, and what every operation would
allocate and compute is counted. So the count follows the architecture, the layout, autocast and checkpointing by
itself, for a model of any size, in seconds.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..engine.head import chunks_as_on
from ..engine.scoring import score_tokens
from ..engine.shared_prefix import NAME, PairLayout, shared_prefix_active
from ..errors import UserError
from ..models.counting import count_parameters
from .padded import PartLengths, padded_tokens, take_rows
from .paper_model import (
    STATE_BYTES,
    Way,
    give_values,
    make_policy,
    make_reference,
)

WEIGHTS, ADAPTER, GRADIENTS, OPTIMIZER = "weights", "adapter", "gradients", "optimizer"
ACTIVATIONS, LOGITS, REFERENCE = "activations", "logits", "reference"
PARTS = (WEIGHTS, ADAPTER, REFERENCE, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS)
# Phases of a step: until the first gradient is there; the layers of the backward pass; what comes before and after.
FORWARD, LAST, BETWEEN, FIRST, OUTSIDE, UPDATE = "forward", "last", "between", "first", "outside", "update"
ATTENTION = {True: "fused_on_paper", False: "pair_by_pair_on_paper"}  # by whether a GPU computes


@dataclass(frozen=True)
class Walk:
    """What one optimizer step takes on one device.

    `moments`: bytes by part when most is held in each phase of the step; each grows in proportion to the layers.
    `flops`: floating-point operations of one micro-batch, forward and backward, recomputation and reference included.
    """

    moments: Mapping[str, Mapping[str, int]]
    flops: int
    tokens: int
    parameters: int  # of the model without its adapter
    trainable: int
    largest_layer: int  # parameters of the largest module whose weights are whole at once under sharding
    offloaded: int = 0  # bytes of activations that are offloaded to CPU memory, apart from `moments`

    @property
    def parts(self) -> Mapping[str, int]:
        """Bytes by part at the moment when most is held."""
        return max(self.moments.values(), key=lambda parts: sum(parts.values()))

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


class Meter(TorchDispatchMode):
    """Counts bytes held, by part, and operations, of everything that is computed within."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.held: Counter[str] = Counter()
        self.moments: dict[str, Counter[str]] = {}  # of each phase, when most was held in it
        self.phase = FORWARD
        self.flops = 0
        self._vocabulary = vocabulary
        self._entries: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._hold(value)
        self.flops += count_flops(func, args, kwargs or {}, out)
        return out

    def _hold(self, value: Tensor) -> list[Any]:
        storage = value.untyped_storage()
        if storage in self._entries:
            return self._entries[storage]
        is_logits = value.dim() > 1 and value.size(-1) == self._vocabulary
        entry = self._entries[storage] = [LOGITS if is_logits else ACTIVATIONS, storage.nbytes()]
        weakref.finalize(storage, lambda: self._change(entry[0], -entry[1]))
        self._change(*entry)
        return entry

    @property
    def at_peak(self) -> Counter[str]:
        """Bytes by part at the moment when most was held."""
        return max(self.moments.values(), key=Counter.total)

    def _change(self, part: str, size: int) -> None:
        self.held[part] += size
        if size > 0 and (self.phase not in self.moments or self.held.total() > self.moments[self.phase].total()):
            self.moments[self.phase] = self.held.copy()

    def mark(self, values: Iterable[Tensor], part: str) -> None:
        """Says which part the memory of these tensors belongs to."""
        for value in values:
            entry = self._hold(value)
            self.held[entry[0]] -= entry[1]
            self.held[part] += entry[1]
            entry[0] = part


def count_flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating-point operations of one call: of matrix products; all else is small beside them."""
    packet = torch.ops.aten.addmm if func._overloadpacket is torch.ops.aten.addmm_ else func._overloadpacket
    formula = flop_registry.get(packet)  # which does not know products that are added in place
    return formula(*args, **kwargs, out_val=out) if formula is not None else 0


def walk_step(way: Way, pairs: Sequence[PartLengths], micro_batches: int = 1) -> Walk:
    """Walks through one optimizer step of so many micro-batches of these pairs.

    Args:
        pairs: tokens of prompt, chosen and rejected of the pairs of one micro-batch; of sft, of prompt and completion.
        micro_batches: those of an optimizer step.

    Raises:
        UserError: the model cannot be made from its config, or its code cannot be walked through.
    """
    policy, reference = make_policy(way), make_reference(way) if way.reference == "model" else None
    if way.imitates:
        tokens, take = padded_tokens(pairs), functools.partial(take_rows, way, policy, pairs)
    else:
        keeps = way.checkpointing and not way.on_gpu
        layout = PairLayout(tuple((p, c, r) for p, c, r in pairs), kept={} if keeps else None)
        tokens, take = layout.tokens, functools.partial(take_micro_batch, way, policy, reference, layout)
    counts, trained_names = count_parameters(policy), [n for n, p in policy.named_parameters() if p.requires_grad]
    layers = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
    meter = Meter(way.config.get_text_config().vocab_size)
    with warnings.catch_warnings(), chunks_as_on("cuda" if way.on_gpu else "cpu"), FakeTensorMode(), meter:
        warnings.simplefilter("ignore")
        _hold_models(meter, policy, reference)
        trained = [p for name, p in policy.named_parameters() if name in set(trained_names)]
        flops = _walk(meter, way, policy, trained, take, micro_batches)
    size = way.config.get_text_config()
    largest = max([sum(p.numel() for p in layer.parameters()) for layer in layers] or [0])
    return Walk(
        moments={phase: {part: held[part] for part in PARTS} for phase, held in meter.moments.items()},
        flops=flops,
        tokens=tokens,
        parameters=counts.total - counts.adapter,
        trainable=sum(p.numel() for p in trained),
        largest_layer=max(largest, size.vocab_size * size.hidden_size),
    )


def _hold_models(meter: Meter, policy: torch.nn.Module, reference: torch.nn.Module | None) -> None:
    for model, part in ((policy, WEIGHTS), (reference, REFERENCE)):
        if model is not None:
            give_values(model)
            meter.mark([*model.parameters(), *model.buffers()], part)
    meter.mark([p for name, p in policy.named_parameters() if "lora_" in name], ADAPTER)


def _walk(
    meter: Meter,
    way: Way,
    policy: torch.nn.Module,
    trained: list[torch.nn.Parameter],
    take: Callable[[], None],
    micro_batches: int,
) -> int:
    phases = phases_of_backward(policy)

    def take_gradient(parameter: torch.nn.Parameter) -> None:
        meter.phase = phases.get(id(parameter), meter.phase)
        meter.mark([parameter.grad], GRADIENTS)

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(take_gradient)
    flops = 0
    try:
        # The optimizer's states are there from the second step on, so the step that is walked through is a second one.
        optimizer = Optimizer(way.optim, trained)
        states = optimizer.start()
        meter.mark(states, OPTIMIZER)
        for _ in range(min(micro_batches, 2)):
            before, meter.phase = meter.flops, FORWARD
            take()
            flops = meter.flops - before
        meter.phase = UPDATE
        optimizer.step()
        del states
    except Exception as error:  # what a model's code does with tensors on paper has no end
        first = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise UserError(
            f"--model_name_or_path: a step of {way.config.model_type} cannot be estimated without running it "
            f"({first:.200}); {'sft' if way.imitates else 'train'} --dry_run runs a real one"
        ) from None
    return flops


def phases_of_backward(policy: torch.nn.Module) -> dict[int, str]:
    """Of each parameter, by its id, the phase that begins with its gradient.

    The backward pass comes to the last layer first. From layer to layer what is held changes by the same amount, so
    most is held in the last or in the first one, or outside of them.
    """
    layers = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
    phases = {id(parameter): OUTSIDE for parameter in policy.parameters()}
    for place, layer in enumerate(layers):
        phase = LAST if place == len(layers) - 1 else FIRST if place == 0 else BETWEEN
        phases |= {id(parameter): phase for parameter in layer.parameters()}
    return phases


def take_micro_batch(
    way: Way, policy: torch.nn.Module, reference: torch.nn.Module | None, layout: PairLayout, real: bool = False
) -> None:
    """Forward and backward pass of some pairs; `real`: with the attention that trains, not with that on paper."""
    batch = {"input_ids": torch.zeros(1, layout.tokens, dtype=torch.long), "layout": layout}
    autocast = torch.autocast("cpu", way.dtype, enabled=way.dtype != torch.float32)
    with contextlib.ExitStack() as stack:
        for model in (policy, reference):
            if model is not None:
                stack.enter_context(shared_prefix_active(model, NAME if real else ATTENTION[way.on_gpu]))
        with autocast:
            log_probs = score_tokens(policy, batch).log_probs.sum(dim=1)
            of_reference = _score_reference(way, policy, reference, batch)
        log_probs = log_probs - of_reference
        chosen, rejected = log_probs.chunk(2)
        torch.nn.functional.softplus(rejected - chosen).sum().backward()


def _score_reference(
    way: Way, policy: PreTrainedModel | PeftModel, reference: PreTrainedModel | None, batch: Mapping[str, Any]
) -> Tensor | float:
    if way.reference == "ahead":
        return 0.0
    switched_off = policy.disable_adapter() if reference is None else contextlib.nullcontext()
    with torch.no_grad(), switched_off:
        return score_tokens(reference or policy, batch).log_probs.sum(dim=1)


class Optimizer:
    """An optimizer by its name among transformers': AdamW is walked through, of others the states are held."""

    def __init__(self, name: str, trained: list[torch.nn.Parameter]) -> None:
        self._trained = trained
        self._bytes = STATE_BYTES.get(name)
        self._adamw = torch.optim.AdamW(trained, fused=True) if self._bytes is None else None

    def start(self) -> list[Tensor]:
        """The states, as a first step makes them."""
        if self._adamw is None:
            return [torch.empty(p.numel() * (self._bytes or 0), dtype=torch.uint8) for p in self._trained]
        for parameter in self._trained:
            parameter.grad = torch.empty_like(parameter)
        self.step()
        return [v for state in self._adamw.state.values() for v in state.values() if isinstance(v, Tensor)]

    def step(self) -> None:
        """Takes a step and lets go of the gradients."""
        if self._adamw is not None:
            self._adamw.step()
        for parameter in self._trained:
            parameter.grad = None


class _Attention(torch.autograd.Function):
    """What attention keeps: what it was given, what it gives, and one normalizer per head and token.

    On a CPU it computes in float32, of which it holds copies meanwhile.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, widened: bool, kept: Any) -> Tensor:
        out, normalizer = (kept and kept.take()) or _attended(query, key, value, widened)
        if kept is not None and any(ctx.needs_input_grad):
            kept.put(out, normalizer)
        ctx.save_for_backward(query, key, value, out, normalizer)
        ctx.widened = widened
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, _ = ctx.saved_tensors
        copies = [part.float() for part in (grad, out, query, key, value)] if ctx.widened else []
        dtype = torch.float32 if ctx.widened else query.dtype
        gradients = [torch.empty_like(part, dtype=dtype) for part in (query, key, value)]
        by_parts = [gradient.to(query.dtype) for gradient in gradients]
        del copies
        return (*by_parts, None, None)


def _attended(query: Tensor, key: Tensor, value: Tensor, widened: bool) -> tuple[Tensor, Tensor]:
    copies = [part.float() for part in (query, key, value)] if widened else []
    dtype = torch.float32 if widened else query.dtype
    out = query.new_empty(1, query.size(2), query.size(1), value.size(3), dtype=dtype)
    normalizer = query.new_empty(query.shape[:3], dtype=torch.float32)
    out = out.to(query.dtype)
    del copies
    return out, normalizer


def _fused(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value, False, None), None


def _pair_by_pair(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, pair_layout: Any = None, **__: Any
) -> tuple[Tensor, None]:
    kept = pair_layout.kept_of(module) if pair_layout is not None else None
    return _Attention.apply(query, key, value, True, kept), None


AttentionInterface.register(ATTENTION[True], _fused)
AttentionInterface.register(ATTENTION[False], _pair_by_pair)


def attention_flops(config: Any, pairs: Sequence[PartLengths]) -> int:
    """Operations of the attention of one micro-batch, forward and backward, by a kernel that leaves out what no token
    sees: what walking through does not count."""
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    seen = sum((p + c) ** 2 / 2 + r * (p + r / 2) for p, c, r in pairs)
    return round(7 * 2 * text.num_attention_heads * width * seen * text.num_hidden_layers)
