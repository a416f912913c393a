"""One side of a comparison: trains by stock TRL or by this project, one step whenever it is told to.

    python benchmarks/worker.py stock|ours CASE.json

Started by `run.py`, which writes `go` to its standard input. Answers are lines of JSON behind the word ANSWER.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = "ANSWER "


def answer(**values: Any) -> None:
    """Tells the parent."""
    print(MARK + json.dumps(values), flush=True)


def main() -> None:
    """Runs the side that the command line names, and says at its end what it saw."""
    side, case = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import TrainerCallback
    from transformers import trainer as transformers_trainer

    losses: list[float] = []
    ahead: list[float] = []  # seconds in which the reference was scored before training

    class OneStepATurn(TrainerCallback):
        """Waits after every step; what it times reaches from the word to go to the end of the next step."""

        since = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            answer(step=state.global_step, seconds=time.perf_counter() - self.since)
            sys.stdin.readline()
            self.since = time.perf_counter()

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in (logs or {}):
                losses.append(logs["loss"])

    if side == "stock":
        from trl import DPOTrainer as trainer

        name = "_precompute_ref_logps"
    else:
        from utils.training.trainer import PreferenceTrainer as trainer

        name = "score_reference_ahead"
    setattr(trainer, name, timed(getattr(trainer, name), ahead))
    # Every Trainer gets these, TRL's as well as ours: neither side is changed.
    transformers_trainer.DEFAULT_CALLBACKS.append(OneStepATurn)
    {"stock": train_stock, "ours": train_ours}[side](case)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    answer(losses=losses, peak_memory_bytes=peak, seconds_of_reference=sum(ahead))


def timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The same call, whose seconds are noted."""

    def timing(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - begin)

    return timing


def train_stock(case: dict[str, Any]) -> None:
    """As TRL's documentation shows it."""
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import AutoTokenizer, set_seed
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    set_seed(case["seed"])
    adapter = LoraConfig(r=case["lora_r"], lora_alpha=2 * case["lora_r"], target_modules="all-linear")
    trainer = DPOTrainer(
        model=case["model"],
        args=DPOConfig(
            output_dir=case["output_dir"] + "-stock",
            max_steps=case["steps"] if case["epochs"] == 1 else -1,
            num_train_epochs=case["epochs"],
            precompute_ref_log_probs=case["both_ahead"],
            precompute_ref_batch_size=case["batch"],
            per_device_train_batch_size=case["batch"],
            learning_rate=case["learning_rate"],
            gradient_checkpointing=case["checkpointing"],
            torch_compile=case["compiled"],
            max_length=case["max_length"],
            bf16=case["dtype"] == "bfloat16",
            fp16=case["dtype"] == "float16",
            use_cpu=not torch.cuda.is_available(),
            seed=case["seed"],
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=datasets.load_dataset("json", data_files=case["data"], split="train"),
        processing_class=AutoTokenizer.from_pretrained(case["model"]),
        peft_config=adapter if case["lora"] else None,
    )
    trainer.train()


def train_ours(case: dict[str, Any]) -> None:
    """The script, from its command line on."""
    import advanced_dpo_script

    flags = {
        "model_name_or_path": case["model"],
        "dataset_name": case["data"],
        "output_dir": case["output_dir"] + "-ours",
        "overwrite_output_dir": "true",
        "validation_split": "none",
        "max_steps": case["steps"] if case["epochs"] == 1 else -1,
        "num_train_epochs": case["epochs"],
        "per_device_train_batch_size": case["batch"],
        "learning_rate": case["learning_rate"],
        "warmup_steps": 0,
        "gradient_checkpointing": str(case["checkpointing"]).lower(),
        "max_length": case["max_length"],
        "dtype": case["dtype"],
        "seed": case["seed"],
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    if case["epochs"] == 1:
        flags["precompute_ref_log_probs"] = "false"  # the reference counts in both sides' steps
    if case["compiled"]:
        flags["torch_compile"] = "true"
    if case["lora"]:
        flags |= {"use_lora": "true", "lora_r": case["lora_r"], "lora_alpha": 2 * case["lora_r"]}
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    code = advanced_dpo_script.main([*argv, *case["more_flags"]])
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
