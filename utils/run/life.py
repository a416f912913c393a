"""Whether a run goes on, by its record and the lock of its folder: running, finished, interrupted, failed or died."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runtime import readable_seconds
from .lock import read_owner
from .names import LOCK
from .processes import is_alive, patience_seconds
from .record import seconds_at
from .records import mapping_of, number_of, text_of

DIED = "died"  # the record says that it runs, and its process is gone


def find_state(folder: Path, record: Mapping[str, Any], at: float) -> tuple[str, str | None]:
    """The state of a run at a time (seconds since 1970), and what it needs to be understood."""
    state, note = _judge_record(record, at)
    owner = read_owner(folder) if state != "running" else None
    if owner is not None and is_alive(owner):
        return "running", f"process {owner['pid']} has locked the folder, and has not started training yet"
    if owner is not None and owner.get("started") != (record.get("process") or {}).get("started"):
        who = f"process {owner.get('pid')} on {owner.get('host')}"
        note = "; ".join(filter(None, (note, f"its {LOCK} is of {who}, which cannot be seen from here")))
    return state, note


def _judge_record(record: Mapping[str, Any], at: float) -> tuple[str, str | None]:
    if record["status"] != "running":
        return record["status"], text_of(record, "failure")
    process = mapping_of(record, "process")
    alive = is_alive(process)
    host = text_of(record, "process", "host") or "its machine"
    if alive:
        return "running", None
    if alive is False:
        return DIED, f"its process ({process['pid']} on {host}) is gone"
    silence = seconds_since(text_of(record, "updated") or text_of(record, "started"), at)
    usual = number_of(record, "longest_silence")
    if silence is None:
        return DIED, f"its record does not say when {host} was heard of last"
    ago = readable_seconds(silence)
    if silence <= patience_seconds(usual):
        return "running", f"on {host}; last heartbeat {ago} ago"
    before = f", longest gap before: {readable_seconds(usual)}" if usual is not None else ""
    return DIED, f"silent for {ago}{before}; its process is on {host} and cannot be seen from here"


def seconds_since(text: str | None, at: float) -> float | None:
    """How long ago, at a time (seconds since 1970), a time as run.json holds it was."""
    then = seconds_at(text)
    return None if then is None else max(0.0, at - then)
