"""The rows of a run: what is said of both sides, and runs that would take no step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from shared.pairs import make_pairs, write_lines
from shared.runs import read_record

from utils.arguments import parse_arguments
from utils.data.tokenizing import Truncation
from utils.errors import UserError
from utils.training.rows import Rows, check_steps


@pytest.mark.parametrize(
    ("flags", "fewest"),
    [
        ("--per_device_train_batch_size 8", 8),
        ("--per_device_train_batch_size 8 --gradient_accumulation_steps 2", 8),
        ("--per_device_train_batch_size 8 --gradient_accumulation_steps 2 --max_tokens_per_batch 100", 16),
        ("--per_device_train_batch_size 4 --gradient_accumulation_steps 3 --auto_batch_size", 12),
    ],
)
def test_a_run_that_would_take_no_step_is_refused(flags, fewest):
    words = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", *flags.split()]
    drops, keeps = parse_arguments([*words, "--dataloader_drop_last", "true"]), parse_arguments(words)
    for settings, count in ((drops, fewest), (keeps, fewest - 1), (keeps, 1)):
        check_steps(SimpleNamespace(train=range(count)), settings)
    with pytest.raises(UserError, match=f"the {fewest - 1} rows to train on are fewer than one of {fewest}:"):
        check_steps(SimpleNamespace(train=range(fewest - 1)), drops)


def test_warnings_and_bad_rows_are_those_of_both_sides():
    sides = (
        Truncation(0, 0, 0, {"same": 2}, ("two are odd",)),
        Truncation(0, 0, 0, {"same": 1, "cut": 1}, ("one is",)),
    )
    rows = Rows(None, None, *sides, 60, None, None, None, frozenset())
    assert rows.warnings == ["training rows: two are odd", "held-out rows: one is"]
    assert rows.bad_rows == {"same": 3, "cut": 1}


def test_what_is_wrong_with_held_out_rows_is_said_of_their_file_and_counted(run_script, tiny_model, tmp_path):
    data, pairs = tmp_path / "data", make_pairs(20)
    data.mkdir()
    for row in (4, 13, 16, 17):  # sides that differ behind the limit alone
        pairs[row]["chosen"], pairs[row]["rejected"] = (" It was a day." * 20 + end for end in (" Good.", " Bad."))
    pairs[18]["prompt"] = "word " * 80
    write_lines(data / "train.jsonl", pairs[:10])
    write_lines(data / "test.jsonl", pairs[10:])
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", data, "--output_dir", tmp_path / "run",
             "--max_steps", 1, "--max_length", 60]  # fmt: skip
    code, _, err = run_script(*flags)
    assert code == 2
    assert "train.jsonl line 5)" in err
    assert "test.jsonl line 4, 7, 8)" in err
    code, _, err = run_script(*flags, "--on_bad_rows", "skip", "--truncation", "drop")
    assert code == 0, err
    found = read_record(tmp_path / "run")["data"]
    assert found["dropped"] == {"longer than 60 tokens": 5}
    code, _, err = run_script(*flags, "--on_bad_rows", "skip", "--overwrite_output_dir")
    assert code == 0, err
    found = read_record(tmp_path / "run")["data"]
    assert (sum(found["dropped"].values()), found["truncated"]) == (4, 1)
    assert (found["train_pairs"], found["held_out_pairs"]) == (9, 7)
