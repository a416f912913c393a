"""A comparison as a page: the verdicts, the tables, and every prompt with both responses side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data.tools import show_prompt
from ..report.charts import Bar, draw_bars
from ..report.html import (
    make_chart,
    make_document,
    make_paragraph,
    make_section,
    make_table,
    make_tiles,
    show,
)
from ..report.markdown import render_markdown
from .summary import (
    JUDGE_HEAD,
    OWN_REWARD,
    STYLE_HEAD,
    describe_judge,
    describe_outcomes,
    describe_result,
    judge_rows,
    style_rows,
)

NOBODY = (
    "No judge was named: read the responses side by side below, or judge them blind with --judge vote. The model's "
    "own reward (--judge implicit_reward) is not a judge: it only says how far the model has moved."
)


def make_page(record: dict[str, Any], rows: Sequence[dict[str, Any]], links: str = "") -> str:
    """The whole page, from what comparison.json and comparison.jsonl hold, below links to others of the run."""
    judges = record["judges"]
    first = sorted(judges, key=lambda judged: judged["judge"] == OWN_REWARD)  # which judges nothing
    content = [
        "<header>",
        links,
        "<h1>Two models compared</h1>",
        make_paragraph(f"model: {record['model']['name']} ({record['model']['what']})", "soft"),
        make_paragraph(f"baseline: {record['baseline']['name']} ({record['baseline']['what']})", "soft"),
        *(make_paragraph(describe_result(judged), _css(judged)) for judged in first),
        "" if judges else make_paragraph(NOBODY, "verdict note"),
        make_tiles(_headline(record)),
        "</header>",
        make_section("Wins", _draw_rates(judges),
                     make_table("by judge", JUDGE_HEAD, judge_rows(judges)) if judges else "",
                     *(make_paragraph(text) for judged in judges for text in describe_judge(judged))),
        make_section("The responses", make_table("of each model", STYLE_HEAD, style_rows(record["responses"])),
                     make_paragraph(f"{record['identical_responses']:,} are the same on both sides.", "soft")),
        make_section("How they were written", make_paragraph(_describe_sampling(record))),
        make_section("Every prompt", *(_show_row(number, row) for number, row in enumerate(rows, start=1))),
    ]  # fmt: skip
    title = f"{record['model']['name']} and {record['baseline']['name']} compared"
    return make_document(title, "\n".join(part for part in content if part))


def _css(judged: dict[str, Any]) -> str:
    """Green for better, red for worse, neither where nothing is shown."""
    low, high = judged["interval"] or (0, 1)
    if judged["judge"] == OWN_REWARD:
        return "soft"
    if low <= 0.5 <= high:
        return "verdict note"
    return "verdict" if low > 0.5 else "verdict problem"


def _headline(record: dict[str, Any]) -> list[tuple[str, str]]:
    both = [record["responses"][side] for side in ("model", "baseline")]
    return [
        ("prompts", f"{record['prompts']['count']:,}"),
        ("tokens, model / baseline", " / ".join(f"{side['mean_tokens']:.0f}" for side in both)),
        ("ended with EOS", " / ".join(f"{side['ended']:.0%}" for side in both)),
        ("refusals", " / ".join(f"{side['refusals']:.0%}" for side in both)),
    ]


def _draw_rates(judges: Sequence[dict[str, Any]]) -> str:
    bars = [
        Bar(
            judged["judge"],
            judged["win_rate"],
            "{:.1%} ({:.1%} to {:.1%})".format(judged["win_rate"], *judged["interval"]),
            tuple(judged["interval"]),
        )
        for judged in judges
        if judged["win_rate"] is not None
    ]
    if not bars:
        return ""
    chart = draw_bars("Win rate of the model by judge, from an even 50%", bars, 0.5, (0, 1))
    return make_chart("Win rate, with its 95% interval, from an even 50%", chart)


def _describe_sampling(record: dict[str, Any]) -> str:
    sampling = record["sampling"]
    chosen, drawn = "greedy decoding", ""
    if sampling["temperature"] > 0:
        chosen = (
            f"temperature {sampling['temperature']:g}, top_p {sampling['top_p']:g}, top_k {sampling['top_k'] or 'off'}"
        )
        drawn = f", and the same random numbers (seed {sampling['seed']})"
    text = (
        f"Prompts: {record['prompts']['source']}. Both with {chosen}, repetition penalty "
        f"{sampling['repetition_penalty']:g}, at most {sampling['max_new_tokens']:,} new tokens{drawn}. Computed in "
        f"{record['precision']} on {record['device']}."
    )
    templates = dict.fromkeys(template for template in record["chat_templates"] if template)
    return f"{text} Chat template: {'; for the baseline: '.join(templates)}." if templates else text


def _show_row(number: int, row: dict[str, Any]) -> str:
    sides = "".join(
        f'<div class="example"><h3>{name}</h3><p class="soft">{_describe_length(row, key)}</p>'
        f'<div class="text">{render_markdown(row[key + "response"].strip() or "(nothing)")}</div></div>'
        for name, key in (("Model", ""), ("Baseline", "baseline_"))
    )
    better = make_paragraph(f"Better: {'; '.join(describe_outcomes(row))}") if row["judges"] else ""
    prompt = show(show_prompt(row["prompt"], row))
    return (
        f'<article class="card"><h3>Prompt {number:,}</h3><div class="text">{prompt}</div>'
        f'<div class="sides">{sides}</div>{better}</article>'
    )


def _describe_length(row: dict[str, Any], key: str) -> str:
    tokens = row[key + "tokens"]
    return f"{tokens:,} token{'' if tokens == 1 else 's'}" + ("" if row[key + "ended"] else ", stopped at the limit")
