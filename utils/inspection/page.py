"""The findings as a page: the verdict, each finding with examples, then what is in the data, as charts and tables."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from ..data.places import list_places
from ..report.charts import Bar, draw_bars, draw_histogram
from ..report.html import (
    make_chart,
    make_details,
    make_document,
    make_example,
    make_paragraph,
    make_section,
    make_table,
    make_tiles,
    show,
)
from .summary import (
    describe_output,
    describe_overlap,
    describe_padding,
    describe_pairs,
    describe_split,
    describe_verdict,
)

SIDES = ("prompt", "chosen", "rejected")


def make_page(record: dict[str, Any]) -> str:
    """The whole page, from the record that the JSON holds too."""
    css = "verdict problem" if record["exit_code"] else "verdict"
    findings = {
        severity: [_show_finding(finding) for finding in record["findings"] if finding["severity"] == severity]
        for severity in ("problem", "note")
    }
    content = [
        "<header>",
        "<h1>Preference data</h1>",
        make_paragraph(f"{record['source']}: {record['reading']}", "soft"),
        make_paragraph(describe_verdict(record), css),
        make_tiles(_headline(record)),
        "</header>",
        make_section("Problems", *findings["problem"]),
        make_section("Notes", *findings["note"]),
        _show_sources(record["sources"]),
        make_section("The pairs", make_paragraph(describe_pairs(record["counts"])),
                     make_paragraph(describe_split(record["counts"]))),
    ]  # fmt: skip
    if "lengths" in record:
        content += [_show_lengths(record), _show_shortcuts(record), _show_tokens(record), _show_languages(record)]
    if "compare" in record:
        content.append(make_section("Overlap", make_paragraph(describe_overlap(record["compare"]))))
    if "output" in record:
        content.append(make_section("Clean pairs", make_paragraph(describe_output(record["output"]))))
    return make_document(f"Preference data: {record['source']}", "\n".join(part for part in content if part))


def _headline(record: dict[str, Any]) -> list[tuple[str, str]]:
    counts = record["counts"]
    tiles = [
        ("rows read", f"{counts['rows']:,}"),
        ("good pairs", f"{counts['good_pairs']:,}"),
        ("prompts", f"{counts['distinct_prompts']:,}"),
        ("held out", f"{counts['held_out_pairs']:,}"),
    ]
    if "shortcuts" in record:
        tiles.append(("longer is chosen", f"{record['shortcuts'][0]['accuracy']:.1%}"))
    if "tokens" in record:
        tiles.append(("tokens", f"{record['tokens']['total']:,}"))
    return tiles


def _show_finding(finding: dict[str, Any]) -> str:
    places = list_places(finding["places"], finding["count"]) if finding["places"] else ""
    examples = "".join(_show_example(example) for example in finding["examples"])
    return (
        f'<article class="finding {finding["severity"]}"><h3><span class="tag">{finding["severity"]}</span>'
        f'<span class="count">{finding["count"]:,}</span> × {show(finding["title"])}</h3>'
        + (make_paragraph(places, "soft") if places else "")
        + make_paragraph(finding["advice"])
        + (make_details("examples", examples) if examples else "")
        + "</article>"
    )


def _show_sources(sources: list[dict[str, Any]]) -> str:
    if len(sources) < 2:
        return ""
    keys = ("rows", "good_pairs", "drawn", "train_pairs", "held_out_pairs", "repeated")
    rows = [
        (source["name"], *(f"{source[key]:,}" for key in keys), f"{sum(source['bad_rows'].values()):,}")
        for source in sources
    ]
    heads = ("source", "rows", "good pairs", "drawn", "to train on", "held out", "also in a source before", "bad rows")
    return make_section(
        "Sources",
        make_table("by source", heads, rows),
        *(make_paragraph(f"{source['name']}: {source['reading']}", "soft") for source in sources),
    )


def _show_example(example: dict[str, str]) -> str:
    return make_example(example["place"], [(name, text) for name, text in example.items() if name != "place"])


def _show_lengths(record: dict[str, Any]) -> str:
    sides = record["lengths"]["characters"]
    words, answers = record["lengths"]["words"], record["lengths"].get("characters_without_reasoning")
    return make_section(
        "Lengths",
        _histogram("Characters", sides, "characters (bins widen to the right)"),
        _size_table("Characters", sides),
        _size_table("Words", words),
        _size_table("Characters without reasoning", answers) if answers else "",
    )


def _histogram(heading: str, sides: dict[str, Any], unit: str, mark: tuple[float, str] | None = None) -> str:
    series = {side: sides[side]["counts"] for side in SIDES}
    medians = ", ".join(f"{side} {sides[side]['median']:,.0f}" for side in SIDES)
    edges = sides["edges"]
    rows = [
        (f"{low:,} to {high - 1:,}", *(f"{sides[side]['counts'][place]:,}" for side in SIDES))
        for place, (low, high) in enumerate(pairwise(edges))
    ]
    chart = draw_histogram(f"{heading} per text; medians: {medians}", edges, series, unit, mark, "texts")
    return make_chart(heading, chart, make_table("texts per bin", (heading.lower(), *SIDES), rows))


def _size_table(unit: str, sides: dict[str, Any]) -> str:
    rows = [(side, *(f"{sides[side][key]:,.0f}" for key in ("mean", "median", "p95", "max"))) for side in SIDES]
    return make_table(unit, ("text", "mean", "median", "95th percentile", "longest"), rows)


def _show_shortcuts(record: dict[str, Any]) -> str:
    rules = record["shortcuts"]
    bars = [Bar(rule["rule"], rule["accuracy"], f"{rule['accuracy']:.1%}") for rule in rules]
    words = record["words_classifier"]
    if words is not None:
        share, error = words["accuracy"], words["standard_error"]
        ends = (share - 1.96 * error, share + 1.96 * error)
        text = "{:.1%} ({:.1%} to {:.1%})".format(share, *ends)
        bars.append(Bar("bag of words, on unseen prompts", share, text, ends))
    rows = [(r["rule"], f"{r['unlike']:,}", f"{r['right']:,}", f"{r['accuracy']:.1%}") for r in rules]
    note = (
        "Accuracy of picking the chosen response by one surface feature, at random where both sides are alike: "
        "50% is chance. A feature far from it is a shortcut that a model may learn."
    )
    if words is not None:
        note += (
            f" Bag of words: a logistic regression on {words['pairs']:,} pairs, tried on prompts that it was not "
            "fitted "
            f"on ({words['folds']} folds, standard error {words['standard_error']:.1%})."
        )
    starts = record["first_words"]
    return make_section(
        "Surface features",
        make_paragraph(note),
        make_chart(
            "Picking the chosen response by a surface feature",
            draw_bars("Share of pairs in which each rule picks the chosen response", bars, 0.5),
            make_table("by rule", ("picks", "pairs that differ", "of those right", "over all pairs"), rows),
        ),
        make_table(
            "Opening words that one side uses more often",
            ("first words", "chosen", "rejected"),
            [(start["words"], f"{start['chosen']:,}", f"{start['rejected']:,}") for start in starts],
        ),
    )


def _show_tokens(record: dict[str, Any]) -> str:
    if "tokens" not in record:
        return ""
    tokens = record["tokens"]
    template = [make_paragraph(f"Chat template: {tokens['chat_template']}")] if tokens["chat_template"] else []
    limit = tokens["max_length"]
    over = (
        f"{tokens['pairs_too_long']:,} pairs are longer than {limit:,} tokens: {tokens['prompts_shortened']:,} keep "
        f"their responses whole, {tokens['responses_cut']:,} have one cut."
        if tokens["pairs_too_long"]
        else f"Every pair fits {limit:,} tokens; the longest has {tokens['longest_pair']:,}."
    )
    return make_section(
        "Tokens",
        make_paragraph(f"Tokenizer: {tokens['tokenizer']}"),
        *template,
        make_paragraph(over),
        make_paragraph(describe_padding(tokens).capitalize() + "."),
        _histogram("Tokens", tokens["lengths"], "tokens (bins widen to the right)", (limit, f"--max_length {limit:,}")),
        _size_table("Tokens", tokens["lengths"]),
    )


def _show_languages(record: dict[str, Any]) -> str:
    counts = record["languages"]
    names = list(dict.fromkeys([*counts["prompt"], *counts["chosen"]]))
    rows = [(name, *(f"{counts[side].get(name, 0):,}" for side in ("prompt", "chosen"))) for name in names]
    note = (
        "Guessed from the script and the most common words of twelve languages, to show a mixture. Short texts, "
        "code and "
        "lists are unclear."
    )
    return make_section(
        "Languages", make_paragraph(note), make_table("pairs", ("language", "by prompt", "by chosen"), rows)
    )
