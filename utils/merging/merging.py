"""An adapter becomes part of its base: a model that stands alone, compared with the two before it gets its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ..errors import UserError, gather
from ..interruptions import stop_if_asked
from ..models.loading import load_tokenizer
from ..models.quantization import check_4bit, check_mergeable
from ..models.trained import TrainedModel, as_in_run, find_trained
from ..run.names import LOCK
from ..run.record import now
from ..run.writing import write_json
from ..runtime import Precision, device_name, read_versions, say
from ..settings.training import Settings
from ..settings.verbs import MergeSettings
from ..training.pushing import push_folder
from .folder import MERGE_RECORD, find_merge_folder, folder_beside, read_merge_record
from .pairs import CheckedTexts, load_texts
from .verifying import (
    STEPS,
    Difference,
    Verdict,
    judge,
    measure_accuracy,
    move_weights,
    refuse,
    score_texts,
    sum_rows,
)
from .weights import (
    FLAG,
    adapt,
    choose_computing,
    choose_saved_dtype,
    load_base,
    load_base_as_trained,
    merge_adapter,
    plain_name,
    read_config,
    save_merged,
)

WORTH_MENTION = 0.05  # of what the adapter changes


@dataclass(frozen=True)
class Plan:
    """What is merged into what, and how it is checked."""

    trained: TrainedModel
    folder: Path
    into_quantized: bool
    saved: torch.dtype
    stored: torch.dtype
    computing: Precision
    tokenizer: PreTrainedTokenizerBase
    texts: CheckedTexts | None


def merge(settings: Settings) -> None:
    """Merges the adapter of --model_name_or_path into its base, checks the result and leaves it in --output_dir.

    Raises:
        UserError: something cannot be used, or the merged model is not the adapter on its base; nothing is left then.
    """
    plan = make_plan(settings)
    describe_plan(plan, settings)
    with folder_beside(plan.folder) as folder:
        record = write_merged(plan, folder, settings)
        write_json(folder / MERGE_RECORD, record)
    say(f"merged model, tokenizer and record ({MERGE_RECORD}): {plan.folder}")
    name, folder = settings.of(MergeSettings).push_to_hub, plan.folder
    if name is not None:
        kept = f"the merged model is in {folder}; upload it later with `hf upload {name} {folder}`"
        say(f"uploaded to {push_folder(f'--push_to_hub {name}', folder, name, 'Merged model', kept)}")


def make_plan(settings: Settings) -> Plan:
    """Everything that can be known and refused before weights are loaded."""
    trained = _find_adapter(settings)
    settings = as_in_run(settings, trained, ["bnb_4bit_quant_type"])
    into_quantized = settings.of(MergeSettings).merge_into == "quantized"
    folder, config, tokenizer, _ = gather(
        lambda: find_merge_folder(settings.run.output_dir, trained, settings.run.overwrite_output_dir),
        lambda: read_config(trained.source, settings.model),
        lambda: load_tokenizer(trained.source, settings.model),
        lambda: _check_quantized(trained, into_quantized),
    )
    texts = None if settings.of(MergeSettings).skip_verification else load_texts(settings, trained, tokenizer)
    stored = choose_saved_dtype("auto", config)
    saved = choose_saved_dtype(settings.model.dtype, config)
    computing = choose_computing(config, stored, settings.model)
    return Plan(trained, folder, into_quantized, saved, stored, computing, tokenizer, texts)


def _find_adapter(settings: Settings) -> TrainedModel:
    name = settings.model.model_name_or_path
    trained = find_trained(FLAG, name, settings.model.model_revision)
    if trained.source.adapter is not None:
        return trained
    former = read_merge_record(Path(trained.source.base))
    if former is not None:
        raise UserError(f"{FLAG} {name}: is merged already (of {former.get('adapter')}); it can be used as it is")
    raise UserError(f"{FLAG} {name}: a full model, not an adapter; there is nothing to merge, use it as it is")


def _check_quantized(trained: TrainedModel, into_quantized: bool) -> None:
    stored = trained.source.stored()
    check_mergeable(FLAG, trained.source.name, trained.source.base, stored)
    if stored is not None:
        check_4bit(f"{FLAG} {trained.source.name}, whose base's files hold the weights in {stored},")
        return
    if not into_quantized:
        return
    if not trained.in_4bit:
        held = "no record says that its base was held" if not trained.record else "its run did not hold its base"
        raise UserError(f"--merge_into quantized: {held} in 4 bits; leave it out")
    check_4bit()


def describe_plan(plan: Plan, settings: Settings) -> None:
    """Says what is merged, into what, and where the comparison computes."""
    source = plan.trained.source
    config = source.adapter_config()
    bits = ", trained on 4 bits" if plan.trained.in_4bit else ""
    say(f"adapter: {source.name} ({_name_kind(config)}{bits})")
    stored = source.stored()
    into = "its 4-bit weights, dequantized" if plan.into_quantized else "its own weights"
    into = f"the weights of its files, in {stored}, dequantized" if stored is not None else into
    reason = "the format of its files" if settings.model.dtype == "auto" else "as asked with --dtype"
    say(f"base: {source.base}: {into}; merged in float32, saved as {_name(plan.saved)} ({reason})")
    if plan.texts is None:
        say("warning: --skip_verification: the merged model is not compared with base and adapter")
        return
    say(f"checked on: {plan.texts.name}, {plan.texts.description} ({plan.texts.tokens:,} response tokens)")
    say(f"device: {device_name(plan.computing.device)}; comparing in {plan.computing.name}")


def _name_kind(config: dict[str, Any]) -> str:
    if config.get("peft_type") != "LORA":
        return str(config.get("peft_type"))
    kind = "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"
    return f"{kind} of rank {config.get('r')}"


def write_merged(plan: Plan, folder: Path, settings: Settings) -> dict[str, Any]:
    """Merges, saves in `folder`, reads back and compares; the content of merge.json.

    Raises:
        UserError: the merged model is not the adapter on its base, to rounding.
    """
    settings = as_in_run(settings, plan.trained, ["bnb_4bit_quant_type"])
    load = load_base_as_trained if plan.into_quantized else load_base
    model = load(plan.trained, settings.model, plan.computing)
    adapted = without = None
    if plan.texts is not None:
        without = score_texts(model, plan.texts)  # before the adapter is there, since some change their base
    model = adapt(model, plan.trained.source)
    if plan.texts is not None:
        adapted = score_texts(model, plan.texts)
    stop_if_asked()  # before anything is written
    modules = {plain_name(name) for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)}
    merged = merge_adapter(model, plan.trained.source, plan.saved, settings.of(MergeSettings).safe_merge)
    code = save_merged(merged, plan.tokenizer, plan.trained.source, folder, settings.of(MergeSettings).max_shard_size)
    if code:
        say(f"warning: the base's Python code is copied along ({', '.join(code)}): loading the merged model runs it")
    del model, merged
    record = _describe_merge(plan, folder, settings)
    if plan.texts is None:
        return record | {"verification": None}
    verdict, log_probs = _compare(
        plan, folder, adapted, without, None if plan.saved != plan.stored else modules, settings
    )
    say(f"merged: log-probs differ from those of the adapter on its base by {verdict.difference}")
    say(f"        allowed: {verdict.bound} (the measured effect of rounding this model to {_name(plan.saved)})")
    say(f"        the adapter itself changes them by {verdict.effect}{_say_lost(verdict)}")
    record["verification"] = verdict.record() | _describe_texts(plan)
    if plan.trained.in_4bit:
        record["verification"]["trained_on_4bit"] = _compare_with_trained(plan, adapted, without, log_probs, settings)
    return record


def _compare(
    plan: Plan,
    folder: Path,
    adapted: torch.Tensor,
    without: torch.Tensor,
    modules: Collection[str] | None,
    settings: Settings,
) -> tuple[Verdict, torch.Tensor]:
    """The verdict on the model that the folder holds, and its log-probs."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=plan.computing.dtype, trust_remote_code=settings.model.trust_remote_code
    )
    model = model.to(plan.computing.device).eval()
    merged = score_texts(model, plan.texts)
    move_weights(model, max(STEPS[plan.saved], STEPS[plan.computing.dtype]), modules)
    verdict = judge(adapted, without, merged, score_texts(model, plan.texts))
    refuse(verdict)
    return verdict, merged


