"""A commented config for a situation, from the files beside this one, with a person's own names in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError
from ..run.paths import read_path
from ..run.program import ROOT, join_command, path_from_here
from ..run.writing import write_text
from ..runtime import say
from ..settings.training import Settings
from ..settings.verbs import InitSettings
from .translating import translate_config

HERE = Path(__file__).resolve().parent
FSDP = "examples/accelerate/fsdp2.yaml"


def write_config(settings: Settings) -> None:
    """Writes the config of --situation, or that of another tool translated, to --output_file and says how to use it.

    Raises:
        UserError: the file exists or cannot be written, or the other tool's config cannot be translated.
    """
    wish = settings.of(InitSettings)
    situation, path = wish.situation, read_path(wish.output_file)
    if path.exists() or path.is_symlink():
        raise UserError(f"--output_file {path}: exists and is not overwritten; name another file")
    if wish.from_file is not None:
        translate(wish.from_file, path)
        return
    names = {
        "model_name_or_path": settings.model.model_name_or_path,
        "dataset_name": settings.data.dataset_name,
        "output_dir": settings.run.output_dir,
    }
    text = fill_in((HERE / f"{situation}.yaml").read_text(encoding="utf-8"), names)
    _write(path, text)
    say(f"wrote {path}: {text.splitlines()[0].removeprefix('# ')}")
    sharded = situation == "eight_gpus_full"
    launcher = ["accelerate", "launch", "--config_file", path_from_here(FSDP)] if sharded else ["python"]
    say("edit any line (--help explains each setting), check it with a dry run, then train:")
    say(f"  {join_command(['--config', str(path), '--dry_run'], launcher)}")
    say(f"  {join_command(['--config', str(path)], launcher)}")


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"--output_file {path}: cannot be written ({error.strerror})") from None


def translate(name: str, path: Path) -> None:
    """Writes our config for one of another tool, and says what is left to be filled in.

    Raises:
        UserError: it cannot be translated, or not be written.
    """
    made = translate_config(name)
    _write(path, made.text)
    lines = made.text.splitlines()[1:]
    left = [line for line in lines if line.startswith("#")]
    say(f"wrote {path}: {len(lines) - len(left)} settings from a config of {made.tool}")
    if left:
        say(f"{len(left)} of its lines are left out; each is kept as a comment with the reason")
    for fault in made.faults:
        say(f"to be filled in: {fault}")
    say(f"  {join_command(['--config', str(path), '--dry_run'])}")


def fill_in(text: str, names: Mapping[str, str | None]) -> str:
    """The config with the values that were given in place of its own, and its comments on those left out.

    Files that come with the script are named as they are reached from the working folder.
    """
    for name, value in names.items():
        if value is not None:
            line = f"{name}: {json.dumps(value, ensure_ascii=False)}"
            text = re.sub(rf"^{name}: .*$", line.replace("\\", r"\\"), text, flags=re.MULTILINE)
    if Path.cwd() == ROOT:
        return text
    return re.sub(r": (examples/\S+)", lambda match: f": {json.dumps(path_from_here(match[1]))}", text)
