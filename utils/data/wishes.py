"""What --dataset_name names: which sources, how much of each, and whether they are there; reads none of them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..run.paths import is_there, read_path

KINDS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Wish:
    """One source of --dataset_name: how much of it is wanted, as a share of its pairs or their number (None: all)."""

    name: str
    share: float | None = None
    count: int | None = None

    @property
    def written(self) -> str:
        """As the person wrote it."""
        amount = self.share if self.share is not None else self.count
        return self.name if amount is None else f"{self.name}:{amount:g}"


def read_wishes(dataset_name: str) -> list[Wish]:
    """The sources that --dataset_name lists: "a.jsonl,b:0.3,c:5000".

    A name that exists as it is written is one source. Raises UserError for what is neither a share nor a count, and
    for a source that stands twice.
    """
    if is_there(dataset_name):
        return [Wish(dataset_name)]
    items = [item.strip() for item in dataset_name.split(",")]
    if "" in items:
        raise UserError(f"--dataset_name {dataset_name}: a name is missing next to a comma")
    wishes = [_read_wish(item) for item in items]
    names = [wish.name for wish in wishes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(*(f"--dataset_name names {name} twice; name each source once" for name in twice))
    return wishes


def source_names(dataset_name: str) -> list[str]:
    """The names of the sources alone; none where two are the same, which reading them reports."""
    try:
        return [wish.name for wish in read_wishes(dataset_name)]
    except UserError:
        return []


def _read_wish(item: str) -> Wish:
    name, colon, amount = item.rpartition(":")
    if not colon or not name or is_there(item):
        return Wish(item)
    try:
        number = float(amount)
    except ValueError:
        return Wish(item)
    flag = f"--dataset_name {item}"
    if amount.isdigit() and number > 1:
        return Wish(name, count=int(amount))
    if amount == "1":
        raise UserError(f"{flag}: leave out :1 to take all of {name} (a whole number is a number of pairs)")
    if not 0 < number <= 1:
        raise UserError(f"{flag}: the number after the colon is a share of its pairs (0.3) or a count (5000)")
    return Wish(name, share=number)


def file_kind(path: Path) -> str | None:
    """json, csv or parquet by the file's ending (a .gz after .json or .jsonl included), else None."""
    name = path.name.lower()
    kind = KINDS.get(Path(name.removesuffix(".gz")).suffix)
    return None if name.endswith(".gz") and kind != "json" else kind


def is_local(name: str) -> bool:
    """Whether a dataset name means a path, which is then never looked up on the hub."""
    looks_local = name.startswith(("./", "../", "/", "~", ".\\")) or name in (".", "..") or file_kind(Path(name))
    return bool(looks_local) or is_there(name)


def describe_missing(name: str, path: Path) -> str:
    """The fault of a name that is nowhere, with what was perhaps meant."""
    folder = path.parent
    if not is_there(folder) or not folder.is_dir():
        return f"--dataset_name {name}: no such file or folder (the folder {folder} does not exist either)"
    data = sorted(item.name for item in folder.iterdir() if item.is_dir() or file_kind(item))
    near = difflib.get_close_matches(path.name, data, n=3, cutoff=0.5)
    if near:
        return f"--dataset_name {name}: no such file or folder; did you mean {' or '.join(near)}?"
    files = [item for item in data if file_kind(Path(item))]
    listed = f"data files in {folder}: {', '.join(files[:8])}" if files else f"there is no data file in {folder}"
    return f"--dataset_name {name}: no such file or folder; {listed}"


def check_there(dataset_name: str) -> None:
    """Refuses sources that name a file or folder which is not there.

    Raises:
        UserError: with one fault for each.
    """
    missing = [name for name in source_names(dataset_name) if is_local(name) and not is_there(name)]
    if missing:
        raise UserError(*(describe_missing(name, read_path(name)) for name in missing))
