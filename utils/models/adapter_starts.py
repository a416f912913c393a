"""What PEFT does to a base model when it puts an adapter on it, as the adapter's config says.

Most adapters leave the base alone: with the adapter switched off, the model is the base. Some do not. PiSSA and OLoRA
begin from parts of the base's own weights, which PEFT takes out of the base each time it loads the adapter; KaSA cuts
the base's weights; `bias` other than none brings biases of its own; `layer_replication` repeats layers. Such a base
cannot be shared with another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UserError

LEAVE_BASE_ALONE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
REPEATABLE = ("pissa", "olora")  # computed from the base alone, to the same numbers each time


def changes_base(config: Mapping[str, Any]) -> bool:
    """Whether a model with this adapter switched off is something else than the adapter's base."""
    return rewrites_weights(config) or config.get("bias") not in (None, "none") or bool(config.get("layer_replication"))


def rewrites_weights(config: Mapping[str, Any]) -> bool:
    """Whether PEFT computes new weights for the base from its own when it puts this adapter on."""
    return _start(config) not in LEAVE_BASE_ALONE or bool(config.get("kasa_config"))


def check_start(flag: str, name: str, config: Mapping[str, Any]) -> None:
    """Refuses an adapter whose saved files do not say what its maker's model was.

    Raises:
        UserError: what PEFT took out of the base depends on data, on a device or on chance, and was not saved.
    """
    start = _start(config)
    if start in LEAVE_BASE_ALONE or start in REPEATABLE:
        return
    raise UserError(
        f"{flag} {name}: init_lora_weights in its adapter_config.json is {start!r:.60}: PEFT changed the base when it "
        "made this adapter, and loading cannot repeat that, so the model would differ. Convert it where it was "
        "made: save_pretrained with path_initial_model_for_weight_conversion makes a plain LoRA adapter of it, "
        "merge_and_unload a whole model"
    )


def _start(config: Mapping[str, Any]) -> Any:
    start = config.get("init_lora_weights")
    return start.lower() if isinstance(start, str) else start
