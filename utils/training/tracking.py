"""Experiment trackers: what has to be known before the trainer starts one, and said after it ended."""

from __future__ import annotations

import os
import shlex
import socket
from pathlib import Path
from urllib.parse import urlparse

from ..errors import UserError
from ..run.paths import read_path
from ..runtime import say
from ..settings.training import TRACKERS, Settings


def check_trackers(settings: Settings) -> None:
    """Refuses trackers whose package is not installed, with the line that installs it."""
    from importlib.util import find_spec

    faults = [
        f"--report_to {tracker} needs the package {package}: pip install {package}"
        for tracker in settings.run.report_to
        if (package := TRACKERS.get(tracker)) is not None and find_spec(package) is None
    ]
    if faults:
        raise UserError(*faults)


def prepare_trackers(settings: Settings, folder: Path) -> None:
    """Sets what the trackers read from the environment; W&B goes offline when there is no login or no network."""
    if not {"tensorboard", "all"}.isdisjoint(settings.run.report_to):
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    if not settings.run.use_wandb:
        return
    os.environ["WANDB_PROJECT"] = settings.run.wandb_project
    os.environ.setdefault("WANDB_DIR", str(folder))
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_LOG_MODEL", "false")
    if "WANDB_MODE" in os.environ:
        return
    missing = "no login" if not _has_wandb_login() else "no network" if not _reaches_wandb() else None
    if missing is not None:
        os.environ["WANDB_MODE"] = "offline"
        say(f"W&B: {missing}, so the run is recorded offline in {folder / 'wandb'}")


def say_how_to_upload(settings: Settings, folder: Path, run_id: str | None) -> None:
    """Prints the one command that uploads a run that W&B recorded offline, all its parts in order."""
    if not settings.run.use_wandb or os.environ.get("WANDB_MODE") != "offline":
        return
    # Parts that begin in the same second get a number behind.
    runs = sorted(path for end in ("", "-[0-9]*") for path in (folder / "wandb").glob(f"offline-run-*-{run_id}{end}"))
    if runs:
        say(f"W&B: to upload the run later: {shlex.join(['wandb', 'sync', *map(str, runs)])}")


def _has_wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        path = read_path(name) if name else None
        if path is not None and path.is_file():
            try:
                return netrc.netrc(str(path)).authenticators(_wandb_host()) is not None
            except (netrc.NetrcParseError, OSError):
                return False
    return False


def _wandb_host() -> str:
    return urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or "api.wandb.ai"


def _reaches_wandb() -> bool:
    address = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((_wandb_host(), port), timeout=5):
            return True
    except OSError:
        return False
