"""Where rows come from: every format gives the same rows, faults name file and line, splits are chosen and refused."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetNotFoundError
from shared.runs import ROOT

from utils.data.places import describe_bad_rows
from utils.data.sources import load_source
from utils.data.split_names import held_out_wish
from utils.errors import UserError
from utils.settings.data import DataSettings

ROWS = [
    {"prompt": f"p{i}\nß", "chosen": f'good {i}, "yes"', "rejected": "None" if i == 1 else f"bad {i}"} for i in range(4)
]
GOOD = b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n'


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def load(path: Path | str, verb: str = "train", **settings):
    return load_source(DataSettings(dataset_name=str(path), **settings), verb)


def fault(path: Path | str, **settings) -> str:
    with pytest.raises(UserError) as error:
        load(path, **settings)
    return str(error.value)


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def json_lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS = {
    "pairs.jsonl": lambda p: write(p, json_lines(ROWS)),
    "crlf.jsonl": lambda p: write(p, json_lines(ROWS).replace("\n", "\r\n")),
    "bom.jsonl": lambda p: write(p, b"\xef\xbb\xbf" + json_lines(ROWS).encode()),
    "pairs.jsonl.gz": lambda p: write(p, gzip.compress(json_lines(ROWS).encode())),
    "lines.json": lambda p: write(p, json_lines(ROWS)),
    "array.json": lambda p: write(p, json.dumps(ROWS)),
    "indented.json": lambda p: write(p, json.dumps(ROWS, indent=2)),
    "array.json.gz": lambda p: write(p, gzip.compress(json.dumps(ROWS).encode())),
    "columns.json": lambda p: write(p, json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]})),
    "wrapped.json": lambda p: write(p, json.dumps({"data": ROWS})),
    "name[1]*.jsonl": lambda p: write(p, json_lines(ROWS)),
    "pairs.csv": write_csv,
    "pairs.parquet": lambda p: datasets.Dataset.from_list(ROWS).to_parquet(str(p)),
    "saved": lambda p: datasets.Dataset.from_list(ROWS).save_to_disk(str(p)),
    "saved_splits": lambda p: datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(str(p)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows_and_leaves_nothing_beside_them(name, tmp_path):
    WRITERS[name](tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    source = load(tmp_path / name)
    assert source.rows.to_list() == ROWS
    assert source.held_out_rows is None
    assert source.dropped == {}
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_files_gives_its_splits(tmp_path):
    write(tmp_path / "train.jsonl", GOOD * 3)
    write(tmp_path / "test.jsonl", GOOD * 2)
    write(tmp_path / "README.md", "# not data")
    source = load(tmp_path)
    assert (len(source.rows), len(source.held_out_rows), source.splits) == (3, 2, ("train", "test"))
    assert source.place(2) == "train.jsonl line 3"
    assert source.held_out_place(1) == "test.jsonl line 2"
    assert source.description == f"{tmp_path} [train]"


def test_files_of_a_folder_can_be_named_like_splits(tmp_path):
    write(tmp_path / "train_prefs.jsonl", GOOD * 3)
    write(tmp_path / "train_sft.jsonl", GOOD * 5)
    assert len(load(tmp_path, dataset_split="train_prefs").rows) == 3


def test_a_split_of_several_files_names_the_right_one(tmp_path):
    write(tmp_path / "train-00000-of-00002.jsonl", GOOD * 2)
    write(tmp_path / "train-00001-of-00002.jsonl", b"\n" + GOOD * 2)
    source = load(tmp_path)
    assert [source.place(i) for i in (1, 3)] == [
        "train-00000-of-00002.jsonl line 2",
        "train-00001-of-00002.jsonl line 3",
    ]


def test_line_numbers_count_blank_lines(tmp_path):
    path = write(tmp_path / "pairs.jsonl", b"\n" + GOOD + b"\n  \n" + GOOD + GOOD)
    assert [load(path).place(i) for i in range(3)] == [f"pairs.jsonl line {n}" for n in (2, 5, 6)]


def test_places_in_other_files(tmp_path):
    table = write(tmp_path / "pairs.csv", 'prompt,chosen,rejected\n"a\nb",c,d\n\ne,f,g\n')
    assert [load(table).place(i) for i in range(2)] == ["pairs.csv line 2", "pairs.csv line 5"]
    array = write(tmp_path / "pairs.json", json.dumps(ROWS, indent=1))
    assert load(array).place(2) == "pairs.json row 3"
    two_on_a_line = write(tmp_path / "two.jsonl", GOOD.strip() + GOOD)
    assert [load(two_on_a_line).place(i) for i in range(2)] == ["two.jsonl row 1", "two.jsonl row 2"]
    spread = write(tmp_path / "spread.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS))
    assert load(spread).place(3) == "spread.jsonl row 4"


FAULTY_LINES = {
    "null.jsonl": (b"null\n", "not a JSON object"),
    "nan.jsonl": (b"NaN\n", "not a JSON object"),
    "deep.jsonl": (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}\n", "nested too deeply"),
    "cut.jsonl": (b'{"prompt": "p", \n', "invalid JSON"),
    "list.jsonl": (b'["x"]\n', "not a JSON object"),
    "text.jsonl": (b'"x"\n', "not a JSON object"),
    "bytes.jsonl": (b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}\n', "text that is not UTF-8"),
    "half.jsonl": (b'{"prompt": "\\ud83d", "chosen": "a", "rejected": "b"}\n', "half a character"),
    "twice.jsonl": (b'{"prompt": "p", "prompt": "q", "chosen": "a", "rejected": "b"}\n', "a duplicate key"),
}


@pytest.mark.parametrize("name", FAULTY_LINES)
def test_a_faulty_line_is_named_or_dropped_and_counted(name, tmp_path):
    line, reason = FAULTY_LINES[name]
    path = write(tmp_path / name, GOOD + b"\n" + line + GOOD)
    message = fault(path)
    assert message.startswith(reason)
    assert f"in 1 row ({name} line 3" in message
    assert "pass --on_bad_rows skip" in message
    source = load(path, on_bad_rows="skip")
    assert source.rows.to_list() == [json.loads(GOOD)] * 2
    assert sum(source.dropped.values()) == 1
    assert source.place(1) == f"{name} line 4"


@pytest.mark.parametrize("word", [b"null", b"NaN", b" null", b"-Infinity"])
def test_rows_that_are_null_are_faults_wherever_they_stand(word, tmp_path):
    """The library's reader dies of one at the start of a block, of which a file of 2 MB has several."""
    row = json.dumps({"prompt": "p" * 900, "chosen": "a, null", "rejected": "b"}).encode() + b"\n"
    path = write(tmp_path / "lines.jsonl", (row + word + b"\n") * 2000)
    assert load(path, on_bad_rows="skip").dropped == {"not a JSON object": 2000}
    for name, content in {
        "first.json": b"[" + word + b", " + row + b"]",
        "last.json": b"[" + row + b", \n" + word + b"]",
    }.items():
        assert "not a JSON object in 1 row" in fault(write(tmp_path / name, content))


