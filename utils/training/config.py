"""Settings -> TRL's DPOConfig or SFTConfig, and the objective."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from trl import DPOConfig, SFTConfig

from ..distributed import PATIENCE
from ..objectives.losses import BY_NAME
from ..objectives.objective import Objective
from ..objectives.pairs import Divergence
from ..run.processes import count_processes, launched_with
from ..runtime import Precision
from ..settings.training import LossSettings, Settings
from ..settings.verbs import PlanSettings
from .early_stopping import SMALLER_IS_BETTER
from .refusals import refusals_explained

# verb -> learning rate without and with an adapter, where --learning_rate is not given
LEARNING_RATES = {"train": (1e-6, 5e-5), "sft": (2e-5, 2e-4)}
# Fields that are no matter of settings.
OURS: dict[str, Any] = {
    "max_length": None,  # rows are cut to length when they are tokenized
    "disable_tqdm": True,  # the console callback shows progress
    "log_level_replica": "error",  # of the libraries, as in the main process
    # A loss that is not finite must be seen, not replaced; and looking for it would wait for the GPU every step.
    "logging_nan_inf_filter": False,
    "remove_unused_columns": True,
    "ddp_timeout": PATIENCE,
}


def learning_rate(settings: Settings, adapts: bool) -> float:
    """The peak learning rate: as given, or the usual one for the verb and for what is trained."""
    if settings.training.learning_rate is not None:
        return settings.training.learning_rate
    return LEARNING_RATES[settings.verb][adapts]


def checkpoints_activations(settings: Settings, precision: Precision) -> bool:
    """Whether activations are recomputed in the backward pass."""
    wish = settings.training.gradient_checkpointing
    return precision.device.type != "cpu" if wish is None else wish


def rows_of_run(settings: Settings) -> int | None:
    """How many rows --max_steps trains on, in all processes; None without it. A dry run takes one step."""
    training = settings.training
    steps = 1 if settings.run.dry_run else training.max_steps
    if steps <= 0:
        return None
    step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return steps * step * count_processes()


def _values_of_flags(settings: Settings, precision: Precision) -> dict[str, Any]:
    """Fields of the configuration that flags and the precision decide."""
    training = settings.training
    return {
        "num_train_epochs": training.num_train_epochs,
        "max_steps": training.max_steps,
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "per_device_eval_batch_size": training.per_device_eval_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "gradient_checkpointing": checkpoints_activations(settings, precision),
        "torch_compile": training.torch_compile,
        "warmup_steps": training.warmup_steps,
        "lr_scheduler_type": training.lr_scheduler_type,
        "logging_steps": training.logging_steps,
        "save_steps": training.save_steps,
        "save_total_limit": training.save_total_limit,
        "seed": training.seed,
        "bf16": precision.name == "bfloat16",
        "fp16": precision.name == "float16",
        "use_cpu": precision.device.type == "cpu" and not launched_with("DEEPSPEED"),  # which chooses its device itself
        "report_to": list(settings.run.report_to) or "none",
        "run_name": settings.run.wandb_run_name or Path(settings.run.output_dir or "dry-run").name,
        "trust_remote_code": settings.model.trust_remote_code,
        "dataloader_pin_memory": precision.device.type == "cuda",
        "accelerator_config": {"non_blocking": precision.device.type == "cuda"},  # batches are not waited for
    }


def build_config(settings: Settings, precision: Precision, folder: Path, adapts: bool, evaluates: bool) -> Any:
    """The trainer's configuration. `folder` is where checkpoints go, `evaluates` whether there are held-out rows.

    Raises:
        UserError: a field's value is refused by TRL or transformers.
    """
    training, patience = settings.training, settings.training.early_stopping_patience
    values = _values_of_flags(settings, precision) | OURS
    values |= {"output_dir": str(folder), "learning_rate": learning_rate(settings, adapts)}
    if evaluates:
        values["eval_on_start"] = True
        if training.eval_steps is not None:
            values |= {"eval_strategy": "steps", "eval_steps": training.eval_steps}
    if patience is not None:
        name = training.early_stopping_metric
        values |= {"metric_for_best_model": name, "greater_is_better": not SMALLER_IS_BETTER[name]}
    if settings.run.dry_run:
        values |= {
            "max_steps": 2 if settings.of(PlanSettings).measure else 1,
            "save_strategy": "no",
            "eval_strategy": "no",
            "report_to": "none",
            "logging_steps": 1,
        }
    if settings.verb == "train":
        values |= _loss_values(settings.loss)
        if training.max_tokens_per_batch is not None or training.auto_batch_size:
            # The trainer hands out the pairs of a whole optimizer step; micro-batches are made of those.
            values["per_device_train_batch_size"] *= values["gradient_accumulation_steps"]
            values["gradient_accumulation_steps"] = 1
    config_class = DPOConfig if settings.verb == "train" else SFTConfig
    with refusals_explained(settings):
        # The trainer would upload while it trains, with a pickle of its arguments; see finishing.py.
        config = config_class(**{**values, **settings.trainer_fields, "push_to_hub": False})
    if patience is not None and not settings.run.dry_run:
        # Not above, where --save_steps must be a multiple of --eval_steps for it: here each best model is saved anyway.
        config.load_best_model_at_end = True
    return config


def make_objective(settings: LossSettings) -> Objective:
    """What is optimised."""
    divergence = Divergence(settings.f_divergence_type, settings.f_alpha_divergence_coef)
    names = tuple(BY_NAME[name].name for name in settings.loss_type)
    weights = settings.loss_weights or (1.0,) * len(names)
    return Objective(names, weights, dataclasses.asdict(settings) | {"divergence": divergence})


def _loss_values(settings: LossSettings) -> dict[str, Any]:
    """The same as fields of TRL's config: its trainer looks at them, trackers show them."""
    known = {field.name for field in dataclasses.fields(DPOConfig)}
    values = dataclasses.asdict(settings)
    values["loss_type"] = [BY_NAME[name].name for name in settings.loss_type]
    values["loss_weights"] = list(settings.loss_weights) if settings.loss_weights is not None else None
    return {name: value for name, value in values.items() if name in known}
