"""What single values cannot show, verb by verb; the checks that training runs too stand in cross_checks.py."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator

from ..run.program import join_command
from ..settings.verbs import READ_WITH, SITUATIONS
from .candidate import Candidate, check
from .cross_checks import OF_PAIRS, OF_RUN, columns, splits

SAMPLING_NAMES = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")


@check()
def required_data(candidate: Candidate) -> Iterator[str]:
    if candidate["dataset_name"] is None and "dataset_name" not in candidate.broken:
        yield "--dataset_name is missing: name a hub dataset, a folder or a file"


@check("report_file", "json_file", "output_file", "dataset_name", "compare")
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
                yield f"{candidate.label(name)} is {candidate[name]}: is the input data; name another file"


@check("remove", "output_file", "compare", "generate")
def inspection_needs(candidate: Candidate) -> Iterator[str]:
    removed = candidate["remove"] or ()
    if candidate["generate"]:
        return
    if candidate["model_name_or_path"] is None and "model_name_or_path" not in candidate.broken:
        names = candidate.given(
            "max_length", "model_revision", "trust_remote_code", "chat_template", "chat_template_kwargs", "reasoning"
        )
        labels = [candidate.label(name) for name in names if candidate[name] is not False]
        if "too_long" in removed:
            labels.append(f"{candidate.label('remove')} too_long")
        for label in labels:
            yield f"{label}: tokens are counted with --model_name_or_path only; add it or leave this out"
    if removed and candidate["output_file"] is None:
        yield f"{candidate.label('remove')}: has no effect without --output_file; add it or leave this out"
    if "overlap" in removed and candidate["compare"] is None:
        yield f"{candidate.label('remove')} overlap: needs --compare; add it or leave this out"


@check("generate", "scorer", "temperature")
def generation_needs(candidate: Candidate) -> Iterator[str]:
    label = candidate.label("generate")
    judging = ("scorer", "judge_model", "max_judge_requests", "judge_requests_per_minute")
    own = (*judging, "num_prompts", "num_generations", *SAMPLING_NAMES)
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
        yield f"{label}: makes pairs, checks none, so {candidate.label(name)} has no effect; run data on the result"
    columns = ("chosen_column", "rejected_column", "group_by", "pairs_per_prompt")
    for name in candidate.given(*columns, "min_score_gap", "min_score_ratio", "strip_citations"):
        if candidate[name] is not False:
            yield f"{label}: reads only the prompts, so {candidate.label(name)} has no effect; leave it out"
    endpoint = str(candidate["scorer"]).startswith(("http://", "https://"))
    if endpoint and holds_more_than_an_address(candidate["scorer"]):
        yield (
            "--scorer: its URL has a user, a ? or a #, which may contain a key and would be written with the samples; "
            "give the plain URL, and the key as OPENAI_API_KEY"
        )
    if endpoint and candidate["judge_model"] is None:
        yield "--judge_model is missing: name the model at the endpoint"
    if not endpoint and candidate["scorer"] is not None:
        for name in candidate.given("judge_model", "max_judge_requests", "judge_requests_per_minute"):
            yield f"{candidate.label(name)}: is for an endpoint, and --scorer is not one; leave it out"


def holds_more_than_an_address(url: str) -> bool:
    """Whether a URL has parts in which a key may stand."""
    host = url.split("/", 3)[2]
    return "@" in host or "?" in url or "#" in url


@check()
def compared_model(candidate: Candidate) -> Iterator[str]:
    if candidate["model_name_or_path"] is None and "model_name_or_path" not in candidate.broken:
        yield "--model_name_or_path is missing: name the folder of a run, as in `compare runs/demo`, or any model"
    if candidate["prompts"] is None and "prompts" not in candidate.broken:
        for name in candidate.given("prompt_column"):
            yield f"{candidate.label(name)}: has no effect without --prompts; add it or leave this out"


@check("judge", "judge_model")
def judges(candidate: Candidate) -> Iterator[str]:
    names, label = candidate["judge"] or (), candidate.label("judge")
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield f"{label}: {name} is given twice; name each judge once"
    endpoints = [name for name in names if name.startswith(("http://", "https://"))]
    if any(map(holds_more_than_an_address, endpoints)):
        yield (
            f"{label}: its URL has a user, a ? or a #, which may contain a key and would be written with the results; "
            "give the plain URL, and the key as OPENAI_API_KEY"
        )
    if len(endpoints) > 1:
        yield f"{label}: names {len(endpoints)} endpoints; ask one at a time, each into its own --output_dir"
    if endpoints and candidate["judge_model"] is None:
        yield "--judge_model is missing: name the model at the endpoint"
    if not endpoints:
        for name in candidate.given("judge_model", "max_judge_requests", "judge_requests_per_minute"):
            yield f"{candidate.label(name)}: is for an endpoint, and --judge names none; leave it out"
    if "vote" not in names:
        for name in candidate.given("vote_port"):
            yield f"{candidate.label(name)}: has no effect without --judge vote; add it or leave this out"


@check("temperature")
def compared_sampling(candidate: Candidate) -> Iterator[str]:
    if candidate["temperature"] == 0:
        for name in candidate.given("top_p", "top_k"):
            yield f"{candidate.label(name)}: has no effect with --temperature 0; leave out one of the two"


@check()
def evaluated_model(candidate: Candidate) -> Iterator[str]:
    if candidate["model_name_or_path"] is None and "model_name_or_path" not in candidate.broken:
        yield (
            "--model_name_or_path is missing: name the folder of a run, as in `evaluate runs/demo`, or any model "
            "(with --ref_model_name_or_path)"
        )


@check("dataset_name")
def pairs_of_ones_own(candidate: Candidate) -> Iterator[str]:
    if candidate["dataset_name"] is not None:
        return
    for name in candidate.given(*READ_WITH):
        yield (
            f"{candidate.label(name)}: says how --dataset_name is read; add it, or leave this out to evaluate the "
            "run's own held-out pairs"
        )


@check()
def planned_model(candidate: Candidate) -> Iterator[str]:
    if candidate["model_name_or_path"] is None and "model_name_or_path" not in candidate.broken:
        yield "--model_name_or_path is missing: name a hub model, or a folder with its config.json"
    if candidate["measure"] and candidate["dataset_name"] is None:
        yield f"{candidate.label('measure')}: takes steps on real pairs; name them with --dataset_name"


@check("gpu", "gpu_memory", "gpu_tflops")
def planned_device(candidate: Candidate) -> Iterator[str]:
    for name in candidate.given("gpu_memory", "gpu_tflops"):
        if candidate["gpu"] is not None:
            yield f"{candidate.label(name)}: --gpu sets the device's memory and speed; leave out one of the two"
    if (candidate["gpu_memory"] is None) != (candidate["gpu_tflops"] is None):
        yield "--gpu_memory and --gpu_tflops describe a device together; give both"
    if candidate["measure"] and candidate.given("gpu", "gpu_memory", "gpu_tflops"):
        yield f"{candidate.label('measure')}: measures this machine, not another; leave out one of the two"


@check("sharding", "num_devices", "offload")
def planned_sharding(candidate: Candidate) -> Iterator[str]:
    sharding, offload, several = candidate["sharding"], candidate["offload"], candidate["num_devices"] > 1
    if offload is None and sharding not in (None, "none") and not several:
        yield f"{candidate.label('sharding')}: needs several devices; give --num_devices"
    able: tuple[str, ...] = OFFLOADING.get(offload, ())
    if not several:
        able = tuple(name for name in able if name.startswith("zero"))  # FSDP does not run in one process
    if offload is not None and sharding is not None and sharding not in able:
        where = "" if several else " on one device"
        yield f"{candidate.label('offload')} {offload}{where}: needs --sharding {' or '.join(able)}, not {sharding}"


# What can offload to CPU memory what --offload names.
OFFLOADING = {"optimizer": ("zero2", "zero3"), "weights": ("zero3", "fsdp2")}


@check()
def required_merge(candidate: Candidate) -> Iterator[str]:
    wanted = {
        "model_name_or_path": "name the folder of a run, or an adapter",
        "output_dir": "name the folder for the merged model",
    }
    for name, advice in wanted.items():
        if candidate[name] is None and name not in candidate.broken:
            yield f"--{name} is missing: {advice}"


@check("max_shard_size", "skip_verification", "dataset_name")
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
            yield f"{candidate.label(name)}: the run's own data are read as in the run; add --dataset_name"


@check()
def required_chat(candidate: Candidate) -> Iterator[str]:
    if candidate["model_name_or_path"] is None and "model_name_or_path" not in candidate.broken:
        yield "--model_name_or_path is missing: name the folder of a run, as in `chat runs/demo`, a model or an adapter"


@check("temperature")
def chat_needs(candidate: Candidate) -> Iterator[str]:
    if candidate["temperature"] == 0:
        for name in candidate.given("top_p", "top_k", "seed"):
            label = candidate.label(name)
            yield f"{label}: has no effect at --temperature 0, which is greedy decoding"


@check("report")
def comparison_page(candidate: Candidate) -> Iterator[str]:
    path, label = candidate["report"], candidate.label("report")
    if path is None:
        return
    if not path.lower().endswith((".html", ".htm")):
        yield f"{label} is {path}: must end in .html or .htm"
    elif os.path.isdir(os.path.expanduser(path)):
        yield f"{label} is {path}: is a folder; name a file"


@check()
def reported_run(candidate: Candidate) -> Iterator[str]:
    if candidate["run"] is None and "run" not in candidate.broken:
        yield "--run is missing: name the folder of a run, as in `report runs/demo`"


@check("output_file")
def config_to_write(candidate: Candidate) -> Iterator[str]:
    names = ("model_name_or_path", "dataset_name", "output_dir")
    named = [word for name in candidate.given(*names) for word in (f"--{name}", candidate[name])]
    if candidate["situation"] is None and candidate["from_file"] is None and "situation" not in candidate.broken:
        yield (
            f"--situation is missing: one of {', '.join(SITUATIONS)}; or name a config of another tool with --from. "
            f"For example: {join_command(['init', '--situation', 'one_24gb_qlora', *named])}"
        )
    if candidate["situation"] is not None and candidate["from_file"] is not None:
        yield f"{candidate.label('from_file')}: is translated line by line, so --situation has no effect; leave one out"
    for name in candidate.given(*names) if candidate["from_file"] is not None else ():
        yield f"{candidate.label(name)}: the translated config sets it; change it in the written file"
    path = candidate["output_file"]
    if path is not None and not path.lower().endswith((".yaml", ".yml")):
        yield f"{candidate.label('output_file')} is {path}: must end in .yaml or .yml"


EVALUATE = (evaluated_model, pairs_of_ones_own, columns)
PLAN = (*OF_RUN, *OF_PAIRS, planned_model, planned_device, planned_sharding)
PLAN_SFT = (*OF_RUN, planned_model, planned_device, planned_sharding)
DATA = (required_data, inspection_files, inspection_needs, generation_needs, splits)
COMPARE = (compared_model, judges, compared_sampling)
MERGE = (required_merge, merge_needs, splits, columns)
CHAT = (required_chat, chat_needs)
STATUS = (comparison_page,)
REPORT = (reported_run,)
INIT = (config_to_write,)
