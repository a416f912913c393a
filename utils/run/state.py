"""The state of a training as files: nested values and random number generators, in safetensors and JSON, no pickles;
and what the trainer's own state holds of ours, so that each checkpoint has it as it was at its step."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, in_one_line
from .bounded import Unreadable
from .names import TRAINER_STATE
from .records import read_trainer_state
from .writing import replacing, write_json

IDENTITY = "identity"  # the key of what the run is; every version that keeps it writes manifests
OWN = "dpo_run"  # among the states of callbacks, where a trainer that does not know it leaves it alone


def save_state(folder: Path, name: str, state: Any) -> None:
    """Writes a nested state (dicts, lists, tuples, numbers, text, tensors) as `name`.json and `name`.safetensors."""
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    skeleton = _take_apart(state, tensors)
    with replacing(folder / f"{name}.safetensors") as beside:
        save_file(tensors, beside)
    write_json(folder / f"{name}.json", skeleton)


def load_state(folder: Path, name: str) -> Any:
    """Reads what `save_state` wrote.

    Raises:
        UserError: there are no such files, or they are not what it wrote.
    """
    from safetensors.torch import load_file

    with restoring(folder, name):
        skeleton = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return _put_together(skeleton, load_file(folder / f"{name}.safetensors"))


@contextlib.contextmanager
def restoring(folder: Path, name: str) -> Iterator[None]:
    """Turns whatever is raised within, where a state is read or put back, into a UserError that names its file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # files that were changed may hold anything
        said = f"{type(error).__name__}: {in_one_line(error, 200)}"
        raise UserError(
            f"{folder}: its {name} cannot be read back ({said}); resume from an earlier checkpoint, or start over"
        ) from error


def _take_apart(value: Any, tensors: dict[str, Any]) -> Any:
    """`value` as JSON; its tensors go into `tensors` and are named where they stood."""
    import numpy
    import torch

    if isinstance(value, torch.Tensor):
        key = f"{len(tensors)}"
        # A copy of its own: safetensors refuses tensors that share memory.
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if isinstance(value, numpy.ndarray):
        key = f"{len(tensors)}"
        # Not every reader of safetensors knows unsigned integers; as signed ones they keep their bits.
        tensors[key] = torch.from_numpy(value.astype(numpy.int64) if value.dtype.kind == "u" else value.copy())
        return {"array": key, "dtype": str(value.dtype)}
    if isinstance(value, Mapping):
        return {"items": [[_take_apart(k, tensors), _take_apart(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple | list):
        return {
            type(value).__name__ if type(value) in (tuple, list) else "list": [_take_apart(v, tensors) for v in value]
        }
    if isinstance(value, numpy.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be saved in a checkpoint")


def _put_together(skeleton: Any, tensors: Mapping[str, Any]) -> Any:
    if not isinstance(skeleton, dict):
        return skeleton
    if "tensor" in skeleton:
        return tensors[skeleton["tensor"]]
    if "array" in skeleton:
        return tensors[skeleton["array"]].numpy().astype(skeleton["dtype"])
    if "items" in skeleton:
        return {_put_together(k, tensors): _put_together(v, tensors) for k, v in skeleton["items"]}
    if "tuple" in skeleton:
        return tuple(_put_together(v, tensors) for v in skeleton["tuple"])
    return [_put_together(v, tensors) for v in skeleton["list"]]


def read_random_state() -> dict[str, Any]:
    """The state of every random number generator: Python, NumPy, torch and the GPU of this process."""
    import numpy
    import torch

    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts every random number generator where `read_random_state` found it."""
    import numpy
    import torch

    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


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
        return dict(read_state_there(checkpoint)["stateful_callbacks"][OWN]["attributes"])
    except (LookupError, TypeError):  # TypeError: one of them is null
        return {}


def read_state_there(checkpoint: Path) -> dict[str, Any]:
    """The state of the trainer in a checkpoint, ours or another trainer's; empty where there is none to read."""
    try:
        return read_trainer_state(checkpoint / TRAINER_STATE)
    except (OSError, Unreadable):
        return {}
