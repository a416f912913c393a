"""Memory that runs out in mid-run: the work is done again in smaller parts, and the result is the same."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from shared.models import save_tiny_model
from shared.pairs import make_pairs, write_lines
from shared.runs import ROOT, read_metrics, read_record

from utils.engine.memory import ran_out_of_memory
from utils.training.batches import PairCollator, examples_of
from utils.training.trainer import PreferenceTrainer

QUICK = ("--per_device_train_batch_size", 4, "--logging_steps", 1, "--learning_rate", 5e-3, "--max_steps", 4)


@pytest.fixture
def train(run_script, tiny_model, pairs_file, tmp_path):
    """Trains into a folder; returns it with what was printed."""

    def run(*flags, folder="run", data=pairs_file):
        code, out, err = run_script(
            "--model_name_or_path",
            tiny_model,
            "--dataset_name",
            data,
            *QUICK,
            *flags,
            "--output_dir",
            tmp_path / folder,
        )
        assert code == 0, out + err
        return tmp_path / folder, out

    return run


def no_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def fail_once(monkeypatch, where, at):
    """Memory runs out once: in the forward or backward pass of the micro-batch number `at`, or in a step so numbered
    of the optimizer."""
    count = [0]

    def due() -> bool:
        count[0] += 1
        return count[0] == at

    compute_loss = PreferenceTrainer.compute_loss

    def forward_fails(self, *arguments, **options):
        loss = compute_loss(self, *arguments, **options)
        if due():
            no_memory()
        return loss

    def backward_fails(self, model, *arguments, **options):
        loss = compute_loss(self, model, *arguments, **options)
        if due():
            # Of the parameters that the backward pass comes to, the first have their gradients by then.
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            handle = trained[len(trained) // 2].register_hook(lambda _: (handle.remove(), no_memory()))
        return loss

    def step_fails(self, *arguments, **options):
        if due():
            no_memory()
        return adamw(self, *arguments, **options)

    adamw = torch.optim.AdamW.step
    if where == "optimizer":
        monkeypatch.setattr(torch.optim.AdamW, "step", step_fails)
    else:
        monkeypatch.setattr(PreferenceTrainer, "compute_loss", forward_fails if where == "forward" else backward_fails)


def assert_same_run(one, other, pairs_file=None):
    a, b = (load_file(next(folder.glob("*.safetensors"))) for folder in (one, other))
    assert all(torch.allclose(a[name], b[name], atol=2e-5) for name in a)
    for line, other_line in zip(read_metrics(one), read_metrics(other), strict=True):
        assert other_line == pytest.approx(line, rel=1e-3, abs=1e-5)
    a, b = (read_record(folder) for folder in (one, other))
    assert a["metrics"]["held_out"] == pytest.approx(b["metrics"]["held_out"], rel=1e-3, abs=1e-5)
    assert a["metrics"]["train"] == pytest.approx(b["metrics"]["train"], rel=1e-3, abs=1e-5)


WAYS = {
    "full": [],
    "lora, accumulated": ["--gradient_accumulation_steps", 3, "--use_lora"],
    "by tokens, padded, reference ahead": [
        *["--max_tokens_per_batch", 120],
        *["--precompute_ref_log_probs", "--engine", "padded"],
    ],
}
EVERY_DAY = (("lora, accumulated", "backward"), ("by tokens, padded, reference ahead", "forward"))


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        pytest.param(flags, where, id=f"{way}-{where}", marks=() if (way, where) in EVERY_DAY else pytest.mark.slow)
        for way, flags in WAYS.items()
        for where in ("forward", "backward")
    ],
)
def test_a_micro_batch_that_does_not_fit_is_computed_in_parts(train, monkeypatch, where, flags):
    whole, _ = train(*flags, folder="whole")
    fail_once(monkeypatch, where, 3)
    parts, out = train(*flags, folder="parts")
    assert_same_run(whole, parts)
    (warning,) = read_record(parts)["warnings"]
    assert warning in out
    found = re.match(r"step (\d): memory ran out in a micro-batch of (\d+) tokens .* at most (\d+) tokens", warning)
    assert int(found[3]) < int(found[2])
    micro_batches = read_record(parts)["micro_batches"]
    assert micro_batches["max_tokens_per_batch"] == int(found[3])
    assert micro_batches["lowered"] == [{"step": int(found[1]), "max_tokens_per_batch": int(found[3])}]
    a, b = (read_record(folder)["engine"] for folder in (whole, parts))
    if "padded" not in flags:
        assert a["tokens_computed"] == b["tokens_computed"], "what was thrown away is not counted"


@pytest.mark.parametrize("losses", [["aot"], ["sigmoid", "aot_unpaired"]], ids=" and ".join)
def test_a_micro_batch_whose_pairs_are_sorted_is_not_divided(
    run_script, tiny_model, pairs_file, tmp_path, monkeypatch, losses
):
    fail_once(monkeypatch, "forward", 2)
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, *QUICK, "--loss_type", *losses)
    code, _, err = run_script(*flags, "--output_dir", tmp_path / "run")
    assert code == 2
    assert f"which --loss_type {losses[-1]} sorts, so that dividing it would change the loss" in err


def test_rows_that_are_filled_up_are_divided_to_the_last_pair(
    run_script, tiny_model, pairs_file, tmp_path, monkeypatch
):
    """What fills a row up stays as its pairs get fewer: to halve it with them would divide nothing, for ever."""
    monkeypatch.setattr("utils.training.layout.ROW_MULTIPLE", 512)
    monkeypatch.setattr(PreferenceTrainer, "compute_loss", lambda *_, **__: no_memory())
    flags = ("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, "--max_steps", 1, "--dtype", "bfloat16")
    code, _, err = run_script(*flags, "--output_dir", tmp_path / "run")
    assert code == 2
    assert "a single pair cannot be divided" in err


def test_what_was_kept_for_a_part_that_did_not_fit_is_given_back(train, monkeypatch):
    kept, compute = [], PreferenceTrainer.compute_part

    def compute_part(self, model, part, *arguments):
        try:
            return compute(self, model, part, *arguments)
        finally:
            kept.append(len(part["layout"].kept))

    fail_once(monkeypatch, "forward", 2)
    monkeypatch.setattr(PreferenceTrainer, "compute_part", compute_part)
    train("--gradient_checkpointing", folder="run")
    assert len(kept) > 3
    assert not any(kept)


def test_an_optimizer_step_that_found_no_memory_is_taken_again(train, monkeypatch):
    whole, _ = train(folder="whole")
    fail_once(monkeypatch, "optimizer", 3)
    again, _ = train(folder="again")
    assert_same_run(whole, again)


def test_an_optimizer_that_changed_weights_already_ends_the_run(
    run_script, tiny_model, pairs_file, tmp_path, monkeypatch
):
    adamw, steps = torch.optim.AdamW.step, []

    def half_a_step(self, *arguments, **options):
        steps.append(adamw(self, *arguments, **options))
        if len(steps) == 3:
            no_memory()

    monkeypatch.setattr(torch.optim.AdamW, "step", half_a_step)
    code, _, err = run_script("--model_name_or_path", tiny_model, "--dataset_name", pairs_file, *QUICK,
                              "--save_steps", 2, "--output_dir", tmp_path / "run")  # fmt: skip
    assert code == 2
    assert "step 3: memory ran out in the optimizer step" in err
    assert f"the newest checkpoint, {tmp_path / 'run' / 'checkpoint-2'}, is intact" in err
    assert len(steps) == 3
    assert read_record(tmp_path / "run")["status"] == "failed"


def test_a_pair_that_does_not_fit_alone_is_named(run_script, tiny_model, tmp_path, monkeypatch):
    pairs = make_pairs(30)
    pairs[17]["chosen"] = " lovely" * 30
    data = write_lines(tmp_path / "pairs.jsonl", pairs)
    compute_loss = PreferenceTrainer.compute_loss

    def too_long(self, model, inputs, *arguments, **options):
        if max(map(max, inputs["layout"].lengths)) > 30:
            no_memory()
        return compute_loss(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(PreferenceTrainer, "compute_loss", too_long)
    code, out, err = run_script("--model_name_or_path", tiny_model, "--dataset_name", data, "--save_steps", 1,
                                "--validation_split", "none", "--per_device_train_batch_size", 3, "--seed", 2,
                                "--output_dir", tmp_path / "run")  # fmt: skip
    assert code == 2, out
    assert re.search(
        r"error: step \d+: memory ran out with a pair of \d+ tokens \(pairs.jsonl line 18\), and a single", err
    )
    assert "checkpoint-" in err
    assert "What helps: a lower --max_length" in err
    record = read_record(tmp_path / "run")
    assert record["status"] == "failed"
    assert "Traceback" not in err


@pytest.mark.parametrize("flags", [["--use_lora"], ["--precompute_ref_log_probs"]], ids=["", "reference ahead"])
def test_scoring_that_does_not_fit_is_done_in_parts(train, tmp_path, monkeypatch, flags):
    from utils.engine import completions, scoring

    data = write_lines(tmp_path / "pairs.jsonl", make_pairs(47, seed=len(flags[0])))  # of its own: no scores on disk
    flags = (*flags, "--validation_split", "0.4", "--per_device_eval_batch_size", 16)
    whole, _ = train(*flags, folder="whole", data=data)
    monkeypatch.setattr("utils.training.reference.load_columns", lambda *_: None)

    def small_batches_only(model, batch, **options):
        if not torch.is_grad_enabled() and len(batch["layout"].lengths) > 5:
            no_memory()
        return scoring.score_tokens(model, batch, **options)

    monkeypatch.setattr(completions, "score_tokens", small_batches_only)
    parts, out = train(*flags, folder="parts", data=data)
    assert_same_run(whole, parts)
    assert "chosen_kl" in read_record(parts)["metrics"]["held_out"]
    assert "memory ran out in scoring" in out
    assert any("memory ran out in scoring" in warning for warning in read_record(parts)["warnings"])
    rows = [
        [json.loads(line) for line in (folder / "held_out_pairs.jsonl").read_text().splitlines()]
        for folder in (whole, parts)
    ]
    for one, other in zip(*rows, strict=True):
        assert other.pop("id") == one.pop("id")
        assert other.pop("place") == one.pop("place")
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
def test_the_pairs_of_a_batch_are_found_in_it(packs):
    collator = PairCollator(pad_token_id=0)
    collator.packs = packs
    pairs = [
        {"prompt_ids": [5, 0, 6], "chosen_ids": [7], "rejected_ids": [0, 8, 9], "row": 4},
        {"prompt_ids": [3], "chosen_ids": [0, 4, 5, 6], "rejected_ids": [2], "row": 9},
    ]
    for pair in pairs:
        pair |= {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.25}
    assert examples_of(collator.whole(pairs)) == pairs
    collator.max_tokens = 14
    assert sorted(examples_of(collator(pairs)), key=lambda pair: pair["row"]) == pairs


def start_two(script, *arguments):
    """Two processes; ends them when they hang."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    command = [str(part) for part in (*command, *arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--gradient_accumulation_steps", 2],
        ["--use_lora", "--max_tokens_per_batch", 80],
    ],
    ids=["full, accumulated", "lora, by tokens"],
)
def test_one_of_two_processes_begins_its_part_anew(run_script, tiny_model, pairs_file, tmp_path, flags):
    quick = "--learning_rate 5e-3 --max_steps 3 --dtype float32 --logging_steps 1 --precompute_ref_log_probs false"
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", pairs_file, *quick.split(), *flags]
    done = start_two("tests/programs/little_room.py", 60, *flags, "--per_device_train_batch_size", 4,
                     "--output_dir", tmp_path / "two")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"warning: step 1, process 1: memory ran out in a micro-batch of \d+ tokens", done.stdout)
    code, _, err = run_script(*flags, "--per_device_train_batch_size", 8, "--output_dir", tmp_path / "one")
    assert code == 0, err
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_one_of_two_processes_that_cannot_go_on_ends_both(tiny_model, pairs_file, tmp_path):
    done = start_two("tests/programs/little_room.py", 5, "--model_name_or_path", tiny_model, "--dataset_name",
                     pairs_file, "--per_device_train_batch_size", 2, "--validation_split", "none", "--output_dir",
                     tmp_path / "run")  # fmt: skip
    assert done.returncode != 0
    found = r"error: step 1, process 1: memory ran out with a pair of \d+ tokens \(pairs.jsonl line"
    assert re.search(found, done.stderr), done.stderr
    assert read_record(tmp_path / "run")["status"] == "failed"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits on the memory of a process are Linux's")