def test_many_faulty_lines_are_counted_and_five_are_named(tmp_path):
    path = write(tmp_path / "pairs.jsonl", (GOOD + b"{\n") * 7)
    assert "invalid JSON in 7 rows (pairs.jsonl line 2, 4, 6, 8, 10, ...; the first: Expecting" in fault(path)


WHOLE_FILES = {
    "empty.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n\n", "has no readable row"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 3000)[:-10], "is truncated"),
    "plain.jsonl.gz": (GOOD, "is not valid gzip data"),
    "cut.json": (json.dumps(ROWS, indent=1).encode()[:-9], "line 20 is not valid JSON"),
    "wide.jsonl": ("\ufeff" + GOOD.decode()).encode("utf-16-le"),
    "header.csv": (b"prompt,chosen,rejected\n", "has no readable row"),
    "twice.csv": (b"prompt,prompt\na,b\n", "names the column 'prompt' twice"),
    "quote.csv": (b'prompt,chosen\na,"b\nc,d\n', "line 2 is not valid CSV"),
    "bad.parquet": (b"PAR1xxxx", "cannot be read as Parquet"),
    "deep.json": (b"[" * 5000 + b"]" * 5000, "nested too deeply"),
    "latin.csv": ("prömpt,chosen,rejected\np,c,r\n".encode("latin-1"), "line 1 is not UTF-8 text"),
}


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_an_unusable_file_is_refused_in_one_line(name, tmp_path):
    content = WHOLE_FILES[name]
    content, said = content if isinstance(content, tuple) else (content, "is UTF-16 text. Save it as UTF-8")
    path = write(tmp_path / name, content)
    for mode in ("error", "skip"):
        message = fault(path, on_bad_rows=mode)
        assert said in message
        assert str(path) in message
        assert "\n" not in message


