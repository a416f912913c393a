"""What a resumed run may have otherwise than it had when it began: freely, or when --allow_changes names it."""

from __future__ import annotations

WORLD = "world"
# name -> what it lets pass; any flag that matters is a name too
GROUPS = {
    "data": "training or held-out rows with other content",
    "tokenizer": "other token ids for the same texts",
    "model": "other initial weights of the model or adapter",
    "reference": "other weights of --ref_model_name_or_path",
    "precision": "another computing precision",
    WORLD: "another number of rows per optimizer step",
}
ALL_SETTINGS = "settings"  # every flag at once
# Flags that shape what a checkpoint holds: with another value it could not be loaded.
CANNOT_CHANGE = frozenset({"use_lora", "lora_r", "lora_target_modules", "use_dora", "optim", "architecture"})
# Settings that may differ between the parts of one run: they change how it is run, not what it computes.
FREE_TO_CHANGE = frozenset(
    {
        "resume_from_checkpoint",
        "allow_changes",
        "overwrite_output_dir",
        "output_dir",
        "dry_run",
        "report_to",
        "use_wandb",
        "wandb_project",
        "wandb_run_name",
        "wandb_entity",
        "wandb_tags",
        "cost_per_hour",
        "max_kl",
        "skip_bad_batches",
        "logging_steps",
        "save_steps",
        "eval_steps",
        "save_total_limit",
        "sample_during_eval",
        "num_eval_samples",
        "sample_max_new_tokens",
        "per_device_eval_batch_size",
        "max_tokens_per_batch",  # the pairs of an optimizer step stay what they are
        "auto_batch_size",
        "on_bad_rows",  # the rows themselves are compared
        "dataset_num_proc",
        "dataloader_num_workers",
    }
)
