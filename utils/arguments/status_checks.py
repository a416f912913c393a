"""What single values cannot show, for the verbs `status` and `init`."""

from __future__ import annotations

import os.path
from collections.abc import Iterator

from ..settings.verbs import SITUATIONS
from .candidate import Candidate, Check


def comparison_page(candidate: Candidate) -> Iterator[str]:
    path, label = candidate["report"], candidate.label("report")
    if path is None:
        return
    if not path.lower().endswith((".html", ".htm")):
        yield f"{label} is {path}: must end in .html or .htm"
    elif os.path.isdir(os.path.expanduser(path)):
        yield f"{label} is {path}: is a folder; name a file"


def config_to_write(candidate: Candidate) -> Iterator[str]:
    if candidate["situation"] is None and "situation" not in candidate.broken:
        yield f"--situation is missing: one of {', '.join(SITUATIONS)}"
    path = candidate["output_file"]
    if path is not None and not path.lower().endswith((".yaml", ".yml")):
        yield f"{candidate.label('output_file')} is {path}: must end in .yaml or .yml"


STATUS_CHECKS: dict[Check, tuple[str, ...]] = {comparison_page: ("report",)}
INIT_CHECKS: dict[Check, tuple[str, ...]] = {config_to_write: ("output_file",)}
