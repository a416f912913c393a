"""Names of flags, verbs and losses in other tools (TRL, Axolotl, LLaMA-Factory, alignment-handbook, ms-swift, Unsloth,
OpenRLHF, transformers), and what becomes of each: read as a flag of ours, or not read, with the reason.

A name in these tables is never compared with our flags by spelling: the nearest spelling may mean the opposite.
"""

from __future__ import annotations

import dataclasses
import os.path
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping

from .config_file import Entry
from .flag_values import NULL_WORDS, YES_NO, is_number

Flags = dict[str, str]  # flag of ours -> its value as text; "true" for a switch
Convert = Callable[[str], Flags]  # of a value as text; raises ValueError with the reason where it is not read

TEST_ROWS = (
    "test rows are not trained on: hold them out with --validation_split, or measure on them with the verb evaluate"
)
WHOLE_MODULES = (
    "training whole modules beside LoRA is not supported; leave it out, or train all weights without --use_lora"
)
LOSS_WEIGHT = "add the SFT term as a second loss: --loss_type sigmoid sft --loss_weights 1 "
REFERENCE_FREE = "every loss here reads a reference; losses without one (SimPO, ORPO, CPO) are not supported"
KTO = "KTO, which learns from unpaired responses, is not supported"
LORA_FLAGS = "the adapter is described by --use_lora, --lora_r, --lora_alpha, --lora_dropout, --lora_target_modules"
ONE_LIMIT = "--max_length limits prompt and response together"
EIGHT_BITS = "training on 8-bit weights is not supported; --use_4bit holds the base in 4 bits"
NO_UNSLOTH = "the engine is this script's own (--engine); leave it out"

# losses of other tools that are none of ours by another spelling
OTHER_LOSSES = {
    "simpo": REFERENCE_FREE,
    "orpo": REFERENCE_FREE,
    "cpo": REFERENCE_FREE,
    "kto": KTO,
    "kto_pair": KTO,
}

# verbs of other tools -> what is typed here in their place
OTHER_VERBS = {
    "analyze": "data --dataset_name DATA",
    "convert": "merge --model_name_or_path RUN --output_dir MERGED",
    "eval": "evaluate --model_name_or_path RUN",
    "export": "merge --model_name_or_path RUN --output_dir MERGED",
    "finetune": "train --model_name_or_path MODEL --dataset_name DATA --output_dir RUN",
    "generate": "data --generate --model_name_or_path MODEL --dataset_name PROMPTS --scorer SCORER --output_file FILE",
    "infer": "chat --model_name_or_path RUN",
    "inference": "chat --model_name_or_path RUN",
    "inspect": "data --dataset_name DATA",
    "prepare": "data --dataset_name DATA --output_file pairs.jsonl",
    "prepare_dataset": "data --dataset_name DATA --output_file pairs.jsonl",
    "preprocess": "data --dataset_name DATA --output_file pairs.jsonl",
    "rlhf": "train --model_name_or_path MODEL --dataset_name DATA --output_dir RUN",
    **dict.fromkeys(("grpo", "kto", "orpo", "ppo", "reward", "rloo", "rm"), ""),  # what is not done here
}

PRECISIONS = {
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "float16", "half", "torch.float16", "16"), "float16"),
    **dict.fromkeys(("fp32", "float32", "float", "no", "false", "torch.float32", "32"), "float32"),
    "auto": "auto",
}
SHORT_DATASETS = {
    "hh": "Anthropic/hh-rlhf",
    "hh-rlhf": "Anthropic/hh-rlhf",
    "hh_rlhf": "Anthropic/hh-rlhf",
    "shp": "stanfordnlp/SHP",
    "ultrafeedback": "trl-lib/ultrafeedback_binarized",
    "ultrafeedback_binarized": "trl-lib/ultrafeedback_binarized",
    "webgpt": "openai/webgpt_comparisons",
    "webgpt_comparisons": "openai/webgpt_comparisons",
}


def _by_value(values: Mapping[str, Flags | str], otherwise: str) -> Convert:
    """Each value by the table, in which a text is the reason why it is not read; `otherwise` is that of the others."""

    def convert(text: str) -> Flags:
        found = values.get(text.strip().lower(), otherwise)
        if isinstance(found, str):
            raise ValueError(found)
        return found

    return convert


def _switch(on: Flags, off: Flags | None = None) -> Convert:
    """What a yes/no value stands for."""
    yes_no = {word: on if value else off or {} for word, value in YES_NO.items()}
    return _by_value(yes_no, "must be true or false")


