"""Held-out metrics: each by pair in a file, right by plain models read from disk, and means of what the file says."""

from __future__ import annotations

import gc
import json
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from shared.pairs import make_pairs, write_lines
from shared.runs import read_metrics, read_record
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.training.pair_scoring import PairTask
from utils.training.sft import summarise

QUICK = {"--per_device_train_batch_size": 4, "--logging_steps": 1, "--learning_rate": 5e-3, "--max_steps": 6,
         "--validation_split": 0.5}  # fmt: skip
WAYS = {
    "lora": ["--use_lora"],
    "full, reference ahead": ["--precompute_ref_log_probs"],
    "full, both models": ["--precompute_ref_log_probs", "false"],
    "lora, reference ahead": ["--use_lora", "--precompute_ref_log_probs"],
    "padded": ["--use_lora", "--engine", "padded"],
    "full, ahead, padded": ["--precompute_ref_log_probs", "--engine", "padded"],
}


@pytest.fixture
def train(run_script, tiny_model, pairs_file, tmp_path):
    """Trains into a fresh folder and returns it; more flags as wished."""

    def run(*flags, folder="run", data=pairs_file) -> Path:
        paths = ("--model_name_or_path", tiny_model, "--dataset_name", data, "--output_dir", tmp_path / folder)
        usual = [part for name, value in QUICK.items() if name not in flags for part in (name, value)]
        code, out, err = run_script(*paths, *usual, *flags)
        assert code == 0, out + err
        return tmp_path / folder

    return run


def read_pairs(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "held_out_pairs.jsonl").read_text().splitlines()]


