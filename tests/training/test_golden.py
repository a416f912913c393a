"""Golden numbers: the same seed gives the same losses and metrics, whatever was rearranged in the code.

`golden.json` was written by `PYTHONPATH=.:tests python tests/training/test_golden.py`. It is written again only where a
change of the numbers is meant, and then the commit says why. What depends on the libraries' random numbers holds for
the pinned versions.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from shared.models import save_tiny_model
from shared.pairs import make_pairs, write_lines
from shared.runs import read_metrics, read_record

GOLDEN = Path(__file__).with_name("golden.json")
CASES = {
    "lora, sigmoid": ["--use_lora"],
    "lora, padded, accumulated": ["--use_lora", "--engine", "padded", "--per_device_train_batch_size", 2,
                                  "--gradient_accumulation_steps", 2],
    "full, cdpo": ["--loss_type", "cdpo", "--label_smoothing", 0.1],
    "full, ipo": ["--loss_type", "ipo", "--beta", 0.3, "--precompute_ref_log_probs", "false"],
    "lora, dropout, robust and sft": ["--use_lora", "--lora_dropout", 0.1, "--loss_type", "robust", "sft",
                                      "--loss_weights", 1.0, 0.5, "--label_smoothing", 0.1],
    "sft": ["sft"],
}  # fmt: skip
WATCHED = ("loss", "grad_norm", "margin", "accuracy", "chosen_logps", "perplexity")


def run_case(name: str, folder: Path) -> dict[str, list[dict[str, float]] | dict[str, float]]:
    """What a case gives: the watched numbers of every step, and its held-out metrics."""
    import advanced_dpo_script

    data = folder / "data"
    data.mkdir(parents=True)
    pairs = make_pairs(36)
    write_lines(data / "train.jsonl", pairs[:28])
    write_lines(data / "test.jsonl", pairs[28:])
    model = save_tiny_model(folder / "model", seed=1)
    verb, flags = ("sft", []) if name == "sft" else ("train", CASES[name])
    code = advanced_dpo_script.main(
        [str(word) for word in (
            verb, "--model_name_or_path", model, "--dataset_name", data, "--output_dir", folder / "run",
            "--dtype", "float32", "--learning_rate", 5e-3, "--max_steps", 6, "--logging_steps", 1, "--seed", 3,
            *([] if "--per_device_train_batch_size" in flags else ["--per_device_train_batch_size", 4]), *flags,
        )]
    )  # fmt: skip
    assert code == 0
    lines = [line for line in read_metrics(folder / "run") if "loss" in line]
    held_out = read_record(folder / "run")["metrics"]["held_out"]
    return {
        "steps": [{key: line[key] for key in WATCHED if key in line} for line in lines],
        "held_out": {key: value for key, value in held_out.items() if isinstance(value, float)},
    }


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_before(name, tmp_path):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    found = run_case(name, tmp_path)
    assert len(found["steps"]) == len(golden["steps"]) == 6
    for line, expected in zip(found["steps"], golden["steps"], strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=5e-5)
    assert found["held_out"] == pytest.approx(golden["held_out"], rel=1e-4, abs=5e-5)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        content = {name: run_case(name, Path(scratch, str(number))) for number, name in enumerate(CASES)}
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
