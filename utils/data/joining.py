"""Sources as one: each opened and read in its own way, then their rows side by side, split, and led back to places."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import datasets

from ..errors import UserError
from ..run.paths import read_path
from ..settings.training import DataSettings
from .conversion import convert_rows
from .labels import check_labels
from .mixing import MixedPlaces, Wish, align
from .places import Place
from .schemas import Reading, find_reading
from .sources import Source, load_source
from .splitting import Split, join_splits, split_rows


@dataclass(frozen=True)
class Part:
    """One source and the good rows of it that are used; `held_out` are those of a held-out split of its own."""

    wish: Wish
    source: Source
    reading: Reading
    rows: datasets.Dataset
    held_out: datasets.Dataset | None


@dataclass(frozen=True)
class Joined:
    """The rows of all parts. Of several they have the same columns and a `source`, and `row` counts through them all.

    `held_out` has one entry per part, like `rows`. `reading` is that of the first, in the words of all.
    """

    rows: list[datasets.Dataset]
    held_out: list[datasets.Dataset | None]
    reading: Reading
    description: str
    place: Place  # of a row that is trained on, by its `row`
    held_out_place: Place


def open_source(wish: Wish, wishes: Sequence[Wish], settings: DataSettings, verb: str) -> tuple[Source, Reading]:
    """The rows of one of the sources, and how they are to be read.

    Where another source has a file of the same name, the places of both are told with the folder.

    Raises UserError where it cannot be opened, a split has no rows, or no known shape fits.
    """
    own = dataclasses.replace(settings, dataset_name=wish.name)
    source = load_source(own, verb)
    for split, rows in (("", source.rows), ("held-out ", source.held_out_rows)):
        if rows is not None and len(rows) == 0:
            raise UserError(f"--dataset_name {source.description}: its {split}split has no rows")
    reading = find_reading(source.rows, own, verb)
    if source.held_out_rows is not None:
        check_labels(source.held_out_rows, reading.columns)
    names = _file_names(wish)
    if any(names & _file_names(other) for other in wishes if other != wish):
        path = Path(wish.name)
        folder = path if read_path(path).is_dir() else path.parent
        place, held_out_place = (_within(folder, place) for place in (source.place, source.held_out_place))
        unreadable = {
            reason: dataclasses.replace(lines, places=tuple(str(folder / place) for place in lines.places))
            for reason, lines in source.unreadable.items()
        }
        source = dataclasses.replace(source, place=place, held_out_place=held_out_place, unreadable=unreadable)
    return source, reading


def _file_names(wish: Wish) -> set[str]:
    path = read_path(wish.name)
    return {path.name} if path.is_file() else {file.name for file in path.rglob("*") if file.is_file()}


def _within(folder: Path, place: Place | None) -> Place | None:
    if place is None:
        return None
    return lambda index: str((folder.parent if place(index).startswith(f"{folder.name}[") else folder) / place(index))


def convert_enough(
    rows: datasets.Dataset, reading: Reading, wanted: int | None, num_proc: int | None = None
) -> datasets.Dataset:
    """The rows converted, good and bad; where `wanted` good ones are enough, hardly more of the source than that."""
    size = len(rows) if wanted is None or reading.layout.pairs_up else min(len(rows), 2 * wanted)
    while True:
        converted = convert_rows(rows if size == len(rows) else rows.select(range(size)), reading, num_proc)
        if size == len(rows) or _count_good(converted) >= wanted:
            return converted
        size = min(len(rows), 2 * size)


def _count_good(converted: datasets.Dataset) -> int:
    return converted.select_columns(["reason"]).with_format("arrow")[:]["reason"].null_count


def join_parts(parts: Sequence[Part]) -> Joined:
    """The rows of all parts, written in one way.

    Raises UserError where their kinds cannot be mixed.
    """
    if len(parts) == 1:
        (part,) = parts
        places = part.source.place, part.source.held_out_place or part.source.place
        return Joined([part.rows], [part.held_out], part.reading, part.source.description, *places)
    is_text = {part.reading.is_text for part in parts}
    if len(is_text) > 1 and any(part.reading.shape.prompt_may_be_empty for part in parts):
        raise UserError("--dataset_name: whole texts (format text) and messages cannot be mixed; train on one of them")
    with_own = [part for part in parts if part.held_out is not None]
    tables = [part.rows for part in parts] + [part.held_out for part in with_own]
    names = [part.wish.name for part in (*parts, *with_own)]
    places = [part.source.place for part in parts] + [part.source.held_out_place for part in with_own]
    sizes = [len(part.source.rows) for part in parts] + [len(part.source.held_out_rows) for part in with_own]
    starts = list(accumulate(sizes, initial=0))[:-1]
    aligned = align(tables, names, starts, to_messages=len(is_text) > 1)
    own_held_out = iter(aligned[len(parts) :])
    shape = next((part.reading.shape for part in parts if not part.reading.is_transcript), parts[0].reading.shape)
    reading = dataclasses.replace(
        parts[0].reading,
        name="mixed",
        description=_describe_mixture(parts, len(is_text) > 1),
        shape=dataclasses.replace(shape, is_text=is_text == {True}),
        remarks=tuple(remark for part in parts for remark in part.reading.remarks),
    )
    place = MixedPlaces(starts, places)
    return Joined(
        rows=aligned[: len(parts)],
        held_out=[None if part.held_out is None else next(own_held_out) for part in parts],
        reading=reading,
        description=" + ".join(part.wish.written for part in parts),
        place=place,
        held_out_place=place,
    )


def _describe_mixture(parts: Sequence[Part], mixes_kinds: bool) -> str:
    how = "; texts become messages, a user's turn and a reply" if mixes_kinds else ""
    return f"{len(parts)} sources{how}"


def split_joined(joined: Joined, validation_split: str | None, seed: int) -> Split:
    """Parts with a held-out split of their own keep it; the others are split together.

    Raises UserError where nothing can be held out.
    """
    together = [rows for rows, own in zip(joined.rows, joined.held_out, strict=True) if own is None]
    with_own = [(rows, own) for rows, own in zip(joined.rows, joined.held_out, strict=True) if own is not None]
    splits = []
    if together:
        splits.append(split_rows(_concatenate(together), None, validation_split, seed))
    if with_own:
        rows, own = (_concatenate(tables) for tables in zip(*with_own, strict=True))
        splits.append(split_rows(rows, own, validation_split, seed))
    return join_splits(splits)


def _concatenate(tables: Sequence[datasets.Dataset]) -> datasets.Dataset:
    return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(list(tables))
