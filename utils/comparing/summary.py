"""A comparison in words and small tables: for the terminal, and the sentences of the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import Any

from ..report.messages import show_messages

WIDTH = 100
OWN_REWARD = "implicit_reward"
SHOWN = 3
LONGEST_SHOWN = 600  # characters of a text in the terminal
STYLE = {
    "mean_tokens": "tokens (mean)",
    "median_tokens": "tokens (median)",
    "mean_words": "words (mean)",
    "ended": "ended with EOS",
    "empty": "empty",
    "refusals": "refusals",
    "repeated": "repeated 4-grams of words",
    "distinct_1": "distinct-1 (words)",
    "distinct_2": "distinct-2 (word pairs)",
}
SHARES = ("ended", "empty", "refusals", "repeated", "distinct_1", "distinct_2")
JUDGE_HEAD = ("judge", "wins", "ties", "losses", "no verdict", "win rate", "95% interval")
STYLE_HEAD = ("figure", "model", "baseline")


def describe_result(judged: dict[str, Any]) -> str:
    """What one judge found, in a sentence."""
    count, rate = judged["judged"], judged["win_rate"]
    if rate is None:
        return f"No verdict by {judged['judge']}."
    low, high = judged["interval"]
    numbers = f"{rate:.1%} of {_count(count, 'prompt')} (95% interval {low:.1%} to {high:.1%}; ties count half)"
    if judged["judge"] == OWN_REWARD:
        return (
            f"Not a judgement: by its own reward the model wins {numbers}. It only says how far the model "
            "has moved from its reference, not whether it is better. Name another --judge."
        )
    if low > 0.5:
        found = "Better than the baseline"
    elif high < 0.5:
        found = "Worse than the baseline"
    else:
        found = "No significant difference from the baseline"
    return f"{found}: the model wins {numbers}, by {judged['judge']}."


def describe_judge(judged: dict[str, Any]) -> Iterator[str]:
    """What one should know of a judge's verdicts."""
    yield f"{judged['judge']}: {judged['how']}."
    details = judged["details"]
    if "matches_with_both" in details:
        both = details["matches_with_both"]
        swayed = details["first_in_both_orders"] + details["second_in_both_orders"]
        share = f" ({swayed / both:.1%})" if both else ""
        yield (
            f"Position bias: of {_count(both, 'match', 'matches')} with a verdict in both orders, the verdict followed "
            f"the order in {swayed:,}{share}: {details['first_in_both_orders']:,} for the response shown first, "
            f"{details['second_in_both_orders']:,} for the one shown second; these count as ties."
        )
        unreadable = details["unreadable_answers"]
        such = f", such as {details['unreadable_example']!r}" if unreadable else ""
        yield f"{_count(details['requests'], 'request')} sent, {unreadable:,} answers without a verdict{such}."
    if details.get("both_bad"):
        yield f"Ties with both responses bad: {details['both_bad']:,}."
    if judged["not_judged"]:
        yield f"{_count(judged['not_judged'], 'prompt')} without a verdict, which count for neither side."


def judge_rows(judges: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row of the table for each judge."""
    return [
        (
            judged["judge"],
            *(f"{judged[name]:,}" for name in ("wins", "ties", "losses", "not_judged")),
            "-" if judged["win_rate"] is None else f"{judged['win_rate']:.1%}",
            "-" if judged["interval"] is None else "{:.1%} to {:.1%}".format(*judged["interval"]),
        )
        for judged in judges
    ]


def style_rows(responses: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row of the table for each figure of the responses."""
    return [
        (label, *(_show_figure(name, responses[side][name]) for side in ("model", "baseline")))
        for name, label in STYLE.items()
    ]


def _show_figure(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if name in SHARES else f"{value:,.1f}"


def summarize(record: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The lines for the terminal: verdicts, tables, the first examples."""
    for judged in record["judges"]:
        yield ""
        yield from wrap(describe_result(judged), WIDTH, break_on_hyphens=False)
        for text in describe_judge(judged):
            yield from wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    yield ""
    if record["judges"]:
        yield from _lay_out(JUDGE_HEAD, judge_rows(record["judges"]))
        yield ""
    yield from _lay_out(STYLE_HEAD, style_rows(record["responses"]))
    if record["identical_responses"]:
        yield f"{record['identical_responses']:,} of {len(rows):,} responses are the same on both sides"
    yield ""
    yield f"The first {min(SHOWN, len(rows))} of {_count(len(rows), 'prompt')}:"
    for row in rows[:SHOWN]:
        yield ""
        yield from _show_text("prompt", show_messages(row["prompt"]))
        yield from _show_text("model", row["response"])
        yield from _show_text("baseline", row["baseline_response"])
        if row["judges"]:
            yield from _show_text("better", ", ".join(describe_outcomes(row)))


def describe_outcomes(row: dict[str, Any]) -> list[str]:
    """Which response each judge found better."""
    words = {1: "the model's", 0: "the baseline's", 0.5: "neither", None: "no verdict"}
    return [f"{words[found['outcome']]} ({name}{_show_scores(found)})" for name, found in row["judges"].items()]


def _show_scores(found: dict[str, Any]) -> str:
    if "score" not in found:
        return ""
    return f": {found['score']:.3g} and {found['baseline_score']:.3g}"


def _show_text(label: str, text: str) -> list[str]:
    text = " ".join(text.split()) or "(nothing)"
    if len(text) > LONGEST_SHOWN:
        text = text[:LONGEST_SHOWN].rstrip() + " ..."
    return wrap(text, WIDTH, initial_indent=f"  {label:<9} ", subsequent_indent=" " * 12, break_on_hyphens=False)


def _lay_out(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of text: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        first, *rest = zip(row, widths, strict=True)
        lines.append("  ".join([f"  {first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in rest)]).rstrip())
    return lines


def _count(number: int, one: str, several: str = "") -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"
