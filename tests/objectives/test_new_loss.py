"""A new loss is a function and a row: with these two alone it is trained with, under its flag, and evaluated."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from shared.runs import ROOT, read_record

PROGRAM = """
import sys
import utils.objectives.losses as table

def square_root_loss(pairs, beta, divergence, root_offset):
    return (root_offset + (-beta * divergence.difference(pairs)).exp()).sqrt()

own = table.Parameter(0.5, "what is added under the root", "0 or more", lambda offset: offset >= 0)
loss = table.Loss("square_root", square_root_loss, parameters={"root_offset": own})
table.LOSSES[loss.name] = table.BY_NAME[loss.name] = loss

from advanced_dpo_script import main

model, data, folder = sys.argv[1:]
run = ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", folder, "--max_steps", "1",
       "--dtype", "float32", "--f_divergence_type", "js_divergence"]
assert main([*run, "--loss_type", "ipo", "--root_offset", "1"]) == 2
assert main([*run, "--loss_type", "square_root", "--root_offset", "-1"]) == 2
assert main([*run, "--loss_type", "square_root", "--root_offset", "3"]) == 0
assert main(["evaluate", "--model_name_or_path", folder]) == 0
"""


def test_a_row_of_the_table_is_enough(tiny_model, pairs_file, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", PROGRAM, tiny_model, pairs_file, folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--root_offset: has no effect without --loss_type square_root" in done.stderr
    assert "--root_offset is -1.0: must be 0 or more" in done.stderr
    record = read_record(folder)
    assert record["settings"]["root_offset"] == 3
    before, after = (record["metrics"][name]["loss"] for name in ("held_out_before", "held_out"))
    assert before == pytest.approx(math.sqrt(3 + 1), abs=1e-6)  # the margin is 0
    evaluated = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluated["scoring"]["root_offset"] == 3
    assert evaluated["metrics"]["loss"] == pytest.approx(after, abs=1e-5)
