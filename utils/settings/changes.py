"""What --allow_changes can name: the parts of a run that a resumed one may have otherwise, when a person says so."""

from __future__ import annotations

WORLD = "world"
# name -> what it lets pass; any flag that matters is a name too
GROUPS = {
    "data": "rows that train or are held out with other content",
    "tokenizer": "other token ids for the same texts",
    "model": "other weights of the model or adapter that training started from",
    "reference": "other weights of --ref_model_name_or_path",
    "precision": "another computing precision",
    WORLD: "another number of rows per optimizer step",
}
ALL_SETTINGS = "settings"  # every flag at once
# Flags that shape what a checkpoint holds: with another value it could not be loaded.
CANNOT_CHANGE = frozenset({"use_lora", "lora_r", "lora_target_modules", "use_dora", "optim", "architecture"})
