"""Who computes which pair of a step: every pair once, the steps of one process, tokens alike in all processes."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import islice

import pytest
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import SequentialSampler

from utils.training.shares import StepShares, StepSize, share_out

SHAPES = [  # rows, processes, slots, pairs per micro-batch
    (64, 2, 1, 4),
    (61, 2, 2, 3),
    (50, 8, 3, 1),
    (33, 4, 2, 4),  # the last step has one pair for four processes
    (3, 4, 1, 2),
]


def batched(items: Iterable, size: int) -> Iterator[tuple]:
    """The items in groups of so many, the last with what is left."""
    rest = iter(items)
    while group := tuple(islice(rest, size)):
        yield group


def sizes_of(rows: int) -> list[int]:
    draw = random.Random(rows)
    return [draw.randint(5, 400) for _ in range(rows)]


def micro_batches(rows: int, processes: int, slots: int, most: int, epoch: int = 0, **options) -> list[list[list[int]]]:
    """By process, the micro-batches of a pass over the data."""
    sizes, every = sizes_of(rows), []
    for process in range(processes):
        order = SeedableRandomSampler(sizes, data_seed=7)
        options = {"by_tokens": False, "drop_last": False} | options
        shares = StepShares(order, sizes, StepSize(processes, slots, most), process, **options)
        shares.set_epoch(epoch)
        every.append(list(shares))
        assert len(every[-1]) == len(shares)
    return every


def steps_of(every: list[list[list[int]]], slots: int) -> list[set[int]]:
    """The rows of each optimizer step, whoever computes them."""
    return [
        {row for batches in parts for batch in batches for row in batch}
        for parts in zip(*(batched(batches, slots) for batches in every), strict=True)
    ]


@pytest.mark.parametrize(("rows", "processes", "slots", "most"), SHAPES)
@pytest.mark.parametrize("epoch", [0, 3])
def test_steps_are_those_of_one_process_and_every_row_comes_once(rows, processes, slots, most, epoch):
    every = micro_batches(rows, processes, slots, most, epoch)
    assert sorted(row for batches in every for batch in batches for row in batch) == list(range(rows))
    assert all(len(batch) <= most for batches in every for batch in batches)
    order = SeedableRandomSampler(sizes_of(rows), data_seed=7)
    order.set_epoch(epoch)
    assert steps_of(every, slots) == [set(step) for step in batched(order, processes * slots * most)]


def test_an_order_that_is_not_drawn_is_kept():
    sizes = sizes_of(8)
    shares = [
        StepShares(SequentialSampler(sizes), sizes, StepSize(2, 1, 2), process, False, False) for process in range(2)
    ]
    assert steps_of([list(share) for share in shares], 1) == [{0, 1, 2, 3}, {4, 5, 6, 7}]


def test_rows_that_fill_no_step_are_left_out_where_asked():
    """A micro-batch of each process; an optimizer step may have fewer of them than others."""
    for rows, kept in ((33, 32), (50, 48), (48, 48), (15, 0)):
        every = micro_batches(rows, 4, 2, 4, drop_last=True)
        assert sum(len(batch) for batches in every for batch in batches) == kept


def test_under_a_limit_of_tokens_a_process_may_have_more_pairs():
    every = micro_batches(64, 4, 1, 8, by_tokens=True)
    assert sorted(row for batches in every for batch in batches for row in batch) == list(range(64))
    assert len({len(batch) for batches in every for batch in batches}) > 1


@pytest.mark.parametrize("slots", [1, 4])
def test_processes_get_like_numbers_of_tokens(slots):
    draw, processes, most = random.Random(1), 8, 8
    spread = {"shared": 0.0, "in turn": 0.0}
    for _ in range(50):
        sizes = [draw.randint(5, 400) for _ in range(processes * slots * most)]
        in_turn = [[list(range(begin, begin + most))] for begin in range(0, len(sizes), most)][: processes * slots]
        groups = {"shared": share_out(sizes, processes, slots, most)}
        groups["in turn"] = [[group[0] for group in slot] for slot in batched(in_turn, processes)]
        for name, shares in groups.items():
            sums = [sum(sizes[at] for slot in shares for at in slot[process]) for process in range(processes)]
            spread[name] += max(sums) * processes / sum(sums) - 1
    assert spread["shared"] < spread["in turn"] / 10


def test_larger_micro_batches_are_computed_at_the_same_time():
    shares = share_out([90, 10, 91, 11, 92, 12, 93, 13], processes=2, slots=4, most=1)
    sizes = [[90, 10, 91, 11, 92, 12, 93, 13][at] for slot in shares for process in slot for at in process]
    assert sorted(sizes[:4]) == [90, 91, 92, 93]