def _dtype(text: str) -> Flags:
    if text.strip().lower() not in PRECISIONS:
        raise ValueError("use --dtype auto, float32, bfloat16 or float16")
    return {"dtype": PRECISIONS[text.strip().lower()]}


def _bf16(text: str) -> Flags:
    if text.strip().lower() == "auto":
        return {"dtype": "auto"}
    return _switch({"dtype": "bfloat16"}, {"dtype": "float32"})(text)


def _dataset(text: str) -> Flags:
    known = SHORT_DATASETS.get(text.lower())
    return {"dataset_name": known if known and not os.path.exists(text) else text}


def _held_out(text: str) -> Flags:
    """A share, or the name of a split; 0 holds nothing out, and a number of rows cannot be asked for."""
    if not is_number(text):
        return {"validation_split": text}
    if float(text) == 0:
        return {"validation_split": "none"}
    if not 0 < float(text) < 1:
        raise ValueError("a number of rows cannot be held out; --validation_split takes a fraction such as 0.05")
    return {"validation_split": text}


def _split_to_train_on(text: str) -> Flags:
    if is_number(text):
        raise ValueError("the fraction of rows that is held out is --validation_split; the others are trained on")
    return {"dataset_split": text}


def _warmup_share(text: str) -> Flags:
    if not is_number(text) or not 0 <= float(text) < 1:
        raise ValueError("must be a share at least 0 and below 1; a number of steps is --warmup_steps")
    return {"warmup_steps": text}


def _loss(text: str) -> Flags:
    if text.strip().lower() in OTHER_LOSSES:
        raise ValueError(OTHER_LOSSES[text.strip().lower()])
    return {"loss_type": text}


def _resume(text: str) -> Flags:
    if text.strip().lower() in YES_NO:
        return {"resume_from_checkpoint": "auto"} if YES_NO[text.strip().lower()] else {}
    return {"resume_from_checkpoint": text}


def _named_wandb(text: str) -> Flags:
    yes_no = text.strip().lower() in YES_NO
    return _switch({"use_wandb": "true"})(text) if yes_no else {"use_wandb": "true", "wandb_project": text}


ADAPTER = _by_value(
    {
        "lora": {"use_lora": "true"},
        "qlora": {"use_lora": "true", "use_4bit": "true"},
        "dora": {"use_lora": "true", "use_dora": "true"},
        "full": {},
    },
    "LoRA is the only adapter: --use_lora (with --use_4bit: QLoRA); without it all weights are trained",
)
ATTENTION = _by_value(
    {
        "auto": {},
        "disabled": {"attn_implementation": "eager"},
        "eager": {"attn_implementation": "eager"},
        "sdpa": {"attn_implementation": "sdpa"},
        **{
            name: {"attn_implementation": "flash_attention_2"}
            for name in ("fa2", "flash_attn", "flash_attention_2", "true")
        },
        "fa3": {"attn_implementation": "flash_attention_3"},
        "flash_attention_3": {"attn_implementation": "flash_attention_3"},
        "false": {},
    },
    "use --attn_implementation sdpa, eager, flash_attention_2, ...",
)
BITS = _by_value({"4": {"use_4bit": "true"}, "16": {}, "8": EIGHT_BITS}, "--use_4bit holds the base in 4 bits")

