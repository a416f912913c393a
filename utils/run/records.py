"""Records of runs, which may come from anybody: read within bounds, and checked once, when they are read.

What a record must look like is written down here. A key that is not named may hold anything, for a later version may
write it; what is named is of its kind, is null, or is missing. Numbers that are not finite, which a run that came apart
records, count as null, and metrics that are null as missing. So those who use a record look for what is missing, and
for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..settings.flags import TRAINS
from ..settings.registry import ROWS
from .bounded import Unreadable, parse_json, read_json
from .kinds import (
    ANY_MAPPING,
    COUNT,
    LARGEST,
    NUMBER,
    STEP,
    TEXT,
    YES_NO,
    Kind,
    check,
    list_of,
    mapping,
    one_of,
    strict,
)

MOST_LINE_BYTES = 2**24  # of a line of a file of JSON lines
STATES = ("running", "finished", "interrupted", "failed")  # as a record may say; see life.py for `died`


SOURCE = mapping(
    base=TEXT,
    adapter=TEXT,
    revision=TEXT,
    tokenizer=TEXT,
    adapter_revision=TEXT,
    in_4bit=YES_NO,
    needed=("base",),
)
# Of rows that were held out or trained on: means, and counts.
METRICS = mapping(
    NUMBER,
    loss=NUMBER,
    accuracy=NUMBER,
    margin=NUMBER,
    perplexity=NUMBER,
    chosen_kl=NUMBER,
    pairs=COUNT,
    rows=COUNT,
    step=COUNT,
    drops=(int, float),
)
COUNTS = mapping(COUNT, drops=(int,))
PROCESS = mapping(
    pid=COUNT,
    host=TEXT,
    machine=list_of(TEXT, gaps=True),
    started=NUMBER,
    working_folder=TEXT,
    script=TEXT,
    processes=COUNT,
    launcher=list_of(TEXT),
    since=TEXT,
    command=TEXT,
)
DATA = mapping(
    source=TEXT,
    reading=TEXT,
    dropped=COUNTS,
    sources=list_of(
        mapping(name=TEXT, reading=TEXT, good=COUNT, drawn=COUNT, train=COUNT, held_out=COUNT, needed=("name",))
    ),
    train_pairs=COUNT,
    train_rows=COUNT,
    held_out_pairs=COUNT,
    held_out_rows=COUNT,
    truncated=COUNT,
    max_length=COUNT,
    chat_template=TEXT,
    reasoning=TEXT,
    shared_prompts=COUNT,
    fingerprint=TEXT,
    drops=(int, dict, list),
)
RUN = mapping(
    status=one_of(*STATES),
    verb=one_of(*(verb.name for verb in ROWS if TRAINS in verb.does)),
    settings=ANY_MAPPING,  # each by its flag, where it is used
    given=list_of(TEXT),
    used=ANY_MAPPING,
    started=TEXT,
    updated=TEXT,
    failure=TEXT,
    step=STEP,
    steps=STEP,
    seconds_left=NUMBER,
    longest_silence=NUMBER,
    process=PROCESS,
    arguments=list_of(TEXT),
    command=TEXT,
    versions=mapping(TEXT),
    model=mapping(parameters=COUNT, trainable_parameters=COUNT, architecture=TEXT),
    data=DATA,
    reference=TEXT,
    reference_model=SOURCE,
    start=SOURCE,
    metrics=mapping(METRICS, train=METRICS, held_out_before=METRICS, held_out=METRICS, drops=(dict,)),
    resources=mapping(NUMBER),
    warnings=list_of(TEXT),
    alarms=Kind("a list", (list,)),
    early_stopping=mapping(metric=TEXT, step=COUNT, stopped=YES_NO, needed=("metric", "step")),
    precision=TEXT,
    device=TEXT,
    wandb_run_id=TEXT,
    engine=ANY_MAPPING,
    files=ANY_MAPPING,
    identity=mapping(mapping(TEXT)),
    needed=("status", "verb", "settings"),
    drops=(dict, list),
)
# The trainer's own state in a checkpoint, with what is kept in it of ours (see kept.py). The trainer reads the file
# itself, so nothing that is wrong in it may be left out here.
IDENTITY = mapping(
    settings=ANY_MAPPING,
    data=TEXT,
    rows=list_of(COUNT, length=2),
    ids=list_of(TEXT),
    tokenizer=TEXT,
    model=mapping(TEXT, needed=("config", "weights")),
    base=mapping(TEXT, needed=("config", "weights")),
    reference=mapping(TEXT, needed=("config", "weights")),
    precision=TEXT,
    device=TEXT,
    batch=list_of(COUNT, length=3),
    versions=mapping(TEXT),
)
OWN_STATE = mapping(
    attributes=mapping(stops=list_of(COUNT), left_out=list_of(COUNT), identity=IDENTITY, changes=list_of(TEXT))
)
TRAINER_STATE = mapping(
    global_step=COUNT,
    max_steps=STEP,
    is_local_process_zero=YES_NO,
    is_world_process_zero=YES_NO,
    is_hyper_param_search=YES_NO,
    trial_name=TEXT,
    trial_params=ANY_MAPPING,
    best_model_checkpoint=TEXT,
    best_global_step=COUNT,
    best_metric=NUMBER,
    epoch=Kind("a number from 0", (int, float), low=0, high=LARGEST),
    num_train_epochs=NUMBER,
    total_flos=NUMBER,
    logging_steps=NUMBER,
    eval_steps=NUMBER,
    save_steps=NUMBER,
    train_batch_size=COUNT,
    num_input_tokens_seen=NUMBER,
    log_history=list_of(strict(NUMBER, step=COUNT, needed=("step",))),
    stateful_callbacks=strict(Kind("a mapping or a list", (dict, list)), dpo_run=OWN_STATE),
)
KEPT_STATE = mapping(deepspeed=YES_NO, processes=COUNT)  # beside an optimizer
# A line of metrics.jsonl, of the files of rows, and of the samples.
LINE = mapping(NUMBER, step=STEP, needed=("step",), drops=(int, float))
VALUE = Kind("text, number, list or mapping", (str, int, float, bool, list, dict))
ROW = mapping(
    VALUE,
    step=STEP,
    margin=NUMBER,
    loss=NUMBER,
    ref_chosen_logps=NUMBER,
    ref_rejected_logps=NUMBER,
    kind=TEXT,
    id=TEXT,
    place=TEXT,
    chosen=TEXT,
    rejected=TEXT,
    completion=TEXT,
    ended=YES_NO,
    drops=(int, float),
)


def read_run(path: Path, whole: bool = True) -> dict[str, Any]:
    """The record of a run.

    Args:
        whole: whether what every run writes must be there.

    Raises:
        Unreadable: it is no such record.
        OSError: the system refuses the file.
    """
    return check(read_json(path), RUN if whole else replace(RUN, needed=()))


def read_trainer_state(path: Path) -> dict[str, Any]:
    """The state of the trainer in a checkpoint.

    Raises:
        Unreadable: it is no such state.
        OSError: the system refuses the file.
    """
    return check(read_json(path), TRAINER_STATE)


def read_lines(path: Path, kind: Kind | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines. One that is no object of this kind is passed over: a line may be half
    written while a run goes on. Nothing where there is not a regular file."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        while line := file.readline(MOST_LINE_BYTES):
            try:
                value = parse_json(line)
                yield check(value, kind or ANY_MAPPING)
            except Unreadable:
                continue


def mapping_of(record: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The mapping at a path of keys; an empty one where the record has none there."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def number_of(record: Mapping[str, Any], *keys: str) -> float | None:
    """The number at a path of keys; None where there is no finite one."""
    value = mapping_of(record, *keys[:-1]).get(keys[-1])
    return value if _is_number(value) else None


def text_of(record: Mapping[str, Any], *keys: str) -> str | None:
    """The text at a path of keys; None where there is none."""
    value = mapping_of(record, *keys[:-1]).get(keys[-1])
    return value if isinstance(value, str) else None


def numbers_in(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What of metrics is a finite number."""
    return {str(name): value for name, value in metrics.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # no inf, no nan
