"""A plan in words, and as JSON."""

from __future__ import annotations

from typing import Any

from ..runtime import readable_bytes
from .planning import Choice, Plan

SECONDS = (("day", 86400), ("hour", 3600), ("minute", 60))


def summarize(plan: Plan, price: float | None, devices: int) -> list[str]:
    """The lines of the terminal."""
    asked, needs, device, work = plan.asked, plan.asked.needs, plan.device, plan.work
    many = f"{devices} x " if devices > 1 else ""
    choices = {_name(choice): choice for choice in (asked, *plan.others)}
    width = max(34, *map(len, choices))
    lines = [
        f"model: {plan.model}, {needs.parameters:,} parameters, {needs.trainable:,} trained",
        f"data: {_describe_work(plan)}",
        f"device: {many}{device.name}, {readable_bytes(device.memory)}, {device.rate / 1e12:,.3g} TFLOP/s in "
        f"{str(plan.dtype).removeprefix('torch.')}, of which training reaches {plan.efficiency:.0%} "
        f"({'measured' if plan.measured else 'assumed; --efficiency'})",
        "",
        f"  {'':{width}}{f'{work.kind} x micro-batches':>22}{'memory':>11}{'fits':>6}{'time':>16}"
        + (f"{'cost':>10}" if price else ""),
        *(_line(name.ljust(width), choice, plan, price, devices) for name, choice in choices.items()),
        *(["", "* the row of the command below"] if plan.best else []),
        "",
        "as asked, by part: " + ", ".join(f"{name} {readable_bytes(size)}" for name, size in _parts(asked) if size),
    ]
    for of, choice in (("as asked", asked), ("the best that fits", plan.best)):
        if choice is not None and choice.needs.host and (choice is not asked or of == "as asked"):
            host = ", ".join(f"{name} {readable_bytes(size)}" for name, size in choice.needs.host.items() if size)
            lines.append(f"{of}, in CPU memory for each device: {host}")
    lines += _left_out(plan, devices)
    if not work.known:
        lines.append(
            f"without --dataset_name every {work.kind[:-1]} is assumed to be as long as --max_length "
            f"({sum(work.lengths[0][:2]):,})"
        )
    return lines


def explain_best(plan: Plan) -> str:
    """Which row the command is of, and why."""
    best, asked = plan.best, plan.asked
    if best is None:
        return "nothing fits; use a larger device, more devices, a smaller --max_length or a smaller model"
    rest = [choice for choice in (asked, *plan.others) if choice is not best and choice.needs.fits(plan.device)]
    same_kind = [choice for choice in rest if _kind(choice) == _kind(asked)]
    if best is asked:
        why = "it fits, and no equivalent row is faster" if same_kind else "it fits"
    elif _kind(best) != _kind(asked):
        why = f"nothing that trains as requested ({_kind(asked)}) fits; of what fits, it needs the least compute"
    elif asked in rest:
        why = "the requested settings fit too, and this is equivalent with less compute"
    else:
        smaller = f", {best.needs.batch} {plan.work.kind} at a time" if best.batch != asked.batch else ""
        why = f"the requested settings do not fit; this is equivalent{smaller} and fits"
    return f"the best that fits: {_name(best)} ({why})"


def _kind(choice: Choice) -> str:
    return choice.name.partition(",")[0]


def _left_out(plan: Plan, devices: int) -> list[str]:
    """What the figures leave out, of what this run would do."""
    settings = plan.run
    training, data = settings.training, settings.data
    lines = []
    if training.engine == "auto":
        lines.append(
            "batches: each prompt once, no padding; for a model that needs padded batches, plan with --engine padded"
        )
    left_out = []
    if training.per_device_eval_batch_size > training.per_device_train_batch_size and plan.work.held_out_tokens:
        left_out.append(
            f"evaluation, in batches of {training.per_device_eval_batch_size}, more than those of training "
            "(--per_device_eval_batch_size)"
        )
    if devices > 1:
        left_out.append("communication between devices; the full weights in CPU memory when a sharded run is saved")
    if plan.asked.needs.host:
        left_out.append("transfers to and from CPU memory")
    if data.streaming:
        left_out.append("the shuffle buffer of --streaming in CPU memory")
    return [*lines, *([f"not counted: {'; '.join(left_out)}"] if left_out else [])]


