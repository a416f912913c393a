"""What flags are called in other tools (TRL, Axolotl, LLaMA-Factory, ms-swift, Unsloth) and in their older versions.

A name in this table gets the hint that stands beside it and is never compared with our flags by spelling: the nearest
spelling may mean the opposite.
"""

from __future__ import annotations

from collections.abc import Container

TEST_ROWS = (
    "test rows are not trained on: hold them out with --validation_split, or measure them with the verb evaluate"
)
WHOLE_MODULES = "whole modules beside LoRA are not available; leave it out, or train all weights without --use_lora"
LOSS_WEIGHT = "add the SFT term as a loss of its own: --loss_type sigmoid sft --loss_weights 1 "
REFERENCE_FREE = "every loss here reads a reference; losses without one (SimPO, ORPO, CPO) are not available"
KTO = "KTO, which learns from single answers, is not available"
LORA_FLAGS = "the adapter is described by --use_lora, --lora_r, --lora_alpha, --lora_dropout, --lora_target_modules"

# name -> the flag that means the same
SAME = {
    "base_model": "model_name_or_path",
    "batch_size": "per_device_train_batch_size",
    "cutoff_len": "max_length",
    "data_files": "dataset_name",
    "data_path": "dataset_name",
    "dataset": "dataset_name",
    "dataset_test_split": "validation_split",
    "dataset_train_split": "dataset_split",
    "dpo_beta": "beta",
    "epochs": "num_train_epochs",
    "eval_batch_size": "per_device_eval_batch_size",
    "eval_every": "eval_steps",
    "eval_split": "validation_split",
    "evaluation_strategy": "eval_strategy",
    "grad_accum": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "group_by_length": "train_sampling_strategy",
    "load_in_4bit": "use_4bit",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "max_prompt_length": "max_length",
    "max_seq_len": "max_length",
    "max_seq_length": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "mixed_precision": "dtype",
    "model": "model_name_or_path",
    "model_id": "model_name_or_path",
    "model_name": "model_name_or_path",
    "no_cuda": "use_cpu",
    "num_epochs": "num_train_epochs",
    "out_dir": "output_dir",
    "output": "output_dir",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "precision": "dtype",
    "pref_beta": "beta",
    "pref_loss": "loss_type",
    "random_seed": "seed",
    "ref_model": "ref_model_name_or_path",
    "resume": "resume_from_checkpoint",
    "resume_from": "resume_from_checkpoint",
    "save_every": "save_steps",
    "sequence_len": "max_length",
    "sequence_length": "max_length",
    "torch_dtype": "dtype",
    "train_batch_size": "per_device_train_batch_size",
    "train_file": "dataset_name",
    "train_split": "dataset_split",
    "use_peft": "use_lora",
    "val_set_size": "validation_split",
    "val_size": "validation_split",
    "wandb": "use_wandb",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
}

# name -> why there is no such flag, and what to do
ADVICE = {
    "adapter": "--use_lora trains a new adapter (with --use_4bit: QLoRA); --adapter_name_or_path continues one",
    "attn_impl": "use --attn_implementation",
    "base_model_attribute_name": "it had no effect; leave it out",
    "bnb_4bit_compute_dtype": "4-bit weights are computed with in --dtype",
    "cpo_alpha": REFERENCE_FREE,
    "dataset_prepared_path": "prepared rows are cached by the datasets library (HF_DATASETS_CACHE); leave it out",
    "dpo_alpha": LOSS_WEIGHT + "ALPHA",
    "eval_dataset": TEST_ROWS,
    "finetuning_type": "--use_lora trains an adapter; without it all weights are trained",
    "flash_attention": "use --attn_implementation flash_attention_2",
    "flash_attn": "use --attn_implementation flash_attention_2",
    "force_use_ref_model": "a reference given with --ref_model_name_or_path is always used; leave it out",
    "generate_during_eval": "use --sample_during_eval",
    "is_encoder_decoder": "only decoder models are trained; leave it out",
    "label_pad_token_id": "padding never enters the loss; leave it out",
    "load_in_8bit": "training on 8-bit weights is not available; --use_4bit holds the base in 4 bits",
    "lora_bias": "adapters have no biases here: they could not be told from the reference; leave it out",
    "lora_modules_to_save": WHOLE_MODULES,
    "lora_task_type": "it is always CAUSAL_LM; leave it out",
    "max_completion_length": "--max_length limits prompt and completion together",
    "max_target_length": "--max_length limits prompt and completion together",
    "model_adapter_name": "use --adapter_name_or_path",
    "modules_to_save": WHOLE_MODULES,
    "padding_value": "padding never enters the loss; leave it out",
    "peft_config": LORA_FLAGS,
    "pref_ftx": LOSS_WEIGHT + "X",
    "qlora": "use --use_lora with --use_4bit",
    "quantization": "--use_4bit holds the base in 4 bits",
    "quantization_bit": "--use_4bit holds the base in 4 bits",
    "ref_adapter_name": "the reference is the model as training begins; a separate one is --ref_model_name_or_path",
    "reference_free": REFERENCE_FREE,
    "rlhf_type": "the verb is train, and --loss_type names the loss",
    "rpo_alpha": LOSS_WEIGHT + "ALPHA",
    "sft_alpha": LOSS_WEIGHT + "ALPHA",
    "simpo_gamma": REFERENCE_FREE,
    "skip_bad_rows": "use --on_bad_rows skip",
    "stage": "the verb is train (DPO) or sft, before every flag",
    "template": "the chat template is the tokenizer's own, or --chat_template FILE",
    "test_file": TEST_ROWS,
    "test_size": "the share of rows that is held out is --validation_split",
    "test_split": TEST_ROWS,
    "tools": "tools are read from each row's own `tools` column",
    "train_type": "--use_lora trains an adapter; without it all weights are trained",
    "use_bnb_nested_quant": "--use_4bit quantizes the scales too, in any case; leave it out",
    "use_logits_to_keep": "logits are computed for completions alone in any case; leave it out",
    "use_qlora": "use --use_lora with --use_4bit",
    "use_ref_model": "the reference is the model as training begins; a separate one is --ref_model_name_or_path",
    "use_unsloth": "the engine is this script's own (--engine); leave it out",
    "validation_file": TEST_ROWS,
}

# losses of other tools that are none of ours by another spelling
OTHER_LOSSES = {
    "simpo": REFERENCE_FREE,
    "orpo": REFERENCE_FREE,
    "cpo": REFERENCE_FREE,
    "kto": KTO,
    "kto_pair": KTO,
}


def foreign_hint(name: str, flags: Container[str]) -> str | None:
    """What to write in place of a flag of another tool, as the end of "no such flag"; None for a name not in the table.

    Args:
        flags: the names that the verb knows.
    """
    if name in ADVICE:
        return f"; {ADVICE[name]}"
    if name in SAME:
        return f"; did you mean --{SAME[name]}?" if SAME[name] in flags else " (--help lists them)"
    return None
