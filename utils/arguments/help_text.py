"""The texts of --help, --version and a call without words, built from the settings' own descriptions."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import platform
import shutil
import textwrap
from typing import Any

from ..errors import UserError
from ..run.program import COMMAND, INSTALLED, SCRIPT
from ..settings.registry import DEFAULT_VERB, ROWS, VERBS, acts_as
from ..settings.training import flags_of, groups_of
from .flag_values import ValueType, annotated_type, as_texts

ALL_OF_US = importlib.import_module(__name__.rpartition(".arguments.")[0])  # which knows its version
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets")  # whose versions --version tells
EVERYTHING = "all"  # the topic that shows each flag
NARROWEST = 60


def help_text(verb: str, topic: str | None = None) -> str:
    """The help of one verb.

    Args:
        topic: what is shown of its flags: those that matter first (None), `all`, those of a group, or a single one.

    Raises:
        UserError: there is no such group or flag.
    """
    shown = _flags_of_topic(verb, topic)
    parser = argparse.ArgumentParser(
        prog=f"python {SCRIPT}", usage=argparse.SUPPRESS, formatter_class=_HelpFormatter, add_help=False
    )
    if topic is None:
        general = parser.add_argument_group("general")
        general.add_argument("-h", "--help", action="help", help="show this")
        general.add_argument("--config", metavar="FILE", help="YAML or JSON with the same names; flags win over it")
    for settings in groups_of(verb):
        fields = [field for field in dataclasses.fields(settings) if field.name in shown]
        group = parser.add_argument_group(_filled(settings.__doc__, "")) if fields else None
        for field in fields:
            if VERBS[verb].takes(settings, field):
                _add_flag(group, field, verb)
    flags = parser.format_help().strip("\n")
    text = f"{flags}\n\n{_more(verb, topic)}" if topic else f"{_opening(verb)}\n\n{flags}\n\n{_more(verb, topic)}"
    return _as_installed(text)


def usage() -> str:
    """How the command is used, on a few lines."""
    return _as_installed(
        f"usage: python {SCRIPT} [VERB] [flags]\n\n"
        f"{_verbs()}\n\n"
        "example:\n"
        f"  python {SCRIPT} --model_name_or_path MODEL --dataset_name DATA --output_dir RUN --use_lora\n\n"
        f"python {SCRIPT} help VERB shows the flags of a verb, init writes a config to start from.\n"
    )


def versions() -> str:
    """The version, and those of what it computes with, on one line."""
    installed = []
    for name in PACKAGES:
        try:
            installed.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            installed.append(f"{name} not installed")
    name = COMMAND if INSTALLED else SCRIPT
    return f"{name} {ALL_OF_US.__version__} (Python {platform.python_version()}, {', '.join(installed)})"


def _topics(verb: str) -> dict[str, Any]:
    """Name -> group of settings, of those that have flags of the verb."""
    row = VERBS[verb]
    return {
        group.__name__.removesuffix("Settings").lower(): group
        for group in groups_of(verb)
        if any(row.takes(group, field) for field in dataclasses.fields(group))
    }


def _flags_of_topic(verb: str, topic: str | None) -> set[str]:
    flags, topics = flags_of(verb), _topics(verb)
    if topic is None:
        return set(VERBS[verb].first or flags)
    name = topic.strip("-").replace("-", "_")
    if name.lower() == EVERYTHING:
        return set(flags)
    if name.lower() in topics:
        return {field.name for field in dataclasses.fields(topics[name.lower()])} & flags.keys()
    if name in flags:
        return {name}
    raise UserError(
        f"--help {topic}: neither a flag of {verb} nor a group of its flags; the groups are {', '.join(topics)}"
    )


def _opening(verb: str) -> str:
    row = VERBS[verb]
    objects = "".join(f" [{name.upper()}]" for name in row.objects)
    named = "[VERB]" if verb == DEFAULT_VERB else verb + objects
    verbs = f"\n\n{_verbs()}" if verb == DEFAULT_VERB else ""
    line = _filled(f"usage: python {SCRIPT} {named} [flags]", "", "    ")
    return f"{line}\n\n{_filled(f'{verb}: {row.help}', '')}{verbs}"


def _verbs() -> str:
    width = max(map(len, VERBS))
    lines = [_filled(f"{row.name:<{width}}  {row.help}", "  ", " " * (width + 4)) for row in ROWS]
    return "\n".join(["verbs:", *lines])


def _more(verb: str, topic: str | None) -> str:
    row, config = VERBS[verb], VERBS[acts_as(verb)].config
    word = "" if verb == DEFAULT_VERB else f"{verb} "
    lines = []
    if row.first:
        lines.append(
            f"More flags of {verb}: {SCRIPT} {word}--help {EVERYTHING}; those of a group: --help GROUP "
            f"({', '.join(_topics(verb))}); one flag: --help FLAG."
        )
    if topic is None or topic == EVERYTHING:
        if config:
            lines.append(f"Every other field of TRL's {config} works as --field value.")
        lines.append("- and _ are the same in flag names. Yes/no flags take no value, or true/false.")
    text = "\n".join(_filled(line, "") for line in lines)
    return f"{text}\n" if topic and topic != EVERYTHING else f"{text}\n\nexample:\n{row.example}\n"


def _as_installed(text: str) -> str:
    return text.replace(f"python {SCRIPT}", COMMAND).replace(SCRIPT, COMMAND) if INSTALLED else text


def _width() -> int:
    return max(shutil.get_terminal_size().columns, NARROWEST)


def _filled(text: str, indent: str, others: str | None = None) -> str:
    return textwrap.fill(
        text, _width(), initial_indent=indent, subsequent_indent=others or indent, break_on_hyphens=False
    )


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=30, width=_width(), **options)


def _add_flag(group: Any, field: dataclasses.Field[Any], verb: str) -> None:
    text, kind = field.metadata["says"].get(acts_as(verb)) or field.metadata["help"], annotated_type(str(field.type))
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
