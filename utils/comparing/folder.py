"""Where the files of a comparison go: a folder that holds no one else's."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..responses.ballots import read_ballots
from ..run.folder import check_writable, named_as_given
from ..run.lock import check_not_held
from ..run.names import COMPARISON_FILES
from ..run.paths import read_path
from ..run.results import is_result
from ..settings.training import Settings
from ..settings.verbs import ComparisonSettings
from .judges import VOTE
from .sides import Side

RECORD, ROWS, PAGE = COMPARISON_FILES
FOLDER = "comparison"


def find_folder(settings: Settings, model: Side) -> Path:
    """Where the files go: --output_dir, else a folder in that of the run.

    Raises:
        UserError: there is no such place, it cannot be written, or it holds files of these names that are not ours.
    """
    if settings.run.output_dir is not None:
        folder = read_path(settings.run.output_dir).resolve()
    elif model.trained.folder is not None:
        source, run = Path(model.source.name), model.trained.folder
        folder = run / (FOLDER if source == run else f"{FOLDER}-{source.name}")
    else:
        raise UserError(
            f"--output_dir is missing: {model.source.name} is not a run of this script, whose folder would hold "
            "the results; name a folder"
        )
    with named_as_given(settings.run.output_dir):
        _check_content(folder)
    if VOTE in (settings.of(ComparisonSettings).judge or ()):
        read_ballots(folder)
    return folder


def _check_content(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: a file of that name exists")
    check_not_held(folder)
    check_writable(folder)
    present = [name for name in (RECORD, ROWS, PAGE) if (folder / name).exists()]
    if present and not is_result(folder / RECORD, "compare"):
        raise UserError(
            f"--output_dir {folder}: its {present[0]} is not from a comparison of this script; choose another folder"
        )
