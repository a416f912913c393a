"""A run from its first step to its last: trains, is recorded, stops in good order."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from ..data.loading import PreferenceData
from ..engine.head import MARK
from ..engine.scoring import output_head
from ..errors import Interrupted, ProcessLost, UserError
from ..interruptions import stop_if_asked
from ..models.counting import count_parameters
from ..models.loading import Reference
from ..models.sources import ModelSource
from ..models.templates import TEMPLATE_DATE
from ..run.checkpoints import checkpoint_step, find_checkpoints
from ..run.processes import command_to_go_on, identify_process
from ..run.record import RunRecord, now, read_record
from ..runtime import Precision, device_name, is_main_process, peak_memory_bytes, read_versions, say
from ..settings.training import Settings
from .bad_batches import BadBatches
from .callbacks import RunWatcher, StopInGoodOrder
from .early_stopping import EarlyStopping
from .failures import explain_failure
from .launch import check_resumable, explain_lost_process, speaks
from .progress import count_tokens, seconds_left
from .refusals import refusals_explained
from .rows import Rows
from .run_folder import RunFolderTrainer
from .samples import SampleWriter, choose_prompts
from .start import StartCheck
from .trackers import attach_trackers, close_trackers
from .trainer import PreferenceTrainer


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
            UserError, ProcessLost: it ended before; the message says what is safe.
        """
        with (
            self.failing_in_good_order(),
            StopInGoodOrder(self.watcher),
            refusals_explained(self.settings, lambda: self.watcher.begun),
        ):
            stop_if_asked()  # before; from here on signals are the watcher's
            self.trainer.train(resume_from_checkpoint=str(self.resume_from) if self.resume_from else None)
            self._check_steps()
        if self.watcher.interrupted:
            self.end("interrupted")
            raise Interrupted(self._how_to_go_on())

    def _check_steps(self) -> None:
        """Says it where training ended before its last step and nothing asked it to.

        Raises:
            UserError: no step was taken at all.
        """
        state, stopped = self.trainer.state, (self.record.content.get("early_stopping") or {}).get("stopped")
        if state.global_step >= state.max_steps or self.watcher.interrupted or stopped:
            return
        if state.global_step == 0:
            raise UserError(
                f"no step was taken, of {state.max_steps} that were planned: the {len(self.rows.train)} rows to train "
                "on gave no batch; nothing is saved"
            )
        self.trainer.warn(
            f"training ended after step {state.global_step} of {state.max_steps}: its rows gave no more batches"
        )

    @contextlib.contextmanager
    def failing_in_good_order(self) -> Iterator[None]:
        """Records what ends the run before its time, and says it with what is safe and the command that goes on."""
        try:
            yield
        except KeyboardInterrupt:
            self._record_end("interrupted")
            if not self.watcher.begun:
                raise
            raise Interrupted(self._how_to_go_on()) from None
        except BaseException as error:
            explained = self._explain(error)
            if isinstance(explained, ProcessLost):
                explained.spoken = not speaks(self.folder) or (not is_main_process() and self._main_process_failed())
            self._record_failure(explained or error)
            if explained is not None:
                raise explained from error
            raise

    def _explain(self, error: BaseException) -> UserError | ProcessLost | None:
        step = self.trainer.state.global_step
        return explain_failure(error, self.folder, step, self._what_is_safe(), self._command()) or explain_lost_process(
            error, self.record.content, self.folder, step
        )

    def _main_process_failed(self) -> bool:
        return self.folder is not None and (read_record(self.folder) or {}).get("status") == "failed"

    def _what_is_safe(self) -> str:
        checkpoints = find_checkpoints(self.folder) if self.folder is not None else []
        if not checkpoints:
            there = self.folder is not None and self.folder.is_dir()
            return "No checkpoint was saved yet." if there else "What it held is not there now."
        return f"{checkpoints[-1].name} is safe, and everything up to its step."

    def _command(self) -> str:
        return command_to_go_on(self.record.content["arguments"], self.record.content["process"])

    def _record_failure(self, error: BaseException) -> None:
        named = isinstance(error, UserError | ProcessLost)
        texts = getattr(error, "faults", [str(error)]) if named else [f"{type(error).__name__}: {error}"]
        if self.watcher.begun:
            self.record.content["warnings"] += [text for text in texts if text not in self.record.content["warnings"]]
        self._record_end("failed", failure=texts[0].partition("\n")[0])

    def _record_end(self, status: str, **values: Any) -> None:
        """The same as `end`, where the disk may be what failed."""
        with contextlib.suppress(OSError):
            self.end(status, **values)

    def end(self, status: str, **values: Any) -> None:
        """The last record of the run, and its report."""
        if self.watcher.begun:
            state = self.trainer.state  # no line may have been logged yet
            values |= {"seconds_left": None, "resources": self.resources()}
            values |= {"step": state.global_step, "steps": state.max_steps}
        self.record.update(status=status, **values)
        close_trackers(self.trainer, self.record)
        if self.watcher.report is not None and self.trainer.args.should_save and self.watcher.begun:
            self.watcher.report.write(now=True)

    def _how_to_go_on(self) -> str:
        step = self.trainer.state.global_step
        checkpoints = find_checkpoints(self.folder) if self.folder is not None else []
        if not checkpoints:
            return f"interrupted at step {step}; no checkpoint was saved"
        saved = checkpoint_step(checkpoints[-1])
        what = "its state is saved" if saved == step else f"its state as of step {saved} is saved"
        return f"interrupted at step {step}, {what}; to go on:\n  {self._command()}"

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
            "last_layer_in_part": isinstance(trainer, PreferenceTrainer) and trainer.last_layer_in_part,
            "compiled_layers": trainer.compiled_layers,
            "compiled_in_pieces": trainer.compiled_in_pieces,
            "pair_by_pair": trainer.pair_by_pair if isinstance(trainer, PreferenceTrainer) else None,
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
    resume_from: Path | None,
    arguments: list[str],
    warnings: list[str],
) -> Run:
    """Attaches to the trainer what watches and records it; nothing is written before its first step can be taken."""
    wish = settings.run.resume_from_checkpoint
    if resume_from is not None:
        check_resumable(resume_from, trainer.is_deepspeed_enabled)
    before = read_record(folder) if folder is not None and wish is not None else None
    former = before if resume_from is not None else None
    if wish is not None:
        say(
            f"resuming from {resume_from}"
            if resume_from
            else "no checkpoint to resume from yet: starting from the beginning"
        )
    content = _first_record(trainer, reference, data, rows, settings, precision, arguments)
    made = trainer.record.content  # while the trainer was made
    warnings = [*warnings, *made.get("warnings", [])]
    record = RunRecord(content | _origins(source, reference, precision) | made | {"warnings": warnings})
    trainer.record = record
    if former is not None:
        record.content["metrics"] = former.get("metrics", {})
        record.content["started"] = former.get("started", record.content["started"])
        told = [text for text in former.get("warnings") or [] if not text.startswith(former.get("failure") or "\0")]
        record.content["warnings"] = list(dict.fromkeys([*told, *warnings]))
        record.content["alarms"] = former.get("alarms") or []
        trainer.args.eval_on_start = False
    earlier = ((former or {}).get("resources") or {}).get("seconds") or 0.0
    watcher = RunWatcher(record, folder, resume_from is None, settings.run.max_kl, earlier)
    watcher.replaces = wish is None
    trainer.stopwatch, trainer.place = watcher.stopwatch, data.place
    bad_batches = BadBatches(settings.training.skip_bad_batches, data, record, folder)
    trainer.bad_batches = watcher.bad_batches = bad_batches
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watcher)
    if reference is not None:
        trainer.add_callback(StartCheck(trainer, reference))
    patience = settings.training.early_stopping_patience
    if patience is not None and not settings.run.dry_run:
        trainer.add_callback(EarlyStopping(patience, settings.training.early_stopping_metric, record))
    if settings.run.sample_during_eval:
        trainer.add_callback(SampleWriter(trainer, choose_prompts(data, rows, trainer, settings), settings, folder))
    step = checkpoint_step(resume_from) if resume_from is not None else 0
    record.content["wandb_run_id"] = attach_trackers(trainer, settings.run, before, step, record)
    run = Run(trainer, record, watcher, settings, precision, rows, data, folder, resume_from)
    watcher.resources, watcher.seconds_left = run.resources, run.seconds_left
    return run


