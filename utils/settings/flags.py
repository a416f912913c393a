"""What a setting is made of: a dataclass field that is also a flag, its bounds, and the verbs that take it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
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
# What is handed to a chat template by this script, or by transformers as it renders.
NAMES_TAKEN = (
    *("messages", "conversation", "tools", "add_generation_prompt", "continue_final_message", "chat_template"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "sanitize_control_tokens"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "bos_token", "eos_token", "unk_token", "pad_token"),
)
TEMPLATE_KWARGS = Bound(
    f"without the names that templates are given anyway: {', '.join(NAMES_TAKEN[:4])} and the like",
    lambda given: not set(given) & set(NAMES_TAKEN),
)

# What a verb does, as its row in registry.py says: a flag names the verbs that know it by this, or by their names.
USES_MODEL = "uses a model"
READS_DATA = "reads a data set"
SPLITS_DATA = "splits it into training and held-out rows"
READS_PAIRS = "reads preference pairs"
RENDERS = "renders messages with a chat template"
COMPUTES = "computes in a precision of choice"
SCORES_ROWS = "computes losses of rows"
SCORES_PAIRS = "scores pairs with policy and reference"
TRAINS = "trains"
SAVES = "leaves a folder"


def flag(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    bound: Bound | None = None,
    usual: str | None = None,
    verbs: str | tuple[str, ...] = (),
    many: bool = False,
    says: Mapping[str, str] | None = None,
) -> Any:
    """A dataclass field that is also a command-line flag.

    `choices` and `bound` limit the value, `usual` is named when it breaks them ("0.1 is usual"), `many` lets it take
    several values (separated by spaces or commas; stored as a tuple). `verbs` names the verbs that take the flag, or
    what they do; without it the flag is for every verb whose row lists its group, and in the groups of a training run
    for the verbs that train. `says` is the help of verbs for which the flag means another thing.
    """
    verbs = (verbs,) if isinstance(verbs, str) else verbs
    metadata = {"help": help, "choices": choices, "bound": bound, "usual": usual, "verbs": verbs, "many": many}
    return dataclasses.field(default=default, metadata=metadata | {"says": says or {}})
