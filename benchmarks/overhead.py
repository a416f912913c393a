"""What a step costs beside its arithmetic: a model of many narrow layers, trained by stock TRL and by this project.

    python benchmarks/overhead.py

On a fast GPU a step of a small batch takes as long as Python and the libraries need to launch it. The same is seen
without a GPU when there is next to nothing to compute: a Llama of 16 layers, 64 wide, 8 pairs of 14 tokens, LoRA on all
linear layers, the reference in every step, one thread. Both sides take steps in turn, as in `run.py`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import run
from transformers.utils import logging

NARROW = {
    "hidden_size": 64, "num_hidden_layers": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 10_010, "tie_word_embeddings": True,
}  # fmt: skip
PAIR = (6, 4, 4)  # tokens of prompt, chosen and rejected


def main() -> None:
    """Measures with and without checkpointing, and prints milliseconds a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="steps that are counted")
    parser.add_argument("--torch_compile", action="store_true", help="compile the layers on this project's side")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the sides
    logging.disable_progress_bar()
    run.SHAPES["narrow"], run.LENGTHS["narrow"] = NARROW, [PAIR]
    print(run.describe_machine())
    print("| LoRA on all layers, bfloat16 | stock, ms a step | ours | ratio |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run.save_model(work / "model", "narrow")
        for checkpointing in (False, True):
            case = run.Case(lengths="narrow", checkpointing=checkpointing)
            flags = ["--torch_compile"] if options.torch_compile else []
            result = run.compare(case, "bfloat16", work, options.steps, flags, rate=1.0)
            stock, ours = (1000 * statistics.median(result[name]["seconds"]) for name in ("stock", "ours"))
            title = ("" if checkpointing else "no ") + "checkpointing" + (", ours compiled" if flags else "")
            print(f"| {title} | {stock:.0f} | {ours:.0f} | {stock / ours:.1f}x |", flush=True)


if __name__ == "__main__":
    main()
