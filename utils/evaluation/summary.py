"""What an evaluation found, in sentences: a few lines for a terminal, the rest for the page."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap
from typing import Any

from ..models.trained import TrainedModel
from ..training.rows import Rows
from .measures import EQUAL, LONGER, SHORTER
from .pairs import EvaluatedPairs
from .resampling import Figure

WIDTH = 118
LABEL = 13


def describe_policy(trained: TrainedModel, use_4bit: bool) -> str:
    """What is evaluated, as a line."""
    source = trained.source
    kind = f"an adapter on {source.base}{' in 4 bits' if use_4bit else ''}" if source.adapter else "a full model"
    verb = trained.record.get("verb")
    made = f" that a run of {verb} made" if verb else ""
    return f"model: {source.name}, {kind}{made}"


def describe_pairs(pairs: EvaluatedPairs, rows: Rows) -> Iterator[str]:
    """What it is evaluated on, as lines."""
    data = pairs.data
    yield f"data: {data.source}: {data.reading.description}"
    for source in data.sources if len(data.sources) > 1 and not pairs.own else ():
        yield f"      {source.name}: {source.drawn:,} of {source.good:,} good pairs; {source.reading}"
    count = count_pairs(len(rows.train))
    if pairs.own:
        state = "the data are unchanged" if pairs.unchanged else "but the data have changed since"
        yield f"      {count} that the run held out; {state}"
    else:
        yield f"      {count}{_describe_overlap(pairs)}"
        for reason, number in data.dropped.items():
            yield f"      left out {number:,}: {reason}"
    for reason, number in rows.bad_rows.items():
        yield f"      left out {number:,}: {reason}"
    cut = rows.truncation
    if cut.truncated or cut.dropped:
        yield (
            f"      over {rows.max_length} tokens: {cut.prompts_shortened:,} with the prompt shortened from its left, "
            f"{cut.completions_cut:,} with a response cut, {cut.dropped:,} left out"
        )
    if rows.template is not None:
        yield f"      chat template: {rows.template}"


def _describe_overlap(pairs: EvaluatedPairs) -> str:
    if pairs.trained_on is None:
        return ""
    if not pairs.trained_on.any():
        return "; the run was trained on none of their prompts"
    return f"; of {int(pairs.trained_on.sum()):,} the run was trained on the prompt"


def describe_verdict(record: dict[str, Any]) -> str:
    """The accuracy with its interval, and what it means, in one sentence."""
    accuracy, margin = record["measures"]["accuracy"], record["measures"]["margin"]
    pairs = count_pairs(record["pairs"], "held-out " if record["data"]["held_out_by_the_run"] else "")
    text = f"{percent(accuracy)} of {pairs} ranked correctly (95% interval {between(accuracy)}; chance: 50%)"
    if margin["value"] == margin["low"] == margin["high"] == 0:
        return f"{text}: the model gives every response the same probability as its reference"
    if accuracy["low"] > 0.5:
        return f"{text}: the model has moved towards what these pairs prefer"
    if accuracy["high"] < 0.5:
        return f"{text}: the model has moved towards what these pairs reject"
    return f"{text}: on these pairs it cannot be distinguished from chance"


def went_well(record: dict[str, Any]) -> bool:
    """Whether the accuracy is above chance, and nothing makes it mean something else."""
    return record["measures"]["accuracy"]["low"] > 0.5 and not record["warnings"]


def summarise_evaluation(record: dict[str, Any]) -> Iterator[str]:
    """The lines for a terminal: the verdict, warnings, and four lines of figures."""
    yield from wrap(describe_verdict(record), WIDTH)
    for warning in record["warnings"]:
        yield from wrap(f"warning: {warning}", WIDTH, subsequent_indent=" " * 9)
    if record["recorded"] is not None and not record["recorded"]["same"]:
        yield from wrap(f"warning: {describe_recorded(record)}", WIDTH, subsequent_indent=" " * 9)
    for label, text in (
        ("margin", f"{describe_margin(record).partition(',')[0]}; {describe_distance(record).partition(' along')[0]}"),
        ("vs reference", describe_comparison(record).partition("; per token")[0]),
        ("calibration", describe_calibration(record).partition(" (a calibrated")[0]),
        ("length", describe_length(record).partition(", length-controlled")[0].partition(";")[0]),
    ):
        yield f"  {label:<{LABEL}}{text}"


def describe_margin(record: dict[str, Any]) -> str:
    """The margin, whether it is above 0, and the rewards it is made of."""
    measures = record["measures"]
    form = "+.3f" if max(map(abs, measures["margin"].values())) >= 0.1 else "+.2g"
    rewards = ", ".join(f"{measures[f'{side}_reward']['value']:{form}} for {side}" for side in ("chosen", "rejected"))
    return (
        f"{measures['margin']['value']:{form}} ({between(measures['margin'], form)}), above 0 with "
        f"{chance(record['tests']['margin_above_0'])}; rewards {rewards}"
    )


def describe_auc(record: dict[str, Any]) -> str:
    """How far the reward goes without a rejected response beside it."""
    auc = record["measures"]["roc_auc"]
    return (
        f"tells a chosen from a rejected response of any prompt in {percent(auc)} ({between(auc)}) of cases: the ROC "
        "AUC of the reward"
    )


def describe_comparison(record: dict[str, Any]) -> str:
    """Policy beside reference, by log-prob."""
    texts = []
    for kind, said in (("summed", "by log-prob"), ("per_token", "per token")):
        found = record["against_reference"].get(kind)
        if found is not None:
            gain = {name: 100 * value for name, value in found["difference"].items()}
            texts.append(
                f"{said} {percent(found['policy'])} correct, the reference {percent(found['reference'])}: "
                f"{gain['value']:+.1f} points ({between(gain, '+.1f')}; {chance(found)})"
            )
    return "; ".join(texts)


def describe_calibration(record: dict[str, Any]) -> str:
    """How sure the model is beside how often it is right."""
    found = record["calibration"]
    error, sure = found["expected_calibration_error"], found["confidence"]["value"]
    low, high = (record["measures"]["accuracy"][end] for end in ("low", "high"))
    by_chance = found["expected_calibration_error_by_chance"]["high"]
    much = ""
    if error["value"] > by_chance:
        much = "overconfident: " if sure > high else "underconfident: " if sure < low else ""
    return (
        f"{much}mean confidence {sure:.1%}, accuracy {percent(record['measures']['accuracy'])}; expected calibration "
        f"error {error['value']:.3f} (a calibrated model: up to {by_chance:.3f}), Brier score "
        f"{found['brier_score']['value']:.3f} (chance: 0.250)"
    )


def describe_length(record: dict[str, Any]) -> str:
    """What length has to do with the ranking."""
    found, controlled = record["length"], record["measures"].get("length_controlled_accuracy")
    sides = {group["name"]: group for group in found["by_longer_side"]}
    if set(sides) <= {EQUAL}:
        return "both responses of every pair have the same length"
    right = [f"{percent(sides[name]['accuracy'])} where {name}" for name in (LONGER, SHORTER) if name in sides]
    text = f"accuracy {' and '.join(right)}"
    if controlled is not None:
        text += f", length-controlled {percent(controlled)} ({between(controlled)})"
    prefers, data = found["prefers_longer"], found["longer_is_chosen"]
    return f"{text}; the model prefers the longer one in {percent(prefers)} of pairs, the data in {percent(data)}"


def describe_distance(record: dict[str, Any]) -> str:
    """How far the policy is from the reference."""
    measures, texts = record["measures"], []
    if "chosen_kl" in measures:
        texts.append(
            f"KL {measures['chosen_kl']['value']:.2f} nats from the reference along a chosen response, "
            f"{measures['rejected_kl']['value']:.2f} along a rejected one"
        )
    if "perplexity" in measures:
        texts.append(
            f"perplexity of chosen responses {measures['perplexity']['value']:.2f}, the reference's "
            f"{measures['reference_perplexity']['value']:.2f}"
        )
    return "; ".join(texts) or "not measured: the two models' vocabularies differ in size"


def describe_recorded(record: dict[str, Any]) -> str:
    """Whether the run had measured the same when it ended."""
    recorded = record["recorded"]
    if recorded["same"]:
        return "these are the figures that run.json recorded when the run ended"
    name, precision = recorded["furthest"], recorded["precision"]
    here = record["scoring"]["precision"]
    why = f"; it computed in {precision}, this is {here}" if precision not in (None, here) else ""
    return (
        f"not what run.json recorded when the run ended: {name} is {record['metrics'][name]:.4g} and was "
        f"{recorded['held_out'][name]:.4g}{why}"
    )


def count_pairs(number: int, which: str = "") -> str:
    """So many pairs, in words."""
    return f"{number:,} {which}pair{'' if number == 1 else 's'}"


def percent(figure: Figure) -> str:
    """The value of a share."""
    return f"{figure['value']:.1%}"


def between(figure: Figure, form: str = ".1%") -> str:
    """The interval."""
    return f"{figure['low']:{form}} to {figure['high']:{form}}"


def chance(test: dict[str, Any]) -> str:
    """The p-value."""
    return "p < 0.001" if test["p_value"] < 0.001 else f"p = {test['p_value']:.2g}"
