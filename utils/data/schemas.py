"""How the rows of a source are read: found by their columns and first values, or as --dataset_format says.

A `Layout` (utils/data/layouts.py) says which columns play which part, a `Shape` (utils/data/shapes.py) how the values
of those parts are written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import datasets

from ..errors import UserError
from ..settings.training import DataSettings
from .adapter import run_adapter
from .columns import (
    KIND_NAMES,
    TEXT,
    Rows,
    describe_missing,
    kind_of_column,
    list_columns,
    list_heads,
    list_names,
    reach,
    unpack_row,
)
from .files import AnyJson
from .labels import check_labels
from .layouts import ANY_SHAPE, FLAGS, LAYOUTS, ONLY_ASKED_FOR, PROMPT, Layout, sft_reply
from .ranking import Choice
from .remarks import Remark, find_remarks, find_written_messages, list_unused
from .shapes import Names, Shape, find_shape
from .turns import BadRow, holds_messages

SAMPLED_ROWS = 100
SAID = ("prompt", "chosen", "rejected", "completion", "first", "second")  # parts that may be texts or messages
ADAPTED = Layout("adapter", {}, shapes=("transcripts", *ANY_SHAPE))


@dataclass(frozen=True)
class Reading:
    """How the rows are read, found once. `columns`: part -> column; `replies`: chosen and rejected, or the one part."""

    name: str
    description: str
    columns: Names
    shape: Shape
    replies: tuple[str, ...]
    layout: Layout
    choice: Choice = field(default_factory=Choice)
    group: str | None = None  # the column of --group_by
    adapter: str | None = None  # --dataset_adapter
    scored: bool = False
    packed: tuple[str, ...] = ()  # columns whose texts are message lists
    remarks: tuple[Remark, ...] = ()  # what of the source is not used as its columns suggest

    @property
    def is_text(self) -> bool:
        """Prompt and replies become texts (else message lists)."""
        return self.shape.is_text

    @property
    def is_transcript(self) -> bool:
        """The source is "Human: ... Assistant: ..." text, so a tokenizer without a template takes a transcript one."""
        return self.shape.is_transcript

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """What the replies are called once converted."""
        return self.replies if len(self.replies) == 2 else ("completion",)

    @cached_property
    def names(self) -> dict[str, str]:
        """Part -> the source's name for it, for messages to people; an answer among several goes by its part."""
        return {part: self.columns.get(part, part) for part in ("prompt", *self.columns, *self.replies)}

    @cached_property
    def labels(self) -> dict[str, str]:
        """Converted column -> the source's name for it."""
        replies = dict(zip(self.outputs, self.replies, strict=True))
        return {name: self.names[replies.get(name, name)] for name in ("prompt", *self.outputs)}

    @property
    def makes_several(self) -> bool:
        """Whether --pairs_per_prompt has an effect."""
        return self.layout.pairs_up or bool({"answers", "replies"} & set(self.columns))


def choice_of(settings: DataSettings, verb: str) -> Choice:
    """What the settings say about rows with several answers."""
    return Choice(
        pairs_per_prompt=settings.pairs_per_prompt or 1,
        min_score_gap=settings.min_score_gap,
        min_score_ratio=settings.min_score_ratio,
        strip_citations=settings.strip_citations,
        best_only=verb == "sft",
        ordered=settings.dataset_format == "ranked_answers",
    )


def take_rows(rows: datasets.Dataset) -> list[dict[str, Any]]:
    """The first rows, as a sample of how all of them are written."""
    sample = rows.select(range(min(SAMPLED_ROWS, len(rows)))).to_list()  # which decodes neither images nor JSON
    for name, kind in rows.features.items():
        if isinstance(kind, AnyJson):
            for row in sample:
                row[name] = kind.decode_example(row[name])
    return sample


