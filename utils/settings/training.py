"""The settings of a training run, and `Settings`: those of one call of any verb.

A setting is described once: its name is the flag, the field and the key in run.json, its default stands beside it, and
the rooms of argv and --help read both from here. A default of None means that the value is decided later, where more is
known; the help says how.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ..objectives.losses import BY_NAME, LOSSES, reading
from ..objectives.pairs import DIVERGENCES
from .data import DataSettings
from .flags import (
    ABOVE_ZERO,
    AT_LEAST_ONE,
    AT_LEAST_ZERO,
    BELOW_HALF,
    CLOSED_UNIT,
    COMPUTES,
    HALF_OPEN_UNIT,
    MAX_STEPS,
    RENDERS,
    SAVES,
    SCORES_PAIRS,
    SCORES_ROWS,
    SEED,
    STEPS_OR_SHARE,
    TEMPLATE_KWARGS,
    TRAINS,
    USES_MODEL,
    Bound,
    flag,
)
from .registry import VERBS

Group = TypeVar("Group")


@dataclass(frozen=True)
class ModelSettings:
    """model"""

    model_name_or_path: str | None = flag(
        None,
        "hub name or folder of the model to tune; a full model or an adapter",
        verbs=(USES_MODEL, "init"),
        says={
            "data": "model whose tokenizer counts tokens; with --generate: the model that answers",
            "evaluate": "folder of a run, or any model (with --ref_model_name_or_path)",
            "compare": "folder of a run, or any model",
            "merge": "folder of a run, or an adapter",
            "chat": "folder of a run, a model or an adapter",
        },
    )
    model_revision: str | None = flag(None, "branch, tag or commit of a hub model (default: main)", verbs=USES_MODEL)
    ref_model_name_or_path: str | None = flag(
        None, "a separate frozen reference model (default: the initial policy)", verbs=SCORES_PAIRS
    )
    adapter_name_or_path: str | None = flag(None, "an existing adapter of the model, to continue training")
    dtype: str = flag(
        "auto",
        "computing precision; auto: bfloat16 where the device computes it fast, else float32 (float16 on older GPUs)",
        choices=("auto", "float32", "bfloat16", "float16"),
        verbs=(COMPUTES, "merge"),
        says={"merge": "precision of the saved weights; auto: that of the base's files"},
    )
    attn_implementation: str | None = flag(
        None, "transformers attention: sdpa, eager, flash_attention_2, ...", verbs=COMPUTES
    )
    trust_remote_code: bool = flag(
        False, "run Python code that comes with the model (a security risk: read it first)", verbs=USES_MODEL
    )
    use_4bit: bool = flag(
        False,
        "load frozen weights in 4-bit: the base with --use_lora (QLoRA), else a reference that stays in memory",
        verbs=COMPUTES,
        says={"compare": "load both models in 4-bit", "chat": "load the model in 4-bit"},
    )
    bnb_4bit_quant_type: str = flag("nf4", "the 4-bit number format", choices=("nf4", "fp4"), verbs=(TRAINS, "chat"))
    chat_template: str | None = flag(
        None,
        "a Jinja file or text to use as chat template (default: the tokenizer's own, else a plain one)",
        verbs=RENDERS,
    )
    chat_template_kwargs: dict[str, Any] | None = flag(  # noqa: RUF009 (a field, whose default is None)
        None,
        """what the chat template is given beside the messages, as a JSON object: '{"enable_thinking": false}'""",
        bound=TEMPLATE_KWARGS,
        verbs=RENDERS,
    )
    reasoning: str | None = flag(
        None,
        "reasoning of replies (reasoning_content, <think>...</think>): keep renders and counts it, that of earlier "
        "turns too where the template can; mask renders it and leaves it out of log-probs and losses; drop leaves it "
        "out of the texts (default: as the template renders it, counted)",
        choices=("keep", "mask", "drop"),
        verbs=(SCORES_ROWS, "data"),
    )

    @property
    def named_reference(self) -> tuple[str, str] | None:
        """The flag that names a separate reference, and the model that it names; None where there is no such flag.

        All that reads a separate reference asks here: another flag for one is another line of this.
        """
        name = self.ref_model_name_or_path
        return ("--ref_model_name_or_path", name) if name is not None else None


@dataclass(frozen=True)
class LoraSettings:
    """LoRA"""

    use_lora: bool = flag(False, "train a LoRA adapter instead of all weights")
    lora_r: int = flag(16, "rank", bound=AT_LEAST_ONE, usual="8 to 64 is usual")
    lora_alpha: float = flag(32.0, "scale; the update is weighted by alpha / r", bound=ABOVE_ZERO)
    lora_dropout: float = flag(0.0, "dropout on the adapter's input", bound=HALF_OPEN_UNIT)
    lora_target_modules: tuple[str, ...] = flag(
        ("all-linear",), "module names to adapt, or all-linear (every linear layer but the head)", many=True
    )
    use_rslora: bool = flag(False, "rank-stabilised scale: alpha / sqrt(r)")
    use_dora: bool = flag(False, "weight-decomposed adapters (DoRA)")


@dataclass(frozen=True)
class LossSettings:
    """loss"""

    beta: float = flag(
        0.1,
        "strength of the KL penalty; higher stays closer to the reference",
        bound=ABOVE_ZERO,
        usual="0.1 is usual",
        verbs=SCORES_PAIRS,
    )
    loss_type: tuple[str, ...] = flag(
        ("sigmoid",),
        f"{', '.join(loss.title for loss in LOSSES.values())}; several are summed",
        choices=tuple(BY_NAME),
        many=True,
        verbs="train",
    )
    loss_weights: tuple[float, ...] | None = flag(
        None, "one weight per loss (default: 1 each)", many=True, verbs="train"
    )
    label_smoothing: float = flag(
        0.0,
        f"share of preference labels assumed to be flipped ({', '.join(reading('label_smoothing'))})",
        bound=BELOW_HALF,
        usual="0.1 is usual",
        verbs="train",
    )
    f_divergence_type: str = flag(
        "reverse_kl",
        f"divergence that regularises the policy towards the reference (f-DPO): {', '.join(DIVERGENCES)}",
        choices=DIVERGENCES,
        verbs="train",
    )
    f_alpha_divergence_coef: float = flag(
        0.5, "alpha of alpha_divergence; its limit at 1 is the reverse KL", verbs="train"
    )
    ld_alpha: float | None = flag(
        None,
        "weight of a token beyond the length of the pair's shorter response (LD-DPO; default: 1)",
        bound=CLOSED_UNIT,
        verbs="train",
    )
    use_weighting: bool = flag(
        False, "weight pairs by the policy's probability of their responses (WPO)", verbs="train"
    )


def _with_own_parameters(group: type[LossSettings]) -> type[LossSettings]:
    """The group with the parameters that losses have of their own."""
    fields = [
        (
            name,
            "float",
            flag(own.default, f"{loss.name}: {own.help}", bound=Bound(own.must_be, own.holds), verbs="train"),
        )
        for loss in LOSSES.values()
        for name, own in loss.parameters.items()
    ]
    return dataclasses.make_dataclass(
        group.__name__, fields, bases=(group,), frozen=True, namespace={"__doc__": group.__doc__}
    )


@dataclass(frozen=True)
class TrainingSettings:
    """training"""

    learning_rate: float | None = flag(
        None,
        "peak learning rate (default: 1e-6, with LoRA 5e-5)",
        bound=ABOVE_ZERO,
        says={"sft": "peak learning rate (default: 2e-5, with LoRA 2e-4)"},
    )
    num_train_epochs: float = flag(1.0, "passes over the training data", bound=ABOVE_ZERO)
    max_steps: int = flag(-1, "stop after N optimizer steps; overrides --num_train_epochs", bound=MAX_STEPS)
    per_device_train_batch_size: int = flag(8, "rows per device and micro-batch", bound=AT_LEAST_ONE)
    per_device_eval_batch_size: int = flag(8, "rows per device in evaluation", bound=AT_LEAST_ONE, verbs=SCORES_ROWS)
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step", bound=AT_LEAST_ONE)
    max_tokens_per_batch: int | None = flag(
        None,
        "maximum tokens per micro-batch (filled with whole pairs); the rows per optimizer step stay "
        "per_device_train_batch_size x gradient_accumulation_steps",
        bound=AT_LEAST_ONE,
        verbs="train",
    )
    auto_batch_size: bool = flag(
        False,
        "find max_tokens_per_batch by trying the longest pairs before training: the smallest that is about as fast as "
        "the fastest that fits",
        verbs="train",
    )
    engine: str = flag(
        "auto",
        "shared_prefix: each prompt computed once, no padding; padded: plain batches; "
        "auto: shared_prefix where a check on real pairs shows that the model computes it exactly",
        choices=("auto", "shared_prefix", "padded"),
        verbs=SCORES_PAIRS,
    )
    precompute_ref_log_probs: bool | None = flag(
        None,
        "score all pairs with the reference before training, once for all runs with the same reference and pairs "
        "(default: when every pair is used twice; or once, where the reference is a model that then leaves memory)",
        verbs="train",
    )
    gradient_checkpointing: bool | None = flag(
        None, "recompute activations in the backward pass to save memory (default: on a GPU yes, on a CPU no)"
    )
    torch_compile: bool = flag(
        False, "compile the model's layers: less overhead per step, a minute or two of compiling at the start"
    )
    warmup_steps: float = flag(
        0.1, "learning-rate warm-up steps; below 1: a fraction of all steps", bound=AT_LEAST_ZERO
    )
    skip_bad_batches: int = flag(
        0,
        "skip up to N optimizer steps whose loss or gradient is not finite, and continue (their rows: "
        "bad_pairs.jsonl; default: stop at the first)",
        bound=AT_LEAST_ZERO,
    )
    lr_scheduler_type: str = flag("linear", "learning-rate schedule: linear, cosine, constant, ...")
    logging_steps: float = flag(
        0.025,
        "steps between lines of training metrics; below 1: a share of all steps (default: 20 to 40 lines a run)",
        bound=STEPS_OR_SHARE,
    )
    eval_steps: float | None = flag(
        None,
        "steps between evaluations on the held-out data (default: before and after only)",
        bound=STEPS_OR_SHARE,
    )
    early_stopping_patience: int | None = flag(
        None,
        "stop after N evaluations in a row without improvement, and keep the best model "
        "(needs --eval_steps; default: no early stop)",
        bound=AT_LEAST_ONE,
    )
    early_stopping_metric: str = flag(
        "loss", "the held-out metric to improve: loss, margin or accuracy", choices=("loss", "margin", "accuracy")
    )
    save_steps: float = flag(500, "steps between checkpoints", bound=STEPS_OR_SHARE)
    save_total_limit: int | None = flag(
        None,
        "keep only the newest N checkpoints (and the best); older ones are deleted once a new one was read back",
        bound=AT_LEAST_ONE,
    )
    seed: int = flag(
        42,
        "random seed of the split, the data order, the adapter's initial weights, sampling and resampling",
        bound=SEED,
        verbs=USES_MODEL,
    )


# tracker -> the package that it needs; None where transformers itself says what is missing
TRACKERS = {
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "comet_ml": "comet_ml",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
    "neptune": "neptune",
    "codecarbon": "codecarbon",
    "azure_ml": None,
    "dagshub": "dagshub",
    "flyte": None,
}
ALL_OR_NONE = ("all", "none")  # in place of their names


@dataclass(frozen=True)
class RunSettings:
    """run"""

    output_dir: str | None = flag(
        None,
        "folder for the model, the checkpoints and the record of the run",
        verbs=(SAVES, "init"),
        says={
            "evaluate": "folder for the results (default: evaluation, in the folder of the run)",
            "compare": "folder for the results (default: comparison, in the folder of the run)",
            "merge": "folder for the merged model",
        },
    )
    overwrite_output_dir: bool = flag(
        False,
        "replace the run that the output folder holds",
        verbs=(TRAINS, "merge"),
        says={"merge": "replace the merged model that the output folder holds"},
    )
    resume_from_checkpoint: str | None = flag(
        None, "auto (the newest complete checkpoint in the output folder), or the path of one"
    )
    allow_changes: tuple[str, ...] = flag(
        (),
        "let these differ when resuming, which makes it another run: data, tokenizer, "
        "model, reference, precision, world (rows per optimizer step), settings, or the names of flags",
        many=True,
    )
    sample_during_eval: bool = flag(
        False, "at each evaluation, print and save (samples.jsonl) the model's responses to the same held-out prompts"
    )
    num_eval_samples: int = flag(4, "held-out prompts for --sample_during_eval", bound=AT_LEAST_ONE)
    sample_max_new_tokens: int = flag(128, "maximum new tokens per sample", bound=AT_LEAST_ONE)
    dry_run: bool = flag(False, "run every stage with one training step and one evaluation batch; save nothing")
    report_to: tuple[str, ...] = flag(
        (), "trackers: wandb, tensorboard, mlflow, trackio, ... (default: none)", many=True
    )
    use_wandb: bool = flag(False, "track with Weights & Biases (offline when there is no login)")
    wandb_project: str = flag("dpo", "W&B project")
    wandb_run_name: str | None = flag(None, "W&B run name (default: the name of the output folder)")
    wandb_entity: str | None = flag(None, "W&B user or team (default: the one of the login)")
    wandb_tags: tuple[str, ...] = flag((), "W&B tags (default: none)", many=True)
    max_kl: float | None = flag(
        None,
        "warn when the held-out KL (chosen_kl) exceeds this many nats (default: no limit)",
        bound=ABOVE_ZERO,
        verbs="train",
    )
    cost_per_hour: float | None = flag(
        None,
        "cost of one device per hour, in any currency; the record and the report then give the run's cost",
        bound=AT_LEAST_ZERO,
    )


@dataclass(frozen=True)
class Settings:
    """All settings of one call. The groups of a training run are attributes, those beside them are found with `of`.
    `trainer_fields` are further fields of TRL's config, already type-checked."""

    verb: str
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    lora: LoraSettings = dataclasses.field(default_factory=LoraSettings)
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    loss: LossSettings = dataclasses.field(default_factory=_with_own_parameters(LossSettings))
    training: TrainingSettings = dataclasses.field(default_factory=TrainingSettings)
    run: RunSettings = dataclasses.field(default_factory=RunSettings)
    others: Mapping[type, Any] = dataclasses.field(default_factory=dict)  # class -> the group
    trainer_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    given: frozenset[str] = frozenset()  # names that the person set, on the command line or in --config

    def of(self, group: type[Group]) -> Group:
        """The group of settings of this class; at its defaults where the verb has no such group."""
        for name, of_run in GROUPS_OF_RUN.items():
            if issubclass(of_run, group):
                return getattr(self, name)
        return self.others[group] if group in self.others else group()

    def flat(self) -> dict[str, Any]:
        """Flag name -> value, for run.json and for the copyable command. Flags of other verbs are left out."""
        held = {name: value for group in groups_of(self.verb) for name, value in vars(self.of(group)).items()}
        values = {name: held[name] for name in flags_of(self.verb)}
        return values | dict(self.trainer_fields)

    def with_values(self, values: Mapping[str, Any]) -> Settings:
        """The settings with other values, by the names of their flags."""
        changed = {}
        for group in groups_of(self.verb):
            own = {field.name: values[field.name] for field in dataclasses.fields(group) if field.name in values}
            changed[group] = dataclasses.replace(self.of(group), **own)
        of_run = {name: changed.pop(group) for name, group in GROUPS_OF_RUN.items()}
        return dataclasses.replace(self, **of_run, others={**self.others, **changed})


GROUPS_OF_RUN: dict[str, Any] = {
    field.name: field.default_factory
    for field in dataclasses.fields(Settings)
    if dataclasses.is_dataclass(field.default_factory)
}


def groups_of(verb: str) -> tuple[Any, ...]:
    """The groups of settings that a verb may have flags of, in the order in which --help shows them."""
    return (*GROUPS_OF_RUN.values(), *VERBS[verb].groups)


@functools.cache
def flags_of(verb: str) -> dict[str, dataclasses.Field[Any]]:
    """Name -> field, of every setting that the verb takes, in the order of --help."""
    row = VERBS[verb]
    fields = ((group, field) for group in groups_of(verb) for field in dataclasses.fields(group))
    return {field.name: field for group, field in fields if row.takes(group, field)}
