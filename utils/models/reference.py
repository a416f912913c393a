"""What a policy is measured against: decided here, once, for all that train, plan, evaluate, compare and chat."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..runtime import Precision
from ..settings.training import ModelSettings, Settings
from .loading import read_frozen
from .sources import ModelSource, find_model
from .trained import TrainedModel


@dataclass(frozen=True)
class ReferencePlan:
    """What a policy is measured against, before anything of it is loaded.

    `kind` is one of
        none: nothing, as in sft: no reference is loaded, scored, planned or reported;
        model: another model, named by the person or by the record of a run;
        adapter: another adapter on the policy's base; in training the frozen copy of the one that it continues;
        base: the policy's base, with the adapter switched off;
        start: all the weights that training starts from.
    `source` is where its weights are, and `how` says all of it in a phrase, for the console and run.json.
    """

    kind: Literal["none", "model", "adapter", "base", "start"]
    source: ModelSource | None = None
    how: str | None = None
    in_4bit: bool = False
    own_model: bool = False  # whether it is a model of its own, beside the policy
    dtype: torch.dtype | None = None  # that such a model is held in, where not in 4 bits
    ahead: bool = False  # whether it scores all pairs before training, and is let go of then

    @property
    def is_start(self) -> bool:
        """Whether a policy that is trained starts as its reference, up to rounding."""
        return self.kind in ("adapter", "base", "start")

    @property
    def is_rounded(self) -> bool:
        """Whether it is the policy's start in fewer bits than the policy has."""
        return self.kind == "start" and self.in_4bit

    @property
    def place(self) -> str:
        """What computes it in each step: "model" (one of its own), "policy", "ahead" (nothing any more), or "none"."""
        if self.kind == "none":
            return "none"
        return "ahead" if self.ahead else "model" if self.own_model else "policy"

    def as_record(self) -> dict[str, Any]:
        """For run.json, where `TrainedModel` reads it."""
        model = None if self.source is None else dataclasses.asdict(self.source) | {"in_4bit": self.in_4bit}
        return {"reference": self.how, "reference_model": model}


@dataclass(frozen=True)
class Reference:
    """A reference that can compute: what it is, and its model; None where the policy itself gives it."""

    plan: ReferencePlan
    model: PreTrainedModel | PeftModel | None


NO_REFERENCE = ReferencePlan("none")


def choose_reference(
    settings: Settings,
    source: ModelSource,
    dtype: torch.dtype,
    pairs: int,
    processes: int,
    sharded: bool = False,
    find: Callable[[str, str], ModelSource] = find_model,
) -> ReferencePlan:
    """What a run of `train` or `sft` is measured against.

    In this order: a model that a flag names; a frozen copy of the adapter that training continues; the base with the
    new adapter switched off; the starting weights. Under --use_4bit these score themselves where that happens before
    training; what must stay in memory is a copy in 4 bits.

    Args:
        source: what training starts from.
        dtype: that matrix products are computed in.
        pairs: those that are trained on.
        processes: those that train.
        sharded: whether the policy's weights will lie in parts in several processes: it cannot score ahead then.
        find: finds the model that a flag names.

    Raises:
        UserError: the model that was named cannot be used.
    """
    if settings.verb == "sft":
        return NO_REFERENCE
    adapts, quantize = settings.lora.use_lora or source.adapter is not None, settings.model.use_4bit
    ahead, held = _scores_ahead(settings, adapts, pairs, processes), held_in(dtype, adapts, quantize)
    named = settings.model.named_reference
    if named is not None:
        other = find(*named)
        how = f"{other.name}{' in 4 bits' if quantize else ''}, frozen"
        plan = ReferencePlan("model", other, how, quantize, own_model=True, dtype=held)
    elif source.adapter is not None:
        how = f"a frozen copy of the adapter that training starts from ({source.adapter})"
        plan = ReferencePlan("adapter", source, how, quantize)
    elif adapts:
        plan = ReferencePlan("base", source, "the base model, with the adapter disabled", quantize)
    elif quantize and ahead:
        plan = ReferencePlan("start", source, "the initial weights", own_model=sharded, dtype=torch.float32)
    else:
        how = f"a frozen copy of the initial weights{' in 4 bits' if quantize else ''}"
        plan = ReferencePlan("start", source, how, quantize, own_model=True, dtype=held)
    if not ahead:
        return plan
    return dataclasses.replace(plan, how=f"{plan.how}, scored once before training", ahead=True)


def held_in(dtype: torch.dtype, adapts: bool, in_4bit: bool) -> torch.dtype:
    """The format of a reference that is a model of its own: like the policy's where nothing is quantized, so that both
    give the same numbers for the same weights.

    Args:
        dtype: that matrix products are computed in.
        adapts: whether the policy is an adapter on its base.
    """
    return dtype if adapts or in_4bit else torch.float32


def _scores_ahead(settings: Settings, adapts: bool, pairs: int, processes: int) -> bool:
    """Whether the reference scores all pairs before training.

    As asked with --precompute_ref_log_probs. Else where that costs less than scoring in every step, or as much and lets
    go of a second model; and where a reference that stays would have to be rounded to 4 bits.
    """
    training = settings.training
    if training.precompute_ref_log_probs is not None:
        return training.precompute_ref_log_probs
    if settings.trainer_fields.get("sync_ref_model"):
        return False
    named = settings.model.named_reference is not None
    if settings.model.use_4bit and not adapts and not named:
        return True
    step = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
    passes = training.num_train_epochs if training.max_steps <= 0 else training.max_steps * step / pairs
    own_model = named or not adapts
    return passes >= (1 if own_model else 2) and not settings.run.dry_run


def choose_reference_of_run(
    trained: TrainedModel, reference: ModelSource, settings: Settings, dtype: torch.dtype
) -> ReferencePlan:
    """The reference of a model that is evaluated: `reference`, held as the model's run held it.

    It shares the policy's base where the two are adapters of one, or it is that base itself, unless an adapter changes
    the base.

    Args:
        dtype: that matrix products are computed in.
    """
    policy, quantize = trained.source, settings.model.use_4bit
    adapts = policy.adapter is not None
    if not adapts and quantize and settings.given.isdisjoint(("use_4bit", "ref_model_name_or_path")) and trained.record:
        quantize = trained.reference_in_4bit  # a run that trained all weights may have kept none in 4 bits
    shares = adapts and not (policy.changes_base or reference.changes_base)
    if shares and (policy.base, policy.revision) == (reference.base, reference.revision):
        on_bits = " in 4 bits" if quantize else ""
        if reference.adapter is not None:
            how = f"the adapter {reference.adapter} on the same base{on_bits}"
            return ReferencePlan("adapter", reference, how, quantize)
        how = f"the base model {reference.base}{on_bits}, with the adapter disabled"
        return ReferencePlan("base", reference, how, quantize)
    how = f"{reference.name}{' in 4 bits' if quantize else ''}"
    held = held_in(dtype, adapts or not trained.record, quantize)  # full weights of a run are as it trained them
    return ReferencePlan("model", reference, how, quantize, own_model=True, dtype=held)


def load_reference(plan: ReferencePlan, settings: ModelSettings, precision: Precision) -> Reference:
    """The reference, with its model frozen."""
    if not plan.own_model:
        return Reference(plan, None)
    named = settings.named_reference if plan.kind == "model" else None
    flag = named[0] if named is not None else "--model_name_or_path"
    return Reference(plan, read_frozen(flag, plan.source, settings, precision, plan.dtype, plan.in_4bit))