def find_reading(rows: datasets.Dataset, settings: DataSettings, verb: str) -> Reading:
    """How to read these rows, from their columns, the first of their values, and the flags.

    Raises UserError when a named column does not exist, no known shape fits, the format asked for does not, or a label
    of any row is a number that the columns' names do not explain.
    """
    sample = take_rows(rows)
    columns = list(dict.fromkeys([*rows.column_names, *list_columns(sample)]))
    wishes = {part: f"{part}_column" for part in FLAGS[verb]} | {"group": "group_by"}
    named = {flag: path for flag in wishes.values() if (path := getattr(settings, flag)) is not None}
    lost = {flag: path for flag, path in named.items() if path not in columns}
    if lost:
        raise UserError(*(describe_missing(f"--{flag}", path, columns) for flag, path in lost.items()))
    if settings.dataset_adapter is not None:
        return _read_with_adapter(sample, settings, verb)
    packed = tuple(path for path in columns if is_packed(sample, path))
    sample = [_unpack_sample(row, packed) for row in sample]
    columns = list(dict.fromkeys([*columns, *list_columns(sample)]))
    mapped = {part: named[flag] for part, flag in wishes.items() if flag in named and part != "group"}
    for layout in _layouts(settings, verb):
        replies = _replies(layout, verb)
        found = _find_columns(layout, mapped, columns, replies)
        if not isinstance(found, dict) or (layout.fits is not None and not layout.fits(sample, found)):
            continue
        reading = _match(layout, found, replies, sample, settings, verb)
        if reading is not None:
            return _with_remarks(_with_labels(reading, rows, settings), rows, packed)
    if settings.dataset_format is not None:
        raise UserError(*_describe_misfit(settings, verb, mapped, columns, sample))
    raise UserError(_describe_unknown(settings, verb, mapped, columns, sample))


def _with_labels(reading: Reading, rows: datasets.Dataset, settings: DataSettings) -> Reading:
    try:
        numbered = check_labels(rows, reading.columns)
    except UserError as error:
        raise UserError(*(f"--dataset_name {settings.dataset_name}: {fault}" for fault in error.faults)) from None
    return replace(reading, choice=replace(reading.choice, numbered=numbered))


def is_packed(sample: Rows, name: str) -> bool:
    """Whether most texts of a column, or at a path into one, are message lists, as in files that have texts alone."""
    texts = [value for row in sample if isinstance(value := reach(row, name), str)]
    return 2 * sum(map(holds_messages, texts)) > len(texts)


def _unpack_sample(row: Mapping[str, Any], packed: Sequence[str]) -> Mapping[str, Any]:
    for path in packed:
        with contextlib.suppress(BadRow):
            row = unpack_row(row, [path])
    return row


def _with_remarks(reading: Reading, rows: datasets.Dataset, packed: Sequence[str]) -> Reading:
    """The reading, with what is read as messages and what is not read said in its description."""
    used = {head for path in (*reading.columns.values(), reading.group) if path for head in list_heads(path)}
    if reading.is_transcript:
        used |= set(PROMPT["prompt"])  # its text stands in the transcripts too
    packed = tuple(path for path in packed if path in used)
    says = [reading.description]
    if packed:
        says.append(f"the texts in {', '.join(map(repr, packed))} are message lists")
    unused = list_unused(rows, used)
    if unused:
        says.append(f"not used: {list_names(unused)}")
    texts = [name for part, name in reading.columns.items() if part in SAID and name in rows.column_names]
    remarks = (
        *find_remarks(rows, unused),
        *find_written_messages(rows, [name for name in texts if name not in packed]),
    )
    return replace(reading, description="; ".join(says), packed=packed, remarks=remarks)


def _layouts(settings: DataSettings, verb: str) -> Sequence[Layout]:
    """Those to try, in order. Raises UserError for a format of another verb."""
    wish = settings.dataset_format
    if wish is None:
        return [layout for layout in LAYOUTS[verb] if layout not in ONLY_ASKED_FOR]
    layouts = [layout for layout in LAYOUTS[verb] if layout.name == wish]
    if not layouts:
        raise UserError(f"--dataset_format {wish}: holds no pairs; it is a format for the verb sft")
    return layouts


