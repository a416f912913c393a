"""Preference training as a task: the loss of a micro-batch of pairs, and every held-out pair scored once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..data.tokenizing import LENGTH
from ..engine.completions import CompletionLogProbs, CompletionScorer
from ..engine.scoring import tokens_of
from ..objectives.objective import Objective
from ..objectives.pairs import PairLogProbs
from .batches import PAIR_IDS, REFERENCE_COLUMNS, UNCOUNTED, PairCollator, count_pairs
from .in_batches import Row
from .machine import Machine
from .metrics import DIVERGENCES, pair_metrics, summarise
from .reference import ReferenceScores
from .tally import StepTally


class PairTask:
    """Scores pairs with policy and reference, in the layout that the collator makes. Every pair weighs the same in its
    optimizer step, whatever micro-batch or process it fell in."""

    counted = "pairs"
    columns: Sequence[str] = (*PAIR_IDS, *REFERENCE_COLUMNS, LENGTH, "row")  # that batches are made of

    def __init__(
        self,
        machine: Machine,
        tally: StepTally,
        collator: PairCollator,
        objective: Objective,
        scorer: CompletionScorer,
        reference: ReferenceScores,
    ) -> None:
        self.machine, self.tally, self.collator = machine, tally, collator
        self.objective, self.scorer, self.reference = objective, scorer, reference

    def count_items(self, batch: Mapping[str, Any]) -> int:
        """The pairs of a batch."""
        return count_pairs(batch)

    def tokens_of_rows(self, dataset: Dataset) -> Sequence[int]:
        """What each pair puts through the model."""
        return self.collator.token_counts(dataset)

    def loss(self, model: torch.nn.Module, inputs: dict[str, Any], share: Tensor, auxiliary: float | None) -> Tensor:
        """The micro-batch's share of the optimizer step's mean loss; a backward pass over it gives its gradient.

        Args:
            share: what one pair weighs.
            auxiliary: what the load-balancing loss of a mixture of experts weighs; None without.
        """
        fills_up = inputs.pop(UNCOUNTED, False)
        self.tally.note_tokens(*tokens_of(inputs))
        policy = self.scorer.score(model, inputs, with_auxiliary=auxiliary is not None)
        pairs = _pair(policy, self.reference.score(inputs))
        losses = self._losses(policy, pairs)
        metrics = pair_metrics(pairs, losses, self.objective.beta)
        if fills_up:  # policy and reference were computed in step with the other processes, for nothing else
            self.tally.add({name: torch.zeros(()) for name in metrics}, 0)
            return 0.0 * losses.sum()
        self.tally.note_rows(inputs, losses)
        self.tally.add({name: values.sum() for name, values in metrics.items()}, len(losses))
        loss = losses.sum() * share
        if policy.auxiliary is not None and auxiliary is not None:
            loss = loss + auxiliary * policy.auxiliary * len(losses) * share
        return loss

    def score(self, dataset: Dataset) -> list[Row]:
        """One row of metrics per pair, in the order of the data set; what does not apply to a pair is None.

        Pairs of similar length share a batch, which saves padding and changes no pair's numbers.
        """
        model, most = self.machine.called, self.machine.args.per_device_eval_batch_size
        rows = self.reference.in_batches.score(
            dataset, self.collator.max_tokens, most, lambda indices: self._score_batch(model, dataset, indices)
        )
        self.reference.finish_evaluation()
        return rows

    def summarise(self, rows: list[Row]) -> dict[str, float]:
        """Means over the pairs."""
        return summarise(rows)

    def score_start(self, dataset: Dataset, most: int) -> Tensor:
        """What a few pairs score before the first step, in batches of at most `most`; shape (2 x pairs, 5).

        A row for each completion, chosen first: its log-prob by the policy and by the reference, its tokens, the loss
        of its pair, and that loss if the two agreed.
        """
        model, in_batches = self.machine.called, self.reference.in_batches

        def score(indices: list[int]) -> dict[int, Any]:
            inputs = in_batches.batch(dataset, indices)
            policy, reference = self.scorer.score(model, inputs), self.reference.score(inputs)
            pairs = _pair(policy, reference)
            losses = [self._losses(policy, compared).repeat(2) for compared in (pairs, pairs.agreeing())]
            columns = (policy.summed, reference, policy.length, *losses)
            rows = torch.stack([column.double() for column in columns], dim=1).view(2, len(indices), -1)
            return {index: rows[:, place].tolist() for place, index in enumerate(indices)}

        with self.machine.evaluating():
            rows = in_batches.score(dataset, self.collator.max_tokens if most > 1 else None, most, score)
        return torch.tensor(rows, dtype=torch.float64).transpose(0, 1).flatten(0, 1)

    def _losses(self, policy: CompletionLogProbs, pairs: PairLogProbs) -> Tensor:
        """The loss of each pair, shape (pairs,)."""
        losses = self.objective(pairs)
        if policy.weight is None:
            return losses
        chosen_weight, rejected_weight = policy.weight.chunk(2)
        return losses * chosen_weight * rejected_weight

    def _score_batch(self, model: torch.nn.Module, dataset: Dataset, indices: list[int]) -> dict[int, Row]:
        """Metrics of the pairs with these indices."""
        inputs = self.reference.in_batches.batch(dataset, indices)
        reference, logits = self.reference.score_held_out(inputs, indices)
        policy = self.scorer.score(model, inputs, reference=logits)
        pairs = _pair(policy, reference)
        columns = pair_metrics(pairs, self._losses(policy, pairs), self.objective.beta)
        columns |= {"ref_chosen_logps": pairs.ref_chosen, "ref_rejected_logps": pairs.ref_rejected}
        columns["chosen_ends"], columns["rejected_ends"] = policy.ended.chunk(2)
        columns["chosen_end_prob"] = policy.end_prob.chunk(2)[0]
        if policy.divergence is not None:
            columns |= zip(DIVERGENCES, policy.divergence.chunk(2), strict=True)
        values = torch.stack([column.double() for column in columns.values()], dim=1).tolist()
        rows = {index: dict(zip(columns, row, strict=True)) for index, row in zip(indices, values, strict=True)}
        for row in rows.values():
            if not row["chosen_ends"]:
                row["chosen_end_prob"] = None
        return rows


def _pair(policy: CompletionLogProbs, reference: Tensor) -> PairLogProbs:
    (chosen, rejected), (ref_chosen, ref_rejected) = policy.summed.chunk(2), reference.chunk(2)
    chosen_length, rejected_length = policy.length.chunk(2)
    chosen_nll = policy.mean_negative.chunk(2)[0]
    return PairLogProbs(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length, chosen_nll)
