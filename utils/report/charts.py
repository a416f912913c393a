"""Small charts as SVG text: they scale with the page, take its colours, and are read out as a sentence and a table.

Colours come from the page's CSS: `series` names classes s1, s2, s3. Every chart has a title for screen readers; the
numbers behind it belong in a table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from .html import show

WIDTH, HEIGHT = 640, 250
LEFT, RIGHT, TOP, BOTTOM = 80, 12, 12, 46

Line = Sequence[tuple[float, float]]  # (x, y) points, in the order of x


def draw_histogram(
    title: str,
    edges: Sequence[float],
    series: dict[str, Sequence[float]],
    unit: str,
    mark: tuple[float, str] | None = None,
) -> str:
    """Counts per bin as outlined steps, one per series. Bins are drawn equally wide; `mark` is a line at a value."""
    most = max((max(counts, default=0) for counts in series.values()), default=0) or 1
    most = 2 * math.ceil(most / 2)  # half of it stands on the axis too
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    step = width / max(len(edges) - 1, 1)
    parts = [_grid(most)]
    for number, (name, counts) in enumerate(series.items(), start=1):
        points: list[tuple[float, float]] = [(LEFT, TOP + height)]
        for place, count in enumerate(counts):
            top = TOP + height * (1 - count / most)
            points += [(LEFT + place * step, top), (LEFT + (place + 1) * step, top)]
        points.append((LEFT + len(counts) * step, TOP + height))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polygon class="area s{number}" points="{path}"><title>{show(name)}</title></polygon>')
    if mark is not None:
        marked = _place_between(mark[0], edges)
        if marked is not None:
            x = LEFT + marked * step
            parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + height}"/>')
            anchor = "end" if x > WIDTH / 2 else "start"
            shift = -5 if anchor == "end" else 5
            parts.append(f'<text x="{x + shift:.1f}" y="{TOP + 12}" text-anchor="{anchor}">{show(mark[1])}</text>')
    every = max(1, round(len(edges) / 7))
    for place in range(0, len(edges), every):
        anchor = "end" if place == len(edges) - 1 else "middle"  # the last one has no room on its right
        x = LEFT + place * step
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 26}" text-anchor="{anchor}">{_short(edges[place])}</text>')
    parts.append(f'<text x="{LEFT + width / 2}" y="{HEIGHT - 5}" text-anchor="middle">{show(unit)}</text>')
    return _svg(title, "".join(parts), HEIGHT) + draw_legend(list(series))


def draw_bars(title: str, bars: Sequence[tuple[str, float, str]], reach: float, start: float = 0.0) -> str:
    """Horizontal bars from `start` to either side, as far as `reach`, each under its label and its value as text."""
    row, width = 44, WIDTH - 2 * RIGHT
    lowest = start - reach if any(value < start for _, value, _ in bars) else start
    span = start + reach - lowest
    zero = RIGHT + (start - lowest) / span * width
    parts = []
    for number, (label, value, text) in enumerate(bars):
        y = number * row
        x = RIGHT + (value - lowest) / span * width
        parts.append(f'<text x="{RIGHT}" y="{y + 14}">{show(label)}</text>')
        parts.append(f'<text class="value" x="{WIDTH - RIGHT}" y="{y + 14}" text-anchor="end">{show(text)}</text>')
        parts.append(f'<rect class="rail" x="{RIGHT}" y="{y + 20}" width="{width}" height="10"/>')
        css = "s1" if value >= start else "s2"
        parts.append(
            f'<rect class="bar {css}" x="{min(x, zero):.1f}" y="{y + 20}" width="{abs(x - zero):.1f}" height="10"/>'
        )
        if start > lowest:
            parts.append(f'<line class="mark" x1="{zero:.1f}" x2="{zero:.1f}" y1="{y + 17}" y2="{y + 33}"/>')
    return _svg(title, "".join(parts), len(bars) * row)


def draw_lines(
    title: str,
    series: Mapping[str, Line],
    x_unit: str,
    points: Mapping[str, Line] | None = None,
    mark: float | None = None,
    as_text: Callable[[float], str] | None = None,
    reach: tuple[float, float] | None = None,
) -> str:
    """Lines through (x, y) points on axes that all of them share; nothing where there is no point.

    Args:
        points: what is measured now and then: dots, in the colour of the line of the same name.
        mark: a value that the axis includes and a line is drawn at, such as 0.
        as_text: how values of y are written.
        reach: where the axis of x begins and ends, for charts that stand side by side.
    """
    points, write = points or {}, as_text or _short
    everything = [point for line in (*series.values(), *points.values()) for point in line]
    if not everything:
        return ""
    low_x, high_x = reach or (min(x for x, _ in everything), max(x for x, _ in everything))
    values = [y for _, y in everything] + ([mark] if mark is not None else [])
    ticks = _round_ticks(min(values), max(values))
    low_y, high_y = ticks[0], ticks[-1]
    texts = _texts_apart(ticks) if as_text is None else [as_text(value) for value in ticks]
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - low_x) / (high_x - low_x) if high_x > low_x else 0.5
        return LEFT + right * width, TOP + (1 - (y - low_y) / (high_y - low_y)) * height

    parts = [_ticks([(place(low_x, value)[1], text) for value, text in zip(ticks, texts, strict=True)])]
    if mark is not None:
        y = place(low_x, mark)[1]
        parts.append(f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    colours = {name: number for number, name in enumerate(dict.fromkeys((*series, *points)), start=1)}
    for name, line in {**points, **series}.items():
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        css = f"line s{colours[name]}"
        parts.append(f'<polyline class="{css}" points="{path}"><title>{show(name)}</title></polyline>')
        if len(line) == 1:
            parts.append(_dot(place(*line[0]), colours[name], 2, name))
    for name, line in points.items():
        for x, y in line:
            parts.append(_dot(place(x, y), colours[name], 5, f"{name}, {x_unit} {x:g}: {write(y)}"))
    middle = (low_x + high_x) / 2
    for x in dict.fromkeys((low_x, int(middle) if high_x - low_x >= 2 else middle, high_x)):
        anchor = "middle" if low_x == high_x else {low_x: "start", high_x: "end"}.get(x, "middle")
        parts.append(f'<text x="{place(x, low_y)[0]:.1f}" y="{HEIGHT - 26}" text-anchor="{anchor}">{_short(x)}</text>')
    parts.append(f'<text x="{LEFT + width / 2}" y="{HEIGHT - 5}" text-anchor="middle">{show(x_unit)}</text>')
    return _svg(title, "".join(parts), HEIGHT) + _line_legend(series, points, colours)


def _dot(place: tuple[float, float], colour: int, radius: float, title: str) -> str:
    x, y = place
    return f'<circle class="dot s{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{show(title)}</title></circle>'


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


def draw_reliability(title: str, points: Sequence[tuple[float, float, float, float, float]], x_unit: str) -> str:
    """Shares with their intervals over predicted probabilities from 0.5 to 1, beside the line where both are equal.

    Args:
        points: predicted, found, low end, high end, and weight, which is the area of the dot.
    """
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def across(x: float) -> float:
        return LEFT + (x - 0.5) * 2 * width

    def down(y: float) -> float:
        return TOP + (1 - y) * height

    ends = f"{across(0.5):.1f},{down(0.5):.1f} {across(1):.1f},{down(1):.1f}"
    parts = [_axes(0, 1), f'<polyline class="line s3" points="{ends}"/>']
    most = max((point[4] for point in points), default=1)
    for x, y, low, high, weight in points:
        parts.append(
            f'<line class="line s1" x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{down(low):.1f}" '
            f'y2="{down(high):.1f}"/>'
            f'<circle class="s1" cx="{across(x):.1f}" cy="{down(y):.1f}" r="{2.5 + 6 * math.sqrt(weight / most):.1f}"/>'
        )
    for x, anchor in ((0.5, "start"), (0.75, "middle"), (1.0, "end")):
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - 26}" text-anchor="{anchor}">{_short(x)}</text>')
    parts.append(f'<text x="{LEFT + width / 2}" y="{HEIGHT - 5}" text-anchor="middle">{show(x_unit)}</text>')
    return _svg(title, "".join(parts), HEIGHT)


def draw_legend(names: Sequence[str]) -> str:
    """The names of the series with their colours."""
    if len(names) < 2:
        return ""
    items = "".join(f'<li><i class="s{number}"></i>{show(name)}</li>' for number, name in enumerate(names, start=1))
    return f'<ul class="legend">{items}</ul>'


def _svg(title: str, content: str, height: float) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{show(title)}">'
        f"<title>{show(title)}</title>{content}</svg>"
    )


def _grid(most: float) -> str:
    return _axes(0, most)


def _axes(low: float, high: float) -> str:
    height = HEIGHT - TOP - BOTTOM
    return _ticks([(TOP + height * (1 - share), _short(low + (high - low) * share)) for share in (0, 0.5, 1)])


def _ticks(ticks: Sequence[tuple[float, str]]) -> str:
    """Lines across, each with its value in front."""
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{show(text)}</text>'
        for y, text in ticks
    )


def round_step(span: float, parts: float) -> float:
    """A round number (1, 2 or 5 times a power of ten) that cuts `span` into `parts` or fewer."""
    step = 10.0 ** math.floor(math.log10(span / parts))
    return next(step * factor for factor in (1, 2, 5, 10, 20) if span / (step * factor) <= parts)


def _round_ticks(low: float, high: float) -> list[float]:
    """Two to six round values, evenly apart, from `low` or below to `high` or above."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    step = round_step(high - low, 4.5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _place_between(value: float, edges: Sequence[float]) -> float | None:
    """Where a value stands, in bins from the left; None outside."""
    for place, (low, high) in enumerate(pairwise(edges)):
        if low <= value < high:
            return place + (value - low) / (high - low)
    return None


def _texts_apart(values: Sequence[float]) -> list[str]:
    """The values in so many digits that no two that differ are written alike."""
    for digits in range(3, 12):
        texts = [_short(value, digits) for value in values]
        if len(set(texts)) == len(set(values)):
            break
    return texts


def _short(value: float, digits: int = 3) -> str:
    """A number in a few characters: 950, 1.5k, 2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def percent(value: float) -> str:
    """A share as 50%, 63.5% or 99.95%."""
    return f"{round(100 * value, 9):.4g}%"
