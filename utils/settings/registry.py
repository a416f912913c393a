"""The verbs, one row each: what runs a verb, which flags it takes, what checks them, what --help says of it.

A new verb is a row here and a room of its own. Flags that no other verb has stand in a group of their own (in verbs.py,
or in the file of settings that they are close to), which the row names.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .data import GenerationSettings, InspectionSettings
from .flags import (
    COMPUTES,
    READS_DATA,
    READS_PAIRS,
    RENDERS,
    SAVES,
    SCORES_PAIRS,
    SCORES_ROWS,
    SPLITS_DATA,
    TRAINS,
    USES_MODEL,
)
from .verbs import (
    ChatSettings,
    ComparisonSettings,
    EvaluationSettings,
    InitSettings,
    JudgeSettings,
    MergeSettings,
    PlanSettings,
    ReportSettings,
    SamplingSettings,
    StatusSettings,
)


@dataclass(frozen=True)
class Verb:
    """A row. `run`, `checks` and `early` are named as "room.file:name" and imported when they are needed."""

    name: str
    help: str  # one line
    run: str  # a function that takes the settings and returns an exit code, or None for 0
    example: str
    checks: str | None = None  # a tuple of Check; None where no flag contradicts another
    early: str | None = None  # what looks at folders and files before `run` and its libraries are imported
    does: tuple[str, ...] = ()  # decides, with the name, which flags of shared groups the verb takes
    groups: tuple[type, ...] = ()  # of settings, beside those of a training run, in the order of --help
    first: tuple[str, ...] = ()  # the flags that --help shows by itself; none: all of them
    objects: tuple[str, ...] = ()  # flags whose names may be left out, in the order of their values
    also: tuple[str, ...] = ()  # other ways to say the verb
    config: str | None = None  # TRL's config, whose other fields are flags too
    plans: str | None = None  # the verb of the runs that it plans, whose flags it takes too

    @cached_property
    def kinds(self) -> frozenset[str]:
        """What `verbs` of a flag must name for this verb to take it."""
        return frozenset((*self.name.split(), *self.does)) | (VERBS[self.plans].kinds if self.plans else frozenset())

    def takes(self, group: type, field: dataclasses.Field[Any]) -> bool:
        """Whether the verb takes a flag of a group that it may have flags of."""
        default = self.name.split()[0] if group in self.groups else TRAINS
        return not self.kinds.isdisjoint(field.metadata["verbs"] or (default,))


ROWS = (
    Verb(
        "train",
        "fine-tune a model on preference pairs with DPO (the default verb)",
        run="training.stages:train",
        checks="arguments.cross_checks:TRAIN",
        early="training.early:check_early",
        does=(
            *(USES_MODEL, READS_DATA, SPLITS_DATA, READS_PAIRS, RENDERS, COMPUTES),
            *(SCORES_ROWS, SCORES_PAIRS, TRAINS, SAVES),
        ),
        also=("dpo",),
        config="DPOConfig",
        first=(
            *("model_name_or_path", "dataset_name", "output_dir", "use_lora", "use_4bit", "beta"),
            *("loss_type", "learning_rate", "num_train_epochs", "per_device_train_batch_size"),
            *("gradient_accumulation_steps", "max_length", "dry_run"),
        ),
        example="""\
  python advanced_dpo_script.py --model_name_or_path meta-llama/Llama-2-7b-hf \\
      --dataset_name trl-lib/ultrafeedback_binarized --output_dir ./llama2-7b-dpo-lora \\
      --use_lora --use_4bit --lora_r 64 --lora_alpha 16 --beta 0.1 --num_train_epochs 1 \\
      --logging_steps 10 --save_steps 200 --use_wandb""",
    ),
    Verb(
        "sft",
        "supervised fine-tuning on the chosen responses, or on prompt/completion rows",
        run="training.stages:train",
        checks="arguments.cross_checks:SFT",
        early="training.early:check_early",
        does=(USES_MODEL, READS_DATA, SPLITS_DATA, RENDERS, COMPUTES, SCORES_ROWS, TRAINS, SAVES),
        config="SFTConfig",
        first=(
            *("model_name_or_path", "dataset_name", "output_dir", "use_lora", "use_4bit", "learning_rate"),
            *("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
            *("max_length", "dry_run"),
        ),
        example="""\
  python advanced_dpo_script.py sft --model_name_or_path meta-llama/Llama-2-7b-hf \\
      --dataset_name trl-lib/ultrafeedback_binarized --output_dir ./llama2-7b-sft-lora \\
      --use_lora --use_4bit --lora_r 64 --lora_alpha 16 --num_train_epochs 1 \\
      --logging_steps 10 --save_steps 200 --use_wandb""",
    ),
    Verb(
        "data",
        "check preference data, show statistics, write the clean pairs; or generate pairs",
        run="inspection.stages:look_at_data",
        checks="arguments.verb_checks:DATA",
        does=(USES_MODEL, READS_DATA, SPLITS_DATA, READS_PAIRS, RENDERS),
        groups=(InspectionSettings, GenerationSettings, SamplingSettings, JudgeSettings),
        first=(
            *("dataset_name", "model_name_or_path", "max_length", "validation_split", "compare"),
            *("report_file", "output_file", "remove", "generate", "scorer"),
        ),
        objects=("dataset_name",),
        example="""\
  python advanced_dpo_script.py data ./pairs.jsonl --report_file findings.html \\
      --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --max_length 1024 --output_file clean.jsonl
  python advanced_dpo_script.py data --generate --dataset_name ./prompts.jsonl --output_file pairs.jsonl \\
      --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --scorer ./my-reward-model

