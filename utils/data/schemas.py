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
from ..settings.data import DataSettings
from .adapter import run_adapter
from .calls import BadRow
from .columns import (
    KIND_NAMES,
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
from .layouts import ANY_SHAPE, DOCUMENTS, FLAGS, GIVEN, PROMPT, Layout
from .matching import FITS, describe_misfit, describe_unknown, find_columns, list_layouts, name_replies
from .ranking import EXPANSIONS, Choice
from .remarks import Remark, find_remarks, find_written_messages, list_unused
from .shapes import Names, Shape, find_shape
from .template_kwargs import holds_documents
from .turns import holds_messages
from .written_calls import holds_written

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
    keeps_extra: bool = False  # turns have a column for what they say beside their text
    gives_kwargs: bool = False  # rows give their chat template arguments or documents
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
    sample: Rows = take_rows(rows)
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
    for layout in list_layouts(settings, verb):
        replies = name_replies(layout, verb)
        found = find_columns(layout, mapped, columns, replies)
        if not isinstance(found, dict) or (layout.fits is not None and not FITS[layout.fits](sample, found)):
            continue
        reading = _match(layout, found, replies, sample, settings, verb)
        if reading is not None:
            return _with_remarks(_with_labels(reading, rows, settings), rows, packed, sample)
    if settings.dataset_format is not None:
        raise UserError(*describe_misfit(settings, verb, mapped, columns, sample))
    raise UserError(describe_unknown(settings, verb, mapped, columns, sample))


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


def _with_remarks(reading: Reading, rows: datasets.Dataset, packed: Sequence[str], sample: Rows) -> Reading:
    """The reading, with what is read as messages and what is not read said in its description."""
    used = {head for path in (*reading.columns.values(), reading.group) if path for head in list_heads(path)}
    if reading.is_transcript:
        used |= set(PROMPT["prompt"])  # its text stands in the transcripts too
    packed = tuple(path for path in packed if path in used)
    says = [reading.description]
    if packed:
        says.append(f"the texts in {', '.join(map(repr, packed))} are message lists")
    if "tools" in reading.columns and not reading.is_text and any(map(_holds_written, sample)):
        says.append("tool calls and results in the texts of turns are read as such")
    unused = list_unused(rows, used)
    if unused:
        says.append(f"not used: {list_names(unused)}")
    texts = [name for part, name in reading.columns.items() if part in SAID and name in rows.column_names]
    remarks = (
        *find_remarks(rows, unused),
        *find_written_messages(rows, [name for name in texts if name not in packed]),
    )
    return replace(reading, description="; ".join(says), packed=packed, remarks=remarks)


def _holds_written(value: Any) -> bool:
    """Whether a text in a value may be a tool call."""
    if isinstance(value, str):
        return holds_written(value)
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return any(map(_holds_written, inner))


def _match(
    layout: Layout, found: Names, replies: tuple[str, ...], sample: Rows, settings: DataSettings, verb: str
) -> Reading | None:
    """The reading of a layout whose columns were found, or None where the values are written in another way."""
    shape = _find_shape(layout, found, replies, sample, choice_of(settings, verb))
    if shape is None:
        return None
    found = {part: path for part, path in found.items() if _is_read(part, path, shape, sample)}
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
        gives_kwargs=not found.keys().isdisjoint(GIVEN),
    )


def _is_read(part: str, path: str, shape: Shape, sample: Rows) -> bool:
    """Whether a shape looks at a part; texts are rendered by no template, and `documents` may be another's word."""
    if part in shape.passes_over or (part in GIVEN and shape.is_text):
        return False
    return part != DOCUMENTS or holds_documents([reach(row, path) for row in sample])


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
            rows += EXPANSIONS[layout.expand](parts, found, replace(choice, any_two=True))
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
    replies: tuple[str, ...] = ("chosen", "rejected")
    if verb == "sft":
        replies = ("completion",) if any("completion" in row for row in made) else ("chosen",)
    kinds = _kinds(made, replies)
    shape = next((shape for name in ADAPTED.shapes if (shape := find_shape(name)).matches(kinds, replies)), None)
    flag = f"--dataset_adapter {settings.dataset_adapter}"
    if not made and reasons and len(set(reasons)) == 1 and len(reasons) == len(sample):
        raise UserError(f"{flag}: made no pair from the first {len(sample)} rows: {reasons[0]}")
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
        gives_kwargs=not shape.is_text and any(part in row for row in made for part in GIVEN),
    )


def check_effects(readings: Sequence[Reading], settings: DataSettings) -> None:
    """Raises UserError for flags about several answers that do nothing with any of the sources."""
    faults = []
    if settings.pairs_per_prompt is not None and not any(reading.makes_several for reading in readings):
        faults.append("--pairs_per_prompt: has no effect, each row of this data is one pair; leave it out")
    if settings.min_score_gap is not None and not any(reading.scored for reading in readings):
        faults.append("--min_score_gap: this data has no known scores; leave it out")
    if settings.min_score_ratio is not None and not any("ratio" in reading.columns for reading in readings):
        faults.append("--min_score_ratio: this data has no column score_ratio; leave it out")
    if settings.strip_citations and not any(reading.layout.strips_citations for reading in readings):
        faults.append("--strip_citations: is for answers in the format webgpt; leave it out")
    if faults:
        raise UserError(*faults)
