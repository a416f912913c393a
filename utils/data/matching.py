"""Layouts against the columns of a source: which to try, whether one fits, and the message where none does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..errors import UserError
from ..settings.data import DataSettings
from .beginnings import find_prompt
from .columns import KIND_NAMES, TEXT, Rows, kind_of_column, list_names, reach
from .labels import read_yes_or_no
from .layouts import FLAGS, LAYOUTS, ONLY_ASKED_FOR, PROMPT, Layout, sft_reply
from .ranking import RANK_KEYS, SCORE_KEYS
from .shapes import Names, find_shape

ALIKE = 0.9  # of the first rows: replies to a prompt that stands elsewhere often share their first words


def list_layouts(settings: DataSettings, verb: str) -> Sequence[Layout]:
    """Those to try, in order. Raises UserError for a format of another verb."""
    wish = settings.dataset_format
    if wish is None:
        return [layout for layout in LAYOUTS[verb] if layout not in ONLY_ASKED_FOR]
    layouts = [layout for layout in LAYOUTS[verb] if layout.name == wish]
    if not layouts:
        raise UserError(f"--dataset_format {wish}: has no pairs; it is a format for the verb sft")
    return layouts


def name_replies(layout: Layout, verb: str) -> tuple[str, ...]:
    if verb == "sft" or layout.pairs_up:
        return (sft_reply(layout),)
    return ("chosen", "rejected")


def find_columns(
    layout: Layout, mapped: Names, columns: Sequence[str], replies: Sequence[str]
) -> dict[str, str] | list[str]:
    """Part -> column; or the parts that the layout needs and the data lack, or that a flag names and it lacks."""
    missing = [part for part in mapped if part not in layout.parts]
    found: dict[str, str] = {}
    for part, candidates in layout.parts.items():
        is_side = part.removesuffix("_score") in ("chosen", "rejected")
        if is_side and part not in replies and len(replies) == 1 and not layout.both_sides:
            continue
        taken = (*mapped.values(), *found.values())
        path = mapped.get(part) or _find_column(candidates, columns, taken)
        if path is not None:
            found[part] = path
        elif part not in layout.optional:
            missing.append(part)
    return missing or found


def _find_column(candidates: Sequence[str], columns: Sequence[str], taken: Sequence[str]) -> str | None:
    """The first candidate that is a column; spaces around a name and its case do not count where no name is exact."""
    loose = {name.strip().casefold(): name for name in reversed(columns)}
    names = (name if name in columns else loose.get(name.casefold()) for name in candidates)
    return next((name for name in names if name is not None and name not in taken), None)


def describe_misfit(
    settings: DataSettings, verb: str, mapped: Names, columns: Sequence[str], sample: Rows
) -> list[str]:
    """What the format asked for needs and the data have not, one line each."""
    flag = f"--dataset_format {settings.dataset_format}"
    tries = [(lay, find_columns(lay, mapped, columns, name_replies(lay, verb))) for lay in list_layouts(settings, verb)]
    layout, found = min(tries, key=lambda pair: len(pair[1]) if isinstance(pair[1], list) else 0)
    if isinstance(found, list):
        return [
            f"{flag}: no column for its {part.replace('_', ' ')}{_looked_for(layout.parts.get(part, ()))}; "
            f"the data has: {list_names(columns)}"
            for part in found
        ]
    holds = ", ".join(f"'{path}' has {KIND_NAMES[kind_of_column(sample, path)]}" for path in found.values())
    needed = layout.says or " or ".join(find_shape(name).description for name in layout.shapes)
    return [f"{flag}: the columns are there, but with other content: {holds}; needed: {needed}"]


def _looked_for(candidates: Sequence[str]) -> str:
    return f" (looked for {', '.join(candidates)})" if candidates else ""


def describe_unknown(settings: DataSettings, verb: str, mapped: Names, columns: Sequence[str], sample: Rows) -> str:
    has = f"the data has: {list_names(columns)}"
    replies = [path for part in FLAGS[verb][1:] if (path := mapped.get(part, part)) in columns]
    kinds = {path: kind_of_column(sample, path) for path in dict.fromkeys([*mapped.values(), *replies])}
    no_prompt = "prompt" not in mapped and not any(name in columns for name in PROMPT["prompt"])
    if replies and no_prompt and all(kind in (*TEXT, "message", "replies") for kind in kinds.values()):
        names = " and ".join(f"'{path}'" for path in replies)
        told = ""
        if verb == "train" and all(kind == "text" for kind in kinds.values()):
            told = " (or pass --dataset_format implicit_prompt if it is what both texts begin with)"
        return f"--prompt_column is missing: no column is recognised as the prompt of {names}{told}; {has}"
    flags = "--prompt_column, --chosen_column and --rejected_column (dots reach into nested fields)"
    if verb == "sft":
        flags = "--prompt_column and --completion_column, --chosen_column, or --text_column"
    found = ", ".join(f"'{path}' has {KIND_NAMES[kind]}" for path, kind in kinds.items())
    note = f" ({found}; texts or message lists are needed)" if found else ""
    name = settings.dataset_name
    return (
        f"--dataset_name {name}: its columns fit no known format{note}; name them with {flags}, or read them with "
        f"your own function (--dataset_adapter file.py:function); {has}"
    )


def _holds_lists(sample: Rows, names: Names) -> bool:
    return any(isinstance(reach(row, names["answers"]), list) for row in sample)


def _holds_rated_answers(sample: Rows, names: Names) -> bool:
    keys = {*SCORE_KEYS, *RANK_KEYS}
    lists = [value for row in sample if isinstance(value := reach(row, names["answers"]), list)]
    return any(isinstance(answer, Mapping) and keys & set(answer) for answers in lists for answer in answers)


def _begin_alike(sample: Rows, names: Names) -> bool:
    """Whether nearly all texts begin with a prompt, and no other column holds what may be one."""
    sides = [[reach(row, names[part]) for part in ("chosen", "rejected")] for row in sample]
    alike = [all(isinstance(side, str) for side in pair) and bool(find_prompt(*pair)) for pair in sides]
    others = [name for name in (sample[0] if sample else ()) if name not in names.values()]
    return sum(alike) >= ALIKE * len(sample) and not any(_holds_prose(sample, name) for name in others)


def _holds_prose(sample: Rows, name: str) -> bool:
    """Whether the texts of a column differ from row to row and have several words."""
    texts = {value for row in sample if isinstance(value := row.get(name), str) and " " in value.strip()}
    return 2 * len(texts) > len(sample)


def _labels_are_yes_or_no(sample: Rows, names: Names) -> bool:
    return any(read_yes_or_no(reach(row, names["label"])) is not None for row in sample)


def _label_is_no_text_of_its_own(sample: Rows, names: Names) -> bool:
    values = [reach(row, names["label"]) for row in sample]
    return all(value is None or (isinstance(value, str | int | float) and len(str(value)) < 40) for value in values)


# By the names that layouts give them: whether the first rows are such as the layout means, where columns do not tell.
FITS: dict[str, Callable[[Rows, Names], bool]] = {
    "begin alike": _begin_alike,
    "lists": _holds_lists,
    "rated answers": _holds_rated_answers,
    "yes or no": _labels_are_yes_or_no,
    "short labels": _label_is_no_text_of_its_own,
}
