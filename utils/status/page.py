"""Several runs on one page: what came of each, their curves over one another, and the settings in which they differ."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..arguments.flag_values import as_text
from ..report.charts import draw_lines
from ..report.html import (
    make_chart,
    make_details,
    make_document,
    make_paragraph,
    make_section,
    make_table,
    make_tiles,
    show,
)
from ..report.links import address_of
from ..report.messages import show_messages
from ..run.metrics import HELD_OUT, read_metrics
from ..run.names import REPORT, SAMPLES
from ..run.records import ROW, mapping_of, number_of, read_lines, text_of
from ..runtime import readable_bytes, readable_seconds
from ..settings.changes import FREE_TO_CHANGE
from .state import Overview, RunStatus
from .table import NOTHING, show_number

TITLE = "Comparison of runs"
CHARTED = 6  # runs: as many as there are colours that can be told apart
SHOWN_PROMPTS, SHOWN_CHARACTERS = 3, 600
# name in metrics.jsonl, heading, verb of the runs (the losses of two verbs do not compare), the line that is drawn
# across, whether they are shares
CURVES = (
    ("held_out_accuracy", "Held-out accuracy", "train", 0.5, True),
    ("held_out_margin", "Held-out margin", "train", 0.0, False),
    ("held_out_loss", "Held-out loss", "train", None, False),
    ("held_out_chosen_kl", "Held-out KL from the reference, nats", "train", 0.0, False),
    ("loss", "Training loss", "train", None, False),
    ("held_out_perplexity", "Held-out perplexity", "sft", None, False),
    ("loss", "Training loss of sft", "sft", None, False),
)
UNCOMPARED = FREE_TO_CHANGE  # where a run is and how it is watched, not what it computes
DEFAULT = "default"


def make_page(overview: Overview, place: Path | None = None) -> str:
    """The whole page; with the folder that it will stand in, its runs lead to their reports."""
    runs = overview.runs
    charted = runs[:CHARTED]
    content = [
        "<header>",
        f"<h1>{TITLE}</h1>",
        make_paragraph(f"{len(runs)} runs in {overview.folder}, newest first", "soft"),
        *(make_paragraph(text, f"verdict {kind}".strip()) for text, kind in [_judge(runs)]),
        make_tiles(_tiles(runs)),
        "</header>",
        make_section("Results", _results(runs), _link_reports(runs, place)),
        _curves(charted, len(runs)),
        make_section("Settings that differ", _differences(runs)),
        make_section("Samples", *_samples(charted)),
        make_section("Warnings", *_warnings(runs)),
    ]
    return make_document(f"{TITLE}: {overview.folder}", "\n".join(part for part in content if part))


def _judge(runs: Sequence[RunStatus]) -> tuple[str, str]:
    """The verdict in a sentence or two, and its kind: which run is ahead of those it compares to, and how clearly."""
    measured = [run for run in runs if run.verb == "train" and "accuracy" in run.held_out]
    if not measured:
        return "None of them was evaluated on held-out pairs yet.", "note"
    data = Counter(_data_of(run) for run in measured).most_common(1)[0][0]
    ranked = [run for run in measured if _data_of(run) == data]
    ranked.sort(key=lambda run: (run.held_out["accuracy"], run.held_out.get("margin", 0.0)), reverse=True)
    first, kind = ranked[0], "note"
    if len(ranked) == 1:
        sentences = [f"Only {first.name} was evaluated on its data: held-out accuracy {_accuracy(first)} points."]
    else:
        field = f"of {len(ranked)} runs on the same data"
        sentences = [f"Highest held-out accuracy {field}: {first.name}, {_accuracy(first)} points."]
        gap = ranked[0].held_out["accuracy"] - ranked[1].held_out["accuracy"]
        clear = gap > 2 * _standard_error(ranked[0])
        kind = "" if clear else "note"
        more = "" if clear else ": a difference within noise" if gap else ", the same"
        sentences.append(f"{ranked[1].name} follows with {_accuracy(ranked[1])} points{more}.")
    others = len(measured) - len(ranked)
    if others:
        sentences.append(
            f"{others} more {'was' if others == 1 else 'were'} evaluated on other data and cannot be compared."
        )
    return " ".join(sentences), kind


def _data_of(run: RunStatus) -> str | None:
    return text_of(run.record, "data", "fingerprint")


def _standard_error(run: RunStatus) -> float:
    """Of the accuracy, with a right and a wrong pair added, so that all of a few pairs are not taken for certain."""
    pairs = max(run.held_out.get("pairs", 0), 0)
    share = min(max(run.held_out["accuracy"], 0), 1)
    share = (share * pairs + 1) / (pairs + 2)
    return math.sqrt(share * (1 - share) / (pairs + 2))


def _accuracy(run: RunStatus) -> str:
    if "accuracy" not in run.held_out:
        return NOTHING
    return f"{run.held_out['accuracy']:.1%}\u00a0±\u00a0{100 * _standard_error(run):.1f}"


def _tiles(runs: Sequence[RunStatus]) -> list[tuple[str, str]]:
    states = {state: sum(run.state == state for run in runs) for state in dict.fromkeys(run.state for run in runs)}
    seconds = sum(run.seconds or 0.0 for run in runs)
    hours = sum(number_of(run.record, "resources", "gpu_hours") or 0.0 for run in runs)
    costs = [run.cost for run in runs if run.cost is not None]
    tiles = [(state, f"{count}") for state, count in states.items()]
    tiles.append(("time, all runs", readable_seconds(seconds)))
    if hours:
        tiles.append(("GPU hours, all runs", f"{hours:,.1f}"))
    return tiles + ([("cost, all runs", f"{sum(costs):,.2f}")] if costs else [])


def _results(runs: Sequence[RunStatus]) -> str:
    heads = ("run", "verb", "state", "step", "accuracy", "margin", "KL", "perplexity", "loss", "time", "memory", "cost")
    columns = [column for column in zip(heads, *map(_result, runs), strict=True) if _tells(column)]
    head, *body = zip(*columns, strict=True)
    trained = [run for run in runs if run.verb == "train"]
    note = (
        "Held out, at the newest evaluation. Accuracy: the share of pairs ranked correctly; ± its standard error in "
        "points (twice that is about a 95% interval). Margin: reward of the chosen response minus that of the "
        "rejected one. KL: how far the policy is from its reference, in nats."
    )
    if len({_facts(run).get("loss_type") for run in trained}) > 1:
        note += " The losses are of different types (--loss_type) and do not show which run is better."
    elif len({_facts(run).get("beta") for run in trained}) > 1:
        note += " Margins and losses are in units of --beta, which differs: compare accuracy and KL."
    return make_table("by run", head, body) + make_paragraph(note, "soft")


def _link_reports(runs: Sequence[RunStatus], place: Path | None) -> str:
    if place is None:
        return ""
    reports = {run.name: Path(run.folder, REPORT).absolute() for run in runs}
    items = "".join(
        f'<li><a href="{address_of(path, place)}">{show(name)}</a></li>'
        for name, path in reports.items()
        if path.is_file()
    )
    return f'<nav aria-label="reports of the runs"><ul><li>Reports:</li>{items}</ul></nav>' if items else ""


def _tells(column: Sequence[str]) -> bool:
    """Whether a column has something in it; the verb only where there are two."""
    head, *cells = column
    return len(set(cells)) > 1 if head == "verb" else any(cell != NOTHING for cell in cells)


def _result(run: RunStatus) -> tuple[str, ...]:
    memory = number_of(run.record, "resources", "peak_memory_bytes")
    return (
        run.name,
        run.verb,
        run.state,
        NOTHING if run.step is None else f"{run.step}/{run.steps}",
        _accuracy(run),
        show_number(run.held_out, "margin", "{:+.3f}"),
        show_number(run.held_out, "chosen_kl", "{:.2f}"),
        show_number(run.held_out, "perplexity", "{:.3g}"),
        show_number(run.held_out, "loss", "{:.4f}"),
        NOTHING if run.seconds is None else readable_seconds(run.seconds),
        NOTHING if memory is None else readable_bytes(memory),
        NOTHING if run.cost is None else f"{run.cost:,.2f}",
    )


def _curves(runs: Sequence[RunStatus], total: int) -> str:
    events = {run.name: list(read_metrics(Path(run.folder))) for run in runs}
    charts = []
    for name, heading, verb, mark, share in CURVES:
        # A line for each run, so that each has its colour in all charts; of another verb an empty one.
        lines = {run.name: _line_of(events[run.name], name) if run.verb == verb else [] for run in runs}
        held_out = name.startswith(HELD_OUT)
        chart = draw_lines(
            f"{heading} by step", {} if held_out else lines, "step", lines if held_out else None, mark, share
        )
        if chart:
            drawn = {run: line for run, line in lines.items() if line}
            alone = f": {next(iter(drawn))}" if len(drawn) == 1 else ""
            charts.append(make_chart(heading + alone, chart, _numbers(heading, drawn)))
    note = f"The {CHARTED} newest of the {total} runs." if total > CHARTED else ""
    inner = f'<div class="charts">{"".join(charts)}</div>' if charts else ""
    return make_section("Curves", make_paragraph(note, "soft") if note and inner else "", inner)


def _line_of(events: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    found = ((number_of(event, "step"), number_of(event, name)) for event in events)
    points = {step: value for step, value in found if step is not None and value is not None}  # of a step the last
    return sorted(points.items())


def _numbers(heading: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """The points as a table; of long lines every so many."""
    steps = sorted({step for line in lines.values() for step, _ in line})
    kept = steps[:: max(1, math.ceil(len(steps) / 60))]
    values = {run: dict(line) for run, line in lines.items()}
    rows = [
        (f"{step:,.0f}", *(f"{values[run][step]:.4g}" if step in values[run] else NOTHING for run in lines))
        for step in kept
    ]
    return make_table(heading, ("step", *lines), rows)


def _differences(runs: Sequence[RunStatus]) -> str:
    facts = {run.name: _facts(run, used=_used_by_all(runs)) for run in runs}
    names = dict.fromkeys(name for values in facts.values() for name in values)
    rows = []
    for name in names:
        cells = [values.get(name) for values in facts.values()]
        if len({cell for cell in cells if cell is not None}) > 1:
            rows.append((name, *(NOTHING if cell is None else cell for cell in cells)))
    if not rows:
        return make_paragraph("They do not differ in any recorded setting.")
    return make_table(f"by run; {DEFAULT}: the script's default", ("setting", *facts), rows, words=True)


def _used_by_all(runs: Sequence[RunStatus]) -> set[str]:
    """The settings of which every run says the value that it used: records of older runs do not of all."""
    of_runs = [run.record["settings"].keys() - mapping_of(run.record, "used").keys() for run in runs]
    return {name for run in runs for name in mapping_of(run.record, "used")}.difference(*of_runs)


def _facts(run: RunStatus, used: Collection[str] = ()) -> dict[str, str]:
    """What may differ between runs, by name: settings that change what is computed, data, model, versions.

    Args:
        used: settings whose value is the one that was used, also where it was left to the script.
    """
    record, data = run.record, mapping_of(run.record, "data")
    values = mapping_of(record, "used")
    settings = {
        name: values.get(name, value) if name in used else value
        for name, value in {**dict.fromkeys(values.keys() & used), **record["settings"]}.items()
        if name not in UNCOMPARED
    }
    facts = {name: DEFAULT if value is None else " ".join(_as_texts(value)) for name, value in settings.items()}
    more = {
        "verb": run.verb,
        "data, by fingerprint": (_data_of(run) or "")[:8] or None,
        "rows to train on": data.get("train_pairs", data.get("train_rows")),
        "rows held out": data.get("held_out_pairs", data.get("held_out_rows")),
        "parameters trained": mapping_of(record, "model").get("trainable_parameters"),
        "reference": record.get("reference"),
        "precision": record.get("precision"),
        **{f"{name} (version)": version for name, version in mapping_of(record, "versions").items()},
    }
    return facts | {
        name: f"{value:,}" if isinstance(value, int) else str(value)
        for name, value in more.items()
        if value is not None
    }


def _as_texts(value: Any) -> list[str]:
    return [_as_word(item) for item in value] if isinstance(value, list) else [_as_word(value)]


def _as_word(value: Any) -> str:
    try:
        return as_text(value)
    except ValueError:  # not-a-number within something
        return str(value)


def _samples(runs: Sequence[RunStatus]) -> list[str]:
    """The newest answers of each run to the prompts that most runs answered."""
    answers: dict[str, dict[str, tuple[str, str]]] = {}
    for run in runs:
        for row in read_lines(Path(run.folder) / SAMPLES, ROW):
            label = f"{run.name}, at step {row.get('step')}"
            answer = (label, show_messages(row.get("response"))[:SHOWN_CHARACTERS].strip())
            prompt = show_messages(row.get("prompt"))
            answers.setdefault(prompt, {})[run.name] = answer  # of several steps the last one's
    shared = sorted(answers.items(), key=lambda item: -len(item[1]))
    parts = []
    for prompt, by_run in shared[:SHOWN_PROMPTS]:
        lines = "".join(f"<dt>{show(label)}</dt><dd>{show(text)}</dd>" for label, text in by_run.values())
        asked = f"<dt>prompt</dt><dd>{show(prompt[-SHOWN_CHARACTERS:])}</dd>"
        parts.append(f'<div class="example"><dl>{asked}{lines}</dl></div>')
    return parts


def _warnings(runs: Sequence[RunStatus]) -> list[str]:
    return [
        make_details(f"{run.name}: {len(run.warnings)}", "".join(make_paragraph(text) for text in run.warnings))
        for run in runs
        if run.warnings
    ]
