"""Records of runs, which may come from anybody: read within bounds, and checked once, when they are read.

What a record must look like is written down here. A key that is not named may hold anything, for a later version may
write it; what is named is of its kind, is null, or is missing. Numbers that are not finite, which a run that came apart
records, count as null, and metrics that are null as missing. So those who use a record look for what is missing, and
for nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..settings.registry import ROWS, TRAINS
from .bounded import Unreadable, parse_json, read_json

LARGEST = 1e300  # of a number: sums of a few stay finite
SMALLEST = 1e-300  # below it a number is 0: shares of it can be computed with
LARGEST_COUNT = 2**63
MOST_LINE_BYTES = 2**24  # of a line of a file of JSON lines
STATES = ("running", "finished", "interrupted", "failed")  # as a record may say; see utils/status/state.py for `died`


@dataclass(frozen=True)
class Kind:
    """What a value must be. Mappings: `keys` by name, and `rest` for every other key, without which that is left out;
    lists: `rest` for each item."""

    said: str  # the end of "must be ..."
    accepts: tuple[type, ...] = ()
    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    keys: Mapping[str, Kind] | None = None
    rest: Kind | None = None
    needed: tuple[str, ...] = ()  # keys without which the mapping is none
    drops: tuple[type, ...] = ()  # of a mapping: keys of these kinds are left out where they are null
    length: int | None = None  # of a list
    gaps: bool = False  # whether an item of a list may be null
    strict: bool = False  # of a mapping: whether any other key that is not of the kind of the rest is refused


TEXT = Kind("text", (str,))
YES_NO = Kind("true or false", (bool,))
NUMBER = Kind("a number", (int, float))
COUNT = Kind("a whole number from 0", (int,), low=0, high=LARGEST_COUNT)
STEP = Kind("a whole number", (int,), low=-1, high=LARGEST_COUNT)
ANY_MAPPING = Kind("a mapping", (dict,))


def _list(item: Kind, length: int | None = None, gaps: bool = False) -> Kind:
    many = f"of {length} items" if length else "of any length"
    return Kind(f"a list {many}, each {item.said}", (list,), rest=item, length=length, gaps=gaps)


def _map(item: Kind | None = None, needed: tuple[str, ...] = (), drops: tuple[type, ...] = (), **keys: Kind) -> Kind:
    return Kind("a mapping", (dict,), keys=keys, rest=item, needed=needed, drops=drops)


def _strict(item: Kind, **keys: Any) -> Kind:
    return replace(_map(item, **keys), strict=True)


def _one_of(*choices: str) -> Kind:
    return Kind(f"one of {', '.join(choices)}", (str,), choices=choices)


SOURCE = _map(
    base=TEXT,
    adapter=TEXT,
    revision=TEXT,
    tokenizer=TEXT,
    adapter_revision=TEXT,
    in_4bit=YES_NO,
    needed=("base",),
)
# Of rows that were held out or trained on: means, and counts.
METRICS = _map(
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
COUNTS = _map(COUNT, drops=(int,))
PROCESS = _map(
    pid=COUNT,
    host=TEXT,
    machine=_list(TEXT, gaps=True),
    started=NUMBER,
    working_folder=TEXT,
    script=TEXT,
    processes=COUNT,
    launcher=_list(TEXT),
    since=TEXT,
    command=TEXT,
)
DATA = _map(
    source=TEXT,
    reading=TEXT,
    dropped=COUNTS,
    sources=_list(
        _map(name=TEXT, reading=TEXT, good=COUNT, drawn=COUNT, train=COUNT, held_out=COUNT, needed=("name",))
    ),
    train_pairs=COUNT,
    train_rows=COUNT,
    held_out_pairs=COUNT,
    held_out_rows=COUNT,
    truncated=COUNT,
    max_length=COUNT,
    chat_template=TEXT,
    shared_prompts=COUNT,
    fingerprint=TEXT,
    drops=(int, dict, list),
)
RUN = _map(
    status=_one_of(*STATES),
    verb=_one_of(*(verb.name for verb in ROWS if TRAINS in verb.does)),
    settings=ANY_MAPPING,  # each by its flag, where it is used
    started=TEXT,
    updated=TEXT,
    failure=TEXT,
    step=STEP,
    steps=STEP,
    seconds_left=NUMBER,
    longest_silence=NUMBER,
    process=PROCESS,
    arguments=_list(TEXT),
    command=TEXT,
    versions=_map(TEXT),
    model=_map(parameters=COUNT, trainable_parameters=COUNT, architecture=TEXT),
    data=DATA,
    reference=TEXT,
    reference_model=SOURCE,
    start=SOURCE,
    metrics=_map(METRICS, train=METRICS, held_out_before=METRICS, held_out=METRICS, drops=(dict,)),
    resources=_map(NUMBER),
    warnings=_list(TEXT),
    alarms=Kind("a list", (list,)),
    early_stopping=_map(metric=TEXT, step=COUNT, stopped=YES_NO, needed=("metric", "step")),
    precision=TEXT,
    device=TEXT,
    wandb_run_id=TEXT,
    engine=ANY_MAPPING,
    files=ANY_MAPPING,
    identity=_map(_map(TEXT)),
    needed=("status", "verb", "settings"),
    drops=(dict, list),
)
# The trainer's own state in a checkpoint, with what is kept in it of ours (see kept.py). The trainer reads the file
# itself, so nothing that is wrong in it may be left out here.
IDENTITY = _map(
    settings=ANY_MAPPING,
    data=TEXT,
    rows=_list(COUNT, length=2),
    ids=_list(TEXT),
    tokenizer=TEXT,
    model=_map(TEXT, needed=("config", "weights")),
    base=_map(TEXT, needed=("config", "weights")),
    reference=_map(TEXT, needed=("config", "weights")),
    precision=TEXT,
    device=TEXT,
    batch=_list(COUNT, length=3),
    versions=_map(TEXT),
)
OWN_STATE = _map(attributes=_map(stops=_list(COUNT), left_out=_list(COUNT), identity=IDENTITY, changes=_list(TEXT)))
TRAINER_STATE = _map(
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
    log_history=_list(_strict(NUMBER, step=COUNT, needed=("step",))),
    stateful_callbacks=_strict(Kind("a mapping or a list", (dict, list)), dpo_run=OWN_STATE),
)
KEPT_STATE = _map(deepspeed=YES_NO, processes=COUNT)  # beside an optimizer
# A line of metrics.jsonl, of the files of rows, and of the samples.
LINE = _map(NUMBER, step=STEP, needed=("step",), drops=(int, float))
VALUE = Kind("text, number, list or mapping", (str, int, float, bool, list, dict))
ROW = _map(
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
    written while a run goes on. Nothing where there is no regular file."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        while line := file.readline(MOST_LINE_BYTES):
            try:
                value = parse_json(line)
                yield check(value, kind or ANY_MAPPING)
            except Unreadable:
                continue


def check(value: Any, kind: Kind) -> Any:
    """The value, with null in place of numbers that are not finite.

    Raises:
        Unreadable: it is not of this kind; the text names the first place where it is not.
    """
    return _check(value, kind, "")


def _check(value: Any, kind: Kind, place: str) -> Any:
    name = place or "it"
    if isinstance(value, float) and not math.isfinite(value) and float in kind.accepts:
        return None
    if not isinstance(value, kind.accepts) or (isinstance(value, bool) and bool not in kind.accepts):
        raise Unreadable(f"{name} is {_shown(value)}: must be {kind.said}")
    if kind.choices and value not in kind.choices:
        raise Unreadable(f"{name} is {_shown(value)}: must be {kind.said}")
    if isinstance(value, int | float):
        low, high = (kind.low, kind.high) if kind.low is not None else (-LARGEST, LARGEST)
        if not low <= value <= high:
            raise Unreadable(f"{name} is {_shown(value)}: must be {kind.said}, and none so large or small")
        return 0.0 if 0 < abs(value) < SMALLEST else value
    if isinstance(value, dict):
        return _check_mapping(value, kind, place)
    if isinstance(value, list) and kind.rest is not None:
        if kind.length not in (None, len(value)):
            raise Unreadable(f"{name} has {len(value):,} items: must be {kind.said}")
        items = enumerate(value)
        return [
            None if item is None and kind.gaps else _check(item, kind.rest, f"{place}[{number}]")
            for number, item in items
        ]
    return value


def _check_mapping(value: dict[str, Any], kind: Kind, place: str) -> dict[str, Any]:
    missing = [key for key in kind.needed if value.get(key) is None]
    if missing:
        raise Unreadable(f"{place or 'it'} has no {missing[0]}")
    checked = {}
    for key, inner in value.items():
        named = key in (kind.keys or ())
        expected = kind.keys[key] if named else kind.rest
        if expected is not None and inner is not None:
            try:
                inner = _check(inner, expected, f"{place}.{key[:80]}".lstrip("."))
            except Unreadable:
                if named or kind.strict:
                    raise
                continue
        kinds = expected.accepts if expected is not None and not expected.needed else ()
        if inner is not None or not set(kinds) & set(kind.drops):
            checked[key] = inner
    return checked


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else f"{str(value)[:12]}..."
    return text if len(text) <= 80 else f"{text[:80]}..."
