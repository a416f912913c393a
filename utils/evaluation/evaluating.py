"""The verb `evaluate`, stage by stage: model, reference and pairs -> scores -> figures -> files."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import command_line
from ..data.splitting import group_key
from ..data.tokenizing import PAIR_COLUMNS
from ..data.turns import show_value
from ..errors import UserError, gather
from ..models.loading import check_token_ids, load_tokenizer
from ..models.quantization import check_4bit
from ..models.reference import ReferencePlan
from ..models.sources import ModelSource
from ..models.templates import TEMPLATE_DATE, recorded_moment
from ..models.trained import TrainedModel, find_trained
from ..report.links import link_pages, refresh_report
from ..run.folder import named_as_given
from ..run.names import EVALUATION_FILES
from ..run.processes import launched_with
from ..run.program import join_command
from ..run.record import now
from ..run.results import write_results
from ..runtime import (
    Precision,
    choose_precision,
    device_name,
    find_device,
    is_main_process,
    peak_memory_bytes,
    read_versions,
    say,
    set_seed,
)
from ..settings.training import Settings
from ..settings.verbs import EvaluationSettings
from ..training.context import Run
from ..training.description import describe_layout
from ..training.launch import check_one_device, join_processes
from ..training.metrics import summarise
from ..training.rows import Rows, prepare_rows
from ..training.trainer import PreferenceTrainer
from .folder import find_results_folder
from .measures import PairTable, measure
from .page import make_page
from .pairs import EvaluatedPairs, find_pairs
from .sides import (
    MODEL_FLAG,
    REFERENCE_FLAG,
    find_reference,
    load_sides,
    make_scorer,
    settings_of_evaluation,
)
from .summary import LABEL, count_pairs, describe_pairs, describe_policy, summarise_evaluation

EXAMPLES = 10  # pairs shown with their texts: those ranked most wrongly
FEW_PROMPTS = 20
SAME = {"float32": 1e-3}  # by how much a figure may differ from the recorded one, as a share of it (or of 1) ...
SAME_IN_SHORT = 3e-2  # ... in the shorter formats, whose rounding depends on the shape of a batch


def evaluate_model(settings: Settings) -> None:
    """Measures --model_name_or_path against its reference; prints, and writes the results.

    Raises:
        UserError: model, reference, data or folder cannot be used, with every fault that was found.
    """
    began = time.perf_counter()
    set_seed(settings.training.seed)
    trained, _, _ = gather(
        lambda: find_trained(MODEL_FLAG, settings.model.model_name_or_path, settings.model.model_revision),
        lambda: check_one_device(settings),
        _check_launcher,
    )
    scoring = settings_of_evaluation(settings, trained)
    precision = choose_precision(scoring.model.dtype, find_device())
    join_processes(scoring, precision)
    folder, source, pairs, _ = gather(
        lambda: find_results_folder(settings.run.output_dir, trained),
        lambda: find_reference(settings, trained),
        lambda: find_pairs(settings, trained),
        check_4bit if scoring.model.use_4bit else lambda: None,
    )
    rows = _tokenize(pairs, trained, source, scoring)
    policy, reference = load_sides(trained, source, scoring, precision)
    for line in (
        describe_policy(trained, scoring.model.use_4bit),
        f"reference: {reference.plan.how}",
        *describe_pairs(pairs, rows),
    ):
        say(line)
    run = Run(scoring, precision, trained.source, pairs.data, rows)
    with tempfile.TemporaryDirectory() as nowhere:
        trainer = make_scorer(run, policy, reference, Path(nowhere))
        say(f"engine: {describe_layout(trainer)}")
        say(f"device: {device_name(precision.device)}; computing in {precision.name} ({precision.reason})")
        say(f"scoring {count_pairs(len(rows.train))}")
        scores = _score(trainer)
    if not is_main_process():
        return
    table = _make_table(scores, pairs, rows)
    record = _make_record(table, scores, pairs, run, trained, reference.plan, settings)
    record |= _describe_making(settings, trainer, precision, time.perf_counter() - began)
    links = link_pages(trained.folder, folder / EVALUATION_FILES[2])
    page = make_page(record, table.rows, find_examples(table, pairs), links)
    with named_as_given(settings.run.output_dir):
        write_results(folder, EVALUATION_FILES, record, table.rows, page)
    refresh_report(trained.folder)
    _say_result(record, folder)


def _say_result(record: dict[str, Any], folder: Path) -> None:
    say()
    for line in summarise_evaluation(record):
        say(line)
    record_file, rows_file, page_file = EVALUATION_FILES
    say(f"  {'all figures':<{LABEL}}{folder / page_file} (rows: {rows_file}, record: {record_file})")


def _check_launcher() -> None:
    for name in ("FSDP", "DEEPSPEED"):
        if launched_with(name):
            raise UserError(
                f"evaluate loads the full models in every process, and {name} is configured; start it without "
                "(`accelerate launch` with examples/accelerate/ddp.yaml, torchrun, or plain python for one device)"
            )


def _tokenize(pairs: EvaluatedPairs, trained: TrainedModel, reference: ModelSource, settings: Settings) -> Rows:
    tokenizer = load_tokenizer(trained.source, settings.model)
    check_token_ids(tokenizer, reference, settings.model)
    if pairs.own and "on_bad_rows" not in settings.given:  # what its run left out, the evaluation leaves out
        data = dataclasses.replace(settings.data, on_bad_rows=trained.setting("on_bad_rows", "error"))
        settings = dataclasses.replace(settings, data=data)
    moment = recorded_moment(trained.record)
    return prepare_rows(pairs.data, tokenizer, trained.source, settings, PAIR_COLUMNS, moment)


def _score(trainer: PreferenceTrainer) -> list[dict[str, float | None]]:
    """The metrics of each pair, as an evaluation in training gives them."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.eval_dataset = trainer.train_dataset
    trainer.evaluate()
    check_finite(trainer.held_out_rows)
    return trainer.held_out_rows


