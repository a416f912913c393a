"""The way of the data from where it is to pairs: read -> convert -> check -> draw -> join -> split, a function each.

All but the last two take one `Part`, a split of a source, and return it further on its way. What is drawn is drawn
from each source by itself, before they are joined: there its rows still say what they say in it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from ..errors import UserError, gather
from ..run.paths import read_path
from ..runtime import say
from ..settings.data import DataSettings
from .conversion import convert_rows
from .labels import check_labels
from .mixing import MixedPlaces, align, draw_positions
from .places import SHOWN, Place, describe_all_bad, describe_skipped, stops
from .ranking import LEFT_OUT
from .row_cache import flatten_rows
from .schemas import Reading, find_reading
from .sources import Source, load_source
from .splitting import Split, join_splits, split_rows
from .wishes import Wish

POSITION = "position"  # column: the index of a row in use among those of all parts


@dataclass(frozen=True)
class Part:
    """One split of one source: its rows, which of them are in use, and why the others are not.

    `rows` are as they were found, then converted. `good` and `bad` (by reason) are positions in them, known once they
    are checked; of a training split `good` are then those that were drawn, and `found` is how many there were.
    """

    wish: Wish
    source: Source
    reading: Reading
    rows: datasets.Dataset
    is_held_out: bool = False  # a held-out split that the source has of its own
    good: np.ndarray | None = None
    bad: Mapping[str, np.ndarray] = field(default_factory=dict)
    found: int = 0

    @property
    def place(self) -> Place:
        """The place (file and line) of a row, by its `row`."""
        return self.source.held_out_place if self.is_held_out else self.source.place

    @property
    def found_rows(self) -> datasets.Dataset:
        """The rows of the split as they were found."""
        return self.source.held_out_rows if self.is_held_out else self.source.rows

    @property
    def pairs(self) -> datasets.Dataset:
        """The rows in use."""
        rows = self.rows if len(self.good) == len(self.rows) else self.rows.select(self.good)
        return rows.remove_columns("reason")

    @property
    def dropped(self) -> Counter[str]:
        """Reason -> how many rows hold no pair for it."""
        return Counter({reason: len(positions) for reason, positions in self.bad.items()})

    def find_place(self, position: int) -> str:
        """Where the converted row at a position is found."""
        return self.place(self.rows[int(position)]["row"])


@dataclass(frozen=True)
class Joined:
    """The rows in use of all sources. Of several they have the same columns and a `source`, and `row` counts through
    them all.

    `held_out` has one entry per source, like `rows`. `reading` is that of the first, in the words of all.
    """

    rows: list[datasets.Dataset]
    held_out: list[datasets.Dataset | None]
    reading: Reading
    description: str
    place: Place  # of a row that is trained on, by its `row`
    held_out_place: Place


def read_parts(wish: Wish, wishes: Sequence[Wish], settings: DataSettings, verb: str) -> list[Part]:
    """The training split of one of the sources, then the held-out split where it has one of its own; nothing is
    converted yet.

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
        source = _tell_folder(source, Path(wish.name))
    part = Part(wish, source, reading, source.rows)
    if source.held_out_rows is None:
        return [part]
    return [part, dataclasses.replace(part, rows=source.held_out_rows, is_held_out=True)]


def _file_names(wish: Wish) -> set[str]:
    path = read_path(wish.name)
    return {path.name} if path.is_file() else {file.name for file in path.rglob("*") if file.is_file()}


def _tell_folder(source: Source, path: Path) -> Source:
    """The source with the folder in its places."""
    folder = path if read_path(path).is_dir() else path.parent
    unreadable = {
        reason: dataclasses.replace(lines, places=tuple(str(folder / place) for place in lines.places))
        for reason, lines in source.unreadable.items()
    }
    place, held_out_place = (_within(folder, place) for place in (source.place, source.held_out_place))
    return dataclasses.replace(source, place=place, held_out_place=held_out_place, unreadable=unreadable)


def _within(folder: Path, place: Place | None) -> Place | None:
    if place is None:
        return None
    return lambda index: str((folder.parent if place(index).startswith(f"{folder.name}[") else folder) / place(index))


def take_parts(wishes: Sequence[Wish], take: Callable[[Wish], list[Part]]) -> list[Part]:
    """What `take` makes of each source, all training splits first.

    Raises UserError with the faults of all sources.
    """
    taken = gather(*(partial(take, wish) for wish in wishes))
    return sorted((part for parts in taken for part in parts), key=lambda part: part.is_held_out)


def convert_part(part: Part, wanted: int | None, num_proc: int | None = None) -> Part:
    """The rows in the one shape, good and bad; where `wanted` good ones are enough, hardly more of the source."""
    rows = part.rows
    size = len(rows) if wanted is None or part.reading.layout.pairs_up else min(len(rows), 2 * wanted)
    while True:
        converted = convert_rows(rows if size == len(rows) else rows.select(range(size)), part.reading, num_proc)
        if size == len(rows) or _reasons(converted).null_count >= wanted:
            return dataclasses.replace(part, rows=converted)
        size = min(len(rows), 2 * size)


