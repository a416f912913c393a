"""Weights that a model's files hold in few bits already, as their config.json says: the one place that reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..libraries import compiled_at_first_call
from .hub_files import read_json_file

CAN_BE_WRITTEN_OUT = "bitsandbytes"
BITS = {"fp8": 8, "fbgemm_fp8": 8, "mxfp4": 4, "gptq": None, "awq": None}  # None: the config says it


@dataclass(frozen=True)
class Stored:
    """How files hold their weights: the method's name, and bits of each where that is known."""

    method: str
    bits: int | None

    @property
    def in_4bit(self) -> bool:
        """Whether a weight takes half a byte."""
        return self.bits == 4

    def __str__(self) -> str:
        return f"{self.bits} bits ({self.method})" if self.bits else f"few bits ({self.method})"


def read_stored(name: str, revision: str | None) -> Stored | None:
    """How the files of a base hold their weights, a folder or a hub repository; None where they are not quantized."""
    config = read_json_file(name, "config.json", revision) or {}
    parts = [config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))]
    found = next(
        (part[key] for part in parts for key in ("quantization_config", "compression_config") if part.get(key)), None
    )
    if not isinstance(found, dict):
        return None
    method = str(found.get("quant_method") or ("bitsandbytes" if _bitsandbytes(found) else "a method without a name"))
    return Stored(method, _bitsandbytes(found) or _as_bits(found.get("bits", found.get("w_bit"))) or BITS.get(method))


def check_trainable(flag: str, name: str, stored: Stored | None, adapts: bool, use_4bit: bool) -> None:
    """Refuses what weights in few bits do not allow, before they are loaded.

    Raises:
        UserError: all weights are to be trained, or files that another method quantized are to be quantized again.
    """
    if stored is None:
        return
    faults = []
    if not adapts:
        faults.append(
            f"{flag} {name}: its files hold the weights in {stored}, which cannot be trained; add --use_lora to train "
            "an adapter on them, or name the unquantized model"
        )
    if use_4bit and stored.method != CAN_BE_WRITTEN_OUT:
        faults.append(f"--use_4bit: the files of {name} hold the weights in {stored} already; leave it out")
    if use_4bit and stored.method == CAN_BE_WRITTEN_OUT and not stored.in_4bit:
        faults.append(f"--use_4bit: the files of {name} hold the weights in {stored}; leave it out")
    if faults:
        raise UserError(*faults)


def check_mergeable(flag: str, name: str, base: str, stored: Stored | None) -> None:
    """Refuses an adapter whose base cannot be written out in full numbers.

    Raises:
        UserError: only bitsandbytes' weights can be.
    """
    if stored is not None and stored.method != CAN_BE_WRITTEN_OUT:
        raise UserError(
            f"{flag} {name}: the files of its base {base} hold the weights in {stored}, which cannot be merged into; "
            "to merge into the unquantized model, name that one as base_model_name_or_path in a copy of "
            "the adapter's adapter_config.json"
        )


def _bitsandbytes(config: dict[str, Any]) -> int | None:
    return 4 if config.get("load_in_4bit") else 8 if config.get("load_in_8bit") else None


def _as_bits(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 < value < 17 else None


def check_4bit(what: str = "--use_4bit") -> None:
    """Refuses `what`, which needs bitsandbytes, where it cannot quantize on this machine, with what to install."""
    try:
        with compiled_at_first_call():
            import bitsandbytes
        from bitsandbytes.cextension import lib
    except Exception as error:
        raise UserError(
            f"{what} needs bitsandbytes, which cannot be loaded here ({error}). "
            "Install it with `pip install bitsandbytes`" + (f", or leave {what} out" if what == "--use_4bit" else "")
        ) from None
    if type(lib).__name__ == "ErrorHandlerMockBNBNativeLibrary":
        raise UserError(
            f"--use_4bit: bitsandbytes {bitsandbytes.__version__} has no library for this machine. "
            "Reinstall it with `pip install --force-reinstall bitsandbytes`, or leave --use_4bit out"
        )
