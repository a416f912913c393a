"""Alarms: each set off by a run made to deserve it, none by runs that go well; and a stop before a step is spoilt."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from shared.pairs import make_pairs, write_lines
from shared.runs import ROOT, read_metrics, read_record

from utils.training import alarms
from utils.training.alarms import ALARMS, Limits, find_alarms
from utils.training.early_stopping import Best, describe_best, find_best

DEMO = ROOT / "examples" / "demo" / "bundled"


@pytest.fixture
def train(run_script, tiny_model, tmp_path):
    """Trains on rows, with the flags given; returns what was printed and the run folder."""

    def run(rows, *flags, model=tiny_model, batch=16, code=0, verb="train"):
        data = write_lines(tmp_path / "pairs.jsonl", rows)
        found, out, err = run_script(
            verb, "--model_name_or_path", model, "--dataset_name", data, "--output_dir", tmp_path / "run",
            *([] if "--overwrite_output_dir" in flags else ["--overwrite_output_dir"]),
            "--per_device_train_batch_size", batch, *flags,
        )  # fmt: skip
        assert found == code, out + err
        return out + err, tmp_path / "run"

    return run


def with_random_labels(pairs):
    """The same prompts, with either side as the chosen one: there is nothing to learn but the pairs themselves."""
    draw, rows = random.Random(0), []
    for pair in pairs:
        sides = [pair["chosen"], pair["rejected"]]
        draw.shuffle(sides)
        rows.append({"prompt": pair["prompt"], "chosen": sides[0], "rejected": sides[1]})
    return rows


def assert_said_once(out, folder, *beginnings):
    """Each is a warning on the console, once, and in the record; there is no other."""
    said = [line.removeprefix("warning: ") for line in out.splitlines() if line.startswith("warning: ")]
    assert said == read_record(folder)["warnings"]
    assert len(said) == len(beginnings), said
    for beginning in beginnings:
        assert sum(text.startswith(beginning) for text in said) == 1, said


def test_a_run_that_goes_well_is_silent(train):
    out, folder = train(make_pairs(120), "--learning_rate", 2e-3, "--max_steps", 20, "--eval_steps", 5,
                        "--logging_steps", 1, "--max_kl", 5)  # fmt: skip
    assert read_record(folder)["metrics"]["held_out"]["accuracy"] == 1
    assert_said_once(out, folder)


def test_a_model_that_is_wrecked(train):
    """A learning rate far too large: language, ends and both rewards go."""
    pairs = [json.loads(line) for line in (DEMO / "pairs.jsonl").read_text(encoding="utf-8").splitlines()][:160]
    out, folder = train(pairs, "--learning_rate", 2e-2, "--max_steps", 10, "--eval_steps", 5, "--logging_steps", 1,
                        "--validation_split", 0.06, model=DEMO / "model")  # fmt: skip
    assert_said_once(out, folder, "log-probs are collapsing", "responses stop ending", "both rewards are falling")
    assert "Lower --learning_rate" in out


def test_a_policy_too_far_and_a_margin_without_end(train):
    out, folder = train(make_pairs(80), "--learning_rate", 3e-2, "--beta", 2, "--max_steps", 12, "--eval_steps", 6,
                        "--logging_steps", 1, "--max_kl", 0.5)  # fmt: skip
    assert_said_once(out, folder, "the policy is", "the margin is")
    assert "beyond --max_kl 0.5" in out


def test_everything_right_early(train):
    out, folder = train(make_pairs(300), "--learning_rate", 1e-2, "--max_steps", 15, "--eval_steps", 3,
                        "--logging_steps", 1, "--validation_split", 0.3)  # fmt: skip
    assert_said_once(out, folder, "all 95 held-out pairs are ranked correctly at step 3 of 15")


def test_a_resumed_run_keeps_what_it_was_warned_of_and_says_it_once(train):
    flags = ("--learning_rate", 1e-2, "--max_steps", 15, "--eval_steps", 3, "--logging_steps", 1, "--save_steps", 5,
             "--validation_split", 0.3, "--max_kl", 0.01)  # fmt: skip
    _, folder = train(make_pairs(300), *flags)
    warnings, alarms = (read_record(folder)[name] for name in ("warnings", "alarms"))
    assert len(warnings) == len(alarms) == 2
    again = ("--resume_from_checkpoint", folder / "checkpoint-5", "--overwrite_output_dir", "false")
    out, folder = train(make_pairs(300), *flags, *again)
    assert read_record(folder)["warnings"] == warnings
    assert read_record(folder)["alarms"] == alarms
    assert "warning: " not in out
    assert "It has 2 warnings" in (folder / "report.html").read_text(encoding="utf-8")


def test_pairs_learnt_by_heart(train):
    out, folder = train(with_random_labels(make_pairs(60, seed=3)), "--learning_rate", 5e-3, "--beta", 2,
                        "--max_steps", 32, "--eval_steps", 4, "--logging_steps", 4, "--validation_split", 0.3,
                        "--lr_scheduler_type", "constant", batch=64)  # fmt: skip
    assert_said_once(out, folder, "the held-out loss is rising")


def lines_of_a_run(**changes):
    """Forty lines of training and an evaluation after every tenth, of a run that goes well; changes by name: a function
    of the share of the run that is done."""
    curves = {
        "loss": lambda share: 0.69 - 0.4 * share,
        "accuracy": lambda share: 0.5 + 0.3 * share,
        "margin": lambda share: 2 * share,
        "chosen_reward": lambda share: -0.5 * share,
        "rejected_reward": lambda share: -2.5 * share,
        "chosen_logps": lambda share: -200 - 5 * share,
        "chosen_tokens": lambda share: 150,
        "pairs": lambda share: 80,
    } | changes
    held_out = curves | {"chosen_kl": lambda share: 6 * share, "chosen_end_prob": lambda share: 0.8 - 0.2 * share}
    held_out |= {name: curve for name, curve in changes.items() if name in held_out}
    lines = []
    for step in range(41):
        if step:
            lines.append({"step": step, "learning_rate": 1e-6} | {n: curve(step / 40) for n, curve in curves.items()})
        if step % 10 == 0:
            lines.append({"step": step} | {f"held_out_{name}": curve(step / 40) for name, curve in held_out.items()})
    return lines


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (None, {}),
        (None, {"chosen_reward": lambda share: -3 * share, "rejected_reward": lambda share: -10 * share,
                "margin": lambda share: 7 * share}),
        ("rewards falling", {"chosen_reward": lambda share: -3 * share, "rejected_reward": lambda share: -5 * share}),
        (None, {"accuracy": lambda share: 1.0 if share > 0.3 else 0.7}),
        ("all right early", {"accuracy": lambda share: 1.0 if share > 0 else 0.5}),
        (None, {"chosen_logps": lambda share: -200 - 100 * share}),
        ("log-probs collapsing", {"chosen_logps": lambda share: -200 - 200 * share}),
        (None, {"chosen_end_prob": lambda share: 0.8 - 0.35 * share}),
        ("responses not ending", {"chosen_end_prob": lambda share: 0.8 - 0.6 * share}),
        (None, {"chosen_kl": lambda share: 29 * share}),
        ("too far", {"chosen_kl": lambda share: 40 * share}),
        ("margin exploding", {"margin": lambda share: 30 * share}),
        (None, {"loss": lambda share: 0.5 + 0.02 * share}),
        ("overfitting", {"loss": lambda share: 0.5 + 0.4 * share}),
    ],
)  # fmt: skip
def test_where_an_alarm_begins(name, changes):
    """A run that goes well, changed in one respect: that alarm and no other, however many lines there are yet."""
    lines, found = lines_of_a_run(**changes), set()
    for count in range(len(lines) + 1):
        found |= {name for name, _ in find_alarms(lines[:count], Limits(steps=40, max_kl=30))}
    assert found == ({name} if name else set())
    assert name is None or name in ALARMS


def test_lines_with_nothing_to_say_set_off_no_alarm():
    empty = [{"step": 1, "loss": None, "learning_rate": 0.1, "pairs": 4}, {"step": 2, "held_out_loss": None}]
    assert list(find_alarms([], Limits(10))) == list(find_alarms(empty, Limits(10))) == []


@pytest.mark.parametrize("way", [["train"], ["train", "--engine", "padded"], ["sft"]], ids=" ".join)
def test_a_step_that_is_not_finite_is_not_taken(train, model_without_a_tilde, way):
    model, token = model_without_a_tilde
    pairs = make_pairs(24)
    pairs[7]["prompt"] = "~ it was"
    out, folder = train(
        pairs, "--max_steps", 12, "--save_steps", 1, "--logging_steps", 5, "--validation_split", "none",
        "--gradient_accumulation_steps", 2, *way[1:], model=model, batch=2, code=2, verb=way[0],
    )  # fmt: skip
    (fault,) = [line for line in out.splitlines() if line.startswith("error: ")]
    assert "the loss of 1 of its 4 rows is not finite (pairs.jsonl line 8)" in fault
    step = int(fault.partition("in step ")[2].partition(":")[0])
    newest = folder / f"checkpoint-{step - 1}"
    assert f"the weights stayed as after step {step - 1}" in fault
    assert (str(newest) in fault) == newest.is_dir() == (step > 1)
    assert not (folder / "model.safetensors").exists()
    record = read_record(folder)
    assert record["status"] == "failed"
    assert fault.removeprefix("error: ") in record["warnings"]
    assert "It failed" in (folder / "report.html").read_text(encoding="utf-8")
    if newest.is_dir():
        weights = load_file(newest / "model.safetensors")
        weights["model.embed_tokens.weight"][token] = 0
        assert all(torch.isfinite(value).all() for value in weights.values())


def test_early_stopping_keeps_the_best_model(train):
    rows = with_random_labels(make_pairs(60, seed=3))
    out, folder = train(rows, "--learning_rate", 1e-2, "--beta", 0.5, "--max_steps", 32, "--eval_steps", 4,
                        "--logging_steps", 3, "--validation_split", 0.3, "--early_stopping_patience", 2)  # fmt: skip
    evaluations = [line for line in read_metrics(folder) if "held_out_loss" in line and line["step"]]
    best = min(evaluations, key=lambda line: line["held_out_loss"])
    record = read_record(folder)
    assert record["step"] == best["step"] + 8 < 32
    assert "stopping early: the held-out loss has not improved in 2 evaluations" in out
    assert f"the model of step {best['step']} is kept" in out
    assert record["metrics"]["held_out"]["loss"] == pytest.approx(best["held_out_loss"], abs=1e-6)
    saved, kept = (load_file(path / "model.safetensors") for path in (folder, folder / f"checkpoint-{best['step']}"))
    assert all(torch.equal(saved[name], kept[name]) for name in saved)


@pytest.mark.parametrize(("metric", "values"), [("accuracy", (0.5, 0.75, 0.75, 0.5, 0.75)), ("loss", (3, 2, 2, 4, 2))])
def test_of_evaluations_that_are_equally_good_the_first_is_the_best(metric, values):
    name = f"eval_{metric}"
    before = {"step": 0, name: 1.0 if metric == "accuracy" else 0.0}  # the untrained model does not count
    lines = [before, *({"step": 4 * number, name: value} for number, value in enumerate(values, 1))]
    assert find_best(lines, metric) == Best(step=8, value=values[1], evaluations_since=3)
    assert find_best(lines[:1], metric) is None


def test_a_run_that_gets_better_is_not_stopped(train):
    out, folder = train(make_pairs(120), "--learning_rate", 2e-3, "--max_steps", 9, "--eval_steps", 3,
                        "--early_stopping_patience", 1, "--early_stopping_metric", "margin")  # fmt: skip
    assert read_record(folder)["step"] == 9
    assert "stopping early" not in out
    assert "the model of step 9 is kept: the best held-out margin" in out


def test_which_step_the_kept_model_is_from(train):
    """Of several evaluations that are equally good the first is kept; what was left open is in the record."""
    out, folder = train(make_pairs(60), "--learning_rate", 1e-2, "--max_steps", 6, "--eval_strategy", "steps",
                        "--eval_steps", 2, "--save_steps", 2, "--load_best_model_at_end", "true",
                        "--metric_for_best_model", "accuracy", "--greater_is_better", "true")  # fmt: skip
    record = read_record(folder)
    accuracy = {line["step"]: line["held_out_accuracy"] for line in read_metrics(folder) if "held_out_accuracy" in line}
    best = max(accuracy[step] for step in (2, 4, 6))
    first, *others = [step for step in (2, 4, 6) if accuracy[step] == best]
    assert record["best_model"] == {"step": first, "metric": "accuracy", "value": best, "equal_steps": others}
    assert f"the model of step {first} is kept: the best held-out accuracy, {best:.4g}" in out
    assert record["used"]["max_length"] == record["data"]["max_length"]
    assert record["used"]["gradient_checkpointing"] is False
    assert record["settings"]["max_length"] is None


def test_equal_steps_are_named():
    content = {"step": 2, "metric": "accuracy", "value": 1.0, "equal_steps": [4, 6]}
    said = "the model of step 2 is kept: the best held-out accuracy, 1 (steps 4 and 6: the same; the first is kept)"
    assert describe_best(content) == said
    alone = {**content, "equal_steps": [4]}
    assert describe_best(alone).endswith("accuracy, 1 (step 4: the same; the first is kept)")
    assert describe_best({**content, "equal_steps": []}).endswith("accuracy, 1")


def test_pairs_ranked_right_are_counted_from_the_last_one_that_was_not():
    def lines(*accuracies):
        return [{"step": step, "learning_rate": 1e-5, "accuracy": value, "pairs": alarms.EARLY_PAIRS / 2}
                for step, value in enumerate(accuracies, 1)]  # fmt: skip

    limits = alarms.Limits(steps=1000)
    assert alarms.all_right_early(lines(0.9, 1.0, 1.0), limits) is not None
    assert alarms.all_right_early(lines(1.0, 1.0, 0.9, 1.0), limits) is None


def test_a_mean_is_over_enough_lines_as_well_as_enough_pairs():
    lines = [{"margin": float(number), "pairs": 10 * alarms.WINDOW_PAIRS} for number in range(alarms.WINDOW_LINES)]
    mean, count = alarms._window(lines, ("margin",))
    assert (mean["margin"], count) == ((alarms.WINDOW_LINES - 1) / 2, alarms.WINDOW_LINES)
    assert alarms._window(lines[1:], ("margin",))[0] is None