def measure(policy, reference, tokenizer, prompt: str, completion: str) -> dict[str, float]:
    """What plain models say of one completion: sums over its tokens, in nats."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([[*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]])
    with torch.no_grad():
        own, other = (model(ids).logits[0, start - 1 : -1].double().log_softmax(-1) for model in (policy, reference))
    labels = ids[0, start:, None]
    return {
        "logps": own.gather(1, labels).sum().item(),
        "ref_logps": other.gather(1, labels).sum().item(),
        "kl": (own.exp() * (own - other)).sum().item(),
        "tokens": len(labels),
        "end_prob": own[-1, tokenizer.eos_token_id].exp().item(),
    }


@pytest.mark.parametrize("way", WAYS)
def test_each_pair_is_what_plain_models_say(way, train, tiny_model):
    folder = train(*WAYS[way])
    reference = AutoModelForCausalLM.from_pretrained(tiny_model)
    if "--use_lora" in WAYS[way]:
        policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder).eval()
    else:
        policy = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer, pairs = AutoTokenizer.from_pretrained(folder), make_pairs(60)
    rows = read_pairs(folder)
    assert len(rows) == read_record(folder)["data"]["held_out_pairs"] > 8
    for row in rows:
        pair = pairs[row["row"]]
        for side in ("chosen", "rejected"):
            found = measure(policy, reference, tokenizer, pair["prompt"], pair[side])
            for name in ("logps", "kl", "tokens"):
                assert row[f"{side}_{name}"] == pytest.approx(found[name], abs=2e-4), (side, name)
            assert row[f"ref_{side}_logps"] == pytest.approx(found["ref_logps"], abs=2e-4)
            assert row[f"{side}_reward"] == pytest.approx(0.1 * (found["logps"] - found["ref_logps"]), abs=5e-5)
            assert row[f"{side}_ends"] == 1
            if side == "chosen":
                assert row["chosen_end_prob"] == pytest.approx(found["end_prob"], abs=1e-5)
    assert sum(row["chosen_kl"] for row in rows) > 0.1, "the policy has moved"


def test_every_mean_can_be_recomputed_from_the_file(train):
    folder = train("--use_lora")
    rows, record = read_pairs(folder), read_record(folder)["metrics"]
    logged = [line for line in read_metrics(folder) if "held_out_loss" in line]
    counts = {"pairs": len(rows), "kl_pairs": len(rows)}
    names = set(rows[0]) - {"id", "row", "place", "ref_chosen_logps", "ref_rejected_logps"}
    assert set(record["held_out"]) == names | set(counts)
    for name in names:
        mean = sum(row[name] for row in rows) / len(rows)
        assert record["held_out"][name] == pytest.approx(mean, abs=1e-12)
        assert logged[-1][f"held_out_{name}"] == record["held_out"][name]
        assert logged[0][f"held_out_{name}"] == record["held_out_before"][name]
    assert all(record["held_out"][name] == count for name, count in counts.items())
    assert record["held_out_before"]["chosen_kl"] == record["held_out_before"]["rejected_kl"] == 0


def test_the_batches_of_an_evaluation_change_nothing(train, tmp_path):
    draw = random.Random(3)
    pairs = [{**pair, "chosen": pair["chosen"] * draw.randint(1, 4)} for pair in make_pairs(40)]
    data = write_lines(tmp_path / "ragged.jsonl", pairs)
    found = [
        (read_record(folder)["metrics"]["held_out"], read_pairs(folder))
        for size in (1, 3, 8)
        for folder in [train("--use_lora", "--per_device_eval_batch_size", size, folder=str(size), data=data)]
    ]
    for metrics, rows in found[1:]:
        assert metrics == pytest.approx(found[0][0], rel=1e-4, abs=1e-5)
        for row, other in zip(rows, found[0][1], strict=True):
            assert (row.pop("id"), row.pop("place")) == (other["id"], other["place"])
            assert row == pytest.approx({name: other[name] for name in row}, rel=1e-4, abs=1e-4)


def test_a_reference_too_large_to_keep_is_kept_for_some_batches(train, monkeypatch):
    flags = ("--precompute_ref_log_probs", "--per_device_eval_batch_size", 1)
    whole = read_pairs(train(*flags, folder="whole"))
    monkeypatch.setattr("utils.training.reference.KEPT_BYTES", 4 * 32 * 120)
    folder = train(*flags, folder="some")
    some, metrics = read_pairs(folder), read_record(folder)["metrics"]["held_out"]
    compared = [row for row in some if "chosen_kl" in row]
    assert 2 <= len(compared) < len(some) == metrics["pairs"]
    assert metrics["kl_pairs"] == len(compared)
    by_row = {row["row"]: row for row in whole}
    for row in compared:
        assert row["chosen_kl"] == pytest.approx(by_row[row["row"]]["chosen_kl"], abs=1e-6)
    assert metrics["chosen_kl"] == pytest.approx(sum(row["chosen_kl"] for row in compared) / len(compared))


def test_a_completion_that_was_cut_counts_as_one_without_an_end(train, tmp_path):
    pairs = [{**pair, "chosen": pair["chosen"] * (20 if index % 2 else 1)} for index, pair in enumerate(make_pairs(40))]
    folder = train("--use_lora", "--max_length", 48, data=write_lines(tmp_path / "long.jsonl", pairs))
    rows, metrics = read_pairs(folder), read_record(folder)["metrics"]["held_out"]
    cut = [row for row in rows if row["row"] % 2]
    assert 0 < len(cut) < len(rows)
    assert all(row["chosen_ends"] == 0 and row["chosen_end_prob"] is None for row in cut)
    ended = [row["chosen_end_prob"] for row in rows if not row["row"] % 2]
    assert metrics["chosen_end_prob"] == pytest.approx(sum(ended) / len(ended))
    assert metrics["chosen_ends"] == pytest.approx(len(ended) / len(rows))
    assert metrics["rejected_ends"] == 1


@pytest.mark.parametrize("engine", ["shared_prefix", "padded"])
def test_an_evaluation_holds_one_batch_at_a_time(train, tmp_path, monkeypatch, engine):
    """Stock TRL's grows with the data set: it keeps what each batch gave until the end."""
    held: list[int] = []
    batches: list[int] = []
    plain = PairTask._score_batch

    def counted(self, *arguments):
        if len(batches) % 10 == 0:
            gc.collect()
            held.append(sum(item.nbytes for item in gc.get_objects() if type(item) is torch.Tensor))
        batches.append(len(arguments[-1]))
        return plain(self, *arguments)

    monkeypatch.setattr(PairTask, "_score_batch", counted)
    data = write_lines(tmp_path / "many.jsonl", make_pairs(150))
    folder = train("--use_lora", "--engine", engine, "--validation_split", 0.8, "--per_device_eval_batch_size", 4,
                   "--max_steps", 1, data=data)  # fmt: skip
    assert sum(batches) == 2 * read_record(folder)["data"]["held_out_pairs"]  # before and after training
    before = held[: len(held) // 2]
    assert len(before) >= 3
    assert max(before) - min(before) < 4096


@pytest.mark.parametrize(("nats", "perplexity"), [(2.0, 7.38905609893065), (750.0, 1e30), (1e6, 1e30)])
def test_perplexity_of_any_loss_is_a_number(nats, perplexity):
    found = summarise([{"tokens": 4.0, "logps": -4 * nats, "right": 1.0}])
    assert found["loss"] == nats
    assert found["perplexity"] == pytest.approx(perplexity)
