"""Rows kept on the disk: found by what the data holds, checked before they are used, done without where need be."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shared.pairs import write_lines
from shared.runs import ROOT

from utils.data.code_hash import hash_code, modules_behind
from utils.data.loading import load_pairs
from utils.data.row_cache import cache_folder, keep_rows
from utils.errors import UserError
from utils.settings.data import DataSettings

COLUMNS = ("prompt", "chosen", "rejected")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_rows(count: int, swapped: bool = False) -> list[dict[str, str]]:
    sides = ("rejected", "chosen") if swapped else ("chosen", "rejected")
    return [{"prompt": f"question {i}", sides[0]: f"good {i}", sides[1]: f"ugly {i}"} for i in range(count)]


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    lines = "".join(json.dumps({name: row[name] for name in COLUMNS}) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows).select(COLUMNS), path, compression="none")
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode(), mtime=0))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text(lines)


def write_source(kind: str, path: Path, rows: list[dict[str, str]]) -> Path:
    """A data set of that kind at `path`, all of whose files say that they are of 1970."""
    if kind == "saved":
        shutil.rmtree(path, ignore_errors=True)
        table = datasets.Dataset.from_list(rows)
        table._fingerprint = "0123456789abcdef"  # kept, as by a tool that copies the state
        table.save_to_disk(str(path))
    elif kind == "folder of files":
        path.mkdir(exist_ok=True)
        write_table(path / "train.jsonl", rows)
    elif kind == "folder that the library reads":
        path.mkdir(exist_ok=True)
        (path / "train").mkdir(exist_ok=True)
        for name, part in (("a", rows[:10]), ("b", rows[10:])):
            table = pa.Table.from_pylist(part)
            with pa.ipc.new_stream(str(path / "train" / f"{name}.arrow"), table.schema) as stream:
                stream.write_table(table)
    else:
        path = path.with_name(path.name + kind)
        write_table(path, rows)
    for file in [path, *path.rglob("*")]:
        os.utime(file, (1, 1))
    return path


def read(path: Path, **settings) -> tuple[list[tuple[str, ...]], str]:
    """All rows of a data set, and their fingerprint."""
    data = load_pairs(DataSettings(dataset_name=str(path), **settings), "train", 0)
    rows = [*data.train, *data.held_out]
    return sorted(tuple(row[name] for name in COLUMNS) for row in rows), data.fingerprint


def expected(rows: list[dict[str, str]]) -> list[tuple[str, ...]]:
    return sorted(tuple(row[name] for name in COLUMNS) for row in rows)


@pytest.mark.parametrize(
    "kind",
    [".jsonl", ".json", ".jsonl.gz", ".csv", ".parquet", "folder of files", "folder that the library reads", "saved"],
)
def test_what_a_file_holds_decides_and_not_its_date(kind, tmp_path):
    fingerprints = set()
    for rows in (make_rows(40), make_rows(40, swapped=True), make_rows(30, swapped=True)):
        path = write_source(kind, tmp_path / "data", rows)
        for _ in range(2):
            found, fingerprint = read(path)
            assert found == expected(rows)
        fingerprints.add(fingerprint)
    assert len(fingerprints) == 3


def test_a_run_is_not_resumed_on_other_rows_of_the_same_date(run_script, tiny_model, tmp_path):
    path = write_source(".jsonl", tmp_path / "data", make_rows(40))
    train = (
        "--model_name_or_path",
        tiny_model,
        "--dataset_name",
        path,
        "--output_dir",
        tmp_path / "run",
        "--save_steps",
        1,
    )
    assert run_script(*train, "--max_steps", 1)[0] == 0
    write_source(".jsonl", tmp_path / "data", make_rows(40, swapped=True))
    code, _, err = run_script(*train, "--max_steps", 2, "--resume_from_checkpoint", "auto")
    assert code == 2
    assert "data" in err
    assert "--allow_changes" in err


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def exchange_columns(path: Path) -> None:
    if path.suffix == ".arrow":
        with pa.ipc.open_stream(str(path)) as stream:
            table = stream.read_all()
        names = [{"chosen": "rejected", "rejected": "chosen"}.get(name, name) for name in table.column_names]
        with pa.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table.rename_columns(names).select(table.column_names))
    else:
        path.unlink()


DAMAGES = {
    "flipped": flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "lost": Path.unlink,
    "a folder": put_folder,
    "columns exchanged": exchange_columns,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entries_are_made_again_with_a_line_each(damage, tmp_path, capsys):
    path = write_source(".jsonl", tmp_path / "data", make_rows(40))
    sound = read(path)
    capsys.readouterr()
    files = [file for file in cache_folder().rglob("*") if file.is_file()]
    assert {file.name for file in files} == {"rows-00000.arrow", "entry.json"}
    for file in files:
        DAMAGES[damage](file)
        assert read(path) == sound
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 1, file
        assert "are damaged" in said[0]
        assert file.parent.name in said[0]
        assert read(path) == sound
        assert capsys.readouterr().out == ""


def test_a_file_in_the_place_of_an_entry_is_replaced(tmp_path, capsys):
    path = write_source(".jsonl", tmp_path / "data", make_rows(40))
    sound = read(path)
    for entry in cache_folder().iterdir():
        shutil.rmtree(entry)
        entry.write_text("?")
    assert read(path) == sound
    assert all(entry.is_dir() for entry in cache_folder().iterdir())


@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "EROFS", "EACCES", "EDQUOT"])
@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename", "hash"])
def test_a_cache_that_cannot_be_used_costs_time_alone(call, code, tmp_path, monkeypatch, capsys):
    path = write_source(".jsonl", tmp_path / "data", make_rows(40))
    cache = str(tmp_path / "cache")
    calls = {"mkdir": ["mkdir"], "fsync": ["fsync"], "rename": ["rename", "replace"], "hash": []}[call]

    def failing(real):
        def call_it(target, *rest, **options):
            name = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
            if name.startswith(cache):
                raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), name)
            return real(target, *rest, **options)

        return call_it

    sound = read(path)
    if call != "hash":
        shutil.rmtree(cache)
    for name in calls:
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    if call == "hash":
        from utils.data import row_cache

        monkeypatch.setattr(row_cache, "hash_file", failing(row_cache.hash_file))
    assert read(path) == sound
    said = capsys.readouterr().out
    assert os.strerror(getattr(errno, code)) in said
    assert said.count("rows are prepared again at each start") == 1


def test_a_cache_whose_folder_is_a_file_is_done_without(run_script, tiny_model, tmp_path):
    path = write_source(".jsonl", tmp_path / "data", make_rows(40))
    (tmp_path / "cache").write_text("not a folder")
    train = ("--model_name_or_path", tiny_model, "--dataset_name", path, "--max_steps", 1, "--precompute_ref_log_probs")
    code, out, err = run_script(*train, "--output_dir", tmp_path / "run")
    assert code == 0, err
    assert out.count("rows are prepared again at each start") == 1
    assert out.count("a later run scores them again") == 2  # of both splits
    for verb in ("data", "train"):
        flags = ("--streaming", "--output_dir", tmp_path / "other", *train) if verb == "train" else train[2:4]
        code, _, err = run_script(verb, *flags)
        assert code == 0, err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="a small disk is mounted by root")
def test_a_full_disk_under_the_cache_costs_time_alone(tmp_path, capsys):
    path = write_source(".jsonl", tmp_path / "data", make_rows(4000))
    (tmp_path / "cache").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path / "cache")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        found, _ = read(path)
        assert found == expected(make_rows(4000))
        assert "No space left on device" in capsys.readouterr().out
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "cache")], check=True)


def test_no_folder_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("not a folder")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="HF_DATASETS_CACHE or TMPDIR"):
        keep_rows("0" * 40, lambda folder: None)


def test_entries_are_flushed_before_they_get_their_name(tmp_path, monkeypatch):
    flushed, placed = set(), []
    fsync, rename = os.fsync, os.rename

    def note_flush(number):
        flushed.add(os.readlink(f"/proc/self/fd/{number}"))
        fsync(number)

    def note_rename(source, target, **options):
        if Path(target).parent == cache_folder():
            placed.append(str(target))
            assert {str(source), *(str(path) for path in Path(source).iterdir())} <= flushed
        rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(os, "rename", note_rename)
    read(write_source(".jsonl", tmp_path / "data", make_rows(40)))
    assert len(placed) >= 2
    assert str(cache_folder()) in flushed


def list_modules_that_keep_rows() -> list[str]:
    texts = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "utils").rglob("*.py"))}
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path, text in texts.items()
        if re.search(r"\b(map_rows|hash_code)\((?!module)", text) and path.stem != "row_cache"
    ]


def test_modules_that_keep_rows_are_found():
    assert {"conversion", "mixing", "tokenizing", "unpaired", "prompts", "files"} <= {
        name.rpartition(".")[2] for name in list_modules_that_keep_rows()
    }


@pytest.mark.parametrize("module", list_modules_that_keep_rows())
def test_all_code_that_makes_rows_is_in_their_key(module):
    """Whatever a module of ours imports, when it is imported alone, is among the modules behind it."""
    code = f"import sys, {module}; print(*(name for name in sys.modules if name.split('.')[0] == 'utils'))"
    imported = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in set(imported) - set(modules_behind(module)) - {"utils"}:  # packages, which hold no code
        assert not (ROOT / name.replace(".", "/") / "__init__.py").read_bytes(), name


IMPORTS = {
    "beside": "from .other import thing",
    "a module beside": "from . import other",
    "above": "from ..room.other import thing",
    "a module above": "from ..room import other",
    "by its whole name": "import made.room.other",
    "from its whole name": "from made.room.other import thing",
    "when it is called": "def call():\n    from .other import thing",
    "through another": "from . import between",
}


@pytest.mark.parametrize("form", IMPORTS)
def test_the_code_behind_a_module_is_found_however_it_is_imported(form, tmp_path, monkeypatch):
    files = {"__init__": "", "first": IMPORTS[form], "other": "thing = 1", "between": "from .other import thing"}
    (tmp_path / "made" / "room").mkdir(parents=True)
    (tmp_path / "made" / "__init__.py").write_text("")
    for name, text in files.items():
        (tmp_path / "made" / "room" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        behind = modules_behind("made.room.first")
        assert {"made.room.first", "made.room.other"} <= set(behind)
        before = hash_code("made.room.first")
        hash_code.cache_clear()
        behind["made.room.other"].write_text("thing = 2")
        assert hash_code("made.room.first") != before
    finally:
        hash_code.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "made"]:
            del sys.modules[name]


def test_a_damaged_copy_of_a_hub_data_set_is_made_again(tmp_path, monkeypatch, capsys):
    file, asked = tmp_path / "pairs-train.arrow", []

    def answer(name, config, **options):
        asked.append(options)
        if not file.exists() or options:
            table = pa.Table.from_pylist(make_rows(40)).select(COLUMNS)
            with pa.ipc.new_stream(str(file), table.schema) as stream:
                stream.write_table(table)
        return datasets.DatasetDict(train=datasets.Dataset.from_file(str(file)))

    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert read("owner/pairs")[0] == expected(make_rows(40))
    for damage in (exchange_columns, flip, DAMAGES["cut"], DAMAGES["empty"]):
        damage(file)
        asked.clear()
        assert read("owner/pairs")[0] == expected(make_rows(40))
        assert asked == [{}, {"download_mode": "reuse_cache_if_exists"}]
    exchange_columns(file)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": datasets.Dataset.from_file(str(file))})
    with pytest.raises(UserError, match="its copy in the cache is damaged"):
        read("owner/pairs")


def test_a_saved_data_set_with_an_empty_split_or_tensors_is_read(tmp_path):
    table = datasets.Dataset.from_list(make_rows(40))
    splits = datasets.DatasetDict(train=table, test=table.select([]))
    splits.save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved")[0] == expected(make_rows(40))
    table.set_format("torch", columns=["prompt"])
    table.save_to_disk(str(tmp_path / "tensors"))
    assert read(tmp_path / "tensors")[0] == expected(make_rows(40))


def test_many_sources_are_told_from_a_name_that_is_too_long(tmp_path):
    paths = [write_lines(tmp_path / f"one_of_many_files_{i}.jsonl", make_rows(2)) for i in range(100)]
    from utils.data.wishes import read_wishes

    assert len(read_wishes(",".join(map(str, paths)))) == 100
    for name in ("x" * 5000, f"{'x' * 5000}/y.jsonl", f"{'x' * 300}.jsonl"):
        with pytest.raises(UserError, match="no such file or folder"):
            read(name)
