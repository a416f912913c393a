"""What single values cannot show, for the verb `data`."""

from __future__ import annotations

import os.path
from collections.abc import Iterator

from .candidate import Candidate, Check

SAMPLING_NAMES = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")


def required_data(candidate: Candidate) -> Iterator[str]:
    if candidate["dataset_name"] is None and "dataset_name" not in candidate.broken:
        yield "--dataset_name is missing: name a hub dataset, a folder or a file"


def inspection_files(candidate: Candidate) -> Iterator[str]:
    endings = {"report_file": (".html", ".htm"), "json_file": (".json",), "output_file": (".jsonl", ".parquet")}
    for name in candidate.given(*endings):
        path = candidate[name]
        if name == "json_file" and path == "-":
            continue
        if not path.lower().endswith(endings[name]):
            yield f"{candidate.label(name)} is {path}: must end in {' or '.join(endings[name])}"
        elif os.path.isdir(os.path.expanduser(path)):
            yield f"{candidate.label(name)} is {path}: is a folder; name a file"
    inputs = [candidate[name] for name in ("dataset_name", "compare") if candidate[name]]
    for name in candidate.given("output_file"):
        path = os.path.realpath(os.path.expanduser(candidate[name]))
        for source in inputs:
            if path == os.path.realpath(os.path.expanduser(source)):
                yield f"{candidate.label(name)} is {candidate[name]}: is the data that is read; name another file"


def inspection_needs(candidate: Candidate) -> Iterator[str]:
    removed = candidate["remove"] or ()
    if candidate["generate"]:
        return
    if candidate["model_name_or_path"] is None and "model_name_or_path" not in candidate.broken:
        names = candidate.given("max_length", "model_revision", "trust_remote_code", "chat_template")
        labels = [candidate.label(name) for name in names if candidate[name] is not False]
        if "too_long" in removed:
            labels.append(f"{candidate.label('remove')} too_long")
        for label in labels:
            yield f"{label}: tokens are counted with --model_name_or_path only; add it or leave this out"
    if removed and candidate["output_file"] is None:
        yield f"{candidate.label('remove')}: has no effect without --output_file; add it or leave this out"
    if "overlap" in removed and candidate["compare"] is None:
        yield f"{candidate.label('remove')} overlap: names what --compare finds; add it or leave this out"


def generation_needs(candidate: Candidate) -> Iterator[str]:
    label = candidate.label("generate")
    own = ("scorer", "num_prompts", "num_generations", "judge_model", "max_judge_requests")
    own += ("judge_requests_per_minute", *SAMPLING_NAMES)
    if not candidate["generate"]:
        for name in candidate.given(*own):
            yield f"{candidate.label(name)}: has no effect without --generate; add it or leave this out"
        return
    wanted = {
        "model_name_or_path": "name the model that answers",
        "output_file": "name the file for the pairs",
        "scorer": "name a file.py:function, a reward model or an endpoint",
    }
    for name, advice in wanted.items():
        if candidate[name] is None and name not in candidate.broken:
            yield f"--{name} is missing: {advice}"
    if candidate["temperature"] == 0:
        yield f"{candidate.label('temperature')} is 0: all responses to a prompt would be the same; must be above 0"
    checking = ("report_file", "json_file", "remove", "compare", "validation_split", "max_length", "max_samples")
    for name in candidate.given(*checking):
        yield f"{label}: makes pairs and checks none, so {candidate.label(name)} has no effect; run data on the result"
    unused = ("chosen_column", "rejected_column", "group_by", "pairs_per_prompt")
    unused += ("min_score_gap", "min_score_ratio", "strip_citations")
    for name in candidate.given(*unused):
        if candidate[name] is not False:
            yield f"{label}: reads the prompts alone, so {candidate.label(name)} has no effect; leave it out"
    endpoint = str(candidate["scorer"]).startswith(("http://", "https://"))
    if endpoint and holds_more_than_an_address(candidate["scorer"]):
        yield (
            "--scorer: its URL has a user, a ? or a #, which may hold a key and would be written with the samples; "
            "give the plain URL, and the key as OPENAI_API_KEY"
        )
    if endpoint and candidate["judge_model"] is None:
        yield "--judge_model is missing: name the model at the endpoint"
    if not endpoint and candidate["scorer"] is not None:
        for name in candidate.given("judge_model", "max_judge_requests", "judge_requests_per_minute"):
            yield f"{candidate.label(name)}: is for an endpoint, and --scorer is none; leave it out"


def holds_more_than_an_address(url: str) -> bool:
    """Whether a URL has parts in which a key may stand."""
    host = url.split("/", 3)[2]
    return "@" in host or "?" in url or "#" in url


DATA_CHECKS: dict[Check, tuple[str, ...]] = {
    required_data: (),
    inspection_files: ("report_file", "json_file", "output_file", "dataset_name", "compare"),
    inspection_needs: ("remove", "output_file", "compare", "generate"),
    generation_needs: ("generate", "scorer", "temperature"),
}
