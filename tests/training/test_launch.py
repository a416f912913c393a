"""Launches: configs that accelerate itself reads, what is refused, and in which words."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from shared.forked import free_port, run_together
from shared.pairs import make_pairs, write_lines
from shared.runs import ROOT

from utils.training.launch import speaks

CONFIGS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))
KINDS = {"ddp": DistributedType.MULTI_GPU, "deepspeed_zero2": DistributedType.DEEPSPEED,
         "deepspeed_zero3": DistributedType.DEEPSPEED}  # fmt: skip


def test_every_config_is_here():
    names = {path.stem for path in CONFIGS}
    assert names == {"ddp", "fsdp2", "fsdp2_qlora", "deepspeed_zero2", "deepspeed_zero3", "two_nodes"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_config_as_it_is_meant(path):
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == KINDS.get(path.stem, DistributedType.FSDP)
    assert config.num_machines == (2 if path.stem == "two_nodes" else 1)
    assert config.mixed_precision in (None, "no")  # --dtype decides


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_a_config_tells_the_script(path):
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "advanced_dpo_script.py"])
    arguments, config, _ = _validate_launch_command(arguments)
    if "deepspeed" in path.stem:
        pytest.importorskip("deepspeed")
        arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
        _, told = prepare_deepspeed_cmd_env(arguments)
        assert told["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == path.stem[-1]
        return
    told = prepare_multi_gpu_env(arguments)
    assert (told.get("ACCELERATE_USE_FSDP") == "true") == (path.stem != "ddp")
    if path.stem != "ddp":
        assert told["FSDP_VERSION"] == "2"
        assert told["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"


@pytest.fixture
def refused(run_script, tiny_model, pairs_file, tmp_path):
    """Runs the script and returns what it complains of, line by line."""

    def run(*flags) -> list[str]:
        output = tmp_path / "run"
        code, _, err = run_script(
            "--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", output, *flags
        )
        assert code == 2, err
        assert not output.exists()
        return err.strip().splitlines()

    return run


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
         "parallelism_config_tp_size is 2: tensor parallelism is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "4"},
         "parallelism_config_cp_size is 4: context parallelism is not supported"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version is 1: only version 2 is supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version is 1: only version 2 is supported"),
    ],
)  # fmt: skip
def test_a_launch_that_cannot_work_is_refused(refused, monkeypatch, variables, named):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (line,) = refused()
    assert line.startswith(f"error: {named}")
    assert "examples/accelerate/fsdp2.yaml" in line


@pytest.mark.parametrize("flag", ["--tp_size 2", "--tp_plan auto", "--parallelism_config p.json"])
def test_tensor_parallelism_by_flag_is_refused(refused, flag):
    (line,) = refused(*flag.split())
    assert "tensor parallelism is not supported" in line


def test_deepspeed_that_is_not_installed_is_named(refused, monkeypatch):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "utils.training.launch.importlib.util.find_spec", lambda name: None if name == "deepspeed" else find(name)
    )
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    (line,) = refused()
    assert "pip install deepspeed" in line


def test_what_deepspeed_wants_on_cpus_is_said_at_once(refused, monkeypatch):
    monkeypatch.setattr("utils.training.launch.importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("utils.training.launch.find_device", lambda: torch.device("cpu"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert refused() == [
        "error: DeepSpeed on CPUs needs --dtype float32: add it",
        "error: DeepSpeed on CPUs needs --ddp_backend gloo: add it",
    ]


def test_several_gpus_want_a_launcher(refused, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    line, command, others = refused("--lora_r", 4, "--use_lora")
    assert line.startswith("error: this machine has 4 GPUs, and a plain start uses one of them.")
    start = "accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 4 advanced_dpo_script.py"
    assert command.startswith(f"  {start} train --model_name_or_path ")
    assert "--use_lora --lora_r 4" in command
    assert "torchrun --nproc_per_node 4 advanced_dpo_script.py" in others
    assert "examples/accelerate/fsdp2.yaml" in others
    assert "CUDA_VISIBLE_DEVICES=0" in others


@pytest.mark.slow
@pytest.mark.parametrize("source", ["the refusal of a plain start", "plan"])
def test_a_command_that_is_printed_works_as_printed(
    source, run_script, refused, tiny_model, pairs_file, tmp_path, monkeypatch
):
    if source == "plan":
        flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--output_dir", tmp_path / "run")
        out = run_script("plan", *flags, "--gpu", "L4", "--num_devices", 2)[1]
    else:
        with monkeypatch.context() as patch:
            patch.setattr("torch.cuda.device_count", lambda: 2)
            out = "\n".join(refused("--max_steps", 2))
    (command,) = (line.split() for line in out.splitlines() if line.startswith("  accelerate launch "))
    command[:2] = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "in each of 2 processes" in done.stdout
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("rank", "local_rank", "machine", "main_lives", "expected"),
    [
        (0, 0, 0, True, True),
        (1, 1, 0, True, False),
        (1, 1, 0, False, True),
        (2, 2, 0, False, False),
        (8, 0, 1, True, True),
        (9, 1, 1, False, False),
    ],
)
def test_one_process_of_a_machine_says_that_another_is_lost(
    monkeypatch, tmp_path, rank, local_rank, machine, main_lives, expected
):
    from utils.run.processes import identify_process

    main = identify_process() | ({} if main_lives else {"pid": 2**22 + 1})
    (tmp_path / "run.json").write_text(json.dumps({"process": main}), encoding="utf-8")
    for name, value in {"RANK": rank, "LOCAL_RANK": local_rank, "GROUP_RANK": machine}.items():
        monkeypatch.setenv(name, str(value))
    assert speaks(tmp_path) is expected


ONE_READS = """
import sys
sys.path[:0] = ["tests", "."]
from utils.data import tokenizing
encode = tokenizing._tokenize_batch
def count(*arguments, **options):
    import os
    with open(os.environ["COUNTED"] + os.environ["RANK"], "a") as file:
        file.write("x")
    return encode(*arguments, **options)
