"""A text stays the text that the file holds, whatever stands in other rows: in quotes, a number, an object."""

from __future__ import annotations

import bz2
import json

import datasets
import pytest
from shared.pairs import write_lines

from utils.data.loading import load_pairs
from utils.errors import UserError
from utils.settings.data import DataSettings

TEXTS = ['"Yes"', "42", "true", "null", "NaN", "[1, 2]", '{"n": 3}', "1e5", " 7 ", '"', "2024-01-01", "0.10", "\\n"]
OTHERS = {
    "number": 99,
    "parts": [{"type": "text", "text": "parts"}],
    "list": ["a", "b"],
    "object": {"a": 1},
    "true": True,
    "big": 10**30,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def load(path, **settings):
    settings = {"dataset_name": str(path), "validation_split": "none", "on_bad_rows": "skip"} | settings
    return load_pairs(DataSettings(**settings), "train", 0, wanted=10**9 if settings.get("streaming") else None)


def replies(rows) -> list[str]:
    return [value if isinstance(value, str) else value[0]["content"] for value in rows["chosen"][:]]


def as_texts(text: str) -> dict:
    return {"prompt": text, "chosen": text, "rejected": "no"}


def as_messages(text: str) -> dict:
    sides = {"prompt": ("user", text), "chosen": ("assistant", text), "rejected": ("assistant", "no")}
    return {name: [{"role": role, "content": said}] for name, (role, said) in sides.items()}


def as_answers(text: str) -> dict:
    return {"prompt": text, "responses": [text, "no"], "scores": [2, 1]}


def odd(make, other) -> dict:
    """A row in which one place, where other rows have a text, holds something else."""
    row = make("odd")
    if make is as_texts:
        return row | {"chosen": other}
    if make is as_answers:
        return row | {"responses": [other, "no"]}
    return row | {"chosen": [{"role": "assistant", "content": other}]}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", [".jsonl", ".json"])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("make", [as_texts, as_messages, as_answers])
def test_texts_stay_texts_beside_a_row_of_another_type(make, other, ending, streaming, tmp_path):
    rows = [make(text) for text in TEXTS]
    rows.insert(5, odd(make, OTHERS[other]))
    path = tmp_path / f"rows{ending}"
    path.write_text(json.dumps(rows), encoding="utf-8") if ending == ".json" else write_lines(path, rows)
    data = load(path, streaming=streaming)
    found = [text for text in replies(data.train) if text in TEXTS]
    assert found == TEXTS
    assert len(data.train) - len(TEXTS) in (0, 1)  # the odd row itself is read, or counted
    assert sum(data.dropped.values()) == len(rows) - len(data.train)
    prompts = [value if isinstance(value, str) else value[0]["content"] for value in data.train["prompt"]]
    assert [text for text in prompts if text in TEXTS] == TEXTS


@pytest.mark.parametrize("other", [99, True, {"a": 1}])
def test_what_is_no_text_does_not_become_one_far_behind(other, tmp_path):
    """The library takes the types of the first 10 MB and would write what follows as text."""
    filler = as_texts("p" * 5000) | {"rejected": "n" * 4000}
    path = write_lines(tmp_path / "rows.jsonl", [filler] * 800 + [filler | {"chosen": other}] * 1200)
    assert path.stat().st_size > 11 << 20
    data = load(path)
    assert (len(data.train), data.dropped) == (800, {"'chosen' is not text": 1200})


def test_texts_stay_texts_in_csv_parquet_and_among_several_sources(tmp_path):
    rows = [as_texts(text) for text in TEXTS]
    mixed = [as_texts(text + " ") for text in TEXTS] + [odd(as_texts, 5)]
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "a.csv")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "b.parquet")
    write_lines(tmp_path / "c.jsonl", mixed)
    for name in ("a.csv", "b.parquet"):
        assert replies(load(tmp_path / name).train) == TEXTS
    joined = load(",".join(str(tmp_path / name) for name in ("a.csv", "b.parquet", "c.jsonl")))
    assert replies(joined.train) == TEXTS + TEXTS + [text + " " for text in TEXTS]


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_stay_texts_in_a_folder(streaming, tmp_path):
    rows = [as_texts(text) for text in [*TEXTS, "None", "N/A"]]
    for name, write in (("csv", "to_csv"), ("json", "to_json"), ("parquet", "to_parquet")):
        (tmp_path / name).mkdir()
        getattr(datasets.Dataset.from_list(rows), write)(tmp_path / name / f"train.{name.replace('json', 'jsonl')}")
        assert replies(load(tmp_path / name, streaming=streaming).train) == [*TEXTS, "None", "N/A"]


def test_texts_that_the_library_has_changed_are_refused(tmp_path, monkeypatch):
    """Of a data set of the hub the library's own reading is all there is."""
    mixed = write_lines(tmp_path / "rows.jsonl", [as_messages("Yes"), odd(as_messages, OTHERS["parts"])])
    library = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: library("json", data_files=str(mixed)))
    with pytest.raises(UserError, match="'chosen' mixes texts with values of other types"):
        load("org/pairs")
    extra = [as_messages("one"), as_messages("two")]
    extra[0]["chosen"][0]["tool_calls"] = None  # other fields, but no other types
    write_lines(mixed, extra)
    assert replies(load("org/other").train) == ["one", "two"]


def test_an_adapter_gets_the_texts_of_the_file(tmp_path):
    (tmp_path / "adapt.py").write_text(
        "def pairs(row):\n    return {'prompt': row['ask'], 'chosen': row['good'], 'rejected': 'no'}\n",
        encoding="utf-8",
    )
    rows = [{"ask": text, "good": text} for text in TEXTS] + [{"ask": "odd", "good": 3}]
    data = load(write_lines(tmp_path / "rows.jsonl", rows), dataset_adapter=f"{tmp_path / 'adapt.py'}:pairs")
    assert replies(data.train) == TEXTS