def _replies(layout: Layout, verb: str) -> tuple[str, ...]:
    if verb == "sft" or layout.pairs_up:
        return (sft_reply(layout),)
    return ("chosen", "rejected")


def _match(
    layout: Layout, found: Names, replies: tuple[str, ...], sample: Rows, settings: DataSettings, verb: str
) -> Reading | None:
    """The reading of a layout whose columns were found, or None where the values are written in another way."""
    shape = _find_shape(layout, found, replies, sample, choice_of(settings, verb))
    if shape is None:
        return None
    found = {part: path for part, path in found.items() if part not in shape.passes_over}
    described = ", ".join(f"{part.replace('_', ' ')} '{path}'" for part, path in found.items())
    says = f"{layout.says}; {shape.description}" if layout.says else shape.description
    return Reading(
        layout.name,
        f"{layout.name}: {says} ({described})",
        found,
        shape,
        replies,
        layout,
        choice_of(settings, verb),
        settings.group_by,
        scored=verb == "train" and layout.is_scored(found),
    )


def _find_shape(layout: Layout, found: Names, replies: tuple[str, ...], sample: Rows, choice: Choice) -> Shape | None:
    if layout.expand is None:
        kinds = {part: kind_of_column(sample, path) for part, path in found.items()}
    else:
        kinds = _kinds(_expand_sample(layout, found, sample, choice), replies)
    candidates = [find_shape(name) for name in layout.shapes]
    return next((shape for shape in candidates if shape.matches(kinds, replies)), None)


def _expand_sample(layout: Layout, found: Names, sample: Rows, choice: Choice) -> list[dict[str, Any]]:
    rows = []
    for row in sample:
        parts = {part: reach(row, path) for part, path in found.items()}
        try:
            rows += layout.expand(parts, found, replace(choice, any_two=True))
        except BadRow:
            continue
    return rows


def _kinds(rows: Rows, replies: Sequence[str]) -> dict[str, str]:
    """Kinds of simple rows; a part that all of them lack is absent, but for the replies."""
    parts = dict.fromkeys([*replies, *(name for row in rows for name, value in row.items() if value is not None)])
    return {part: kind_of_column(rows, part) for part in parts}


def _read_with_adapter(sample: Rows, settings: DataSettings, verb: str) -> Reading:
    """The reading of what the adapter makes of the first rows."""
    made, reasons = [], []
    for row in sample:
        try:
            made += run_adapter(settings.dataset_adapter, row)
        except BadRow as reason:
            reasons.append(str(reason))
    replies = ("chosen", "rejected")
    if verb == "sft":
        replies = ("completion",) if any("completion" in row for row in made) else ("chosen",)
    kinds = _kinds(made, replies)
    shape = next((shape for name in ADAPTED.shapes if (shape := find_shape(name)).matches(kinds, replies)), None)
    flag = f"--dataset_adapter {settings.dataset_adapter}"
    if not made and reasons and len(set(reasons)) == 1 and len(reasons) == len(sample):
        raise UserError(f"{flag}: made no pair of the first {len(sample)} rows: {reasons[0]}")
    if shape is None or (made and not any(set(replies) <= set(row) for row in made)):
        found = ", ".join(f"'{part}' holds {KIND_NAMES[kind]}" for part, kind in kinds.items()) or "nothing"
        needed = "prompt, chosen and rejected" if verb == "train" else "prompt and completion"
        raise UserError(f"{flag}: must give {needed} as texts or message lists; it gives: {found}")
    scored = verb == "train" and {"chosen_score", "rejected_score"} <= set(kinds)
    return Reading(
        ADAPTED.name,
        f"{ADAPTED.name} {settings.dataset_adapter}: {shape.description}",
        {},
        shape,
        replies,
        ADAPTED,
        choice_of(settings, verb),
        settings.group_by,
        settings.dataset_adapter,
        scored,
    )


