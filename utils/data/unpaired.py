"""Answers with a yes/no label, one a row (as for KTO) -> pairs, where one prompt has answers of both labels."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import datasets

from ..errors import UserError
from .checks import find_fault
from .files import quiet
from .identity import hash_value
from .ranking import NO_OTHER_LABEL
from .row_cache import map_rows
from .schemas import Reading

BATCH = 1000
LABELS = {name: name for name in ("prompt", "chosen", "rejected")}


def pair_up(answers: datasets.Dataset, reading: Reading) -> datasets.Dataset:
    """Pairs of a wanted and an unwanted answer to the same prompt, at most `pairs_per_prompt` of each prompt.

    `answers` has `prompt`, `completion`, `label`, `row` and `reason`. A pair stands where its wanted answer stood and
    has that answer's `row`; an answer without a partner, and one that cannot be read, stays in place with its reason.
    """
    plan = plan_pairs(answers, reading.choice.pairs_per_prompt)
    if len(answers) and all(index < 0 for index in plan["second"]) and NO_OTHER_LABEL in plan["why"]:
        raise UserError(
            f"the rows ({len(answers):,}) are single answers with a yes/no label ('{reading.columns['label']}', as for "
            "KTO), and no prompt has answers with both labels: no pair can be made. DPO needs a chosen and a rejected "
            "answer to the same prompt; the verb sft can train on those labelled true"
        )
    features = {name: kind for name, kind in answers.features.items() if name not in ("completion", "label")}
    completion = answers.features["completion"]
    with quiet(answers.data.nbytes):
        return map_rows(
            datasets.Dataset.from_dict(plan),
            _join,
            decides=(answers._fingerprint, reading.choice.pairs_per_prompt),
            on_disk=bool(answers.cache_files),
            batched=True,
            fn_kwargs={"answers": answers},
            features=datasets.Features({"prompt": completion, "chosen": completion, "rejected": completion} | features),
            remove_columns=["first", "second", "why"],
            desc="Pairing the answers",
        )


def plan_pairs(answers: datasets.Dataset, most: int) -> dict[str, list[Any]]:
    """Indices of the answers of each row to come: `first`, `second` (-1: none) and `why` there is none."""
    prompts: dict[bytes, tuple[list[int], list[int]]] = {}  # wanted and unwanted
    plan: list[tuple[int, int, str | None]] = []
    for index, (prompt, label, reason) in enumerate(_columns(answers)):
        if reason is not None:
            plan.append((index, -1, reason))
        else:
            prompts.setdefault(hash_value(prompt), ([], []))[0 if label else 1].append(index)
    for wanted, unwanted in prompts.values():
        pairs = _meet(len(wanted), len(unwanted), most)
        plan += [(wanted[i], unwanted[j], None) for i, j in pairs]
        if not pairs:
            plan += [(index, -1, NO_OTHER_LABEL) for index in (*wanted, *unwanted)]
    plan.sort(key=lambda entry: entry[:2])
    return {name: [entry[i] for entry in plan] for i, name in enumerate(("first", "second", "why"))}


def _meet(wanted: int, unwanted: int, most: int) -> list[tuple[int, int]]:
    """At most `most` pairs of positions; each on the side with fewer is used once before one is used again."""
    pairs = product(range(min(wanted, most)), range(min(unwanted, most)))
    return sorted(pairs, key=lambda pair: ((pair[1] - pair[0]) % max(wanted, unwanted), pair))[:most]


def _columns(answers: datasets.Dataset) -> Iterable[tuple[Any, ...]]:
    for batch in answers.select_columns(["prompt", "label", "reason"]).iter(batch_size=BATCH):
        yield from zip(batch["prompt"], batch["label"], batch["reason"], strict=True)


def _join(batch: dict[str, list[Any]], answers: datasets.Dataset) -> dict[str, list[Any]]:
    first = answers[batch["first"]]
    second = answers[[max(index, 0) for index in batch["second"]]]
    paired = [index >= 0 for index in batch["second"]]
    output = {name: values for name, values in first.items() if name not in ("completion", "label")}
    output["chosen"] = [value if is_pair else None for value, is_pair in zip(first["completion"], paired, strict=True)]
    output["rejected"] = [v if is_pair else None for v, is_pair in zip(second["completion"], paired, strict=True)]
    rows = [dict(zip(output, values, strict=True)) for values in zip(*output.values(), strict=True)]
    faults = [find_fault(row, LABELS) for row in rows]
    return output | {
        "reason": [fault if pair else why for fault, pair, why in zip(faults, paired, batch["why"], strict=True)]
    }