def _compare_with_trained(
    plan: Plan, adapted: torch.Tensor, without: torch.Tensor, merged: torch.Tensor, settings: Settings
) -> dict[str, Any] | str:
    """How far the merged model is from the policy that was trained, with the base in 4 bits."""
    if not plan.into_quantized:
        try:
            check_4bit()
        except UserError as fault:
            say(f"        not compared with the model that was trained: {fault}")
            return str(fault)
        trained = adapt(load_base_as_trained(plan.trained, settings.model, plan.computing), plan.trained.source)
        adapted = score_texts(trained, plan.texts)
        del trained
    apart = Difference.between(adapted, merged)
    found = dataclasses.asdict(apart)
    say(f"trained on 4 bits: its log-probs differ from the merged model's by {apart}")
    if not plan.into_quantized:
        say("        that is quantization, not merging; --merge_into quantized gives the model that was trained")
    if plan.texts.reference is not None:
        before, after = (measure_accuracy(part, plan.texts, plan.texts.reference) for part in (adapted, merged))
        say(f"        accuracy against the run's reference: {before:.1%} as trained, {after:.1%} merged")
        found |= {"accuracy_as_trained": before, "accuracy_merged": after}
        reference = plan.trained.reference
        if not plan.into_quantized and (reference.base, reference.adapter) == (plan.trained.source.base, None):
            own = measure_accuracy(merged, plan.texts, sum_rows(without, plan.texts))
            say(f"        merged, against its base in full precision: {own:.1%}")
            found["accuracy_merged_against_base"] = own
    return found


def _say_lost(verdict: Verdict) -> str:
    if verdict.lost < 0.001:
        return ""
    advice = " (--dtype float32 keeps it)" if verdict.lost >= WORTH_MENTION else ""
    return f"; the difference is {verdict.lost:.1%} of that{advice}"


def _describe_merge(plan: Plan, folder: Path, settings: Settings) -> dict[str, Any]:
    source = plan.trained.source
    return {
        "created": now(),
        "adapter": source.adapter,
        "adapter_revision": source.adapter_revision,
        "base": source.base,
        "base_revision": source.revision,
        "run": str(plan.trained.folder) if plan.trained.folder else None,
        "merged_into": settings.of(MergeSettings).merge_into,
        "dtype": _name(plan.saved),
        "settings": settings.flat(),
        "versions": read_versions(),
        "files": sorted(path.name for path in folder.iterdir() if path.name != LOCK),
    }


def _describe_texts(plan: Plan) -> dict[str, Any]:
    texts = plan.texts
    computing = {"computed_in": plan.computing.name, "device": device_name(plan.computing.device)}
    return {"data": texts.description, "texts": texts.name, "tokens": texts.tokens} | computing


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
