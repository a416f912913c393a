"""One self-contained page: nothing is fetched, nothing runs, every text is escaped before it becomes part of it.

The pieces return HTML text; what they are given is plain text, except where a parameter is called `content`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from ..runtime import CONTROL, HALVES

# Characters that a page or a table shows by number: besides control characters those that turn the direction of the
# text around them, break a line, are in no font, or are halves of a character.
ODD = {*CONTROL, 0x061C, 0x200E, 0x200F, 0x2028, 0x2029, 0xFEFF, *HALVES}
BY_NUMBER = {code: f"\u2426{code:02X}" if code < 256 else f"\u2426{code:04X}" for code in ODD}

POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # a browser then runs and fetches nothing, whatever comes in
FLAG = re.compile(r"(?<![\w-])--[a-z]\w+")

CSS = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#5a6470;--line:#d9dee4;--fill:#f4f6f8;
--bad:#b3261e;--bad-fill:#fdeceb;--note:#8a5a00;--note-fill:#fdf4e0;--good:#17693a;--good-fill:#e7f5ec;
--s1:#2f6fb5;--s2:#c65d1e;--s3:#6b7280;--s4:#17806d;--s5:#8e44ad;--s6:#a67c00}
@media (prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e6e9ed;--soft:#a0a9b4;--line:#333a43;--fill:#1d2228;
--bad:#ff8a80;--bad-fill:#3a1c1a;--note:#f0bd5b;--note-fill:#33290f;--good:#7fd6a0;--good-fill:#14301f;
--s1:#6ea8e6;--s2:#f0935a;--s3:#9aa3ae;--s4:#5fc9b0;--s5:#c79be0;--s6:#d9b84a}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:64rem;padding:1.5rem 1rem 4rem;background:var(--paper);color:var(--ink);
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .3rem}h2{font-size:1.25rem;margin:2.4rem 0 .6rem}
h3{font-size:1.02rem;margin:1.3rem 0 .3rem}p{margin:.4rem 0}.soft{color:var(--soft)}
a{color:inherit}.skip{position:absolute;left:-99rem}.skip:focus{left:1rem}
.verdict{border-left:.35rem solid var(--good);background:var(--good-fill);padding:.7rem 1rem;margin:1rem 0;
border-radius:.3rem;font-weight:600}.verdict.problem{border-color:var(--bad);background:var(--bad-fill)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.6rem;margin:1rem 0;padding:0}
.tiles div{background:var(--fill);border:1px solid var(--line);border-radius:.4rem;padding:.5rem .8rem}
.tiles dt{color:var(--soft);font-size:.85rem}.tiles dd{margin:0;font-size:1.3rem;font-weight:600;
font-variant-numeric:tabular-nums}
.finding{border:1px solid var(--line);border-left:.35rem solid var(--note);border-radius:.3rem;padding:.6rem .9rem;
margin:.7rem 0}.finding.problem{border-left-color:var(--bad)}
.finding h3{margin:0}.finding .count{font-variant-numeric:tabular-nums}
.tag{font-size:.78rem;font-weight:600;padding:.1rem .45rem;border-radius:.7rem;background:var(--note-fill);
color:var(--note);margin-right:.4rem;white-space:nowrap}.problem .tag{background:var(--bad-fill);color:var(--bad)}
details{margin:.5rem 0 .1rem}summary{cursor:pointer;color:var(--soft)}
.example{background:var(--fill);border-radius:.3rem;padding:.5rem .8rem;margin:.5rem 0}
.example dl{margin:0}.example dt{font-size:.8rem;color:var(--soft);margin-top:.35rem}
.example dd{margin:0;white-space:pre-wrap;font-size:.92rem}
.card{border:1px solid var(--line);border-radius:.3rem;padding:.6rem .9rem;margin:.7rem 0}.card h3{margin:0 0 .3rem}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:0 .8rem}
.text{white-space:pre-wrap}.sides h2{margin:0 0 .3rem;font-size:1rem;color:var(--soft)}
.choices{display:flex;flex-wrap:wrap;gap:.6rem;margin:1rem 0}button{flex:1 1 7rem;font:inherit;font-weight:600;
padding:.8rem 1rem;border:1px solid var(--line);border-radius:.4rem;background:var(--fill);color:var(--ink);
cursor:pointer}
button:hover,button:focus-visible,button[aria-pressed]{border-color:var(--s1);outline:2px solid var(--s1)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.93rem;margin:.4rem 0}
caption{text-align:left;color:var(--soft);padding-bottom:.2rem}
th,td{text-align:right;padding:.25rem .6rem;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}
th,td{overflow-wrap:normal}code{font-size:.92em;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}thead th{color:var(--soft);font-weight:600}
svg{display:block;width:100%;max-width:44rem;height:auto;margin:.5rem 0 0}svg text{fill:var(--soft);font-size:13px}
svg text.value{fill:var(--ink)}.grid{stroke:var(--line)}.mark{stroke:var(--ink);stroke-dasharray:4 3}
.base{stroke:var(--soft);stroke-width:1.5}.dot{stroke:var(--paper);stroke-width:1.5}
.rail{fill:var(--fill)}.area{fill-opacity:.16;stroke-width:2}.line{fill:none;stroke-width:2}
.s1{fill:var(--s1);stroke:var(--s1);background:var(--s1)}.s2{fill:var(--s2);stroke:var(--s2);background:var(--s2)}
.s3{fill:var(--s3);stroke:var(--s3);background:var(--s3)}.s4{fill:var(--s4);stroke:var(--s4);background:var(--s4)}
.s5{fill:var(--s5);stroke:var(--s5);background:var(--s5)}.s6{fill:var(--s6);stroke:var(--s6);background:var(--s6)}
.line{fill:none}.line.s4{stroke-dasharray:11 3 2 3}.line.s5{stroke-dasharray:4 2}.line.s6{stroke-dasharray:9 4 4 4}
.area.s2{stroke-dasharray:7 3}.area.s3{stroke-dasharray:2 3}.line.s2{stroke-dasharray:7 3}.line.s3{stroke-dasharray:2 3}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;list-style:none;margin:.2rem 0 0;padding:0;font-size:.9rem}
.legend i{display:inline-block;width:.8rem;height:.8rem;border-radius:.15rem;margin-right:.35rem}
.legend i.round{border-radius:50%}.legend i.line{height:.25rem;vertical-align:.2rem;width:1.1rem}
.verdict.note{border-color:var(--note);background:var(--note-fill)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));gap:.2rem 1.6rem}
.charts .chart{min-width:0}.charts svg text{font-size:17px}
pre{background:var(--fill);border:1px solid var(--line);border-radius:.3rem;margin:.5rem 0;
padding:.7rem .9rem;white-space:pre-wrap;font-size:.88rem;line-height:1.5;user-select:all}
.facts{display:grid;grid-template-columns:minmax(7rem,max-content) 1fr;gap:.25rem 1rem;margin:.5rem 0}
.facts dt{color:var(--soft)}.facts dd{margin:0;min-width:0}
@media (max-width:34rem){.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:.5rem}
svg text,.charts svg text{font-size:20px}th,td{padding:.25rem .35rem}
body{padding-top:1rem}.chart{margin:0 -.3rem}}
@media print{:root{color-scheme:light;--paper:#fff;--ink:#000;--soft:#444;--line:#ccc;--fill:#f6f6f6;--s1:#2f6fb5;
--s2:#c65d1e;--good:#17693a;--bad:#b3261e;--note:#8a5a00;--good-fill:#fff;--bad-fill:#fff;--note-fill:#fff}
body{max-width:none;padding:0}.charts{grid-template-columns:1fr 1fr}
.finding,.example,.chart,tr{break-inside:avoid}h2,h3{break-after:avoid}}
"""