def test_a_parquet_file_without_rows(tmp_path):
    datasets.Dataset.from_dict({"prompt": [], "chosen": []}).to_parquet(str(tmp_path / "none.parquet"))
    assert "none.parquet has no rows" in fault(tmp_path / "none.parquet")


def test_csv_values_stay_text_and_surplus_fields_are_a_fault(tmp_path):
    path = write(tmp_path / "pairs.csv", "prompt,chosen,rejected\n42,N/A,null\n2024-01-01,,\n")
    assert load(path).rows.to_list() == [
        {"prompt": "42", "chosen": "N/A", "rejected": "null"},
        {"prompt": "2024-01-01", "chosen": "", "rejected": ""},
    ]
    # pandas would take the first field of such a file for an index and shift the columns
    path = write(tmp_path / "wide.csv", "prompt,chosen,rejected\np,a,b,c\np,a,b,c\n")
    assert "too many fields in 2 rows (wide.csv line 2, 3" in fault(path)
    path = write(tmp_path / "mixed.csv", "prompt,chosen,rejected\np,a\np,a,b,c\n")
    assert load(path, on_bad_rows="skip").rows.to_list() == [{"prompt": "p", "chosen": "a", "rejected": None}]


def test_texts_that_look_like_dates_stay_texts(tmp_path):
    row = {"prompt": "2024-01-01", "chosen": "2024-01-02", "rejected": "2024-01-03T10:00:00"}
    assert load(write(tmp_path / "pairs.jsonl", json_lines([row, row]))).rows.to_list() == [row, row]


def test_rows_that_look_like_agent_traces_stay_rows(tmp_path):
    row = {
        "id": "1",
        "source": "s",
        "model": "m",
        "system_prompt": "be",
        "messages": [{"role": "user", "content": "q"}],
    }
    assert load(write(tmp_path / "rows.jsonl", json_lines([row, row]))).rows.to_list() == [row, row]


def test_types_and_columns_that_differ_between_rows_are_kept(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": 5, "chosen": [{"role": "assistant", "content": "x"}], "rejected": "b"},
        {"prompt": "p", "chosen": "a", "extra": [1, "x"]},
    ]
    filler = [{"prompt": "p" * 1000, "chosen": "a", "rejected": "b"}] * 10_500  # beyond the reader's first 10 MB
    columns = ("prompt", "chosen", "rejected", "extra")
    loaded = list(load(write(tmp_path / "pairs.jsonl", json_lines(rows))).rows)
    assert loaded == [{name: row.get(name) for name in columns} for row in rows]
    late = load(write(tmp_path / "late.jsonl", json_lines(filler + rows)))
    assert late.rows[len(filler) + 2]["extra"] == [1, "x"]
    assert late.place(len(filler)) == "late.jsonl line 10501"


def test_missing_things_are_named_with_what_exists(tmp_path):
    write(tmp_path / "train.jsonl", GOOD)
    write(tmp_path / "other.csv", "a\n1\n")
    assert "did you mean train.jsonl?" in fault(tmp_path / "trian.jsonl")
    assert "data files in" in fault(tmp_path / "zzz.parquet")
    assert "does not exist either" in fault(tmp_path / "no" / "zzz.parquet")
    assert "use .jsonl[.gz]" in fault(write(tmp_path / "pairs.xlsx", "x"))
    assert "train.jsonl; it has: train" in fault(tmp_path / "train.jsonl", dataset_split="trian")
    assert "--validation_split tset: no such split" in fault(tmp_path / "train.jsonl", validation_split="tset")
    assert "is the training split of" in fault(tmp_path / "train.jsonl", validation_split="train")
    assert "has no configurations" in fault(tmp_path / "train.jsonl", dataset_config="x")
    (tmp_path / "empty").mkdir()
    assert "no readable data here" in fault(tmp_path / "empty")


def save_splits(path: Path, *names: str) -> Path:
    datasets.DatasetDict({name: datasets.Dataset.from_list([{"name": name}]) for name in names}).save_to_disk(str(path))
    return path


