"""Supervised fine-tuning as a task: the loss of a micro-batch of rows, and every held-out row scored once."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from trl.trainer.utils import pad

from ..data.lengths import read_numbers
from ..data.tokenizing import LENGTH, SFT_COLUMNS
from ..engine.counted import plain_ids
from ..engine.memory import freed_memory_returned
from ..engine.proving import most_of_trial
from ..engine.scoring import score_tokens
from ..interruptions import stop_if_asked
from ..progress import phase
from .batches import ROWS, TOKENS, UNCOUNTED, uncounted
from .compiling import LayerCompiler
from .in_batches import merge_rows, share_of_batches
from .machine import Machine
from .tally import StepTally


class CompletionCollator:
    """Pads rows of `prompt_ids` and `completion_ids`; only completion tokens are labels."""

    filler: Sequence[dict[str, Any]] = ()  # a row for a process that has none left in a step

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if not examples:
            return uncounted(self(self.filler))
        rows = [(row["prompt_ids"], row["completion_ids"]) for row in examples]
        ids = [torch.tensor(prompt + plain_ids(completion)) for prompt, completion in rows]
        labels = [
            torch.tensor([-100] * len(prompt) + [token if token >= 0 else -100 for token in completion])
            for prompt, completion in rows
        ]
        return {
            "input_ids": pad(ids, padding_value=self.pad_token_id, padding_side="right"),
            "attention_mask": pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side="right"),
            "labels": pad(labels, padding_value=-100, padding_side="right"),
            ROWS: [row["row"] for row in examples if "row" in row],
            TOKENS: sum(map(len, ids)),
        }


class CompletionTask:
    """Cross-entropy of the completions' tokens, which alone are put to the output head, once. Every token weighs the
    same in its optimizer step, whatever micro-batch or process it fell in.

    With `dft` each token is weighted by its own probability (arXiv 2508.05629, eq. 9).
    """

    counted = "tokens"
    columns: Sequence[str] = ("prompt_ids", "completion_ids", LENGTH, "row")  # that batches are made of

    def __init__(self, machine: Machine, tally: StepTally, collator: CompletionCollator, dft: bool) -> None:
        self.machine, self.tally, self.collator, self.dft = machine, tally, collator, dft

    @freed_memory_returned()
    def choose_head(self, rows: Dataset, compiler: LayerCompiler) -> None:
        """Chooses how the output head is applied, by a row of middle length, and has layers compiled."""
        order = np.argsort(read_numbers(rows, LENGTH), kind="stable")
        row, most = rows[int(order[len(order) // 2])], most_of_trial(self.machine.policy, rows=1, head=True)
        batch = self.collator([row | {name: row[name][:most] for name in ("prompt_ids", *SFT_COLUMNS)}])
        batch = {**batch, "completion_mask": completion_mask(batch)}
        self.machine.choose_head(batch)
        compiler.compile(batch)

    def count_items(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The completion tokens of a batch that something stands before. Stays on the device."""
        counted = completion_mask(batch)[:, 1:].sum()
        return torch.zeros_like(counted) if UNCOUNTED in batch else counted

    def tokens_of_rows(self, dataset: Dataset) -> Sequence[int]:
        """What each row puts through the model."""
        return array("q", read_numbers(dataset, LENGTH).astype("int64").tobytes())

    def loss(self, model: torch.nn.Module, inputs: dict[str, Any], share: Tensor, auxiliary: float | None) -> Tensor:
        """The micro-batch's share of the optimizer step's mean over completion tokens.

        Args:
            share: what one token weighs.
            auxiliary: what the load-balancing loss of a mixture of experts weighs; None without.
        """
        fills_up = inputs.pop(UNCOUNTED, False)
        self.tally.note_tokens(inputs["input_ids"].numel(), inputs["input_ids"].numel())
        mask = completion_mask(inputs)
        scores = score_tokens(
            model, {**inputs, "completion_mask": mask}, with_right=True, with_auxiliary=auxiliary is not None
        )
        losses = -scores.log_probs
        if self.dft:
            losses = losses * scores.log_probs.detach().exp()
        if fills_up:
            self.tally.add({"token_accuracy": torch.zeros(())}, 0)
            return 0.0 * losses.sum()
        self.tally.note_rows(inputs, losses.sum(dim=1))
        count = self.count_items(inputs)
        self.tally.add({"token_accuracy": scores.right.sum()}, count)
        loss = losses.sum() * share
        if scores.auxiliary is not None and auxiliary is not None:
            loss = loss + auxiliary * scores.auxiliary * count * share
        return loss

    def score(self, dataset: Dataset) -> list[dict[str, float]]:
        """One row of metrics per row of the data set, in its order; memory grows with the batch, not with the data."""
        lengths, args, model = dataset[LENGTH][:], self.machine.args, self.machine.called
        order = sorted(range(len(dataset)), key=lambda index: -lengths[index])
        size = args.per_device_eval_batch_size
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        rows: dict[int, dict[str, float]] = {}
        own = share_of_batches(batches, args.process_index, args.world_size)
        with phase("evaluating", sum(map(len, own)), "rows") as shown:
            for indices in own:
                stop_if_asked()
                inputs = self.machine.on_device(self.collator([dataset[index] for index in indices]))
                rows |= dict(zip(indices, _score_batch(model, inputs), strict=True))
                shown.advance(len(indices))
        return merge_rows(rows)

    def summarise(self, rows: list[dict[str, float]]) -> dict[str, float]:
        """Loss per completion token, perplexity and share of tokens guessed right, over all tokens of the rows."""
        return summarise(rows)


def _score_batch(model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> list[dict[str, float]]:
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