def show(text: object) -> str:
    """A text as HTML shows it: nothing in it is markup, and control characters become visible."""
    return escape(str(text).translate(BY_NUMBER))


def make_document(title: str, content: str) -> str:
    """The whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{show(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#content">to the content</a>\n'
        f'<main id="content">\n{content}\n</main>\n</body>\n</html>\n'
    )


def make_section(heading: str, *content: str) -> str:
    """A section with a heading; nothing when there is no content."""
    inner = "\n".join(part for part in content if part)
    return f"<section>\n<h2>{show(heading)}</h2>\n{inner}\n</section>" if inner else ""


def make_tiles(tiles: Iterable[tuple[str, str]]) -> str:
    """Headline numbers: label and value."""
    return (
        '<dl class="tiles">' + "".join(f"<div><dt>{show(k)}</dt><dd>{show(v)}</dd></div>" for k, v in tiles) + "</dl>"
    )


def make_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; the first cell of each row is its heading."""
    top = "".join(f'<th scope="col">{show(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{show(first)}</th>' + "".join(f"<td>{show(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll"><table><caption>{show(caption)}</caption><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def make_chart(heading: str, content: str, table: str = "") -> str:
    """A chart under its heading, with the numbers behind it to unfold."""
    numbers = f"<details><summary>the numbers</summary>{table}</details>" if table else ""
    return f'<div class="chart"><h3>{show(heading)}</h3>{content}{numbers}</div>'


def make_example(heading: str, texts: Iterable[tuple[str, object]]) -> str:
    """A box of texts under their names, below a heading where there is one."""
    lines = "".join(f"<dt>{show(name)}</dt><dd>{show(text)}</dd>" for name, text in texts)
    top = f"<strong>{show(heading)}</strong>" if heading else ""
    return f'<div class="example">{top}<dl>{lines}</dl></div>'


def make_details(summary: str, content: str) -> str:
    """Content to unfold."""
    return f"<details><summary>{show(summary)}</summary>{content}</details>"


def make_facts(facts: Iterable[tuple[str, object]]) -> str:
    """Names and what they are, one below the other."""
    return '<dl class="facts">' + "".join(f"<dt>{show(k)}</dt><dd>{show(v)}</dd>" for k, v in facts) + "</dl>"


def make_command(text: str) -> str:
    """A command to copy: one press selects it all."""
    return f"<pre>{show(text)}</pre>"


def make_paragraph(text: str, css: str = "") -> str:
    """One paragraph of plain text; flags in it are set as code."""
    inner = FLAG.sub(r"<code>\g<0></code>", show(text))
    return f'<p class="{css}">{inner}</p>' if css else f"<p>{inner}</p>"
