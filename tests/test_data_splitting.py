"""Training and held-out rows: no prompt on both sides, the size that was asked for, the same for the same seed."""

from __future__ import annotations

import datasets
import numpy as np
import pytest

from utils.data.splitting import divide, group_key, split_rows
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
    assert abs(len(held_out) - fraction * len(groups)) <= sizes.max()


def test_one_giant_group_does_not_spoil_the_size():
    groups = np.array([0] * 900 + list(range(1, 101)))
    for seed in range(10):
        train, held_out = divide(groups, 50, seed)
        assert (len(train), len(held_out)) == (950, 50)


def test_the_nearer_of_two_sizes_is_taken():
    groups = np.repeat(np.arange(10), 8)
    assert [len(divide(groups, wished, 0)[1]) for wished in (10, 13, 70, 80)] == [8, 16, 72, 72]


def test_the_seed_decides():
    rows = table([f"p{i}" for i in range(200)])
    first, again, other = (split_rows(rows, None, "0.1", seed).held_out["row"][:] for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 20


def test_the_default_is_a_tenth_and_at_most_a_thousand():
    assert len(split_rows(table([f"p{i}" for i in range(95)]), None, None, 0).held_out) == 10
    assert len(split_rows(table([f"p{i}" for i in range(3)]), None, None, 0).held_out) == 1
    assert len(split_rows(table([f"p{i}" for i in range(20_000)]), None, None, 0).held_out) == 1000


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
    assert len(split.held_out) == 8
    assert not {row // 4 for row in split.train["row"]} & {row // 4 for row in split.held_out["row"]}


@pytest.mark.parametrize("prompts", [["a"], ["a", "A", " a"]])
def test_too_little_to_split(prompts):
    with pytest.raises(UserError, match=r"nothing can be held out of .* pass --validation_split none"):
        split_rows(table(prompts), None, None, 0)


def test_texts_without_prompt_are_split_by_text():
    rows = datasets.Dataset.from_list(
        [{"prompt": "", "completion": f"Text {n // 2}.", "row": n} for n in range(40)],
    )
    split = split_rows(rows, None, "0.2", seed=1)
    assert len(split.held_out) == 8
    assert not set(split.train["completion"]) & set(split.held_out["completion"])
