"""docs/losses.md lists what the table of losses holds, and no loss is named anywhere that is not in it.

The list is written by `python tests/objectives/test_losses_page.py`.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]  # when it is run by itself, nothing of tests/ can be imported
PAGE = ROOT / "docs" / "losses.md"
HEAD = "| `--loss_type` | what it is | flags that it reads |\n| --- | --- | --- |\n"
FLAGS = {"divergence": "f_divergence_type"}


def list_losses() -> str:
    """The list as it should stand in the page."""
    from utils.objectives.losses import LOSSES

    rows = []
    for loss in LOSSES.values():
        names = ", ".join(f"`{name}`" for name in (loss.name, *loss.aliases))
        text = " ".join(inspect.getdoc(loss.function).split()).replace("|", "\\|")
        flags = []
        for name in loss.reads:
            own = loss.parameters.get(name)
            bound = f" (default {own.default:g}, {own.must_be}: {own.help})" if own else ""
            flags.append(f"`--{FLAGS.get(name, name)}`{bound}")
        rows.append(f"| {names} | {text} | {', '.join(flags)} |\n")
    return HEAD + "".join(rows)


def with_list(page: str) -> str:
    """The page with the list in the place of the one that it holds."""
    start = page.index(HEAD)
    end = page.index("\n\n", start) + 1
    return page[:start] + list_losses() + page[end:]


def test_the_page_lists_the_losses_as_they_are():
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_list(page), "write it again with: python tests/objectives/test_losses_page.py"


def test_losses_that_pages_configs_and_alarms_name_exist():
    from utils.objectives.losses import BY_NAME

    pages = [ROOT / "README.md", ROOT / "utils" / "training" / "alarms.py", *(ROOT / "docs").glob("*.md")]
    configs = [*(ROOT / "examples").rglob("*.yaml"), *(ROOT / "utils" / "init").glob("*.yaml")]
    texts = [path.read_text(encoding="utf-8") for path in [*pages, *configs]]
    named = [name for text in texts for name in re.findall(r"\bloss_type:? ([a-z]\w+)", text)]
    assert len(named) > 8
    assert set(named) <= BY_NAME.keys()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(with_list(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
