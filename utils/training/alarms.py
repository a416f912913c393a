"""What in the metrics of a run calls for a person: each alarm is a pure function of the lines of metrics.jsonl.

An alarm is meant to be rare: it looks at windows of many pairs, and at what hardly happens to a run that goes well.
Held-out lines are preferred where both kinds would tell, since they are of the same pairs every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..report.run_verdict import COLLAPSE, ENDS_AT_FIRST, ENDS_KEPT

Line = Mapping[str, Any]  # of metrics.jsonl: training names as they are, held-out names with held_out_ in front

WINDOW_PAIRS = 64  # a mean over fewer pairs says little
WINDOW_LINES = 3
FALLEN_REWARD = -1.0  # below it the chosen responses are that much less likely, in the units of the loss
EARLY = 0.2  # share of the steps
EARLY_PAIRS = 200  # training pairs in a row, all ranked correctly
LARGEST_MARGIN = 20.0  # the sigmoid loss and its gradient are then 2e-9
OVERFIT = 1.1  # times the best held-out loss


@dataclass(frozen=True)
class Limits:
    """The steps of the run, and the KL that --max_kl allows (nats)."""

    steps: int
    max_kl: float | None = None


def find_alarms(lines: Sequence[Line], limits: Limits) -> Iterator[tuple[str, str]]:
    """The name and the text, advice included, of each alarm that the lines so far set off."""
    for name, alarm in ALARMS.items():
        text = alarm(lines, limits)
        if text is not None:
            yield name, text


def rewards_falling(lines: Sequence[Line], limits: Limits) -> str | None:
    """Both rewards far down and still falling, while the margin grows: likelihood displacement."""
    now, before = _two_windows(lines, ("chosen_reward", "rejected_reward", "margin"))
    if now is None or before is None:
        return None
    chosen, margin = now["chosen_reward"], now["margin"]
    both = now["rejected_reward"] < chosen < before["chosen_reward"]
    if not (both and margin > before["margin"] and chosen < min(FALLEN_REWARD, -margin / 2)):
        return None
    return (
        f"both rewards are falling: the chosen responses' is {chosen:.2f}, the rejected responses' "
        f"{now['rejected_reward']:.2f}. The margin grows because rejected responses get less likely faster than chosen "
        "ones do, and what becomes likely instead is in neither. Lower --learning_rate, raise --beta, or add "
        "--loss_type sigmoid sft, which keeps the chosen responses likely"
    )


def all_right_early(lines: Sequence[Line], limits: Limits) -> str | None:
    """Every pair ranked correctly when the run has hardly begun."""
    step = _last_step(lines)
    if step == 0 or step > EARLY * limits.steps:
        return None
    held_out = _held_out(lines, "accuracy")[-1:]
    pairs = 0.0
    for line in reversed(_training(lines, "accuracy")):
        if line["accuracy"] < 1:
            break
        pairs += line.get("pairs", 0)
    unseen = [line for line in held_out if line["held_out_accuracy"] == 1 and line["held_out_pairs"] >= WINDOW_PAIRS]
    if pairs < EARLY_PAIRS and not unseen:
        return None
    which = f"all {unseen[0]['held_out_pairs']:,} held-out pairs" if unseen else f"the last {pairs:,.0f} pairs"
    return (
        f"{which} are ranked correctly at step {step:,} of {limits.steps:,}: that is early. The sides may differ in "
        "something shallow, such as length, format or a fixed phrase: check with the verb data (its surface features). "
        "If the task is that easy, fewer steps or a larger --beta are enough"
    )


def log_probs_collapsing(lines: Sequence[Line], limits: Limits) -> str | None:
    """Chosen responses much less likely, per token, than when the run began."""
    measured = [
        (line["held_out_chosen_logps"], line["held_out_chosen_tokens"]) for line in _held_out(lines, "chosen_logps")
    ]
    if len(measured) < 2:
        first, last = _edges(_training(lines, "chosen_logps"), ("chosen_logps", "chosen_tokens"))
        if first is None or last is None:
            return None
        measured = [(window["chosen_logps"], window["chosen_tokens"]) for window in (first, last)]
    start, now = (total / max(tokens, 1) for total, tokens in (measured[0], measured[-1]))
    if start - now < COLLAPSE:
        return None
    return (
        f"log-probs are collapsing: a token of a chosen response has {now:.2f} nats, {start - now:.2f} less than at "
        "the start. The model is degenerating. Stop, and start again with a smaller --learning_rate or a "
        "larger --beta"
    )


def responses_not_ending(lines: Sequence[Line], limits: Limits) -> str | None:
    """The policy no longer ends where chosen responses end."""
    values = [line["held_out_chosen_end_prob"] for line in _held_out(lines, "chosen_end_prob")]
    if len(values) < 2 or values[0] < ENDS_AT_FIRST or values[-1] > values[0] * ENDS_KEPT:
        return None
    return (
        f"responses stop ending: where a chosen response ends, the model ends with probability {values[-1]:.2f}, and "
        f"did with {values[0]:.2f} at the start. It will generate without stopping. Look for chosen responses "
        "that are truncated (a larger --max_length) or have no end in the data; lower --learning_rate, or add "
        "--loss_type sigmoid sft"
    )


def too_far(lines: Sequence[Line], limits: Limits) -> str | None:
    """The held-out divergence above --max_kl."""
    values = [line["held_out_chosen_kl"] for line in _held_out(lines, "chosen_kl")]
    if limits.max_kl is None or not values or values[-1] <= limits.max_kl:
        return None
    return (
        f"the policy is {values[-1]:.1f} nats (KL, a chosen response) from the reference, beyond --max_kl "
        f"{limits.max_kl:g}. An earlier checkpoint is closer; a larger --beta or fewer steps keep it there"
    )


def margin_exploding(lines: Sequence[Line], limits: Limits) -> str | None:
    """Margins at which the loss has nothing left to teach."""
    now, _ = _two_windows(lines, ("margin",))
    if now is None or now["margin"] < LARGEST_MARGIN:
        return None
    return (
        f"the margin is {now['margin']:.1f}: the pairs are fully separated, and further steps only "
        "move the model away from the reference. Fewer epochs, a smaller --learning_rate, or --loss_type ipo, "
        "which aims at a margin of its own"
    )


def overfitting(lines: Sequence[Line], limits: Limits) -> str | None:
    """The held-out loss has risen at two evaluations in a row, well above its best."""
    values = [(line["step"], line["held_out_loss"]) for line in _held_out(lines, "loss")]
    if len(values) < 4:
        return None
    (step, best), last = min(values, key=lambda value: value[1]), [loss for _, loss in values[-3:]]
    if not (last[0] < last[1] < last[2] and last[2] > OVERFIT * best and last[2] > best + 0.05):
        return None
    return (
        f"the held-out loss is rising: {last[2]:.3f}, and {best:.3f} at step {step:,}. The model overfits its "
        "training pairs. --early_stopping_patience keeps the best; fewer epochs or a smaller --learning_rate help too"
    )


Alarm = Callable[[Sequence[Line], Limits], "str | None"]
ALARMS: dict[str, Alarm] = {
    "rewards falling": rewards_falling,
    "all right early": all_right_early,
    "log-probs collapsing": log_probs_collapsing,
    "responses not ending": responses_not_ending,
    "too far": too_far,
    "margin exploding": margin_exploding,
    "overfitting": overfitting,
}


def _training(lines: Sequence[Line], name: str) -> list[Line]:
    return [line for line in lines if line.get(name) is not None and "learning_rate" in line]


def _held_out(lines: Sequence[Line], name: str) -> list[Line]:
    return [line for line in lines if line.get(f"held_out_{name}") is not None]


def _last_step(lines: Sequence[Line]) -> int:
    return lines[-1]["step"] if lines else 0


def _window(lines: Sequence[Line], names: Sequence[str]) -> tuple[dict[str, float] | None, int]:
    """Means over the last lines that hold enough pairs, and how many lines these are; None when all are too few."""
    pairs, count = 0.0, 0
    for line in reversed(lines):
        pairs, count = pairs + line["pairs"], count + 1
        if pairs >= WINDOW_PAIRS and count >= WINDOW_LINES:
            last = lines[-count:]
            return {name: sum(line[name] * line["pairs"] for line in last) / pairs for name in names}, count
    return None, count


def _two_windows(
    lines: Sequence[Line], names: Sequence[str]
) -> tuple[dict[str, float] | None, dict[str, float] | None]:
    """The means of the training lines now, and in the window before."""
    known = [line for line in lines if all(line.get(name) is not None for name in (*names, "pairs"))]
    now, count = _window(known, names)
    return now, _window(known[: len(known) - count], names)[0]


def _edges(lines: Sequence[Line], names: Sequence[str]) -> tuple[dict[str, float] | None, dict[str, float] | None]:
    """The means of the first training lines and of the last, where the two do not share a line."""
    first, count = _window(lines[::-1], names)
    return first, _window(lines[count:], names)[0] if first is not None else None
