"""Proves on real pairs that a model computes the shared-prefix layout as it computes plain rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from utils.models.head import MARK, LogitShape
from utils.models.scoring import output_head, score_tokens
from utils.models.shared_prefix import shared_prefix_active

# Largest and mean difference of a token's log-prob, in nats, that rounding alone can make.
EXACT = (2e-3, 1e-4)  # float32
GRADIENT_EXACT, GRADIENT_ROUNDED = 1e-3, 0.1  # of the gradient's norm
ROUNDED = (1.0, 0.06)  # bfloat16 and float16: logits of 16 to 32 are spaced 0.125 apart in bfloat16

Batch = Mapping[str, Any]


@torch.no_grad()
def find_mismatch(
    model: torch.nn.Module, packed: Batch, padded: Batch, rounded: bool, computing: Callable[[], Any]
) -> str | None:
    """Scores the same pairs in both layouts; None when they agree to rounding, else why the layout cannot be used.

    Args:
        model: the policy or the reference, as it will compute.
        packed, padded: the same pairs in the two layouts.
        rounded: whether products are computed in a 16-bit format.
        computing: gives the context (autocast) in which the model computes in training.
    """
    was_training = model.training
    model.eval()
    try:
        with computing():
            plain = score_tokens(model, padded)
            with shared_prefix_active(model):
                shared = score_tokens(model, packed)
    except Exception as error:
        # Whatever a model's own code makes of a layout it does not know, the padded batches remain.
        return f"its attention does not take the layout ({type(error).__name__})"
    finally:
        model.train(was_training)
    difference = (shared.log_probs[shared.mask.bool()] - plain.log_probs[plain.mask.bool()]).abs()
    if _exceeds_rounding(difference, rounded):
        return f"its log-probs differ by up to {difference.max().item():.2g} from those of plain rows"
    return None


def _exceeds_rounding(difference: torch.Tensor, rounded: bool) -> bool:
    largest, mean = ROUNDED if rounded else EXACT
    return bool(not torch.isfinite(difference).all() or difference.max() > largest or difference.mean() > mean)


@torch.no_grad()
def let_head_score_in_chunks(model: torch.nn.Module, batch: Batch, rounded: bool, computing: Callable[[], Any]) -> bool:
    """Marks the model's output head to be applied in chunks from now on, if on this batch that gives the same scores.

    A head of another kind than a plain linear layer, or logits that the model changes in a way that its config does
    not name, stay with the model's own code. Arguments as in `find_mismatch`.

    Returns:
        Whether the head is marked.
    """
    head = output_head(model)
    if type(head) is not torch.nn.Linear or hasattr(head, "_hf_hook"):
        return False
    was_training = model.training
    model.eval()
    try:
        with computing():
            plain = score_tokens(model, batch)
            setattr(head, MARK, LogitShape.of(model.config))
            chunked = score_tokens(model, batch)
    finally:
        model.train(was_training)
    if _exceeds_rounding((chunked.log_probs - plain.log_probs).abs(), rounded):
        delattr(head, MARK)
    return hasattr(head, MARK)


def find_gradient_mismatch(
    model: torch.nn.Module, packed: Batch, padded: Batch, rounded: bool, computing: Callable[[], Any]
) -> str | None:
    """Takes the gradient of the same pairs in both layouts; None when the two agree to rounding, else why not.

    For kernels whose backward pass is code of its own. Arguments as in `find_mismatch`; the model has no gradients
    before or after.
    """
    was_training = model.training
    model.eval()
    try:
        with computing():
            plain = _gradient(model, padded)
            with shared_prefix_active(model):
                shared = _gradient(model, packed)
    except Exception as error:
        return f"its backward pass does not take the layout ({type(error).__name__})"
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    # A parameter that one of the two has no gradient for counts as zero there.
    difference = torch.stack([(shared.get(name, 0) - value).norm() for name, value in plain.items()]).norm()
    share = (difference / torch.stack([value.norm() for value in plain.values()]).norm()).item()
    if not share <= (GRADIENT_ROUNDED if rounded else GRADIENT_EXACT):
        return f"its gradient differs by {share:.2g} of its norm from that of plain rows"
    return None


def _gradient(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The gradient of a sum of log-probs in which each token weighs differently."""
    scores = score_tokens(model, batch)
    log_probs = scores.log_probs[scores.mask.bool()]
    weights = torch.arange(len(log_probs), device=log_probs.device).cos()
    model.zero_grad(set_to_none=True)
    (log_probs * weights).sum().backward()
    return {name: value.grad.float() for name, value in model.named_parameters() if value.grad is not None}
