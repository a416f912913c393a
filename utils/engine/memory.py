"""Memory: whether an error says that it ran out, how much this process may still take, and the peak of a piece of work.

On a GPU the driver says when there is no more. On a CPU the system gives more than it has and then ends the process, so
there what may be used must be known beforehand: the memory that is free, and the limits set on the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LESS_MEMORY = "a lower --max_length, --gradient_checkpointing, --use_lora, --use_4bit, or a device with more memory"
# torch's own words; oneDNN's, when it finds no room for its buffers or its code (that it cannot make the description of
# a primitive is another thing); C++'s; the system's.
NO_ROOM = re.compile(
    "not enough memory: you tried to allocate|could not create a (memory|primitive)(?! desc)|std::bad_alloc"
    "|[Cc]annot allocate memory"
)
CGROUPS = Path("/sys/fs/cgroup")
SAMPLED_EVERY = 0.002  # seconds, of the memory of a process on a CPU


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory could not be had, of a GPU or of the host."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if "torch" not in sys.modules:
        return False
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return should_reduce_batch_size(error) or (
        isinstance(error, RuntimeError) and NO_ROOM.search(str(error)) is not None
    )


def keep_freed_memory() -> None:
    """Lets the C library keep memory that tensors gave back (Linux with glibc).

    It would return each large block to the system and ask for zeroed pages again at the next, a tenth of the time of
    training on a CPU. Variables of the environment that set the same (MALLOC_...) are the person's to choose.
    """
    _return_blocks_over(2**30)


@contextlib.contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Within the context large blocks are returned to the system one by one when they are freed.

    For what is computed once and in other sizes than training: the C library would keep its blocks, and many that come
    later do not fit into them.
    """
    _return_blocks_over(2**17)
    try:
        yield
    finally:
        release_memory()
        keep_freed_memory()


def _return_blocks_over(size: int) -> None:
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library
    trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
    mallopt(mmap_threshold, size)
    mallopt(trim_threshold, 2**31 - 1)


def release_memory() -> None:
    """Gives back what is held and not used: by Python, by the GPU's allocator, by the C library."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def free_bytes(device: torch.device) -> int:
    """How much more memory this process may take: on a GPU what is free, on a CPU the least that any limit leaves."""
    if device.type == "cuda":
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    return max(0, min([psutil.virtual_memory().available, *_left_in_cgroups(), *_left_by_limits()]))


def _left_in_cgroups() -> Iterator[int]:
    """What the control groups of this process leave (containers, batch systems); nothing outside Linux."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = CGROUPS if not controllers else CGROUPS / "memory"
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group == top or top in group.parents:
                left = _left_in(group, *names)
                if left is not None:
                    yield left


def _left_in(group: Path, limit_name: str, used_name: str) -> int | None:
    try:
        limit, used = (group / limit_name).read_text().strip(), int((group / used_name).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not limit.isdigit() or int(limit) >= 2**60:  # no limit
        return None
    files = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))  # given back when needed
    return int(limit) - used + int(files)


def _left_by_limits() -> Iterator[int]:
    """What `ulimit -v` and `ulimit -d` leave."""
    if sys.platform != "linux":
        return
    import resource

    import psutil

    used: Any = psutil.Process().memory_info()
    for kind, size in ((resource.RLIMIT_AS, used.vms), (resource.RLIMIT_DATA, used.data)):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit - size


class Peak:
    """The most memory that was taken within the context, beyond what was taken at its beginning: `bytes`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0
        self._ended = threading.Event()

    def __enter__(self) -> Peak:
        self._before = self._used()
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            import torch

            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._ended.set()
        self._thread.join()

    def _used(self) -> int:
        if self.device.type == "cuda":
            import torch

            return torch.cuda.memory_allocated(self.device)
        import psutil

        return psutil.Process().memory_info().rss

    def _watch(self) -> None:
        while True:
            ended = self._ended.wait(SAMPLED_EVERY)
            self.bytes = max(self.bytes, self._used() - self._before)
            if ended:
                return
