"""A run from its first step to its record: trains, stops in good order, evaluates, saves."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from utils.checkpoints import checkpoint_step, find_checkpoints, find_resume_point
from utils.data.loading import PreferenceData
from utils.errors import Interrupted, UserError
from utils.models.head import MARK
from utils.models.loading import Reference
from utils.models.scoring import output_head
from utils.models.sources import ModelSource
from utils.processes import command_to_go_on, identify_process
from utils.runtime import Precision, peak_memory_bytes, read_versions, readable_seconds, say
from utils.saving import EXAMPLES, PAIRS, REPORT, RunRecord, now, read_record, write_json_lines
from utils.settings import Settings
from utils.tracking import say_how_to_upload
from utils.training.callbacks import RunWatcher, StopInGoodOrder, readable_metrics
from utils.training.early_stopping import EarlyStopping, describe_best
from utils.training.examples import choose_examples
from utils.training.preparation import Rows
from utils.training.progress import count_tokens, seconds_left
from utils.training.refusals import refusals_explained
from utils.training.run_folder import RunFolderTrainer
from utils.training.samples import SampleWriter, choose_prompts
from utils.training.trackers import attach_trackers, close_trackers
from utils.training.trainer import PreferenceTrainer

METRIC_NAMES = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logps", "rejected_logps")


@dataclass
class Run:
    """A trainer with its record; `folder` is None in a dry run, which leaves nothing behind."""

    trainer: RunFolderTrainer
    record: RunRecord
    watcher: RunWatcher
    settings: Settings
    precision: Precision
    rows: Rows
    data: PreferenceData
    folder: Path | None
    resume_from: Path | None

    def train(self) -> None:
        """Trains to the end.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the state was saved.
        """
        try:
            with StopInGoodOrder(self.watcher), refusals_explained(self.settings, lambda: self.watcher.begun):
                self.trainer.train(resume_from_checkpoint=str(self.resume_from) if self.resume_from else None)
        except KeyboardInterrupt:
            self.end("interrupted")
            raise
        except BaseException as error:
            self._record_failure(error)
            raise
        if self.watcher.interrupted:
            self.end("interrupted")
            raise Interrupted(self._how_to_go_on())

    def _record_failure(self, error: BaseException) -> None:
        texts = error.faults if isinstance(error, UserError) else [f"{type(error).__name__}: {error}"]
        for text in texts if self.watcher.begun else ():
            self.record.warn(text)
        self.end("failed", failure=texts[0].partition("\n")[0])

    def end(self, status: str, **values: Any) -> None:
        """The last record of the run, and its report."""
        if self.watcher.begun:
            values |= {"seconds_left": None, "resources": self.resources()}
        self.record.update(status=status, **values)
        close_trackers(self.trainer, self.record)
        if self.watcher.report is not None and self.trainer.args.should_save and self.watcher.begun:
            self.watcher.report.write(now=True)

    def _how_to_go_on(self) -> str:
        step = self.trainer.state.global_step
        if self.folder is None or not find_checkpoints(self.folder):
            return f"interrupted at step {step}; no checkpoint was saved"
        command = command_to_go_on(self.record.content["arguments"], self.trainer.args.world_size)
        return f"interrupted at step {step}, its state is saved; to go on:\n  {command}"

    def resources(self) -> dict[str, Any]:
        """What the run used so far, its parts before a resume included: seconds, GPU hours and cost. Of this part
        alone: seconds of the training loop, rows and tokens of the data per second, and peak memory in bytes."""
        seconds, wall = self.watcher.stopwatch.seconds, self.watcher.wall_seconds
        rows, tokens = self._rows_seen(), self.tokens_seen()
        device_hours = self.trainer.args.world_size * wall / 3600
        price = self.settings.run.cost_per_hour
        return {
            "seconds": wall,
            "train_seconds": seconds,
            "pairs_per_second": rows / seconds if seconds else 0.0,
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "peak_memory_bytes": peak_memory_bytes(self.precision.device),
            "gpu_hours": device_hours if self.precision.device.type == "cuda" else 0.0,
            "cost": device_hours * price if price is not None else None,
        }

    def tokens_seen(self) -> int:
        """Tokens of the data trained on in this part of the run, in all processes, each as much as the main one."""
        return self.trainer.tokens_seen * self.trainer.args.world_size

    def _passes(self) -> float:
        """How often the schedule goes through the data."""
        args = self.trainer.args
        if args.max_steps <= 0:
            return args.num_train_epochs
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return self.trainer.state.max_steps * step / len(self.rows.train)

    def _rows_seen(self) -> float:
        done = self.trainer.state.global_step - self.watcher.resumed_step
        return len(self.rows.train) * self._passes() * done / max(self.trainer.state.max_steps, 1)

    def seconds_left(self) -> float:
        """How long the run will take yet, from its speed so far."""
        trainer, watcher = self.trainer, self.watcher
        of_schedule = self.tokens_in_data * self._passes()
        begun_at, seen = watcher.resumed_step, self.tokens_seen()
        return seconds_left(trainer.args, trainer.state, watcher.stopwatch, begun_at, seen, of_schedule)

    @cached_property
    def tokens_in_data(self) -> int:
        """Tokens of one pass over the rows that are trained on."""
        return count_tokens(self.rows.train)

    def engine(self) -> dict[str, Any]:
        """How batches are laid out, and the tokens that went through the policy in training."""
        trainer, world = self.trainer, self.trainer.args.world_size
        layout = trainer.shared_prefix if isinstance(trainer, PreferenceTrainer) else "sft computes padded batches"
        return {
            "shared_prefix": layout,
            "head_in_chunks": hasattr(output_head(trainer.model), MARK),
            "tokens_computed": trainer.tokens_computed * world,
            "tokens_padded_equivalent": trainer.tokens_padded * world,
        }


def start_run(
    trainer: RunFolderTrainer,
    reference: Reference | None,
    source: ModelSource,
    data: PreferenceData,
    rows: Rows,
    settings: Settings,
    precision: Precision,
    folder: Path | None,
    arguments: list[str],
    warnings: list[str],
) -> Run:
    """Attaches to the trainer what watches and records it; nothing is written before its first step can be taken."""
    wish = settings.run.resume_from_checkpoint
    resume_from = find_resume_point(folder, wish) if folder is not None else None
    former = read_record(folder) if resume_from is not None else None
    if wish is not None:
        say(
            f"resuming from {resume_from}"
            if resume_from
            else "no checkpoint to resume from yet: starting from the beginning"
        )
    content = _first_record(trainer, reference, data, rows, settings, arguments)
    made = trainer.record.content  # while the trainer was made
    warnings = [*warnings, *made.get("warnings", [])]
    record = RunRecord(content | _origins(source, reference, precision) | made | {"warnings": warnings})
    trainer.record = record
    if former is not None:
        record.content["metrics"] = former.get("metrics", {})
        record.content["started"] = former.get("started", record.content["started"])
        trainer.args.eval_on_start = False
    earlier = ((former or {}).get("resources") or {}).get("seconds") or 0.0
    watcher = RunWatcher(record, folder, resume_from is None, settings.run.max_kl, earlier)
    trainer.stopwatch, trainer.place = watcher.stopwatch, data.place
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watcher)
    patience = settings.training.early_stopping_patience
    if patience is not None and not settings.run.dry_run:
        trainer.add_callback(EarlyStopping(patience, settings.training.early_stopping_metric, record))
    if settings.run.sample_during_eval:
        trainer.add_callback(SampleWriter(trainer, choose_prompts(data, rows, trainer, settings), settings, folder))
    step = checkpoint_step(resume_from) if resume_from is not None else 0
    record.content["wandb_run_id"] = attach_trackers(trainer, settings.run, former, step)
    run = Run(trainer, record, watcher, settings, precision, rows, data, folder, resume_from)
    watcher.resources, watcher.seconds_left = run.resources, run.seconds_left
    return run


def _first_record(
    trainer: RunFolderTrainer,
    reference: Reference | None,
    data: PreferenceData,
    rows: Rows,
    settings: Settings,
    arguments: list[str],
) -> dict[str, Any]:
    kind = "pairs" if settings.verb == "train" else "rows"
    model = trainer.model
    dropped = dict(data.dropped)
    too_long = rows.truncation.dropped + rows.held_out_truncation.dropped
    if too_long:
        dropped[f"longer than {rows.max_length} tokens"] = too_long
    return {
        "status": "running",
        "verb": settings.verb,
        "started": now(),
        "process": identify_process(),
        "settings": settings.flat(),
        "arguments": arguments,
        "command": shlex.join(["python", "advanced_dpo_script.py", *arguments]),
        "versions": read_versions(),
        "model": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "architecture": (model.config.architectures or [type(model).__name__])[0],
        },
        "data": {
            "source": data.source,
            "reading": data.reading.description,
            f"train_{kind}": len(rows.train),
            f"held_out_{kind}": len(rows.held_out) if rows.held_out is not None else 0,
            "dropped": dropped,
            "sources": [dataclasses.asdict(source) for source in data.sources],
            "truncated": rows.truncation.truncated + rows.held_out_truncation.truncated,
            "max_length": rows.max_length,
            "chat_template": rows.template,
            "shared_prompts": data.shared_prompts,
            "fingerprint": data.fingerprint,
        },
        "reference": reference.how if reference is not None else None,
        "metrics": {},
        "resources": {},
    }


def _origins(source: ModelSource, reference: Reference | None, precision: Precision) -> dict[str, Any]:
    """Where the weights came from, as folders that stay true wherever the script is started from."""
    measured_against = dataclasses.asdict(reference.source) | {"in_4bit": reference.in_4bit} if reference else None
    return {
        "start": dataclasses.asdict(source),
        "reference_model": measured_against,
        "precision": precision.name,
    }


def finish_run(run: Run) -> None:
    """Evaluates, saves the model or adapter at the folder's root, completes the record and says how it went."""
    trainer = run.trainer
    metrics = {"train": training_metrics(trainer.state.log_history)}
    if trainer.eval_dataset is not None:
        metrics["held_out"] = evaluate_last(run)
    if run.folder is None:
        say("dry run: every stage works; nothing was saved")
        return
    trainer.save_model(str(run.folder))
    if trainer.args.should_save and trainer.eval_dataset is not None:
        names = [
            {"id": name, "row": row, "place": run.data.held_out_place(row)}
            for name, row in zip(run.rows.held_out["id"], run.rows.held_out["row"], strict=True)
        ]
        pairs = [{**name, **values} for name, values in zip(names, trainer.held_out_rows, strict=True)]
        write_json_lines(run.folder / PAIRS, pairs)
        write_json_lines(run.folder / EXAMPLES, choose_examples(pairs, run.rows.held_out, run.rows.tokenizer))
    run.end("finished", metrics=metrics, engine=run.engine())
    _say_result(run)


