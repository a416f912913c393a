"""What the checkpoints of a run hold of our own, in the trainer's state, so that each has it as it was at its step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .files import TRAINER_STATE
from .records import Unreadable, read_trainer_state

IDENTITY = "identity"  # the key of what the run is; every version that keeps it writes manifests
OWN = "dpo_run"  # among the states of callbacks, where a trainer that does not know it leaves it alone


def keep_in_checkpoints(state: Any, key: str, value: Any) -> None:
    """Puts a value (as JSON) into the trainer's state, from which the next checkpoints have it."""
    own = state.stateful_callbacks.setdefault(OWN, {"args": {}, "attributes": {}})
    own["attributes"][key] = value


def kept_in_checkpoint(state: Any, key: str) -> Any:
    """The value that the trainer's state has, from the checkpoint it was read from; None where it has none."""
    return state.stateful_callbacks.get(OWN, {}).get("attributes", {}).get(key)


def read_kept(checkpoint: Path) -> dict[str, Any]:
    """All that a checkpoint holds of this kind; empty for one of another trainer."""
    try:
        state = read_trainer_state(checkpoint / TRAINER_STATE)
        return dict(state["stateful_callbacks"][OWN]["attributes"])
    except (OSError, Unreadable, LookupError, TypeError):  # TypeError: one of them is null
        return {}
