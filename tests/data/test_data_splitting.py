"""Training and held-out rows: no prompt on both sides, the size that was asked for, the same for the same seed."""

from __future__ import annotations

import tracemalloc
from hashlib import blake2b

import datasets
import numpy as np
import pytest

from utils.data.splitting import choose_held_out, count_shared, group_key, split_rows
from utils.errors import UserError


def table(prompts: list) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"prompt": prompts, "row": list(range(len(prompts)))})


def turns(*texts: str) -> list[dict]:
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[text[0]], "content": text[3:]} for text in texts]


@pytest.mark.parametrize("seed", range(12))
def test_no_prompt_is_on_both_sides_whatever_the_groups(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, rng.integers(2, 30), size=rng.integers(2, 200))
    groups = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    fraction = float(rng.uniform(0.05, 0.6))
    split = split_rows(
        table([f"  Prompt {g}" if rng.random() < 0.5 else f"prompt  {g}" for g in groups]), None, str(fraction), seed
    )
    train, held_out = split.train["row"][:], split.held_out["row"][:]
    assert sorted(train + held_out) == list(range(len(groups)))
    assert not set(groups[train]) & set(groups[held_out])
    assert (train, held_out) == (sorted(train), sorted(held_out))
    assert train
    assert held_out
    prompts = len(set(groups[held_out]))
    assert abs(prompts - fraction * len(sizes)) <= 1 + 4 * (len(sizes) * fraction * (1 - fraction)) ** 0.5


@pytest.mark.parametrize("seed", range(12))
def test_rows_that_come_go_or_move_leave_all_others_on_their_side(seed):
    rng = np.random.default_rng(seed)
    prompts = [f"prompt {n}" for n in rng.integers(0, 400, size=500)]
    fraction = [None, "0.05", "0.3", "0.8"][seed % 4]

    def sides(rows: list[str]) -> dict[str, bool]:
        split = split_rows(table(rows), None, fraction, seed)
        return dict.fromkeys(split.train["prompt"], False) | dict.fromkeys(split.held_out["prompt"], True)

    before = sides(prompts)
    grown = sides(prompts + [f"prompt {n}" for n in rng.integers(0, 2000, size=int(rng.integers(1, 3000)))])
    assert {prompt: grown[prompt] for prompt in before} == before
    fewer = sides([prompts[n] for n in rng.permutation(500)[:300]])
    assert fewer.items() <= before.items()


def test_the_share_is_what_was_asked_for():
    for seed in range(5):
        split = split_rows(table([f"p{i}" for i in range(20_000)]), None, "0.2", seed)
        assert abs(len(split.held_out) - 4000) < 4 * (20_000 * 0.2 * 0.8) ** 0.5


@pytest.mark.parametrize(("fraction", "seed"), [("0.1", 0), ("0.3", 1), ("0.5", 2), ("0.7", 2**32 - 1)])
def test_a_prompt_is_held_out_where_its_hash_lies_below_the_fraction(fraction, seed):
    prompts = [f"prompt {i}" for i in range(300)]
    key = seed.to_bytes(8, "little")
    hashes = [int.from_bytes(blake2b(p.encode(), digest_size=8, key=key).digest(), "little") for p in prompts]
    below = [p for p, number in zip(prompts, hashes, strict=True) if number < float(fraction) * 2**64]
    assert split_rows(table(prompts), None, fraction, seed).held_out["prompt"][:] == below


def test_a_number_that_is_the_fraction_itself_is_not_held_out():
    assert choose_held_out(np.array([0.0, 0.25, 0.5, 0.75]), 0.25).tolist() == [True, False, False, False]
    assert choose_held_out(np.array([0.25, 0.25, 0.5]), 0.25).tolist() == [True, True, False]  # the lowest one, though


def test_whole_prompts_are_evaluated_up_to_a_thousand_rows_and_a_larger_one_alone():
    def evaluated(rows_of_prompt: int, prompts: int) -> int:
        names = [f"p{i}" for i in range(prompts) for _ in range(rows_of_prompt)]
        return len(split_rows(table(names), None, None, 0).held_out)

    assert evaluated(4, 5000) == 1000  # 250 prompts fit exactly
    assert evaluated(3, 5000) == 999
    assert evaluated(501, 60) == 501
    assert evaluated(1001, 60) == 1001


def test_the_seed_decides():
    rows = table([f"p{i}" for i in range(200)])
    first, again, other = (split_rows(rows, None, "0.1", seed).held_out["row"][:] for seed in (1, 1, 2))
    assert first == again != other


