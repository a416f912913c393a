"""The runs of a folder as lines for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from ..report.html import BY_NUMBER
from ..runtime import readable_seconds
from .state import Overview, RunStatus

HEADS = ("run", "verb", "state", "progress", "left", "held out", "margin", "KL", "time", "cost")
NUMBERS = ("left", "margin", "KL", "time", "cost")  # written to the right
NOTHING = "-"
# metric -> how it is shown; the first that a run has is its headline
HEADLINES = {"accuracy": ("accuracy", "{:.0%}"), "perplexity": ("perplexity", "{:.3g}"), "loss": ("loss", "{:.3f}")}


def summarize(overview: Overview) -> Iterator[str]:
    """The lines: a row per run, what those need that did not finish, what else lies there."""
    if overview.runs:
        yield from make_table([HEADS, *map(_row, overview.runs)])
        yield ""
    states = Counter(run.state for run in overview.runs)
    counts = ", ".join(f"{count} {state}" for state, count in states.most_common())
    number = len(overview.runs)
    total = f"{number} run{'' if number == 1 else 's'}" if number else "no runs of this script"
    yield f"{total} in {clean(overview.folder)}" + (f": {counts}" if counts else "")
    for run in overview.runs:
        yield from _explain(run)
    if overview.foreign:
        yield ""
        yield "not counted:"
        for name, why in overview.foreign:
            yield f"  {clean(name)}: {clean(why)}"


def _row(run: RunStatus) -> tuple[str, ...]:
    return (
        clean(run.name),
        run.verb,
        run.state,
        describe_progress(run),
        NOTHING if run.seconds_left is None else readable_seconds(run.seconds_left),
        describe_headline(run),
        show_number(run.held_out, "margin", "{:+.3f}"),
        show_number(run.held_out, "chosen_kl", "{:.2f}"),
        NOTHING if run.seconds is None else readable_seconds(run.seconds),
        NOTHING if run.cost is None else f"{run.cost:,.2f}",
    )


def describe_progress(run: RunStatus) -> str:
    """`120/400 30%`."""
    if run.step is None or not run.steps:
        return "0%" if run.state == "running" else NOTHING
    return f"{run.step}/{run.steps} {min(1.0, run.step / run.steps):.0%}"


def describe_headline(run: RunStatus) -> str:
    """`accuracy 50% -> 87%`: the first metric that a person asks for, before training and at the newest evaluation."""
    for name, (label, form) in HEADLINES.items():
        if name in run.held_out_before or name in run.held_out:
            before, after = (show_number(metrics, name, form) for metrics in (run.held_out_before, run.held_out))
            return f"{label} {before} -> {after}"
    return NOTHING


def show_number(metrics: Mapping[str, float], name: str, form: str) -> str:
    """The metric as text, or a dash where there is none."""
    return form.format(metrics[name]) if name in metrics else NOTHING


def make_table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows in columns as wide as their widest cell; columns with nothing in them are left out."""
    columns = [column for column in zip(*rows, strict=True) if any(cell != NOTHING for cell in column[1:])]
    widths = [max(map(len, column)) for column in columns]
    for cells in zip(*columns, strict=True):
        line = "  ".join(
            cell.rjust(width) if column[0] in NUMBERS else cell.ljust(width)
            for cell, width, column in zip(cells, widths, columns, strict=True)
        )
        yield line.rstrip()


def _explain(run: RunStatus) -> Iterator[str]:
    """What a row has no room for."""
    lines = []
    if run.note is not None or run.to_go_on is not None or run.before_going_on:
        lines.append(run.note if run.state == "running" else ": ".join(filter(None, (run.state, run.note))))
    if run.to_go_on is not None:
        how = f"to resume from {run.checkpoints[-1]}" if run.checkpoints else "it has no checkpoint; to start it again"
        lines += [f"{how}:", f"  {run.to_go_on}"]
    lines += [f"before you type it: {note}" if run.to_go_on else note for note in run.before_going_on]
    warnings = [warning for warning in run.warnings if warning != run.note]
    if warnings:
        more = f" (the last of {len(warnings)})" if len(warnings) > 1 else ""
        lines.append(f"warning{more}: {warnings[-1]}")
    if lines:
        yield ""
        yield f"{clean(run.name)}: {clean(lines[0])}"
        yield from (f"  {clean(line)}" for line in lines[1:])


def clean(text: str) -> str:
    """The text in one line: nothing in it moves the cursor or changes colours."""
    return " ".join(text.split("\n")).replace("\r", " ").translate(BY_NUMBER)
