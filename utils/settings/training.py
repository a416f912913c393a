"""Every setting, once: its name is the flag, the field and the key in run.json; its default stands beside it.

The dataclasses below are one stage each. `utils/arguments.py` builds the argparse groups from them, so that a
setting is described in one place only. A default of None means "decided later, where more is known" and the help
says how.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..objectives.losses import BY_NAME, LOSSES, reading
from ..objectives.pairs import DIVERGENCES
from .data import DataSettings, GenerationSettings, InspectionSettings
from .flags import (
    ABOVE_ZERO,
    AT_LEAST_ONE,
    AT_LEAST_ZERO,
    BELOW_HALF,
    CHAT,
    CLOSED_UNIT,
    COMPUTES,
    HALF_OPEN_UNIT,
    INIT,
    MAX_STEPS,
    MERGE,
    RENDERS,
    SAVES,
    SCORES_PAIRS,
    SCORES_ROWS,
    SEED,
    STEPS_OR_SHARE,
    TRAIN,
    TRAINING,
    USES_MODEL,
    Bound,
    flag,
    takes,
)
from .verbs import (
    ChatSettings,
    ComparisonSettings,
    EvaluationSettings,
    InitSettings,
    JudgeSettings,
    MergeSettings,
    PlanSettings,
    SamplingSettings,
    StatusSettings,
)


@dataclass(frozen=True)
class ModelSettings:
    """model"""

    model_name_or_path: str | None = flag(
        None,
        "hub name or folder of the model to tune; a full model or an adapter (data: counts tokens with its tokenizer; "
        "evaluate, compare, merge, chat: the folder of a run, or any model)",
        verbs=(*USES_MODEL, *INIT),
    )
    model_revision: str | None = flag(None, "branch, tag or commit of a hub model (default: main)", verbs=USES_MODEL)
    ref_model_name_or_path: str | None = flag(
        None, "a separate frozen reference model (default: the policy as it starts)", verbs=SCORES_PAIRS
    )
    adapter_name_or_path: str | None = flag(None, "an existing adapter on top of the model, to continue from")
    dtype: str = flag(
        "auto",
        "computing precision; auto: bfloat16 where the device computes it fast, else float32 (float16 on older GPUs); "
        "merge: that of the saved weights; auto: that of the base's files",
        choices=("auto", "float32", "bfloat16", "float16"),
        verbs=(*COMPUTES, *MERGE),
    )
    attn_implementation: str | None = flag(
        None, "transformers attention: sdpa, eager, flash_attention_2, ...", verbs=COMPUTES
    )
    trust_remote_code: bool = flag(
        False, "run Python code that comes with the model (a risk: read it first)", verbs=USES_MODEL
    )
    use_4bit: bool = flag(
        False,
        "hold what is frozen in 4 bits: the base under --use_lora, else a reference that stays (compare: both models)",
        verbs=COMPUTES,
    )
    bnb_4bit_quant_type: str = flag("nf4", "the 4-bit number format", choices=("nf4", "fp4"), verbs=(*TRAINING, *CHAT))
    chat_template: str | None = flag(
        None,
        "a Jinja file or text to use as chat template (default: the tokenizer's own, else a plain one)",
        verbs=RENDERS,
    )


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
        0.1, "strength of the pull towards the reference", bound=ABOVE_ZERO, usual="0.1 is usual", verbs=SCORES_PAIRS
    )
    loss_type: tuple[str, ...] = flag(
        ("sigmoid",),
        f"{', '.join(loss.title for loss in LOSSES.values())}; several are summed",
        choices=tuple(BY_NAME),
        many=True,
        verbs=TRAIN,
    )
    loss_weights: tuple[float, ...] | None = flag(None, "one weight per loss (default: 1 each)", many=True, verbs=TRAIN)
    label_smoothing: float = flag(
        0.0,
        f"share of preference labels assumed to be flipped ({', '.join(reading('label_smoothing'))})",
        bound=BELOW_HALF,
        usual="0.1 is usual",
        verbs=TRAIN,
    )
    f_divergence_type: str = flag(
        "reverse_kl",
        f"divergence that holds the policy to the reference (f-DPO): {', '.join(DIVERGENCES)}",
        choices=DIVERGENCES,
        verbs=TRAIN,
    )
    f_alpha_divergence_coef: float = flag(0.5, "alpha of alpha_divergence; towards 1 it is the reverse KL", verbs=TRAIN)
    ld_alpha: float | None = flag(
        None,
        "weight of a token beyond the length of the pair's shorter response (LD-DPO; default: 1)",
        bound=CLOSED_UNIT,
        verbs=TRAIN,
    )
    use_weighting: bool = flag(False, "weigh pairs by how likely the policy makes their responses (WPO)", verbs=TRAIN)


def _with_own_parameters(stage: type) -> type:
    """The stage with the parameters that losses have of their own."""
    fields = [
        (name, "float", flag(own.default, f"{loss.name}: {own.help}", bound=Bound(own.must_be, own.holds), verbs=TRAIN))
        for loss in LOSSES.values()
        for name, own in loss.parameters.items()
    ]
    return dataclasses.make_dataclass(
        stage.__name__, fields, bases=(stage,), frozen=True, namespace={"__doc__": stage.__doc__}
    )


@dataclass(frozen=True)
class TrainingSettings:
    """training"""

    learning_rate: float | None = flag(
        None,
        "peak learning rate (default: train 1e-6, with LoRA 5e-5; sft 2e-5, with LoRA 2e-4)",
        bound=ABOVE_ZERO,
    )
    num_train_epochs: float = flag(1.0, "passes over the training data", bound=ABOVE_ZERO)
    max_steps: int = flag(-1, "stop after N optimizer steps, whatever the epochs", bound=MAX_STEPS)
    per_device_train_batch_size: int = flag(8, "rows per device and micro-batch", bound=AT_LEAST_ONE)
    per_device_eval_batch_size: int = flag(8, "rows per device in evaluation", bound=AT_LEAST_ONE, verbs=SCORES_ROWS)
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step", bound=AT_LEAST_ONE)
    max_tokens_per_batch: int | None = flag(
        None,
        "most tokens per micro-batch (whole pairs, as many as fit); the rows per optimizer step stay "
        "per_device_train_batch_size x gradient_accumulation_steps",
        bound=AT_LEAST_ONE,
        verbs=TRAIN,
    )
    auto_batch_size: bool = flag(
        False,
        "find max_tokens_per_batch by trying the longest pairs before training: the smallest that is about as fast as "
        "the fastest that fits",
        verbs=TRAIN,
    )
    engine: str = flag(
        "auto",
        "shared_prefix: each prompt computed once, no padding; padded: plain batches; "
        "auto: shared_prefix where the model is proven to compute it exactly",
        choices=("auto", "shared_prefix", "padded"),
        verbs=SCORES_PAIRS,
    )
    precompute_ref_log_probs: bool | None = flag(
        None,
        "score all pairs with the reference before training, once for all runs with the same reference and pairs "
        "(default: when every pair is used twice; or once, where the reference is a model that then leaves memory)",
        verbs=TRAIN,
    )
    gradient_checkpointing: bool | None = flag(
        None, "recompute activations in the backward pass to save memory (default: on a GPU yes, on a CPU no)"
    )
    torch_compile: bool = flag(
        False, "compile the model's layers: less time between the arithmetic, after a minute or two at the start"
    )
    warmup_steps: float = flag(
        0.1, "steps of learning-rate warm-up; below 1: a share of all steps", bound=AT_LEAST_ZERO
    )
    skip_bad_batches: int = flag(
        0,
        "leave out up to N optimizer steps whose loss or gradient is not finite, and go on (their rows: "
        "bad_pairs.jsonl; default: stop at the first)",
        bound=AT_LEAST_ZERO,
    )
    lr_scheduler_type: str = flag("linear", "shape of the learning rate over the run: linear, cosine, constant, ...")
    logging_steps: float = flag(10, "steps between two lines of training metrics", bound=STEPS_OR_SHARE)
    eval_steps: float | None = flag(
        None,
        "steps between two evaluations on the held-out data (default: before and after only)",
        bound=STEPS_OR_SHARE,
    )
    early_stopping_patience: int | None = flag(
        None,
        "stop after N evaluations in a row that are no better than the best one, and keep the best one's model "
        "(needs --eval_steps; default: no early stop)",
        bound=AT_LEAST_ONE,
    )
    early_stopping_metric: str = flag(
        "loss", "what better means: the held-out loss, margin or accuracy", choices=("loss", "margin", "accuracy")
    )
    save_steps: float = flag(500, "steps between two checkpoints", bound=STEPS_OR_SHARE)
    save_total_limit: int | None = flag(
        None,
        "keep only the newest N checkpoints (and the best); older ones go once a new one is read back from the disk",
        bound=AT_LEAST_ONE,
    )
    seed: int = flag(
        42,
        "fixes the split, the order of the data, the adapter's start, and what is sampled or drawn",
        bound=SEED,
        verbs=USES_MODEL,
    )


@dataclass(frozen=True)
class RunSettings:
    """run"""

    output_dir: str | None = flag(
        None,
        "folder for the model, the checkpoints and the record of the run (evaluate, compare: for the results; "
        "default: a folder evaluation or comparison in that of the run; merge: for the merged model)",
        verbs=(*SAVES, *INIT),
    )
    overwrite_output_dir: bool = flag(
        False, "replace the run that the output folder holds (merge: the merged model)", verbs=(*TRAINING, *MERGE)
    )
    resume_from_checkpoint: str | None = flag(
        None, "auto (the newest whole checkpoint in the output folder), or the path of one"
    )
    allow_changes: tuple[str, ...] = flag(
        (),
        "let a resumed run have these otherwise than it began, though it means another run then: data, tokenizer, "
        "model, reference, precision, world (rows per optimizer step), settings, or the names of flags",
        many=True,
    )
    sample_during_eval: bool = flag(
        False, "at each evaluation show and keep (samples.jsonl) what the model writes to the same held-out prompts"
    )
    num_eval_samples: int = flag(4, "held-out prompts that are answered with --sample_during_eval", bound=AT_LEAST_ONE)
    sample_max_new_tokens: int = flag(128, "most tokens of such an answer", bound=AT_LEAST_ONE)
    dry_run: bool = flag(False, "go through every stage, one training step and one evaluation batch; save nothing")
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
        "warn when the held-out KL (chosen_kl) is beyond so many nats (default: no bound)",
        bound=ABOVE_ZERO,
        verbs=TRAIN,
    )
    cost_per_hour: float | None = flag(
        None,
        "what an hour of one device costs, in any currency; the record and the report then give the run's cost",
        bound=AT_LEAST_ZERO,
    )


@dataclass(frozen=True)
class Settings:
    """All settings of one run. `trainer_fields` are further fields of TRL's config, already type-checked."""

    verb: str
    model: ModelSettings
    lora: LoraSettings
    data: DataSettings
    loss: LossSettings
    training: TrainingSettings
    run: RunSettings
    inspection: InspectionSettings = dataclasses.field(default_factory=InspectionSettings)
    generation: GenerationSettings = dataclasses.field(default_factory=GenerationSettings)
    evaluation: EvaluationSettings = dataclasses.field(default_factory=EvaluationSettings)
    comparison: ComparisonSettings = dataclasses.field(default_factory=ComparisonSettings)
    sampling: SamplingSettings = dataclasses.field(default_factory=SamplingSettings)
    judging: JudgeSettings = dataclasses.field(default_factory=JudgeSettings)
    merging: MergeSettings = dataclasses.field(default_factory=MergeSettings)
    chatting: ChatSettings = dataclasses.field(default_factory=ChatSettings)
    plan: PlanSettings = dataclasses.field(default_factory=PlanSettings)
    status: StatusSettings = dataclasses.field(default_factory=StatusSettings)
    init: InitSettings = dataclasses.field(default_factory=InitSettings)
    trainer_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    given: frozenset[str] = frozenset()  # names that the person set, on the command line or in --config

    def flat(self) -> dict[str, Any]:
        """Flag name -> value, for run.json and for the copyable command. Flags of other verbs are left out."""
        values = {
            field.name: getattr(stage, field.name)
            for stage in self.stages()
            for field in dataclasses.fields(stage)
            if takes(self.verb, field.metadata["verbs"])
        }
        return values | dict(self.trainer_fields)

    def stages(self) -> tuple[Any, ...]:
        """The stage dataclasses, in the order in which --help shows them."""
        return tuple(getattr(self, stage) for stage in STAGES)


STAGES: dict[str, type] = {
    "model": ModelSettings,
    "lora": LoraSettings,
    "data": DataSettings,
    "loss": _with_own_parameters(LossSettings),
    "training": TrainingSettings,
    "run": RunSettings,
    "inspection": InspectionSettings,
    "generation": GenerationSettings,
    "evaluation": EvaluationSettings,
    "comparison": ComparisonSettings,
    "sampling": SamplingSettings,
    "judging": JudgeSettings,
    "merging": MergeSettings,
    "chatting": ChatSettings,
    "plan": PlanSettings,
    "status": StatusSettings,
    "init": InitSettings,
}
