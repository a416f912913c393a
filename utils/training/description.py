"""What a run is about to do, in lines for the person who started it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from transformers import TrainingArguments

from ..data.splitting import DEFAULT_MOST_ROWS, SPARE, advise_on_spare
from ..models.counting import count_parameters
from ..models.loading import text_part
from ..models.reference import ReferencePlan
from ..run.checkpoints import preference_step
from ..run.processes import launched_with
from ..runtime import device_name, say
from .context import Run
from .trainer import PreferenceTrainer, RunTrainer

MUCH_TRUNCATED = 0.1  # of all pairs: more is a warning


def describe_data(run: Run) -> None:
    """Says what was read and how."""
    data, rows = run.data, run.rows
    say(f"data: {data.source}: {data.reading.description}")
    for source in data.sources if len(data.sources) > 1 else ():
        drawn = "" if source.drawn == source.good else f"; {source.drawn:,} of {source.good:,} good rows drawn"
        say(f"      {source.name}: {source.train:,} to train on, {source.held_out:,} held out{drawn}")
        say(f"          {source.reading}")
        if source.repeated:
            say(f"          {source.repeated:,} of its rows are duplicates of an earlier source; all are kept")
    held_out = len(rows.held_out) if rows.held_out is not None else 0
    parted = "; no prompt overlap" if held_out and not data.shared_prompts else ""
    say(f"      {len(rows.train):,} rows to train on, {held_out:,} held out{parted}")
    if data.dropped.get(SPARE):
        spare = data.dropped[SPARE]
        say(
            f"      {spare:,} set aside, neither trained on nor evaluated: a tenth of the prompts is held out, and "
            f"{DEFAULT_MOST_ROWS:,} rows of it are evaluated"
        )
        say(f"          {advise_on_spare(len(rows.train) + held_out + spare)}")
    if data.shared_prompts:
        say(f"      warning: {data.shared_prompts} held-out prompts also occur in training")
    for remark in data.reading.remarks:
        say(f"      warning: {remark.rows:,} {remark.title}")
    for reason, count in data.dropped.items():
        if reason != SPARE:
            say(f"      dropped {count:,}: {reason}")
    shortened = rows.truncation.prompts_shortened + rows.held_out_truncation.prompts_shortened
    cut = rows.truncation.completions_cut + rows.held_out_truncation.completions_cut
    too_long = rows.truncation.dropped + rows.held_out_truncation.dropped
    if shortened or cut or too_long:
        say(
            f"      over {rows.max_length} tokens: {shortened:,} with the prompt shortened from its left, "
            f"{cut:,} with a truncated response (it gets no EOS token), {too_long:,} dropped"
        )
    share = cut / max(len(rows.train) + held_out, 1)
    if share > MUCH_TRUNCATED:
        run.record.warn(
            f"{share:.0%} of the {'pairs' if run.learns_pairs else 'responses'} are truncated to --max_length "
            f"{rows.max_length}, so that the model learns beginnings without ends: raise --max_length (`data "
            "--model_name_or_path ...` counts the lengths), or leave them out with --truncation drop",
            aloud=True,
        )
    for reason, count in rows.bad_rows.items():
        say(f"      dropped {count:,}: {reason}")
    if rows.template is not None:
        say(f"      chat template: {rows.template}")
    if rows.reasoning is not None:
        say(f"      reasoning: {rows.reasoning}")
    for warning in rows.warnings:
        say(f"warning: {warning}")


def describe_start(run: Run, trainer: RunTrainer, reference: ReferencePlan) -> None:
    """Says what will be trained, against what, how, and where; warnings among it go into the record."""
    source, precision = run.source, run.precision
    counts, stored = count_parameters(trainer.model), source.stored()
    bits = counts.describe_4bit() or (f" on a base in {stored}" if stored is not None else "")
    share = counts.trainable / max(counts.total, 1)
    say(
        f"policy: {source.name}, {counts.trainable:,} of {counts.total:,} parameters trained ({100 * share:.3g}%){bits}"
    )
    part = text_part(trainer.accelerator.unwrap_model(trainer.model))
    if part is not None:
        say(f"      only {part} is trained: texts never reach the rest, which stays as it is")
    if reference.how is not None:
        say(f"reference: {reference.how}")
    if run.settings.model.use_4bit and not run.adapts:
        say(f"      --use_4bit without --use_lora: 4-bit weights cannot be trained; {_what_is_in_4bit(reference)}")
    if isinstance(trainer, PreferenceTrainer):
        say(f"engine: {describe_layout(trainer)}")
    say(f"batch: {_describe_batch(run, trainer)}")
    say(f"steps: {_describe_steps(run, trainer)}")
    say(
        f"device: {device_name(precision.device)}{_describe_processes(trainer)}; computing in {precision.name} "
        f"({precision.reason})"
    )
    for warning in _warnings(run, trainer, reference):
        run.record.warn(warning, aloud=True)


def _describe_batch(run: Run, trainer: RunTrainer) -> str:
    args, kind = trainer.args, "pairs" if run.learns_pairs else "rows"
    device, micro, processes = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    parts = [f"{device} per device"]
    parts += [f"{micro} accumulation steps"] if micro > 1 else []
    parts += [f"{processes} processes"] if processes > 1 else []
    return (
        f"{device * micro * processes} {kind} per step ({' x '.join(parts)}), up to {run.rows.max_length} tokens each"
    )


def _describe_steps(run: Run, trainer: RunTrainer) -> str:
    args, training = trainer.args, run.settings.training
    steps = steps_of_run(run, args)
    epochs = training.num_train_epochs
    length = f"{steps:,}" if training.max_steps > 0 else f"{steps:,} in {epochs:g} epoch{'s' if epochs != 1 else ''}"
    return f"{length}, {args.get_warmup_steps(steps):,} of warm-up to a learning rate of {args.learning_rate:g}"


def steps_of_run(run: Run, args: TrainingArguments) -> int:
    """Optimizer steps of the run as it is asked for, a dry run's too."""
    training = run.settings.training
    if training.max_steps > 0:
        return training.max_steps
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return math.ceil(training.num_train_epochs * max(math.ceil(len(run.rows.train) / a_step), 1))


