"""The axes of charts: round numbers that are told apart, written alike."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from utils.report.axes import cover, percent, round_step, ticks_of_bins, ticks_within, write_ticks, write_value


@pytest.mark.parametrize(
    ("low", "high", "share", "texts"),
    [
        (0.0, 1.0, False, "0.0 0.2 0.4 0.6 0.8 1.0"),
        (0.0, 1.0, True, "0% 20% 40% 60% 80% 100%"),
        (0.431, 1.257, False, "0.4 0.6 0.8 1.0 1.2 1.4"),
        (-2.2, 0.0, False, "-2.5 -2.0 -1.5 -1.0 -0.5 0.0"),
        (-0.3, 6.4, False, "-2 0 2 4 6 8"),
        (0.0, 1e-3, False, "0 2e-4 4e-4 6e-4 8e-4 1e-3"),
        (0.0, 2e-4, False, "0 5e-5 1e-4 1.5e-4 2e-4"),
        (0.0, 2143.0, False, "0 500 1,000 1,500 2,000 2,500"),
        (0.0, 43_210.0, False, "0 10k 20k 30k 40k 50k"),
        (0.0, 1e30, False, "0 2e29 4e29 6e29 8e29 1e30"),
        (-1e308, 1e308, False, "-1e300 -5e299 0 5e299 1e300"),
        (0.0, 1.9e6, False, "0 0.5M 1.0M 1.5M 2.0M"),
        # Where another way of writing begins.
        (0.0, 5e-3, False, "0.000 0.001 0.002 0.003 0.004 0.005"),
        (0.0, 1e4, False, "0 2k 4k 6k 8k 10k"),
        (0.0, 1e6, False, "0 0.2M 0.4M 0.6M 0.8M 1.0M"),
        (0.0, 1e12, False, "0 2e11 4e11 6e11 8e11 1e12"),
        # What hardly moves must not look as if it did.
        (2e-11, 7e-11, True, "0% 2% 4% 6% 8% 10%"),
        (0.4975, 0.5025, True, "45% 50% 55%"),
        (0.999, 1.0, True, "90% 92% 94% 96% 98% 100%"),
        (3.0, 3.0, False, "1 2 3 4 5"),
        (0.0, 0.0, False, "-1.0 -0.5 0.0 0.5 1.0"),
    ],
)
def test_an_axis_covers_its_values_with_round_numbers(low, high, share, texts):
    assert " ".join(write_ticks(cover(low, high, share), share)) == texts


@pytest.mark.parametrize(
    ("low", "high", "whole", "ticks"),
    [
        (0, 40, True, [0, 10, 20, 30, 40]),
        (0, 112, True, [0, 20, 40, 60, 80, 100]),
        (0, 120, True, [0, 50, 100]),
        (2, 112, True, [20, 40, 60, 80, 100]),
        (0, 2, True, [0, 1, 2]),
        (0, 2, False, [0, 0.5, 1, 1.5, 2]),
        (0.5, 1, False, [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        (3, 3, True, [3]),
    ],
)
def test_ticks_within_two_ends(low, high, whole, ticks):
    assert ticks_within(low, high, whole) == ticks


def test_ticks_of_bins_that_are_equally_wide_and_of_bins_that_widen():
    assert ticks_of_bins([-7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3]) == [-6, -4, -2, 0, 2]
    assert ticks_of_bins([1, 2, 4, 9, 20, 45, 100, 220]) == [1, 3, 10, 30, 100]
    assert ticks_of_bins([1, 4, 16, 64, 256, 1024, 4096, 16384]) == [1, 10, 100, 1000, 10_000]
    assert ticks_of_bins([0, 1, 10, 100]) == [0, 20, 40, 60, 80, 100]
    assert ticks_of_bins([1, 2]) == [1, 1.2, 1.4, 1.6, 1.8, 2]


def test_ticks_are_round_evenly_spaced_few_and_told_apart():
    draw = random.Random(0)
    for _ in range(2000):
        share = draw.random() < 0.3
        most = draw.choice((9, 30, 299))
        low = draw.uniform(-1, 1) * 10.0 ** draw.randint(-9, most)
        high = low + max(draw.random() * 10.0 ** draw.randint(-9, most), 1e-6 * abs(low))
        if share:
            low, high = sorted((draw.random(), draw.random()))
        ticks = cover(low, high, share)
        assert 2 <= len(ticks) <= 6
        step = ticks[1] - ticks[0]
        assert ticks[0] <= low + 1e-8 * step
        assert ticks[-1] >= high - 1e-8 * step
        assert all(math.isclose(b - a, step, rel_tol=1e-6) for a, b in pairwise(ticks))
        texts = write_ticks(ticks, share)
        assert len(set(texts)) == len(texts), (low, high, texts)
        assert max(map(len, texts)) <= 16


def test_single_values():
    assert [percent(value) for value in (0.5, 0.635, 0.9995, 5e-11, 1.0)] == ["50%", "63.5%", "99.95%", "0%", "100%"]
    written = {
        0: "0", 0.6931: "0.6931", 2143.4: "2,143", 1e-5: "1e-5", 43_210.7: "43,211", 0.0049: "4.9e-3",
        0.005: "0.005", 9999.4: "9,999", 9999.5: "10,000", -9999.7: "-10,000", 1e4: "10,000", 999e9: "999,000,000,000",
        1e12: "1e12", -2e12: "-2e12",
    }  # fmt: skip
    assert {value: write_value(value) for value in written} == written
    assert write_value(-0.0) == "0"
    assert [round_step(span, 24) for span in (13.0, 0.5, 1000)] == [1.0, 0.05, 50.0]
