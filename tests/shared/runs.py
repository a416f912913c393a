"""The script as a process of its own, and what its runs leave on the disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from datetime import datetime, timedelta
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "advanced_dpo_script.py"
REAL_DATA = Path(os.environ.get("DPO_REAL_DATA", ROOT.parent / "shared" / "data"))


def start_script(*arguments, script: str = SCRIPT, **environment) -> subprocess.Popen:
    """Starts the script as a person does, in a process of its own, which imports all it needs; `Forked` is quicker."""
    return start(
        [sys.executable, script, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start(command: list, **options) -> subprocess.Popen:
    """A process whose streams are closed once nobody holds it."""
    process = subprocess.Popen(command, **options)
    for stream in filter(None, (process.stdin, process.stdout, process.stderr)):
        weakref.finalize(process, stream.close)
    return process


def read_record(folder: Path) -> dict:
    """The run.json of a run."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, without what the clock and the machine decide."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = {"tokens_per_second", "peak_memory_bytes"}
    return [{name: value for name, value in line.items() if name not in measured} for line in lines]


def assert_same_run(one, other) -> None:
    """The same curve, held-out result and artefact."""
    import torch
    from safetensors.torch import load_file

    for line, its in zip(read_metrics(one), read_metrics(other), strict=True):
        its["epoch"] = line["epoch"]  # which the trainer counts in micro-batches
        assert its == pytest.approx(line, abs=1e-4)
    held_out = read_record(one)["metrics"]["held_out"]
    assert read_record(other)["metrics"]["held_out"] == pytest.approx(held_out, abs=1e-4)
    (artefact,) = (path.name for path in one.glob("*.safetensors"))
    a, b = (load_file(folder / artefact) for folder in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


def pretend_interrupted(folder, step: int) -> None:
    """Takes a finished run back to a checkpoint, as if it had ended there."""
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    record = read_record(folder)
    (folder / "run.json").write_text(json.dumps(record | {"status": "interrupted"}), encoding="utf-8")


def set_back(folder: Path, minutes: int) -> None:
    """Makes a finished run one of minutes before: records hold whole seconds, in which small runs begin and end."""
    record = read_record(folder)
    for name in ("started", "updated"):
        at = datetime.strptime(record[name], "%Y-%m-%dT%H:%M:%SZ") - timedelta(minutes=minutes)
        record[name] = at.strftime("%Y-%m-%dT%H:%M:%SZ")
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
