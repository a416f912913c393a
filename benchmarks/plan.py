"""Plans beside runs: what `plan` says that a run holds at its peak, and what the run held.

    python benchmarks/plan.py                    3M, 31M and 98M parameters (half an hour on two cores)
    python benchmarks/plan.py --models 0.5B --dtypes bfloat16 --ways LoRA "full, checkpointing"
    python benchmarks/plan.py --table            what fits where, models of 0.5B to 70B on paper (plan_table.py)

Random Llamas and pairs with lengths of real ones: those of one micro-batch, which is trained on three times, so that
the longest pairs meet, as a plan assumes. Each case is planned and trained by the same flags; the run's peak is that of
its run.json. Prints a table and writes it, with every figure, to runs/bench/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from run import HERE, LENGTHS, SHAPES, Case, choose_lengths, save_model, write_pairs

SCRIPT = HERE.parent / "advanced_dpo_script.py"
GIB = 2**30
SHAPES["3M"] = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 344, "vocab_size": 16000, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES["98M"] = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
    "intermediate_size": 2048, "vocab_size": 32000, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES["0.5B"] = {  # that of Qwen2 0.5B
    "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
STEPS = 3
WAYS = {
    "LoRA": ["--use_lora"],
    "LoRA, checkpointing": ["--use_lora", "--gradient_checkpointing"],
    "full": [],
    "full, checkpointing": ["--gradient_checkpointing"],
}


def main() -> None:
    """Measures each case and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["3M", "31M", "98M"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--lengths", choices=LENGTHS, default="dialogue", help="those of real pairs")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a micro-batch")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/bench"), help="where the results go")
    parser.add_argument("--table", action="store_true", help="what fits where, on paper; nothing is trained")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if options.table:
        write_table(options.output_dir / "plan_table.md")
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        case = Case(lengths=options.lengths, max_length=1024 if options.lengths == "instructions" else 512)
        write_pairs(work / "pairs.jsonl", choose_lengths(case, options.batch))
        for model, way, dtype in product(options.models, options.ways, options.dtypes):
            if not (work / model).exists():
                save_model(work / model, model)
            results.append(measure(work, model, way, dtype, options.batch))
            print(describe(results[-1]), flush=True)
            write_results(results, options.output_dir)


def write_results(results: list[dict[str, Any]], folder: Path) -> None:
    """Every figure, and the table."""
    (folder / "plan.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    table = [
        "| model | training | planned, GiB | measured, GiB | planned / measured |",
        "| --- | --- | --- | --- | --- |",
    ]
    table += [describe(result) for result in results]
    (folder / "plan.md").write_text("\n".join(table) + "\n", encoding="utf-8")


def write_table(path: Path) -> None:
    """What fits where."""
    from plan_table import make_table

    lines = []
    for line in make_table():
        print(line, flush=True)
        lines.append(line)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(work: Path, model: str, way: str, dtype: str, batch: int) -> dict[str, Any]:
    """One case. Bytes."""
    flags = ["--model_name_or_path", work / model, "--dataset_name", work / "pairs.jsonl", "--dtype", dtype]
    flags += ["--per_device_train_batch_size", batch, "--num_train_epochs", STEPS, "--validation_split", "none"]
    flags += WAYS[way]
    call("plan", *flags, "--json_file", work / "plan.json")
    call("train", *flags, "--output_dir", work / "run", "--overwrite_output_dir", "--save_strategy", "no")
    plan = json.loads((work / "plan.json").read_text(encoding="utf-8"))["choices"][0]
    record = json.loads((work / "run" / "run.json").read_text(encoding="utf-8"))
    measured = record["resources"]["peak_memory_bytes"]
    return {
        "model": model,
        "training": f"{way}, {dtype}",
        "plan": plan,
        "planned": plan["bytes"],
        "measured": measured,
    }


def call(*words: Any) -> None:
    """Runs the script; ends this one where it fails."""
    ended = subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{words[0]} failed:\n{ended.stderr[-3000:]}")


def describe(result: dict[str, Any]) -> str:
    """A row of the table."""
    planned, measured = result["planned"], result["measured"]
    return (
        f"| {result['model']} | {result['training']} | {planned / GIB:.2f} | {measured / GIB:.2f} "
        f"| {planned / measured:.2f} |"
    )


if __name__ == "__main__":
    main()
