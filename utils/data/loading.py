"""The data's way from where it is to pairs: read, converted, checked, split; and the same for demonstrations (sft)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError, gather
from ..settings.data import DataSettings
from .calls import EXTRA
from .files import quiet
from .identity import read_pair_ids
from .mixing import count_repeated
from .parts import Part, check_part, convert_part, draw_part, join_parts, read_parts, split_joined, take_parts
from .places import Place, describe_nothing_left
from .row_cache import flatten_rows
from .schemas import Reading, check_effects
from .sources import find_evaluation_split, load_source, load_streams
from .splitting import SPARE, Split, count_shared_prompts
from .streaming import place_of, read_stream
from .wishes import Wish, read_wishes

# Columns that say where a row is from or how it was rated, not what it says.
UNSAID = {"row", "id", "source", "chosen_score", "rejected_score"}


@dataclass(frozen=True)
class SourceCounts:
    """What one source brought. `good`: its usable rows to train on or to hold out; `drawn`: those of them in use."""

    name: str
    reading: str
    good: int
    drawn: int
    train: int
    held_out: int
    repeated: int  # rows that a source before it has too
    dropped: dict[str, int]


@dataclass(frozen=True)
class PreferenceData:
    """What a run trains and evaluates on. `fingerprint` depends on the rows alone, not on where they were read.

    Of several sources the rows have a `source`, and `reading` is that of the first, in the words of all.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset | None
    reading: Reading
    source: str
    dropped: dict[str, int]
    shared_prompts: int
    fingerprint: str
    place: Place  # of a row that is trained on, by its `row`
    held_out_place: Place
    sources: tuple[SourceCounts, ...] = ()


def load_pairs(
    settings: DataSettings, verb: str, seed: int, num_proc: int | None = None, wanted: int | None = None
) -> PreferenceData:
    """Read, convert, check and split the data for `verb` (train: pairs; sft: prompts and completions).

    `max_samples` holds for the training split and for a held-out split of its own, of each source. `num_proc`
    processes share the work. `wanted` rows are read to train on with --streaming.

    Raises UserError with every fault of the rows of both splits of all sources.
    """
    if not settings.dataset_name:
        load_source(settings, verb)  # says what is missing
    wishes = read_wishes(settings.dataset_name)
    if settings.streaming:
        return _load_stream(wishes, settings, verb, seed, wanted)
    parts = take_parts(wishes, lambda wish: _take_good(wish, wishes, settings, verb, seed, num_proc))
    return _join_and_split(parts, settings, seed)


def load_unsplit_pairs(settings: DataSettings, seed: int) -> PreferenceData:
    """All good pairs of the split that is made for evaluation, else of the one that training would read, as `train`.

    Raises UserError as `load_pairs` does.
    """
    wishes = read_wishes(settings.dataset_name)
    settings = dataclasses.replace(settings, validation_split="none")

    def take(wish: Wish) -> list[Part]:
        split = find_evaluation_split(dataclasses.replace(settings, dataset_name=wish.name))
        return _take_good(wish, wishes, dataclasses.replace(settings, dataset_split=split), "train", seed)

    return _join_and_split(take_parts(wishes, take), settings, seed)


def _take_good(
    wish: Wish, wishes: Sequence[Wish], settings: DataSettings, verb: str, seed: int, num_proc: int | None = None
) -> list[Part]:
    """The parts of one source. Raises UserError with every fault of the rows of both splits."""

    def check(part: Part) -> Part:
        part = convert_part(part, settings.max_samples, num_proc)
        part = check_part(part, settings.on_bad_rows, settings.max_samples)
        if not len(part.good):
            flag = f"--dataset_name {wish.name}" if len(wishes) > 1 else "--dataset_name"
            raise UserError(describe_nothing_left("--validation_split" if part.is_held_out else flag, part.dropped))
        return part

    parts = gather(*(partial(check, part) for part in read_parts(wish, wishes, settings, verb)))
    return [draw_part(part, seed) for part in parts]


