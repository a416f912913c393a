"""Mangled data of every form: each file is read, its bad rows dropped and counted, or refused in words for people."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from utils.data.loading import load_pairs
from utils.errors import UserError
from utils.settings.data import DataSettings

CASES = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (Path(__file__).parent / "cases").glob("*.yaml")]
CASES.sort(key=lambda case: case["about"])
SFT_ROWS = [
    [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(4)],
    [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a{i}"}]} for i in range(4)],
    [{"instruction": "do", "input": f"{i}", "output": "done"} for i in range(4)],
    [{"text": f"once {i}"} for i in range(4)],
]
ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 3.5, 10**30, -(2**63), float("nan"), float("inf"), "", " ", "\n\n", "\x00", "\ufeff"),
    *("\u2028", "2024-01-01", "nan", "null", "Human:", "\n\nHuman:", "\n\nAssistant: x", "a" * 5000, "\ud83d\ude00"),
    *(
        [],
        {},
        [[]],
        [None],
        [{}],
        {"role": "user"},
        [{"role": None, "content": None}],
        [{"role": "user", "content": 3}],
    ),
    *([{"from": "gpt", "value": "x"}], [{"role": "robot", "content": "x"}], {"content": []}, [["a", "b"]], [1, "x"]),
    *({"a": {"b": {"c": []}}}, [{"role": "assistant", "content": [{"type": "image"}]}], {"text": "x", "replies": 3}),
]


def mangled(value: Any, draw: random.Random) -> Any:
    """The value with one thing in it changed, somewhere."""
    if draw.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return draw.choice([*ODD_VALUES, [value], {"value": value}, str(value), [value, value]])
    if isinstance(value, list):
        position = draw.randrange(len(value))
        rest = list(value)
        action = draw.randrange(4)
        if action == 0:
            del rest[position]
        elif action == 1:
            rest.append(rest[position])
        else:
            rest[position] = mangled(rest[position], draw)
        return rest
    key = draw.choice(list(value))
    rest = dict(value)
    action = draw.randrange(5)
    if action == 0:
        del rest[key]
    elif action == 1:
        rest[draw.choice(["extra", "prompt", "label", key + " ", "", "row", "reason", "source"])] = rest.pop(key)
    else:
        rest[key] = mangled(rest[key], draw)
    return rest


def json_lines(rows: list, draw: random.Random) -> bytes:
    lines = [json.dumps(row, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass") for row in rows]
    if draw.random() < 0.3:
        position = draw.randrange(len(lines))
        lines[position] = draw.choice(
            [
                lines[position][: draw.randrange(len(lines[position]) + 1)],
                lines[position].replace(b'"', b'"\xff', 1),
                b'{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}',
                b'{"prompt": "\\ud800", "chosen": "c", "rejected": "d"}',
                *(b"null", b"[]", b'"text"', b"7", b"", b"{}", b"NaN", b"{'a': 1}", b"[" * 3000, b'{"a":' * 3000),
                *(b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}" for depth in (50, 300, 900)),
            ]
        )
    return draw.choice([b"\n", b"\n", b"\r\n", b"\n\n", b"\r"]).join(lines) + draw.choice([b"", b"\n"])


def write_rows(rows: list, folder: Path, draw: random.Random) -> Path:
    kind = draw.choice(["jsonl", "jsonl", "jsonl.gz", "json", "json.gz", "csv", "parquet"])
    path = folder / f"rows.{kind}"
    if kind.startswith("jsonl"):
        content = json_lines(rows, draw)
    elif kind.startswith("json"):
        content = json.dumps(draw.choice([rows, {"data": rows}, rows[0], {"train": rows, "more": 1}])).encode()
    elif kind == "csv":
        content = as_csv(rows)
    else:
        content = as_parquet(rows)
    if draw.random() < 0.08:
        content = b"\xef\xbb\xbf" + content
    if draw.random() < 0.08:
        content = content.decode("utf-8", "replace").encode(draw.choice(["utf-16", "latin-1", "utf-8"]), "replace")
    if kind.endswith(".gz"):
        content = gzip.compress(content)
    if draw.random() < 0.08 and content:
        content = content[: draw.randrange(len(content))]
    if draw.random() < 0.1 and content:
        position = draw.randrange(len(content))
        content = content[:position] + draw.randbytes(3) + content[position + 3 :]
    path.write_bytes(content)
    return path


def as_csv(rows: list) -> bytes:
    rows = [row for row in rows if isinstance(row, dict)] or [{}]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(rows: list) -> bytes:
    buffer = io.BytesIO()
    try:
        table = pa.Table.from_pylist([row for row in rows if isinstance(row, dict)])
        pq.write_table(table, buffer)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return b"PAR1"
    return buffer.getvalue()


def read_mangled(seed: int, folder: Path) -> str:
    """What became of one mangled file; an exception that is no UserError goes on to the test."""
    draw = random.Random(seed)
    case = draw.choice(CASES)
    verb = draw.choice(["train", "train", "train", "sft"])
    rows = draw.choice(SFT_ROWS) if verb == "sft" and draw.random() < 0.5 else case["rows"]
    rows = json.loads(json.dumps(rows * draw.choice([1, 4, 4, 30])))
    for _ in range(draw.choice([0, 1, 1, 2, 5])):
        position = draw.randrange(len(rows))
        rows[position] = mangled(rows[position], draw)
    if draw.random() < 0.1:
        rows += draw.choice(CASES)["rows"]
    flags = case.get("flags", {}) if draw.random() < 0.7 and verb == "train" else {}
    if draw.random() < 0.3:
        flags = flags | {"dataset_format": case["format"]}
    if draw.random() < 0.1 and isinstance(rows[0], dict) and rows[0]:
        flags = flags | {"group_by": draw.choice(list(rows[0]))}
    names = [str(write_rows(rows, folder, draw))]
    if draw.random() < 0.15:
        (folder / "other").mkdir()
        names.append(
            str(write_rows(draw.choice(CASES)["rows"] * 3, folder / "other", draw)) + draw.choice(["", ":0.5"])
        )
    settings = DataSettings(
        dataset_name=",".join(names),
        on_bad_rows=draw.choice(["skip", "skip", "skip", "error"]),
        validation_split=draw.choice([None, "none", "none", "0.3"]),
        streaming=draw.random() < 0.15,
        **flags,
    )
    data, faults = None, ()
    try:
        data = load_pairs(settings, verb, seed, wanted=50)
    except UserError as error:
        faults = error.faults
    if data is None:
        assert all(fault.strip() and "\n" not in fault for fault in faults), faults
        return "refused"
    check_pairs(data, verb)
    return "dropped" if data.dropped else "clean"


def check_pairs(data, verb: str) -> None:
    """What training relies on."""
    sides = ("chosen", "rejected") if verb == "train" else ("completion",)
    for part, place in ((data.train, data.place), (data.held_out, data.held_out_place)):
        for row in part if part is not None else ():
            values = [row["prompt"], *(row[side] for side in sides)]
            assert len({type(value) for value in values}) == 1
            for value in values:
                turns = value if isinstance(value, list) else [{"role": "user", "content": value}]
                assert all(isinstance(turn["role"], str) and isinstance(turn["content"], str) for turn in turns)
            assert verb == "sft" or row["chosen"] != row["rejected"]
            assert "row" in place(row["row"]) or "line" in place(row["row"])
    assert all(count > 0 for count in data.dropped.values())


def read_many(seeds: range, tmp_path: Path, monkeypatch) -> dict[str, int]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    outcomes = dict.fromkeys(("clean", "dropped", "refused"), 0)
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        try:
            outcomes[read_mangled(seed, folder)] += 1
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}", pytrace=True)
    return outcomes


def test_mangled_files_are_read_or_refused(tmp_path, monkeypatch):
    outcomes = read_many(range(150), tmp_path, monkeypatch)
    assert min(outcomes.values()) >= 8, outcomes


@pytest.mark.slow
def test_many_mangled_files_are_read_or_refused(tmp_path, monkeypatch):
    read_many(range(1000, 5000), tmp_path, monkeypatch)
