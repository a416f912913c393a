"""What a run holds on to does not grow with its length, and what is made of it stays as it was."""

from __future__ import annotations

import copy
import itertools
import json
import shutil

import pytest
from shared.pairs import make_pairs, write_lines
from shared.runs import read_metrics, read_record

from utils.report.run_files import read_thinned
from utils.training import callbacks, history
from utils.training.finishing import training_metrics
from utils.training.history import fold_history


def make_lines(count: int) -> list[dict]:
    lines = []
    for number in range(1, count + 1):
        step = 10 * number
        lines.append({"loss": 1 / number, "margin": number / 7, "learning_rate": 1e-6 * number, "epoch": 0.1 * number,
                      "pairs": float(number % 3 + 1), "step": step})  # fmt: skip
        if number % 10 == 0:
            lines.append({"eval_loss": 1 / number, "step": step})
    return lines


@pytest.mark.parametrize("counted", ["pairs", "tokens"])
def test_the_log_of_checkpoints_is_bounded_and_its_means_stay(counted):
    lines = [{counted if name == "pairs" else name: value for name, value in line.items()} for line in make_lines(4000)]
    log, most = [], 0
    for line in copy.deepcopy(lines):
        log.append(line)
        fold_history(log, counted)
        most = max(most, len([line for line in log if "loss" in line]))
    assert most == history.MOST_LINES
    assert training_metrics(log) == pytest.approx(training_metrics(lines))
    assert [line for line in log if "eval_loss" in line] == [line for line in lines if "eval_loss" in line]
    assert log[-2:] == lines[-2:]
    assert sum(line.get("lines", 1) for line in log if "loss" in line) == 4000
    assert [line["step"] for line in log] == sorted(line["step"] for line in log)


def test_a_log_that_was_saved_and_read_again_is_folded_alike():
    lines = make_lines(1800)
    one = []
    for line in copy.deepcopy(lines):
        one.append(line)
        fold_history(one, "pairs")
    two = []
    for number, line in enumerate(copy.deepcopy(lines)):
        two.append(line)
        fold_history(two, "pairs")
        two = json.loads(json.dumps(two)) if number % 300 == 0 else two
    assert one == two


def test_a_short_log_stays():
    lines = make_lines(190)
    log = copy.deepcopy(lines)
    fold_history(log, "pairs")
    assert log == lines


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_a_run_folds_its_log_and_records_the_same_means(verb, run_script, tiny_model, tmp_path, monkeypatch):
    data = write_lines(tmp_path / "pairs.jsonl", make_pairs(40))
    found = []
    for most in (1000, 6):
        monkeypatch.setattr(history, "MOST_LINES", most)
        monkeypatch.setattr(history, "FOLDED", 4)
        folder = tmp_path / f"{most}"
        code, _, err = run_script(verb, "--model_name_or_path", tiny_model, "--dataset_name", data, "--max_steps", 12,
                                  "--output_dir", folder, "--logging_steps", 1, "--eval_steps", 4,
                                  "--per_device_train_batch_size", 4)  # fmt: skip
        assert code == 0, err
        state = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())
        found.append((read_record(folder)["metrics"], len([line for line in state["log_history"] if "loss" in line])))
    assert [lines for _, lines in found] == [12, 6]
    for part in ("train", "held_out"):
        assert found[0][0][part] == pytest.approx(found[1][0][part], rel=1e-9)


def test_a_report_holds_no_more_lines_than_it_can_show(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_thinned(tmp_path) == []
    lines = [{"step": 0, "held_out_loss": 0.7}]
    for number in range(1, 9001):
        lines.append({"step": number, "loss": 1.0, "learning_rate": 0.1})
        if number % 1000 == 0:
            lines.append({"step": number, "held_out_loss": 0.5})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "[1]\n" + '{"step": 9001, "lo')
    found = read_thinned(tmp_path)
    training = [line["step"] for line in found if "loss" in line]
    assert len(training) <= 801
    assert (training[0], training[-1]) == (1, 9000)
    assert {b - a for a, b in itertools.pairwise(training[:-1])} == {16}
    assert [line for line in found if "held_out_loss" in line] == [line for line in lines if "held_out_loss" in line]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:700]))
    assert read_thinned(tmp_path) == lines[:700]


def test_alarms_look_at_what_was_logged_and_not_at_its_mean(run_script, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(history, "MOST_LINES", 6)
    monkeypatch.setattr(history, "FOLDED", 4)
    seen = []
    monkeypatch.setattr(callbacks, "find_alarms", lambda lines, limits: seen.append(copy.deepcopy(lines)) or [])
    data = write_lines(tmp_path / "pairs.jsonl", make_pairs(40))
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", data, "--max_steps", 12, "--logging_steps", 1,
             "--save_steps", 10, "--per_device_train_batch_size", 2, "--output_dir", tmp_path / "run"]  # fmt: skip
    assert run_script(*flags)[0] == 0
    last = seen[-1]
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    (tmp_path / "run" / "run.json").write_text(json.dumps(read_record(tmp_path / "run") | {"status": "running"}))
    assert run_script(*flags, "--resume_from_checkpoint", "auto")[0] == 0
    known = [
        [(line["step"], line.get("loss"), line.get("held_out_loss")) for line in lines] for lines in (last, seen[-1])
    ]
    assert known[0] == known[1]


def test_a_resumed_run_whose_log_was_folded_is_the_uninterrupted_one(run_script, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(history, "MOST_LINES", 6)
    monkeypatch.setattr(history, "FOLDED", 4)
    data = write_lines(tmp_path / "pairs.jsonl", make_pairs(40))
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", data, "--max_steps", 16, "--logging_steps", 1]
    flags += ["--eval_steps", 3, "--save_steps", 10, "--per_device_train_batch_size", 2]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run_script(*flags, "--output_dir", whole)[0] == 0
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoint-16")
    (part / "run.json").write_text(json.dumps(read_record(part) | {"status": "running"}))
    code, _, err = run_script(*flags, "--output_dir", part, "--resume_from_checkpoint", "auto")
    assert code == 0, err
    assert read_metrics(part) == read_metrics(whole)
    assert len([line for line in read_metrics(part) if "loss" in line]) == 16
    assert read_record(part)["metrics"] == read_record(whole)["metrics"]