def _what_is_in_4bit(reference: ReferencePlan) -> str:
    if reference.in_4bit:
        return "the reference is held in 4 bits"
    return "the reference was scored ahead, so that nothing is held in 4 bits, nor rounded"


def _describe_processes(trainer: RunTrainer) -> str:
    count = trainer.args.world_size
    if count == 1:
        return ""
    sharded = "FSDP2" if trainer.is_fsdp_enabled else "DeepSpeed" if trainer.is_deepspeed_enabled else None
    return f" in each of {count} processes ({f'sharded by {sharded}' if sharded else 'DDP: all weights in each'})"


def _warnings(run: Run, trainer: RunTrainer, reference: ReferencePlan) -> Iterator[str]:
    source, settings = run.source, run.settings
    if settings.model.trust_remote_code:
        yield f"--trust_remote_code runs Python code that comes with {source.base}"
    counts = count_parameters(trainer.model)
    if counts.wide:
        yield (
            f"{1 - counts.share_in_4bit:.0%} of the base's weights are not in 4 bits: bitsandbytes leaves fused "
            f"experts ({counts.wide[0]} and {len(counts.wide) - 1} more) in 16 or 32 bits, so they take as much "
            "memory as without --use_4bit"
        )
    if launched_with("FSDP") and not trainer.is_fsdp_enabled:
        yield "FSDP is configured, but nothing is sharded: accelerate shards over several GPUs only"
    left_out = getattr(trainer.model, "left_out", None)
    if left_out:
        yield (
            f"{len(left_out)} weights in the files of {source.base} have no place in the model of its config.json "
            f"({', '.join(left_out[:2])}{', ...' if len(left_out) > 2 else ''}): they are neither used nor saved"
        )
    rounded_to = getattr(trainer.model, "rounded_to", None)
    if rounded_to is not None:
        yield (
            f"many weights of {source.name} lie half-way between two numbers of {rounded_to}, as in files of another "
            f"16-bit format: training begins from weights rounded to {rounded_to}, as they are computed with; "
            "--dtype float32 begins from the files' own"
        )
    if reference is not None and settings.model.named_reference is None:
        step = preference_step(Path(source.name))
        if step is not None:
            folder = Path(source.name).parent
            yield (
                f"{source.name} is step {step} of a preference run, and this is a new run: its reference is the policy "
                f"as it was at that step, so rewards begin at 0 again and the reference of that run no longer holds. "
                f"To continue that run: --output_dir {folder} --resume_from_checkpoint auto, with its other settings"
            )


def describe_layout(trainer: PreferenceTrainer) -> str:
    """How batches are laid out, as a phrase."""
    compiled = f"layers compiled{' in pieces' if trainer.compiler.in_pieces else ''}" if trainer.compiler.layers else ""
    if trainer.layout.shared_prefix is True:
        slower = (
            f"; attention pair by pair: with FlexAttention {trainer.layout.pair_by_pair}"
            if trainer.layout.pair_by_pair
            else ""
        )
        more = f"; {compiled}" if compiled else ""
        return f"each prompt computed once, no padding (checked on real pairs against plain rows{slower}{more})"
    return f"padded batches: {trainer.layout.shared_prefix}{f' ({compiled})' if compiled else ''}"
