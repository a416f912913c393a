"""The text of --help, built from the settings' own descriptions."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from typing import Any

from ..settings.flags import ALL_VERBS, takes
from ..settings.training import STAGES
from .flag_values import ValueType, annotated_type, as_texts
from .trainer_fields import CONFIG_CLASSES

VERB_HELP = {
    "train": "tune a model on preference pairs with DPO (what happens without a verb)",
    "sft": "supervised fine-tuning on the chosen responses, or on prompt/completion rows",
    "data": "say what is in preference data and what is wrong with it; write the clean pairs",
    "compare": "let two models answer the same prompts, judge the answers: win rates, lengths, a page",
    "plan": "say what a run would need, what fits, how long it would take; takes the flags of train",
    "plan sft": "the same of an sft run; takes the flags of sft",
    "merge": "add an adapter to its model: a model that stands alone, compared with the two",
    "chat": "talk to a model in the terminal, or pipe one message through it",
    "evaluate": "measure a tuned model against its reference on held-out pairs, with intervals; a page",
    "status": "say of each run under a folder how far it is and how it does; compare runs",
    "init": "write a commented config for a situation, to be changed and given to --config",
}
EXAMPLES = {
    "train": """\
  python advanced_dpo_script.py --model_name_or_path meta-llama/Llama-2-7b-hf \\
      --dataset_name trl-lib/ultrafeedback_binarized --output_dir ./llama2-7b-dpo-lora \\
      --use_lora --use_4bit --lora_r 64 --lora_alpha 16 --beta 0.1 --num_train_epochs 1 \\
      --logging_steps 10 --save_steps 200 --use_wandb""",
    "sft": """\
  python advanced_dpo_script.py sft --model_name_or_path meta-llama/Llama-2-7b-hf \\
      --dataset_name trl-lib/ultrafeedback_binarized --output_dir ./llama2-7b-sft-lora \\
      --use_lora --use_4bit --lora_r 64 --lora_alpha 16 --num_train_epochs 1 \\
      --logging_steps 10 --save_steps 200 --use_wandb""",
    "data": """\
  python advanced_dpo_script.py data --dataset_name ./pairs.jsonl --report_file findings.html \\
      --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --max_length 1024 --output_file clean.jsonl
  python advanced_dpo_script.py data --generate --dataset_name ./prompts.jsonl --output_file pairs.jsonl \\
      --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --scorer ./my-reward-model

exit code: 0 nothing is wrong, 3 problems were found, 2 the data or the flags cannot be used""",
    "compare": """\
  python advanced_dpo_script.py compare --model_name_or_path ./llama2-7b-dpo-lora
  python advanced_dpo_script.py compare --model_name_or_path ./llama2-7b-dpo-lora \\
      --baseline meta-llama/Llama-2-7b-chat-hf --prompts ./questions.txt --num_prompts 200 \\
      --judge ./my-reward-model vote""",
    "plan": """\
  python advanced_dpo_script.py plan --model_name_or_path meta-llama/Llama-3.1-8B --use_lora --use_4bit \\
      --dataset_name trl-lib/ultrafeedback_binarized --gpu "RTX 4090" --cost_per_hour 0.4
  python advanced_dpo_script.py plan --config run.yaml --measure""",
    "plan sft": """\
  python advanced_dpo_script.py plan sft --model_name_or_path meta-llama/Llama-3.1-8B --use_lora --use_4bit \\
      --dataset_name trl-lib/ultrafeedback_binarized --gpu "RTX 4090" --cost_per_hour 0.4
  python advanced_dpo_script.py plan --config examples/configs/zephyr_7b_sft.yaml --gpu "H100 80GB" --num_devices 8""",
    "merge": """\
  python advanced_dpo_script.py merge --model_name_or_path ./llama2-7b-dpo-lora --output_dir ./llama2-7b-dpo""",
    "chat": """\
  python advanced_dpo_script.py chat --model_name_or_path ./llama2-7b-dpo-lora --compare_with reference
  echo "Who wrote Emma?" | python advanced_dpo_script.py chat --model_name_or_path ./llama2-7b-dpo-lora""",
    "evaluate": """\
  python advanced_dpo_script.py evaluate --model_name_or_path ./llama2-7b-dpo-lora
  python advanced_dpo_script.py evaluate --model_name_or_path ./llama2-7b-dpo-lora \\
      --dataset_name ./other-pairs.jsonl --output_dir ./evaluations/on-other-pairs
  python advanced_dpo_script.py evaluate --model_name_or_path owner/tuned \\
      --ref_model_name_or_path owner/base --dataset_name trl-lib/ultrafeedback_binarized \\
      --output_dir ./evaluations/tuned""",
    "status": """\
  python advanced_dpo_script.py status runs
  python advanced_dpo_script.py status runs --report comparison.html
  python advanced_dpo_script.py status runs --json""",
    "init": """\
  python advanced_dpo_script.py init --situation one_24gb_qlora --output_file config.yaml \\
      --model_name_or_path meta-llama/Llama-3.1-8B-Instruct --dataset_name ./pairs.jsonl
  python advanced_dpo_script.py --config config.yaml""",
}


def help_text(verb: str) -> str:
    """The help of one verb: its flags in groups, what else it takes, and a usage example."""
    config = CONFIG_CLASSES.get(verb)
    more = f"Every further field of TRL's {config} works as --field value too.\n" if config else ""
    verbs = "\n".join(f"  {name:<{max(map(len, ALL_VERBS))}}  {VERB_HELP.get(name, '')}" for name in ALL_VERBS)
    parser = argparse.ArgumentParser(
        prog="python advanced_dpo_script.py",
        usage="python advanced_dpo_script.py [VERB] [flags]",
        description=f"verbs:\n{verbs}\n\nThe flags of {verb}:",
        epilog=f"{more}- and _ are the same in flag names. Yes/no flags take no value, or true/false.\n\n"
        f"example:\n{EXAMPLES.get(verb, '')}",
        formatter_class=_HelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="help", help="show this")
    general.add_argument("--config", metavar="FILE", help="YAML or JSON with the same names; flags win over it")
    for stage_class in STAGES.values():
        group = parser.add_argument_group(stage_class.__doc__)
        for field in dataclasses.fields(stage_class):
            if takes(verb, field.metadata["verbs"]):
                _add_flag(group, field)
    return parser.format_help()


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **options: Any) -> None:
        width = min(max(shutil.get_terminal_size().columns, 80), 100)
        super().__init__(prog, max_help_position=30, width=width, **options)


def _add_flag(group: Any, field: dataclasses.Field[Any]) -> None:
    text, kind = field.metadata["help"], annotated_type(field.type)
    if "default:" not in text and field.default is not None and field.default is not False:
        text += f" (default: {' '.join(as_texts(field.default))})"
    options: dict[str, Any] = {"help": text.replace("%", "%%")}
    if "bool" in kind.scalars:
        options["action"] = "store_true"
    else:
        options["metavar"] = _metavar(field, kind)
    group.add_argument(f"--{field.name}", **options)


def _metavar(field: dataclasses.Field[Any], kind: ValueType) -> str:
    choices = field.metadata["choices"]
    if choices and not kind.item and len("|".join(choices)) < 40:
        return "|".join(choices)
    word = {"int": "N", "float": "X"}.get(kind.item or kind.scalars[0], "TEXT")
    return f"{word} [{word} ...]" if kind.item else word
