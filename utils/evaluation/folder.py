"""The folder of an evaluation. Other files than its own are never touched."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..models.trained import TrainedModel
from ..run.folder import check_writable, named_as_given
from ..run.lock import check_not_held
from ..run.names import CHECKPOINT, EVALUATION_FILES
from ..run.paths import read_path
from ..run.results import is_result

RECORD = EVALUATION_FILES[0]


def find_results_folder(wish: str | None, trained: TrainedModel) -> Path:
    """Where the results go: as wished, else beside the run, by the name of the checkpoint where it is one.

    Raises:
        UserError: nothing says where, the folder holds something else, or it cannot be written.
    """
    if wish is None:
        if trained.folder is None:
            raise UserError(f"--output_dir is missing: {trained.source.name} is not the folder of a run; name a folder")
        name = Path(trained.source.name).name
        folder = trained.folder / (f"evaluation-{name}" if CHECKPOINT.fullmatch(name) else "evaluation")
    else:
        folder = read_path(wish).resolve()
    with named_as_given(wish):
        check_not_held(folder)
        _check_content(folder)
        check_writable(folder)
    return folder


def _check_content(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: a file of that name exists")
    if not folder.is_dir() or not any(folder.iterdir()) or is_result(folder / RECORD, "evaluate"):
        return
    raise UserError(
        f"--output_dir {folder}: not empty, and not an evaluation of this script (no {RECORD}). Choose another folder"
    )