count.__module__, count.__qualname__ = encode.__module__, encode.__qualname__
tokenizing._tokenize_batch = count
import advanced_dpo_script
sys.exit(advanced_dpo_script.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_one_process_tokenizes_and_the_others_read_it(tiny_model, pairs_file, tmp_path):
    script = tmp_path / "counting.py"
    script.write_text(ONE_READS, encoding="utf-8")
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--dry_run", "--dtype", "float32")
    own = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "COUNTED": str(tmp_path / "counted")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script,
               *flags, "--per_device_train_batch_size", 2]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ | own, capture_output=True, text=True,
                          timeout=280, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "counted0").is_file()
    assert not (tmp_path / "counted1").exists()


EACH_SCORES = """
import os, sys
sys.path[:0] = ["tests", "."]
import advanced_dpo_script
from utils.runtime import quiet_libraries
quiet_libraries()
from utils.training.batches import ROWS
from utils.training.batches import REFERENCE_COLUMNS
from utils.training.reference import ReferenceScores
score = ReferenceScores.score
def count(self, batch):
    if REFERENCE_COLUMNS[0] not in batch:
        with open(sys.argv[1] + os.environ["RANK"], "a") as file:
            file.write("".join(f"{row} " for row in batch[ROWS]))
    return score(self, batch)
ReferenceScores.score = count
sys.exit(advanced_dpo_script.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_each_process_scores_its_share_with_the_reference_once_for_all_runs(run_script, tiny_model, tmp_path):
    data = write_lines(tmp_path / "pairs.jsonl", make_pairs(40, seed=9))
    script = tmp_path / "counting.py"
    script.write_text(EACH_SCORES, encoding="utf-8")
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", data, "--dtype", "float32", "--max_steps", 2)
    flags += ("--precompute_ref_log_probs", "--validation_split", "none")
    for number in (1, 2):
        done = run_together(2, tmp_path / f"scored{number}-", *flags, "--output_dir",
                            tmp_path / f"run{number}", script=str(script))  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert ("found on the disk" in done.stdout) == (number == 2)
    shares = [set(path.read_text().split()) for path in sorted(tmp_path.glob("scored1-*"))]
    assert len(set.union(*shares)) == 40
    assert min(map(len, shares)) >= 15
    assert not list(tmp_path.glob("scored2-*"))
    code, out, _ = run_script(*flags, "--output_dir", tmp_path / "one")
    assert code == 0
    assert "found on the disk" in out
