"""Two and four processes, replicated (DDP) and sharded (FSDP2), over gloo: the numbers and the files of one process."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import torch
from shared.forked import Ended, free_port, run_together
from shared.runs import ROOT, assert_same_run, pretend_interrupted, read_record, start
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from utils.engine.proving import Trial, gives_all_gradients

FULL = ["--precompute_ref_log_probs=false"]
WAYS = {
    "full": FULL,
    "full, padded": [*FULL, "--engine", "padded"],
    "full, reference ahead, by tokens": ["--precompute_ref_log_probs", "--max_tokens_per_batch", 80],
    "full, another reference": [*FULL, "--ref_model_name_or_path", "OTHER"],
    "full, another reference, ahead": ["--precompute_ref_log_probs", "--ref_model_name_or_path", "OTHER"],
    "lora": ["--use_lora"],
    "lora, padded": ["--use_lora", "--engine", "padded"],
    "lora, reference ahead": ["--use_lora", "--precompute_ref_log_probs"],
    "lora, another reference": ["--use_lora", *FULL, "--ref_model_name_or_path", "OTHER"],
    "lora, another reference, ahead": [
        *["--use_lora", "--precompute_ref_log_probs"],
        *["--ref_model_name_or_path", "OTHER", "--engine", "padded"],
    ],
    "lora on 4 bits": ["--use_lora", "--use_4bit"],
    "full, 4 bits asked for": ["--use_4bit"],
    "lora, compiled": ["--use_lora", "--torch_compile", "--torch_compile_backend", "aot_eager"],
    "full, compiled": [*FULL, "--gradient_checkpointing", "--torch_compile", "--torch_compile_backend", "aot_eager"],
    # Now one process, now the other has more micro-batches; gradients are exchanged once all the same.
    "lora, by tokens": ["--use_lora", "--max_tokens_per_batch", 44],
}
KINDS = {"replicated": ("ddp", "advanced_dpo_script.py"), "sharded": ("fsdp2", "tests/programs/sharded.py")}
# Of the table, for every day.
EVERY_DAY = (
    ("lora", "replicated", 4),
    ("full, another reference, ahead", "replicated", 2),
    ("lora, by tokens", "sharded", 2),
)
CASES = [
    pytest.param(*case, id="-".join(map(str, case)), marks=() if case in EVERY_DAY else pytest.mark.slow)
    for case in [(way, kind, count) for way in WAYS for kind in KINDS for count in (2, 4)]
    if case[2] == 2 or case[0] in ("full", "lora", "full, reference ahead, by tokens", "lora, by tokens")
]
# To the end of a pass over the data, whose last step has fewer pairs than the processes take.
A_PASS = ("--max_samples", 42, "--num_train_epochs", 1)
SHORTEST = 18  # tokens of the shortest of its pairs


@pytest.fixture
def flags_of(tiny_model, other_model, pairs_file):
    """The flags of a run but for its folder and its pairs per step."""

    def flags(*more) -> list:
        named = [other_model if word == "OTHER" else word for word in more]
        return ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--learning_rate", 5e-3,
                "--logging_steps", 1, "--dtype", "float32", *named]  # fmt: skip

    return flags


@pytest.fixture
def together(tmp_path):
    """Runs the script in several processes, replicated or sharded: a run that succeeds, and complains of nothing."""

    def run(kind: str, count: int, *flags) -> Ended:
        config, script = KINDS[kind]
        config += "_qlora" if kind == "sharded" and {"--use_lora", "--use_4bit"} <= set(flags) else ""
        done = run_together(count, *flags, script=script, config=config)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def kept_runs(tmp_path_factory):
    """Finished runs of one process by their flags, for tests that compare with the same one."""
    return tmp_path_factory.mktemp("runs"), {}


@pytest.fixture
def run_of_one(kept_runs, run_script, monkeypatch):
    """The folder of the run of one process with 12 pairs per step, which reads no scores that others left."""
    folder, runs = kept_runs

    def find(*flags):
        key = tuple(map(str, flags))
        if key not in runs:
            with monkeypatch.context() as patch:
                patch.setattr("utils.training.reference.load_columns", lambda *_: None)
                output = folder / f"{len(runs)}"
                code, out, err = run_script(*flags, "--per_device_train_batch_size", 12, "--output_dir", output)
            assert code == 0, out + err
            runs[key] = output
        return runs[key]

    return find


def parted(count: int) -> list:
    """Twelve pairs per step in so many processes, each of which accumulates gradients."""
    return ["--per_device_train_batch_size", 4 // count, "--gradient_accumulation_steps", 3]


@pytest.mark.parametrize(("way", "kind", "count"), CASES)
def test_several_processes_are_the_run_of_one(way, kind, count, together, run_of_one, flags_of, tmp_path):
    flags, folder = flags_of(*A_PASS, *WAYS[way]), tmp_path / "run"
    done = together(kind, count, *flags, "--output_dir", folder, *parted(count))
    how = "sharded by FSDP2" if kind == "sharded" else "DDP: all weights in each"
    assert f"in each of {count} processes ({how})" in done.stdout
    witnesses = [path.read_text() for path in sorted(folder.glob("sharded-*"))]
    assert witnesses == (["True"] * count if kind == "sharded" else [])
    record, one = read_record(folder), run_of_one(*flags)
    assert (record["engine"]["shared_prefix"] is True) == ("padded" not in WAYS[way])
    assert record["data"]["train_pairs"] % 12 == 1
    engine, engine_of_one = record["engine"], read_record(one)["engine"]
    assert engine["tokens_padded_equivalent"] == pytest.approx(engine_of_one["tokens_padded_equivalent"], rel=0.4)
    if engine["shared_prefix"] is True and "--max_tokens_per_batch" not in WAYS[way]:
        # Each process but one has no pair in the last micro-batch, and computes the shortest one in its place.
        filled = (count - 1) * SHORTEST
        assert engine["tokens_computed"] == engine_of_one["tokens_computed"] + filled, "of all processes"
    assert record["reference"] == read_record(one)["reference"]
    assert record["reference"].endswith("scored once before training") == (
        "--precompute_ref_log_probs" in WAYS[way] or WAYS[way] == ["--use_4bit"]
    )
    assert_same_run(one, folder)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_launcher_starts_the_run_of_one(launcher, kind, run_of_one, flags_of, tmp_path):
    """By the commands of docs/scaling.md."""
    if (launcher, kind) == ("torchrun", "sharded"):
        pytest.skip("FSDP2 is configured through accelerate launch")
    flags, folder = flags_of(*A_PASS, "--use_lora"), tmp_path / "run"
    config, script = KINDS[kind]
    start = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", 2],
        "accelerate": [
            *["accelerate.commands.launch", "--config_file", f"examples/accelerate/{config}.yaml"],
            *["--num_processes", 2, "--main_process_port", free_port()],
        ],
    }[launcher]
    command = [sys.executable, "-m", *start, script, *flags, "--output_dir", folder, *parted(2)]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "nothing that is not for the person who started it"
    assert_same_run(run_of_one(*flags), folder)


@pytest.fixture(scope="module")
def model_of_experts(tiny_model, tmp_path_factory):
    """A random mixture of experts, of which each token goes through two of four."""
    folder = tmp_path_factory.mktemp("models") / "experts"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    size = AutoConfig.from_pretrained(tiny_model).vocab_size
    config = MixtralConfig(vocab_size=size, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=128,
                           bos_token_id=0, eos_token_id=1, pad_token_id=2, **shape)  # fmt: skip
    torch.manual_seed(3)
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def test_weights_that_a_step_may_leave_without_a_gradient_are_found(tiny_model, model_of_experts):
    ids = torch.arange(3, 15).view(1, -1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": (ids > 8).long()}
    trial = Trial(contextlib.nullcontext)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert gives_all_gradients(model, batch, trial)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.of_no_use = torch.nn.Parameter(torch.ones(3))
    assert not gives_all_gradients(model, batch, trial)
    model.of_no_use.requires_grad_(False)
    assert gives_all_gradients(model, batch, trial)
    assert gives_all_gradients(AutoModelForCausalLM.from_pretrained(model_of_experts), batch, trial)  # in one tensor

    model.requires_grad_(False)
    assert gives_all_gradients(model, batch, trial)  # as in an evaluation
    model.requires_grad_(True)
    del model.of_no_use

    class Chosen(torch.nn.Module):
        def __init__(self, expert: torch.nn.Module):
            super().__init__()
            self.experts = torch.nn.ModuleList([expert])

        def forward(self, hidden):
            return self.experts[0](hidden)

    model.model.layers[1].mlp = Chosen(model.model.layers[1].mlp)
    assert not gives_all_gradients(model, batch, trial)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_of_experts_in_two_processes_is_the_run_of_one(
    kind, together, run_of_one, flags_of, model_of_experts, tmp_path
):
    # AdamW would make much of what rounding does to experts that few tokens choose.
    flags = ["--model_name_or_path", model_of_experts, *flags_of(*A_PASS, *FULL, "--optim", "sgd")[2:]]
    together(kind, 2, *flags, "--output_dir", tmp_path / "run", *parted(2))
    assert_same_run(run_of_one(*flags), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sft_in_two_processes_is_the_run_of_one(kind, together, run_of_one, flags_of, tmp_path):
    flags = ["sft", *flags_of(*A_PASS)]
    together(kind, 2, *flags, "--output_dir", tmp_path / "run", "--per_device_train_batch_size", 6)
    assert_same_run(run_of_one(*flags), tmp_path / "run")


EVERY_DAY_RESUMED = ("full", ("replicated", 1), ("sharded", 2))
RESUMED = [  # ways, kinds and processes before and after
    EVERY_DAY_RESUMED,
    ("full", ("sharded", 2), ("replicated", 1)),
    ("lora", ("replicated", 1), ("sharded", 2)),
    ("lora", ("sharded", 2), ("replicated", 1)),
    ("lora", ("sharded", 2), ("sharded", 2)),
    ("full", ("replicated", 2), ("replicated", 1)),
    ("lora", ("replicated", 1), ("replicated", 2)),
    ("lora", ("replicated", 2), ("replicated", 4)),
    ("full, another reference, ahead", ("replicated", 4), ("replicated", 1)),
    ("full", ("sharded", 2), ("replicated", 4)),
    ("full", ("sharded", 2), ("sharded", 4)),
    ("lora, by tokens", ("sharded", 4), ("replicated", 1)),
]


@pytest.mark.parametrize(
    ("way", "before", "after"),
    [
        pytest.param(
            *case,
            id=f"{case[0]}-{'-'.join(map(str, case[1]))}-to-{'-'.join(map(str, case[2]))}",
            marks=() if case == EVERY_DAY_RESUMED else pytest.mark.slow,
        )
        for case in RESUMED
    ],
)
def test_a_run_goes_on_in_another_number_of_processes(
    way, before, after, together, run_of_one, run_script, flags_of, tmp_path
):
    # Interrupted in the second pass over the data.
    flags = flags_of("--max_samples", 42, "--num_train_epochs", 2, "--save_steps", 5, *WAYS[way])
    folder = tmp_path / "run"

    def train(kind: str, count: int, *more) -> None:
        own = [*flags, "--output_dir", folder, "--per_device_train_batch_size", 12 // count, *more]
        if count > 1:
            together(kind, count, *own)
        else:
            code, _, err = run_script(*own)
            assert code == 0, err

    train(*before)
    pretend_interrupted(folder, 5)
    names = {path.suffix for path in (folder / "checkpoint-5").iterdir()}
    assert names <= {".safetensors", ".json", ".jinja"}  # nothing is a pickle
    train(*after, "--resume_from_checkpoint", "auto")
    assert_same_run(run_of_one(*flags), folder)


def test_a_resumed_run_keeps_its_pairs_per_step(run_script, flags_of, tmp_path):
    flags = flags_of("--max_steps", 4, "--save_steps", 2, "--output_dir", tmp_path / "run")
    assert run_script(*flags, "--per_device_train_batch_size", 8)[0] == 0
    pretend_interrupted(tmp_path / "run", 2)
    resume = (*flags, "--resume_from_checkpoint", "auto")
    code, _, err = run_script(*resume, "--per_device_train_batch_size", 4)
    assert code == 2
    assert "8 rows per optimizer step before (8 x 1 x 1 process), 4 now (4 x 1 x 1 process)" in err
    assert "--allow_changes world" in err
    split = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4)
    code, _, err = run_script(*resume, *split)
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_run_with_what_is_safe(lost, flags_of, tmp_path):
    flags = flags_of("--max_steps", 5000, "--save_steps", 5, "--save_total_limit", 2,
                     "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "run")  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    started = start(
        [*command, "advanced_dpo_script.py", *map(str, flags)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while not (tmp_path / "run" / "checkpoint-10" / "trainer_state.json").is_file():
            assert started.poll() is None, started.communicate()
            time.sleep(0.1)
        workers = [child for child in psutil.Process(started.pid).children() if child.environ().get("RANK")]
        next(worker for worker in workers if worker.environ()["RANK"] == str(lost)).kill()
        _, err = started.communicate(timeout=100)
    finally:
        started.kill()
    assert started.returncode == 1
    (said,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert "another process of this run ended or stopped responding" in said
    assert "is safe. To resume" in said
    assert "-m torch.distributed.run --standalone --nproc_per_node 2 advanced_dpo_script.py" in err
    assert "--resume_from_checkpoint auto" in err


def test_sharding_that_does_not_happen_is_said(run_script, tiny_model, pairs_file, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--max_steps", 1)
    code, out, err = run_script(*flags, "--output_dir", tmp_path / "run")
    assert code == 0, err
    assert "warning: FSDP is configured, but nothing is sharded" in out
