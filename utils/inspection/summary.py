"""What was found, as lines for a terminal: the verdict, then the problems, then what is in the data."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap
from typing import Any

from ..data.places import list_places
from ..data.splitting import advise_on_spare

WIDTH = 100
MOST_LANGUAGES = 4


def describe_verdict(record: dict[str, Any]) -> str:
    """The verdict in one sentence."""
    notes = f"{_count(record['notes'], 'note')}" if record["notes"] else ""
    if record["exit_code"] == 0:
        text = f"clean: no problems in {_count(record['counts']['good_pairs'], 'pair')}"
        return f"{text}; {notes}" if notes else text
    text = _count(record["problems"], "kind") + " of problem" + (f" and {notes}" if notes else "")
    return f"{text} in {_count(record['counts']['rows'], 'row')}"


def summarize(record: dict[str, Any]) -> Iterator[str]:
    """The lines of the summary."""
    yield describe_verdict(record)
    yield from _indent(f"{record['source']}: {record['reading']}", "  ")
    for severity, heading in (("problem", "Problems"), ("note", "Notes")):
        found = [finding for finding in record["findings"] if finding["severity"] == severity]
        if found:
            yield ""
            yield heading
        for finding in found:
            yield from _finding_lines(finding)
    yield ""
    yield "What is in it"
    for label, text in describe_content(record):
        yield from _indent(text, f"  {label:<12}")
    if "output" in record:
        yield ""
        yield from _indent(describe_output(record["output"]), "")


def _finding_lines(finding: dict[str, Any]) -> Iterator[str]:
    yield from _indent(finding["title"], f"{finding['count']:>9,}  ")
    if finding["places"]:
        yield from _indent(list_places(finding["places"], finding["count"]), " " * 11)
    yield from _indent(finding["advice"], " " * 11)


def _indent(text: str, first: str) -> list[str]:
    lines = wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False)
    return [line if line.startswith(first) else first + line for line in lines[:1]] + lines[1:]


def describe_content(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Label and sentence for each part of the statistics."""
    counts = record["counts"]
    if len(record["sources"]) > 1:
        for number, source in enumerate(record["sources"]):
            yield "" if number else "sources", describe_source(source)
    yield "pairs", describe_pairs(counts)
    yield "split", describe_split(counts)
    if "lengths" not in record:
        return
    yield "characters", describe_sides(record["lengths"]["characters"])
    if "characters_without_reasoning" in record["lengths"]:
        yield "reasoning", "without it: " + describe_sides(record["lengths"]["characters_without_reasoning"])
    yield "language", describe_languages(record["languages"]["prompt"])
    yield "shortcuts", describe_rules(record)
    if "tokens" in record:
        yield "tokens", describe_tokens(record["tokens"])
        yield "padding", describe_padding(record["tokens"])
    if "compare" in record:
        yield "overlap", describe_overlap(record["compare"])


def describe_pairs(counts: dict[str, Any]) -> str:
    """How many pairs and prompts there are."""
    prompts = _count(counts["distinct_prompts"], "prompt")
    text = f"{counts['good_pairs']:,} good of {_count(counts['rows'], 'row')}; {prompts}"
    if counts["most_pairs_per_prompt"] > 1:
        text += f" with up to {counts['most_pairs_per_prompt']:,} pairs each"
    several = counts["pairs_with_several_turns"]
    return f"{text}; {several:,} prompts have several turns" if several else text


def describe_source(source: dict[str, Any]) -> str:
    """What one of several sources brings, and how it is read."""
    text = f"{source['name']}: {source['good_pairs']:,} good of {_count(source['rows'], 'row')}"
    if source["drawn"] < source["good_pairs"]:
        text += f", {source['drawn']:,} of them drawn"
    text += f"; {source['train_pairs']:,} to train on, {source['held_out_pairs']:,} held out"
    if source["repeated"]:
        text += f"; {source['repeated']:,} also in a source before it"
    return f"{text}; {source['reading']}"


