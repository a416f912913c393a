"""Figures of scored pairs, each with its interval: ranking, calibration, distance, length, and by groups of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .resampling import LEVEL, Bootstrap, Figure, divide, flip_signs, make_figure, share_figure

CONFIDENCE_BINS = 10  # equally wide, from 0.5 to 1
LENGTH_BUCKETS = 5  # with as many pairs each, as far as lengths allow
CALIBRATED_DRAWS = 200  # of outcomes of a calibrated model
LONGER, SHORTER, EQUAL = "chosen is longer", "chosen is shorter", "equally long"

Rows = Sequence[Mapping[str, Any]]
Subsets = dict[tuple[str, str], np.ndarray]  # (kind, name) -> (pairs,) bool

LARGEST_LOSS = np.log(1e30)  # whose perplexity is shown as such; beyond 709 it is no number


@dataclass(frozen=True)
class PairTable:
    """Scored pairs by column; each array has shape (pairs,)."""

    rows: Rows  # the rows of `evaluation_pairs.jsonl`
    prompts: np.ndarray  # the prompt of each pair, as a number
    sources: Sequence[str] | None  # where rows come from several
    trained_on: np.ndarray | None  # bool, where it is known

    def __getitem__(self, name: str) -> np.ndarray:
        """A column as numbers, NaN where a pair has none."""
        return np.array([np.nan if (value := row.get(name)) is None else value for row in self.rows], dtype=float)

    @property
    def length_difference(self) -> np.ndarray:
        """Tokens of the chosen response beyond those of the rejected one."""
        return self["chosen_tokens"] - self["rejected_tokens"]


def measure(table: PairTable, draws: int, seed: int, whole_log_probs: bool = True) -> dict[str, Any]:
    """Everything that `evaluation.json` says of the pairs.

    Args:
        draws: how often the prompts are drawn anew.
        whole_log_probs: whether log-probs are plain sums over tokens, not weighted (--ld_alpha).
    """
    bootstrap = Bootstrap(table.prompts, draws, seed)
    confidence, bins = _confidence(table)
    subsets = _subsets(table)
    sums = bootstrap.sums(_columns(table, subsets, confidence, bins))
    prompts = {key: len(np.unique(table.prompts[mask])) for key, mask in subsets.items()}
    groups = _describe_groups(sums, subsets, prompts)
    measures = {
        "accuracy": share_figure(divide(sums["accuracy"], sums["pairs"]), bootstrap.prompts),
        "margin": make_figure(divide(sums["margin"], sums["pairs"])),
        "chosen_reward": make_figure(divide(sums["chosen_reward"], sums["pairs"])),
        "rejected_reward": make_figure(divide(sums["rejected_reward"], sums["pairs"])),
        "loss": make_figure(divide(sums["loss"], sums["pairs"])),
        "roc_auc": share_figure(bootstrap.roc_auc(table["chosen_reward"], table["rejected_reward"]), bootstrap.prompts),
        "chosen_kl": make_figure(divide(sums["chosen_kl"], sums["has_kl"])),
        "rejected_kl": make_figure(divide(sums["rejected_kl"], sums["has_kl"])),
        "length_controlled_accuracy": _length_controlled(sums, prompts),
    }
    if whole_log_probs:
        for name in ("chosen_logps", "ref_chosen_logps"):
            said = "reference_perplexity" if name.startswith("ref") else "perplexity"
            loss = -divide(sums[name], sums["chosen_tokens"])
            measures[said] = make_figure(np.exp(np.minimum(loss, LARGEST_LOSS)))
    return {
        "pairs": len(table.rows),
        "prompts": bootstrap.prompts,
        "measures": {name: figure for name, figure in measures.items() if figure is not None},
        "calibration": _calibration(table, sums, confidence, bins, seed),
        "length": _length(table, sums, groups),
        "tests": {
            "accuracy_above_half": flip_signs(bootstrap.sum_by_prompt(table["accuracy"] - 0.5), "greater", seed),
            "margin_above_0": flip_signs(bootstrap.sum_by_prompt(table["margin"]), "greater", seed),
        },
        "against_reference": _against_reference(table, bootstrap, sums, seed, whole_log_probs),
        "by_source": groups.get("source", []),
        "by_length": groups.get("length", []),
        "by_training": groups.get("training", []),
    }


def rank(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """1 where `one` is larger, 0 where it is smaller, a half where both are equal."""
    return (1 + np.sign(one - other)) / 2


def _confidence(table: PairTable) -> tuple[np.ndarray, np.ndarray]:
    """How sure the model is of its ranking, as a probability from 0.5 on, and the bin of that."""
    confidence = 1 / (1 + np.exp(-np.abs(table["margin"])))
    bins = np.minimum(((confidence - 0.5) * 2 * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    return confidence, bins


def _columns(table: PairTable, subsets: Subsets, confidence: np.ndarray, bins: np.ndarray) -> dict[Any, np.ndarray]:
    """Everything that is summed over pairs."""
    own = ("accuracy", "margin", "chosen_reward", "rejected_reward", "loss", "chosen_kl", "rejected_kl")
    names = (*own, "chosen_logps", "ref_chosen_logps", "chosen_tokens")
    columns: dict[Any, np.ndarray] = {name: np.nan_to_num(table[name]) for name in names}
    columns["pairs"] = np.ones(len(table.rows))
    columns["has_kl"] = np.isfinite(table["chosen_kl"]).astype(float)
    for key, mask in subsets.items():
        columns |= {(key, "pairs"): mask, (key, "accuracy"): mask * columns["accuracy"]}
        columns[key, "margin"] = mask * columns["margin"]
    for number in range(CONFIDENCE_BINS):
        mask = bins == number
        columns[number, "pairs"] = mask
        columns[number, "confidence"] = mask * confidence
        columns[number, "accuracy"] = mask * columns["accuracy"]
    columns["brier"] = 1 / (1 + np.exp(np.clip(table["margin"], -700, 700))) ** 2  # (1 - P(chosen is preferred))^2
    columns["confidence"] = confidence
    difference, right = table.length_difference, columns["accuracy"]
    columns["lengths_differ"] = difference != 0
    columns["prefers_longer"] = (difference > 0) * right + (difference < 0) * (1 - right)
    columns["longer_is_chosen"] = difference > 0
    for kind, per_token in (("summed", False), ("per_token", True)):
        policy, reference = _rankings(table, per_token)
        columns |= {(kind, "policy"): policy, (kind, "reference"): reference}
    return columns


def _rankings(table: PairTable, per_token: bool) -> tuple[np.ndarray, np.ndarray]:
    """Whether policy and reference find the chosen response likelier, by its log-prob, or that per token."""
    divisors = {side: table[f"{side}_tokens"] if per_token else 1.0 for side in ("chosen", "rejected")}
    policy, reference = (
        rank(*(table[f"{model}{side}_logps"] / divisors[side] for side in divisors)) for model in ("", "ref_")
    )
    return policy, reference


def _subsets(table: PairTable) -> Subsets:
    """Groups of pairs whose accuracy and margin are reported separately."""
    difference = table.length_difference
    longest = np.maximum(table["chosen_tokens"], table["rejected_tokens"])
    subsets: Subsets = {
        ("longer", LONGER): difference > 0,
        ("longer", EQUAL): difference == 0,
        ("longer", SHORTER): difference < 0,
    }
    subsets |= {("difference", name): mask for name, mask in make_buckets(difference, signed=True)}
    subsets |= {("length", name): mask for name, mask in make_buckets(longest)}
    if table.sources is not None:
        sources = np.array(table.sources)
        subsets |= {("source", str(name)): sources == name for name in dict.fromkeys(table.sources)}
    if table.trained_on is not None and table.trained_on.any():
        subsets["training", "prompts trained on"] = table.trained_on
        subsets["training", "prompts not trained on"] = ~table.trained_on
    return {key: mask for key, mask in subsets.items() if mask.any()}


def make_buckets(values: np.ndarray, signed: bool = False) -> list[tuple[str, np.ndarray]]:
    """Ranges of whole numbers with about as many pairs each, named "3 to 8": name and (pairs,) bool."""
    cuts = np.unique(np.quantile(values, np.arange(1, LENGTH_BUCKETS) / LENGTH_BUCKETS, method="lower"))
    numbers = np.searchsorted(cuts, values, side="right")
    buckets = []
    for number in np.unique(numbers):
        mask = numbers == number
        least, most = values[mask].min(), values[mask].max()
        ends = [f"{end:+.0f}" if signed and end else f"{end:.0f}" for end in dict.fromkeys((least, most))]
        buckets.append((" to ".join(ends), mask))
    return buckets


def _describe_groups(sums: dict[Any, np.ndarray], subsets: Subsets, prompts: dict[Any, int]) -> dict[str, list[Any]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for key, mask in subsets.items():
        pairs = sums[key, "pairs"]
        groups.setdefault(key[0], []).append(
            {
                "name": key[1],
                "pairs": int(mask.sum()),
                "prompts": prompts[key],
                "accuracy": share_figure(divide(sums[key, "accuracy"], pairs), prompts[key]),
                "margin": make_figure(divide(sums[key, "margin"], pairs)),
            }
        )
    return groups


def _length_controlled(sums: dict[Any, np.ndarray], prompts: dict[Any, int]) -> Figure | None:
    """The mean of the accuracies where the chosen response is longer and where it is shorter; None without both."""
    sides = ("longer", LONGER), ("longer", SHORTER)
    if not all(side in prompts for side in sides):
        return None
    longer, shorter = (divide(sums[side, "accuracy"], sums[side, "pairs"]) for side in sides)
    return share_figure((longer + shorter) / 2, min(prompts[side] for side in sides))


def _length(table: PairTable, sums: dict[Any, np.ndarray], groups: dict[str, list[Any]]) -> dict[str, Any]:
    """How the ranking goes with length: 'prefers_longer' is of the model, 'longer_is_chosen' of the data."""
    from scipy.stats import spearmanr

    differ = sums["lengths_differ"]
    prompts = len(np.unique(table.prompts[table.length_difference != 0]))
    varies = all(np.ptp(values) > 0 for values in (table["margin"], table.length_difference))
    return {
        "prefers_longer": share_figure(divide(sums["prefers_longer"], differ), prompts),
        "longer_is_chosen": share_figure(divide(sums["longer_is_chosen"], differ), prompts),
        "correlation": float(spearmanr(table["margin"], table.length_difference).statistic) if varies else None,
        "by_longer_side": groups.get("longer", []),
        "by_difference": groups.get("difference", []),
    }


def _calibration(
    table: PairTable, sums: dict[Any, np.ndarray], confidence: np.ndarray, bins: np.ndarray, seed: int
) -> dict[str, Any]:
    """How far P(chosen is preferred) = sigmoid(margin) can be taken at its word."""
    pairs = sums["pairs"]
    curve, gaps = [], np.zeros_like(pairs)
    for number in range(CONFIDENCE_BINS):
        here = sums[number, "pairs"]
        gaps = gaps + np.abs(sums[number, "accuracy"] - sums[number, "confidence"])
        if here[0]:
            curve.append(
                {
                    "from": 0.5 + number / (2 * CONFIDENCE_BINS),
                    "to": 0.5 + (number + 1) / (2 * CONFIDENCE_BINS),
                    "pairs": int(here[0]),
                    "confidence": float(sums[number, "confidence"][0] / here[0]),
                    "accuracy": share_figure(
                        divide(sums[number, "accuracy"], here), len(np.unique(table.prompts[bins == number]))
                    ),
                }
            )
    return {
        "confidence": make_figure(divide(sums["confidence"], pairs)),
        "brier_score": make_figure(divide(sums["brier"], pairs)),
        "expected_calibration_error": make_figure(divide(gaps, pairs)),
        "expected_calibration_error_by_chance": _error_by_chance(confidence, bins, seed),
        "curve": curve,
    }


def _error_by_chance(confidence: np.ndarray, bins: np.ndarray, seed: int) -> dict[str, float]:
    """The expected calibration error that a calibrated model of the same confidences would show on as many pairs:
    its mean, and what it would stay below in LEVEL of cases."""
    random = np.random.default_rng(seed)
    errors = []
    for _ in range(CALIBRATED_DRAWS):
        gaps = (random.random(len(confidence)) < confidence) - confidence
        errors.append(np.abs(np.bincount(bins, weights=gaps)).sum() / len(confidence))
    return {"mean": float(np.mean(errors)), "high": float(np.quantile(errors, LEVEL))}


def _against_reference(
    table: PairTable, bootstrap: Bootstrap, sums: dict[Any, np.ndarray], seed: int, whole_log_probs: bool
) -> dict[str, Any]:
    """Both models rank the same pairs by log-prob, in whole and per token: the accuracies, and whether they differ."""
    found = {}
    for kind in ("summed", "per_token") if whole_log_probs else ("summed",):
        policy, reference = _rankings(table, kind == "per_token")
        gain = divide(sums[kind, "policy"] - sums[kind, "reference"], sums["pairs"])
        found[kind] = {
            "policy": share_figure(divide(sums[kind, "policy"], sums["pairs"]), bootstrap.prompts),
            "reference": share_figure(divide(sums[kind, "reference"], sums["pairs"]), bootstrap.prompts),
            "difference": make_figure(gain),
            "only_policy_right": int((policy > reference).sum()),
            "only_reference_right": int((policy < reference).sum()),
            **flip_signs(bootstrap.sum_by_prompt(policy - reference), "two-sided", seed),
        }
    return found
