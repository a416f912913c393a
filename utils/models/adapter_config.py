"""adapter_config.json: what an adapter says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..run.names import ADAPTER_CONFIG
from ..run.writing import write_json
from .hub_files import read_json_file


def read_adapter_config(name: str, revision: str | None = None) -> dict[str, Any] | None:
    """The config of the adapter in a folder or hub repository; None where there is no adapter."""
    return read_json_file(name, ADAPTER_CONFIG, revision)


def sort_modules(folder: Path) -> None:
    """Puts the names in a saved adapter's config in order: PEFT writes its sets in another one in each process."""
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), list):
            config[name].sort()
    write_json(path, config)
