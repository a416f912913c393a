"""Training from Python: settings in, the finished run out; by the same way as the command, with exceptions.

from advanced_dpo import train

run = train(model_name_or_path="Qwen/Qwen2.5-0.5B-Instruct", dataset_name="pairs.jsonl", output_dir="runs/dpo")
print(run.metrics["held_out"]["accuracy"])
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from .arguments import parse_arguments, words_of
from .console import paints_status
from .engine.memory import keep_freed_memory
from .errors import Interrupted, ProcessLost, UserError
from .interruptions import stop_if_asked
from .libraries import imported_fast
from .progress import phase
from .run.metrics import read_json_lines
from .run.names import METRICS, REPORT
from .run.processes import check_launch_variables, forget_lone_rank
from .run.program import check_installed
from .run.record import read_record
from .runtime import is_main_process, make_visible, quiet_libraries, quiet_loaded_libraries, say
from .settings.flags import SCORES_ROWS, TRAINS, USES_MODEL
from .settings.registry import VERBS, load_named
from .settings.training import Settings

__all__ = ["FinishedRun", "Interrupted", "ProcessLost", "UserError", "carry_out", "sft", "train"]


@dataclass(frozen=True)
class FinishedRun:
    """A run that ended well.

    Args:
        folder: what was --output_dir: the model or adapter with its tokenizer, run.json, report.html. None after a
            dry run, which leaves nothing.
        record: what run.json holds.
    """

    folder: Path | None
    record: Mapping[str, Any]

    @property
    def metrics(self) -> Mapping[str, Any]:
        """`train`, `held_out_before` and `held_out`, each with loss, accuracy, margin and rewards."""
        return self.record.get("metrics") or {}

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, in the order in which they were logged."""
        return read_json_lines(self.folder / METRICS) if self.folder is not None else []

    @property
    def report(self) -> Path | None:
        """The page of the run."""
        return None if self.folder is None else self.folder / REPORT

    def __repr__(self) -> str:
        return f"FinishedRun(folder={str(self.folder)!r}, metrics={dict(self.metrics)!r})"


def train(**settings: str | float | PathLike[str] | list[Any] | tuple[Any, ...] | None) -> FinishedRun:
    """Trains a model on preference pairs with DPO.

    Args:
        settings: the flags of the command by their names, with Python's values; None leaves one at its default.

    Raises:
        UserError: settings, data, files or environment are wrong; `faults` holds a line for each.
        Interrupted: the run was asked to stop, and saved its state.
        ProcessLost: another process of the run ended.
    """
    return _run_training("train", settings)


def sft(**settings: str | float | PathLike[str] | list[Any] | tuple[Any, ...] | None) -> FinishedRun:
    """Trains a model on the chosen responses, or on prompts and completions; otherwise as `train`."""
    return _run_training("sft", settings)


def _run_training(verb: str, values: Mapping[str, Any]) -> FinishedRun:
    if not all(map(str.isidentifier, values)) or {"help", "version"} & set(values):
        raise UserError(f"{', '.join(values)}: settings are given by the names of the flags of `{verb} --help all`")
    forget_lone_rank()
    given = {name: str(value) if isinstance(value, PathLike) else value for name, value in values.items()}
    words = words_of({name: value for name, value in given.items() if value is not None})
    run = carry_out(parse_arguments([verb, *words]), "training.stages:run_training")
    return FinishedRun(run.folder, run.record.content if run.folder is None else read_record(run.folder) or {})


def carry_out(settings: Settings, place: str | None = None) -> Any:
    """Does what checked settings ask for, and returns what the verb's function does.

    Args:
        place: the function, where it is not the one of the verb's row.
    """
    row = VERBS[settings.verb]
    if USES_MODEL in row.kinds:
        check_launch_variables(several=SCORES_ROWS in row.kinds)
    _warn_of_code(settings)
    quiet_libraries()
    keep_freed_memory()
    if row.early is not None and is_main_process():  # what fails without the libraries
        check_installed()
        load_named(row.early)(settings)
    if row.early is not None and TRAINS in row.kinds and not paints_status():
        say(f"{settings.verb}: {settings.model.model_name_or_path}: loading libraries")
    with phase("loading libraries"), imported_fast():
        run = load_named(place or row.run)
    if "transformers" in sys.modules:
        quiet_loaded_libraries()
    stop_if_asked()
    return run(settings)


def _warn_of_code(settings: Settings) -> None:
    """Says, before anything is loaded, that code from elsewhere will run."""
    if settings.model.trust_remote_code and is_main_process():
        name = make_visible(str(settings.model.model_name_or_path))
        print(f"warning: --trust_remote_code runs Python code that comes with {name}", file=sys.stderr, flush=True)