@pytest.mark.parametrize(
    ("names", "settings", "train", "held_out"),
    [
        (("test", "train"), {}, "train", "test"),
        (("train", "validation"), {}, "train", "validation"),
        (("train", "other"), {}, "train", None),
        (("only",), {}, "only", None),
        (("train_sft", "test_sft", "train_prefs", "test_prefs"), {}, "train_prefs", "test_prefs"),
        (("train_sft", "test_sft", "train_prefs", "test_prefs"), {"verb": "sft"}, "train_sft", "test_sft"),
        (("train", "test"), {"dataset_split": "test"}, "test", None),
        (("train", "test"), {"validation_split": "0.2"}, "train", None),
        (("train", "test"), {"validation_split": "none"}, "train", None),
        (("train", "test", "mine"), {"validation_split": "mine"}, "train", "mine"),
    ],
)
def test_choice_of_splits(names, settings, train, held_out, tmp_path):
    source = load(save_splits(tmp_path / "data", *names), **settings)
    assert source.rows[0]["name"] == train
    assert (source.held_out_rows[0]["name"] if source.held_out_rows else None) == held_out
    assert source.place(0) == f"data[{train}] row 1"


def test_no_obvious_training_split(tmp_path):
    assert fault(save_splits(tmp_path / "data", "a", "b")).endswith("has no train split; it has: a, b")


def test_validation_split_values():
    assert [held_out_wish(value) for value in (None, "none", "0.25", "test")] == [None, "none", 0.25, "test"]
    for value in ("0", "1", "1.5", "-0.1"):
        with pytest.raises(UserError, match="must be a fraction above 0 and below 1"):
            held_out_wish(value)


