"""Proves on real pairs that a model computes faster layouts as it computes plain rows, before it trains in them.

In float32 two ways of computing the same agree to a fixed tolerance. In 16-bit formats every model rounds by another
amount, so that amount is measured: the plain rows are scored again with each embedding moved by no more than its own
rounding step, which rolls all roundings behind it anew. A right layout moves log-probs about as far as that does (0.3
to 1.2 times, over 22 architectures in bfloat16 and float16); a wrong one 4 to 2800 times as far.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .head import MARK, SMALLEST_CHUNK, LogitShape
from .memory import ran_out_of_memory
from .scoring import output_head, score_tokens
from .shared_prefix import shared_prefix_active

# In float32: the largest and the mean difference of a token's log-prob, in nats, and the gradient's, of its norm.
LARGEST, MEAN, GRADIENT = 2e-3, 1e-4, 1e-3
# In 16-bit formats: how many times as far as rounding two right ways may be apart, on average and for a single token.
TIMES_ROUNDING, TIMES_LARGEST = 2.0, 8.0
LONG = 2048  # tokens of a padded row
EXPERT = re.compile(r"expert\w*\.\d+\.")  # in the name of a weight
SAMPLE = 2**14  # numbers of a parameter's gradient that are compared
# What gradients are proven by, so that a trial does not take more memory than training: tokens of prompt, chosen and
# rejected, and logits of the plain rows, which are all made at once before the head is proven.
ENOUGH, ENOUGH_LOGITS = 256, 2**23

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """How models are tried: as they will compute in training."""

    computing: Callable[[], Any]  # gives the context (autocast)
    step: float | None = None  # the relative rounding step of the 16-bit format, where there is one

    @contextlib.contextmanager
    def on(self, model: torch.nn.Module) -> Iterator[None]:
        """Within the context the model evaluates, in the precision of training."""
        was_training = model.training
        model.eval()
        try:
            with self.computing():
                yield
        finally:
            model.train(was_training)

    @contextlib.contextmanager
    def recomputing(self, model: torch.nn.Module) -> Iterator[None]:
        """Within the context, layers that training recomputes in the backward pass are recomputed, all else evaluates.

        A layer with dropout of its own keeps its activations: it would draw noise.
        """
        layers = [
            module
            for module in model.modules()
            if isinstance(module, GradientCheckpointingLayer)
            and module.gradient_checkpointing
            and not any("drop" in name and isinstance(value, float) and value for name, value in vars(module).items())
        ]
        before = [layer.training for layer in layers]
        for layer in layers:
            layer.training = True  # of the layer alone, not of what is in it
        try:
            yield
        finally:
            for layer, was_training in zip(layers, before, strict=True):
                layer.training = was_training

    def disagree(self, model: torch.nn.Module, one: Tensor, other: Tensor, again: Callable[[], Tensor]) -> str | None:
        """What tells the log-probs of two ways of computing apart; None when rounding can make it.

        Args:
            one: log-probs of tokens, shape (tokens,), as `again` computes them.
        """
        difference = (one - other).abs()
        largest, mean = difference.max().item(), difference.mean().item()
        if not torch.isfinite(difference).all():
            return "its log-probs are not finite"
        if self.step is None:
            return f"its log-probs differ by up to {largest:.2g}" if largest > LARGEST or mean > MEAN else None
        with _rounded_anew(model, self.step):
            rounding = (again() - one).abs()
        usual, most = rounding.mean().item(), rounding.max().item()
        if mean > max(TIMES_ROUNDING * usual, MEAN):
            return f"its log-probs differ by {mean:.2g} on average, where rounding makes {usual:.2g},"
        if largest > max(TIMES_LARGEST * most, LARGEST):
            return f"its log-probs differ by up to {largest:.2g}, where rounding makes {most:.2g},"
        return None

    def gradient_rounding(
        self, model: torch.nn.Module, gradient: dict[str, Tensor], again: Callable[[], dict[str, Tensor]]
    ) -> float:
        """How far apart the gradients of two right ways may be, as a share of the norm."""
        if self.step is None:
            return GRADIENT
        with _rounded_anew(model, self.step):
            return max(GRADIENT, TIMES_ROUNDING * _apart(gradient, again()))


@contextlib.contextmanager
def _rounded_anew(model: PreTrainedModel, step: float) -> Iterator[None]:
    """Within the context each number of the model's embeddings is up to one rounding step off."""
    generator = torch.Generator().manual_seed(0)

    def move(_module: Any, _inputs: Any, embedded: Tensor) -> Tensor:
        signs = torch.randint(-1, 2, embedded.shape, generator=generator).to(embedded.device)
        return (embedded.float() * (1 + step * signs)).to(embedded.dtype)

    handle = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def most_of_trial(model: PreTrainedModel, rows: int, *, head: bool = False) -> int:
    """How many tokens of each part of a pair, or of a row, are enough to prove gradients by.

    Args:
        rows: completions that are computed at once.
        head: whether it is the head that is proven, against all logits at once.
    """
    if not head:
        return ENOUGH
    return min(ENOUGH, max(SMALLEST_CHUNK + 1, ENOUGH_LOGITS // (rows * model.config.get_text_config().vocab_size)))


@torch.no_grad()
def find_mismatch(model: torch.nn.Module, packed: Batch, padded: Batch, trial: Trial) -> str | None:
    """Scores the same pairs in both layouts; None when they agree to rounding, else why the layout cannot be used.

    Args:
        model: the policy or the reference, as it will compute.
        packed, padded: the same pairs in the two layouts.
    """
    try:
        with trial.on(model):
            plain = _log_probs(model, padded)
            with shared_prefix_active(model):
                shared = _log_probs(model, packed)
            fault = trial.disagree(model, plain, shared, lambda: _log_probs(model, padded))
    except Exception as error:
        if ran_out_of_memory(error):
            raise
        # Whatever a model's own code makes of a layout it does not know, the padded batches remain.
        return f"its attention does not support the layout ({describe_error(error)})"
    return fault and f"{fault} from those of plain rows"


def let_head_score_in_chunks(model: torch.nn.Module, batch: Batch, trial: Trial) -> bool:
    """Marks the model's output head to be applied in chunks from now on, if on this batch that gives the same scores.

    A head of another kind than a plain linear layer, or logits that the model changes in a way that its config does
    not name, stay with the model's own code.

    Returns:
        Whether the head is marked.
    """
    head = output_head(model)
    if type(head) is not torch.nn.Linear or hasattr(head, "_hf_hook"):
        return False
    trained = any(parameter.requires_grad for parameter in model.parameters())
    proven = False
    try:
        shape = LogitShape.of(model.config)
        with trial.on(model), trial.recomputing(model):
            plain = _log_probs(model, batch)
            gradient = _gradient(model, batch) if trained else {}
            allowed = trial.gradient_rounding(model, gradient, lambda: _gradient(model, batch)) if trained else 0
            setattr(head, MARK, shape)
            proven = not trial.disagree(model, _log_probs(model, batch), plain, lambda: _log_probs(model, batch))
            proven = proven and (not trained or _apart(gradient, _gradient(model, batch)) <= allowed)
    except Exception as error:
        if ran_out_of_memory(error):
            raise
        proven = False  # whatever the model's own code makes of it, its own logits remain
    finally:
        _forget_gradients(model)
        if hasattr(head, MARK) and not proven:
            delattr(head, MARK)
    return proven


def find_gradient_mismatch(model: torch.nn.Module, packed: Batch, padded: Batch, trial: Trial) -> str | None:
    """Takes the gradient of the same pairs in both layouts; None when the two agree to rounding, else why not.

    For kernels whose backward pass is code of its own. Arguments as in `find_mismatch`; the model has no gradients
    before or after.
    """
    try:
        with trial.on(model), trial.recomputing(model):
            plain = _gradient(model, padded)
            with shared_prefix_active(model):
                shared = _gradient(model, packed)
            allowed = trial.gradient_rounding(model, plain, lambda: _gradient(model, padded))
    except Exception as error:
        if ran_out_of_memory(error):
            raise
        return f"its backward pass does not support the layout ({describe_error(error)})"
    finally:
        _forget_gradients(model)
    share = _apart(plain, shared)
    if not share <= allowed:
        return f"its gradient differs by {share:.2g} of its norm from that of plain rows"
    return None


def find_fault_of_compiled(model: torch.nn.Module, batch: Batch, trial: Trial, plain: Callable[[], Any]) -> str | None:
    """Computes a batch by compiled layers and by the model's own code; None when they agree to rounding, else why not.

    Args:
        batch: in the layout that is trained in.
        plain: gives the context within which layers compute their own code.
    """
    attending = shared_prefix_active(model) if "layout" in batch else contextlib.nullcontext()
    trained = any(parameter.requires_grad for parameter in model.parameters())
    try:
        with trial.on(model), trial.recomputing(model), attending:
            with torch.no_grad(), plain():
                expected = _log_probs(model, batch)
            with torch.no_grad():
                found = _log_probs(model, batch)
                fault = trial.disagree(model, expected, found, lambda: _log_probs(model, batch))
            if fault is None and trained:
                with plain():
                    gradient = _gradient(model, batch)
                    allowed = trial.gradient_rounding(model, gradient, lambda: _gradient(model, batch))
                share = _apart(gradient, _gradient(model, batch))
                fault = None if share <= allowed else f"its gradient differs by {share:.2g} of its norm"
    except Exception as error:
        if ran_out_of_memory(error):
            raise
        return describe_error(error)
    finally:
        _forget_gradients(model)
    return fault and f"{fault} from those of the model's own code"


def gives_all_gradients(model: PreTrainedModel, batch: Batch, trial: Trial) -> bool:
    """Whether every trained weight gets a gradient from this batch, and will from any other; the model has none before
    or after.

    Not so where tokens choose among experts that are modules of their own, where layers are dropped at random, and in
    parts of a model that text does not come to.
    """
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    if getattr(model.config.get_text_config(), "layerdrop", 0) or any(map(EXPERT.search, trained)):
        return False
    if not trained:
        return True
    try:
        with trial.on(model), trial.recomputing(model):
            given = _gradient(model, batch)
    finally:
        _forget_gradients(model)
    return all(name in given for name in trained)


def describe_error(error: Exception) -> str:
    """An error in a phrase: its kind, and how its message begins. Of a compiler's error, what it met."""
    error = getattr(error, "inner_exception", error)
    first = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {first:.160}" if first else type(error).__name__


def _log_probs(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Of each completion token, shape (tokens,). Long padded rows are computed one by one: a batch of them would need
    a mask that grows with the square of their tokens."""
    device = next(model.parameters()).device  # before sharding not yet that of the batches
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    if "layout" in batch or batch["input_ids"].size(1) <= LONG:
        return _scored(model, batch)
    names = ("input_ids", "attention_mask", "completion_mask")
    rows = [[batch[name][index, : int(mask.sum())].unsqueeze(0) for name in names]
            for index, mask in enumerate(batch["attention_mask"])]  # fmt: skip
    return torch.cat([_scored(model, dict(zip(names, row, strict=True))) for row in rows])


def _scored(model: torch.nn.Module, batch: Batch) -> Tensor:
    scores = score_tokens(model, batch)
    return scores.log_probs[scores.mask.bool()]


def _gradient(model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Of each parameter a sample of the gradient of a sum of log-probs in which each token weighs differently.

    A sample, since several whole gradients would take more memory than training does.
    """
    _forget_gradients(model)
    log_probs = _log_probs(model, batch)
    weights = torch.arange(len(log_probs), device=log_probs.device).cos()
    (log_probs * weights).sum().backward()
    return {
        name: value.grad.flatten()[:: max(1, -(-value.grad.numel() // SAMPLE))].float().clone()
        for name, value in model.named_parameters()
        if value.grad is not None
    }


def _apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The norm of the difference of two gradients, as a share of the first's norm."""
    # A parameter that the other has no gradient for counts as zero there.
    difference = torch.stack([(other.get(name, 0) - value).norm() for name, value in one.items()]).norm()
    return (difference / torch.stack([value.norm() for value in one.values()]).norm()).item()


def _forget_gradients(model: torch.nn.Module) -> None:
    for parameter in model.parameters():  # a DeepSpeed engine has a zero_grad of its own, which does something else
        parameter.grad = None
