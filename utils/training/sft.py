"""The SFT trainer: TRL's SFTTrainer on tokenized rows, with the same run folder and an exact evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import pad

from utils.models.scoring import score_tokens
from utils.training.run_folder import RunFolderTrainer, float32_kept, set_lora_dropout


class CompletionCollator:
    """Pads rows of `prompt_ids` and `completion_ids`; only completion tokens are labels."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [(row["prompt_ids"], row["completion_ids"]) for row in examples]
        ids = [torch.tensor(prompt + completion) for prompt, completion in rows]
        labels = [torch.tensor([-100] * len(prompt) + completion) for prompt, completion in rows]
        return {
            "input_ids": pad(ids, padding_value=self.pad_token_id, padding_side="right"),
            "attention_mask": pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side="right"),
            "labels": pad(labels, padding_value=-100, padding_side="right"),
        }


class ImitationTrainer(RunFolderTrainer, SFTTrainer):
    """Supervised fine-tuning on `prompt_ids` and `completion_ids`: cross-entropy of the completion's tokens."""

    def __init__(
        self,
        *,
        model,
        args: SFTConfig,
        lora_dropout: float,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        processing_class,
        peft_config=None,
        callbacks=None,
    ):
        with float32_kept(model):
            super().__init__(
                model=model,
                args=args,
                data_collator=CompletionCollator(processing_class.pad_token_id),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                peft_config=peft_config,
                callbacks=callbacks,
            )
        set_lora_dropout(self.model, lora_dropout)
        self.held_out_rows: list[dict[str, float]] = []
        self.tokens_computed = self.tokens_padded = 0  # in training, padding included, by this process

    def compute_loss(self, model, inputs, *arguments, **options):
        """TRL's loss: cross-entropy over the completion tokens of the optimizer step."""
        self.tokens_computed += inputs["input_ids"].numel()
        self.tokens_padded = self.tokens_computed
        return super().compute_loss(model, inputs, *arguments, **options)

    def _prepare_dataset(self, dataset, *arguments, **options):
        return dataset  # tokenized already, by utils/data/tokenizing.py

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "completion_ids"]

    def measure_held_out(self) -> dict[str, float]:
        """Loss per completion token, perplexity and share of tokens guessed right, over all held-out tokens."""
        self.held_out_rows = self.score_dataset(self.eval_dataset)
        return summarise(self.held_out_rows)

    def score_dataset(self, dataset: Dataset) -> list[dict[str, float]]:
        """One row of metrics per row of the data set, in its order; memory grows with the batch, not with the data."""
        lengths = [len(p) + len(c) for p, c in zip(dataset["prompt_ids"], dataset["completion_ids"], strict=True)]
        order = sorted(range(len(dataset)), key=lambda index: -lengths[index])
        size = self.args.per_device_eval_batch_size
        rows: dict[int, dict[str, float]] = {}
        for indices in self.share_of_batches([order[i : i + size] for i in range(0, len(order), size)]):
            inputs = self._prepare_inputs(self.data_collator([dataset[index] for index in indices]))
            rows |= dict(zip(indices, self._score_batch(inputs), strict=True))
        return self.merge_rows(rows)

    def _score_batch(self, inputs: Mapping[str, Tensor]) -> list[dict[str, float]]:
        model = self.model_wrapped if self.is_fsdp_enabled or self.is_deepspeed_enabled else self.model
        mask = (inputs["labels"] != -100).long()
        scores = score_tokens(model, {**inputs, "completion_mask": mask})
        columns = {"logps": scores.log_probs.sum(dim=1), "right": scores.right.sum(dim=1)}
        columns["tokens"] = mask[:, 1:].sum(dim=1)
        values = torch.stack([column.double() for column in columns.values()], dim=1).tolist()
        return [dict(zip(columns, row, strict=True)) for row in values]


def summarise(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over completion tokens: each token of the data weighs the same."""
    tokens = sum(row["tokens"] for row in rows)
    loss = -sum(row["logps"] for row in rows) / tokens
    return {
        "loss": loss,
        "perplexity": min(2.718281828459045**loss, 1e30),
        "token_accuracy": sum(row["right"] for row in rows) / tokens,
        "rows": len(rows),
    }
