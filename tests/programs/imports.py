"""Commands in one process, and what each of them imported.

    python tests/programs/imports.py MODEL PAIRS FOLDER

Prints one JSON object: command -> [its exit code, the heavy packages that are imported after it].
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import advanced_dpo
import advanced_dpo_script

assert advanced_dpo.train

HEAVY = (
    *("accelerate", "bitsandbytes", "datasets", "numpy", "pandas", "peft", "scipy", "sklearn", "torch", "transformers"),
    *("torch._inductor.compile_fx", "trl", "wandb", "yaml"),
)


def is_imported(name: str) -> bool:
    return name in sys.modules and type(sys.modules[name]).__name__ != "WaitingModule"


def main() -> None:
    model, pairs, folder = sys.argv[1:]
    occupied = Path(folder) / "occupied"
    occupied.mkdir()
    (occupied / "notes.txt").write_text("mine")
    named = ["--model_name_or_path", model, "--dataset_name", pairs]
    short = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--max_samples", "20", "--report_to", "none"]
    found = {}

    def run(name: str, *words: str) -> None:
        code = None
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as complaints:
            try:
                code = advanced_dpo_script.main(list(words))
            except SystemExit as end:
                code = end.code
        found[name] = code, list(filter(is_imported, HEAVY)), complaints.getvalue()

    run("help", "--help")
    run("a wrong flag", "--lerning_rate", "1")
    run("an occupied folder", *named, "--output_dir", str(occupied))
    run("a folder that is gone", "--model_name_or_path", "./gone", *named[2:], "--output_dir", f"{folder}/new")
    run("no model in the folder", "--model_name_or_path", str(occupied), *named[2:], "--output_dir", f"{folder}/new")
    run("data that is gone", *named[:2], "--dataset_name", "gone.jsonl", "--output_dir", f"{folder}/new")
    run("evaluate what is gone", "evaluate", "./gone")
    run("chat with what is gone", "chat", "./gone")
    run("init", "init", "--situation", "cpu_trial", "--output_file", f"{folder}/config.yaml")
    run("status", "status", folder)
    run("data", "data", pairs)
    run("train", *named, *short, "--output_dir", f"{folder}/run")
    run("report", "report", f"{folder}/run")
    run("train --use_lora", *named, *short, "--use_lora", "--output_dir", f"{folder}/lora")
    import bitsandbytes
    import torch

    weights = torch.linspace(-1, 1, 128)
    stored, state = bitsandbytes.functional.quantize_4bit(weights, quant_type="nf4")
    found["4 bits"] = float((bitsandbytes.functional.dequantize_4bit(stored, state) - weights).abs().max()), [], ""
    print(json.dumps(found))


if __name__ == "__main__":
    main()