def check_finite(rows: list[dict[str, float | None]]) -> None:
    """Refuses figures of a model whose numbers are broken.

    Raises:
        UserError: the log-probs of policy or reference are not finite.
    """
    faults = []
    for flag, prefix in ((MODEL_FLAG, ""), (REFERENCE_FLAG, "ref_")):
        names = [f"{prefix}{side}_logps" for side in ("chosen", "rejected")]
        broken = sum(not all(math.isfinite(row[name]) for name in names) for row in rows)
        if broken:
            faults.append(
                f"{flag}: its log-probs of {broken:,} of {len(rows):,} pairs are not finite; its weights are broken (a "
                "run that diverged?), or too large for this precision: try --dtype float32"
            )
    if faults:
        raise UserError(*faults)


def _make_table(scores: list[dict[str, Any]], pairs: EvaluatedPairs, rows: Rows) -> PairTable:
    """The scored pairs with their names; tokens may have left some out (--truncation drop)."""
    data = pairs.data.train
    place_of = {name: place for place, name in enumerate(data["id"])}
    places = [place_of[name] for name in rows.train["id"]]
    keys = [group_key(prompt) for prompt in data.select_columns(["prompt"])["prompt"]]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys[place] for place in places))}
    sources = [data["source"][place] for place in places] if "source" in data.column_names else None
    trained_on = pairs.trained_on[places] if pairs.trained_on is not None else None
    table = []
    for number, (place, row, score) in enumerate(zip(places, rows.train["row"], scores, strict=True)):
        named = {"id": data["id"][place], "row": row, "place": pairs.data.place(row)}
        named["prompt_number"] = numbers[keys[place]]
        if sources is not None:
            named["source"] = sources[number]
        if trained_on is not None:
            named["trained_on"] = bool(trained_on[number])
        table.append(named | score)
    prompts = np.array([row["prompt_number"] for row in table])
    return PairTable(table, prompts, sources, trained_on)


def _make_record(
    table: PairTable,
    scores: list[dict[str, Any]],
    pairs: EvaluatedPairs,
    run: Run,
    trained: TrainedModel,
    reference: ReferencePlan,
    settings: Settings,
) -> dict[str, Any]:
    """What is written of an evaluation. `run` has what is scored, and how; `settings` are those of the person."""
    metrics, scoring, precision = summarise(scores), run.settings, run.precision
    data, rows = run.data, run.rows
    dropped = data.dropped | rows.bad_rows
    if rows.truncation.dropped:
        dropped[f"longer than {rows.max_length} tokens"] = rows.truncation.dropped
    whole = scoring.loss.ld_alpha is None
    return {
        "verb": "evaluate",
        "model": dataclasses.asdict(trained.source)
        | {"in_4bit": scoring.model.use_4bit and trained.source.adapter is not None, "run": trained.folder},
        "reference": dataclasses.asdict(reference.source) | {"in_4bit": reference.in_4bit, "how": reference.how},
        "data": {
            "source": data.source,
            "reading": data.reading.description,
            "held_out_by_the_run": pairs.own,
            "unchanged_since_training": pairs.unchanged,
            "prompts_trained_on": _count_prompts(table, pairs),
            "dropped": dropped if not pairs.own else rows.bad_rows,
            "truncated": rows.truncation.truncated,
            "max_length": rows.max_length,
            "chat_template": rows.template,
            "reasoning": rows.reasoning,
            TEMPLATE_DATE: rows.template_date,
            "fingerprint": data.fingerprint,
        },
        "scoring": dataclasses.asdict(scoring.loss) | {"precision": precision.name},
        "metrics": metrics,
        **measure(table, settings.of(EvaluationSettings).bootstrap_samples, settings.training.seed, whole),
        "recorded": compare_with_record(metrics, pairs, trained, precision),
        "warnings": [*rows.warnings, *find_warnings(pairs, trained, len(np.unique(table.prompts)))],
    }


