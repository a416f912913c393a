"""The verb `init`: commented configs that `--config` runs unchanged."""

from __future__ import annotations

import re

import pytest
import yaml
from shared.pairs import make_pairs, write_lines
from shared.runs import ROOT, read_record

from utils.arguments import parse_arguments
from utils.settings.verbs import SITUATIONS


def init(run_script, situation: str, path, *more) -> str:
    code, out, err = run_script("init", "--situation", situation, "--output_file", path, *more)
    assert code == 0, err
    return out


@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_config_is_read_unchanged(situation, run_script, tmp_path):
    path = tmp_path / "config.yaml"
    out = init(run_script, situation, path)
    settings = parse_arguments(["--config", str(path)])
    values = yaml.safe_load(path.read_text())
    assert settings.given == set(values)
    commands = [line.strip() for line in out.splitlines() if "--config " in line]
    assert [command.endswith(f"advanced_dpo_script.py --config {path}") for command in commands] == [False, True]
    assert commands[0] == f"{commands[1]} --dry_run"
    assert commands[1].startswith("accelerate launch" if situation == "eight_gpus_full" else "python")


@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_alternatives_in_the_comments_are_settings_too(situation, run_script, tmp_path):
    path = tmp_path / "config.yaml"
    init(run_script, situation, path)
    lines = path.read_text().splitlines()
    offered = [line for line in lines if re.match(r"# \w+: ", line)]
    assert len(offered) >= 3
    for line in offered:
        name = line.split(":")[0].removeprefix("# ")
        given = [other for other in lines if not re.match(rf"#? ?{name}: ", other)]
        (tmp_path / "other.yaml").write_text("\n".join([*given, line.removeprefix("# ")]))
        if name != "lora_r":  # without use_lora it has no effect, and that is said
            parse_arguments(["--config", str(tmp_path / "other.yaml")])


@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_setting_is_explained_where_it_is_not_plain(situation):
    text = (ROOT / "utils" / "init" / f"{situation}.yaml").read_text(encoding="utf-8")
    settings = [line for line in text.splitlines() if re.match(r"\w+: ", line)]
    explained = [line for line in settings if "  # " in line]
    assert len(explained) >= len(settings) / 2
    assert max(map(len, text.splitlines())) <= 130


def test_the_cpu_trial_trains_as_it_is(run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # as anyone may stand anywhere
    init(run_script, "cpu_trial", "config.yaml")
    code, out, err = run_script("--config", "config.yaml", "--max_steps", 2, "--max_samples", 60)
    assert code == 0, err
    assert read_record(tmp_path / "runs" / "cpu-trial")["status"] == "finished"
    assert "    writes  " in out


@pytest.mark.parametrize(
    "situation", [pytest.param("one_24gb_qlora", marks=pytest.mark.slow), "one_80gb_lora", "eight_gpus_full"]
)
def test_the_others_run_dry_with_a_small_model(situation, run_script, tiny_model, tmp_path):
    rows = [{side: [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[side]}]
             for side in ("chosen", "rejected")} for pair in make_pairs(30)]  # fmt: skip
    data = write_lines(tmp_path / "pairs.jsonl", rows)
    own = ("--model_name_or_path", tiny_model, "--dataset_name", data, "--output_dir", tmp_path / "my run")
    init(run_script, situation, tmp_path / "config.yaml", *own)
    settings = parse_arguments(["--config", str(tmp_path / "config.yaml")])
    assert settings.model.model_name_or_path == str(tiny_model)
    assert settings.data.dataset_name == str(data)
    assert settings.run.output_dir == str(tmp_path / "my run")
    changed = ("--max_length", 120, "--dtype", "float32", "--dry_run")
    more = ("--sample_max_new_tokens", 8) if settings.run.sample_during_eval else ()
    code, out, err = run_script("--config", tmp_path / "config.yaml", *changed, *more)
    assert code == 0, err
    assert "dry run: every stage works" in out


def test_names_of_any_kind_are_kept(run_script, tmp_path):
    path, odd = tmp_path / "config.yaml", "a: 'b' # \"c\"\\1 é"
    init(run_script, "cpu_trial", path, "--model_name_or_path", odd, "--dataset_name", "yes")
    settings = parse_arguments(["--config", str(path)])
    assert (settings.model.model_name_or_path, settings.data.dataset_name) == (odd, "yes")


def test_nothing_is_written_over(run_script, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("mine: 1\n")
    code, _, err = run_script("init", "--situation", "cpu_trial", "--output_file", path)
    assert (code, err) == (
        2,
        f"error: --output_file {path}: exists and is not overwritten; name another file\n",
    )
    assert path.read_text() == "mine: 1\n"
    code, _, err = run_script("init", "--situation", "cpu_trial", "--output_file", path / "below.yaml")
    assert (code, "cannot be written" in err) == (2, True)


def test_every_fault_is_named(run_script):
    code, _, err = run_script("init", "--output_file", "config.json", "--beta", 1)
    assert code == 2
    first, *others = err.splitlines()
    assert first.startswith("error: --beta: is a flag of the verb train")
    assert first.endswith(", not of init")
    assert others == [
        f"error: --situation is missing: one of {', '.join(SITUATIONS)}; or name a config of another tool with --from. "
        "For example: python advanced_dpo_script.py init --situation one_24gb_qlora",
        "error: --output_file is config.json: must end in .yaml or .yml",
    ]
    code, _, err = run_script("init", "--situation", "cpu_trail")
    assert err.startswith("error: --situation is 'cpu_trail': did you mean cpu_trial? must be one of ")
