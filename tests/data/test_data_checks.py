"""Bad rows: one reason each, reported together with their places, or left out and counted."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from utils.data.checks import find_fault
from utils.data.loading import load_pairs
from utils.errors import UserError
from utils.settings.data import DataSettings

GOOD = {"prompt": "q", "chosen": "good", "rejected": "bad"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, verb: str = "train", **settings):
    settings = {"validation_split": "none"} | settings
    return load_pairs(DataSettings(dataset_name=str(path), **settings), verb, 0, wanted=10**9)


def faults(path: Path, verb: str = "train", **settings) -> tuple[str, ...]:
    with pytest.raises(UserError) as error:
        load(path, verb, **settings)
    return error.value.faults


BAD = {
    "'prompt' is missing": {"prompt": None},
    "'prompt' is empty": {"prompt": " \n"},
    "'chosen' is missing": {"chosen": None},
    "'chosen' is empty": {"chosen": "\t", "rejected": "\t"},
    "'rejected' is missing": {"rejected": None},
    "'rejected' is empty": {"rejected": ""},
    "'rejected' equals 'chosen'": {"rejected": " good\n"},
}


@pytest.mark.parametrize("reason", BAD)
def test_one_reason_per_row(reason, tmp_path):
    path = write(tmp_path / "pairs.jsonl", [GOOD, GOOD | BAD[reason], GOOD])
    assert faults(path) == (
        f"{reason} in 1 row (pairs.jsonl line 2). Fix it, or pass --on_bad_rows skip (skipped rows are counted).",
    )
    data = load(path, on_bad_rows="skip")
    assert data.dropped == {reason: 1}
    assert data.train["row"][:] == [0, 2]
    assert data.train.column_names == ["prompt", "chosen", "rejected", "row"]


MESSAGES = {
    "'prompt' is empty": {"prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": " "}]},
    "'chosen' is empty": {"chosen": [{"role": "assistant", "content": ""}]},
    "'rejected' is empty": {"rejected": []},
    "'rejected' equals 'chosen'": {"rejected": [{"role": "assistant", "content": "good "}]},
}


@pytest.mark.parametrize("reason", MESSAGES)
def test_messages_have_the_same_reasons(reason, tmp_path):
    good = {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    }
    path = write(tmp_path / "pairs.jsonl", [good, good | MESSAGES[reason]])
    assert load(path, on_bad_rows="skip").dropped == {reason: 1}


def test_all_reasons_of_both_splits_are_reported_at_once_with_five_places_each(tmp_path):
    same, empty = GOOD | {"rejected": "good"}, GOOD | {"chosen": ""}
    write(tmp_path / "train.jsonl", [same, GOOD] * 4 + [empty] + [same] * 3)
    write(tmp_path / "test.jsonl", [GOOD, empty])
    fix = "Fix {}, or pass --on_bad_rows skip (skipped rows are counted)."
    assert faults(tmp_path, validation_split=None) == (
        "'rejected' equals 'chosen' in 7 rows (train.jsonl line 1, 3, 5, 7, 10, ...). " + fix.format("them"),
        "'chosen' is empty in 1 row (train.jsonl line 9). " + fix.format("it"),
        "'chosen' is empty in 1 row (test.jsonl line 2). " + fix.format("it"),
    )
    data = load(tmp_path, validation_split=None, on_bad_rows="skip")
    assert data.dropped == {"'rejected' equals 'chosen'": 7, "'chosen' is empty": 2}
    assert (len(data.train), len(data.held_out)) == (4, 1)


@pytest.mark.parametrize("streaming", [False, True])
def test_fewer_than_one_in_a_hundred_are_skipped_with_a_line_unless_it_is_asked_to_stop(streaming, tmp_path, capsys):
    same = GOOD | {"rejected": "good"}
    rows = [GOOD | {"prompt": f"q{i}"} for i in range(200)]
    rows[3] = same
    how = {"streaming": streaming, "validation_split": "none"}
    path = write(tmp_path / "pairs.jsonl", rows[:101])
    place = "pairs.jsonl[train] row 4" if streaming else "pairs.jsonl line 4"
    assert len(load(path, **how).train) == 100
    said = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert said == [
        f"data: 1 bad row is skipped, fewer than 1% of 101: 'rejected' equals 'chosen' in 1 ({place}). "
        "--on_bad_rows error stops instead"
    ]
    assert "'rejected' equals 'chosen' in 1 row (" in faults(path, on_bad_rows="error", **how)[0]
    path = write(tmp_path / "shorter.jsonl", rows[:100])
    assert "'rejected' equals 'chosen' in 1 row (" in faults(path, **how)[0]
    path = write(tmp_path / "two.jsonl", [*rows[:199], GOOD | {"chosen": ""}])
    assert len(faults(path, **how)) == 2
    path = write(tmp_path / "two.jsonl", [*rows[:200], GOOD | {"chosen": ""}])
    assert load(path, **how).dropped == {"'rejected' equals 'chosen'": 1, "'chosen' is empty": 1}


def test_of_the_lines_that_hold_no_row_a_few_are_skipped_too(tmp_path, capsys):
    path = write(tmp_path / "pairs.jsonl", [GOOD | {"prompt": f"q{i}"} for i in range(100)])
    path.write_text("{\n" + path.read_text())
    assert load(path).dropped == {"invalid JSON": 1}
    assert "fewer than 1% of 101: invalid JSON in 1 (pairs.jsonl line 1)" in capsys.readouterr().out
    path.write_text("{\n" + path.read_text())
    assert "invalid JSON in 2 rows" in faults(path)[0]


def test_names_of_the_source_are_used(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [{"question": "q", "j": "a", "k": "a"}])
    (line,) = faults(path, chosen_column="j", rejected_column="k")
    assert line.startswith("'k' equals 'j' in 1 row")


def test_nothing_left(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [GOOD | {"rejected": "good"}] * 3)
    assert faults(path, on_bad_rows="skip") == (
        "--dataset_name: no usable row is left ('rejected' equals 'chosen': 3)",
    )


def test_max_samples_takes_the_first_good_rows_in_file_order(tmp_path):
    bad = GOOD | {"chosen": ""}
    rows = [GOOD | {"prompt": f"q{i}"} if i >= 40 and i % 2 else bad for i in range(100)]
    path = write(tmp_path / "pairs.jsonl", rows)
    data = load(path, max_samples=3, on_bad_rows="skip")
    assert data.train["row"][:] == [41, 43, 45]
    assert data.dropped == {"'chosen' is empty": 43}
    assert len(load(path, max_samples=1000, on_bad_rows="skip").train) == 30


def test_max_samples_still_reports_the_bad_rows_before_the_last_one(tmp_path):
    bad = GOOD | {"chosen": ""}
    path = write(tmp_path / "pairs.jsonl", [GOOD, bad, GOOD, bad])
    assert "in 1 row (pairs.jsonl line 2)" in faults(path, max_samples=2)[0]
    assert len(load(path, max_samples=1).train) == 1


def test_max_samples_reads_on_until_there_are_as_many_good_rows(tmp_path):
    """Twice as many rows are read at first: of these, one good one too few."""
    rows = [GOOD | {"prompt": f"q{i}"} if i in (1, 4, 6, 9) else GOOD | {"chosen": ""} for i in range(12)]
    path = write(tmp_path / "pairs.jsonl", rows)
    data = load(path, max_samples=3, on_bad_rows="skip")
    assert data.train["row"][:] == [1, 4, 6]
    assert data.dropped == {"'chosen' is empty": 4}


def test_a_row_may_have_so_many_characters_and_no_more():
    labels = {name: name for name in ("prompt", "chosen", "rejected")}
    row = {"prompt": "q", "chosen": "x" * (16_777_216 - 3), "rejected": "no"}
    assert find_fault(row, labels) is None
    assert find_fault(row | {"prompt": "qq"}, labels) == "the row has more than 16,777,216 characters"


def test_sft_needs_no_rejected_side_and_whole_texts_no_prompt(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [GOOD | {"rejected": "good"}, GOOD | {"chosen": " "}])
    assert load(path, "sft", on_bad_rows="skip").dropped == {"'chosen' is empty": 1}
    path = write(tmp_path / "texts.jsonl", [{"text": "once"}, {"text": " "}, {"text": None}])
    data = load(path, "sft", on_bad_rows="skip")
    assert data.train.to_list() == [{"prompt": "", "completion": "once", "row": 0}]
    assert data.dropped == {"'text' is empty": 1, "'text' is missing": 1}


def test_lines_that_hold_no_row_are_counted_with_the_rest(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [GOOD, GOOD | {"chosen": ""}])
    path.write_text(path.read_text() + "{\n")
    assert load(path, on_bad_rows="skip").dropped == {"invalid JSON": 1, "'chosen' is empty": 1}


def test_the_fingerprint_depends_on_the_rows_alone(tmp_path):
    rows = [GOOD | {"prompt": f"q{i}"} for i in range(5)]
    lines = load(write(tmp_path / "pairs.jsonl", rows)).fingerprint
    (tmp_path / "elsewhere").mkdir()
    array = tmp_path / "elsewhere" / "other.json"
    array.write_text(json.dumps([row | {"score": 1} for row in rows]))
    assert load(array).fingerprint == lines
    assert load(write(tmp_path / "order.jsonl", rows[::-1])).fingerprint != lines
    assert load(write(tmp_path / "fewer.jsonl", rows[:4])).fingerprint != lines
    assert load(write(tmp_path / "pairs.jsonl", rows), validation_split="0.2").fingerprint != lines