def _find_columns(
    layout: Layout, mapped: Names, columns: Sequence[str], replies: Sequence[str]
) -> dict[str, str] | list[str]:
    """Part -> column; or the parts that the layout needs and the data lack, or that a flag names and it lacks."""
    missing = [part for part in mapped if part not in layout.parts]
    found: dict[str, str] = {}
    for part, candidates in layout.parts.items():
        if part.removesuffix("_score") in ("chosen", "rejected") and part not in replies and len(replies) == 1:
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


def _describe_misfit(
    settings: DataSettings, verb: str, mapped: Names, columns: Sequence[str], sample: Rows
) -> list[str]:
    """What the format asked for needs and the data have not, one line each."""
    flag = f"--dataset_format {settings.dataset_format}"
    tries = [(lay, _find_columns(lay, mapped, columns, _replies(lay, verb))) for lay in _layouts(settings, verb)]
    layout, found = min(tries, key=lambda pair: len(pair[1]) if isinstance(pair[1], list) else 0)
    if isinstance(found, list):
        return [
            f"{flag}: no column for its {part.replace('_', ' ')}{_looked_for(layout.parts.get(part, ()))}; "
            f"the data has: {list_names(columns)}"
            for part in found
        ]
    holds = ", ".join(f"'{path}' holds {KIND_NAMES[kind_of_column(sample, path)]}" for path in found.values())
    needed = layout.says or " or ".join(find_shape(name).description for name in layout.shapes)
    return [f"{flag}: the columns are there, but not what they should hold: {holds}; needed: {needed}"]


def _looked_for(candidates: Sequence[str]) -> str:
    return f" (looked for {', '.join(candidates)})" if candidates else ""


def _describe_unknown(settings: DataSettings, verb: str, mapped: Names, columns: Sequence[str], sample: Rows) -> str:
    has = f"the data has: {list_names(columns)}"
    replies = [path for part in FLAGS[verb][1:] if (path := mapped.get(part, part)) in columns]
    kinds = {path: kind_of_column(sample, path) for path in dict.fromkeys([*mapped.values(), *replies])}
    no_prompt = "prompt" not in mapped and not any(name in columns for name in PROMPT["prompt"])
    if replies and no_prompt and all(kind in (*TEXT, "message", "replies") for kind in kinds.values()):
        names = " and ".join(f"'{path}'" for path in replies)
        return f"--prompt_column is missing: no column is known as the prompt of {names}; {has}"
    flags = "--prompt_column, --chosen_column and --rejected_column (dots reach into nested fields)"
    if verb == "sft":
        flags = "--prompt_column and --completion_column, --chosen_column, or --text_column"
    found = ", ".join(f"'{path}' holds {KIND_NAMES[kind]}" for path, kind in kinds.items())
    note = f" ({found}; texts or message lists are needed)" if found else ""
    name = settings.dataset_name
    return (
        f"--dataset_name {name}: its columns fit no known shape{note}; name them with {flags}, or read them with a "
        f"function of your own (--dataset_adapter file.py:function); {has}"
    )


def check_effects(readings: Sequence[Reading], settings: DataSettings) -> None:
    """Raises UserError for flags about several answers that do nothing with any of the sources."""
    faults = []
    if settings.pairs_per_prompt is not None and not any(reading.makes_several for reading in readings):
        faults.append("--pairs_per_prompt: has no effect, each row of this data is one pair; leave it out")
    if settings.min_score_gap is not None and not any(reading.scored for reading in readings):
        faults.append("--min_score_gap: this data has no scores that are known; leave it out")
    if settings.min_score_ratio is not None and not any("ratio" in reading.columns for reading in readings):
        faults.append("--min_score_ratio: this data has no column score_ratio; leave it out")
    if settings.strip_citations and not any(reading.layout.strips_citations for reading in readings):
        faults.append("--strip_citations: is for answers in the format webgpt; leave it out")
    if faults:
        raise UserError(*faults)