def _reasons(converted: datasets.Dataset) -> pa.ChunkedArray:
    return converted.select_columns(["reason"]).with_format("arrow")[:]["reason"]


def check_part(part: Part, on_bad_rows: str, wanted: int | None = None) -> Part:
    """Which of the converted rows are good, the first `wanted` of them, and why the others are not; rows behind the
    last one wanted are not looked at.

    Raises UserError, one line per reason, for bad rows, unless they are skipped: with "skip" always, with "skip_few"
    where they are fewer than 1% of the rows, which is then said in a line. Rows that are left out on
    purpose (ties, say) are counted and never an error.
    """
    reasons = _reasons(part.rows)
    good = np.flatnonzero(reasons.is_null().to_numpy())
    rows = part.rows
    if wanted is not None and len(good) >= wanted:
        good = good[:wanted]
        rows, reasons = rows.select(range(int(good[-1]) + 1)), reasons[: int(good[-1]) + 1]
    bad: dict[str, list[int]] = {}
    positions = np.flatnonzero(reasons.is_valid().to_numpy())
    for position, reason in zip(positions.tolist(), reasons.drop_null().to_pylist(), strict=True):
        bad.setdefault(reason, []).append(position)
    found = {reason: np.array(at) for reason, at in bad.items()}
    part = dataclasses.replace(part, rows=rows, good=good, bad=found, found=len(good))
    faults = {reason: at for reason, at in found.items() if reason not in LEFT_OUT}
    counts = {reason: len(at) for reason, at in faults.items()}
    if stops(sum(counts.values()), len(rows), on_bad_rows):
        raise UserError(*describe_all_bad(faults, part.find_place))
    if faults and on_bad_rows == "skip_few":
        places = {reason: [part.find_place(at) for at in found[:SHOWN]] for reason, found in faults.items()}
        say(describe_skipped(places, counts, len(rows)))
    return part


def draw_part(part: Part, seed: int) -> Part:
    """The part with as many good rows as are wished of its source; a held-out split is used whole.

    Raises UserError where there are fewer.
    """
    if part.is_held_out:
        return part
    return dataclasses.replace(part, good=part.good[draw_positions(part.pairs, part.wish, seed)])


def join_parts(parts: Sequence[Part], numbered: bool = False) -> Joined:
    """The rows in use of all parts, which are those of `take_parts`, written in one way.

    `numbered`: they get a column `position`, which counts them through all parts.

    Raises UserError where their kinds cannot be mixed.
    """
    trained = [part for part in parts if not part.is_held_out]
    mixes_kinds = len({part.reading.is_text for part in trained}) > 1
    if mixes_kinds and any(part.reading.shape.prompt_may_be_empty for part in trained):
        raise UserError("--dataset_name: whole texts (format text) and messages cannot be mixed; train on one of them")
    tables = [part.pairs for part in parts]
    if numbered:
        tables = _number_rows(tables)
    source = trained[0].source
    reading, description = trained[0].reading, source.description
    place, held_out_place = source.place, source.held_out_place or source.place
    if len(trained) > 1:
        reading, description = _join_readings(trained, mixes_kinds), " + ".join(part.wish.written for part in trained)
        starts = list(accumulate((len(part.found_rows) for part in parts), initial=0))[:-1]
        tables = align(tables, [part.wish.name for part in parts], starts, to_messages=mixes_kinds)
        place = held_out_place = MixedPlaces(starts, [part.place for part in parts])
    own = {part.wish: table for part, table in zip(parts, tables, strict=True) if part.is_held_out}
    rows = tables[: len(trained)]
    return Joined(rows, [own.get(part.wish) for part in trained], reading, description, place, held_out_place)


def _number_rows(tables: Sequence[datasets.Dataset]) -> list[datasets.Dataset]:
    starts = accumulate(map(len, tables), initial=0)
    return [
        flatten_rows(table).add_column(POSITION, np.arange(start, start + len(table)))
        for table, start in zip(tables, starts, strict=False)
    ]


def _join_readings(parts: Sequence[Part], mixes_kinds: bool) -> Reading:
    shape = next((part.reading.shape for part in parts if not part.reading.is_transcript), parts[0].reading.shape)
    how = "; texts become messages, a user's turn and a reply" if mixes_kinds else ""
    return dataclasses.replace(
        parts[0].reading,
        name="mixed",
        description=f"{len(parts)} sources{how}",
        shape=dataclasses.replace(shape, is_text=all(part.reading.is_text for part in parts)),
        remarks=tuple(remark for part in parts for remark in part.reading.remarks),
    )


def split_joined(joined: Joined, validation_split: str | None, seed: int) -> Split:
    """Sources with a held-out split of their own keep it; the others are split together.

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
