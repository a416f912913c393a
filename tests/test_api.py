"""Training from Python: the run of the command, with exceptions in place of exit codes."""

from __future__ import annotations

import json
import math

import pytest
from shared.runs import read_record

import advanced_dpo
from advanced_dpo import FinishedRun, UserError, sft, train


def test_it_is_the_run_of_the_command(run_script, tiny_model, pairs_file, tmp_path):
    given = {"lora_target_modules": ("q_proj", "v_proj"), "learning_rate": 5e-3, "max_steps": 3, "logging_steps": 1}
    run = train(
        model_name_or_path=tiny_model,
        dataset_name=str(pairs_file),
        output_dir=tmp_path / "python",
        use_lora=True,
        use_4bit=False,
        beta=None,
        **given,
    )
    assert run.folder == tmp_path / "python"
    assert run.record == read_record(run.folder)
    assert run.record["status"] == "finished"
    assert run.metrics == run.record["metrics"]
    assert run.metrics["held_out_before"]["loss"] == pytest.approx(math.log(2))
    lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert run.history == list(map(json.loads, lines))
    assert run.report.is_file()
    assert repr(tmp_path / "python").removeprefix("PosixPath(").rstrip(")") in repr(run)

    words = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", tmp_path / "command",
             "--use_lora", "--lora_target_modules", "q_proj", "v_proj", "--learning_rate", "5e-3", "--max_steps", 3,
             "--logging_steps", 1]  # fmt: skip
    code, _, err = run_script(*words)
    assert code == 0, err
    weights = "adapter_model.safetensors"
    assert (run.folder / weights).read_bytes() == (tmp_path / "command" / weights).read_bytes()
    assert read_record(tmp_path / "command")["metrics"]["held_out"] == run.metrics["held_out"]


def test_every_fault_is_in_one_exception(tmp_path):
    with pytest.raises(UserError) as caught:
        train(lerning_rate=1, beta=-1, output_dir=tmp_path / "new")
    faults = "\n".join(caught.value.faults)
    for named in ("--lerning_rate", "--beta", "--model_name_or_path is missing", "--dataset_name is missing"):
        assert named in faults
    with pytest.raises(UserError, match="no such folder"):
        sft(model_name_or_path="./gone", dataset_name="gone.jsonl", output_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["help", "version", "a name", ""])
def test_what_is_no_setting_is_refused(name):
    with pytest.raises(UserError, match="names of the flags"):
        train(**{name: True})


def test_a_text_that_looks_like_a_flag_is_a_value(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        train(model_name_or_path="./gone", dataset_name="--help", output_dir=tmp_path / "new")


def test_a_dry_run_leaves_no_folder(tiny_model, pairs_file):
    run = train(model_name_or_path=tiny_model, dataset_name=pairs_file, dry_run=True)
    assert (run.folder, run.report, run.history) == (None, None, [])
    assert isinstance(run, FinishedRun)


def test_the_package_offers_the_same_names():
    import utils

    assert set(utils.__all__) == set(advanced_dpo.__all__)
    for name in utils.__all__:
        assert getattr(utils, name) is getattr(advanced_dpo, name)
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        utils.nothing_of_that_name  # noqa: B018
