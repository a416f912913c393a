"""Draws what the demo changed: shares before and after training as bars, in an SVG that stands alone."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

WIDTH, LEFT, FULL = 680, 260, 360  # of the picture, of the labels, of a bar at 100%
ROW, BAR, TOP, BOTTOM = 54, 18, 62, 34
COLOURS = {"before": "#8c959f", "after": "#1f6feb"}


def draw(title: str, shares: Mapping[str, tuple[float, float]], note: str) -> str:
    """The SVG: for each name its share before and its share after, as two bars from 0% to 100%."""
    height = TOP + ROW * len(shares) + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="14" fill="#1f2328">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
        _write(16, 26, title, "font-weight", "600"),
    ]
    for place, (name, colour) in enumerate(COLOURS.items()):
        x = LEFT + 90 * place
        parts += [f'<rect x="{x}" y="38" width="12" height="12" fill="{colour}"/>', _write(x + 18, 49, name)]
    for row, (name, values) in enumerate(shares.items()):
        y = TOP + row * ROW
        parts.append(_write(LEFT - 12, y + BAR + 6, name, "text-anchor", "end"))
        for value, colour in zip(values, COLOURS.values(), strict=True):
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{FULL * value:.0f}" height="{BAR}" fill="{colour}"/>')
            parts.append(_write(round(LEFT + FULL * value) + 6, y + BAR - 4, f"{value:.0%}"))
            y += BAR + 2
    parts.append(_write(16, height - 14, note, "fill", "#59636e"))
    return "\n".join([*parts, "</svg>\n"])


def _write(x: float, y: float, text: str, attribute: str = "fill", value: str = "#1f2328") -> str:
    return f'<text x="{x}" y="{y}" {attribute}="{value}">{escape(text)}</text>'
