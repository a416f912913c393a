"""What single values cannot show: settings that contradict each other, do nothing, or are incomplete.

Here are the checks of a training run; those of one verb alone are in verb_checks.py, and each verb's row names its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from ..errors import UserError
from ..objectives.losses import BY_NAME, LOSSES, reading
from ..settings.changes import ALL_SETTINGS, CANNOT_CHANGE, GROUPS
from ..settings.registry import VERBS, acts_as, load_named
from ..settings.training import ALL_OR_NONE, TRACKERS, Settings
from .candidate import Candidate, check
from .flag_values import is_number
from .trainer_fields import trainer_fields

HELD_OUT_METRICS = {
    "train": ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logps", "rejected_logps"),
    "sft": ("loss", "perplexity", "token_accuracy"),
}


def cross_faults(candidate: Candidate) -> list[str]:
    """Every fault of the settings as a whole, one line each."""
    checks = VERBS[candidate.settings.verb].checks
    return [
        fault
        for one in (load_named(checks) if checks else ())
        if candidate.broken.isdisjoint(one.rests_on)
        for fault in one(candidate)
    ]


def check_adapter_flags(settings: Settings, adapter_found: bool) -> None:
    """The checks that rest on whether the model carries an adapter, once that is known.

    Raises:
        UserError: a setting has no effect, or cannot be, with what was found.
    """
    candidate = Candidate(settings, {}, frozenset(), adapter_found)
    faults = [*lora_without_adapter(candidate), *four_bits(candidate), *moving_reference(candidate)]
    if faults:
        raise UserError(*faults)


@check()
def required(candidate: Candidate) -> Iterator[str]:
    wanted = {
        "model_name_or_path": "name a hub model, a folder with a model, or a folder with an adapter",
        "dataset_name": "name a hub dataset, a folder or a file",
    }
    if not candidate["dry_run"]:
        wanted["output_dir"] = "name the folder for the results (or pass --dry_run, which saves nothing)"
    for name, advice in wanted.items():
        if candidate[name] is None and name not in candidate.broken:
            yield f"--{name} is missing: {advice}"


@check("use_lora", "adapter_name_or_path", "model_name_or_path")
def lora_without_adapter(candidate: Candidate) -> Iterator[str]:
    if candidate["use_lora"] or candidate.may_have_adapter:
        return
    shape = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
    for name in candidate.given(*shape):
        if candidate[name] is not False:
            yield f"{candidate.label(name)}: has no effect without --use_lora; add it or leave this out"


@check("use_4bit", "use_lora", "adapter_name_or_path", "model_name_or_path")
def four_bits(candidate: Candidate) -> Iterator[str]:
    if (
        candidate["use_4bit"]
        and acts_as(candidate.settings.verb) == "sft"
        and not (candidate["use_lora"] or candidate.may_have_adapter)
    ):
        yield f"{candidate.label('use_4bit')}: 4-bit weights cannot be trained; add --use_lora"
    if not candidate["use_4bit"] and candidate.given("bnb_4bit_quant_type"):
        yield f"{candidate.label('bnb_4bit_quant_type')}: has no effect without --use_4bit; add it or leave this out"


@check("report_to")
def trackers(candidate: Candidate) -> Iterator[str]:
    names, label = candidate["report_to"], candidate.label("report_to")
    known = (*TRACKERS, *ALL_OR_NONE)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            yield f"{label} is {name!r}: {hint}must be of {', '.join(known)}"
    for word in ALL_OR_NONE:
        if word in names and len(set(names)) > 1:
            yield f"{label} is {' '.join(names)}: {word} cannot be combined with others"


@check("report_to", "use_wandb")
def weights_and_biases(candidate: Candidate) -> Iterator[str]:
    names, use, label = candidate["report_to"], candidate["use_wandb"], candidate.label("use_wandb")
    if use and names in (("all",), ("none",)):
        reason = "already includes W&B" if names == ("all",) else "means no tracker"
        yield f"{label}: --report_to {names[0]} {reason}; leave out one of the two"
    if candidate.given("use_wandb") and not use and ("wandb" in names or "all" in names):
        yield f"{label} is false, but --report_to is {' '.join(names)}: name the trackers without wandb"
    if not use and "wandb" not in names and "all" not in names:
        for name in candidate.given("wandb_project", "wandb_run_name", "wandb_entity", "wandb_tags"):
            yield f"{candidate.label(name)}: has no effect without --use_wandb; add it or leave this out"


@check("resume_from_checkpoint", "overwrite_output_dir", "dry_run")
def resuming(candidate: Candidate) -> Iterator[str]:
    if candidate["resume_from_checkpoint"] is None:
        return
    label = candidate.label("resume_from_checkpoint")
    if candidate["overwrite_output_dir"]:
        yield f"{label}: --overwrite_output_dir would delete the run that is to be resumed; leave out one of the two"
    if candidate["dry_run"]:
        yield f"{label}: --dry_run starts from the beginning and saves nothing; leave out one of the two"


@check("allow_changes", "resume_from_checkpoint")
def allowed_changes(candidate: Candidate) -> Iterator[str]:
    label, fields = candidate.label("allow_changes"), trainer_fields(candidate.settings.verb)
    known = {*GROUPS, ALL_SETTINGS, *candidate.values, *fields}
    for name in candidate["allow_changes"]:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            yield f"{label} is {name!r}: {hint}must be of {', '.join((*GROUPS, ALL_SETTINGS))}, or the name of a flag"
        elif name in CANNOT_CHANGE:
            yield f"{label} {name}: a checkpoint cannot be loaded with another value; leave it out, or start a new run"
    if candidate["allow_changes"] and candidate["resume_from_checkpoint"] is None:
        yield f"{label}: has no effect without --resume_from_checkpoint; add it or leave this out"


@check("loss_type", "loss_weights")
def losses(candidate: Candidate) -> Iterator[str]:
    names, weights = candidate["loss_type"], candidate["loss_weights"]
    first_name: dict[str, str] = {}
    for name in names:
        same = first_name.setdefault(BY_NAME[name].name, name)
        if names.count(name) > 1:
            yield f"{candidate.label('loss_type')}: {name} is given twice; name each loss once"
        elif same != name:
            yield f"{candidate.label('loss_type')}: {same} and {name} are the same loss; name it once"
    if weights is not None and len(weights) != len(names):
        yield (
            f"{candidate.label('loss_weights')} has {len(weights)} for {len(names)} losses ({' '.join(names)}): "
            "give one weight per loss"
        )


@check("loss_type", "label_smoothing")
def smoothing(candidate: Candidate) -> Iterator[str]:
    names, label = candidate["loss_type"], candidate.label("label_smoothing")
    if candidate["label_smoothing"]:
        smoothed = reading("label_smoothing")
        if not {BY_NAME[name].name for name in names} & set(smoothed):
            yield f"{label}: has no effect on {' '.join(names)}; it is for {', '.join(smoothed)}"
        return
    for name in names:
        if usual := BY_NAME[name].needs_smoothing.get(name):
            yield f"{candidate.label('loss_type')} {name}: needs --label_smoothing above 0 ({usual} is usual)"


@check("loss_type", "f_divergence_type")
def loss_fields(candidate: Candidate) -> Iterator[str]:
    chosen = {BY_NAME[name].name: BY_NAME[name] for name in sorted(candidate["loss_type"])}
    divergence = candidate["f_divergence_type"]
    for loss in LOSSES.values():
        for name in candidate.given(*loss.parameters) if loss.name not in chosen else ():
            yield f"{candidate.label(name)}: has no effect without --loss_type {loss.name}"
    if candidate.given("f_alpha_divergence_coef") and divergence != "alpha_divergence":
        label = candidate.label("f_alpha_divergence_coef")
        yield f"{label}: has no effect without --f_divergence_type alpha_divergence"
    if divergence != "reverse_kl":
        for loss in chosen.values():
            if loss.reads_reference and "divergence" not in loss.reads:
                yield f"{candidate.label('f_divergence_type')} {divergence}: is not defined for the loss {loss.name}"
    for loss in (loss for loss in chosen.values() if loss.sorts_pairs):
        for limit in candidate.given("max_tokens_per_batch", "auto_batch_size"):
            if candidate[limit]:
                yield f"{candidate.label(limit)}: would change the groups of pairs that {loss.name} sorts"
        if candidate["use_weighting"]:
            yield f"{candidate.label('use_weighting')}: cannot weigh the pairs of {loss.name}, which sorts them"


@check("auto_batch_size", "max_tokens_per_batch")
def batch_size(candidate: Candidate) -> Iterator[str]:
    if not candidate["auto_batch_size"]:
        return
    label = candidate.label("auto_batch_size")
    if candidate["max_tokens_per_batch"] is not None:
        yield f"{label}: finds the value that --max_tokens_per_batch sets; leave out one of the two"
    if candidate.settings.verb == "plan":
        yield f"{label}: runs trial batches, and plan runs nothing; it finds the largest that fits anyway"


@check("use_lora", "adapter_name_or_path", "model_name_or_path", "sync_ref_model")
def moving_reference(candidate: Candidate) -> Iterator[str]:
    if not candidate["sync_ref_model"]:
        for name in candidate.given("ref_model_mixup_alpha", "ref_model_sync_steps"):
            yield f"{candidate.label(name)}: has no effect without --sync_ref_model"
        return
    label = candidate.label("sync_ref_model")
    if candidate["use_lora"] or candidate.has_adapter:
        yield f"{label}: needs a full model as reference, and an adapter's reference is its own base; leave out one"
    if candidate["use_4bit"]:
        yield f"{label}: cannot update a reference that --use_4bit holds in 4 bits; leave out one of the two"
    if candidate["precompute_ref_log_probs"]:
        yield f"{label}: updates the reference that --precompute_ref_log_probs scores once; leave out one of the two"


@check("sample_during_eval", "validation_split")
def samples(candidate: Candidate) -> Iterator[str]:
    label = candidate.label("sample_during_eval")
    if not candidate["sample_during_eval"]:
        for name in candidate.given("num_eval_samples", "sample_max_new_tokens"):
            yield f"{candidate.label(name)}: has no effect without --sample_during_eval; add it or leave this out"
    elif candidate["validation_split"] == "none":
        yield f"{label}: there is nothing to evaluate with --validation_split none; leave out one"


@check("validation_split", "dataset_split", "eval_strategy")
def splits(candidate: Candidate) -> Iterator[str]:
    held_out, label = candidate["validation_split"], candidate.label("validation_split")
    if held_out is None:
        return
    if is_number(held_out) and not 0 < float(held_out) < 1:
        yield f"{label} is {held_out}: must be a fraction above 0 and below 1, the name of a split, or none"
    if held_out == candidate["dataset_split"]:
        yield f"{label} is {held_out}: is also the split to train on; name another, or a fraction"
    if held_out == "none":
        for name in candidate.given("eval_steps"):
            yield f"{candidate.label(name)}: there is nothing to evaluate with --validation_split none; leave out one"
        if candidate["eval_strategy"] in ("steps", "epoch"):
            yield f"{candidate.label('eval_strategy')}: there is nothing to evaluate with --validation_split none"


@check("streaming", "max_steps")
def streaming(candidate: Candidate) -> Iterator[str]:
    if not candidate["streaming"]:
        return
    label = candidate.label("streaming")
    if candidate["max_steps"] == -1:
        yield f"{label}: needs --max_steps, which says how much is read"
    for name in candidate.given("num_train_epochs", "max_samples", "dataset_num_proc"):
        yield f"{candidate.label(name)}: has no effect with --streaming, whose length is --max_steps; leave it out"


@check()
def columns(candidate: Candidate) -> Iterator[str]:
    if candidate.given("text_column"):
        for name in candidate.given("prompt_column", "completion_column", "chosen_column"):
            yield f"{candidate.label(name)}: --text_column already holds the whole text; leave out one of the two"
    if candidate.given("dataset_adapter"):
        names = ("dataset_format", "prompt_column", "chosen_column", "rejected_column", "completion_column")
        for name in candidate.given(*names, "text_column"):
            yield f"{candidate.label(name)}: --dataset_adapter already says how rows are read; leave out one of the two"
    if candidate.given("completion_column") and candidate.given("chosen_column"):
        yield f"{candidate.label('completion_column')}: --chosen_column names the response too; leave out one"


@check()
def best_model(candidate: Candidate) -> Iterator[str]:
    name, names = candidate["metric_for_best_model"], HELD_OUT_METRICS[acts_as(candidate.settings.verb)]
    if name is not None and name.removeprefix("eval_") not in names:
        yield f"{candidate.label('metric_for_best_model')} is {name!r}: must be one of {', '.join(names)}"


@check("neftune_noise_alpha")
def noise(candidate: Candidate) -> Iterator[str]:
    alpha = candidate["neftune_noise_alpha"]
    if alpha is not None and alpha < 0:
        yield f"{candidate.label('neftune_noise_alpha')} is {alpha}: must be at least 0; 5 is usual"


@check("early_stopping_patience", "early_stopping_metric", "eval_steps", "validation_split")
def early_stopping(candidate: Candidate) -> Iterator[str]:
    if candidate["early_stopping_patience"] is None:
        for name in candidate.given("early_stopping_metric"):
            yield f"{candidate.label(name)}: has no effect without --early_stopping_patience; add it or leave this out"
        return
    label = candidate.label("early_stopping_patience")
    if candidate["validation_split"] == "none":
        yield f"{label}: there is nothing to evaluate with --validation_split none; leave out one of the two"
    elif candidate["eval_steps"] is None and candidate["eval_strategy"] not in ("steps", "epoch"):
        yield f"{label}: needs --eval_steps, which says when the held-out rows are evaluated"
    if candidate["save_strategy"] == "no":
        yield f"{label}: cannot keep the best model with --save_strategy no; leave out one of the two"
    for name in ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"):
        if candidate.given(name):
            yield f"{candidate.label(name)}: {label} keeps the best model by --early_stopping_metric; leave this out"
    metric = candidate["early_stopping_metric"]
    if acts_as(candidate.settings.verb) == "sft" and metric != "loss":
        yield f"{candidate.label('early_stopping_metric')} is {metric}: sft has no pairs, so it must be loss"


@check("max_kl", "validation_split")
def divergence_bound(candidate: Candidate) -> Iterator[str]:
    if candidate["max_kl"] is not None and candidate["validation_split"] == "none":
        yield f"{candidate.label('max_kl')}: nothing is measured with --validation_split none; leave out one of the two"


OF_RUN = (
    lora_without_adapter,
    four_bits,
    trackers,
    weights_and_biases,
    resuming,
    allowed_changes,
    samples,
    splits,
    columns,
    streaming,
    best_model,
    noise,
    early_stopping,
)
OF_PAIRS = (losses, smoothing, loss_fields, divergence_bound, batch_size, moving_reference)
TRAIN = (required, *OF_RUN, *OF_PAIRS)
SFT = (required, *OF_RUN)