def _join_and_split(parts: Sequence[Part], settings: DataSettings, seed: int) -> PreferenceData:
    trained = [part for part in parts if not part.is_held_out]
    check_effects([part.reading for part in trained], settings)
    joined = join_parts(parts)
    split = split_joined(joined, settings.validation_split, seed)
    repeated = count_repeated(joined.rows) if len(trained) > 1 else [0]
    sources = [_count_source(part, parts, number, split) for part, number in zip(trained, repeated, strict=True)]
    dropped = sum((Counter(source.dropped) for source in sources), Counter({SPARE: split.spare}))
    return PreferenceData(
        train=split.train,
        held_out=split.held_out and add_ids(split.held_out),
        reading=joined.reading,
        source=joined.description,
        dropped={reason: count for reason, count in dropped.items() if count},
        shared_prompts=split.shared_prompts,
        fingerprint=fingerprint_rows(split.train, split.held_out),
        place=joined.place,
        held_out_place=joined.held_out_place,
        sources=tuple(sources),
    )


def _count_source(part: Part, parts: Sequence[Part], repeated: int, split: Split) -> SourceCounts:
    """What the source of a training split brought, with its held-out split if it has one."""

    def count(side: datasets.Dataset | None) -> int:
        if side is None:
            return 0
        return sum(name == part.wish.name for name in side["source"]) if "source" in side.column_names else len(side)

    own = (other.dropped for other in parts if other.wish == part.wish)
    return SourceCounts(
        name=part.wish.written,
        reading=part.reading.description,
        good=part.found,
        drawn=len(part.good),
        train=count(split.train),
        held_out=count(split.held_out),
        repeated=repeated,
        dropped=dict(sum(own, Counter(part.source.dropped))),
    )


def _load_stream(
    wishes: Sequence[Wish], settings: DataSettings, verb: str, seed: int, wanted: int | None
) -> PreferenceData:
    if wanted is None:
        raise UserError("--streaming: needs --max_steps, which says how much is read")
    if len(wishes) > 1 or wishes[0] != Wish(wishes[0].name):
        raise UserError("--streaming: reads all of one source; name one, without a number, or leave --streaming out")
    stream, own_held_out = load_streams(settings, verb)
    read = read_stream(stream, own_held_out, settings, verb, seed, wanted)
    amount = "all" if read.exhausted else "the first"
    counts = SourceCounts(
        name=wishes[0].name,
        reading=read.reading.description,
        good=len(read.train) + len(read.held_out or ()),
        drawn=len(read.train) + len(read.held_out or ()),
        train=len(read.train),
        held_out=len(read.held_out or ()),
        repeated=0,
        dropped=read.dropped,
    )
    label = own_held_out.label if own_held_out else stream.label
    return PreferenceData(
        train=read.train,
        held_out=read.held_out and add_ids(read.held_out),
        reading=read.reading,
        source=f"{stream.label}, streamed ({amount} {read.rows_read:,} rows)",
        dropped=read.dropped,
        shared_prompts=count_shared_prompts(read.train, read.held_out) if own_held_out or settings.group_by else 0,
        fingerprint=fingerprint_rows(read.train, read.held_out),
        place=partial(place_of, stream.label),
        held_out_place=partial(place_of, label),
        sources=(counts,),
    )


def add_ids(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with `id`, 16 characters that name what each says, wherever it was read."""
    with quiet(0):
        return flatten_rows(rows).add_column("id", list(read_pair_ids(rows)))


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
        for name, column in zip(values.type.names, values.flatten(), strict=True):
            if name != EXTRA or column.null_count < len(column):  # of turns with text alone nothing more is said
                _hash_values(digest, column)
    else:
        texts = values.cast(pa.large_binary()).fill_null(b"")
        digest.update(pc.binary_length(texts).to_numpy().tobytes())
        _, offsets, contents = texts.buffers()
        if len(texts) and contents is not None:
            borders = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
            digest.update(memoryview(contents)[borders[0] : borders[-1]])
