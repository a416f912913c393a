"""A plan where people look: the terminal, and a JSON file."""

from __future__ import annotations

import json

from ..errors import UserError
from ..run.paths import read_path
from ..run.program import join_command
from ..run.writing import write_json
from ..runtime import say
from ..settings.data import InspectionSettings
from ..settings.training import Settings
from ..settings.verbs import PlanSettings
from .planning import Plan
from .summary import as_record, explain_best, summarize

OF_A_MACHINE = 8  # GPUs, at most, in the usual ones


def publish(plan: Plan, settings: Settings, words: list[str] | None) -> None:
    """Prints the plan, or its JSON; writes --json_file.

    Args:
        words: the arguments of the run in the best way; None where none fits.

    Raises:
        UserError: the file cannot be written.
    """
    price, devices = settings.run.cost_per_hour, settings.of(PlanSettings).num_devices
    file = settings.of(InspectionSettings).json_file
    command = None
    if words is not None:
        named = {"--dataset_name": "DATA", "--output_dir": "runs/planned"}
        rest = [word for name, value in named.items() if name not in words for word in (name, value)]
        command = join_command([*words, *rest], plan.launcher)
    record = as_record(plan, price, devices, command)
    if file == "-":
        say(json.dumps(record, indent=2))
        return
    if file is not None:
        try:
            write_json(read_path(file), record)
        except OSError as error:
            raise UserError(f"--json_file {file}: cannot be written ({error.strerror})") from None
    for line in summarize(plan, price, devices):
        say(line)
    say(explain_best(plan))
    if command is not None:
        say(f"  {command}")
        if devices > OF_A_MACHINE:
            say(
                f"  ({devices} devices are several machines: started on each with its --machine_rank, --num_machines "
                "and --main_process_ip, as docs/scaling.md shows)"
            )