def test_by_default_a_tenth_is_kept_out_and_at_most_a_thousand_rows_of_it_are_evaluated():
    prompts = [f"p{i // 2}" for i in range(30_000)]
    default, all_of_it = (split_rows(table(prompts), None, wish, 0) for wish in (None, "0.1"))
    assert default.train["row"][:] == all_of_it.train["row"][:]
    assert len(default.held_out) == 1000
    assert set(default.held_out["row"]) < set(all_of_it.held_out["row"])
    assert default.spare == len(all_of_it.held_out) - 1000
    assert set(np.unique(np.array(default.held_out["row"][:]) // 2, return_counts=True)[1]) == {2}
    small = split_rows(table([f"p{i}" for i in range(2000)]), None, None, 0)
    assert (len(small.train) + len(small.held_out), small.spare) == (2000, 0)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_the_smallest_data_have_rows_on_both_sides(count):
    for seed in range(20):
        for wish in (None, "0.02", "0.95"):
            split = split_rows(table([f"p{i}" for i in range(count)]), None, wish, seed)
            assert min(len(split.train), len(split.held_out)) >= 1
            assert len(split.train) + len(split.held_out) == count


def test_each_source_has_rows_on_both_sides_and_a_prompt_of_two_sources_one_side():
    prompts = [f"p{i}" for i in range(1000)] + ["p1", "q1", "q2"] + [f"p{i}" for i in range(100, 200)]
    sources = ["large"] * 1000 + ["small"] * 3 + ["middle"] * 100
    rows = table(prompts).add_column("source", sources)
    for seed in range(10):
        split = split_rows(rows, None, "0.1", seed)
        for side in (split.train, split.held_out):
            assert set(side["source"]) == {"large", "small", "middle"}
        assert not set(split.train["prompt"]) & set(split.held_out["prompt"])


def test_sources_of_one_prompt_each_are_split_too():
    rows = table(["p", "q", "r"]).add_column("source", ["a", "b", "c"])
    for seed in range(20):
        split = split_rows(rows, None, "0.02", seed)
        assert (len(split.train), len(split.held_out)) == (2, 1)


def test_a_column_can_keep_rows_together():
    rows = table([f"p{i % 50}" for i in range(200)]).add_column("group", [f"g{i // 10}" for i in range(199)] + [None])
    split = split_rows(rows, None, "0.3", 1)
    assert split.train.column_names == split.held_out.column_names == ["prompt", "row"]
    groups = [{row // 10 for row in side["row"] if row != 199} for side in (split.train, split.held_out)]
    assert not groups[0] & groups[1]
    assert split.shared_prompts == len(set(split.train["prompt"]) & set(split.held_out["prompt"])) > 0


def test_none_and_a_split_of_its_own():
    rows, held_out = table(["a", "b", "c"]), table(["A ", "a", "d", "B"])
    assert split_rows(rows, None, "none", 0).held_out is None
    for wish in (None, "test"):
        split = split_rows(rows, held_out, wish, 0)
        assert (split.train, split.held_out) == (rows, held_out)
        assert split.shared_prompts == 2


def test_prompts_of_dialogues_are_grouped_by_how_they_begin():
    start = group_key(turns("s: be", "u: Hello  you"))
    assert group_key(turns("s: be", "u: hello you ", "a: x", "u: y")) == start
    assert group_key(turns("s: other", "u: hello you")) != start
    assert group_key(turns("u: hello you")) != start
    assert group_key(turns("a: hi", "u: q")) == group_key(turns("u: Q"))
    rows = table([turns(f"u: q{i // 4}", "a: r", f"u: s{i}") for i in range(40)])
    split = split_rows(rows, None, "0.2", 3)
    assert len(split.held_out) % 4 == 0
    assert not {row // 4 for row in split.train["row"]} & {row // 4 for row in split.held_out["row"]}


@pytest.mark.parametrize("prompts", [["a"], ["a", "A", " a"]])
def test_too_little_to_split(prompts):
    with pytest.raises(UserError, match=r"cannot hold out a part of .* pass --validation_split none"):
        split_rows(table(prompts), None, None, 0)


def test_texts_without_prompt_are_split_by_text():
    rows = datasets.Dataset.from_list(
        [{"prompt": "", "completion": f"Text {n // 2}.", "row": n} for n in range(40)],
    )
    split = split_rows(rows, None, "0.2", seed=1)
    assert len(split.train) + len(split.held_out) == 40
    assert not set(split.train["completion"]) & set(split.held_out["completion"])


def test_shared_prompts_are_counted_without_keeping_those_of_training():
    shared = [f"Shared {n}" for n in range(5)]
    train = (text for n in range(5000) for text in (f"{n} " + "x" * 2000, shared[n % 3].upper()))
    tracemalloc.start()
    try:
        assert count_shared(train, shared) == 3
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # of ten
    finally:
        tracemalloc.stop()
