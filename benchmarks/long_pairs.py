"""How memory and time grow with the length of a pair: training on one pair of 2,000 to 32,000 tokens a step.

    python benchmarks/long_pairs.py                    lengths 2k to 32k, all weights and LoRA, with checkpointing
    python benchmarks/long_pairs.py --lengths 2048 8192

A Llama of 4 layers and width 64 with random weights, which shows what the length alone costs. Half of each pair is its
prompt, a quarter each response. All weights and LoRA are a process each, which starts the script from its command line
on for each length; the peak is counted from there, and takes in the trials at the start of a run. The second of two
steps is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = (2048, 4096, 8192, 16384, 32768)  # tokens of prompt, chosen and rejected
VOCABULARY = 1024
SHAPE = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
ANSWER = "ANSWER "


def main() -> None:
    """Measures every case and prints a table of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a pair")
    parser.add_argument("--no_checkpointing", action="store_true", help="keep all activations")
    arguments = parser.parse_args()
    columns = [measure(arguments.lengths, lora, not arguments.no_checkpointing) for lora in (False, True)]
    print("| tokens of a pair | all weights: MiB beyond the start | s/step | LoRA: MiB | s/step |")
    print("| --- | --- | --- | --- | --- |")
    for length, *found in zip(arguments.lengths, *columns, strict=True):
        cells = [f"{case['bytes'] / 2**20:.0f} | {case['seconds']:.1f}" for case in found]
        print(f"| {length:,} | {' | '.join(cells)} |")


def measure(lengths: Sequence[int], lora: bool, checkpointing: bool) -> list[dict[str, float]]:
    """Of each length the bytes at the peak beyond the start, and the seconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model")
        flags = {
            "model_name_or_path": f"{folder}/model",
            "validation_split": "none",
            "per_device_train_batch_size": 1,
            "max_steps": 2,
            "engine": "shared_prefix",
            "use_lora": str(lora).lower(),
            "gradient_checkpointing": str(checkpointing).lower(),
            "precompute_ref_log_probs": "false",
            "save_strategy": "no",
        }
        words = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        command = [sys.executable, __file__, "--as_worker", folder, ",".join(map(str, lengths)), *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if done.returncode or len(answers) != len(lengths):
        sys.exit(done.stdout)
    return [json.loads(line.removeprefix(ANSWER)) for line in answers]


def work() -> None:
    """The script with the flags behind --as_worker FOLDER LENGTHS, for one length after the other."""
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import TrainerCallback
    from transformers import trainer as transformers_trainer

    import advanced_dpo_script
    from utils.engine.memory import Peak, release_memory

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.begun = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.begun)

    transformers_trainer.DEFAULT_CALLBACKS.append(Clock)
    folder, lengths, words = Path(sys.argv[2]), sys.argv[3].split(","), sys.argv[4:]
    for length in ["64", *lengths]:  # the first is not counted: libraries are loaded in it
        write_pairs(folder / "pairs.jsonl", int(length))
        files = ["--dataset_name", str(folder / "pairs.jsonl"), "--output_dir", str(folder / f"run{length}")]
        release_memory()
        with Peak(torch.device("cpu")) as peak:
            code = advanced_dpo_script.main([*words, *files, "--max_length", length])
        if code:
            sys.exit(code)
        if length in lengths:
            print(ANSWER + json.dumps({"bytes": peak.bytes, "seconds": seconds[-1]}), flush=True)


def write_pairs(path: Path, length: int) -> None:
    """Four pairs of random words, one token each; each response leaves room for its end-of-text token."""
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(f"w{draw.randrange(VOCABULARY - 4)}" for _ in range(words))

    rows = [
        {"prompt": text(length // 2), "chosen": " " + text(length // 4 - 1), "rejected": " " + text(length // 4 - 1)}
        for _ in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save_model(folder: Path) -> None:
    """A Llama with random weights, and a tokenizer that makes one token of each word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        **SHAPE, vocab_size=VOCABULARY, max_position_embeddings=2**16, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i + 4 for i in range(VOCABULARY - 4)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=2**16
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if "--as_worker" in sys.argv[1:2]:
        work()
    else:
        main()