PRECISION_NAMES = {"fp16", "dtype", "torch_dtype", "mixed_precision", "precision", "model_dtype", "compute_dtype"}
# name -> the flag of the same meaning, how its value is converted, or the reason why it is not read ("!" in front)
NAMES: dict[str, str | Convert] = {
    "adapter": ADAPTER,
    "adapter_path": "adapter_name_or_path",
    "attn_impl": ATTENTION,
    "base_model": "model_name_or_path",
    "base_model_attribute_name": "!it had no effect; leave it out",
    "batch_size": "per_device_train_batch_size",
    "bf16": _bf16,
    "bnb_4bit_compute_dtype": "!products with 4-bit weights are computed in --dtype",
    "bnb_4bit_quant_storage": "!the storage type of 4-bit weights follows from the launch; leave it out",
    "checkpoint_dir": "output_dir",
    "compute_dtype": _dtype,
    "cpo_alpha": "!" + REFERENCE_FREE,
    "cutoff_len": "max_length",
    "data": _dataset,
    "data_files": "dataset_name",
    "data_path": _dataset,
    "dataset": _dataset,
    "dataset_num_workers": "dataset_num_proc",
    "dataset_prepared_path": "!prepared rows are cached by the datasets library (HF_DATASETS_CACHE); leave it out",
    "dataset_test_split": _held_out,
    "dataset_train_split": _split_to_train_on,
    "do_sample": "!sampling is set by --temperature; 0 is greedy decoding",
    "dpo_alpha": "!" + LOSS_WEIGHT + "ALPHA",
    "dpo_beta": "beta",
    "dpo_loss_type": _loss,
    "epochs": "num_train_epochs",
    "eval_batch_size": "per_device_eval_batch_size",
    "eval_dataset": "!" + TEST_ROWS,
    "eval_every": "eval_steps",
    "eval_split": _held_out,
    "evaluation_strategy": "eval_strategy",
    "finetuning_type": ADAPTER,
    "flash_attention": ATTENTION,
    "flash_attn": ATTENTION,
    "force_use_ref_model": "!a reference given with --ref_model_name_or_path is always used; leave it out",
    "fp16": _switch({"dtype": "float16"}),
    "from": "from_file",
    "generate_during_eval": "sample_during_eval",
    "grad_accum": "gradient_accumulation_steps",
    "grad_accum_steps": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "group_by_length": _switch({"train_sampling_strategy": "group_by_length"}),
    "is_encoder_decoder": "!only decoder models are trained; leave it out",
    "label_pad_token_id": "!padding never enters the loss; leave it out",
    "learning_rate_scheduler": "lr_scheduler_type",
    "limit": "max_samples",
    "load_in_4bit": "use_4bit",
    "load_in_8bit": "!" + EIGHT_BITS,
    "lora": "use_lora",
    "lora_bias": "!bias terms are not trained: they would change the base, which is the reference; leave it out",
    "lora_modules_to_save": "!" + WHOLE_MODULES,
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "lora_task_type": "!it is always CAUSAL_LM; leave it out",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "max_completion_length": "!" + ONE_LIMIT,
    "max_epochs": "num_train_epochs",
    "max_len": "max_length",
    "max_prompt_length": (
        f"!{ONE_LIMIT}: the prompt of a longer pair is shortened from its left, down to a quarter of it; leave it out"
    ),
    "max_seq_len": "max_length",
    "max_seq_length": "max_length",
    "max_target_length": "!" + ONE_LIMIT,
    "micro_batch_size": "per_device_train_batch_size",
    "micro_train_batch_size": "per_device_train_batch_size",
    "mixed_precision": _dtype,
    "model": "model_name_or_path",
    "model_adapter_name": "!use --adapter_name_or_path",
    "model_dtype": _dtype,
    "model_id": "model_name_or_path",
    "model_name": "model_name_or_path",
    "model_path": "model_name_or_path",
    "modules_to_save": "!" + WHOLE_MODULES,
    "nll_loss_coef": "!" + LOSS_WEIGHT + "X",
    "no_cuda": "use_cpu",
    "num_epochs": "num_train_epochs",
    "num_samples": "max_samples",
    "num_workers": "dataloader_num_workers",
    "optimizer": "optim",
    "out_dir": "output_dir",
    "output": "output_dir",
    "output_path": "output_dir",
    "padding_value": "!padding never enters the loss; leave it out",
    "peft_config": "!" + LORA_FLAGS,
    "per_device_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "precision": _dtype,
    "pref_beta": "beta",
    "pref_ftx": "!" + LOSS_WEIGHT + "X",
    "pref_loss": _loss,
    "pretrain": "model_name_or_path",
    "qlora": _switch({"use_lora": "true", "use_4bit": "true"}),
    "quantization": BITS,
    "quantization_bit": BITS,
    "quant_bits": BITS,
    "random_seed": "seed",
    "ref_adapter_name": "!the reference is the initial model; a separate one is --ref_model_name_or_path",
    "ref_model": "ref_model_name_or_path",
    "ref_pretrain": "ref_model_name_or_path",
    "reference_free": "!" + REFERENCE_FREE,
    "resume": _resume,
    "resume_from": _resume,
    "rlhf_type": _by_value({"dpo": {}, **OTHER_LOSSES}, "the method is DPO; --loss_type names the loss"),
    "rpo_alpha": "!" + LOSS_WEIGHT + "ALPHA",
    "save_every": "save_steps",
    "save_path": "output_dir",
    "sequence_len": "max_length",
    "sequence_length": "max_length",
    "sft_alpha": "!" + LOSS_WEIGHT + "ALPHA",
    "simpo_gamma": "!" + REFERENCE_FREE,
    "skip_bad_rows": _switch({"on_bad_rows": "skip"}, {"on_bad_rows": "error"}),
    "source": _dataset,
    "split_dataset_ratio": _held_out,
    "stage": "!the verb is train (DPO) or sft, in front of the flags",
    "template": "!the chat template is the tokenizer's own, or --chat_template FILE",
    "test_file": "!" + TEST_ROWS,
    "test_size": _held_out,
    "test_split_size": _held_out,
    "test_split": "!" + TEST_ROWS,
    "torch_dtype": _dtype,
    "train_batch_size": (
        "!per device or in total? use --per_device_train_batch_size with --gradient_accumulation_steps"
    ),
    "train_file": "dataset_name",
    "train_split": _split_to_train_on,
    "train_type": ADAPTER,
    "tuner_type": ADAPTER,
    "use_bnb_nested_quant": "!--use_4bit quantizes the scales too, in any case; leave it out",
    "use_flash_attention_2": _switch({"attn_implementation": "flash_attention_2"}),
    "use_logits_to_keep": "!logits are computed for completions alone in any case; leave it out",
    "use_peft": "use_lora",
    "use_qlora": _switch({"use_lora": "true", "use_4bit": "true"}),
    "use_ref_model": "!the reference is the initial model; a separate one is --ref_model_name_or_path",
    "use_unsloth": "!" + NO_UNSLOTH,
    "val_set_size": _held_out,
    "val_size": _held_out,
    "validation_file": "!" + TEST_ROWS,
    "wandb": _named_wandb,
    "warmup": "warmup_steps",
    "warmup_ratio": _warmup_share,
    "zero_stage": "!launch with a config of examples/accelerate, which sets the sharding",
}


