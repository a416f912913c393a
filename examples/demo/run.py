"""The demo: tunes the bundled model on the bundled pairs, then shows what it wrote before and after.

    make demo            (or: python examples/demo/run.py [--picture FILE.svg])

The base model writes short reviews, about half of them positive. The preference pairs prefer the positive
continuation of an opening. After training, the model continues openings it has never seen; a scorer that knows the
grammar of the reviews says which continuations are positive.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUNDLED = HERE / "bundled"
OUTPUT = ROOT / "runs" / "demo"
SEED = 7
PROMPTS = 200
SHOWN = 3

TRAIN = [
    "train",
    "--model_name_or_path",
    str(BUNDLED / "model"),
    "--dataset_name",
    str(BUNDLED / "pairs.jsonl"),
    "--output_dir",
    str(OUTPUT),
    "--overwrite_output_dir",
    "--beta",
    "0.5",
    "--learning_rate",
    "2e-4",
    "--num_train_epochs",
    "1",
    "--per_device_train_batch_size",
    "16",
    "--per_device_eval_batch_size",
    "32",
    "--eval_steps",
    "28",
]


def main() -> int:
    """Trains, compares, prints. Returns the exit code of the training when that fails."""
    parser = argparse.ArgumentParser(description="Trains the bundled model and compares it with the base.")
    parser.add_argument("--picture", type=Path, help="also draw the comparison into this SVG file")
    picture = parser.parse_args().picture
    picture = picture and picture.resolve()
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(HERE)]
    import advanced_dpo_script
    from utils.console import open_console

    open_console()
    print("Teaching a small language model to write positive reviews, from preference pairs.\n")
    code = advanced_dpo_script.main(TRAIN)
    if code:
        return code
    show_comparison(json.loads((OUTPUT / "run.json").read_text(encoding="utf-8")), picture)
    return 0


def show_comparison(record: dict, picture: Path | None = None) -> None:
    """Prints the model's figures before and after training on unseen openings, and what to type next."""
    from peft import PeftModel
    from picture import draw
    from scorer import is_positive
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from utils.responses.generation import kl_estimate, sample_continuations
    from utils.settings.verbs import SamplingSettings

    tokenizer = AutoTokenizer.from_pretrained(OUTPUT)
    base = AutoModelForCausalLM.from_pretrained(BUNDLED / "model")
    tuned = load_tuned(AutoModelForCausalLM, PeftModel)
    lines = (BUNDLED / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines][:PROMPTS]
    written = {
        name: sample_continuations(model, tokenizer, prompts, SamplingSettings(max_new_tokens=100), seed=SEED)
        for name, model in (("before", base), ("after", tuned))
    }
    share = {
        name: sum(is_positive(prompt, text.text) for prompt, text in zip(prompts, texts, strict=True)) / len(prompts)
        for name, texts in written.items()
    }
    ends = {name: sum(text.ended for text in texts) / len(texts) for name, texts in written.items()}
    kl = kl_estimate(tuned, base, tokenizer, prompts, written["after"])
    before, after = record["metrics"]["held_out_before"], record["metrics"]["held_out"]

    title = f"The same {len(prompts)} openings, never seen in training, continued by both models"
    shares = {
        "positive reviews": (share["before"], share["after"]),
        "held-out accuracy": (before["accuracy"], after["accuracy"]),
        "reviews that end by themselves": (ends["before"], ends["after"]),
    }
    print(f"\n{title}:\n")
    print(f"  {'':36}{'before':>8}{'after':>8}")
    for name, (old, new) in shares.items():
        print(f"  {name:36}{old:>8.0%}{new:>8.0%}")
    print(f"  {'KL from the base model, nats':36}{0:>8.1f}{kl:>8.1f}")
    if picture is not None:
        note = f"KL from the base model {kl:.1f} nats; model of 1M parameters, two CPU cores, by `make demo`"
        picture.write_text(draw(title, shares, note), encoding="utf-8")
    turned = [i for i, prompt in enumerate(prompts) if not is_positive(prompt, written["before"][i].text)]
    print(f"\nThe first {SHOWN} of those that the base model continued negatively:")
    for index in turned[:SHOWN]:
        show_text("opening", prompts[index], start="\n")
        show_text("before", written["before"][index].text)
        show_text("after", written["after"][index].text)
    print(NEXT.format(output=OUTPUT.relative_to(ROOT)))


def load_tuned(model_class, peft_model_class):
    """The tuned model, read back from the run folder as anyone would."""
    if (OUTPUT / "adapter_config.json").is_file():
        return peft_model_class.from_pretrained(model_class.from_pretrained(BUNDLED / "model"), OUTPUT)
    return model_class.from_pretrained(OUTPUT)


def show_text(label: str, text: str, start: str = "") -> None:
    """Prints a text of a few lines behind its label."""
    print(start + textwrap.fill(text.strip(), 96, initial_indent=f"  {label:<9}", subsequent_indent=" " * 11))


NEXT = """
The report of the run, to open in a browser: {output}/report.html
Next, your own model and data (a hub name, a folder or a file):

  .venv/bin/python advanced_dpo_script.py --model_name_or_path MODEL --dataset_name DATA \\
      --output_dir runs/mine --use_lora --dry_run

--dry_run checks every stage and saves nothing; leave it out to train. --help lists the flags."""

if __name__ == "__main__":
    sys.exit(main())
