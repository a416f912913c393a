"""How long `data` takes for many pairs and in how much memory, and tokenizing beside stock TRL's preparation.

    python benchmarks/data.py                    a million short pairs; 20,000 for tokenizing
    python benchmarks/data.py --quick            20,000 and 2,000: about half a minute
    python benchmarks/data.py --parts checks     one part alone

The checks run as the real command in a process of its own, with an empty cache; memory is what all of its processes
hold together (proportional set size where the system tells it), sampled four times a second. The two ways of
tokenizing take turns, each with one process and nothing cached. Prints a table and writes it to runs/bench/data.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
SEED = 11
ROUNDS = 3
SYLLABLES = re.findall("..", "bacedifogulamenirosutavewixoyazeshatriplokenmarsoldenpikuhe")


def main() -> None:
    """Measures each part, prints the figures and writes them."""
    options = parse_arguments()
    results: dict[str, Any] = {"machine": describe_machine()}
    print(results["machine"], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ |= {
            "HF_DATASETS_CACHE": str(work / "cache"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "true",
        }
        if "checks" in options.parts:
            results["checks"] = measure_checks(work, options.pairs)
            print(describe_checks(results["checks"]), flush=True)
        if "tokenizing" in options.parts:
            results["tokenizing"] = [
                measure_tokenizing(work, options.tokenized, kind) for kind in ("texts", "messages")
            ]
            for result in results["tokenizing"]:
                print(describe_tokenizing(result), flush=True)
    path = options.output_dir / "data.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20,000 pairs, and 2,000 for tokenizing")
    parser.add_argument("--pairs", type=int, help="pairs that are checked (default: 1,000,000)")
    parser.add_argument("--tokenized", type=int, help="pairs that are tokenized (default: 20,000)")
    parser.add_argument("--parts", nargs="+", choices=("checks", "tokenizing"), default=("checks", "tokenizing"))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/bench"), help="where the results go")
    options = parser.parse_args()
    options.pairs = options.pairs or (20_000 if options.quick else 1_000_000)
    options.tokenized = options.tokenized or (2_000 if options.quick else 20_000)
    return options


def describe_machine() -> str:
    """Cores and memory, as a phrase."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory().total / 2**30
    return f"{platform.machine()}, {cores} cores, {memory:.0f} GiB, Python {platform.python_version()}"


def make_pairs(count: int) -> Iterator[dict[str, str]]:
    """Pairs of made-up words whose frequencies fall as those of real words do: about 30, 25 and 30 of them."""
    draw = random.Random(SEED)
    words = list(dict.fromkeys("".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(20_000)))
    weights = [1 / (rank + 3) for rank in range(len(words))]
    pool = draw.choices(words, weights, k=4_000_000)

    def say(mean: int) -> str:
        length = max(2, int(draw.gauss(mean, mean / 3)))
        start = draw.randrange(len(pool) - length)
        return " ".join(pool[start : start + length]).capitalize() + "."

    for _ in range(count):
        yield {"prompt": say(30), "chosen": " " + say(25), "rejected": " " + say(30)}


def write_pairs(path: Path, count: int) -> None:
    """The pairs as JSON lines, with a few copies so that there is something to find."""
    with open(path, "w", encoding="utf-8") as file:
        for number, pair in enumerate(make_pairs(count)):
            line = json.dumps(pair) + "\n"
            file.write(line * (2 if number % 10_000 == 0 else 1))


def measure_checks(work: Path, count: int) -> dict[str, Any]:
    """The command `data` over that many pairs, with page, JSON and clean pairs written."""
    path = work / "pairs.jsonl"
    write_pairs(path, count)
    command = [sys.executable, "advanced_dpo_script.py", "data", "--dataset_name", str(path)]
    command += ["--report_file", str(work / "page.html"), "--json_file", str(work / "numbers.json")]
    command += ["--output_file", str(work / "clean.jsonl")]
    started = time.monotonic()
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    peak = 0
    while child.poll() is None:
        peak = max(peak, memory_of_tree(child.pid))
        time.sleep(0.25)
    seconds = time.monotonic() - started
    if child.returncode != 3:  # the copies are to be found
        raise SystemExit(f"data ended with exit code {child.returncode}")
    numbers = json.loads((work / "numbers.json").read_text(encoding="utf-8"))
    found = {finding["name"]: finding["count"] for finding in numbers["findings"]}
    return {
        "pairs": count,
        "file_mib": round(path.stat().st_size / 2**20),
        "seconds": round(seconds, 1),
        "peak_gib": round(peak / 2**30, 2),
        "findings": found,
    }


def memory_of_tree(pid: int) -> int:
    """Bytes that a process and its children hold, what they share counted once where the system tells."""
    total = 0
    try:
        for process in [parent := psutil.Process(pid), *parent.children(recursive=True)]:
            info = process.memory_full_info()
            total += getattr(info, "pss", info.rss)
    except psutil.Error:
        pass
    return total


def describe_checks(result: dict[str, Any]) -> str:
    """One line."""
    return (
        f"data: {result['pairs']:,} pairs ({result['file_mib']} MiB) in {result['seconds']} s, "
        f"at most {result['peak_gib']} GiB"
    )


def measure_tokenizing(work: Path, count: int, kind: str) -> dict[str, Any]:
    """Seconds of both sides for the same rows, in turns; the least of ROUNDS counts."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    sys.path.insert(0, str(ROOT))
    from utils.data.encoding import PromptEncoder
    from utils.data.tokenizing import PAIR_COLUMNS, tokenize_rows
    from utils.models.templates import set_chat_template

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer = make_tokenizer()
    if kind == "messages":
        set_chat_template(tokenizer, None, transcript=False)
    rows = datasets.Dataset.from_list([as_messages(pair) if kind == "messages" else pair for pair in make_pairs(count)])
    numbered = rows.add_column("row", list(range(len(rows))))
    stock = object.__new__(DPOTrainer)
    stock._tokenizer = tokenizer
    config = DPOConfig(output_dir=str(work), max_length=1024, bf16=False)
    ways = {
        "ours": lambda: tokenize_rows(numbered, PromptEncoder(tokenizer), PAIR_COLUMNS, 1024, "shorten_prompt"),
        "stock": lambda: stock._prepare_dataset(rows, tokenizer, config, "train"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, prepare in ways.items():
            started = time.monotonic()
            prepare()
            seconds[name].append(round(time.monotonic() - started, 2))
    return {"rows": count, "kind": kind, **seconds, "ratio": round(min(seconds["stock"]) / min(seconds["ours"]), 2)}


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 16,000 tokens, trained on the words of the pairs."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = (" ".join(pair.values()) for pair in make_pairs(5_000))
    bpe.train_from_iterator(texts, vocab_size=16_000, special_tokens=["<s>", "</s>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def as_messages(pair: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """The same pair as message lists."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": roles[name], "content": text}] for name, text in pair.items()}


def describe_tokenizing(result: dict[str, Any]) -> str:
    """One line."""
    ours, stock = min(result["ours"]), min(result["stock"])
    return (
        f"tokenizing: {result['rows']:,} rows of {result['kind']}: stock {stock} s, here {ours} s, {result['ratio']}x"
    )


if __name__ == "__main__":
    main()
