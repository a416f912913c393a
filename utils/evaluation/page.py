"""An evaluation as a page: the verdict, then ranking, margins, calibration, length and groups, then the worst pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..report.charts import Bar, draw_bars, draw_histogram, draw_reliability
from ..report.html import (
    make_chart,
    make_command,
    make_document,
    make_example,
    make_facts,
    make_paragraph,
    make_section,
    make_table,
    make_tiles,
)
from .resampling import Figure
from .summary import (
    between,
    chance,
    describe_auc,
    describe_calibration,
    describe_distance,
    describe_length,
    describe_margin,
    describe_recorded,
    describe_verdict,
    percent,
    went_well,
)

MARGIN_BINS = 20
SHOWN_CHARACTERS = 1200

NAMES = {
    "accuracy": "accuracy",
    "length_controlled_accuracy": "length-controlled accuracy",
    "margin": "margin",
    "chosen_reward": "reward of chosen responses",
    "rejected_reward": "reward of rejected responses",
    "roc_auc": "ROC AUC of the reward",
    "loss": "loss",
    "chosen_kl": "KL along chosen responses (nats)",
    "rejected_kl": "KL along rejected responses (nats)",
    "perplexity": "perplexity of chosen responses",
    "reference_perplexity": "perplexity of the reference",
}
SHARES = ("accuracy", "length_controlled_accuracy")


def make_page(
    record: dict[str, Any], rows: Sequence[Mapping[str, Any]], examples: Sequence[dict[str, Any]], links: str = ""
) -> str:
    """The whole page, below links to others of the run.

    Args:
        rows: a row per pair, for the histogram.
        examples: the pairs ranked most wrongly, with their texts.
    """
    model = record["model"]["adapter"] or record["model"]["base"]
    content = [
        "<header>",
        links,
        "<h1>Evaluation</h1>",
        make_paragraph(f"{model} against {record['reference']['how']}", "soft"),
        make_paragraph(_first_up(describe_verdict(record)) + ".", _css(record)),
        *(make_paragraph(f"Warning: {warning}.") for warning in record["warnings"]),
        make_tiles(_headline(record)),
        "</header>",
        _show_figures(record),
        _show_comparison(record),
        _show_margins(rows),
        _show_calibration(record),
        _show_length(record),
        _show_groups("By source", record["by_source"]),
        _show_groups("Prompts that the run was trained on, and others", record["by_training"]),
        _show_examples(examples),
        _show_making(record),
    ]
    return make_document(f"Evaluation of {model}", "\n".join(part for part in content if part))


def _css(record: dict[str, Any]) -> str:
    """Green where the model ranks better than chance, red where worse, amber where neither is shown."""
    if went_well(record):
        return "verdict"
    return "verdict note" if record["measures"]["accuracy"]["high"] >= 0.5 else "verdict problem"


def _headline(record: dict[str, Any]) -> list[tuple[str, str]]:
    measures = record["measures"]
    tiles = [
        ("pairs", f"{record['pairs']:,}"),
        ("prompts", f"{record['prompts']:,}"),
        ("accuracy", percent(measures["accuracy"])),
        ("margin", f"{measures['margin']['value']:+.2f}"),
        ("ROC AUC", f"{measures['roc_auc']['value']:.2f}"),
        ("calibration error", f"{record['calibration']['expected_calibration_error']['value']:.3f}"),
    ]
    if "length_controlled_accuracy" in measures:
        tiles.append(("length-controlled", percent(measures["length_controlled_accuracy"])))
    if "chosen_kl" in measures:
        tiles.append(("KL (nats)", f"{measures['chosen_kl']['value']:.2f}"))
    return tiles


def _show_figures(record: dict[str, Any]) -> str:
    rows = []
    for name, said in NAMES.items():
        figure = record["measures"].get(name)
        if figure is not None:
            rows.append((said, *_cells(figure, ".1%" if name in SHARES else ".4g")))
    return make_section(
        "Figures",
        make_paragraph(
            "A reward is beta times the log-ratio of a response's probability under the model and under its reference. "
            "The margin is the reward of the chosen response minus that of the rejected one; a pair is ranked "
            "correctly where it is above 0."
        ),
        make_table("with 95% intervals", ("figure", "value", "from", "to"), rows),
        make_paragraph(f"Margin: {describe_margin(record)}.", "soft"),
        make_paragraph(f"Reward: {describe_auc(record)}.", "soft"),
        make_paragraph(f"Distance: {describe_distance(record)}.", "soft"),
        make_paragraph(_first_up(describe_recorded(record)) + ".", "soft") if record["recorded"] else "",
    )


def _show_comparison(record: dict[str, Any]) -> str:
    rows = []
    for kind, said in (("summed", "by log-prob of the whole response"), ("per_token", "by log-prob per token")):
        found = record["against_reference"].get(kind)
        if found is not None:
            gain = found["difference"]
            rows.append(
                (
                    said,
                    percent(found["policy"]),
                    percent(found["reference"]),
                    f"{100 * gain['value']:+.1f}",
                    f"{100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}",
                    chance(found),
                    f"{found['only_policy_right']:,} / {found['only_reference_right']:,}",
                )
            )
    heads = ("ranked", "model", "reference", "points", "95% interval", "p-value", "only one right")
    return make_section(
        "Against the reference",
        make_paragraph(
            "A reward already compares with the reference, whose own rewards are 0. Here each model is measured alone: "
            "whether it finds the chosen response more likely than the rejected one. The last column counts pairs that "
            "only the model ranks correctly, and only the reference."
        ),
        make_table("share of pairs ranked correctly", heads, rows),
    )


def _show_margins(rows: Sequence[Mapping[str, Any]]) -> str:
    margins = np.array([row["margin"] for row in rows])
    edges = make_edges(margins)
    counts = np.histogram(np.clip(margins, edges[0], edges[-1]), edges)[0].tolist()
    table = make_table(
        "pairs per bin; the outermost bins are open",
        ("margin from", "to", "pairs"),
        [(f"{low:g}", f"{high:g}", f"{count:,}") for (low, high), count in zip(pairwise(edges), counts, strict=True)],
    )
    title = f"{len(margins):,} pairs, {int((margins < 0).sum()):,} of them below 0"
    chart = draw_histogram(title, edges, {"pairs": counts}, "margin (right of 0: ranked correctly)", (0.0, ""))
    return make_section("Margins", make_chart(title, chart, table))


def make_edges(values: np.ndarray) -> list[float]:
    """Edges of bins for a histogram: round numbers, one of them 0, around all values but the outermost hundredth."""
    low, high = min(0.0, *np.quantile(values, [0.01])), max(0.0, *np.quantile(values, [0.99]))
    rough = (high - low) / MARGIN_BINS or 1.0
    size = 10.0 ** np.floor(np.log10(rough))
    step = float(size * next(digit for digit in (1, 2, 5, 10) if digit * size >= rough))
    first, last = int(np.floor(low / step)), int(np.ceil(high / step))
    return [float(f"{number * step:.6g}") for number in range(min(first, -1), max(last, 1) + 1)]


def _show_calibration(record: dict[str, Any]) -> str:
    found = record["calibration"]
    points, rows = [], []
    for place in found["curve"]:
        right = place["accuracy"]
        points.append((place["confidence"], right["value"], right["low"], right["high"], place["pairs"]))
        ends = f"{place['from']:.0%} to {place['to']:.0%}"
        rows.append((ends, f"{place['pairs']:,}", f"{place['confidence']:.1%}", percent(right), between(right)))
    chart = draw_reliability(
        "Share of pairs ranked correctly by the model's confidence",
        points,
        ("confidence: predicted probability of the ranking", "pairs ranked correctly"),
    )
    heads = ("confidence", "pairs", "mean", "accuracy", "95% interval")
    return make_section(
        "Calibration",
        make_paragraph(
            "DPO reads a margin as a probability: the chosen response is preferred with probability sigmoid(margin). "
            "If the model is calibrated, pairs with a confidence of 80% are ranked correctly in 80% of cases, and the "
            "dots lie on the line. The size of a dot shows its number of pairs, the bars are 95% intervals."
        ),
        make_chart("Accuracy by confidence", chart, make_table("by bin", heads, rows)),
        make_paragraph(f"{_first_up(describe_calibration(record))}."),
    )


def _show_length(record: dict[str, Any]) -> str:
    found = record["length"]
    groups = found["by_difference"]
    bars = [_bar_of(group, f"{group['name']} tokens ({group['pairs']:,} pairs)") for group in groups]
    chart = draw_bars("Share of pairs ranked correctly by how much longer the chosen response is", bars, 0.5, (0, 1))
    return make_section(
        "Length",
        make_paragraph(f"{_first_up(describe_length(record))}."),
        make_chart(
            "Accuracy by the length of the chosen response minus that of the rejected one",
            chart,
            _group_table("by difference of lengths", [*groups, *found["by_longer_side"]]),
        ),
        _group_table("by tokens of the longer response", record["by_length"]),
    )


def _show_groups(heading: str, groups: list[dict[str, Any]]) -> str:
    if not groups:
        return ""
    bars = [_bar_of(group, f"{group['name']} ({group['pairs']:,} pairs)") for group in groups]
    chart = draw_bars(f"{heading}: share of pairs ranked correctly", bars, 0.5, (0, 1))
    return make_section(heading, make_chart("Accuracy", chart, _group_table("", groups)))


def _group_table(caption: str, groups: list[dict[str, Any]]) -> str:
    rows = [
        (
            group["name"],
            f"{group['pairs']:,}",
            percent(group["accuracy"]),
            between(group["accuracy"]),
            f"{group['margin']['value']:+.3f}",
        )
        for group in groups
    ]
    return make_table(caption, ("group", "pairs", "accuracy", "95% interval", "margin"), rows)


def _show_examples(examples: Sequence[dict[str, Any]]) -> str:
    parts = []
    for example in examples:
        row = example["row"]
        texts = [
            ("prompt", example["prompt"]),
            (f"chosen (reward {row['chosen_reward']:+.3f})", example["chosen"]),
            (f"rejected (reward {row['rejected_reward']:+.3f})", example["rejected"]),
        ]
        heading = f"margin {row['margin']:+.3f}, {row['place']}"
        parts.append(make_example(heading, [(name, _shorten(text)) for name, text in texts]))
    if not parts:
        return ""
    note = (
        "Pairs that the model ranks wrongly with the most confidence: what it has not learnt, or labels worth checking."
    )
    return make_section("Worst pairs", make_paragraph(note), *parts)


def _show_making(record: dict[str, Any]) -> str:
    data, scoring, resources = record["data"], record["scoring"], record["resources"]
    held_out = "held out by the run" if data["held_out_by_the_run"] else "all good pairs of the split"
    settings = record["settings"]
    rows = [
        ("model", record["model"]["adapter"] or record["model"]["base"]),
        ("reference", record["reference"]["how"]),
        ("data", f"{data['source']} ({held_out})"),
        ("read as", data["reading"]),
        ("longest pair kept", f"{data['max_length']:,} tokens; {data['truncated']:,} pairs shortened"),
        ("computed in", f"{scoring['precision']} on {resources['device']}, in {resources['seconds']:.0f} s"),
        ("beta, loss", f"{scoring['beta']:g}, {' '.join(scoring['loss_type'])}"),
        (
            "intervals",
            f"{settings['bootstrap_samples']:,} bootstrap resamples of the prompts, seed {settings['seed']}",
        ),
        ("finished", record["finished"]),
    ]
    return make_section("How it was measured", make_facts(rows), make_command(record["command"]))


def _bar_of(group: dict[str, Any], label: str) -> Bar:
    right = group["accuracy"]
    return Bar(label, right["value"], f"{percent(right)} ({between(right)})", (right["low"], right["high"]))


def _cells(figure: Figure, form: str) -> list[str]:
    return [f"{figure[name]:{form}}" for name in ("value", "low", "high")]


def _shorten(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " ..."


def _first_up(text: str) -> str:
    return text[:1].upper() + text[1:]
