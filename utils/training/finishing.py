"""The end of a run: the last evaluation, the model at the folder's root, the record, the last lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..interruptions import stop_if_asked
from ..report.run_verdict import describe_run
from ..run.names import ADAPTER_CONFIG, EXAMPLES, MODEL_FILES, PAIRS, REPORT
from ..run.program import join_command
from ..run.writing import write_json_lines
from ..runtime import readable_bytes, readable_seconds, say
from .callbacks import readable_metrics
from .context import Run
from .description import steps_of_run
from .early_stopping import describe_best, find_kept
from .examples import choose_examples
from .pushing import push_folder
from .recording import describe_engine
from .running import LiveRun
from .tracking import say_how_to_upload

METRIC_NAMES = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logps", "rejected_logps")


def finish_run(live: LiveRun) -> None:
    """Evaluates, saves the model or adapter at the folder's root, completes the record and says how it went.

    With --push_to_hub the model is uploaded then: its weights, configs and tokenizer, no record and no checkpoint.

    Raises:
        Interrupted, UserError, ProcessLost: as in training; the run is finished when its record says so, which is last.
        UserError: also where it cannot be uploaded; the run stays finished.
    """
    with live.failing_in_good_order():
        _finish(live)
    run = live.run
    if run.folder is None:
        return
    _say_result(live)
    if live.trainer.args.should_save and run.settings.trainer_fields.get("push_to_hub"):
        _push(run)


def _finish(live: LiveRun) -> None:
    run, trainer = live.run, live.trainer
    metrics = {"train": training_metrics(trainer.state.log_history)}
    if trainer.eval_dataset is not None:
        metrics["held_out"] = evaluate_last(live)
    stop_if_asked()
    if run.folder is None:
        _say_forecast(live)
        return
    trainer.save_at_root(run.folder)
    if trainer.args.should_save and trainer.eval_dataset is not None:
        names = [
            {"id": name, "row": row, "place": run.data.held_out_place(row)}
            for name, row in zip(run.rows.held_out["id"], run.rows.held_out["row"], strict=True)
        ]
        pairs = [{**name, **values} for name, values in zip(names, trainer.held_out_rows, strict=True)]
        write_json_lines(run.folder / PAIRS, pairs)
        write_json_lines(run.folder / EXAMPLES, choose_examples(pairs, run.rows.held_out, run.rows.tokenizer))
    kept = find_kept(trainer.state, trainer.args)
    best = {"best_model": kept} if kept is not None else {}
    live.end(
        "finished", metrics=metrics, engine=describe_engine(live.trainer), files=trainer.writer.saved_files, **best
    )


def _say_forecast(live: LiveRun) -> None:
    """What the step of a dry run says of the real one: it is of the longest pairs, and a first step is a slow one."""
    run, resources, done = live.run, live.watcher.usage.resources(), max(live.trainer.state.global_step, 1)
    steps, a_step = steps_of_run(run, live.trainer.args), resources["train_seconds"] / done
    say("dry run: every stage works; nothing was saved")
    say(
        f"      peak memory {readable_bytes(resources['peak_memory_bytes'])}, {a_step:.2f} s per step; the run has "
        f"{steps:,} steps: at most about {readable_seconds(steps * a_step)} of training (this step was of the longest "
        f"{'pairs' if run.learns_pairs else 'rows'}), evaluation and saving not counted"
    )


def _push(run: Run) -> None:
    fields = run.settings.trainer_fields
    name = fields.get("hub_model_id") or run.folder.resolve().name
    kept = f"the run is finished and whole in {run.folder}; upload its model later with `hf upload`"
    private = fields.get("hub_private_repo") is not False
    place = push_folder("--push_to_hub", run.folder, name, "Trained model", kept, MODEL_FILES, private)
    say(f"uploaded to {place}")


def evaluate_last(live: LiveRun) -> dict[str, float]:
    """Held-out metrics of the model as it is saved; an evaluation that was just made is not made twice."""
    trainer, step = live.trainer, live.trainer.state.global_step
    best = live.run.record.content.get("early_stopping")
    if best is not None and trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        return trainer.measure()  # not logged: its step has been
    done = [line for line in trainer.state.log_history if "eval_loss" in line and line["step"] == step]
    if done and trainer.held_out_rows and not trainer.args.load_best_model_at_end:
        return {name.removeprefix("eval_"): value for name, value in done[-1].items() if name.startswith("eval_")}
    if done:
        return trainer.measure()  # by a part of the run before this one, or of another model
    live.watcher.shows_evaluations = False  # the result is shown beside the one before training
    return {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}


def training_metrics(history: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the whole training, from its log lines, each weighted by the rows it stands for."""
    lines = [line for line in history if "loss" in line and "learning_rate" in line]
    weights = [line["pairs"] if "pairs" in line else line["tokens"] for line in lines]
    names = [name for name in METRIC_NAMES if lines and all(name in line for line in lines)]
    total = sum(weights)
    return {name: sum(line[name] * w for line, w in zip(lines, weights, strict=True)) / total for name in names}


def _say_result(live: LiveRun) -> None:
    run, content = live.run, live.run.record.content
    before, after = content["metrics"].get("held_out_before"), content["metrics"].get("held_out")
    if before and after:
        say(f"held out: before {readable_metrics(before)}")
        say(f"          after  {readable_metrics(after)}")
    if content.get("best_model") is not None:
        say(describe_best(content["best_model"]))
    resources, kind = content["resources"], "pairs" if run.learns_pairs else "rows"
    cost = f", cost {resources['cost']:,.2f}" if resources["cost"] is not None else ""
    say(
        f"done in {readable_seconds(resources['seconds'])}{cost} ({resources['pairs_per_second']:.1f} {kind}/s in "
        f"training, peak memory {resources['peak_memory_bytes'] / 2**30:.1f} GiB)"
    )
    adapts = ADAPTER_CONFIG in live.trainer.writer.saved_files
    what = "adapter" if adapts else "model"
    say(f"{what}, tokenizer and record (run.json): {run.folder}")
    if (run.folder / REPORT).is_file():
        say(f"report: {run.folder / REPORT}")
    say_how_to_upload(run.settings, run.folder, content["wandb_run_id"])
    say(describe_run(content)[0])
    say("next:\n" + "\n".join(f"  {command}" for command in commands_after(run.folder, run.learns_pairs, adapts)))


def commands_after(folder: Path, pairs: bool, adapter: bool) -> list[str]:
    """The commands that use a finished run: its held-out pairs, base and tuned side by side, a talk, a model alone."""
    name = str(folder)
    words = [["evaluate", name]] if pairs else []
    words += [["compare", name], ["chat", name]]
    words += [["merge", name, f"{name.rstrip('/')}-merged"]] if adapter else []
    return [join_command(each) for each in words]
