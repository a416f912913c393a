"""How evenly the tokens of a step fall on processes: pairs handed out in turn, and shared out by tokens.

    python benchmarks/balance.py
    python benchmarks/balance.py --model_name_or_path gpt2 --dataset_name ./pairs.jsonl

Without flags the lengths are those of real pairs, as in `lengths.json`, drawn again and again. Nothing is computed with
a model. The waiting that is counted: every process waits for the one with the most tokens, under DDP once per optimizer
step, under FSDP in each micro-batch.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from utils.training.shares import share_out  # noqa: E402

SHAPES = [(2, 4, 1), (8, 4, 1), (8, 8, 1), (8, 1, 8), (8, 2, 4), (16, 4, 2), (64, 4, 1), (64, 8, 1)]
STEPS = 200


def read_lengths(arguments: argparse.Namespace) -> dict[str, list[int]]:
    """Name -> tokens of each pair."""
    if arguments.dataset_name is None:
        table = json.loads((HERE / "lengths.json").read_text(encoding="utf-8"))
        return {name: [sum(parts) for parts in rows] for name, rows in table.items() if name != "source"}
    from transformers import AutoTokenizer

    from utils.data.encoding import PromptEncoder
    from utils.data.loading import load_pairs
    from utils.data.tokenizing import PAIR_COLUMNS, tokenize_rows
    from utils.settings.training import DataSettings

    wishes = DataSettings(dataset_name=arguments.dataset_name, validation_split="none", on_bad_rows="skip")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    pairs = load_pairs(wishes, "train", seed=0).train
    rows, _ = tokenize_rows(pairs, PromptEncoder(tokenizer), PAIR_COLUMNS, 1024, "shorten_prompt")
    names = ("prompt_ids", *PAIR_COLUMNS)
    return {arguments.dataset_name: [sum(map(len, ids)) for ids in zip(*(rows[name] for name in names), strict=True)]}


def in_turn(pairs: int, processes: int, most: int) -> list[list[list[int]]]:
    """Pairs handed out in the order of the data, as a plain sampler does; by micro-batch and process."""
    batches = [list(range(begin, begin + most)) for begin in range(0, pairs, most)]
    return [batches[begin : begin + processes] for begin in range(0, len(batches), processes)]


def measure_waiting(shares: list[list[list[int]]], sizes: list[int]) -> tuple[float, float]:
    """The most tokens of a process over the mean: of the whole step, and where each micro-batch is waited for."""
    tokens = [[sum(sizes[at] for at in batch) for batch in slot] for slot in shares]
    mean = sum(map(sum, tokens)) / len(tokens[0])
    return max(map(sum, zip(*tokens, strict=True))) / mean, sum(map(max, tokens)) / mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="gpt2", help="whose tokenizer counts")
    parser.add_argument("--dataset_name", help="pairs whose lengths are taken")
    draw = random.Random(0)
    print("| lengths | processes x pairs x micro-batches | DDP in turn | DDP shared | FSDP in turn | FSDP shared |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, lengths in read_lengths(parser.parse_args()).items():
        for processes, most, slots in SHAPES:
            rows = []
            for _ in range(STEPS):
                sizes = draw.choices(lengths, k=processes * most * slots)
                before = measure_waiting(in_turn(len(sizes), processes, most), sizes)
                after = measure_waiting(share_out(sizes, processes, slots, most), sizes)
                rows.append((before[0], after[0], before[1], after[1]))
            means = " | ".join(f"{statistics.mean(column):.2f}" for column in zip(*rows, strict=True))
            print(f"| {name} | {processes} x {most} x {slots} | {means} |")


if __name__ == "__main__":
    main()
