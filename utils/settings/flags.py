"""What a setting is made of: a dataclass field that is a flag too, its bounds, and the verbs that know it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bound:
    """What a value must satisfy: `holds(value)`, said as "must be {text}"."""

    text: str
    holds: Callable[[Any], bool]


ABOVE_ZERO = Bound("above 0", lambda value: value > 0)
AT_LEAST_ZERO = Bound("0 or more", lambda value: value >= 0)
AT_LEAST_ONE = Bound("1 or more", lambda value: value >= 1)
AT_LEAST_TWO = Bound("2 or more", lambda value: value >= 2)
HALF_OPEN_UNIT = Bound("at least 0 and below 1", lambda value: 0 <= value < 1)
CLOSED_UNIT = Bound("between 0 and 1", lambda value: 0 <= value <= 1)
SHARE_ABOVE_ZERO = Bound("above 0 and at most 1", lambda value: 0 < value <= 1)
BELOW_HALF = Bound("at least 0 and below 0.5", lambda value: 0 <= value < 0.5)
STEPS_OR_SHARE = Bound(
    "a whole number, or a share of all steps between 0 and 1",
    lambda value: 0 < value < 1 or (value >= 1 and value == int(value)),
)
PORT = Bound("between 1 and 65535", lambda value: 1 <= value <= 65535)
SEED = Bound("between 0 and 4294967295", lambda value: 0 <= value < 2**32)
MAX_STEPS = Bound("above 0 (or -1 for no limit)", lambda value: value > 0 or value == -1)

ALL_VERBS = ("train", "sft", "data", "plan", "plan sft", "evaluate", "compare", "merge", "chat", "status", "init")
USES_MODEL = ("train", "sft", "data", "evaluate", "compare", "merge", "chat")
TRAINING = ("train", "sft")
TRAIN = ("train",)
SFT = ("sft",)
DATA = ("data",)
COMPARE = ("compare",)
MERGE = ("merge",)
CHAT = ("chat",)
EVALUATE = ("evaluate",)
PAIRS = ("train", "data", "evaluate", "merge")
READS_DATA = ("train", "sft", "data", "evaluate", "merge")
SPLITS_DATA = ("train", "sft", "data", "merge")
READS_PROMPTS = (*READS_DATA, "compare")
SCORES_PAIRS = ("train", "evaluate")
SCORES_ROWS = ("train", "sft", "evaluate")
RENDERS = ("train", "sft", "data", "evaluate", "compare", "chat")  # verbs that render messages
COMPUTES = ("train", "sft", "evaluate", "compare", "chat")  # verbs whose models compute in a precision of choice
SAVES = ("train", "sft", "evaluate", "compare", "merge")  # verbs that leave a folder
JUDGES = ("data", "compare")
SAMPLING = ("data", "compare", "chat")  # verbs that let a model write
STATUS = ("status",)
INIT = ("init",)
POSITIONAL = {"status": "folder"}  # verb -> the flag whose name may be left out
PLAN = ("plan",)


PLANNED = {"plan": "train", "plan train": "train", "plan sft": "sft"}  # what is planned by each way of saying it


def acts_as(verb: str) -> str:
    """The verb whose flags and checks a verb shares: a plan takes the flags of what it plans."""
    return PLANNED.get(verb, verb)


def takes(verb: str, verbs: tuple[str, ...]) -> bool:
    """Whether a verb knows a flag of these verbs."""
    return verb in verbs or acts_as(verb) in verbs or (verb in PLANNED and "plan" in verbs)


def flag(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    bound: Bound | None = None,
    usual: str | None = None,
    verbs: tuple[str, ...] = TRAINING,
    many: bool = False,
) -> Any:
    """A dataclass field that is also a command-line flag.

    `choices` and `bound` limit the value, `usual` is named when it breaks them ("0.1 is usual"), `verbs` are the
    verbs that know the flag, `many` lets it take several values (separated by spaces or commas; stored as a tuple).
    """
    metadata = {"help": help, "choices": choices, "bound": bound, "usual": usual, "verbs": verbs, "many": many}
    return dataclasses.field(default=default, metadata=metadata)
