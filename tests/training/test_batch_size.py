"""--auto_batch_size: a size found by trying, and otherwise the run with that --max_tokens_per_batch."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from shared.forked import run_together
from shared.pairs import make_pairs, write_lines
from shared.runs import read_metrics, read_record

from utils.training import batch_size
from utils.training.batch_size import Attempt, choose_size, expect_bytes
from utils.training.trainer import PreferenceTrainer

QUICK = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 4, "--logging_steps", 1)
QUICK += ("--learning_rate", 5e-3, "--max_steps", 3)


def test_the_smallest_size_that_is_about_as_fast_is_chosen():
    attempts = [
        Attempt(100, 10, True, 990.0),  # holds no longest pair
        Attempt(200, 20, True, 800.0),
        Attempt(400, 40, True, 985.0),
        Attempt(800, 80, True, 1000.0),
        Attempt(1600, 160, False, None),
    ]
    assert choose_size(attempts, least=150).tokens == 400
    assert choose_size(attempts, least=500).tokens == 800
    assert choose_size(attempts, least=900) is None


def test_what_a_size_takes_is_expected_from_those_before():
    one = Attempt(100, 50, True, 1.0)
    assert expect_bytes([], 100) == 0
    assert expect_bytes([one], 200) == 100
    assert expect_bytes([one, one], 200) == 100  # two that hold the same pairs
    two = Attempt(200, 70, True, 1.0)  # 30 whatever the tokens, and 0.2 for each
    assert expect_bytes([one, two], 400) == 110
    assert expect_bytes([one, two, Attempt(800, 500, False, None)], 400) == 110  # that one was not computed
    assert expect_bytes([one, Attempt(200, 40, True, 1.0)], 400) == 40  # noise never says that more takes less


@pytest.fixture
def run(run_script, tiny_model, pairs_file, tmp_path):
    def start(*flags, folder="run", data=pairs_file, code=0):
        found, out, err = run_script(
            *("--model_name_or_path", tiny_model, "--dataset_name", data, "--output_dir", tmp_path / folder),
            *QUICK,
            *flags,
        )
        assert found == code, out + err
        return tmp_path / folder, out + err

    return start


def limit_memory(monkeypatch, computed: list[int], bytes_free: int, per_token: int = 1000) -> None:
    """A machine with so much memory, of which each token takes so much; `computed` gets the sizes that are tried."""
    measure_speed = batch_size._Search._measure_speed

    class Counted(batch_size.Peak):
        def __exit__(self, *_):
            super().__exit__()
            self.bytes = per_token * computed[-1]

    def counted(self, batch):
        computed.append(batch["input_ids"].numel())
        measure_speed(self, batch)
        return 1000.0 * computed[-1]  # the more, the faster

    monkeypatch.setattr(batch_size, "Peak", Counted)
    monkeypatch.setattr(batch_size, "free_bytes", lambda _: bytes_free)
    monkeypatch.setattr(batch_size, "USED", {"cpu": 1.0})
    monkeypatch.setattr(batch_size._Search, "_measure_speed", counted)


@pytest.mark.parametrize(
    "flags",
    [
        ["--use_lora", "--lora_dropout", 0.1, "--gradient_checkpointing"],
        ["--precompute_ref_log_probs", "--engine", "padded", "--optim", "sgd"],
    ],
    ids=["lora with dropout", "reference ahead, padded"],
)
def test_the_run_is_the_one_with_the_size_given(run, tmp_path, monkeypatch, flags):
    data = write_lines(tmp_path / "pairs.jsonl", make_pairs(61, seed=len(flags)))
    limit_memory(monkeypatch, [], 300_000 if "--optim" in flags else 200_000)
    found, out = run(*flags, "--auto_batch_size", folder="found", data=data)
    monkeypatch.setattr("utils.training.reference.load_columns", lambda *_: None)
    size = read_record(found)["micro_batches"]["max_tokens_per_batch"]
    assert f"--max_tokens_per_batch {size};" in out
    given, _ = run(*flags, "--max_tokens_per_batch", size, folder="given", data=data)
    a, b = (load_file(next(folder.glob("*.safetensors"))) for folder in (found, given))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert read_metrics(found) == read_metrics(given)
    records = [read_record(folder) for folder in (found, given)]
    assert records[0]["engine"] == records[1]["engine"]
    assert records[0]["metrics"] == records[1]["metrics"]
    line = next(line for line in read_metrics(found) if "loss" in line)
    assert line["pairs"] == 16, "the effective batch is what the settings say"


def test_nothing_is_computed_that_is_not_expected_to_fit(run, monkeypatch):
    computed: list[int] = []
    limit_memory(monkeypatch, computed, 10**6 // 8 + 8 * 43_040)  # AdamW's two numbers for each that is trained
    folder, out = run("--auto_batch_size", "--validation_split", "none")
    record = read_record(folder)["micro_batches"]
    assert max(computed) <= 125 < 2 * max(computed)
    assert record["max_tokens_per_batch"] <= 125
    left_out = [attempt for attempt in record["tried"] if not attempt["fits"]]
    assert left_out
    assert all(attempt["tokens"] > 125 and attempt["tokens_per_second"] is None for attempt in left_out)
    assert "do not fit" in out or "fit too and are no faster" in out


def test_a_longest_pair_that_does_not_fit_is_said(run, tmp_path, monkeypatch):
    computed: list[int] = []
    limit_memory(monkeypatch, computed, 20_000)
    folder, out = run("--auto_batch_size", "--use_lora", "--precompute_ref_log_probs", "false", code=2)
    assert "error: --auto_batch_size: the longest pair alone has" in out
    assert not folder.exists()


def test_a_resumed_run_takes_the_size_that_was_found(run, tmp_path, monkeypatch):
    whole, _ = run("--auto_batch_size", "--save_steps", 2, folder="whole")
    size = read_record(whole)["micro_batches"]["max_tokens_per_batch"]
    before = {path.name for path in whole.iterdir()}
    weights = load_file(whole / "model.safetensors")

    def stop(*_):
        raise AssertionError("a resumed run searches for nothing")

    monkeypatch.setattr(batch_size, "_Search", stop)
    again, out = run(
        "--auto_batch_size", "--save_steps", 2, "--resume_from_checkpoint", whole / "checkpoint-2", folder="whole"
    )
    assert f"micro-batches: at most {size:,} tokens, as found when the run began" in out
    assert read_record(again)["micro_batches"]["max_tokens_per_batch"] == size
    assert {path.name for path in again.iterdir()} >= before
    assert all(torch.equal(value, weights[name]) for name, value in load_file(again / "model.safetensors").items())


def test_no_size_is_tried_beyond_the_pairs_of_a_step(run):
    folder, _ = run("--auto_batch_size")
    record = read_record(folder)
    sizes = [attempt["tokens"] for attempt in record["micro_batches"]["tried"]]
    assert len(sizes) == len(set(sizes))
    assert record["micro_batches"]["max_tokens_per_batch"] in sizes
    assert max(sizes) < 16 * 40  # no pair is that long


def test_memory_that_runs_out_in_the_search_is_a_size_that_does_not_fit(run, monkeypatch):
    compute_loss, sizes = PreferenceTrainer.compute_loss, []

    def limited(self, model, inputs, *arguments, **options):
        sizes.append(inputs["input_ids"].numel())
        if sizes[-1] > 200:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute_loss(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(PreferenceTrainer, "compute_loss", limited)
    folder, _ = run("--auto_batch_size")
    record = read_record(folder)
    assert max(sizes) > 200
    assert record["micro_batches"]["max_tokens_per_batch"] <= 200
    assert record["warnings"] == []


@pytest.fixture
def run_in_two(tiny_model, tmp_path):
    """Runs the script in two processes, of which the second has room for fewer tokens."""

    def start(data, first: int, second: int, *flags):
        named = ("--model_name_or_path", tiny_model, "--dataset_name", data, "--output_dir", tmp_path / "two")
        half = ("--per_device_train_batch_size", 2, *QUICK[2:])
        script = (first, second, *named, *half, "--dtype", "float32", *flags)
        return run_together(2, *script, script="tests/programs/uneven_room.py")

    return start


@pytest.mark.slow
@pytest.mark.parametrize("way", [["--use_lora"], ["--precompute_ref_log_probs"]], ids=["lora", "reference ahead"])
def test_processes_with_unlike_memory_take_a_size_that_fits_each(way, run, run_in_two, tmp_path):
    pairs = make_pairs(61)
    for index in (7, 30):
        pairs[index]["rejected"] = " cold" * 40
    data = write_lines(tmp_path / "pairs.jsonl", pairs)
    done = run_in_two(data, 900, 210, "--auto_batch_size", *way)
    assert done.returncode == 0, done.stderr
    two = read_record(tmp_path / "two")
    found = two["micro_batches"]
    assert 180 < found["max_tokens_per_batch"] <= 210
    assert any(attempt["tokens"] > 210 and not attempt["fits"] for attempt in found["tried"])
    assert "lowered" not in found
    assert two["warnings"] == []
    one, _ = run("--dtype", "float32", *way, data=data)
    for line, other in zip(read_metrics(one), read_metrics(tmp_path / "two"), strict=True):
        assert other == pytest.approx(line | {"epoch": other["epoch"]}, abs=1e-4)


@pytest.mark.slow
def test_a_pair_that_does_not_fit_one_process_is_said_of_that_process(run_in_two, pairs_file, tmp_path):
    done = run_in_two(pairs_file, 900, 10, "--auto_batch_size")
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert said.startswith("error: --auto_batch_size: the longest pair alone has")
    assert "0.10 GiB may be used by one of the processes" in said
    assert not (tmp_path / "two").exists()


def test_what_contradicts_it_is_refused(run):
    _, out = run("--auto_batch_size", "--max_tokens_per_batch", 100, "--loss_type", "aot", code=2)
    assert "--auto_batch_size: finds the value that --max_tokens_per_batch sets; leave out one of the two" in out
    assert "--auto_batch_size: would change the groups of pairs that aot sorts" in out
    _, out = run("--auto_find_batch_size", code=2)
    assert "use --auto_batch_size" in out
