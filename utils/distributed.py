"""What the processes of a run tell one another. Every collective operation of this package is one of these.

All processes must come to the same operations in the same order. One that fails on the way raises and ends; the
others, which wait for it in the next operation, notice at once that its connection is closed, and a RuntimeError says
so there. What a process found out alone and the others must act on is therefore not raised by it but told with
`gather` or `agree`, and raised by all.

Objects and counts go through one gloo group, apart from the devices, which are not waited for. Sums of tensors that
are on the devices stay there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# Seconds that a process waits in a step for one that is silent (one that ends is noticed at once).
PATIENCE = 600
# One that waits while another reads data or writes a checkpoint waits longer than any step takes.
LONG = timedelta(days=1)

T = TypeVar("T")

_group: Any = None  # all processes
_patience = timedelta(seconds=PATIENCE)  # where an operation does not say otherwise


def meet(patience: timedelta) -> None:
    """Makes the group through which the processes tell one another things; in all of them, once they are connected.

    Args:
        patience: how long an operation waits for a process that is silent.
    """
    global _group, _patience
    _patience = patience
    _group = dist.new_group(backend="gloo", timeout=patience)


def are_several() -> bool:
    """Whether other processes compute with this one."""
    return dist.is_initialized() and dist.get_world_size() > 1


def gather(value: T, patience: timedelta | None = None) -> list[T]:
    """What each process brings here, in order of rank."""
    if not are_several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_waiting(patience))
    return values


def agree(finding: T | None, patience: timedelta | None = None) -> T | None:
    """The first finding of any process, so that all go on in the same way; None where no process has one."""
    return next((one for one in gather(finding, patience) if one is not None), None)


def told_by_main(value: T) -> T:
    """The main process's value, in every process, which it is sent to once. The main process may go on before."""
    if not are_several():
        return value
    values = [value]
    dist.broadcast_object_list(values, group=_waiting())
    return values[0]


def most_of(count: int) -> int:
    """The largest count of any process."""
    if not are_several():
        return count
    most = torch.tensor(count)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=_waiting())
    return int(most)


def any_of(found: bool) -> bool:
    """Whether it is so in any process."""
    return most_of(int(found)) > 0


def sum_of(values: Tensor) -> Tensor:
    """Adds up, in place, the tensors of all processes, on the devices that they are on; nothing waits for a GPU."""
    if are_several():
        dist.all_reduce(values)
    return values


@contextlib.contextmanager
def one_first() -> Iterator[None]:
    """Within the context one process of each machine goes first; the others then find what it left in the cache.

    Where the first fails the others still wait; as it ends, their waiting ends with a RuntimeError.
    """
    goes_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not goes_first:
        _wait_for_all()
    yield
    if goes_first:
        _wait_for_all()


def _wait_for_all() -> None:
    if are_several():
        dist.barrier(group=_waiting(LONG))


def _waiting(patience: timedelta | None = None) -> Any:
    """The group, whose next operation waits so long for a process that is silent."""
    dist.distributed_c10d._set_pg_timeout(patience or _patience, _group)
    return _group
