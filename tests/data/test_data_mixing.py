"""Several sources at once: shares and counts, forms that differ, places and counts of each kept apart."""

from __future__ import annotations

import json

import datasets
import pytest
from shared.pairs import make_pairs, write_lines
from shared.runs import read_record

from utils.data.identity import pair_id
from utils.data.loading import load_pairs
from utils.data.wishes import Wish, read_wishes
from utils.errors import UserError
from utils.settings.data import DataSettings


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def texts(name: str, count: int) -> list[dict]:
    return [{"prompt": f"{name} {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)]


def messages(name: str, count: int) -> list[dict]:
    def side(i: int, word: str) -> list[dict]:
        return [{"role": "user", "content": f"{name} {i}"}, {"role": "assistant", "content": f"{word} {i}"}]

    return [{"chosen": side(i, "good"), "rejected": side(i, "bad"), "tools": "[]"} for i in range(count)]


def load(name: str, verb: str = "train", seed: int = 0, **settings):
    return load_pairs(DataSettings(**{"dataset_name": name, "validation_split": "none"} | settings), verb, seed)


def fault(name: str, **settings) -> str:
    with pytest.raises(UserError) as error:
        load(name, **settings)
    return str(error.value)


def test_names_shares_and_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_wishes("a.jsonl") == [Wish("a.jsonl")]
    assert read_wishes("a.jsonl, org/b:0.3,c.csv:5000,d:1.0") == [
        Wish("a.jsonl"),
        Wish("org/b", share=0.3),
        Wish("c.csv", count=5000),
        Wish("d", share=1.0),
    ]
    assert read_wishes("C:\\data\\a.jsonl") == [Wish("C:\\data\\a.jsonl")]
    (tmp_path / "a,b:0.5").mkdir()
    assert read_wishes("a,b:0.5") == [Wish("a,b:0.5")]
    for name, said in {
        "a:1": "leave out :1",
        "a:0": "a share of its pairs",
        "a:1.5": "a share of its pairs",
        "a:-3": "a share of its pairs",
        "a,,b": "a name is missing",
        "a,b,a:0.1": "names a twice",
    }.items():
        with pytest.raises(UserError, match=said):
            read_wishes(name)


def test_each_source_is_counted_and_its_rows_lead_back_to_it(tmp_path):
    first = write_lines(tmp_path / "first.jsonl", [*texts("a", 30), texts("a", 1)[0] | {"rejected": ""}])
    second = write_lines(tmp_path / "second.jsonl", texts("b", 20))
    data = load(f"{first},{second}", on_bad_rows="skip", validation_split="0.2")
    counts = {source.name: source for source in data.sources}
    assert [counts[str(path)].good for path in (first, second)] == [30, 20]
    assert counts[str(first)].dropped == data.dropped == {"'rejected' is empty": 1}
    for side, number in ((data.train, "train"), (data.held_out, "held_out")):
        for path in (first, second):
            own = [row for row in side if row["source"] == str(path)]
            assert len(own) == getattr(counts[str(path)], number) > 0
            for row in own:
                name, _, line = data.place(row["row"]).rpartition(" line ")
                assert name == path.name
                assert json.loads(path.read_text().splitlines()[int(line) - 1])["prompt"] == row["prompt"]
    assert data.held_out["id"][:] == [pair_id(row) for row in data.held_out]


def test_a_bad_row_of_any_source_is_named_with_its_file(tmp_path):
    paths = [write_lines(tmp_path / f"{n}.jsonl", [*texts(n, 2), {"prompt": "q", "chosen": n}]) for n in "ab"]
    assert [line.partition(" Fix")[0] for line in fault(",".join(map(str, paths))).splitlines()] == [
        "'rejected' is missing in 1 row (a.jsonl line 3).",
        "'rejected' is missing in 1 row (b.jsonl line 3).",
    ]


def test_the_source_without_the_held_out_split_is_named(tmp_path):
    paths = [str(write_lines(tmp_path / f"{n}.jsonl", texts(n, 2))) for n in "ab"]
    assert fault(",".join(paths), validation_split="test").splitlines() == [
        f"--validation_split test: no such split in {path}; it has: train" for path in paths
    ]


def test_texts_among_messages_become_messages(tmp_path):
    plain = write_lines(tmp_path / "plain.jsonl", texts("a", 3))
    chat = write_lines(tmp_path / "chat.jsonl", messages("b", 3))
    data = load(f"{plain},{chat}")
    assert "texts become messages" in data.reading.description
    assert data.train[0] == {
        "prompt": [{"role": "user", "content": "a 0"}],
        "chosen": [{"role": "assistant", "content": "good 0"}],
        "rejected": [{"role": "assistant", "content": "bad 0"}],
        "row": 0,
        "source": str(plain),
        "tools": None,
    } | {name: None for name in data.train.column_names if name.endswith("score")}
    assert data.train[3]["prompt"] == [{"role": "user", "content": "b 0"}]
    assert data.train[3]["tools"] == "[]"
    demonstrations = load(f"{plain},{chat}", "sft")
    assert demonstrations.train[5]["completion"] == [{"role": "assistant", "content": "good 2"}]
    whole = write_lines(tmp_path / "whole.jsonl", [{"text": "once"}])
    with pytest.raises(UserError, match="cannot be mixed"):
        load(f"{whole},{chat}", "sft")


def test_shares_and_counts_are_exact_and_drawn_by_the_seed(tmp_path):
    first = write_lines(tmp_path / "first.jsonl", texts("a", 50))
    second = write_lines(tmp_path / "second.jsonl", texts("b", 200))
    for amount, count in (("0.3", 60), ("50", 50), ("1.0", 200)):
        data = load(f"{first},{second}:{amount}")
        assert [source.drawn for source in data.sources] == [50, count]
        assert data.train["row"][:] == sorted(data.train["row"])
    drawn, again, other = (load(f"{first},{second}:0.3", seed=seed).train["prompt"][:] for seed in (1, 1, 2))
    assert drawn == again != other
    assert len(load(f"{second}:0.25").train) == 50
    assert "has only 50 good rows" in fault(f"{first}:51,{second}")


@pytest.mark.parametrize(
    ("share", "rows", "drawn"),
    [
        ("0.35", 5, 2),  # 1.75
        ("0.25", 5, 1),  # 1.25
        ("0.5", 3, 2),  # 1.5: a half goes to the even number
        ("0.5", 5, 2),  # 2.5
        ("0.01", 5, 1),  # one at least
        ("0.99", 5, 5),  # 4.95
    ],
)
def test_a_share_is_rounded_to_the_nearest_number_of_pairs(share, rows, drawn, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", texts("a", rows))
    assert len(load(f"{path}:{share}").train) == drawn


def test_no_prompt_is_on_both_sides_of_the_mixture(tmp_path):
    first = write_lines(tmp_path / "first.jsonl", texts("a", 200))
    second = write_lines(tmp_path / "second.jsonl", [row | {"chosen": "other"} for row in texts("a", 150)])
    data = load(f"{first},{second}", validation_split="0.2")
    assert not set(data.train["prompt"]) & set(data.held_out["prompt"])
    assert data.shared_prompts == 0


def test_a_split_of_its_own_stays_beside_the_drawn_ones(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_lines(folder / "train.jsonl", texts("a", 40))
    write_lines(folder / "test.jsonl", [*texts("t", 4), texts("b", 1)[0]])
    path = write_lines(tmp_path / "second.jsonl", texts("b", 100))
    data = load(f"{folder},{path}", validation_split=None)
    counts = {source.name: source for source in data.sources}
    assert (counts[str(folder)].train, counts[str(folder)].held_out) == (40, 5)
    assert counts[str(path)].train + counts[str(path)].held_out == 100
    assert (
        data.held_out_place(data.held_out.filter(lambda row: row["prompt"] == "t 3")[0]["row"]) == "test.jsonl line 4"
    )
    assert data.shared_prompts == len(set(data.train["prompt"]) & set(data.held_out["prompt"]))


def test_a_share_of_a_source_leaves_its_own_held_out_split_whole(tmp_path):
    (tmp_path / "folder").mkdir()
    write_lines(tmp_path / "folder" / "train.jsonl", texts("a", 40))
    write_lines(tmp_path / "folder" / "test.jsonl", texts("t", 6))
    for amount in ("0.25", "10"):
        data = load(f"{tmp_path / 'folder'}:{amount}", validation_split=None)
        assert (len(data.train), len(data.held_out)) == (10, 6)


def test_rows_that_two_sources_share_are_counted_and_kept(tmp_path):
    first = write_lines(tmp_path / "first.jsonl", texts("a", 20))
    second = write_lines(tmp_path / "second.jsonl", texts("a", 12) + texts("b", 3))
    data = load(f"{first},{second}")
    assert [source.repeated for source in data.sources] == [0, 12]
    assert len(data.train) == 35


def test_the_script_trains_on_a_mixture_from_its_config(run_script, tiny_model, tmp_path):
    first = write_lines(tmp_path / "first.jsonl", make_pairs(30))
    second = write_lines(tmp_path / "second.jsonl", messages("b", 30))
    config = tmp_path / "run.yaml"
    config.write_text(f"dataset_name:\n  - {first}\n  - {second}:0.5\n", encoding="utf-8")
    flags = ("--model_name_or_path", tiny_model, "--config", config, "--max_steps", 1, "--validation_split", 0.2)
    code, out, err = run_script(*flags, "--output_dir", tmp_path / "run")
    assert code == 0, err
    assert "2 sources; texts become messages" in out
    assert "15 of 30 good rows drawn" in out
    record = read_record(tmp_path / "run")["data"]
    assert [source["drawn"] for source in record["sources"]] == [30, 15]
    assert record["train_pairs"] + record["held_out_pairs"] == 45
    pairs = [json.loads(line) for line in (tmp_path / "run" / "held_out_pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == record["held_out_pairs"]
    assert {pair["place"].split()[0] for pair in pairs} == {"first.jsonl", "second.jsonl"}
    assert all(len(pair["id"]) == 16 for pair in pairs)
    code, _, err = run_script(*flags, "--output_dir", tmp_path)
    assert code == 2
    assert "which the result would overwrite" in err
