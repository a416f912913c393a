"""What single values cannot show, for the verbs that use a model rather than train it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .candidate import Candidate, Check


def required_merge(candidate: Candidate) -> Iterator[str]:
    wanted = {
        "model_name_or_path": "name the folder of a run, or an adapter",
        "output_dir": "name the folder for the merged model",
    }
    for name, advice in wanted.items():
        if candidate[name] is None and name not in candidate.broken:
            yield f"--{name} is missing: {advice}"


def merge_needs(candidate: Candidate) -> Iterator[str]:
    size = candidate["max_shard_size"]
    if re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]I?B", size, re.IGNORECASE) is None:
        yield f"{candidate.label('max_shard_size')} is {size!r}: must be a size such as 5GB or 500MB"
    reading = (
        "dataset_config", "dataset_split", "dataset_format", "dataset_adapter", "prompt_column", "chosen_column",
        "rejected_column", "pairs_per_prompt", "min_score_gap", "min_score_ratio", "strip_citations", "group_by",
        "validation_split",
    )  # fmt: skip
    if candidate["skip_verification"]:
        for name in candidate.given("dataset_name", "max_samples", "max_length", *reading):
            yield f"{candidate.label(name)}: has no effect with --skip_verification; leave one of the two out"
        return
    if candidate["dataset_name"] is None:
        for name in candidate.given(*reading):
            yield f"{candidate.label(name)}: the run's own data are read as it read them; add --dataset_name"


MERGE_CHECKS: dict[Check, tuple[str, ...]] = {
    required_merge: (),
    merge_needs: ("max_shard_size", "skip_verification", "dataset_name"),
}


def required_chat(candidate: Candidate) -> Iterator[str]:
    if candidate["model_name_or_path"] is None and "model_name_or_path" not in candidate.broken:
        yield "--model_name_or_path is missing: name the folder of a run, a model or an adapter"


def chat_needs(candidate: Candidate) -> Iterator[str]:
    if candidate["temperature"] == 0:
        for name in candidate.given("top_p", "top_k", "seed"):
            label = candidate.label(name)
            yield f"{label}: has no effect at --temperature 0, which takes the likeliest token each time"


CHAT_CHECKS: dict[Check, tuple[str, ...]] = {
    required_chat: (),
    chat_needs: ("temperature",),
}
