"""The pages of a run lead to one another, by relative addresses: a folder that is moved takes its links along."""

from __future__ import annotations

import contextlib
import os
import urllib.parse
from pathlib import Path

from ..run.names import COMPARISON_FILES, EVALUATION_FILES, REPORT, RESULT_FOLDER
from ..run.record import read_record
from ..run.writing import write_text
from .html import show

PAGES = {"evaluation": EVALUATION_FILES[2], "comparison": COMPARISON_FILES[2]}


def link_pages(run: Path | None, page: Path) -> str:
    """Links from a page to the others of its run that are there; nothing where it is the only one."""
    pages = {} if run is None else _pages_of(run)
    named = {path: name for path, name in pages.items() if path.is_file() or path == page}
    named.setdefault(page, page.stem.capitalize())
    if len(named) < 2:
        return ""
    items = "".join(
        f'<li aria-current="page">{show(name)}</li>'
        if path == page
        else f'<li><a href="{address_of(path, page.parent)}">{show(name)}</a></li>'
        for path, name in named.items()
    )
    return f'<nav class="pages" aria-label="pages of this run"><ul>{items}</ul></nav>'


def _pages_of(run: Path) -> dict[Path, str]:
    """Where the pages of a run are, or would be."""
    pages = {run / REPORT: "Report"}
    folders: list[str] = []
    with contextlib.suppress(OSError):
        folders = sorted(name for name in os.listdir(run) if RESULT_FOLDER.fullmatch(name))
    for name in dict.fromkeys((*PAGES, *folders)):
        kind, _, of = name.partition("-")
        pages[run / name / PAGES[kind]] = f"{kind} of {of}".capitalize() if of else kind.capitalize()
    return pages


def address_of(target: Path, folder: Path) -> str:
    """The address of a file in a page of a folder, as an attribute holds it."""
    return urllib.parse.quote(Path(os.path.relpath(target, folder)).as_posix())


def refresh_report(run: Path | None) -> None:
    """Has the report of a run that is over lead to the pages made since. A report that cannot be written stays."""
    from .run_page import make_run_page

    if run is None or not (run / REPORT).is_file() or read_record(run).get("status") == "running":
        return
    with contextlib.suppress(OSError):
        write_text(run / REPORT, make_run_page(run))