def test_hub_dataset_is_read_through_the_library(monkeypatch):
    asked = []

    def answer(name, config):
        asked.append((name, config))
        return datasets.DatasetDict({name: datasets.Dataset.from_list(ROWS) for name in ("train", "test")})

    monkeypatch.setattr(datasets, "load_dataset", answer)
    source = load("some-org/pairs", dataset_config="en")
    assert asked == [("some-org/pairs", "en")]
    assert len(source.held_out_rows) == 4
    assert source.description == "some-org/pairs [train]"
    assert source.place(11) == "some-org/pairs[train] row 12"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DatasetNotFoundError("Dataset 'o/d' doesn't exist on the Hub or cannot be accessed."), "check the spelling"),
        (DatasetNotFoundError("Dataset 'o/d' is a gated dataset on the Hub."), "accept its terms at https://"),
        (ConnectionError("Couldn't reach 'o/d' on the Hub (LocalEntryNotFoundError)"), "check the network"),
        (ConnectionError("Couldn't reach 'o/d' on the Hub (OfflineModeIsEnabled)"), "offline mode is on"),
        (RuntimeError("Dataset scripts are no longer supported, but found d.py"), "its own Python loading script"),
        (ValueError("Config name is missing.\nPlease pick one among: ['en', 'de']"), "--dataset_config: en, de"),
        (FileNotFoundError("no data files"), "has no readable data"),
    ],
)
def test_hub_errors_are_one_line_each(error, said, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    message = fault("o/d")
    assert said in message
    assert message.startswith("--dataset_name o/d: ")
    assert "\n" not in message


def test_an_unknown_config_lists_the_others(monkeypatch):
    def fail(*_):
        raise ValueError("BuilderConfig 'fr' not found. Available: ['en', 'de']")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert fault("o/d", dataset_config="fr") == "--dataset_config fr: o/d has no such configuration; it has: en, de"


def test_the_real_library_offline_is_translated_and_paths_never_reach_the_hub(tmp_path):
    code = (
        "from utils.data.sources import load_source\n"
        "from utils.settings.data import DataSettings\n"
        "from utils.errors import UserError\n"
        "for name in ('some-org/no-such-pairs', './some-org', 'pairs.jsonl', 'a/b/c'):\n"
        "    try: load_source(DataSettings(dataset_name=name), 'train')\n"
        "    except UserError as error: print(error)\n"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    hub, *local = done.stdout.splitlines()
    assert "looked for on the Hugging Face Hub, but offline mode is on" in hub
    assert len(local) == 3
    assert all("no such file or folder" in line for line in local)


def test_a_fault_names_places_once_per_file():
    places = ["a.jsonl line 1", "a.jsonl line 2", "b.jsonl line 1"]
    assert describe_bad_rows("'x' is empty", places, 3) == (
        "'x' is empty in 3 rows (a.jsonl line 1, 2; b.jsonl line 1). "
        "Fix them, or pass --on_bad_rows skip (skipped rows are counted)."
    )


def test_what_a_file_is_in_truth_is_said(tmp_path):
    lines = json_lines(ROWS).encode()
    cases = {
        "a.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "run git lfs pull"),
        "a.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "run git lfs pull"),
        "b.jsonl": (gzip.compress(lines), "packed with gzip; end its name in .jsonl.gz"),
        "c.csv": (gzip.compress(lines), "packed with gzip"),
        "d.json": (b"PAR1" + lines, "end its name in .parquet"),
        "e.jsonl": (b"PK\x03\x04" + lines, "unpack it"),
        "f.jsonl": (b"<!DOCTYPE html>\n<html>", "a web page and not the data"),
    }
    for name, (content, said) in cases.items():
        path = write(tmp_path / name, content)
        for settings in ({}, {"on_bad_rows": "skip"}):
            message = fault(path, **settings)
            assert message.startswith(f"{path} is ")
            assert said in message
            assert "\n" not in message


def test_lines_without_any_row_are_named_with_their_reason(tmp_path):
    for content, said in (
        (json_lines(ROWS).replace("}\n", "},\n"), "line 1, 2, 3, 4; the first: a comma after the row"),
        ('{"a": 1, "a": 2}\n' * 7, "a duplicate key (x.jsonl line 1, 2, 3, 4, 5, ...; the first: the key 'a'"),
        ("{'a': 1}\n" * 2, "invalid JSON (x.jsonl line 1, 2; the first: Expecting property name enclosed in double"),
    ):
        path = write(tmp_path / "x.jsonl", content)
        message = fault(path, on_bad_rows="skip")
        assert said in message
        assert f"{path} has no readable row: " in message


def test_data_says_which_lines_cannot_be_read_and_why(run_script, tmp_path):
    """Of several sources, of training and held-out splits alike."""
    rows = [{"prompt": f"q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(30)]
    lines = json_lines(rows).splitlines(keepends=True)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        twice = '{"prompt": "q", "chosen": "a", "rejected": "b", "chosen": "c"}\n'
        write(tmp_path / folder / "train.jsonl", "".join([*lines[:5], twice, *lines[5:]]).replace("q ", f"{folder} "))
        write(tmp_path / folder / "test.jsonl", "".join([*lines[:2], "{,}\n"]).replace("q ", f"{folder} held out "))
    table = "prompt,chosen,rejected\n" + "".join(f"q{i},good {i},bad {i}\n" for i in range(5)) + "q,a,b,c\n"
    path = write(tmp_path / "ragged.csv", table)
    names = f"{tmp_path / 'a'},{tmp_path / 'b'},{path}"
    code, _, err = run_script("data", "--dataset_name", names, "--json_file", tmp_path / "found.json")
    assert code == 3, err
    found = json.loads((tmp_path / "found.json").read_text())["findings"]
    unreadable = {one["title"].partition(": ")[2]: one for one in found if one["name"] == "unreadable"}
    twice = unreadable["a duplicate key (the first: the key 'chosen' occurs twice)"]
    assert (twice["count"], [Path(place).name for place in twice["places"]]) == (2, ["train.jsonl line 6"] * 2)
    assert len(set(twice["places"])) == 2
    (broken,) = (one for title, one in unreadable.items() if title.startswith("invalid JSON"))
    assert [Path(place).name for place in broken["places"]] == ["test.jsonl line 3"] * 2
    assert unreadable["too many fields (the first: 4 fields under 3 columns)"]["places"] == ["ragged.csv line 7"]


@pytest.mark.parametrize("depth", [101, 900, 3000, 10_000, 200_000])
@pytest.mark.parametrize("first", [True, False])
def test_a_deeply_nested_row_is_a_bad_row(depth, first, tmp_path):
    deep = '{"prompt": "q", "chosen": "a", "rejected": "b", "x": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}\n"
    lines = json_lines(ROWS)
    path = write(tmp_path / "x.jsonl", deep + lines if first else lines + deep)
    assert fault(path).startswith(
        f"nested too deeply (more than 100 brackets) in 1 row (x.jsonl line {1 if first else 5})"
    )
    assert len(load(path, on_bad_rows="skip").rows) == 4
    whole = write(tmp_path / "x.json", f"[{deep},{json.dumps(ROWS)[1:]}")
    assert "is nested too deeply (more than 100 brackets)" in fault(whole)


def test_brackets_in_texts_are_no_nesting(tmp_path):
    hostile = {
        "prompt": "[" * 5000 + '"\\',
        "chosen": '\\"[' * 3000,
        "rejected": "]" * 5000,
        "x": [[[[{"y": "{" * 500}]]]],
    }
    for name, content in (("x.jsonl", json_lines([*ROWS, hostile])), ("x.json", json.dumps([*ROWS, hostile]))):
        rows = load(write(tmp_path / name, content)).rows
        assert {column: rows[4][column] for column in ROWS[0]} == {column: hostile[column] for column in ROWS[0]}


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "parquet"])
def test_a_row_of_endless_length_is_a_bad_row(kind, tmp_path, run_script):
    rows = [{"prompt": f"q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(8)]
    rows[3]["chosen"] = "".join(f"{i} " for i in range(2_600_000))
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        content = (json.dumps(rows) if kind == "json" else json_lines(rows)).encode()
        write(path, gzip.compress(content, 1) if kind.endswith("gz") else content)
    code, _, err = run_script("train", "--model_name_or_path", "none", "--dataset_name", path, "--max_steps", 1)
    assert code == 2
    code, out, err = run_script("data", "--dataset_name", path)
    assert code == 3, err
    assert f"x.{kind} {'row' if kind in ('json', 'parquet') else 'line'} 4" in out
    assert "more than 16" in out


def test_a_file_that_unpacks_without_end_is_refused(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    block = json_lines(ROWS).encode() * 10_000
    with gzip.open(path, "wb") as file:
        for _ in range(1 + (70 << 20) // len(block)):
            file.write(block)
    assert "unpacks to more than 100 times its size" in fault(path)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "note.txt").write_text("a text")
    os.replace(path, tmp_path / "mixed" / "rows.jsonl.gz")
    assert "unpacks to more than 100 times its size" in fault(tmp_path / "mixed")


def test_a_file_that_unpacks_without_end_is_not_streamed(tmp_path, tiny_model, run_script):
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(70):
            file.write(bytes(1 << 20))
    to = ("--output_dir", tmp_path / "o", "--max_steps", 1)
    code, _, err = run_script("train", "--streaming", "--model_name_or_path", tiny_model, "--dataset_name", path, *to)
    assert code == 2
    assert "unpacks to more than 100 times its size" in err


@pytest.mark.parametrize("around", ["[%s]", '{"data": [%s]}', '{"data": [\n%s\n]}'])
@pytest.mark.parametrize(
    "twice", ['{"prompt": "q", "chosen": "a", "rejected": "b", "chosen": "c"}', '{"x": {"y": 1, "y": 2}}']
)
def test_a_key_that_occurs_twice_in_an_array_is_not_read_as_its_last_value(around, twice, tmp_path):
    content = around % ",\n".join([*map(json.dumps, ROWS), twice])
    for name, data in (("x.json", content.encode()), ("x.json.gz", gzip.compress(content.encode()))):
        assert "occurs twice" in fault(write(tmp_path / name, data))


def test_thousands_of_columns_are_refused_at_once(tmp_path, tiny_model, run_script):
    wide = {f"k{i}": 1 for i in range(60_000)}
    table = write(tmp_path / "x.csv", ",".join(wide) + "\n" + ",".join("1" * len(wide)) + "\n")
    lines = write(tmp_path / "x.jsonl", json_lines([*ROWS, {**ROWS[0], **wide}]))
    assert "x.csv has 60,000 columns, from 'k0' to 'k59999'; more than 5,000 are not read" in fault(table)
    assert "x.jsonl has 60,003 columns, from 'prompt' to 'k59999'" in fault(lines)
    to = ("--output_dir", tmp_path / "o", "--max_steps", 1)
    code, _, err = run_script("train", "--streaming", "--model_name_or_path", tiny_model, "--dataset_name", lines, *to)
    assert code == 2
    assert "has 60,003 columns" in err


def test_a_repeated_name_is_found_among_many(tmp_path):
    row = json.dumps({f"k{i}": 1 for i in range(60_000)})
    assert "the key 'k59999' occurs twice" in fault(write(tmp_path / "x.jsonl", row[:-1] + ', "k59999": 1}\n' + row))
    names = ",".join(f"c{i}" for i in range(4_999))
    assert "names the column 'c4998' twice" in fault(write(tmp_path / "x.csv", f"{names},c4998\n"))


def test_a_damaged_byte_of_a_table_is_named_by_row_and_column(tmp_path):
    path = tmp_path / "x.parquet"
    rows = [{"prompt": f"q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(30)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
    content = bytearray(path.read_bytes())
    content[content.index(b"good 7")] = 0xFF
    path.write_bytes(content)
    assert "damaged at x.parquet row 8, column 'chosen'" in fault(path)