def _describe_work(plan: Plan) -> str:
    work = plan.work
    if not work.known:
        return "none given"
    count = len(work.lengths)
    return (
        f"{count:,} {work.kind} to train on, {work.tokens / count:,.0f} tokens each (the longest "
        f"{sum(work.lengths[0]):,}); {plan.steps:,} steps"
    )


def _parts(choice: Choice) -> list[tuple[str, int]]:
    return [
        *choice.needs.parts.items(),
        ("unused between blocks", choice.needs.spare),
        ("beside the model", choice.needs.base),
    ]


def _name(choice: Choice) -> str:
    sharding = f", {choice.sharding}" if choice.sharding != "none" else ""
    return f"{'as asked: ' if choice.asked else ''}{choice.name}{sharding}"


def _line(name: str, choice: Choice, plan: Plan, price: float | None, devices: int) -> str:
    needs = choice.needs
    text = f"{'*' if choice is plan.best else ' '} {name}{f'{needs.batch} x {needs.micro_batches}':>22}"
    text += f"{readable_bytes(needs.peak):>11}"
    text += f"{'yes' if needs.fits(plan.device) else 'no':>6}{readable_time(choice.seconds):>16}"
    if price:
        cost = cost_of(choice.seconds, price, devices)
        text += f"{cost:>10.2f}" if cost is not None else f"{'?':>10}"
    return text


def cost_of(seconds: float | None, price: float | None, devices: int) -> float | None:
    """What so many seconds on so many devices cost, in the currency of the price of one device's hour."""
    return None if seconds is None or price is None else seconds / 3600 * devices * price


def readable_time(seconds: float | None) -> str:
    """`2.5 hours`; `?` where it is not known."""
    if seconds is None:
        return "?"
    for name, size in SECONDS:
        if seconds >= size:
            return f"{seconds / size:.1f} {name}s"
    return f"{seconds:.0f} seconds" if seconds >= 1 else "under 1 second"


def as_record(plan: Plan, price: float | None, devices: int, command: str | None) -> dict[str, Any]:
    """Every number of the plan. Bytes, seconds, FLOP/s."""
    return {
        "model": plan.model,
        "device": {"name": plan.device.name, "memory": plan.device.memory, "rate": plan.device.rate, "count": devices},
        "efficiency": plan.efficiency,
        "measured": plan.measured,
        "dtype": str(plan.dtype).removeprefix("torch."),
        f"train_{plan.work.kind}": len(plan.work.lengths) if plan.work.known else None,
        "tokens": plan.work.tokens if plan.work.known else None,
        f"longest_{plan.work.kind[:-1]}": sum(plan.work.lengths[0]),
        "steps": plan.steps,
        "choices": [_choice_record(choice, plan, price, devices) for choice in (plan.asked, *plan.others)],
        "command": command,
    }


def _choice_record(choice: Choice, plan: Plan, price: float | None, devices: int) -> dict[str, Any]:
    needs = choice.needs
    return {
        "name": choice.name,
        "asked": choice.asked,
        "best": choice is plan.best,
        "sharding": choice.sharding,
        plan.work.kind: needs.batch,
        "micro_batches": needs.micro_batches,
        "bytes": needs.peak,
        "parts": dict(_parts(choice)),
        "main_memory": dict(needs.host),
        "fits": needs.fits(plan.device),
        "flops_per_micro_batch": needs.flops,
        "parameters": needs.parameters,
        "trainable_parameters": needs.trainable,
        "seconds": choice.seconds,
        "cost": cost_of(choice.seconds, price, devices),
    }
