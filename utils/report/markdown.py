"""Text that a model wrote, with the Markdown in it shown: headings, lists, code, bold and italic; links stay text.

The text is escaped first, so nothing in it is markup of the page. What is not plainly Markdown stays as it is.
"""

from __future__ import annotations

import re

from .html import show

FENCE = re.compile(r" {0,3}(```|~~~)[\w+#.-]* *")
HEADING = re.compile(r" {0,3}#{1,6} +(.*\S)")
ITEM = re.compile(r" *(?:([-*+])|(\d{1,9})[.)]) +(.*)")
# Of escaped text, within a line.
CODE = re.compile(r"`([^`\n]+)`")
BOLD = re.compile(r"\*\*(?! )([^*\n]+)(?<! )\*\*")
ITALIC = re.compile(r"(?<![\w*])\*(?! )([^*\n]+)(?<! )\*(?![\w*])")


def render_markdown(text: str) -> str:
    """The text as HTML."""
    blocks, lines, place = [], text.strip("\n").split("\n"), 0
    while place < len(lines):
        render = next((part for part in (_code, _heading, _list) if part(lines, place)), _paragraph)
        block, place = render(lines, place) or ("", place + 1)
        blocks.append(block)
    return "".join(blocks)


def _code(lines: list[str], place: int) -> tuple[str, int] | None:
    """A fenced block, to its end or that of the text."""
    found = FENCE.fullmatch(lines[place])
    if found is None:
        return None
    ends = (n for n in range(place + 1, len(lines)) if lines[n].strip() == found[1])
    end = next(ends, len(lines))
    return f"<pre>{show(chr(10).join(lines[place + 1 : end]))}</pre>", end + 1


def _heading(lines: list[str], place: int) -> tuple[str, int] | None:
    found = HEADING.fullmatch(lines[place])
    return (f"<p><strong>{_inline(found[1])}</strong></p>", place + 1) if found else None


def _list(lines: list[str], place: int) -> tuple[str, int] | None:
    """Items one below the other; numbers stay those of the text."""
    items = []
    while place < len(lines) and (found := ITEM.fullmatch(lines[place])):
        number = f' value="{found[2]}"' if found[2] else ""
        items.append(f"<li{number}>{_inline(found[3])}</li>")
        place += 1
    kind = "ol" if items and "value=" in items[0][:12] else "ul"
    return (f"<{kind}>{''.join(items)}</{kind}>", place) if items else None


def _paragraph(lines: list[str], place: int) -> tuple[str, int]:
    """Lines up to an empty one or to another block."""
    first = place
    while place < len(lines) and lines[place].strip():
        if place > first and any(part(lines, place) for part in (_code, _heading, _list)):
            break
        place += 1
    text = "\n".join(lines[first:place])
    return (f"<p>{_inline(text)}</p>" if text.strip() else ""), max(place, first + 1)


def _inline(text: str) -> str:
    parts = CODE.split(show(text))  # texts, and between them what stands in code
    for place in range(0, len(parts), 2):
        parts[place] = ITALIC.sub(r"<em>\1</em>", BOLD.sub(r"<strong>\1</strong>", parts[place]))
        if place + 1 < len(parts):
            parts[place + 1] = f"<code>{parts[place + 1]}</code>"
    return "".join(parts)
