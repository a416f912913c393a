"""Prompts that stand where they should not: in training and in the held-out data, or in an evaluation set too."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np

from ..data.prompts import name_split, read_prompts
from ..data.splitting import prompt_key
from ..data.turns import flatten, show_value
from ..settings.data import DataSettings, InspectionSettings
from ..settings.training import Settings
from .findings import NOTE, PROBLEM, Finding, find_pairs, with_example
from .scanning import Scan, hash_texts
from .similarity import ALIKE, find_alike, sign_texts
from .subject import Subject

BATCH = 1000


def check_held_out(subject: Subject, scan: Scan) -> list[Finding]:
    """Held-out pairs whose prompt, or one nearly the same, is trained on."""
    held_out, trained = np.flatnonzero(subject.held_out), np.flatnonzero(subject.trained)
    if len(held_out) == 0 or len(trained) == 0:
        return []
    shared = np.isin(scan.prompt_keys[held_out], scan.prompt_keys[trained])
    alike, _ = find_alike(scan.prompt_signatures[held_out], scan.prompt_signatures[trained])
    near = (alike >= 0) & ~shared
    # What is taken out is the trained pairs: an evaluation keeps its size.
    behind = np.isin(scan.prompt_keys, scan.prompt_keys[held_out[shared]]) & subject.trained
    findings = [
        *find_pairs(
            subject, "held_out_prompt", PROBLEM, "a held-out pair whose prompt is also trained on",
            "They make held-out accuracy too optimistic; --remove held_out_prompts leaves out the training side.",
            held_out[shared], np.flatnonzero(behind),
        ),
        *find_pairs(
            subject, "near_held_out_prompt", NOTE,
            f"a held-out pair whose prompt is nearly the same as one trained on (about {ALIKE:.0%} alike)",
            "Check whether they ask the same; the split keeps equal prompts together, not similar ones.",
            held_out[near], np.zeros(0, dtype=int),
        ),
    ]  # fmt: skip
    exact = np.full(len(held_out), -1)
    keys, first = np.unique(scan.prompt_keys[trained], return_index=True)
    exact[shared] = first[np.searchsorted(keys, scan.prompt_keys[held_out[shared]])]
    others = {"held_out_prompt": exact, "near_held_out_prompt": alike}
    return [_show_other(finding, subject, held_out, trained, others[finding.name]) for finding in findings]


def _show_other(
    finding: Finding, subject: Subject, held_out: np.ndarray, trained: np.ndarray, other: np.ndarray
) -> Finding:
    for number in range(len(finding.examples)):
        pair = trained[other[np.searchsorted(held_out, finding.pairs[number])]]
        text = show_value(subject.pairs[int(pair)]["prompt"])[-400:]
        finding = with_example(finding, number, **{"trained prompt": f"{subject.find_place(int(pair))}: {text}"})
    return finding


def check_overlap(subject: Subject, scan: Scan, settings: Settings) -> tuple[list[Finding], dict[str, Any]]:
    """Pairs whose prompt stands in the data of --compare too, and the numbers of the comparison.

    Raises:
        UserError: those data cannot be read, or have no prompts.
    """
    read = read_prompts(name_split(DataSettings(), settings.of(InspectionSettings).compare), "--compare")
    name, prompts = read.source, read.rows
    keys, signatures = _sign_prompts(prompts)
    exact = np.isin(scan.prompt_keys, keys)
    alike, likeness = find_alike(scan.prompt_signatures, signatures)
    near = (alike >= 0) & ~exact
    findings = [
        *find_pairs(
            subject, "overlap", PROBLEM, f"a prompt that is also in {name}",
            "A model trained on them cannot be evaluated on that data; --remove overlap leaves them out.",
            np.flatnonzero(exact),
        ),
        *find_pairs(
            subject, "near_overlap", NOTE, f"a prompt nearly the same as one of {name} (about {ALIKE:.0%})",
            "Check whether they ask the same; --remove overlap leaves them out too.",
            np.flatnonzero(near),
        ),
    ]  # fmt: skip
    for place, finding in enumerate(findings):
        if finding.name == "near_overlap":
            for number in range(len(finding.examples)):
                pair = finding.pairs[number]
                text = show_value(prompts[int(alike[pair])]["prompt"])[-400:]
                finding = with_example(finding, number, **{f"prompt of {name}": text})
            findings[place] = finding
    met = np.isin(keys, scan.prompt_keys)
    counts = {
        "source": name,
        "prompts": len(keys),
        "prompts_found": int(met.sum()),
        "prompts_nearly_found": int((~met & np.isin(np.arange(len(keys)), alike[near])).sum()),
        "pairs": int(exact.sum()),
        "near_pairs": int(near.sum()),
        "highest_likeness": float(likeness[near].max()) if near.any() else None,
    }
    return findings, counts


def _sign_prompts(prompts: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    keys, signatures = [], []
    for batch in prompts.select_columns(["prompt"]).iter(batch_size=BATCH):
        keys.append(hash_texts([prompt_key(prompt) for prompt in batch["prompt"]]))
        signatures.append(sign_texts([flatten(prompt) for prompt in batch["prompt"]]))
    return np.concatenate(keys), np.concatenate(signatures)
