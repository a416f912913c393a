"""Stock TRL and this project side by side: same model, pairs, order and settings, a step in turn.

    make bench                                   every case
    python benchmarks/run.py --quick             one case, about two minutes
    python benchmarks/run.py --cases full --steps 5

Both sides are processes that live at the same time and take steps alternately, each alone on the machine while it
computes, so that a slow minute of the machine falls on both. The first two steps of each are not counted. Prints a
table and writes it, with every measured step, to runs/bench/.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from worker import MARK

HERE = Path(__file__).resolve().parent
SEED = 7
LENGTHS = json.loads((HERE / "lengths.json").read_text(encoding="utf-8"))

SHAPES = {
    "31M": {
        "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
        "intermediate_size": 1376, "vocab_size": 16000, "tie_word_embeddings": True,
    },
    "1.2B": {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is compared. `lengths` names the distribution of lengths, `max_length` the longest text.

    With one epoch both sides score the reference in every step; with more, as each does by default, or with
    `both_ahead` once before training on both sides.
    """

    lengths: str = "dialogue"
    batch: int = 8
    max_length: int = 512
    lora: bool = True
    checkpointing: bool = False
    compiled: bool = False
    epochs: int = 1
    both_ahead: bool = False

    def title(self, dtype: str) -> str:
        """The case in words."""
        kind = "LoRA r16" if self.lora else "full"
        more = (", checkpointing" if self.checkpointing else "") + (", torch_compile" if self.compiled else "")
        if self.epochs > 1:
            more += f", {self.epochs} epochs{', reference ahead on both sides' if self.both_ahead else ''}"
        return f"{self.lengths}, batch {self.batch}, {kind}, {dtype}{more}"


CASES = {
    "lora": Case(),
    "checkpointing": Case(checkpointing=True),
    "full": Case(lora=False),
    "instructions": Case(lengths="instructions", batch=4, max_length=1024),
    "compiled": Case(compiled=True),
    "batch2": Case(batch=2),
    "batch32": Case(batch=32),
    "epochs": Case(epochs=3),
    "epochs_ahead": Case(epochs=3, both_ahead=True),
}
# Those that are run where none are named, what matters most first. On a GPU small batches measure Python alone
# (overhead.py), and scoring ahead is mostly reading and hashing weights.
USUAL = {
    "cpu": ["lora", "checkpointing", "full", "instructions", "batch2", "epochs", "epochs_ahead"],
    "cuda": ["lora", "instructions", "checkpointing", "batch32", "full", "batch2", "compiled"],
}
LORA_R = 16
WARM_UP = 2  # steps of each side that are not counted


def main() -> None:
    """Measures each case, prints the table and writes it."""
    options = parse_arguments()
    dtype = options.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    shape = options.model or ("1.2B" if torch.cuda.is_available() else "31M")
    rate = measure_product_rate(dtype)
    print(f"{describe_machine()}; matrix products in {dtype}: {rate / 1e12:.3g} TFLOP/s\n")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        save_model(work / "model", shape)
        for name in options.cases:
            case = CASES[name]
            print(f"{case.title(dtype)} ...", flush=True)
            results.append(compare(case, dtype, work, options.steps, options.flags, rate) | {"model": shape})
            print(describe(results[-1]) + "\n", flush=True)
            write_results(options.output_dir, results)
    print(make_table(results))
    print(f"\nwritten to {options.output_dir}/table.md and results.json")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first case alone, with fewer steps")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="which to run (default: the usual ones)")
    parser.add_argument("--steps", type=int, help="steps that are counted (default: 4, with --quick 2)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--model", choices=SHAPES, help="default: 1.2B on a GPU, else 31M")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/bench"), help="where the results go")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags for this project's side")
    options = parser.parse_args()
    options.cases = options.cases or USUAL["cuda" if torch.cuda.is_available() else "cpu"]
    if options.quick:
        options.cases = options.cases[:1]
    options.steps = options.steps or (2 if options.quick else 4)
    return options