def _count_prompts(table: PairTable, pairs: EvaluatedPairs) -> int | None:
    if pairs.trained_on is None:
        return None
    return len({row["prompt_number"] for row in table.rows if row["trained_on"]})


def _describe_making(
    settings: Settings, trainer: PreferenceTrainer, precision: Precision, seconds: float
) -> dict[str, Any]:
    return {
        "finished": now(),
        "settings": settings.flat(),
        "command": join_command(command_line(settings)),
        "versions": read_versions(),
        "engine": {"shared_prefix": trainer.layout.shared_prefix},
        "resources": {
            "device": device_name(precision.device),
            "seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes(precision.device),
        },
    }


def compare_with_record(
    metrics: dict[str, float], pairs: EvaluatedPairs, trained: TrainedModel, precision: Precision
) -> dict[str, Any] | None:
    """What the run itself measured on the same pairs when it ended, and whether that is the same; None without it.

    Kullback-Leibler divergences that the run measured on some of the pairs alone are left out.
    """
    recorded = trained.record.get("metrics", {}).get("held_out")
    if not pairs.own or not recorded or Path(trained.source.name) != trained.folder:
        return None
    names = [name for name in metrics if name in recorded]
    if recorded.get("kl_pairs") != metrics.get("kl_pairs"):
        names = [name for name in names if not name.endswith(("_kl", "kl_pairs"))]
    if not names:
        return None
    differences = {name: abs(metrics[name] - recorded[name]) / max(1, abs(recorded[name])) for name in names}
    furthest = max(differences, key=differences.__getitem__)
    allowed = SAME.get(precision.name, SAME_IN_SHORT)
    return {
        "held_out": recorded,
        "same": differences[furthest] <= allowed,
        "furthest": furthest,
        "precision": trained.record.get("precision"),
    }


def find_warnings(pairs: EvaluatedPairs, trained: TrainedModel, prompts: int) -> list[str]:
    """What makes the figures mean something else than they seem to."""
    warnings = []
    if pairs.own and pairs.unchanged is False:
        warnings.append(
            "the data of the run have changed since: these are the pairs that would be held out today, and the model "
            "may have been trained on some of them"
        )
    if pairs.own and pairs.trained_on is not None and pairs.trained_on.any():
        warnings.append("some of the held-out prompts were also trained on, with the same or other responses")
    elif pairs.trained_on is not None and pairs.trained_on.any():
        share = pairs.trained_on.mean()
        warnings.append(f"{share:.0%} of these pairs have prompts that the run was trained on: compare the two groups")
    if not pairs.own and trained.record and pairs.trained_on is None:
        warnings.append("the data of the run have changed or moved: the model may have been trained on these pairs")
    if trained.setting("sync_ref_model"):
        warnings.append(
            "the run updated its reference during training (--sync_ref_model) and did not save it: the figures are "
            "against the reference that it began with"
        )
    if prompts < FEW_PROMPTS:
        what = "a single prompt gives" if prompts == 1 else f"so few prompts ({prompts}) give"
        warnings.append(f"{what} intervals that are too narrow, except for shares of 0% and 100%")
    return warnings


def find_examples(table: PairTable, pairs: EvaluatedPairs) -> list[dict[str, Any]]:
    """The pairs that are ranked most wrongly, worst first, with their texts."""
    wrong = sorted((row for row in table.rows if row["margin"] < 0), key=lambda row: row["margin"])[:EXAMPLES]
    data = pairs.data.train
    place_of = {name: place for place, name in enumerate(data["id"])}
    examples = []
    for row in wrong:
        texts = data[place_of[row["id"]]]
        examples.append({"row": row} | {side: show_value(texts[side]) for side in ("prompt", "chosen", "rejected")})
    return examples
