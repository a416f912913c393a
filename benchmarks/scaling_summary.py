"""What the measured points of `scaling.py` say: exponents of growth, tables, a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIB = 2**20
NEAR = 0.15  # exponents that differ by less are taken for the same
STEP_AXES = {
    "batch": ("pairs of a micro-batch", "Micro-batch (LoRA on 3M, pairs of 128 tokens)"),
    "length": ("tokens of a pair", "Length (LoRA on 3M, two pairs a step)"),
    "model": ("model", "Model (all weights, two pairs of 128 tokens a step)"),
}
KINDS = {"first": "empty cache", "second": "full cache", "streaming": "--streaming"}
BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#c8551b", "#2e7d4f", "#888888"


def fit_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of the line through the points in logarithms, by least squares: 1 is linear, 2 quadratic."""
    xs, ys = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)


def beyond_first(values: Sequence[float]) -> list[float]:
    """What each value after the first has more than the first: fixed costs are taken off."""
    return [value - values[0] for value in values[1:]]


def compare_growth(operations: Sequence[float], costs: Sequence[float]) -> dict[str, float | str]:
    """Exponents of a cost over the operations that it buys, 1 where they grow alike, and what they mean.

    `all`: over all points; `end`: over the last two. Operations and costs are of the same points, the smallest first.
    """
    end = fit_exponent(operations[-2:], costs[-2:])
    if end > 1 + NEAR:
        meaning = "grows faster than its operations"
    elif end < 1 - NEAR:
        meaning = "fixed costs still weigh at the end"
    else:
        meaning = "linear in its operations"
    return {"all": fit_exponent(operations, costs), "end": end, "meaning": meaning}


def make_tables(results: dict[str, Any]) -> str:
    """All axes as Markdown."""
    parts = [f"{results['machine']}.\n"]
    parts += [_step_table(axis, results[axis]) for axis in STEP_AXES if axis in results]
    if "pairs" in results:
        parts.append(_starts_table(results["pairs"]))
    if "processes" in results:
        parts.append(_processes_table(results["processes"]))
    return "\n".join(parts)


