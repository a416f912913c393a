"""The text of --help, built from the settings' own descriptions."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from typing import Any

from ..run.program import COMMAND, INSTALLED, SCRIPT
from ..settings.registry import ROWS, VERBS, acts_as
from ..settings.training import groups_of
from .flag_values import ValueType, annotated_type, as_texts


def help_text(verb: str) -> str:
    """The help of one verb: its flags in groups, what else it takes, and a usage example."""
    row, config = VERBS[verb], VERBS[acts_as(verb)].config
    more = f"Every further field of TRL's {config} works as --field value too.\n" if config else ""
    verbs = "\n".join(f"  {other.name:<{max(map(len, VERBS))}}  {other.help}" for other in ROWS)
    parser = argparse.ArgumentParser(
        prog="python advanced_dpo_script.py",
        usage="python advanced_dpo_script.py [VERB] [flags]",
        description=f"verbs:\n{verbs}\n\nThe flags of {verb}:",
        epilog=f"{more}- and _ are the same in flag names. Yes/no flags take no value, or true/false.\n\n"
        f"example:\n{row.example}",
        formatter_class=_HelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="help", help="show this")
    general.add_argument("--config", metavar="FILE", help="YAML or JSON with the same names; flags win over it")
    for settings in groups_of(verb):
        group = parser.add_argument_group(settings.__doc__)
        for field in dataclasses.fields(settings):
            if row.takes(settings, field):
                _add_flag(group, field)
    text = parser.format_help()
    return text.replace(f"python {SCRIPT}", COMMAND) if INSTALLED else text


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **options: Any) -> None:
        width = min(max(shutil.get_terminal_size().columns, 80), 100)
        super().__init__(prog, max_help_position=30, width=width, **options)


def _add_flag(group: Any, field: dataclasses.Field[Any]) -> None:
    text, kind = field.metadata["help"], annotated_type(str(field.type))
    if "default:" not in text and field.default is not None and field.default is not False:
        text += f" (default: {' '.join(as_texts(field.default))})"
    options: dict[str, Any] = {"help": text.replace("%", "%%")}
    if "bool" in kind.scalars:
        options["action"] = "store_true"
    else:
        options["metavar"] = _metavar(field, kind)
    group.add_argument(f"--{field.name}", **options)


def _metavar(field: dataclasses.Field[Any], kind: ValueType) -> str:
    choices = field.metadata["choices"]
    if choices and not kind.item and len("|".join(choices)) < 40:
        return "|".join(choices)
    word = {"int": "N", "float": "X"}.get(kind.item or kind.scalars[0], "TEXT")
    return f"{word} [{word} ...]" if kind.item else word
