"""Where the rows come from: a hub dataset, a folder or a file, all of it at once or as a stream."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from ..errors import UserError, gather, in_one_line
from ..run.manifests import hash_file
from ..run.paths import is_there, read_path
from ..runtime import say
from ..settings.data import DataSettings
from .exact import check_texts, describe_changed_texts, find_changed_texts
from .files import FileRows, Unreadable, quiet, read_files, stream_files
from .hub import describe_config_fault, load_hub, open_hub
from .opening import check_start, check_unpacked
from .places import Place, row_places
from .row_cache import keep_rows, make_key, name_by_content
from .split_names import HELD_OUT_NAMES, Collection, ReadSplit, held_out_split, training_split
from .untrusted import check_data_folder, check_reader
from .wishes import describe_missing, file_kind, is_local

ENDINGS = ".jsonl[.gz], .json[.gz], .csv or .parquet"
LONGEST_HUB_NAME = 200
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


@dataclass(frozen=True)
class Source:
    """The rows as they are: nothing converted or checked yet.

    `held_out_rows` is there when the held-out data is a split of its own. `dropped` counts lines that hold no row.
    """

    rows: datasets.Dataset
    held_out_rows: datasets.Dataset | None
    description: str
    splits: tuple[str, ...]
    place: Place
    held_out_place: Place | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    unreadable: dict[str, Unreadable] = field(default_factory=dict)  # by the reasons of `dropped`


@dataclass(frozen=True)
class Stream:
    """Rows that are read one after the other, never all at once."""

    rows: datasets.IterableDataset
    label: str


def load_source(settings: DataSettings, verb: str) -> Source:
    """Read the training split and, where the held-out data is a split of its own, that one.

    Raises UserError when the data, the split or a readable row is missing, saying what exists.
    """
    if not settings.dataset_name:
        raise UserError(f"--dataset_name is missing: give a hub name, a folder, or a {ENDINGS} file")
    collection = _find_collection(settings)
    train = training_split(settings, verb, collection)
    held_out = held_out_split(settings, train, collection)
    main, other = gather(collection.find(train), (held_out and collection.find(held_out)) or (lambda: None))
    if other is not None and len(other.rows) == 0 and settings.validation_split is None:
        other = None
    dropped = dict(main.dropped)
    unreadable = dict(main.unreadable)
    for reason, count in (other.dropped if other else {}).items():
        dropped[reason] = dropped.get(reason, 0) + count
        unreadable[reason] = unreadable.get(reason, Unreadable()) + other.unreadable[reason]
    return Source(
        rows=main.rows,
        held_out_rows=other.rows if other else None,
        description=f"{settings.dataset_name} [{train}]",
        splits=tuple(collection.splits),
        place=main.place,
        held_out_place=other.place if other else None,
        dropped=dropped,
        unreadable=unreadable,
    )


def find_evaluation_split(settings: DataSettings) -> str | None:
    """The split that --dataset_split names, else one that the data has for evaluation; None for the one trained on.

    Raises UserError when the data is not there.
    """
    if settings.dataset_split is not None:
        return settings.dataset_split
    names = _find_collection(settings).splits
    return next((name for name in HELD_OUT_NAMES if name in names), None)


def load_streams(settings: DataSettings, verb: str) -> tuple[Stream, Stream | None]:
    """The training split and, where the held-out data is a split of its own, that one; no row of them is read yet.

    Raises UserError when the data or the split is missing, or cannot be streamed.
    """
    name, flag = settings.dataset_name, f"--dataset_name {settings.dataset_name}"
    path = read_path(name)
    if not is_local(name) and HUB_NAME.fullmatch(name):
        splits = load_hub(name, settings.dataset_config, streaming=True)
    elif not is_there(path):
        raise UserError(describe_missing(name, path))
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = _load_saved(path)  # of no rows the library can make no stream
        splits = {split: rows.to_iterable_dataset() if len(rows) else None for split, rows in saved.items()}
    elif path.is_file() and (file_kind(path) is None or set("*?[]") & set(str(path))):
        raise UserError(f"{flag}: cannot be streamed; use {ENDINGS}, without *, ?, [ or ] in the path")
    else:
        try:
            if path.is_dir():
                check_data_folder(flag, path)
            with quiet(0), tempfile.TemporaryDirectory() as scratch:  # a stream needs no cache, and makes its folder
                splits = {"train": stream_files([path], scratch)} if path.is_file() else _stream_folder(path, scratch)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{flag}: no data here that can be streamed ({in_one_line(error)}); use {ENDINGS}"
            ) from None
    label = name if not is_local(name) else path.name
    streams = {str(split): Stream(rows, f"{label}[{split}]") for split, rows in splits.items()}
    collection = Collection(streams)
    train = training_split(settings, verb, collection)
    held_out = held_out_split(settings, train, collection)
    if held_out and streams[held_out].rows is None and settings.validation_split is None:
        held_out = None
    used = [streams[split] for split in (train, held_out) if split]
    empty = [f"--dataset_name {stream.label}: has no rows" for stream in used if stream.rows is None]
    if empty:
        raise UserError(*empty)
    return streams[train], streams[held_out] if held_out else None


def _stream_folder(path: Path, scratch: str) -> Mapping[str, datasets.IterableDataset]:
    whole = str(path.resolve())
    files = datasets.load_dataset_builder(whole, cache_dir=scratch).config.data_files or {}
    splits = {split: [Path(file) for file in paths] for split, paths in files.items()}
    every_file = [file for paths in splits.values() for file in paths]
    kinds = set(map(file_kind, every_file))
    if len(kinds) != 1 or None in kinds or any(set("*?[]") & set(str(file)) for file in every_file):
        return datasets.load_dataset(whole, streaming=True, cache_dir=scratch)
    return {split: stream_files(paths, scratch) for split, paths in splits.items()}


def _find_collection(settings: DataSettings) -> Collection[ReadSplit]:
    name = settings.dataset_name
    if not is_local(name):
        if not HUB_NAME.fullmatch(name) or len(name) > LONGEST_HUB_NAME:
            raise UserError(describe_missing(name, Path(name)))
        return _from_splits(name, open_hub(name, settings.dataset_config))
    path = read_path(name)
    if not is_there(path):
        raise UserError(describe_missing(name, path))
    if path.is_dir():
        return _open_folder(path, settings)
    if file_kind(path) is None:
        raise UserError(f"--dataset_name {name}: not a supported type of file; use {ENDINGS}")
    if settings.dataset_config is not None:
        raise UserError(f"--dataset_config {settings.dataset_config}: {name} is a file and has no configurations")
    return Collection({"train": lambda: read_files([path], settings.on_bad_rows)})


def _open_folder(path: Path, settings: DataSettings) -> Collection[ReadSplit]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        if settings.dataset_config is not None:
            raise UserError(f"--dataset_config {settings.dataset_config}: {path} has no configurations")
        return _open_saved(path)
    flag = f"--dataset_name {settings.dataset_name}"
    check_data_folder(flag, path)
    try:
        with quiet(0):
            builder = _open_builder(path, settings.dataset_config)
        files = {str(split): [Path(p) for p in paths] for split, paths in (builder.config.data_files or {}).items()}
    except ValueError as error:
        raise UserError(describe_config_fault(settings.dataset_config, flag, error)) from None
    except Exception as error:  # what lies in a folder can make the library raise anything
        raise UserError(f"{flag}: no readable data here ({in_one_line(error)}); use {ENDINGS}") from None
    check_reader(flag, builder)
    _name_passed_over(path, [file for paths in files.values() for file in paths])
    kinds = {file_kind(file) for paths in files.values() for file in paths}
    if len(kinds) != 1 or None in kinds:
        _check_read_apart(flag, files)
        return Collection({split: _preparer(path, settings, split, paths) for split, paths in files.items()})

    def reader(paths: list[Path]) -> ReadSplit:
        return lambda: read_files(paths, settings.on_bad_rows)

    every_file = [file for paths in files.values() for file in paths]
    aliases = {file.name.partition(".")[0]: reader([file]) for file in every_file}
    return Collection({split: reader(paths) for split, paths in files.items()}, aliases)


def _name_passed_over(path: Path, read: Sequence[Path]) -> None:
    """Says which data files of a folder are not read: the library takes those of the commonest kind alone."""
    known = {file.resolve() for file in read}
    kinds = {file.suffix for file in known}
    others = [file for file in sorted(path.iterdir()) if file.is_file() and file_kind(file) is not None]
    missed = [file.name for file in others if file.suffix not in kinds and file.resolve() not in known]
    if missed:
        more = f" and {len(missed) - 3} more" if len(missed) > 3 else ""
        say(f"warning: {path}: {', '.join(missed[:3])}{more} not read: another file type than the folder's other data")


def _check_read_apart(flag: str, files: Mapping[str, list[Path]]) -> None:
    """Refuses files of text that the library alone would unpack: it may change texts as it reads them."""
    packed = [file for paths in files.values() for file in paths if file_kind(file) is None]
    for file in packed:
        if file_kind(file.with_suffix("")) in ("json", "csv"):
            raise UserError(f"{flag}: {file.name} is compressed in an unsupported way; unpack it, or use {ENDINGS}")


def _open_saved(path: Path) -> Collection[ReadSplit]:
    return _from_splits(path.name, _load_saved(path))


def _load_saved(path: Path) -> dict[str, datasets.Dataset]:
    """Split -> rows of a saved data set, empty ones too, known by what they hold and not by what its records say."""
    check_data_folder(f"--dataset_name {path}", path)
    try:
        if not (path / "dataset_dict.json").is_file():
            return {"train": _load_saved_split(path)}
        names = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return {name: _load_saved_split(path / name) for name in names}
    except Exception as error:
        raise UserError(f"--dataset_name {path}: cannot be read as a saved dataset ({in_one_line(error)})") from None


def _load_saved_split(folder: Path) -> datasets.Dataset:
    if json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]:
        rows = datasets.load_from_disk(str(folder)).with_format(None)  # it may have been saved as tensors
    else:  # of which the library can read no table
        features = datasets.DatasetInfo.from_directory(str(folder)).features or datasets.Features()
        rows = datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    name_by_content(rows)
    return rows


def _open_builder(path: Path, config: str | None, cache: Path | None = None) -> datasets.DatasetBuilder:
    """The library's reader of a folder. It makes its cache's folder at once: one that goes, where none is given."""
    with tempfile.TemporaryDirectory() as scratch:
        return datasets.load_dataset_builder(str(path.resolve()), name=config, cache_dir=str(cache or scratch))


def _preparer(path: Path, settings: DataSettings, split: str, files: Sequence[Path]) -> ReadSplit:
    """Reads a split of a folder through the library, whatever kinds of files it has."""

    def make(folder: Path) -> datasets.Dataset:
        builder = _open_builder(path, settings.dataset_config, folder)
        builder.download_and_prepare()
        return builder.as_dataset(split)

    def read() -> FileRows:
        try:
            for file in files:
                check_start(file)
                check_unpacked(file)
            records = [path / name for name in ("README.md", ".huggingface.yaml", "dataset_infos.json")]
            known = [(file.name, hash_file(file)) for file in (*files, *(file for file in records if file.is_file()))]
            with quiet(0):
                rows = keep_rows(make_key(split, settings.dataset_config, known), make)
        except UserError:
            raise
        except Exception as error:
            said = in_one_line(error.__cause__ or error)
            raise UserError(f"--dataset_name {settings.dataset_name}: cannot be read ({said}); use {ENDINGS}") from None
        return _whole_split(path.name, split, rows)

    return read


def _from_splits(label: str, splits: Mapping[str, datasets.Dataset]) -> Collection[ReadSplit]:
    def reader(name: str, rows: datasets.Dataset) -> ReadSplit:
        return lambda: _whole_split(label, name, rows)

    return Collection({str(name): reader(str(name), rows) for name, rows in splits.items()})


def _whole_split(label: str, name: str, rows: datasets.Dataset) -> FileRows:
    """A split that the library read. Raises UserError where it changed texts, or has bytes that are no text."""
    column = find_changed_texts(rows)
    if column is not None:
        raise UserError(f"{label}[{name}]: {describe_changed_texts(column)}; give the files that it was read from")
    place = row_places(f"{label}[{name}]")
    check_texts(rows, place, f"--dataset_name {label} cannot be read")
    return FileRows(rows, place, {})
