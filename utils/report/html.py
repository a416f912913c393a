"""One self-contained page: nothing is fetched, nothing runs, every text is escaped before it becomes part of it.

The pieces return HTML text; what they are given is plain text, except where a parameter is called `content`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from html import escape

from ..runtime import CONTROL, HALVES

# Characters that a page or a table shows by number: besides control characters those that turn the direction of the
# text around them, break a line, are in no font, or are halves of a character.
ODD = {*CONTROL, 0x061C, 0x200E, 0x200F, 0x2028, 0x2029, 0xFEFF, *HALVES}
BY_NUMBER = {code: f"\u2426{code:02X}" if code < 256 else f"\u2426{code:04X}" for code in ODD}

POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # a browser then runs and fetches nothing, whatever comes in
FEWEST_LISTED = 3  # sections
SECTION = re.compile(r'<section id="([a-z0-9-]+)">\n<h2>(.*?)</h2>')  # such markup cannot come of a text: it is escaped
FLAG = re.compile(r"(?<![\w-])--[a-z]\w+")

CSS = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1a1d21;--soft:#59636e;--line:#dde1e6;--strong:#b4bcc5;--fill:#f5f6f8;
--bad:#b3261e;--bad-fill:#fcefee;--note:#805300;--note-fill:#fcf4e3;--good:#17693a;--good-fill:#eaf6ef;
--s1:#2a6ab0;--s2:#c2571a;--s3:#6b7280;--s4:#157a6b;--s5:#8a42a8;--s6:#977100}
@media (prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#e4e7ea;--soft:#9fa8b2;--line:#2d333a;--strong:#566069;
--fill:#1c2025;--bad:#ff8a80;--bad-fill:#331b19;--note:#efc06a;--note-fill:#2e2612;--good:#7fd6a0;--good-fill:#15291d;
--s1:#6fabea;--s2:#f0955e;--s3:#9aa3ae;--s4:#5fc9b0;--s5:#c99fe2;--s6:#d9b84a}}
*{box-sizing:border-box}html{scroll-padding-top:1rem;-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:66rem;padding:2rem 1.5rem 5rem;background:var(--paper);color:var(--ink);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .25rem;letter-spacing:-.01em}
h2{font-size:1.25rem;line-height:1.3;margin:3rem 0 .75rem;padding-top:1rem;border-top:1px solid var(--line)}
h3{font-size:1rem;line-height:1.4;margin:1.5rem 0 .25rem}p{margin:.5rem 0;max-width:46rem}.soft{color:var(--soft)}
a{color:var(--s1)}:focus-visible{outline:2px solid var(--s1);outline-offset:2px;border-radius:2px}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:.5rem;background:var(--paper)}
nav{font-size:.875rem}nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;list-style:none;margin:0;padding:0}
nav.pages{margin-bottom:1.5rem}nav.pages [aria-current]{font-weight:600}
nav.parts{margin-top:1.25rem}nav.parts a{color:var(--soft)}
.verdict{font-size:1.125rem;line-height:1.45;font-weight:600;max-width:none;border-left:.25rem solid var(--good);
background:var(--good-fill);padding:.75rem 1rem;margin:1rem 0 1.25rem;border-radius:0 .25rem .25rem 0}
.verdict.problem{border-color:var(--bad);background:var(--bad-fill)}
.verdict.note{border-color:var(--note);background:var(--note-fill)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:1rem 1.5rem;
margin:1.25rem 0;padding:0}
.tiles div{border-top:2px solid var(--line);padding-top:.375rem}.tiles dt{color:var(--soft);font-size:.8125rem}
.tiles dd{margin:0;font-size:1.25rem;line-height:1.4;font-weight:600;font-variant-numeric:tabular-nums}
.finding{border-left:.25rem solid var(--note);padding:.125rem 0 .125rem 1rem;margin:1.5rem 0}
.finding.problem{border-left-color:var(--bad)}.finding h3{margin:0}.finding p{margin:.25rem 0}
.finding .count{font-variant-numeric:tabular-nums}
.tag{font-size:.8125rem;font-weight:600;padding:.0625rem .5rem;border-radius:1rem;background:var(--note-fill);
color:var(--note);margin-right:.5rem;white-space:nowrap}.problem .tag{background:var(--bad-fill);color:var(--bad)}
details{margin:.5rem 0}summary{cursor:pointer;color:var(--soft);font-size:.875rem}
.example{background:var(--fill);border-radius:.25rem;padding:.75rem 1rem;margin:.75rem 0}
.example dl{margin:0}.example dt{font-size:.8125rem;color:var(--soft);margin-top:.5rem}
.example dd{margin:0;white-space:pre-wrap;font-size:.9375rem}
.card{border-top:1px solid var(--line);padding:1rem 0 .5rem;margin:1rem 0;max-width:none}.card h3{margin:0 0 .25rem}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:0 1rem}
.text{white-space:pre-wrap}.sides h2,.sides h3{margin:0 0 .25rem;padding:0;border:0;font-size:.875rem;color:var(--soft)}
.scroll{overflow-x:auto;margin:.75rem 0}table{border-collapse:collapse;width:100%;font-size:.9375rem}
caption{text-align:left;color:var(--soft);font-size:.875rem;padding-bottom:.25rem}
th,td{text-align:right;vertical-align:baseline;padding:.375rem .75rem;border-bottom:1px solid var(--line);
font-variant-numeric:tabular-nums;font-weight:400;overflow-wrap:normal}
thead th{color:var(--soft);font-size:.8125rem;vertical-align:bottom;border-bottom-color:var(--strong)}
th:first-child{text-align:left;padding-left:0;position:sticky;left:0;background:var(--paper)}
table.words th,table.words td{text-align:left;min-width:7rem;overflow-wrap:anywhere}
code{font-size:.9em;white-space:nowrap}
svg{display:block;width:100%;max-width:44rem;height:auto;margin:.25rem 0 0}svg text{fill:var(--soft);font-size:14px}
.unit{font-size:.8125rem;color:var(--soft);margin:.25rem 0 0}.grid{stroke:var(--line)}.tick{stroke:var(--strong)}
.mark{stroke:var(--ink);stroke-dasharray:4 3}.base{stroke:var(--soft)}.dot{stroke:var(--paper);stroke-width:1.5}
.halo{paint-order:stroke;stroke:var(--paper);stroke-width:4px}
.strip{fill:transparent}.strip:hover{fill:var(--ink);fill-opacity:.07}
.bars{max-width:44rem;margin:.5rem 0}.bars .row{display:flex;flex-wrap:wrap;gap:0 1rem;justify-content:space-between;
font-size:.9375rem;padding:.25rem 0}.bars b{margin-left:auto;
font-weight:400;font-variant-numeric:tabular-nums;color:var(--soft)}
.bars svg{height:18px;margin:0;max-width:none;overflow:visible}.bars svg text,.charts .bars svg text{font-size:13px}
.rail{fill:var(--fill)}.bar{fill-opacity:.75;stroke:none!important}.whisker{stroke:var(--ink);stroke-width:1.5}
.area{fill-opacity:.14;stroke-width:2}.line{stroke-width:2}
.s1{fill:var(--s1);stroke:var(--s1);background:var(--s1)}.s2{fill:var(--s2);stroke:var(--s2);background:var(--s2)}
.s3{fill:var(--s3);stroke:var(--s3);background:var(--s3)}.s4{fill:var(--s4);stroke:var(--s4);background:var(--s4)}
.s5{fill:var(--s5);stroke:var(--s5);background:var(--s5)}.s6{fill:var(--s6);stroke:var(--s6);background:var(--s6)}
.line{fill:none}.line.s4{stroke-dasharray:11 3 2 3}.line.s5{stroke-dasharray:4 2}.line.s6{stroke-dasharray:9 4 4 4}
.area.s2,.line.s2{stroke-dasharray:7 3}.area.s3,.line.s3{stroke-dasharray:2 3}.dot{stroke:var(--paper)}
.legend{display:flex;flex-wrap:wrap;gap:.125rem 1.25rem;list-style:none;margin:.25rem 0;padding:0;font-size:.8125rem}
.legend i{display:inline-block;width:.75rem;height:.75rem;border-radius:.125rem;margin-right:.375rem}
.legend i.round{border-radius:50%}.legend i.line{height:.1875rem;vertical-align:.1875rem;width:1.125rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));gap:.5rem 2rem}
.chart{min-width:0}.charts svg text{font-size:18px}.charts .chart h3{margin-top:1rem}
pre{background:var(--fill);border-radius:.25rem;margin:.75rem 0;padding:.75rem 1rem;white-space:pre-wrap;
font-size:.875rem;line-height:1.5;user-select:all}
.facts{display:grid;grid-template-columns:minmax(8rem,max-content) 1fr;gap:.375rem 1.5rem;
margin:.75rem 0;font-size:.9375rem}
.facts dt{color:var(--soft)}.facts dd{margin:0;min-width:0}
.choices{display:flex;flex-wrap:wrap;gap:.75rem;margin:1rem 0}button{flex:1 1 7rem;font:inherit;font-weight:600;
padding:.75rem 1rem;border:1px solid var(--strong);border-radius:.25rem;background:var(--fill);color:var(--ink);
cursor:pointer}kbd{font:inherit;font-weight:400;color:var(--soft);margin-left:.5rem}progress{width:100%;height:.375rem;
accent-color:var(--s1)}.text pre{user-select:auto}.text p{max-width:none}.text ul,.text ol{margin:.5rem 0;
padding-left:1.75rem;white-space:normal}
button:hover,button[aria-pressed]{border-color:var(--s1);box-shadow:inset 0 0 0 1px var(--s1)}
@media (max-width:34rem){body{padding:1rem 1rem 3rem}h1{font-size:1.5rem}h2{margin-top:2rem}
.tiles{grid-template-columns:repeat(auto-fill,minmax(8rem,1fr));gap:.75rem 1rem}
.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:.5rem}th,td{padding:.375rem .5rem}
svg text,.charts svg text{font-size:21px}}
@media print{:root{color-scheme:light;--paper:#fff;--ink:#000;--soft:#444;--line:#ccc;--fill:#f6f6f6;--s1:#2a6ab0;
--s2:#c2571a;--good:#17693a;--bad:#b3261e;--note:#805300;--good-fill:#fff;--bad-fill:#fff;--note-fill:#fff}
body{max-width:none;padding:0}nav,.strip{display:none}.charts{grid-template-columns:1fr 1fr}
.finding,.example,.chart,tr{break-inside:avoid}h2,h3{break-after:avoid}}
"""