def compare(case: Case, dtype: str, work: Path, steps: int, more_flags: list[str], rate: float) -> dict[str, Any]:
    """Both sides of a case, step by step in turn."""
    pairs = choose_lengths(case, (WARM_UP + steps) * case.batch)
    if case.epochs > 1:  # of the pairs that are counted in one
        pairs = pairs[WARM_UP * case.batch :]
        steps = steps * case.epochs - WARM_UP
    write_pairs(work / "pairs.jsonl", pairs)
    settings = {
        "model": str(work / "model"),
        "data": str(work / "pairs.jsonl"),
        "output_dir": str(work / "run"),
        "steps": WARM_UP + steps,
        "batch": case.batch,
        "learning_rate": 1e-4,
        "max_length": case.max_length,
        "dtype": dtype,
        "lora": case.lora,
        "lora_r": LORA_R,
        "checkpointing": case.checkpointing,
        "compiled": case.compiled,
        "epochs": case.epochs,
        "both_ahead": case.both_ahead,
        "seed": SEED,
        "more_flags": more_flags,
    }
    shutil.rmtree(work / "cache", ignore_errors=True)  # no reference of a case before
    (work / "case.json").write_text(json.dumps(settings), encoding="utf-8")
    sides = {}
    for name in ("stock", "ours"):
        sides[name] = Side(name, work / "case.json")
        sides[name].step()  # alone: the other side does not begin before this first step has ended
    for _ in range(WARM_UP - 1):
        for side in sides.values():
            side.go()
            side.step()
    seconds: dict[str, list[float]] = {"stock": [], "ours": []}
    for _ in range(steps):
        for name, side in sides.items():
            side.go()
            seconds[name].append(side.step())
    ends = {name: side.finish() for name, side in sides.items()}
    counted = (pairs * case.epochs)[WARM_UP * case.batch :]  # both sides take the pairs in order
    tokens, flops = sum(map(sum, counted)), useful_flops(counted, work / "model", case.lora, case.epochs)
    result: dict[str, Any] = {"case": case.title(dtype)}
    for name in sides:
        ahead = ends[name]["seconds_of_reference"] * steps / (steps + WARM_UP)  # the share of the counted steps
        total = sum(seconds[name]) + ahead
        result[name] = {
            "seconds": seconds[name],
            "pairs_per_second": len(counted) / total,
            "useful_tokens_per_second": tokens / total,
            "share_of_product_rate": flops / total / rate,
            **ends[name],
        }
    stock, ours = result["stock"], result["ours"]
    result["speed_ratio"] = ours["pairs_per_second"] / stock["pairs_per_second"]
    result["memory_ratio"] = ours["peak_memory_bytes"] / stock["peak_memory_bytes"]
    result["largest_loss_difference"] = max(abs(a - b) for a, b in zip(stock["losses"], ours["losses"], strict=True))
    return result


class Side:
    """A worker process that trains one step a turn."""

    def __init__(self, name: str, case: Path):
        self.name = name
        self.log = case.with_name(f"{name}.log")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), name, str(case)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            env=os.environ | {"HF_DATASETS_CACHE": str(case.with_name("cache"))},
        )

    def go(self) -> None:
        """Lets it take its next step."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def step(self) -> float:
        """Seconds of the step that it reports next."""
        return self._read()["seconds"]

    def finish(self) -> dict[str, Any]:
        """Its losses and peak memory, at its end."""
        self.go()
        values = self._read()
        self.process.wait()
        return values

    def _read(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        sys.exit(f"the side {self.name} ended early:\n{self.log.read_text()[-3000:]}")


def choose_lengths(case: Case, count: int) -> list[tuple[int, int, int]]:
    """Lengths of prompt, chosen and rejected of the first pairs that fit `max_length`: neither side then cuts any."""
    fitting = [
        tuple(pair) for pair in LENGTHS[case.lengths] if pair[0] + max(pair[1:]) <= case.max_length and min(pair) > 1
    ]
    return [fitting[index % len(fitting)] for index in range(count)]


def write_pairs(path: Path, lengths: list[tuple[int, int, int]]) -> None:
    """Random words, one token each; each completion leaves room for the end-of-text token that both sides add."""
    draw = random.Random(SEED)

    def text(words: int) -> str:
        return " ".join(f"w{draw.randrange(10_000)}" for _ in range(words))

    rows = [
        {"prompt": text(prompt), "chosen": " " + text(chosen - 1), "rejected": " " + text(rejected - 1)}
        for prompt, chosen, rejected in lengths
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save_model(folder: Path, shape: str) -> None:
    """A Llama with random weights, and a tokenizer that makes one token of each word."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i + 4 for i in range(config.vocab_size - 4)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=2048
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(SEED)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # does nothing where there is no GPU


