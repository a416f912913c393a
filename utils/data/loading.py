"""The data's way from where it is to pairs: read, converted, checked, split; and the same for demonstrations (sft)."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from utils.data.checks import CheckedRows, check_rows, has_good_rows
from utils.data.conversion import convert_rows
from utils.data.places import Place
from utils.data.schemas import Reading, check_effects, find_reading
from utils.data.sources import Source, load_source
from utils.data.splitting import split_rows
from utils.errors import UserError, gather
from utils.settings import DataSettings

# Columns that say where a row is from or how it was rated, not what it says.
UNSAID = {"row", "source", "chosen_score", "rejected_score"}


@dataclass(frozen=True)
class PreferenceData:
    """What a run trains and evaluates on. `fingerprint` depends on the rows alone, not on where they were read."""

    train: datasets.Dataset
    held_out: datasets.Dataset | None
    reading: Reading
    source: str
    dropped: dict[str, int]
    shared_prompts: int
    fingerprint: str
    place: Place  # of a row that is trained on, by its `row`
    held_out_place: Place


def load_pairs(settings: DataSettings, verb: str, seed: int) -> PreferenceData:
    """Read, convert, check and split the data for `verb` (train: pairs; sft: prompts and completions).

    `max_samples` holds for the training split and for a held-out split of its own.

    Raises UserError with every fault of the rows of both splits.
    """
    source = load_source(settings, verb)
    for split, rows in (("", source.rows), ("held-out ", source.held_out_rows)):
        if rows is not None and len(rows) == 0:
            raise UserError(f"--dataset_name {source.description}: its {split}split has no rows")
    reading = find_reading(source.rows, settings, verb)
    check_effects([reading], settings)
    checked, held_out = gather(
        lambda: read_good_rows(source.rows, reading, source.place, settings),
        lambda: _read_held_out(source, reading, settings),
    )
    dropped = Counter(source.dropped) + Counter(checked.dropped) + Counter(held_out.dropped if held_out else {})
    split = split_rows(checked.rows, held_out.rows if held_out else None, settings.validation_split, seed)
    return PreferenceData(
        train=split.train,
        held_out=split.held_out,
        reading=reading,
        source=source.description,
        dropped=dict(dropped),
        shared_prompts=split.shared_prompts,
        fingerprint=fingerprint_rows(split.train, split.held_out),
        place=source.place,
        held_out_place=source.held_out_place or source.place,
    )


def read_good_rows(
    rows: datasets.Dataset, reading: Reading, place: Place, settings: DataSettings, flag: str = "--dataset_name"
) -> CheckedRows:
    """The converted good rows. With --max_samples, no more of the source is converted than is needed for them."""
    wanted = settings.max_samples
    size = len(rows) if wanted is None or reading.layout.pairs_up else min(len(rows), 2 * wanted)
    while True:
        converted = convert_rows(rows if size == len(rows) else rows.select(range(size)), reading)
        if size == len(rows) or has_good_rows(converted, wanted):
            return check_rows(converted, place, settings.on_bad_rows, wanted, flag)
        size = min(len(rows), 2 * size)


def _read_held_out(source: Source, reading: Reading, settings: DataSettings) -> CheckedRows | None:
    if source.held_out_rows is None:
        return None
    return read_good_rows(source.held_out_rows, reading, source.held_out_place, settings, "--validation_split")


def fingerprint_rows(train: datasets.Dataset, held_out: datasets.Dataset | None) -> str:
    """A hash of what the rows of both sides say, in order: the same for the same rows from any file or cache."""
    digest = hashlib.sha256()
    for side in (train, held_out):
        digest.update(b"side")
        if side is None:
            continue
        columns = sorted(set(side.column_names) - UNSAID)
        for batch in side.select_columns(columns).with_format("arrow").iter(batch_size=1000):
            for name in columns:
                digest.update(name.encode())
                _hash_values(digest, batch.column(name).combine_chunks())
    return digest.hexdigest()[:32]


def _hash_values(digest: hashlib._Hash, values: pa.Array) -> None:
    """Add texts, or lists of messages, without turning them into Python objects: lengths first, then contents."""
    digest.update(pc.is_null(values).to_numpy(zero_copy_only=False).tobytes())
    if pa.types.is_list(values.type):
        digest.update(pc.list_value_length(values).fill_null(0).to_numpy().tobytes())
        _hash_values(digest, values.flatten())
    elif pa.types.is_struct(values.type):
        for column in values.flatten():
            _hash_values(digest, column)
    else:
        texts = values.cast(pa.large_binary()).fill_null(b"")
        digest.update(pc.binary_length(texts).to_numpy().tobytes())
        digest.update(b"".join(texts.to_pylist()))