def test_memory_that_the_system_refuses_is_done_without(tmp_path):
    """A batch that takes some hundred MiB, where there are sixty."""
    model = save_tiny_model(tmp_path / "model", 1, hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    data = write_lines(tmp_path / "pairs.jsonl", make_pairs(130))
    flags = [model, "--dataset_name", data, "--per_device_train_batch_size", 64, "--max_steps", 2, "--logging_steps", 1,
             "--dtype", "float32", "--validation_split", "none", "--precompute_ref_log_probs", "false"]  # fmt: skip
    for name, script in (("little", ["tests/programs/little_memory.py", 60]), ("enough", ["advanced_dpo_script.py"])):
        command = [sys.executable, *script, "--model_name_or_path", *flags, "--output_dir", tmp_path / name]
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "memory ran out in a micro-batch of" in read_record(tmp_path / "little")["warnings"][0]
    assert read_record(tmp_path / "enough")["warnings"] == []
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("little", "enough"))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


HEAP = """
import ctypes, sys
from utils.engine.memory import freed_memory_returned, keep_freed_memory

class Account(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

library = ctypes.CDLL("libc.so.6")
library.mallinfo2.restype = Account

def blocks():  # of a megabyte each, with a small one that stays after each
    kept.append([(torch.empty(2**18), torch.empty(8)) for _ in range(100)])
    found = library.mallinfo2()
    kept[-1] = [small for _, small in kept[-1]]
    return found.arena, found.hblkhd

import torch
kept = []
keep_freed_memory()
with freed_memory_returned():
    print(*blocks())
print(*blocks())
print(library.mallinfo2().arena)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or later"
)
def test_blocks_of_a_trial_go_back_to_the_system_and_those_of_training_stay():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    ended = subprocess.run(
        [sys.executable, "-c", HEAP], cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=240
    )
    (arena, mapped), (arena_after, mapped_after), (arena_left,) = (
        map(int, line.split()) for line in ended.stdout.splitlines()
    )
    assert mapped > 100 * 2**20
    assert arena < 100 * 2**20
    assert mapped_after < 100 * 2**20
    assert arena_after > arena + 90 * 2**20
    assert arena_left == arena_after


def test_what_the_libraries_say_when_there_is_no_room():
    for text in (
        "could not create a primitive",
        "could not create a memory object",
        "unable to mmap: Cannot allocate memory",
    ):
        assert ran_out_of_memory(RuntimeError(text)), text
    assert ran_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not ran_out_of_memory(RuntimeError("could not create a primitive descriptor for a convolution"))
    assert not ran_out_of_memory(ValueError("could not create a primitive"))
