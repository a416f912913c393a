"""The machine: device, precision, seed, versions, memory, and the one place that prints."""

from __future__ import annotations

import functools
import logging
import os
import platform
import re
import shutil
import sys
import textwrap
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "scikit-learn", "wandb")


# What no text is written with: control characters but for tabs and line ends, and marks that reverse the writing.
CONTROL = (*range(9), 11, 12, *range(14, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
HALVES = range(0xD800, 0xE000)  # of characters that take two
# What would steer a terminal, hide in its writing, or be in no terminal's encoding.
STEERING = re.compile(f"[{re.escape(''.join(map(chr, (*CONTROL, 13, 0x200E, 0x200F, *HALVES))))}]")
HALF_CHARACTER = re.compile(f"[{chr(HALVES[0])}-{chr(HALVES[-1])}]")  # so Python shows a byte that is no text


def make_visible(text: str) -> str:
    """The text with control characters as escapes: a terminal would obey them."""
    return STEERING.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def is_main_process() -> bool:
    """True in the process that prints and writes; launchers number theirs in RANK."""
    return os.environ.get("RANK", "0") == "0"


def fit_terminal(text: str, stream: TextIO) -> str:
    """The text with lines broken between words where they are wider than the terminal; elsewhere as it is.

    The indented lines below one that ends in a colon are commands, to be copied whole.
    """
    if not stream.isatty():
        return text
    width, fitted, whole = max(shutil.get_terminal_size().columns, 40), [], False
    for line in text.split("\n"):
        begin = line[: len(line) - len(line.lstrip())]
        if len(line) <= width or (whole and begin):
            fitted.append(line)
        else:
            fitted += textwrap.wrap(
                line,
                width,
                subsequent_indent=begin or " " * HANGING,
                break_long_words=False,
                break_on_hyphens=False,
                replace_whitespace=False,
            )
        whole = line.endswith(":") or (whole and bool(begin))
    return "\n".join(fitted)


def say(text: str = "") -> None:
    """Prints one line for the person, from the main process only, at once; names and texts in it steer no terminal."""
    if is_main_process():
        print(fit_terminal(make_visible(text), sys.stdout), flush=True)


HANGING = 6  # columns that the further lines of a wrapped one are indented by
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def readable_seconds(seconds: float) -> str:
    """`4:07`, or `1:02:09` from an hour on."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def readable_bytes(count: float) -> str:
    """`1.5 GiB`, `24 GiB`; below a tenth of one `64 MiB`, and below a tenth of that `20 KiB`."""
    size, unit = next(((size, unit) for size, unit in UNITS if count >= size / 10), UNITS[-1])
    return f"{count / size:.{1 if count < 10 * size and count % size else 0}f} {unit}"


def quiet_libraries() -> None:
    """Keeps libraries from writing over our lines, and from waiting and remembering too much; before importing them."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    # OpenMP threads wait by spinning; on cores shared with other work a long spin keeps the others from finishing.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # oneDNN keeps code and memory for each shape of matrix that it met, and every batch has new ones: half a GiB.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "128")
    # It offers, on some processors, to fetch a kernel from the hub that is used nowhere here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def quiet_loaded_libraries() -> None:
    """The part of `quiet_libraries` that needs the libraries themselves.

    What they made while they were loaded stays, half a million objects, and Python's collector need not look through it
    each time (a third of a second).
    """
    import warnings

    import datasets
    import transformers

    # Notices of the libraries to their own developers, about calls between them that we do not make.
    for module in ("trl", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "torch", "huggingface_hub"):
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"{module}(\..*)?")
    # PEFT's, of patterns that transformers writes for every kind of expert, whether the model has them or not.
    warnings.filterwarnings("ignore", message=r"The following \w+_pattern keys did not match any targeted module")
    # It says with every product of matrices that 8-bit weights are computed with in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    tell_in_one_line()
    # torch reports failures that it raises, too, and that we explain; whoever sets TORCH_LOGS wants to see them.
    if "TORCH_LOGS" not in os.environ:
        for handler in logging.getLogger("torch").handlers:
            handler.setLevel(logging.CRITICAL + 1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    _keep_out_of_collections()


@functools.cache
def _keep_out_of_collections() -> None:
    """Once in a process: the libraries, which stay; to count them each time would take longer than to freeze them."""
    import gc

    gc.freeze()


def tell_in_one_line() -> None:
    """From here on what a library warns of, and nobody silenced, is one line without paths and code, said once."""
    import warnings

    told = set()

    def tell(library: str, text: str) -> None:
        line = f"warning: {library}: {' '.join(text.split())}"
        if line not in told:
            told.add(line)
            print(fit_terminal(make_visible(line), sys.stderr), file=sys.stderr, flush=True)

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        parts = Path(filename).parts
        place = parts.index("site-packages") + 1 if "site-packages" in parts else -1
        tell(Path(parts[place]).stem, str(message))

    class OneLine(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell(record.name.partition(".")[0], record.getMessage())

    warnings.showwarning = show
    logging.lastResort = OneLine(logging.WARNING)  # of loggers for which nobody set up anything


@dataclass(frozen=True)
class Precision:
    """How numbers are computed: `dtype` in the matrix products, float32 in what is trained and in the loss."""

    dtype: torch.dtype
    device: torch.device
    reason: str

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def autocast(self) -> bool:
        """True when float32 weights are computed with in a shorter format."""
        return self.name != "float32"


def find_device() -> torch.device:
    """The accelerator of this process when there is one, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def cpu_computes_bfloat16_fast() -> bool:
    """True when the processor has bfloat16 arithmetic (AVX512-BF16, AMX, Arm BF16): else it is emulated, and slow."""
    import torch

    if platform.machine().lower() in ("arm64", "aarch64"):
        check = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return bool(check and check())
    return any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def choose_precision(wish: str, device: torch.device) -> Precision:
    """The computing precision for `--dtype` on this device, with the reason as a readable phrase."""
    import torch

    if wish != "auto":
        return Precision(getattr(torch, wish), device, "as asked with --dtype")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(torch.bfloat16, device, "this GPU computes it fast")
        return Precision(torch.float16, device, "this GPU has no bfloat16 arithmetic")
    if device.type == "cpu" and cpu_computes_bfloat16_fast():
        return Precision(torch.bfloat16, device, "this processor computes it fast")
    return Precision(torch.float32, device, "bfloat16 is slow on this processor")


def device_name(device: torch.device) -> str:
    """What a person calls the device: the GPU's name, or the CPU with its number of threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def set_seed(seed: int) -> None:
    """Seeds Python, NumPy and torch."""
    import transformers

    transformers.set_seed(seed)


def read_versions() -> dict[str, str]:
    """Package name -> installed version, Python included."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: of the GPU where one computes, else of this process (resident set)."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    import psutil

    info: Any = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not Linux, whose getrusage begins with the peak of whoever started the process
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
