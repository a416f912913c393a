"""Small charts without scripts: SVG that scales with the page, takes its colours, and shows values under the pointer.

Colours come from the page's CSS: `series` names classes s1, s2, s3. Every chart has a title for screen readers; the
numbers behind it belong in a table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .axes import cover, ticks_of_bins, ticks_within, write_ticks, write_value
from .html import show

WIDTH, HEIGHT = 640, 264
LEFT, RIGHT, TOP, BOTTOM = 78, 14, 14, 56
PLOT_WIDTH, PLOT_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
MOST_STRIPS = 120  # places along a chart of lines that tell their values
MOST_ROWS = 5  # values on the axis of counts

Line = Sequence[tuple[float, float]]  # (x, y) points, in the order of x
Place = Callable[[float], float]


@dataclass(frozen=True)
class Bar:
    """A share with its name, its value as text, and where it is known its interval."""

    label: str
    value: float
    text: str
    interval: tuple[float, float] | None = None


def draw_histogram(
    title: str,
    edges: Sequence[float],
    series: dict[str, Sequence[float]],
    unit: str,
    mark: tuple[float, str] | None = None,
    counted: str = "pairs",
) -> str:
    """Counts per bin as outlined steps, one per series. Bins are drawn equally wide; `mark` is a line at a value."""
    most = max((max(counts, default=0) for counts in series.values()), default=0) or 1
    rows = cover(0, most, most=MOST_ROWS) if most > MOST_ROWS else [float(n) for n in range(int(most) + 1)]
    step = PLOT_WIDTH / max(len(edges) - 1, 1)

    def across(value: float) -> float:
        return LEFT + _place_between(value, edges) * step

    def down(count: float) -> float:
        return TOP + PLOT_HEIGHT * (1 - count / rows[-1])

    parts = [_y_axis(rows, write_ticks(rows), down)]
    for number, (name, counts) in enumerate(series.items(), start=1):
        points: list[tuple[float, float]] = [(LEFT, down(0))]
        for place, count in enumerate(counts):
            points += [(LEFT + place * step, down(count)), (LEFT + (place + 1) * step, down(count))]
        points.append((LEFT + len(counts) * step, down(0)))
        parts.append(f'<polygon class="area s{number}" points="{_path(points)}"><title>{show(name)}</title></polygon>')
    if mark is not None and edges[0] <= mark[0] < edges[-1]:
        x = across(mark[0])
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + PLOT_HEIGHT}"/>')
        anchor, shift = ("end", -6) if x > WIDTH / 2 else ("start", 6)
        parts.append(
            f'<text class="halo" x="{x + shift:.1f}" y="{TOP + 12}" text-anchor="{anchor}">{show(mark[1])}</text>'
        )
    for place, (low, high) in enumerate(pairwise(edges)):
        lines = [f"{write_value(low)} to {write_value(high)}"]
        lines += [f"{name}: {counts[place]:,}" for name, counts in series.items()]
        parts.append(_strip(LEFT + place * step, step, lines))
    ticks = ticks_of_bins(edges)
    parts.append(_x_axis(ticks, across, unit))
    return _svg(title, "".join(parts), counted) + draw_legend(list(series))


def draw_bars(title: str, bars: Sequence[Bar], start: float, reach: tuple[float, float] | None = None) -> str:
    """Shares as bars from `start` to either side over one axis, each under its name and value, with its interval.

    Args:
        start: the value that says nothing, at which a line is drawn.
        reach: where the axis begins and ends; without it, round values around the bars.
    """
    values = [start, *(value for bar in bars for value in (bar.value, *(bar.interval or ())))]
    ends = reach or (min(values), max(values))
    ticks = cover(ends[0], ends[1], share=True)
    low, high = ticks[0], ticks[-1]

    def across(value: float) -> str:
        return f"{100 * (min(max(value, low), high) - low) / (high - low):.2f}%"

    def width(one: float, other: float) -> str:
        return f"{100 * abs(one - other) / (high - low):.2f}%"

    def upright(css: str, value: float, top: int, bottom: int) -> str:
        return f'<line class="{css}" x1="{across(value)}" x2="{across(value)}" y1="{top}" y2="{bottom}"/>'

    rows = []
    for bar in bars:
        css = "s1" if bar.value >= start else "s2"
        parts = ['<rect class="rail" y="3" width="100%" height="12"/>']
        parts += [upright("grid", tick, 3, 15) for tick in ticks[1:-1]]
        left = across(min(bar.value, start))
        parts.append(f'<rect class="bar {css}" x="{left}" y="3" width="{width(bar.value, start)}" height="12"/>')
        parts.append(upright("mark", start, 0, 18))
        if bar.interval is not None:
            left, right = map(across, bar.interval)
            parts.append(f'<line class="whisker" x1="{left}" x2="{right}" y1="9" y2="9"/>')
            parts += [upright("whisker", end, 5, 13) for end in bar.interval]
        hint = f"<title>{show(f'{bar.label}: {bar.text}')}</title>"
        rows.append(
            f'<div class="row"><span>{show(bar.label)}</span><strong>{show(bar.text)}</strong>'
            f'<svg height="18" aria-hidden="true"><g>{hint}{"".join(parts)}</g></svg></div>'
        )
    anchors = ["start", *["middle"] * (len(ticks) - 2), "end"]
    texts = "".join(
        f'<text x="{across(tick)}" y="12" text-anchor="{anchor}">{show(text)}</text>'
        for tick, text, anchor in zip(ticks, write_ticks(ticks, share=True), anchors, strict=True)
    )
    axis = f'<svg class="axis" height="18" aria-hidden="true">{texts}</svg>'
    return f'<div class="bars" role="group" aria-label="{show(title)}">{"".join(rows)}{axis}</div>'


def draw_lines(
    title: str,
    series: Mapping[str, Line],
    x_unit: str,
    points: Mapping[str, Line] | None = None,
    mark: float | None = None,
    share: bool = False,
    reach: tuple[float, float] | None = None,
) -> str:
    """Lines through (x, y) points on axes that all of them share; nothing where there is no point.

    Args:
        points: what is measured now and then: dots, in the colour of the line of the same name.
        mark: a value that the axis includes and a line is drawn at, such as 0.
        share: whether y is a share, written in percent.
        reach: where the axis of x begins and ends, for charts that stand side by side.
    """
    points = points or {}
    everything = [point for line in (*series.values(), *points.values()) for point in line]
    if not everything:
        return ""
    low_x, high_x = reach or (min(x for x, _ in everything), max(x for x, _ in everything))
    values = [y for _, y in everything] + ([mark] if mark is not None else [])
    ticks = cover(min(values), max(values), share)

    def across(x: float) -> float:
        return LEFT + ((x - low_x) / (high_x - low_x) if high_x > low_x else 0.5) * PLOT_WIDTH

    def down(y: float) -> float:
        return TOP + (1 - (y - ticks[0]) / (ticks[-1] - ticks[0])) * PLOT_HEIGHT

    parts = [_y_axis(ticks, write_ticks(ticks, share), down)]
    if mark is not None:
        parts.append(
            f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(mark):.1f}" y2="{down(mark):.1f}"/>'
        )
    colours = {name: number for number, name in enumerate(dict.fromkeys((*series, *points)), start=1)}
    for name, line in {**points, **series}.items():
        path = _path((across(x), down(y)) for x, y in line)
        css = f"line s{colours[name]}"
        parts.append(f'<polyline class="{css}" points="{path}"><title>{show(name)}</title></polyline>')
        if len(line) == 1:
            parts.append(_dot(across(line[0][0]), down(line[0][1]), colours[name], 2, name))
    parts += _strips(series, points, x_unit, across, share)
    for name, line in points.items():
        for x, y in line:
            hint = f"{name}, {x_unit} {x:g}: {write_value(y, share)}"
            parts.append(_dot(across(x), down(y), colours[name], 5, hint))
    parts.append(_x_axis(ticks_within(low_x, high_x, whole=all(x == int(x) for x, _ in everything)), across, x_unit))
    return _svg(title, "".join(parts)) + _line_legend(series, points, colours)


def draw_reliability(
    title: str, points: Sequence[tuple[float, float, float, float, float]], units: tuple[str, str]
) -> str:
    """Shares with their intervals over predicted probabilities from 0.5 to 1, beside the line where both are equal.

    Args:
        points: predicted, found, low end, high end, and weight, which is the area of the dot.
        units: what is predicted, and what is found.
    """
    ticks = cover(0, 1)

    def across(x: float) -> float:
        return LEFT + (x - 0.5) * 2 * PLOT_WIDTH

    def down(y: float) -> float:
        return TOP + (1 - y) * PLOT_HEIGHT

    ends = _path([(across(0.5), down(0.5)), (across(1), down(1))])
    parts = [_y_axis(ticks, write_ticks(ticks, share=True), down), f'<polyline class="line s3" points="{ends}"/>']
    most = max((point[4] for point in points), default=1)
    for x, y, low, high, weight in points:
        hint = (
            f"{write_value(x, True)} predicted: {write_value(y, True)} ranked correctly "
            f"({write_value(low, True)} to {write_value(high, True)}), {weight:,.0f} pairs"
        )
        parts.append(
            f'<line class="line s1" x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{down(low):.1f}" '
            f'y2="{down(high):.1f}"/>' + _dot(across(x), down(y), 1, round(2.5 + 6 * math.sqrt(weight / most), 1), hint)
        )
    parts.append(_x_axis(ticks_within(0.5, 1), across, units[0], share=True))
    return _svg(title, "".join(parts), units[1])


def draw_legend(names: Sequence[str]) -> str:
    """The names of the series with their colours."""
    if len(names) < 2:
        return ""
    items = "".join(f'<li><i class="s{number}"></i>{show(name)}</li>' for number, name in enumerate(names, start=1))
    return f'<ul class="legend">{items}</ul>'


def _line_legend(series: Mapping[str, Line], points: Mapping[str, Line], colours: Mapping[str, int]) -> str:
    """What is a line and what a dot; the names alone where there is one kind."""
    lines, dots = [name for name, line in series.items() if line], [name for name, line in points.items() if line]
    if len(lines) + len(dots) < 2:
        return ""
    kinds = (("", "line", lines), (", held out" if lines else "", "round", dots))
    items = "".join(
        f'<li><i class="{css} s{colours[name]}"></i>{show(name if len(colours) > 1 else kind)}'
        f"{show(more if len(colours) > 1 else '')}</li>"
        for more, css, names in kinds
        for name in names
        for kind in ["training" if css == "line" else "held out"]
    )
    return f'<ul class="legend">{items}</ul>'


def _strips(
    series: Mapping[str, Line], points: Mapping[str, Line], x_unit: str, across: Place, share: bool
) -> list[str]:
    """What all lines hold at a place, as hints over upright strips that together fill the chart."""
    held = ", held out" if any(series.values()) else ""
    named = [(name, dict(line)) for name, line in series.items()]
    named += [(f"{name}{held}", dict(line)) for name, line in points.items()]
    places = sorted({x for _, line in named for x in line})
    places = places[:: -(-len(places) // MOST_STRIPS)]
    middles = [LEFT, *((across(a) + across(b)) / 2 for a, b in pairwise(places)), WIDTH - RIGHT]
    strips = []
    for x, left, right in zip(places, middles, middles[1:], strict=False):
        lines = [f"{name}: {write_value(line[x], share)}" for name, line in named if x in line]
        strips.append(_strip(left, right - left, [f"{x_unit} {x:g}", *lines]))
    return strips


def _strip(x: float, width: float, lines: Sequence[str]) -> str:
    hint = show("\n".join(lines)) if len(lines) == 1 else "\n".join(map(show, lines))
    return (
        f'<rect class="strip" x="{x:.1f}" y="{TOP}" width="{max(width, 0):.1f}" height="{PLOT_HEIGHT}">'
        f"<title>{hint}</title></rect>"
    )


def _dot(x: float, y: float, colour: int, radius: float, title: str) -> str:
    return f'<circle class="dot s{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{show(title)}</title></circle>'


def _path(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _svg(title: str, content: str, y_unit: str = "") -> str:
    above = f'<p class="unit">{show(y_unit)}</p>' if y_unit else ""
    return (
        f'{above}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{show(title)}">'
        f"<title>{show(title)}</title>{content}</svg>"
    )


def _y_axis(ticks: Sequence[float], texts: Sequence[str], down: Place) -> str:
    """Lines across, each with its value in front."""
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 10}" y="{y + 5:.1f}" text-anchor="end">{show(text)}</text>'
        for y, text in ((down(tick), text) for tick, text in zip(ticks, texts, strict=True))
    )


def _x_axis(ticks: Sequence[float], across: Place, unit: str, share: bool = False) -> str:
    """Small marks with their values, and what they are of in the middle."""
    bottom, parts = TOP + PLOT_HEIGHT, []
    for tick, text in zip(ticks, write_ticks(ticks, share), strict=True):
        x = across(tick)
        anchor = (
            "end" if x > WIDTH - RIGHT - 12 and len(text) > 2 else "middle"
        )  # the last one has no room on its right
        parts.append(
            f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>'
            f'<text x="{x:.1f}" y="{HEIGHT - 32}" text-anchor="{anchor}">{show(text)}</text>'
        )
    middle = LEFT + PLOT_WIDTH / 2
    return "".join(parts) + f'<text class="soft" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{show(unit)}</text>'


def _place_between(value: float, edges: Sequence[float]) -> float:
    """Where a value stands, in bins from the left, up to their number."""
    for place, (low, high) in enumerate(pairwise(edges)):
        if value < high:
            return place + max(value - low, 0.0) / (high - low)
    return float(len(edges) - 1)