def _first_record(
    trainer: RunFolderTrainer,
    reference: Reference | None,
    data: PreferenceData,
    rows: Rows,
    settings: Settings,
    precision: Precision,
    arguments: list[str],
) -> dict[str, Any]:
    kind = "pairs" if settings.verb == "train" else "rows"
    model = trainer.model
    dropped, process = data.dropped | rows.bad_rows, identify_process()
    too_long = rows.truncation.dropped + rows.held_out_truncation.dropped
    if too_long:
        dropped[f"longer than {rows.max_length} tokens"] = too_long
    return {
        "status": "running",
        "verb": settings.verb,
        "started": now(),
        "process": process,
        "settings": settings.flat(),
        "used": used_values(trainer, rows, settings, precision),
        "arguments": arguments,
        "command": shlex.join(["python", process["script"], *arguments]),
        "versions": read_versions(),
        "model": {
            **count_parameters(model).record(),
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
            TEMPLATE_DATE: rows.template_date,
            "shared_prompts": data.shared_prompts,
            "fingerprint": data.fingerprint,
        },
        "reference": reference.how if reference is not None else None,
        "metrics": {},
        "resources": {},
    }


def used_values(trainer: RunFolderTrainer, rows: Rows, settings: Settings, precision: Precision) -> dict[str, Any]:
    """Flag name -> the value that the run uses, of those flags whose own value leaves it to the script (None, auto)."""
    decided = {
        "dtype": precision.name,
        "attn_implementation": getattr(trainer.model.config, "_attn_implementation", None),
        "max_length": rows.max_length,
        "chat_template": rows.template,
        "max_tokens_per_batch": trainer.max_tokens,
    }
    if isinstance(trainer, PreferenceTrainer):
        decided["precompute_ref_log_probs"] = trainer.scored_ahead
        decided["engine"] = "shared_prefix" if trainer.shared_prefix is True else "padded"
    used = {}
    for name, value in settings.flat().items():
        if value is None or value == "auto":
            found = decided.get(name, getattr(trainer.args, name, None))
            if isinstance(found, bool | int | float | str):
                used[name] = getattr(found, "value", found)
    return used


def _origins(source: ModelSource, reference: Reference | None, precision: Precision) -> dict[str, Any]:
    """Where the weights came from, as folders that stay true wherever the script is started from."""
    measured_against = dataclasses.asdict(reference.source) | {"in_4bit": reference.in_4bit} if reference else None
    return {
        "start": dataclasses.asdict(source),
        "reference_model": measured_against,
        "precision": precision.name,
        "device": device_name(precision.device),
    }
