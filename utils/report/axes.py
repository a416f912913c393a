"""Round numbers for the axes of charts, and how they are written: functions of numbers alone.

A round step is 1, 2 or 5 times a power of ten. What stands on one axis is written with equally many decimals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

MOST_TICKS = 6
NARROWEST_SHARE = 0.1  # of an axis of shares: a change of a tenth of a point must not fill it
LARGE = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))  # from where, in what, written how
HUGE = 1e12  # an axis that reaches there is written with powers of ten
FURTHEST = 1e300  # of an axis: what lies beyond is not told apart
SMALL = 5e-3  # an axis that ends below is written with powers of ten
ROUNDED = 9999.5  # from here on a value has five digits in front of the point, or more


def cover(low: float, high: float, share: bool = False, most: int = MOST_TICKS) -> list[float]:
    """Evenly spaced round values from `low` or below to `high` or above; of shares within 0 and 1."""
    if share and high - low < NARROWEST_SHARE:
        low = min(max((low + high - NARROWEST_SHARE) / 2, 0.0), 1 - NARROWEST_SHARE)
        high = low + NARROWEST_SHARE
    low, high = max(low, -FURTHEST), min(high, FURTHEST)
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    for digit, power in _steps((high - low) / most):
        first = math.floor(low / (digit * 10.0**power) + 1e-9)
        last = math.ceil(high / (digit * 10.0**power) - 1e-9)
        if last - first < most:
            break
    return [float(f"{number * digit}e{power}") for number in range(first, last + 1)]


def ticks_within(low: float, high: float, whole: bool = False, most: int = MOST_TICKS) -> list[float]:
    """Evenly spaced round values between `low` and `high`, both included; `whole`: none with decimals."""
    if not low < high:
        return [low]
    for digit, power in _steps((high - low) / most):
        first = math.ceil(low / (digit * 10.0**power) - 1e-9)
        last = math.floor(high / (digit * 10.0**power) + 1e-9)
        if last - first < most and (power >= 0 or not whole):
            break
    return [float(f"{number * digit}e{power}") for number in range(first, last + 1)]


def ticks_of_bins(edges: Sequence[float], most: int = MOST_TICKS) -> list[float]:
    """Round values between the first and the last edge: evenly spaced where the bins are, else by ratio."""
    low, high = edges[0], edges[-1]
    widths = [b - a for a, b in pairwise(edges)]
    if low <= 0 or max(widths) < 1.5 * min(widths):
        return ticks_within(low, high, most=most)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [tick for power in powers for digit in digits if low <= (tick := float(f"{digit}e{power}")) <= high]
        if len(ticks) <= most:
            break
    return ticks or [low]


def _steps(least: float) -> Iterator[tuple[int, int]]:
    """Round steps from the power of ten below `least` upwards, as a digit and a power of ten."""
    power = math.floor(math.log10(least))
    while True:
        yield from ((1, power), (2, power), (5, power))
        power += 1


def round_step(span: float, parts: float) -> float:
    """The smallest round number that cuts `span` into `parts` or fewer."""
    return next(step for digit, power in _steps(span / parts) if span / (step := float(f"{digit}e{power}")) <= parts)


def write_ticks(ticks: Sequence[float], share: bool = False) -> list[str]:
    """The values of an axis as texts: 0, 0.5, 1.0; 0%, 50%, 100%; 0, 20k, 40k; 0, 5e-5, 1e-4."""
    largest = max(map(abs, ticks))
    if share:
        return _fixed([100 * tick for tick in ticks], "%")
    if 0 < largest < SMALL or largest >= HUGE:
        return [_power(tick) for tick in ticks]
    for least, size, letter in LARGE:
        if largest >= least:
            return [text if float(text[:-1]) else "0" for text in _fixed([tick / size for tick in ticks], letter)]
    return _fixed(ticks)


def _fixed(values: Sequence[float], unit: str = "") -> list[str]:
    """In the fewest decimals, the same for all, that keep every value."""
    step = min((b - a for a, b in pairwise(values)), default=1e-3)
    decimals = next((d for d in range(15) if all(abs(round(value, d) - value) < step / 1000 for value in values)), 15)
    return [f"{round(value, decimals):,.{decimals}f}{unit}" for value in values]


def _power(value: float, decimals: int = 10) -> str:
    """1.5e-4 in place of 0.00015."""
    digits, _, power = f"{value:.{decimals}e}".partition("e")
    return f"{float(digits):.12g}e{int(power)}" if value else "0"


def write_value(value: float, share: bool = False) -> str:
    """One value in full, as it is shown on its point."""
    if share:
        return percent(value)
    if 0 < abs(value) < SMALL or abs(value) >= HUGE:
        return _power(value, 3)
    return f"{value + 0.0:,.4g}" if abs(value) < ROUNDED else f"{value:,.0f}"


def percent(value: float) -> str:
    """A share as 50%, 63.5% or 99.95%; what rounds to nothing as 0%."""
    return f"{round(100 * value, 2):.4g}%"
