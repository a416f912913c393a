"""What single values cannot show, for the verb `compare`."""

from __future__ import annotations

from collections.abc import Iterator

from .candidate import Candidate, Check
from .data_checks import holds_more_than_an_address


def required_model(candidate: Candidate) -> Iterator[str]:
    if candidate["model_name_or_path"] is None and "model_name_or_path" not in candidate.broken:
        yield "--model_name_or_path is missing: name the folder of a run, or any model"
    if candidate["prompts"] is None and "prompts" not in candidate.broken:
        for name in candidate.given("prompt_column"):
            yield f"{candidate.label(name)}: has no effect without --prompts; add it or leave this out"


def judges(candidate: Candidate) -> Iterator[str]:
    names, label = candidate["judge"] or (), candidate.label("judge")
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield f"{label}: {name} stands twice; name each judge once"
    endpoints = [name for name in names if name.startswith(("http://", "https://"))]
    if any(map(holds_more_than_an_address, endpoints)):
        yield (
            f"{label}: its URL has a user, a ? or a #, which may hold a key and would be written with the results; "
            "give the plain URL, and the key as OPENAI_API_KEY"
        )
    if len(endpoints) > 1:
        yield f"{label}: names {len(endpoints)} endpoints; ask one at a time, each into an --output_dir of its own"
    if endpoints and candidate["judge_model"] is None:
        yield "--judge_model is missing: name the model at the endpoint"
    if not endpoints:
        for name in candidate.given("judge_model", "max_judge_requests", "judge_requests_per_minute"):
            yield f"{candidate.label(name)}: is for an endpoint, and --judge names none; leave it out"
    if "vote" not in names:
        for name in candidate.given("vote_port"):
            yield f"{candidate.label(name)}: has no effect without --judge vote; add it or leave this out"


def sampling(candidate: Candidate) -> Iterator[str]:
    if candidate["temperature"] == 0:
        for name in candidate.given("top_p", "top_k"):
            yield f"{candidate.label(name)}: has no effect with --temperature 0; leave out one of the two"


COMPARISON_CHECKS: dict[Check, tuple[str, ...]] = {
    required_model: (),
    judges: ("judge", "judge_model"),
    sampling: ("temperature",),
}
