"""What run.json says of a run before its first step, and of how its batches are laid out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..data.loading import PreferenceData
from ..engine.head import MARK
from ..engine.scoring import output_head
from ..models.counting import count_parameters
from ..models.reference import ReferencePlan
from ..models.sources import ModelSource
from ..models.templates import TEMPLATE_DATE
from ..run.processes import identify_process
from ..run.program import join_command
from ..run.record import RunRecord, now
from ..runtime import Precision, device_name, read_versions
from ..settings.training import Settings
from .context import Run
from .rows import Rows
from .trainer import PreferenceTrainer, RunTrainer

# What the optimizer goes by, which are no flags of this script: fields of the trainer's configuration.
OF_OPTIMIZER = ("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")


def begin_record(
    settings: Settings,
    precision: Precision,
    source: ModelSource,
    data: PreferenceData,
    rows: Rows,
    arguments: Sequence[str],
) -> RunRecord:
    """The record of a run whose models are not loaded yet. Nothing is written before its first step can be taken."""
    process = identify_process()
    content = {
        "status": "running",
        "verb": settings.verb,
        "started": now(),
        "process": process,
        "settings": settings.flat(),
        "given": sorted(settings.given),
        "used": {},
        "arguments": list(arguments),
        "command": join_command(arguments),
        "versions": read_versions(),
        "model": {},
        "data": _describe_data(settings.verb, data, rows),
        "reference": None,
        "metrics": {},
        "resources": {},
        # Folders that stay true wherever the script is started from.
        "start": dataclasses.asdict(source),
        "reference_model": None,
        "precision": precision.name,
        "device": device_name(precision.device),
        "warnings": list(rows.warnings),
    }
    return RunRecord(content)


def _describe_data(verb: str, data: PreferenceData, rows: Rows) -> dict[str, Any]:
    kind, dropped = "pairs" if verb == "train" else "rows", data.dropped | rows.bad_rows
    too_long = rows.truncation.dropped + rows.held_out_truncation.dropped
    if too_long:
        dropped[f"longer than {rows.max_length} tokens"] = too_long
    return {
        "source": data.source,
        "reading": data.reading.description,
        f"train_{kind}": len(rows.train),
        f"held_out_{kind}": len(rows.held_out) if rows.held_out is not None else 0,
        "dropped": dropped,
        "sources": [dataclasses.asdict(source) for source in data.sources],
        "truncated": rows.truncation.truncated + rows.held_out_truncation.truncated,
        "max_length": rows.max_length,
        "chat_template": rows.template,
        "reasoning": rows.reasoning,
        TEMPLATE_DATE: rows.template_date,
        "shared_prompts": data.shared_prompts,
        "fingerprint": data.fingerprint,
    }


def record_models(run: Run, trainer: RunTrainer, reference: ReferencePlan) -> None:
    """Adds what is known once the models are loaded; of a resumed run also what its former parts recorded."""
    content, model = run.record.content, trainer.model
    architecture = (model.config.architectures or [type(model).__name__])[0]
    content["model"] = {**count_parameters(model).record(), "architecture": architecture}
    content["used"] = used_values(run, trainer)
    content |= reference.as_record()
    if run.checkpoint is None:
        return
    former, warnings = run.former, content["warnings"]
    content["metrics"] = former.get("metrics", {})
    content["started"] = former.get("started", content["started"])
    told = [text for text in former.get("warnings") or [] if not text.startswith(former.get("failure") or "\0")]
    content["warnings"] = list(dict.fromkeys([*told, *warnings]))
    content["alarms"] = former.get("alarms") or []


def used_values(run: Run, trainer: RunTrainer) -> dict[str, Any]:
    """Setting -> the value that the run uses, also where the flag's own value leaves it to the script (None, auto);
    without those that have none, and with the optimizer's own."""
    decided = {
        "dtype": run.precision.name,
        "attn_implementation": getattr(trainer.model.config, "_attn_implementation", None),
        "max_length": run.rows.max_length,
        "chat_template": run.rows.template,
        "max_tokens_per_batch": trainer.max_tokens,
    }
    if isinstance(trainer, PreferenceTrainer):
        decided["precompute_ref_log_probs"] = trainer.scored_ahead
        decided["engine"] = "shared_prefix" if trainer.layout.shared_prefix is True else "padded"
    used = dict.fromkeys(OF_OPTIMIZER) | run.settings.flat()
    for name, value in used.items():
        if value is None or value == "auto":
            found = decided.get(name, getattr(trainer.args, name, None))
            if isinstance(found, bool | int | float | str):
                used[name] = getattr(found, "value", found)
    return {name: value for name, value in used.items() if value is not None}


def describe_engine(trainer: RunTrainer) -> dict[str, Any]:
    """How batches are laid out, and the tokens that went through the policy in training; all processes ask together."""
    computed, padded = trainer.tally.tokens_of_all()
    layout = trainer.layout.shared_prefix if isinstance(trainer, PreferenceTrainer) else "sft computes padded batches"
    return {
        "shared_prefix": layout,
        "head_in_chunks": hasattr(output_head(trainer.model), MARK),
        "last_layer_in_part": isinstance(trainer, PreferenceTrainer) and trainer.layout.last_layer_in_part,
        "compiled_layers": trainer.compiler.layers,
        "compiled_in_pieces": trainer.compiler.in_pieces,
        "pair_by_pair": trainer.layout.pair_by_pair if isinstance(trainer, PreferenceTrainer) else None,
        "tokens_computed": computed,
        "tokens_padded_equivalent": padded,
    }