exit code: 0 no problems, 3 problems were found, 2 the data or the flags cannot be used""",
    ),
    Verb(
        "plan",
        "estimate memory, time and cost of a run, and what fits; takes the flags of train",
        run="planning.stages:plan",
        checks="arguments.verb_checks:PLAN",
        plans="train",
        also=("plan train",),
        groups=(InspectionSettings, PlanSettings),
        first=(
            *("model_name_or_path", "dataset_name", "use_lora", "use_4bit", "max_length"),
            *("per_device_train_batch_size", "gpu", "num_devices", "sharding", "offload", "cost_per_hour"),
            *("measure",),
        ),
        example="""\
  python advanced_dpo_script.py plan --model_name_or_path meta-llama/Llama-3.1-8B --use_lora --use_4bit \\
      --dataset_name trl-lib/ultrafeedback_binarized --gpu "RTX 4090" --cost_per_hour 0.4
  python advanced_dpo_script.py plan --config run.yaml --measure""",
    ),
    Verb(
        "plan sft",
        "the same for an sft run; takes the flags of sft",
        run="planning.stages:plan",
        checks="arguments.verb_checks:PLAN_SFT",
        plans="sft",
        groups=(InspectionSettings, PlanSettings),
        first=(
            *("model_name_or_path", "dataset_name", "use_lora", "use_4bit", "max_length"),
            *("per_device_train_batch_size", "gpu", "num_devices", "sharding", "offload", "cost_per_hour"),
            *("measure",),
        ),
        example="""\
  python advanced_dpo_script.py plan sft --model_name_or_path meta-llama/Llama-3.1-8B --use_lora --use_4bit \\
      --dataset_name trl-lib/ultrafeedback_binarized --gpu "RTX 4090" --cost_per_hour 0.4
  python advanced_dpo_script.py plan --config examples/configs/zephyr_7b_sft.yaml --gpu "H100 80GB" --num_devices 8""",
    ),
    Verb(
        "evaluate",
        "evaluate a tuned model against its reference on held-out pairs, with 95% intervals",
        run="evaluation.evaluating:evaluate_model",
        checks="arguments.verb_checks:EVALUATE",
        early="models.sources:check_early",
        does=(USES_MODEL, READS_DATA, READS_PAIRS, RENDERS, COMPUTES, SCORES_ROWS, SCORES_PAIRS, SAVES),
        groups=(EvaluationSettings,),
        first=(
            *("model_name_or_path", "dataset_name", "dataset_split", "output_dir"),
            *("ref_model_name_or_path", "per_device_eval_batch_size", "max_samples", "dtype"),
        ),
        objects=("model_name_or_path",),
        example="""\
  python advanced_dpo_script.py evaluate ./llama2-7b-dpo-lora
  python advanced_dpo_script.py evaluate --model_name_or_path ./llama2-7b-dpo-lora \\
      --dataset_name ./other-pairs.jsonl --output_dir ./evaluations/on-other-pairs
  python advanced_dpo_script.py evaluate --model_name_or_path owner/tuned \\
      --ref_model_name_or_path owner/base --dataset_name trl-lib/ultrafeedback_binarized \\
      --output_dir ./evaluations/tuned""",
    ),
    Verb(
        "compare",
        "compare two models on the same prompts: win rates, lengths, responses side by side",
        run="comparing.comparing:compare_models",
        checks="arguments.verb_checks:COMPARE",
        early="models.sources:check_early",
        does=(USES_MODEL, RENDERS, COMPUTES, SAVES),
        groups=(ComparisonSettings, SamplingSettings, JudgeSettings),
        first=(
            *("model_name_or_path", "baseline", "prompts", "num_prompts", "judge", "output_dir"),
            *("max_new_tokens", "temperature", "dtype"),
        ),
        objects=("model_name_or_path", "baseline"),
        example="""\
  python advanced_dpo_script.py compare ./llama2-7b-dpo-lora
  python advanced_dpo_script.py compare --model_name_or_path ./llama2-7b-dpo-lora \\
      --baseline meta-llama/Llama-2-7b-chat-hf --prompts ./questions.txt --num_prompts 200 \\
      --judge ./my-reward-model vote""",
    ),
    Verb(
        "merge",
        "merge an adapter into its base model, and verify the result",
        run="merging.merging:merge",
        checks="arguments.verb_checks:MERGE",
        early="models.sources:check_early",
        does=(USES_MODEL, READS_DATA, SPLITS_DATA, READS_PAIRS, SAVES),
        groups=(MergeSettings,),
        first=(
            *("model_name_or_path", "output_dir", "merge_into", "dtype", "max_shard_size"),
            *("skip_verification", "push_to_hub"),
        ),
        objects=("model_name_or_path", "output_dir"),
        example="""\
  python advanced_dpo_script.py merge ./llama2-7b-dpo-lora ./llama2-7b-dpo""",
    ),
    Verb(
        "chat",
        "talk to a model in the terminal, or pipe one message through it",
        run="chatting.chatting:chat",
        checks="arguments.verb_checks:CHAT",
        early="models.sources:check_early",
        does=(USES_MODEL, RENDERS, COMPUTES),
        groups=(SamplingSettings, ChatSettings),
        first=(
            *("model_name_or_path", "compare_with", "prompt", "system_prompt", "tools", "max_new_tokens"),
            *("temperature", "top_p", "use_4bit", "dtype"),
        ),
        objects=("model_name_or_path",),
        example="""\
  python advanced_dpo_script.py chat ./llama2-7b-dpo-lora --compare_with reference
  echo "Who wrote Emma?" | python advanced_dpo_script.py chat --model_name_or_path ./llama2-7b-dpo-lora""",
    ),
    Verb(
        "status",
        "list the runs under a folder with progress and metrics; compare runs",
        run="status.publishing:show_status",
        checks="arguments.verb_checks:STATUS",
        groups=(StatusSettings,),
        objects=("folder",),
        example="""\
  python advanced_dpo_script.py status runs
  python advanced_dpo_script.py status runs --report comparison.html
  python advanced_dpo_script.py status runs --json""",
    ),
    Verb(
        "report",
        "rewrite a run's report.html from the files in its folder",
        run="report.writing:write_report",
        checks="arguments.verb_checks:REPORT",
        groups=(ReportSettings,),
        objects=("run",),
        example="""\
  python advanced_dpo_script.py report runs/demo""",
    ),
    Verb(
        "init",
        "write a commented config for --config: for a situation, or translated from another tool",
        run="init.writing:write_config",
        checks="arguments.verb_checks:INIT",
        groups=(InitSettings,),
        objects=("from_file",),
        example="""\
  python advanced_dpo_script.py init --situation one_24gb_qlora --output_file config.yaml \\
      --model_name_or_path meta-llama/Llama-3.1-8B-Instruct --dataset_name ./pairs.jsonl
  python advanced_dpo_script.py --config config.yaml
  python advanced_dpo_script.py init --from axolotl.yaml --output_file config.yaml""",
    ),
)
VERBS = {verb.name: verb for verb in ROWS}
DEFAULT_VERB = "train"


def find_verb(words: str) -> Verb | None:
    """The verb that words stand for, its own name or another way to say it; None where there is none."""
    return next((verb for verb in ROWS if words in (verb.name, *verb.also)), None)


def acts_as(verb: str) -> str:
    """The verb whose checks a verb shares: a plan is checked as a run of what it plans."""
    return VERBS[verb].plans or verb


def load_named(place: str) -> Any:
    """What a row names as "room.file:name", imported now."""
    file, _, name = place.partition(":")
    package = __name__.rpartition(".settings.")[0]
    return getattr(importlib.import_module(f"{package}.{file}"), name)
