"""Policy and reference as their run held them, in the trainer that scores pairs with both."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..errors import UserError
from ..models.loading import load_frozen, put_adapter
from ..models.reference import Reference, choose_reference_of_run, load_reference
from ..models.sources import ModelSource, looks_local
from ..models.trained import TrainedModel, as_in_run, find_trained
from ..runtime import Precision
from ..settings.training import GROUPS_OF_RUN, Settings
from ..training.context import Run
from ..training.making import make_preference_trainer
from ..training.reference import REFERENCE_ADAPTER
from ..training.trainer import PreferenceTrainer

MODEL_FLAG, REFERENCE_FLAG = "--model_name_or_path", "--ref_model_name_or_path"
AS_IN_RUN = (
    *("dtype", "attn_implementation", "use_4bit", "bnb_4bit_quant_type"),
    *("max_length", "truncation", "per_device_eval_batch_size", "chat_template_kwargs", "reasoning"),
)
AS_IN_PREFERENCE_RUN = (*(field.name for field in dataclasses.fields(GROUPS_OF_RUN["loss"])), "engine")


def settings_of_evaluation(settings: Settings, trained: TrainedModel) -> Settings:
    """The settings that pairs are scored with: those given, else those of the run, else the defaults of `train`."""
    preference = trained.record.get("verb") == "train"
    settings = as_in_run(settings, trained, AS_IN_RUN + (AS_IN_PREFERENCE_RUN if preference else ()))
    return dataclasses.replace(
        settings,
        verb="train",
        model=dataclasses.replace(settings.model, ref_model_name_or_path=None),  # found by `find_reference`
        training=dataclasses.replace(
            settings.training, precompute_ref_log_probs=False, gradient_checkpointing=False, max_tokens_per_batch=None
        ),
    )


def find_reference(settings: Settings, trained: TrainedModel) -> ModelSource:
    """What the model is measured against: as named, else the reference of its run.

    Raises:
        UserError: nothing says what it is, or it is not there any more.
    """
    named = settings.model.named_reference
    if named is not None:
        return find_trained(*named).source
    source = trained.reference
    if source is None:
        why = f"{trained.source.name} is not the folder of a run"
        if trained.record:
            why = f"the record of {trained.source.name} does not say what its reference was"
        raise UserError(f"{REFERENCE_FLAG} is missing: {why}; name the model to measure it against")
    for folder in (source.base, source.adapter):
        if folder is not None and looks_local(folder) and not Path(folder).is_dir():
            raise UserError(
                f"{MODEL_FLAG} {trained.source.name}: its reference {folder} is no longer there; move it back, or "
                f"name it with {REFERENCE_FLAG}"
            )
    return trained.find_reference()


def load_sides(
    trained: TrainedModel, reference: ModelSource, settings: Settings, precision: Precision
) -> tuple[PreTrainedModel | PeftModel, Reference]:
    """The policy and the reference, frozen. One base is loaded where the two are adapters of it, or one is itself,
    unless an adapter changes its base.

    Full weights of a run are float32, as it trained them; whatever else is in the computing precision, or in 4 bits
    where the run held it so.
    """
    source = trained.source
    adapts, plan = source.adapter is not None, choose_reference_of_run(trained, reference, settings, precision.dtype)
    held = precision.dtype if adapts or not trained.record else torch.float32
    in_4bit = settings.model.use_4bit and adapts
    policy = load_frozen(MODEL_FLAG, source, settings.model, precision, in_4bit, dtype=held)
    return policy, load_reference(plan, settings.model, precision)


def make_scorer(run: Run, policy: PreTrainedModel | PeftModel, reference: Reference, folder: Path) -> PreferenceTrainer:
    """The trainer of `train`, ready to score the rows; it trains nothing."""
    trainer = make_preference_trainer(run, policy, reference, folder)
    if reference.model is None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.delete_adapter(REFERENCE_ADAPTER)  # made as a copy of the policy's, which is where training would start
        if reference.plan.source.adapter is not None:
            put_adapter(model, reference.plan.source, REFERENCE_ADAPTER)
    return trainer