def show(text: object) -> str:
    """A text as HTML shows it: nothing in it is markup, and control characters become visible."""
    return escape(str(text).translate(BY_NUMBER))


def make_document(title: str, content: str, script: str = "") -> str:
    """The whole page; one of several sections lists them below its header.

    Args:
        script: of this project; it alone may run, by its hash.
    """
    policy, run = POLICY, ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy, run = f"{POLICY}; script-src 'sha256-{digest}'", f"<script>{script}</script>\n"
    parts = SECTION.findall(content)
    if len(parts) >= FEWEST_LISTED:
        items = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading in parts)
        listed = f'<nav class="parts" aria-label="parts of this page"><ul>{items}</ul></nav>'
        content = content.replace("</header>", f"{listed}\n</header>", 1)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{show(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#content">to the content</a>\n'
        f'<main id="content">\n{content}\n</main>\n{run}</body>\n</html>\n'
    )


def make_section(heading: str, *content: str) -> str:
    """A section with a heading; nothing when there is no content."""
    inner = "\n".join(part for part in content if part)
    name = re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")
    return f'<section id="{name}">\n<h2>{show(heading)}</h2>\n{inner}\n</section>' if inner else ""


def make_tiles(tiles: Iterable[tuple[str, str]]) -> str:
    """Headline numbers: label and value."""
    return (
        '<dl class="tiles">' + "".join(f"<div><dt>{show(k)}</dt><dd>{show(v)}</dd></div>" for k, v in tiles) + "</dl>"
    )


def make_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]], words: bool = False) -> str:
    """A table that the keyboard can scroll; the first cell of each row is its heading. `words`: its cells are texts,
    which break anywhere, not numbers."""
    css = ' class="words"' if words else ""
    top = "".join(f'<th scope="col">{show(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{show(first)}</th>' + "".join(f"<td>{show(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{show(caption or head[0])}">'
        f"<table{css}><caption>{show(caption)}</caption><thead><tr>{top}</tr></thead>"
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
