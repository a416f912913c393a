"""How long a run takes yet: by the tokens that are left, with the evaluations and saves that are still to come."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from datasets import Dataset
from shared.runs import read_record

from utils.training.progress import Stopwatch, count_tokens, seconds_left


class Watch(Stopwatch):
    """Ten seconds of training so far; an evaluation takes 3 seconds, a save 2."""

    seconds = 10.0

    def mean_pause(self, reason):
        return {"evaluation": 3.0, "saving": 2.0, "sampling": 0.0}[reason]


def left(step=20, begun_at=0, seen=2000, of_schedule=10_000, evaluates="no", every=10, saves="no"):
    args = SimpleNamespace(eval_strategy=evaluates, save_strategy=saves)
    state = SimpleNamespace(max_steps=100, global_step=step, eval_steps=every, save_steps=every)
    return seconds_left(args, state, Watch(), begun_at, seen, of_schedule)


def test_the_tokens_that_are_left_take_as_long_as_those_before():
    alone = 3 + 2  # what comes once, at the end
    assert left() == pytest.approx(10 * 8000 / 2000 + alone)
    assert left(seen=3000) == pytest.approx(10 * 7000 / 3000 + alone)  # long rows came first
    assert left(step=70, begun_at=50, seen=2000) == pytest.approx(10 * 3000 / 2000 + alone)  # resumed at step 50
    assert left(step=100) == left(step=0, seen=0) == 0


def test_evaluations_and_saves_to_come_are_counted():
    assert left(evaluates="steps") == pytest.approx(40 + 8 * 3 + 2)
    assert left(step=95, seen=9500, evaluates="steps", saves="steps", every=30) == pytest.approx(10 * 500 / 9500 + 5)
    assert left(step=85, seen=8500, evaluates="steps", saves="steps", every=30) == pytest.approx(
        10 * 1500 / 8500 + 2 * 5
    )


def test_an_estimate_stays_near_the_steps_where_the_tokens_surprise():
    """A schedule that ends within a pass over the data may have more or fewer tokens than its share."""
    assert left(of_schedule=1000) == pytest.approx(40 / 2 + 5)
    assert left(of_schedule=100_000) == pytest.approx(40 * 2 + 5)


def test_tokens_are_counted_in_rows_that_are_selected_too():
    rows = Dataset.from_dict({"prompt_ids": [[1], [1, 2], []], "chosen_ids": [[1], [], [5, 6, 7]], "row": [0, 1, 2]})
    assert count_tokens(rows) == 7
    assert count_tokens(rows.select([2, 0])) == 5


def test_padding_is_not_counted_in_the_speed(run_script, tiny_model, pairs_file, tmp_path):
    tokens = []
    for engine in ("shared_prefix", "padded"):
        code, _, err = run_script("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--engine", engine,
                                  "--output_dir", tmp_path / engine)  # fmt: skip
        assert code == 0, err
        used = read_record(tmp_path / engine)["resources"]
        tokens.append(used["tokens_per_second"] * used["train_seconds"])
    assert tokens[0] == pytest.approx(tokens[1], rel=1e-6)
    assert tokens[0] > 55 * 20