def describe_split(counts: dict[str, Any]) -> str:
    """How the pairs are split."""
    aside = counts["set_aside_pairs"]
    text = f"{counts['train_pairs']:,} to train on, {counts['held_out_pairs']:,} held out"
    if aside:
        text += f", {aside:,} set aside, neither trained on nor evaluated"
    text += f" ({counts['split']})"
    return f"{text}; of those set aside: {advise_on_spare(counts['good_pairs'])}" if aside else text


def describe_sides(sides: dict[str, Any]) -> str:
    """Median, 95th percentile and maximum of each side."""
    texts = [
        f"{side} {sides[side]['median']:,.0f} ({sides[side]['p95']:,.0f}, {sides[side]['max']:,})"
        for side in ("prompt", "chosen", "rejected")
    ]
    return f"median (95th percentile, longest): {', '.join(texts)}"


def describe_languages(languages: dict[str, int]) -> str:
    """The shares of the commonest languages."""
    total = sum(languages.values())
    shown = list(languages.items())[:MOST_LANGUAGES]
    texts = [f"{name} {_share(count, total)}" for name, count in shown]
    rest = total - sum(count for _, count in shown)
    return ", ".join(texts) + (f", others {_share(rest, total)}" if rest else "") + " of the prompts (roughly)"


def describe_rules(record: dict[str, Any]) -> str:
    """How far the longer response gets, the best other rule, and the words."""
    rules = record["shortcuts"]
    text = f"picking the longer response is correct in {rules[0]['accuracy']:.1%} of the pairs"
    best = max(rules[1:], key=lambda rule: abs(rule["accuracy"] - 0.5))
    if abs(best["accuracy"] - 0.5) >= 0.01:
        text += f", {best['rule']} in {best['accuracy']:.1%}"
    words = record["words_classifier"]
    if words is not None:
        text += (
            f"; a bag of words in {words['accuracy']:.1%} ± {words['standard_error']:.1%} of pairs with unseen prompts"
        )
    return f"{text} (50% is chance)"


def describe_tokens(tokens: dict[str, Any]) -> str:
    """Token counts and what the limit does."""
    text = f"{tokens['total']:,} in all; {describe_sides(tokens['lengths'])}"
    if tokens["pairs_too_long"]:
        return f"{text}; {tokens['pairs_too_long']:,} pairs are over {tokens['max_length']:,}"
    return f"{text}; all fit {tokens['max_length']:,}"


def describe_padding(tokens: dict[str, Any]) -> str:
    """What padded batches would compute beside the shared prefix."""
    ratio = tokens["padded_tokens"] / tokens["shared_prefix_tokens"]
    return (
        f"padded batches of {tokens['batch_pairs']} pairs hold {tokens['padded_tokens']:,} tokens; with each "
        f"prompt once and no padding {tokens['shared_prefix_tokens']:,}, {ratio:.1f} times fewer"
    )


def describe_overlap(compare: dict[str, Any]) -> str:
    """How many of the other data's prompts occur here."""
    return (
        f"of {compare['prompts']:,} prompts of {compare['source']}, {compare['prompts_found']:,} occur here and "
        f"{compare['prompts_nearly_found']:,} nearly do"
    )


def describe_output(output: dict[str, Any]) -> str:
    """What was written and what was left out."""
    removed = {name: count for name, count in output["removed"].items() if count}  # kinds of findings, and reasons
    words = {name: name if "'" in name else name.replace("_", " ") for name in removed}
    left = ", ".join(f"{words[name]} {count:,}" for name, count in removed.items())
    wrote = (
        f"wrote {_count(output['pairs'], 'pair')} to {output['file']}"
        if output["pairs"]
        else "no pair is left to write"
    )
    return f"{wrote}; left out: {left}" if left else f"{wrote}; nothing left out"


def _share(count: int, total: int) -> str:
    share = count / total
    return "under 1%" if 0 < share < 0.01 else f"{share:.0%}"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