def read_as_ours(entries: Iterable[Entry], ours: Collection[str], faults: list[str]) -> tuple[list[Entry], list[str]]:
    """The entries with names of other tools replaced by the flags that mean the same, and a line for each of them.

    Args:
        ours: the names that some verb knows; they are left as they are.
    """
    read: dict[str, Entry] = {}
    lines = []
    entries = list(entries)
    precisions = [entry for entry in entries if entry.name in PRECISION_NAMES and not _is_off(entry)]
    for entry in entries:
        made = [entry]
        if entry.name in NAMES and entry.name not in ours:
            try:
                made = [] if entry.name == "bf16" and _is_off(entry) and precisions else _convert(entry)
            except ValueError as reason:
                faults.append(f"{entry.label}{reason}")
                continue
            lines.append(f"{entry.label}: {_said(made)}")
        for one in made:
            before = read.setdefault(one.name, one)
            if (before.texts or ("true",)) != (one.texts or ("true",)):
                faults.append(f"{one.label}: {before.label} sets --{one.name} too; leave one of them out")
    return list(read.values()), lines


def reads(convert: Convert, text: str) -> bool:
    """Whether the text is a value that can be converted."""
    try:
        convert(text)
    except ValueError:
        return False
    return True


def _is_off(entry: Entry) -> bool:
    """Whether it is null, none or false."""
    word = entry.texts[0].strip().lower() if entry.texts else "true"
    return entry.shape == "null" or word in NULL_WORDS or YES_NO.get(word) is False


def _convert(entry: Entry) -> list[Entry]:
    """The entries that one of another tool stands for. Raises ValueError with the reason where it is not read."""
    to = NAMES[entry.name]
    if isinstance(to, str):
        if not to.startswith("!"):
            return [dataclasses.replace(entry, name=to)]
        if _is_off(entry):
            return []  # switched off there, and not available here
        raise ValueError(f": no such flag; {to[1:]}")
    if entry.shape == "null":
        return []
    if entry.shape != "text" or len(entry.texts) > 1:
        raise ValueError(": takes one value")
    text = entry.texts[0] if entry.texts else "true"
    try:
        flags = to(text)
    except ValueError as reason:
        raise ValueError(f" {text}: {reason}") from None
    return [Entry(name, entry.label, (text,)) for name, text in flags.items()]


def _said(made: Iterable[Entry]) -> str:
    """`read as --use_lora --lora_r 8`, or that it changes nothing."""
    words = []
    for entry in made:
        words.append(f"--{entry.name}")
        words += [shlex.quote(text) for text in entry.texts if text != "true"]
    return f"read as {' '.join(words)}" if words else "has no effect here; ignored"
