"""Pairs in batches: each once, as many as there is room for, and not one more."""

from __future__ import annotations

import random

import pytest
from shared.layouts import random_pairs
from shared.pairs import make_pairs, write_lines

from utils.engine.flex import BLOCK
from utils.training.batches import PairCollator, consecutive_batches, fill_batches


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_batches_hold_every_pair_once_and_never_more_than_the_limit(padded, seed):
    draw = random.Random(seed)
    sizes = [draw.randint(1, 100) for _ in range(draw.randint(1, 60))]
    for batches in (fill_batches(sizes, 100, padded), consecutive_batches(sizes, 100, 7, padded)):
        assert sorted(index for batch in batches for index in batch) == list(range(len(sizes)))
        for batch in batches:
            inside = [sizes[index] for index in batch]
            assert (max(inside) * len(inside) if padded else sum(inside)) <= 100
    assert max(map(len, consecutive_batches(sizes, 100, 7, padded))) <= 7
    if not padded:
        assert len(fill_batches(sizes, 100, padded)) <= 2 * sum(sizes) / 100 + 1, "no two batches are both half empty"


def test_a_batch_is_filled_to_its_last_token():
    assert fill_batches([40, 60, 50, 50, 1], 100, padded=False) == [[1, 0], [2, 3], [4]]
    assert fill_batches([25, 50, 25, 50, 25, 25], 100, padded=True) == [[1, 3], [0, 2, 4, 5]]
    assert fill_batches([25, 50, 25, 51], 100, padded=True) == [[3], [1, 0], [2]]
    assert consecutive_batches([40, 60, 50, 50], 100, 9, padded=False) == [[1], [2, 3], [0]]
    assert consecutive_batches([40, 60, 60, 40], 100, 9, padded=False) == [[1], [2, 0], [3]]
    assert consecutive_batches([25, 25, 50, 25, 50, 25], 100, 9, padded=True) == [[2, 4], [0, 1, 3, 5]]


@pytest.mark.parametrize("padded", [False, True])
def test_a_batch_has_as_many_pairs_as_it_may_have(padded):
    """One pair fewer would be as right, and slower."""
    assert consecutive_batches([5] * 7, 1000, 3, padded) == [[0, 1, 2], [3, 4, 5], [6]]
    assert consecutive_batches([5] * 3, 1000, 1, padded) == [[0], [1], [2]]


@pytest.mark.parametrize("flex", [False, True], ids=["pair by pair", "flex"])
def test_a_row_is_filled_up_as_far_as_the_limit_of_tokens(flex):
    pairs = random_pairs()
    tokens = sum(len(ids) for pair in pairs for ids in pair.values())
    collator = PairCollator(pad_token_id=0)
    collator.flex, collator.multiple = flex, 32
    whole = 2 * BLOCK if flex else -(-tokens // 32) * 32
    least = BLOCK + 1 if flex else tokens
    for limit, length in ((None, whole), (whole, whole), (whole - 1, least)):
        collator.max_tokens = limit
        assert collator.packed(pairs)["input_ids"].numel() == length


@pytest.mark.parametrize("engine", ["shared_prefix", "padded"])
def test_the_longest_pair_may_fill_the_limit_of_tokens(engine, run_script, tiny_model, pairs_file, tmp_path):
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", tmp_path / "run",
             "--engine", engine, "--max_steps", 1, "--max_tokens_per_batch"]  # fmt: skip
    code, _, err = run_script(*flags, 3)
    assert code == 2
    longest = int(err.partition("the longest pair alone takes ")[2].split()[0])
    assert f"raise it to {longest}," in err
    code, _, err = run_script(*flags, longest - 1)
    assert (code, f"takes {longest} tokens" in err) == (2, True)
    code, _, err = run_script(*flags, longest)
    assert code == 0, err


def test_the_longest_held_out_pair_must_fit_the_limit_too(run_script, tiny_model, tmp_path):
    pairs, data = make_pairs(12), tmp_path / "data"
    data.mkdir()
    pairs[11]["chosen"] += " lovely" * 60
    write_lines(data / "train.jsonl", pairs[:8])
    write_lines(data / "test.jsonl", pairs[8:])
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", data, "--output_dir", tmp_path / "run"]
    code, _, err = run_script(*flags, "--max_steps", 1, "--max_tokens_per_batch", 70)
    assert code == 2
    assert "--max_tokens_per_batch is 70, but the longest pair alone takes" in err


def test_a_dry_run_tries_an_evaluation_batch_of_all_its_pairs(run_script, tiny_model, tmp_path, monkeypatch):
    """Of the longest ones: what fits them fits all."""
    from utils.training.pair_scoring import PairTask

    scored, score = [], PairTask._score_batch

    def noted(self, model, dataset, indices):
        scored.append(len(indices))
        return score(self, model, dataset, indices)

    monkeypatch.setattr(PairTask, "_score_batch", noted)
    data = write_lines(tmp_path / "pairs.jsonl", make_pairs(60))
    code, _, err = run_script("--model_name_or_path", tiny_model, "--dataset_name", data, "--output_dir",
                              tmp_path / "run", "--dry_run", "--per_device_train_batch_size", 2,
                              "--per_device_eval_batch_size", 7, "--validation_split", 0.5)  # fmt: skip
    assert code == 0, err
    assert max(scored) == 7
