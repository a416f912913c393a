"""The verb `report`: the page of a run, from the files in its folder."""

from __future__ import annotations

from ..errors import UserError
from ..run.names import REPORT
from ..run.paths import read_path
from ..run.record import read_record
from ..run.writing import write_text
from ..runtime import say
from ..settings.training import Settings
from ..settings.verbs import ReportSettings
from .run_page import make_run_page


def write_report(settings: Settings) -> None:
    """Writes the page into the folder of the run.

    Raises:
        UserError: the folder is not of a run of train or sft, or the page cannot be written.
    """
    name = settings.of(ReportSettings).run or "."
    folder = read_path(name)
    if read_record(folder).get("verb") not in ("train", "sft"):
        raise UserError(f"--run {name}: is not the folder of a run of train or sft; status lists the runs of a folder")
    try:
        write_text(folder / REPORT, make_run_page(folder))
    except OSError as error:
        raise UserError(f"--run {name}: {REPORT} cannot be written ({error.strerror})") from None
    say(f"page: {folder / REPORT}")