def evaluate_last(run: Run) -> dict[str, float]:
    """Held-out metrics of the model as it is saved; an evaluation that was just made is not made twice."""
    trainer, step = run.trainer, run.trainer.state.global_step
    best = run.record.content.get("early_stopping")
    if best is not None and trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        return trainer.measure()  # not logged: its step has been
    done = [line for line in trainer.state.log_history if "eval_loss" in line and line["step"] == step]
    if done and trainer.held_out_rows and not trainer.args.load_best_model_at_end:
        return {name.removeprefix("eval_"): value for name, value in done[-1].items() if name.startswith("eval_")}
    run.watcher.shows_evaluations = False  # the result is shown beside the one before training
    return {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}


def training_metrics(history: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the whole training, from its log lines, each weighted by the rows it stands for."""
    lines = [line for line in history if "loss" in line and "learning_rate" in line]
    weights = [line["pairs"] if "pairs" in line else line["tokens"] for line in lines]
    names = [name for name in METRIC_NAMES if lines and all(name in line for line in lines)]
    total = sum(weights)
    return {name: sum(line[name] * w for line, w in zip(lines, weights, strict=True)) / total for name in names}


def _say_result(run: Run) -> None:
    content = run.record.content
    before, after = content["metrics"].get("held_out_before"), content["metrics"].get("held_out")
    if before and after:
        say(f"held out: before {readable_metrics(before)}")
        say(f"          after  {readable_metrics(after)}")
    if content.get("early_stopping"):
        say(describe_best(content["early_stopping"]))
    resources, kind = content["resources"], "pairs" if run.settings.verb == "train" else "rows"
    say(
        f"done in {readable_seconds(resources['seconds'])} ({resources['pairs_per_second']:.1f} {kind}/s in training, "
        f"peak memory {resources['peak_memory_bytes'] / 2**30:.1f} GiB)"
    )
    what = "adapter" if "adapter" in str(sorted(p.name for p in run.folder.iterdir())) else "model"
    say(f"{what}, tokenizer and record (run.json): {run.folder}")
    if (run.folder / REPORT).is_file():
        say(f"report: {run.folder / REPORT}")
    say_how_to_upload(run.settings, run.folder, content["wandb_run_id"])
