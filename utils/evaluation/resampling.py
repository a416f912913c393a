"""How far a figure may be off: prompts drawn anew, and signs flipped. Pairs of one prompt are alike, so they stay
together: whole prompts are drawn, and the differences of a whole prompt are flipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

LEVEL = 0.95
CHUNK = 2**22  # numbers at a time
FLIPS = 9999

Figure = dict[str, float]  # value, low, high


class Bootstrap:
    """Draws of as many prompts as there are, with replacement, the same for every figure.

    Args:
        groups: the prompt of each pair, as numbers; shape (pairs,).
        draws: how many.
    """

    def __init__(self, groups: np.ndarray, draws: int, seed: int) -> None:
        self.groups = np.unique(groups, return_inverse=True)[1]
        self.prompts = int(self.groups.max()) + 1
        self.draws, self._seed = draws, seed

    def _weights(self, width: int) -> Iterator[np.ndarray]:
        """How often each prompt was drawn, shape (some draws, prompts), after a first row that has each once.

        So many draws at a time that `width` numbers for each of them fit CHUNK.
        """
        random = np.random.default_rng(self._seed)
        yield np.ones((1, self.prompts))
        size = max(1, CHUNK // max(width, self.prompts))
        for start in range(0, self.draws, size):
            count = min(size, self.draws - start)
            drawn = random.integers(self.prompts, size=(count, self.prompts))
            cells = (drawn + self.prompts * np.arange(count)[:, None]).ravel()
            yield np.bincount(cells, minlength=count * self.prompts).reshape(count, self.prompts).astype(float)

    def sums(self, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Sums over pairs of each column (shape (pairs,)): first over the pairs as they are, then over each draw.

        Returns:
            Name -> shape (1 + draws,).
        """
        table = np.zeros((self.prompts, len(columns)))
        for place, values in enumerate(columns.values()):
            table[:, place] = np.bincount(self.groups, weights=values, minlength=self.prompts)
        totals = np.concatenate([weights @ table for weights in self._weights(self.prompts)])
        return dict(zip(columns, totals.T, strict=True))

    def roc_auc(self, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
        """The area under the ROC curve of scores, one of each kind per pair: as it is, then of each draw.

        Returns:
            Shape (1 + draws,).
        """
        scores = np.concatenate([positive, negative])
        order = np.argsort(scores, kind="stable")
        # Equal scores are one step of the curve.
        starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) > 0)
        pair, is_positive = order % len(positive), (order < len(positive)).astype(float)
        areas = []
        for weights in self._weights(2 * len(positive)):
            by_score = weights[:, self.groups[pair]]
            above = np.add.reduceat(by_score * is_positive, starts, axis=1)
            below = np.add.reduceat(by_score * (1 - is_positive), starts, axis=1)
            passed = np.cumsum(below, axis=1) - below / 2
            areas.append((above * passed).sum(axis=1) / (above.sum(axis=1) * below.sum(axis=1)))
        return np.concatenate(areas)

    def sum_by_prompt(self, values: np.ndarray) -> np.ndarray:
        """The sum over each prompt's pairs, shape (prompts,)."""
        return np.bincount(self.groups, weights=values, minlength=self.prompts)


def make_figure(values: np.ndarray) -> Figure | None:
    """The value of `values[0]` with the interval that holds LEVEL of the others; None where it is not defined.

    A draw for which it is not defined (it has no pair of the kind, say) is left out.
    """
    if not np.isfinite(values[0]):
        return None
    known = values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(known) else (np.nan, np.nan)
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def share_figure(values: np.ndarray, prompts: int) -> Figure | None:
    """The same for a share. One of 0 or 1 is the same in every draw: its interval is the exact binomial one
    (Clopper-Pearson) over `prompts`. For a ROC AUC, of which there are more comparisons
    than prompts, that is on the safe side."""
    from scipy.stats import binomtest

    figure = make_figure(values)
    if figure is not None and figure["value"] in (0, 1) and prompts:
        right = prompts if figure["value"] == 1 else 0
        exact = binomtest(right, prompts).proportion_ci(LEVEL, method="exact")
        figure |= {"low": float(exact.low), "high": float(exact.high)}
    return figure


def divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The quotient, NaN where it is not defined."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return above / below


def flip_signs(by_prompt: np.ndarray, alternative: str, seed: int) -> dict[str, Any]:
    """Tests that each prompt's sum might as well have the other sign.

    Where all sums but those of 0 are equally large, that is the sign test, which is exact (for two rankings it is
    McNemar's test); else signs are flipped at random, or in every way where there are few.

    Args:
        by_prompt: shape (prompts,).
        alternative: `two-sided` or `greater`.
    """
    from scipy.stats import binomtest

    moved = by_prompt[by_prompt != 0]
    if len(moved) == 0:
        return {"p_value": 1.0, "test": "no prompt differs", "prompts_that_differ": 0}
    if np.ptp(np.abs(moved)) < 1e-9:
        p, test = binomtest(int((moved > 0).sum()), len(moved), alternative=alternative).pvalue, "exact sign test"
    else:
        p, test = _count_flips(moved, alternative, np.random.default_rng(seed))
    return {"p_value": float(p), "test": test, "prompts_that_differ": len(moved)}


def _count_flips(values: np.ndarray, alternative: str, random: np.random.Generator) -> tuple[float, str]:
    """The share of sign flips whose sum is as far out as that of the values as they are, and how it was found."""
    total, count = values.sum(), len(values)
    exact = 2**count <= FLIPS + 1
    flips = 2**count if exact else FLIPS
    far = (lambda sums: np.abs(sums)) if alternative == "two-sided" else (lambda sums: sums)
    bound = far(total) - 1e-9 * np.abs(values).sum()
    as_far = 0
    size = max(1, CHUNK // count)
    for start in range(0, flips, size):
        rows = min(size, flips - start)
        if exact:
            bits: np.ndarray = np.arange(start, start + rows)[:, None] >> np.arange(count) & 1
        else:
            drawn = np.frombuffer(random.bytes(rows * -(-count // 8)), np.uint8).reshape(rows, -1)
            bits = np.unpackbits(drawn, axis=1, count=count)
        as_far += int((far(total - 2 * (bits.astype(float) @ values)) >= bound).sum())
    if exact:
        return as_far / flips, f"signs flipped by prompt, in all {flips:,} ways"
    return (1 + as_far) / (1 + flips), f"signs flipped by prompt, {flips:,} times at random"
