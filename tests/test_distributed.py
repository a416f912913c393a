"""What processes tell one another: two real ones, connected through gloo as in a run."""

from __future__ import annotations

import ast
import json
import time

import pytest
import torch
from shared.forked import run_together
from shared.runs import ROOT

from utils import distributed

CONNECTED = """
import json, os, sys, time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from utils.distributed import *
from utils.distributed import LONG, meet

rank, log = int(os.environ["RANK"]), Path(sys.argv[1])
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
meet(timedelta(seconds=float(sys.argv[2])))


def tell(value):
    print(json.dumps([rank, value]), flush=True)
"""


@pytest.fixture
def together(tmp_path):
    """Runs lines in two processes that have met; returns how they ended, and what each told, in order of rank."""

    def run(lines: str, patience: float = 60, seconds: float = 120):
        script = tmp_path / "script.py"
        script.write_text(CONNECTED + lines)
        ended = run_together(2, tmp_path / "log", patience, script=str(script), seconds=seconds)
        told = [json.loads(line) for line in ended.stdout.splitlines()]
        return ended, [[value for rank, value in told if rank == own] for own in range(2)]

    return run


def test_one_process_tells_itself():
    values = torch.tensor([1.0, 2.0])
    with distributed.one_first():
        assert distributed.gather("a") == ["a"]
    assert distributed.agree("fault") == "fault"
    assert distributed.agree(None) is None
    assert distributed.told_by_main({"a": 1}) == {"a": 1}
    assert distributed.most_of(3) == 3
    assert distributed.any_of(True) is True
    assert distributed.any_of(False) is False
    assert distributed.sum_of(values) is values
    assert values.tolist() == [1.0, 2.0]
    assert not distributed.are_several()


def test_two_processes_tell_one_another(together):
    ended, told = together("""
tell([
    are_several(),
    gather(["short", "a much longer text " * 50][rank])[1][:6],
    gather(rank, LONG),
    agree([None, "of the second"][rank]),
    agree(["of the first", "of the second"][rank]),
    agree(None),
    told_by_main(["of the main one", None][rank]),
    most_of([3, 5][rank]),
    any_of(rank == 1),
    any_of(False),
    sum_of(torch.tensor([1.5, 10.0 * rank])).tolist(),
    sum_of(torch.tensor(2**40 + rank)).item(),
])
""")
    assert ended.returncode == 0, ended.stderr
    assert told[0] == told[1]
    assert told[0] == [[
        True, "a much", [0, 1],
        "of the second", "of the first", None, "of the main one",
        5, True, False,
        [3.0, 10.0], 2**41 + 1,
    ]]  # fmt: skip


def test_the_second_of_a_machine_finds_what_the_first_left(together):
    ended, told = together("""
with one_first():
    if rank == 0:
        time.sleep(1)
        log.write_text("left by the first")
    tell(log.read_text() if log.exists() else None)
""")
    assert ended.returncode == 0, ended.stderr
    assert told == [["left by the first"]] * 2


WAITING = {
    "one_first": "with one_first(): fail()",
    "gather": "fail(); gather(rank)",
    "gather, for long": "fail(); gather(rank, LONG)",
    "agree": "fail(); agree(None)",
    "any_of": "fail(); any_of(False)",
    "told_by_main": "fail(); told_by_main(rank)",
    "sum_of": "fail(); sum_of(torch.ones(2))",
}


@pytest.mark.parametrize("operation", WAITING)
def test_who_waits_for_a_process_that_fails_is_told_at_once(together, operation):
    ended, told = together(f"""
from utils.training.launch import lost_a_process

def fail():
    if rank == 0:
        time.sleep(0.5)  # until the other waits
        sys.exit(3)

gather(rank)
try:
    {WAITING[operation]}
except RuntimeError as error:
    tell(lost_a_process(error))
""", patience=100, seconds=60)  # fmt: skip
    assert ended.returncode == 3, ended.stderr  # nobody had to be killed
    assert told == [[], [True]]


def test_a_silent_process_is_waited_for_as_long_as_is_said(together):
    began = time.monotonic()
    ended, told = together("""
from utils.training.launch import lost_a_process

if rank == 1:
    time.sleep(4)
tell(gather(rank, LONG))
if rank == 1:
    time.sleep(30)
try:
    any_of(False)
except RuntimeError as error:
    tell([lost_a_process(error), "timed out" in str(error).lower()])
    os._exit(4)
""", patience=2)  # fmt: skip
    assert told[0] == [[0, 1], [True, True]]
    assert ended.returncode == 4
    assert time.monotonic() - began < 30


def test_every_collective_operation_goes_through_one_module():
    own = {"barrier", "new_group", "send", "recv", "monitored_barrier", "wait_for_everyone", "main_process_first"}
    starts = ("all_gather", "all_reduce", "broadcast", "reduce_scatter", "all_to_all", "gather_object", "scatter")
    found = []
    for path in sorted((ROOT / "utils").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            name, owner = node.func.attr, ast.unparse(node.func.value)
            by_accelerate = owner.endswith("accelerator") and name in {"gather", "gather_for_metrics", "reduce"}
            if ("dist" in owner and (name in own or name.startswith(starts))) or by_accelerate:
                found.append(path.relative_to(ROOT).as_posix())
    assert set(found) == {"utils/distributed.py"}
