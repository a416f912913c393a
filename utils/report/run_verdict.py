"""What came of a run, in a sentence and in a handful of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..runtime import readable_bytes, readable_seconds

SAME_LOSS = 0.002  # nats: a change of the mean loss that is none
COLLAPSE = 1.0  # nats that a token of the chosen responses may lose
FEW = 0.05  # chance alone moves an accuracy by more: too few pairs to say that nothing was learnt
ENDS_KEPT = 0.5  # share of the probability of ending that has to be left ...
ENDS_AT_FIRST = 0.02  # ... where there was any


def describe_run(record: Mapping[str, Any]) -> tuple[str, str]:
    """The verdict as a sentence or two, and its kind: good, note or problem."""
    status, where = record.get("status"), _steps(record)
    before, after = held_out_of(record)
    if status == "failed":
        reason = next(reversed(record.get("warnings") or []), "no reason is recorded")
        return f"It failed{where}: {_sentence(reason)}", "problem"
    if status == "finished":
        sentence, kind = _judge(record, before, after)
        return " ".join(filter(None, (sentence, _early(record), _warned(record)))), kind
    so_far = f"So far {describe_numbers(before, after)}" if are_whole(before, after) else ""
    if status == "interrupted":
        return " ".join(filter(None, (f"It was stopped{where}.", so_far, _warned(record)))), "note"
    left = record.get("seconds_left")
    rest = f", {readable_seconds(left)} left" if isinstance(left, int | float) else ""
    return " ".join(filter(None, (f"Still running{where}{rest}.", so_far, _warned(record)))), "note"


def _steps(record: Mapping[str, Any]) -> str:
    if record.get("step") is None:
        return ""
    return f" at step {record['step']:,} of {record.get('steps') or 0:,}"


def held_out_of(record: Mapping[str, Any]) -> tuple[Mapping[str, float] | None, Mapping[str, float] | None]:
    """The held-out metrics before training, and after it or, while it runs, at the last evaluation."""
    metrics = record.get("metrics") or {}
    return metrics.get("held_out_before"), metrics.get("held_out") or metrics.get("held_out_so_far")


def are_whole(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> bool:
    """Whether both have the numbers that a verdict takes: one that is not finite is none."""
    if not before or not after:
        return False
    names = ("loss", "accuracy") if "accuracy" in after else ("loss", "perplexity")
    whole = all(name in part for part in (before, after) for name in names)
    return whole and ("accuracy" not in after or after.get("pairs", 0) > 0)


def describe_numbers(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """What the held-out rows say, as the second half of a sentence."""
    if "accuracy" not in after:
        return (
            f"the loss per held-out token went from {before['loss']:.3f} to {after['loss']:.3f} (perplexity "
            f"{before['perplexity']:.2f} to {after['perplexity']:.2f})."
        )
    kl = f"; KL {after['chosen_kl']:.1f} nats from the reference" if "chosen_kl" in after else ""
    return (
        f"it ranks {after['accuracy']:.0%} of {after['pairs']:,} held-out pairs right ({before['accuracy']:.0%} "
        f"before){kl}."
    )


def _judge(record: Mapping[str, Any], before: Any, after: Any) -> tuple[str, str]:
    if not before or not after:
        train = (record.get("metrics") or {}).get("train") or {}
        last = f" Of its training pairs it ranked {train['accuracy']:.0%} right." if "accuracy" in train else ""
        return f"It finished. Nothing was held out, so whether it learnt what carries over is not known.{last}", "note"
    if not are_whole(before, after):
        return "Its held-out metrics are not all numbers, so what came of it cannot be said.", "problem"
    numbers, fell = describe_numbers(before, after), before["loss"] - after["loss"]
    losses = f"The held-out loss went from {before['loss']:.3f} to {after['loss']:.3f}."
    gain, noise = 1.0, 0.0
    if "accuracy" in after:
        gain, share = after["accuracy"] - before["accuracy"], before["accuracy"]
        noise = 2 * math.sqrt(max(share * (1 - share), 0.01) / after["pairs"])
    lost = _lost(before, after)
    if lost:
        return f"It came apart: {' and '.join(lost)}. As for ranking, {numbers}", "problem"
    if fell > SAME_LOSS and gain > noise:
        return f"It learnt: {numbers}", "good"
    if fell > SAME_LOSS and gain >= 0:
        return f"It learnt a little, less than {after['pairs']:,} held-out pairs can prove: {numbers}", "note"
    if fell > SAME_LOSS and "accuracy" in after and gain >= -noise:
        return (
            f"Its held-out loss fell; its ranking is the same within {_chance(after, noise)}: {numbers} {losses}",
            "note",
        )
    if abs(fell) <= SAME_LOSS and gain > noise and "accuracy" in after:
        return f"It learnt to rank, with margins still near zero: {numbers} {losses}", "note"
    if fell < -SAME_LOSS and gain > noise and "accuracy" in after:
        return f"It learnt to rank, and is too sure of its mistakes: {numbers} {losses}", "note"
    if fell < -SAME_LOSS or gain < -noise:
        return f"It got worse: {numbers} {losses if 'accuracy' in after else ''}".strip(), "problem"
    if noise > FEW:
        advice = "More steps, a larger --learning_rate or more held-out pairs would tell."
        return f"Too small a change to tell from {_chance(after, noise)}: {numbers} {advice}", "note"
    return f"It did not learn: {numbers} More steps or a larger --learning_rate may help.", "problem"


def _chance(after: Mapping[str, float], noise: float) -> str:
    """What an accuracy varies by on so few pairs, with 95% confidence."""
    return f"the chance of {after['pairs']:,} held-out pairs (±{noise * 100:.0f} points)"


def _lost(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """What a model could do before that it no longer can, whatever it ranks."""
    lost = []
    if all("chosen_logps" in part and part.get("chosen_tokens") for part in (before, after)):
        fall = before["chosen_logps"] / before["chosen_tokens"] - after["chosen_logps"] / after["chosen_tokens"]
        if fall >= COLLAPSE:
            lost.append(f"it lost {fall:.1f} nats on each token of the chosen responses")
    first, last = (part.get("chosen_end_prob") for part in (before, after))
    if first is not None and last is not None and first >= ENDS_AT_FIRST and last <= first * ENDS_KEPT:
        lost.append(f"it ends where responses end with probability {last:.2f} (before {first:.2f})")
    return lost


def _early(record: Mapping[str, Any]) -> str:
    best = record.get("early_stopping")
    if not best:
        return ""
    kept = f"the model of step {best['step']:,} is kept, which had the best held-out {best['metric']}."
    return (
        f"Stopped early at step {record.get('step') or 0:,}; {kept}"
        if best.get("stopped")
        else kept[0].upper() + kept[1:]
    )


def _warned(record: Mapping[str, Any]) -> str:
    count = len(record.get("warnings") or [])
    return f"It has {count} warning{'s' if count > 1 else ''}." if count else ""


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def headline(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers that a person looks for first: label and value."""
    _, after = held_out_of(record)
    used = record.get("resources") or {}
    tiles = []
    for name, label, form in (
        ("accuracy", "held-out accuracy", "{:.1%}"),
        ("margin", "margin", "{:+.2f}"),
        ("chosen_kl", "KL, nats", "{:.2f}"),
        ("loss", "held-out loss", "{:.4f}"),
        ("perplexity", "perplexity", "{:.2f}"),
        ("token_accuracy", "token accuracy", "{:.1%}"),
    ):
        if (after or {}).get(name) is not None:
            tiles.append((label, form.format(after[name])))
    if record.get("step") is not None:
        tiles.append(("steps", f"{record['step']:,} of {record.get('steps') or 0:,}"))
    if used.get("seconds"):
        tiles.append(("time", readable_seconds(used["seconds"])))
        tiles.append(("tokens per second", f"{used.get('tokens_per_second') or 0:,.0f}"))
        tiles.append(("peak memory", readable_bytes(used.get("peak_memory_bytes") or 0)))
    if used.get("cost") is not None:
        tiles.append(("cost", f"{used['cost']:,.2f}"))
    return tiles