def _step_table(axis: str, points: list[dict[str, Any]]) -> str:
    label, title = STEP_AXES[axis]
    lines = [
        f"**{title}**\n",
        f"| {label} | tokens a step | needs at least, GFLOP | CPU s a step | pairs per CPU s | tokens per CPU s "
        "| CPU s per TFLOP | clock s a step | memory beyond the start, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for point in points:
        lines.append(
            f"| {point['value']} | {point['tokens']:,} | {point['flops'] / 1e9:.3g} | {point['cpu']:.3f} | "
            f"{point['pairs'] / point['cpu']:.2f} | {point['tokens'] / point['cpu']:,.0f} | "
            f"{point['cpu'] / point['flops'] * 1e12:.1f} | {point['wall']:.3f} | {point['bytes'] / MIB:,.0f} |"
        )
    if len(points) > 1:
        flops, tokens = ([point[name] for point in points] for name in ("flops", "tokens"))
        time = compare_growth(flops, [point["cpu"] for point in points])
        lines.append(
            f"\nSeconds of CPU grow as operations to the power {time['all']:.2f}, between the last two points "
            f"{time['end']:.2f}: {time['meaning']}."
        )
        if axis == "length":
            grown = fit_exponent(tokens[-2:], flops[-2:])
            lines.append(f"Operations themselves grow as tokens to the power {grown:.2f} there: attention.")
        if axis != "model":
            memory = fit_exponent(tokens[-2:], [max(1, point["bytes"]) for point in points][-2:])
            lines.append(f"Memory beyond the start grows as tokens to the power {memory:.2f} there.")
    return "\n".join(lines) + "\n"


def _starts_table(points: list[dict[str, Any]]) -> str:
    lines = [
        "**Pairs in the data (until the first step; 0.3M, pairs of about 32 tokens)**\n",
        "| pairs | file, MiB | cache | CPU s | clock s, torch loaded | memory of its own, MiB "
        "| with mapped files, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for point in points:
        for kind, said in KINDS.items():
            own = point[kind]
            lines.append(
                f"| {point['value']:,} | {point['file_bytes'] / MIB:.1f} | {said} | {own['start_cpu']:.1f} | "
                f"{own['start_wall']:.1f} | {own['own_peak'] / MIB:.0f} | {own['peak'] / MIB:.0f} |"
            )
    counts = [point["value"] for point in points]
    if len(points) > 1:
        lines.append("")
    for kind, said in KINDS.items() if len(points) > 1 else ():
        seconds = beyond_first([point[kind]["start_cpu"] for point in points])
        memory = beyond_first([point[kind]["own_peak"] for point in points])
        more = counts[-1] - counts[0]
        line = f"- {said}: {seconds[-1] / more * 1e6:.1f} microseconds and {memory[-1] / more:.0f} bytes a pair"
        if len(points) > 3 and min(seconds[-2:]) > 1:
            power = fit_exponent([count - counts[0] for count in counts[-2:]], seconds[-2:])
            line += f"; beyond the start on {counts[0]:,}, seconds grow as pairs to the power {power:.2f}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _processes_table(points: list[dict[str, Any]]) -> str:
    lines = [
        "**Processes (torchrun, gloo; all weights of 3M, pairs of 128 tokens)**\n",
        "| processes | the same work in | pairs a step | clock s a step | pairs/s | CPU s a pair, all processes "
        "| beside one process | memory of each, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    alone = points[0]["cpu"] / points[0]["pairs"]
    for point in points:
        each = point["cpu"] / point["pairs"]
        lines.append(
            f"| {point['value']} | {point['fixed_in']} | {point['pairs']} | {point['wall']:.3f} | "
            f"{point['pairs'] / point['wall']:.2f} | {each:.4f} | {each / alone:.2f}x | {point['bytes'] / MIB:.0f} |"
        )
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """Small multiples, one for each axis that was measured, as SVG or PNG by the path's ending."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "scaling"
    panels = [(_draw_steps, axis) for axis in STEP_AXES if axis in results]
    panels += [(_draw_starts, "pairs"), (_draw_memory, "pairs")] if "pairs" in results else []
    panels += [(_draw_processes, "processes")] if "processes" in results else []
    columns = min(3, len(panels))
    figure, places = pyplot.subplots(
        -(-len(panels) // columns), columns, figsize=(4.1 * columns, 3.5 * -(-len(panels) // columns)), squeeze=False
    )
    for panel in places.flat[len(panels) :]:
        panel.set_visible(False)
    for panel, (show, axis) in zip(places.flat, panels, strict=False):
        show(panel, axis, results[axis])
        _label_plainly(panel)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(h_pad=2.0, w_pad=2.0)
    options = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 110}
    figure.savefig(path, facecolor="white", **options)
    pyplot.close(figure)


def _label_plainly(panel: Any) -> None:
    """Numbers at a few ticks of logarithmic axes, without powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for axis, scale, ends in (
        (panel.xaxis, panel.get_xscale(), panel.get_xlim()),
        (panel.yaxis, panel.get_yscale(), panel.get_ylim()),
    ):
        if scale == "log":
            decades = math.log10(ends[1] / ends[0])
            axis.set_major_locator(LogLocator(subs=(1,) if decades > 3 else (1, 3) if decades > 1.5 else (1, 2, 5)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _draw_steps(panel: Any, axis: str, points: list[dict[str, Any]]) -> None:
    flops = [point["flops"] / 1e9 for point in points]
    panel.loglog(flops, [point["cpu"] for point in points], "o-", color=BLUE, label="CPU seconds a step")
    last = points[-1]["cpu"]
    panel.loglog(flops, [last * own / flops[-1] for own in flops], ":", color=GREY, label="linear in operations")
    for own, point in zip(flops, points, strict=True):
        panel.annotate(str(point["value"]), (own, point["cpu"]), textcoords="offset points", xytext=(5, -9), fontsize=8)
    panel.set_title({"batch": "Pairs of a micro-batch", "length": "Tokens of a pair", "model": "Parameters"}[axis])
    panel.set_xlabel("operations a step needs, GFLOP")
    panel.set_ylabel("CPU seconds a step")
    panel.legend(frameon=False, fontsize=8)


def _draw_starts(panel: Any, axis: str, points: list[dict[str, Any]]) -> None:
    counts = [point["value"] for point in points]
    for (kind, said), colour in zip(KINDS.items(), (BLUE, ORANGE, GREEN), strict=True):
        panel.loglog(counts, [point[kind]["start_cpu"] for point in points], "o-", color=colour, label=said)
    panel.set_ylim(bottom=1)
    panel.set_title("Start, until the first step")
    panel.set_xlabel("pairs in the data")
    panel.set_ylabel("CPU seconds")
    panel.legend(frameon=False, fontsize=8)


def _draw_memory(panel: Any, axis: str, points: list[dict[str, Any]]) -> None:
    counts = [point["value"] for point in points]
    for (kind, said), colour in zip(KINDS.items(), (BLUE, ORANGE, GREEN), strict=True):
        panel.semilogx(counts, [point[kind]["own_peak"] / MIB for point in points], "o-", color=colour, label=said)
    files = [point["file_bytes"] / MIB for point in points]
    panel.semilogx(counts, files, ":", color=GREY, label="the data's file")
    panel.set_title("Memory of its own at the peak")
    panel.set_xlabel("pairs in the data")
    panel.set_ylabel("MiB")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False, fontsize=8)


def _draw_processes(panel: Any, axis: str, points: list[dict[str, Any]]) -> None:
    alone = points[0]["cpu"] / points[0]["pairs"]
    counts = sorted({point["value"] for point in points})
    for kind, colour in (("each", BLUE), ("all", ORANGE)):
        own = [points[0], *(point for point in points[1:] if point["fixed_in"] == kind)]
        costs = [point["cpu"] / point["pairs"] / alone for point in own]
        panel.plot([point["value"] for point in own], costs, "o-", color=colour, label=f"the same work in {kind}")
    panel.axhline(1, color=GREY, linestyle=":", label="no cost of being several")
    panel.set_title("CPU seconds a pair, all processes")
    panel.set_xlabel("processes")
    panel.set_ylabel("times those of one process")
    panel.set_xticks(counts)
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False, fontsize=8)
