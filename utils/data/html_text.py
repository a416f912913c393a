"""HTML as people read it: paragraphs, lists and table rows as lines, code blocks between fences, entities as text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

BLOCKS = {"p", "div", "ul", "ol", "blockquote", "table", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "section"}
ROWS, CELLS = {"table", "tr"}, {"td", "th"}
SILENT = {"script", "style", "head"}


class _TextCollector(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._silent = 0
        self._code = 0  # depth of <pre>
        self._in_row = False  # of a table, after its first cell
        self._lists: list[int | None] = []  # the next number of each open list; None for bullets

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in SILENT:
            self._silent += 1
        elif tag == "pre":
            self._code += 1
            self.parts.append("\n\n```\n")
        elif tag == "code" and not self._code:
            self.parts.append("`")
        elif tag == "br":
            self.parts.append("\n")
        elif tag == "li":
            self.parts.append(f"\n{self._list_mark()} ")
        elif tag == "img":
            self.parts.append(dict(attrs).get("alt") or "")
        elif tag in CELLS:
            self.parts.append(" | " if self._in_row else "")
            self._in_row = True
        elif tag in BLOCKS:
            self.parts.append("\n\n")
            self._in_row = self._in_row and tag not in ROWS
        if tag in ("ul", "ol"):
            self._lists.append(1 if tag == "ol" else None)

    def handle_endtag(self, tag: str) -> None:
        if tag in SILENT:
            self._silent = max(0, self._silent - 1)
        elif tag == "pre" and self._code:
            self._code -= 1
            if not "".join(self.parts[-1:]).endswith("\n"):
                self.parts.append("\n")
            self.parts.append("```\n\n")
        elif tag == "code" and not self._code:
            self.parts.append("`")
        elif tag in BLOCKS:
            self.parts.append("\n\n")
        if tag in ("ul", "ol") and self._lists:
            self._lists.pop()

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(data if self._code else re.sub(r"\s+", " ", data))

    def _list_mark(self) -> str:
        if not self._lists or self._lists[-1] is None:
            return "-"
        self._lists[-1] += 1
        return f"{self._lists[-1] - 1}."


def html_to_text(html: str) -> str:
    """The text of an HTML fragment; code blocks keep their spaces and line breaks."""
    collector = _TextCollector()
    collector.feed(html)
    collector.close()
    pieces = re.split(r"(```\n.*?```)", "".join(collector.parts), flags=re.DOTALL)
    pieces[::2] = [_tidy(piece) for piece in pieces[::2]]
    return "".join(pieces).strip()


def _tidy(text: str) -> str:
    """One space between words, at most one blank line between paragraphs."""
    lines = re.sub(r" *\n *", "\n", re.sub(r"[ \t]+", " ", text))
    return re.sub(r"\n{3,}", "\n\n", lines)
