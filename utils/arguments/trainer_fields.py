"""The fields of TRL's DPOConfig and SFTConfig, read from their source text: importing them would take seconds.

The files of the installed trl and transformers are parsed, never run; a class body's annotated assignments are its
fields, and bases are followed by name.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..settings.registry import VERBS, acts_as
from .flag_values import ValueType, annotated_type

SOURCES = {
    "trl": ("trainer/base_config.py", "trainer/dpo_config.py", "trainer/sft_config.py"),
    "transformers": ("training_args.py", "trainer_utils.py"),
}

NO_TENSOR_PARALLELISM = (
    "tensor parallelism is not supported, as each process computes whole sequences of its own pairs; where a model "
    "does not fit one GPU, launch with examples/accelerate/fsdp2.yaml"
)

UPLOADED_ONCE = "with --push_to_hub the model is uploaded once, when the run has finished"

# Fields that cannot be passed through, and why.
OWNED = {
    "run_name": "use --wandb_run_name",
    "bf16": "use --dtype bfloat16",
    "fp16": "use --dtype float16",
    "model_init_kwargs": "use the flags of the model: --model_revision, --dtype, --attn_implementation, ...",
    "remove_unused_columns": "the script selects the columns",
    "label_names": "the label columns are fixed",
    "pad_token": "TRL deprecates it; the pad token comes with the tokenizer",
    "truncation_mode": "use --truncation",
    "dataset_text_field": "use --text_column",
    "chat_template_path": "use --chat_template",
    "activation_checkpointing": "use --gradient_checkpointing",
    "do_train": "the verb sets it",
    "do_eval": "use --validation_split and --eval_steps",
    "do_predict": "the verb sets it",
    "local_rank": "the launcher (accelerate launch, torchrun) sets it",
    "parallelism_config": NO_TENSOR_PARALLELISM,
    "tp_plan": NO_TENSOR_PARALLELISM,
    "tp_size": NO_TENSOR_PARALLELISM,
    "hub_token": "flags are recorded in the run folder; run `hf auth login` or set HF_TOKEN instead",
    "hub_strategy": UPLOADED_ONCE,
    "hub_always_push": UPLOADED_ONCE,
    "hub_revision": "the files are uploaded to the main branch",
    "save_safetensors": "only safetensors are written",
    "pad_to_multiple_of": "batches are packed, or padded to their longest row",
    "fp16_full_eval": "evaluation computes in --dtype",
    "bf16_full_eval": "evaluation computes in --dtype",
    "batch_eval_metrics": "held-out metrics are computed row by row in any case",
    "eval_accumulation_steps": "evaluation keeps no more than one batch in memory in any case",
    "length_column_name": "the lengths of the rows are known",
    "prediction_loss_only": "the script selects what is evaluated",
}
OWNED_BY_VERB = {
    "sft": {
        "eos_token": "each completion ends in the tokenizer's own end-of-text token",
        "completion_only_loss": "the loss is on completions only; for whole texts use --text_column",
        "assistant_only_loss": "the loss is on completions only",
        "dataset_kwargs": "the script prepares the rows",
        "shuffle_dataset": "rows are shuffled by --seed in any case",
        "packing": "sft trains on padded batches",
        "packing_strategy": "sft trains on padded batches",
        "eval_packing": "sft trains on padded batches",
        "padding_free": "sft trains on padded batches",
        "label_smoothing_factor": "sft minimises plain cross-entropy, or --loss_type dft",
    },
    "train": {
        "auto_find_batch_size": "it changes the number of pairs per optimizer step; use --auto_batch_size",
        "padding_free": "TRL's DPO trainer accepts it and switches it off",
        "label_smoothing_factor": "DPO's losses do not use it; use --label_smoothing",
        "neftune_noise_alpha": "the noise would make policy and reference differ",
    },
}


@dataclass(frozen=True)
class TrainerField:
    """One field of a trainer config; `choices` where its metadata or its enum lists them."""

    name: str
    kind: ValueType
    choices: tuple[str, ...] | None


@functools.cache
def trainer_fields(verb: str) -> dict[str, TrainerField]:
    """Name -> field of the verb's config class, inherited ones included; empty for a verb without a trainer."""
    classes = _class_definitions()
    name = VERBS[acts_as(verb)].config
    if name not in classes:
        return {}
    return {field.name: field for field in _fields(classes[name], classes)}


def owned_reason(verb: str, name: str) -> str | None:
    """Why the field cannot be passed through, or None when it can."""
    return OWNED.get(name) or OWNED_BY_VERB.get(acts_as(verb), {}).get(name)


@functools.cache
def _class_definitions() -> dict[str, ast.ClassDef]:
    definitions: dict[str, ast.ClassDef] = {}
    for package, paths in SOURCES.items():
        # A top-level name: find_spec of a submodule would import the package around it.
        spec = importlib.util.find_spec(package)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        for source in (Path(folder, path) for folder in folders for path in paths):
            if source.is_file():
                body = ast.parse(source.read_text(encoding="utf-8")).body
                definitions |= {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    return definitions


def _fields(definition: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> Iterator[TrainerField]:
    """The fields of a class, those of its bases first so that its own take their place."""
    for base in reversed(definition.bases):
        if isinstance(base, ast.Name) and base.id in classes:
            yield from _fields(classes[base.id], classes)
    for node in definition.body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=value):
                if "ClassVar" in ast.unparse(annotation):
                    continue
                kind = annotated_type(annotation)
                yield TrainerField(name, kind, _metadata_choices(value) or _enum_choices(kind, classes))


def _metadata_choices(value: ast.expr | None) -> tuple[str, ...] | None:
    """The "choices" of `field(..., metadata={"choices": [...]})`, where they are written out."""
    for node in ast.walk(value) if value else ():
        if isinstance(node, ast.Dict):
            for key, choices in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(choices, ast.List):
                    return tuple(ast.literal_eval(choices))
    return None


def _enum_choices(kind: ValueType, classes: dict[str, ast.ClassDef]) -> tuple[str, ...] | None:
    """The values of the enum in an annotation such as `IntervalStrategy | str`."""
    for name in kind.others:
        body = classes[name].body if name in classes else []
        values = [node.value for node in body if isinstance(node, ast.Assign)]
        constants = [value.value for value in values if isinstance(value, ast.Constant)]
        if constants:
            return tuple(str(constant) for constant in constants)
    return None
