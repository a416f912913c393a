"""--streaming: no more is read than --max_steps uses; pairs, sides and places are those of a full reading."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from shared.pairs import make_pairs, write_lines
from shared.runs import read_record

from utils.data.loading import load_pairs
from utils.errors import UserError
from utils.settings.data import DataSettings


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def load(path, wanted: int = 10**9, seed: int = 0, verb: str = "train", **settings):
    settings = {"dataset_name": str(path), "streaming": True} | settings
    return load_pairs(DataSettings(**settings), verb, seed, wanted=wanted)


def fault(path, **settings) -> str:
    with pytest.raises(UserError) as error:
        load(path, **settings)
    return str(error.value)


def content(rows) -> list[str]:
    return [json.dumps({name: row[name] for name in ("prompt", "chosen", "rejected", "row")}) for row in rows]


WRITERS = {
    "rows.jsonl": lambda path, rows: write_lines(path, rows),
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows), encoding="utf-8"),
    "rows.csv": lambda path, rows: datasets.Dataset.from_list(rows).to_csv(path),
    "rows.parquet": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(path),
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(str(path)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_stream_read_to_its_end_gives_what_a_full_reading_gives(name, tmp_path):
    rows = make_pairs(300)
    rows[7]["rejected"] = rows[7]["chosen"]
    WRITERS[name](tmp_path / name, rows)
    streamed, whole = (
        load(tmp_path / name, streaming=streaming, on_bad_rows="skip", validation_split="0.2", seed=3)
        for streaming in (True, False)
    )
    assert content(streamed.train) == content(whole.train)
    assert content(streamed.held_out) == content(whole.held_out)
    assert streamed.held_out["id"][:] == whole.held_out["id"][:]
    assert streamed.dropped == whole.dropped == {"'rejected' equals 'chosen'": 1}
    assert streamed.fingerprint == whole.fingerprint
    assert "streamed (all 300 rows)" in streamed.source
    last = streamed.train[-1]["row"]
    assert streamed.place(last) == f"{name}[train] row {last + 1}"


def test_no_more_is_read_than_is_wanted(tmp_path):
    rows = make_pairs(5000)
    path = write_lines(tmp_path / "rows.jsonl", rows)
    data = load(path, wanted=100)
    assert len(data.train) == 100
    assert data.train["row"][99] < 150
    assert "the first 1,000 rows" in data.source
    assert data.sources[0].train == 100
    assert {row["prompt"] for row in data.held_out}.isdisjoint(data.train["prompt"])
    assert load(path, wanted=100).fingerprint == data.fingerprint
    assert load(path, wanted=100, seed=1).fingerprint != data.fingerprint


def test_a_run_of_few_steps_has_held_out_rows_too(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", make_pairs(9000))
    data = load(path, wanted=4)
    assert len(data.train) == 4
    assert 50 < len(data.held_out) < 150
    rare = load(path, wanted=4, validation_split="0.0005")
    assert len(rare.train) == 4
    assert len(rare.held_out) >= 1
    assert load(path, wanted=4, validation_split="none").held_out is None


def test_reading_goes_on_until_a_row_is_held_out_and_keeps_no_more_to_train_on(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", make_pairs(9000))
    beyond = 0
    for seed in range(6):
        data = load(path, wanted=4, seed=seed, validation_split="0.0005")
        assert len(data.train) == 4
        assert len(data.held_out) > 0
        beyond += data.held_out["row"][0] >= 1000
    assert beyond, "some seed holds out none of the first batch"


def test_labels_of_the_held_out_split_say_too_how_they_are_counted(tmp_path):
    rows = [{"prompt": f"q{i}", "response_1": "x", "response_2": "y", "label": 1} for i in range(30)]
    write_lines(tmp_path / "train.jsonl", rows)
    write_lines(tmp_path / "test.jsonl", [{**rows[0], "prompt": "t", "label": 2}])
    data = load(tmp_path, wanted=5)
    assert (data.train["chosen"][0], data.held_out["chosen"][0]) == ("x", "y")


def test_whole_files_come_in_an_order_that_the_seed_draws(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(5):
        datasets.Dataset.from_list([{**row, "chosen": f"file {number}"} for row in make_pairs(20)]).to_parquet(
            folder / f"train-{number:05d}-of-00005.parquet"
        )
    read = [load(folder, wanted=10, seed=seed, validation_split="none").train for seed in range(6)]
    assert all(len(set(rows["chosen"])) == 1 for rows in read)
    assert len({rows["chosen"][0] for rows in read}) > 1
    data = load(folder, validation_split="none")
    for row in data.train:
        number = int(row["chosen"].split()[1])
        name = "folder[train] row" if number == 0 else f"folder[train] file {number + 1} row"
        assert data.place(row["row"]).startswith(name)
    assert len(set(data.train["row"])) == 100


def test_a_split_of_its_own_and_many_answers(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    rows = [{"prompt": f"q{i}", "responses": ["a", "b", "b"], "scores": [3, 2, 1]} for i in range(30)]
    write_lines(folder / "train.jsonl", rows)
    write_lines(folder / "test.jsonl", [{**rows[0], "prompt": "t"}, rows[0]])
    data = load(folder, wanted=12, pairs_per_prompt=2)
    assert data.train["row"][:] == [i // 2 for i in range(12)]
    assert data.held_out["prompt"][:] == ["t", "t", "q0", "q0"]
    assert data.held_out_place(1) == "folder[test] row 2"
    assert data.shared_prompts == 1


def test_a_hub_dataset_is_streamed_through_the_library(monkeypatch):
    asked = []

    def answer(name, config, **options):
        asked.append((name, config, options))
        return {"train": datasets.Dataset.from_list(make_pairs(40)).to_iterable_dataset()}

    monkeypatch.setattr(datasets, "load_dataset", answer)
    data = load("some-org/pairs", dataset_config="en", validation_split="none")
    assert asked == [("some-org/pairs", "en", {"streaming": True})]
    assert data.train["prompt"][:] == [row["prompt"] for row in make_pairs(40)]
    assert data.place(39) == "some-org/pairs[train] row 40"


def test_bad_rows_stop_the_run_or_are_counted(tmp_path):
    rows = make_pairs(50)
    rows[4]["chosen"] = ""
    path = write_lines(tmp_path / "rows.jsonl", rows)
    assert "'chosen' is empty in 1 row (rows.jsonl[train] row 5)" in fault(path)
    assert load(path, on_bad_rows="skip").dropped == {"'chosen' is empty": 1}
    path.write_text(path.read_text() + '{"prompt": \n', encoding="utf-8")
    assert "cannot be read beyond row" in fault(path, on_bad_rows="skip")


def test_what_cannot_be_streamed_is_refused(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", make_pairs(5))
    assert "needs --max_steps" in fault(path, wanted=None)
    assert "reads all of one source" in fault(f"{path},{path}2")
    assert "reads all of one source" in fault(f"{path}:0.5")
    assert "no such split" in fault(path, validation_split="tset")
    kto = write_lines(tmp_path / "kto.jsonl", [{"prompt": "q", "completion": "a", "label": True}])
    assert "paired across all of the data" in fault(kto)
    assert "no such file" in fault(tmp_path / "none.jsonl")
    empty = write_lines(tmp_path / "one.jsonl", make_pairs(1))
    assert "none of the 1 rows that were read is held out" in fault(empty, validation_split="0.0001")


def test_the_script_trains_on_a_stream_and_resumes(run_script, tiny_model, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", make_pairs(3000))
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", path, "--streaming", "--max_steps", 6)
    flags = (*flags, "--per_device_train_batch_size", 4, "--save_steps", 3, "--output_dir", tmp_path / "run")
    code, out, err = run_script(*flags)
    assert code == 0, err
    assert "rows.jsonl[train], streamed (the first 1,000 rows)" in out
    record = read_record(tmp_path / "run")
    assert record["data"]["train_pairs"] == 24
    whole = (tmp_path / "run" / "held_out_pairs.jsonl").read_text()
    code, _, err = run_script(*flags, "--resume_from_checkpoint", tmp_path / "run" / "checkpoint-3")
    assert code == 0, err
    assert (tmp_path / "run" / "held_out_pairs.jsonl").read_text() == whole
    code, _, err = run_script(*flags[:5], "--num_train_epochs", 2, "--max_samples", 5, "--output_dir", tmp_path / "b")
    assert code == 2
    dry = (*flags[:5], "--dry_run")
    assert run_script(*dry)[2] == "error: --streaming: needs --max_steps, which says how much is read\n"
    assert err.splitlines() == [
        "error: --streaming: needs --max_steps, which says how much is read",
        "error: --num_train_epochs: has no effect with --streaming, whose length is --max_steps; leave it out",
        "error: --max_samples: has no effect with --streaming, whose length is --max_steps; leave it out",
    ]


def test_another_split_is_not_streamed_in_place_of_an_empty_one(tmp_path):
    rows = datasets.Dataset.from_list(make_pairs(30))
    splits = {"full": rows, "empty": rows.select([])}

    def save(**named: str) -> Path:
        path = tmp_path / "-".join(named.values())
        datasets.DatasetDict({name: splits[kind] for name, kind in named.items()}).save_to_disk(str(path))
        return path

    assert "[train]: has no rows" in fault(save(train="empty", test="full"))
    other = save(train="full", test="empty")
    assert len(load(other, validation_split="none").train) == 30
    assert load(other).held_out is not None
    assert "[test]: has no rows" in fault(other, validation_split="test")