def useful_flops(pairs: list[tuple[int, int, int]], model: Path, lora: bool, epochs: int = 1) -> float:
    """Floating-point operations that training on these pairs needs at least: each prompt once, no padding.

    A forward pass takes two for each weight and token, a backward pass as many for the activations and, in full
    fine-tuning, as many again for the weights. The policy passes forward and backward, the reference forward, once in
    all epochs. The output head is applied to completion tokens only, and so are the queries, the output projection and
    the MLP of the last layer; attention is counted over the causal half. Adapters, norms and activation functions are
    left out.
    """
    config = AutoConfig.from_pretrained(model)
    width = config.hidden_size // config.num_attention_heads
    keys_and_values = 2 * config.hidden_size * width * config.num_key_value_heads
    others_of_layer = 2 * config.hidden_size * width * config.num_attention_heads
    others_of_layer += 3 * config.hidden_size * config.intermediate_size
    layer = keys_and_values + others_of_layer
    head = config.vocab_size * config.hidden_size
    weights = others = 0.0
    for prompt, chosen, rejected in pairs:
        tokens, completion = prompt + chosen + rejected, chosen + rejected
        seen = sum((prompt + end) ** 2 / 2 for end in (chosen, rejected)) - prompt**2 / 2
        weights += 2 * (layer * config.num_hidden_layers * tokens - others_of_layer * prompt + head * completion)
        others += 4 * seen * config.hidden_size * config.num_hidden_layers
    # policy forward + reference forward + backward (activations: 1, or for attention 2; weights: 1)
    return weights * ((2 if lora else 3) + 1 / epochs) + others * (3 + 1 / epochs)


def measure_product_rate(dtype: str) -> float:
    """Operations per second of large matrix products here, the best of several."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    best = 0.0
    for _ in range(8):
        begin = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def describe_machine() -> str:
    """The device that computes, and the libraries."""
    import transformers
    import trl

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{device}; torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"


def describe(result: dict[str, Any]) -> str:
    """The result of a case in two lines."""
    lines = [
        f"  {name:<6}{side['pairs_per_second']:8.2f} pairs/s {side['useful_tokens_per_second']:8.0f} useful tokens/s  "
        f"peak {side['peak_memory_bytes'] / 2**30:5.2f} GiB  loss {' '.join(f'{x:.6f}' for x in side['losses'])}"
        for name, side in ((name, result[name]) for name in ("stock", "ours"))
    ]
    return "\n".join(lines)


def make_table(results: list[dict[str, Any]]) -> str:
    """All cases as a Markdown table."""
    rows = [
        "| case | stock pairs/s | ours | ratio | stock peak GiB | ours | ratio | largest loss difference "
        "| share of matrix rate (stock, ours) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        stock, ours = result["stock"], result["ours"]
        rows.append(
            f"| {result['model']}, {result['case']} | {stock['pairs_per_second']:.2f} | "
            f"{ours['pairs_per_second']:.2f} | **{result['speed_ratio']:.1f}x** | "
            f"{stock['peak_memory_bytes'] / 2**30:.2f} | {ours['peak_memory_bytes'] / 2**30:.2f} | "
            f"**{result['memory_ratio']:.2f}x** | {result['largest_loss_difference']:.1e} | "
            f"{stock['share_of_product_rate']:.0%}, {ours['share_of_product_rate']:.0%} |"
        )
    return "\n".join(rows)


def write_results(folder: Path, results: list[dict[str, Any]]) -> None:
    """The table and every measured step, as far as cases are through."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(f"{describe_machine()}\n\n{make_table(results)}\n", encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
