"""Devices: what they hold and how fast they multiply, by their makers' data sheets; and this machine, measured."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass

import torch

from ..errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One device. `memory`: bytes; `rate`: matrix products in 16 bits, dense, added up in float32, FLOP/s."""

    name: str
    memory: int
    rate: float
    is_gpu: bool = True
    has_bfloat16: bool = True

    @property
    def reserved(self) -> int:
        """Bytes that are not the model's: a GPU's context and libraries' workspaces; on a CPU what libraries keep once
        they compute, beside the process."""
        return round((0.8 if self.is_gpu else 0.04) * GIB)


# name: GiB, TFLOP/s (16-bit, dense, float32 accumulation), by NVIDIA's and AMD's data sheets
SHEETS = {
    "T4": (15, 65),
    "V100": (32, 125),
    "RTX 3090": (24, 71),
    "RTX 4090": (24, 165),
    "RTX 5090": (32, 210),
    "RTX A6000": (48, 155),
    "A10": (24, 125),
    "L4": (24, 121),
    "L40S": (48, 362),
    "A100 40GB": (40, 312),
    "A100 80GB": (80, 312),
    "H100 80GB": (80, 989),
    "H200": (141, 989),
    "B200": (180, 2250),
    "MI300X": (192, 1307),
}
WITHOUT_BFLOAT16 = ("T4", "V100")


def find_device_by_name(name: str) -> Device:
    """The device of a data sheet, whatever the case and the spaces of its name.

    Raises:
        UserError: it is not in the table.
    """
    plain = {sheet.lower().replace(" ", "").replace("-", ""): sheet for sheet in SHEETS}
    wish = name.lower().replace(" ", "").replace("-", "").removeprefix("nvidia")
    sheet = plain.get(wish) or next((plain[key] for key in plain if wish and key.startswith(wish)), None)
    if sheet is None:
        raise UserError(
            f"--gpu is {name!r}: must be one of {', '.join(SHEETS)}; of another, give --gpu_memory (GiB) and "
            "--gpu_tflops (16-bit matrix products)"
        )
    memory, rate = SHEETS[sheet]
    return Device(sheet, memory * GIB, rate * 1e12, has_bfloat16=sheet not in WITHOUT_BFLOAT16)


def describe_this_machine(dtype: torch.dtype) -> Device:
    """The device that a run would use here: the GPU, or the CPU with its memory and its measured rate."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory, measure_rate(dtype, "cuda"))
    import psutil

    return Device("this CPU", psutil.virtual_memory().total, measure_rate(dtype, "cpu"), is_gpu=False)


def measure_rate(dtype: torch.dtype, device: str, seconds: float = 0.5) -> float:
    """Matrix products of this machine, FLOP/s: the best of several of about the size that training has."""
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def in_glibc_before(*version: int) -> bool:
    """Whether this process has an older GNU C library than that."""
    name, own = platform.libc_ver()
    return name == "glibc" and tuple(map(int, own.split(".")[:2])) < version
