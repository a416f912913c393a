"""The SFT trainer: TRL's SFTTrainer on tokenized rows, with the same run folder and an exact evaluation."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer
from trl.trainer.utils import pad

from ..data.lengths import read_numbers
from ..data.tokenizing import LENGTH, SFT_COLUMNS
from ..engine.memory import freed_memory_returned
from ..engine.proving import most_of_trial
from ..engine.scoring import score_tokens
from ..interruptions import stop_if_asked
from .batches import ROWS, TOKENS, UNCOUNTED, uncounted
from .run_folder import RunFolderTrainer


class CompletionCollator:
    """Pads rows of `prompt_ids` and `completion_ids`; only completion tokens are labels."""

    filler: Sequence[dict[str, Any]] = ()  # a row for a process that has none left in a step

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if not examples:
            return uncounted(self(self.filler))
        rows = [(row["prompt_ids"], row["completion_ids"]) for row in examples]
        ids = [torch.tensor(prompt + completion) for prompt, completion in rows]
        labels = [torch.tensor([-100] * len(prompt) + completion) for prompt, completion in rows]
        return {
            "input_ids": pad(ids, padding_value=self.pad_token_id, padding_side="right"),
            "attention_mask": pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side="right"),
            "labels": pad(labels, padding_value=-100, padding_side="right"),
            ROWS: [row["row"] for row in examples if "row" in row],
            TOKENS: sum(map(len, ids)),
        }


class ImitationTrainer(RunFolderTrainer, SFTTrainer):
    """Supervised fine-tuning on `prompt_ids` and `completion_ids`: cross-entropy of the completion's tokens.

    Differs from its parent in what it computes: only completion tokens are put to the output head, once.
    """

    counted = "tokens"

    def __init__(self, *, processing_class: PreTrainedTokenizerBase, **parts: Any):
        super().__init__(
            data_collator=CompletionCollator(processing_class.pad_token_id), processing_class=processing_class, **parts
        )

    @freed_memory_returned()
    def try_head(self) -> None:
        """Chooses how the output head is applied, by a row of middle length."""
        order = np.argsort(read_numbers(self.train_dataset, LENGTH), kind="stable")
        row, most = self.train_dataset[int(order[len(order) // 2])], most_of_trial(self.model, rows=1, head=True)
        batch = self.data_collator([row | {name: row[name][:most] for name in ("prompt_ids", *SFT_COLUMNS)}])
        batch = {**batch, "completion_mask": completion_mask(batch)}
        self.choose_head(batch)
        self.compile_layers(batch)

    def count_items(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The completion tokens of a batch that something stands before. Stays on the device."""
        counted = completion_mask(batch)[:, 1:].sum()
        return torch.zeros_like(counted) if UNCOUNTED in batch else counted

    def tokens_of_rows(self) -> Sequence[int]:
        """What each row that is trained on puts through the model."""
        return array("q", read_numbers(self.train_dataset, LENGTH).astype("int64").tobytes())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The micro-batch's share of the optimizer step's mean over completion tokens.

        With --loss_type dft each token is weighted by its own probability (arXiv 2508.05629, eq. 9).
        """
        fills_up = inputs.pop(UNCOUNTED, False)
        self.tokens_computed += inputs["input_ids"].numel()
        self.tokens_padded = self.tokens_computed
        if self.args.gradient_checkpointing:
            self.switches.keep_last_layer()
        mask = completion_mask(inputs)
        scores = score_tokens(
            model, {**inputs, "completion_mask": mask}, with_right=True, with_auxiliary=self.aux_loss_enabled
        )
        losses = -scores.log_probs
        if self.args.loss_type == "dft":
            losses = losses * scores.log_probs.detach().exp()
        if fills_up:
            self.add_to_log({"token_accuracy": torch.zeros(())}, 0)
            return 0.0 * losses.sum()
        self.note_rows(inputs, losses.sum(dim=1))
        count = self.count_items(inputs)
        self.add_to_log({"token_accuracy": scores.right.sum()}, count)
        share = self.share_of_step(num_items_in_batch)
        loss = losses.sum() * share
        if scores.auxiliary is not None:
            loss = loss + self.router_aux_loss_coef * scores.auxiliary * count * share
        return loss

    def _prepare_dataset(self, dataset, *arguments, **options):
        return dataset  # tokenized already, by utils/data/tokenizing.py

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "completion_ids", LENGTH, "row"]

    def measure_held_out(self) -> dict[str, float]:
        """Loss per completion token, perplexity and share of tokens guessed right, over all held-out tokens."""
        self.held_out_rows = self.score_dataset(self.eval_dataset)
        return summarise(self.held_out_rows)

    def score_dataset(self, dataset: Dataset) -> list[dict[str, float]]:
        """One row of metrics per row of the data set, in its order; memory grows with the batch, not with the data."""
        lengths = dataset[LENGTH][:]
        order = sorted(range(len(dataset)), key=lambda index: -lengths[index])
        size = self.args.per_device_eval_batch_size
        rows: dict[int, dict[str, float]] = {}
        for indices in self.share_of_batches([order[i : i + size] for i in range(0, len(order), size)]):
            stop_if_asked()
            inputs = self._prepare_inputs(self.data_collator([dataset[index] for index in indices]))
            rows |= dict(zip(indices, self._score_batch(inputs), strict=True))
        return self.merge_rows(rows)

    def _score_batch(self, inputs: Mapping[str, Tensor]) -> list[dict[str, float]]:
        model = self.model_wrapped if self.is_fsdp_enabled or self.is_deepspeed_enabled else self.model
        mask = completion_mask(inputs)
        scores = score_tokens(model, {**inputs, "completion_mask": mask}, with_right=True)
        columns = {"logps": scores.log_probs.sum(dim=1), "right": scores.right.sum(dim=1)}
        columns["tokens"] = mask[:, 1:].sum(dim=1)
        values = torch.stack([column.double() for column in columns.values()], dim=1).tolist()
        return [dict(zip(columns, row, strict=True)) for row in values]


def completion_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """1 on the tokens that are to be learnt, in the shape of `input_ids`."""
    return (batch["labels"] != -100).long()


def summarise(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over completion tokens: each token of the data weighs the same."""
    tokens = sum(row["tokens"] for row in rows)
    loss = -sum(row["logps"] for row in rows) / tokens
    return {
        "loss": loss,
        "perplexity": min(2.718281828459045 ** min(loss, 100.0), 1e30),
        "token_accuracy": sum(row["right"] for row in rows) / tokens,
        "rows": len(rows),
    }