def test_data_writes_the_texts_that_it_read_and_reads_them_again(run_script, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [as_messages(text) for text in TEXTS] + [odd(as_messages, {"a": 1})])
    for name in ("clean.jsonl", "clean.parquet"):
        run_script("data", "--dataset_name", path, "--output_file", tmp_path / name)
        assert replies(load(tmp_path / name).train) == TEXTS
    written = (tmp_path / "clean.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["chosen"][0]["content"] for line in written] == TEXTS


def tool(**properties) -> dict:
    schema = {"type": "object", "properties": properties, "required": []}
    return {"type": "function", "function": {"name": "f", "description": None, "parameters": schema}}


TOOLS = [
    [tool(x={"type": ["string", "null"], "default": None, "enum": ["a", None]})],
    [tool(x={"type": "number", "default": 0.7, "minimum": 1, "maximum": 1.0, "const": 10**20})],
    [tool(), tool(y={"type": "string"})],
]


def tool_rows(tools: list) -> list[dict]:
    return [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad", "tools": value} for i, value in enumerate(tools)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("tools", [TOOLS, TOOLS[:1] * 3, TOOLS[1:2] * 3], ids=["mixed", "alike", "numbers"])
@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_tools_of_a_json_file_keep_their_nulls_and_numbers(ending, tools, streaming, tmp_path):
    path, rows = tmp_path / f"rows{ending}", tool_rows(tools)
    path.write_text(json.dumps(rows), encoding="utf-8") if ending == ".json" else write_lines(path, rows)
    assert load(path, streaming=streaming).train["tools"][:] == [json.dumps(value) for value in tools]


def test_the_nulls_that_a_table_adds_to_tools_go_and_those_of_an_adapter_stay(tmp_path):
    tools = [[tool(x={"type": "string", "default": "a"})], [tool(y={"type": "string"})]]
    for value in tools:
        del value[0]["function"]["description"]
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(tool_rows(tools)).to_parquet(path)
    (tmp_path / "adapt.py").write_text(
        "def pairs(row):\n    return row | {'tools': [*row['tools'], {'name': 'own', 'default': None}]}\n"
    )
    adapter = f"{tmp_path / 'adapt.py'}:pairs"
    for streaming in (False, True):
        found = [json.loads(text) for text in load(path, streaming=streaming).train["tools"]]
        assert found == tools
        made = load(path, streaming=streaming, dataset_adapter=adapter).train["tools"]
        assert [json.loads(text) for text in made] == [[*value, {"name": "own", "default": None}] for value in tools]


@pytest.mark.parametrize("make", [as_texts, as_messages])
@pytest.mark.parametrize("other", ["2024-01-01", "2024-01-01T10:00:00Z", 42, True, 1.5, {"a": 1}])
def test_a_file_of_its_own_types_stays_what_it_is_beside_another(make, other, tmp_path):
    write_lines(tmp_path / "train-0.jsonl", [make("one"), make("two")])
    write_lines(tmp_path / "train-1.jsonl", [odd(make, other)])
    kept = replies(load(tmp_path).train)
    assert kept == ["one", "two"] + ([other] if isinstance(other, str) else [])


def test_a_text_like_a_date_stays_what_it_is_far_behind(tmp_path):
    rows = [as_texts(f"{number} {'text ' * 1000}") for number in range(4200)]  # two blocks and one line of the library
    size = sum(len(json.dumps(row)) + 1 for row in rows)
    rows[-1]["prompt"] += "x" * (2 * (10 << 20) - size)
    path = write_lines(tmp_path / "pairs.jsonl", [*rows, as_texts("2024-01-01")])
    assert replies(load(path).train)[-1] == "2024-01-01"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("other", [7, {"a": 1}])
def test_texts_that_the_library_wrote_as_json_into_parquet_are_refused(other, streaming, tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", [*map(as_texts, TEXTS), odd(as_texts, other)])
    rows = datasets.load_dataset("json", data_files=str(path), split="train")
    rows.to_parquet(tmp_path / "pairs.parquet")
    with pytest.raises(UserError, match="'chosen' mixes texts with values of other types"):
        load(tmp_path / "pairs.parquet", streaming=streaming)
    rows.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="'chosen' mixes texts with values of other types"):
        load(tmp_path / "saved", streaming=streaming)


def test_half_a_character_in_an_array_is_a_bad_row(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([as_texts("half \ud83d"), as_texts("whole \ud83d\ude00")]), encoding="utf-8")
    data = load(path)
    assert replies(data.train) == ["whole \U0001f600"]
    assert data.dropped == {"half a character (an unpaired surrogate)": 1}


def test_a_record_with_too_many_fields_shifts_no_column_of_a_stream(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\na,b,c,d\ne,f,g\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 2: too many fields"):
        load(path, streaming=True)
    path.write_text("prompt,chosen,rejected,chosen\na,b,c,d\n", encoding="utf-8")
    with pytest.raises(UserError, match="'chosen' twice"):
        load(path, streaming=True)


def test_tabs_are_read_by_their_ending_and_other_packed_files_of_a_folder_refused(tmp_path):
    (tmp_path / "train.tsv").write_text("prompt\tchosen\trejected\nq\t007\tNone\nz\tNA\t1e5\n", encoding="utf-8")
    assert replies(load(tmp_path).train) == ["007", "NA"]
    (tmp_path / "train.tsv").unlink()
    with bz2.open(tmp_path / "train.jsonl.bz2", "wt") as file:
        file.write(json.dumps(as_texts("yes")) + "\n")
    with pytest.raises(UserError, match=r"train\.jsonl\.bz2 is compressed in an unsupported way"):
        load(tmp_path)
