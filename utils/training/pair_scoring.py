"""Scoring pairs with policy and reference: for training, and for an evaluation that reads each held-out pair once."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..engine.completions import CompletionLogProbs, CompletionScorer
from ..engine.head import KeptLogits
from ..engine.memory import ran_out_of_memory, release_memory
from ..engine.scoring import Comparison
from ..engine.shared_prefix import shared_prefix_active
from ..errors import LocalError
from ..interruptions import stop_if_asked
from ..objectives.pairs import PairLogProbs
from .batches import REFERENCE_COLUMNS, consecutive_batches
from .metrics import DIVERGENCES, pair_metrics, summarise
from .run_folder import RunFolderTrainer

REFERENCE_ADAPTER = "ref"  # TRL's name for the frozen copy of an adapter that training continues


class PairScoring(RunFolderTrainer):
    """The part of the preference trainer that scores pairs, in the layout that its collator makes."""

    scorer: CompletionScorer
    starts_as_reference = False  # whether all weights of the policy, none of them trained yet, are the reference
    _most_scored: int | None = None  # pairs at once, since memory ran out
    _columns: Tensor | None = None  # in an evaluation, the reference's head on the device
    kept_reference: Mapping[tuple[int, ...], KeptLogits] = {}  # of batches of held-out pairs, where it is scored ahead

    def models(self) -> list[torch.nn.Module]:
        """The policy, and a reference that is a model of its own."""
        models = [model for model in (self.model, self.ref_model) if model is not None]
        return list(map(self.accelerator.unwrap_model, models)) if self.is_deepspeed_enabled else models

    def _attending(self):
        """The context in which models compute the layout of the batches."""
        if not self.data_collator.packs:
            return contextlib.nullcontext()
        stack = contextlib.ExitStack()
        for model in self.models():
            stack.enter_context(shared_prefix_active(model))
        return stack

    def score_reference(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The reference's summed log-probs of a batch's completions, shape (2 x pairs,), without gradient."""
        if REFERENCE_COLUMNS[0] in inputs:
            return torch.cat([inputs[name] for name in REFERENCE_COLUMNS])
        return self.compute_reference(inputs)[0]

    def compute_reference(self, inputs: Mapping[str, Tensor], keep: bool = False) -> tuple[Tensor, KeptLogits | None]:
        """The same, computed now; and on request its logits, unless they are over another vocabulary."""
        passing = self.is_fsdp_enabled or self.is_deepspeed_enabled or self.starts_as_reference
        comparison = Comparison(keep=True, copied=passing) if keep and self.same_vocabulary() else None
        with (
            torch.no_grad(),
            self.switches.nothing_recomputed(),
            self._reference_active() as model,
        ):
            return self.scorer.sums(model, inputs, comparison)

    @contextlib.contextmanager
    def _reference_active(self):
        """The model that computes as the reference within the context."""
        if self.ref_model is not None or self.starts_as_reference:
            yield self.ref_model or self.model
            return
        adapter = REFERENCE_ADAPTER if REFERENCE_ADAPTER in self.switches.model.peft_config else None
        with self.switches.adapter(adapter):
            yield self.model

    def same_vocabulary(self) -> bool:
        """Whether the next-token distributions of policy and reference are over the same tokens."""
        sizes = {
            model.config.get_text_config().vocab_size for model in map(self.accelerator.unwrap_model, self.models())
        }
        return len(sizes) == 1

    def _pair(self, policy: CompletionLogProbs, reference: Tensor) -> PairLogProbs:
        (chosen, rejected), (ref_chosen, ref_rejected) = policy.summed.chunk(2), reference.chunk(2)
        chosen_length, rejected_length = policy.length.chunk(2)
        chosen_nll = policy.mean_negative.chunk(2)[0]
        return PairLogProbs(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length, chosen_nll)

    def _losses(self, policy: CompletionLogProbs, pairs: PairLogProbs) -> Tensor:
        """The loss of each pair, shape (pairs,)."""
        losses = self.objective(pairs)
        if policy.weight is None:
            return losses
        chosen_weight, rejected_weight = policy.weight.chunk(2)
        return losses * chosen_weight * rejected_weight

    def measure_held_out(self) -> dict[str, float]:
        """Means over the held-out pairs; the pairs themselves stay in `held_out_rows`."""
        self.held_out_rows = self.score_dataset(self.eval_dataset)
        self._columns = None
        return summarise(self.held_out_rows)

    def score_start(self, dataset: Dataset, most: int) -> Tensor:
        """What a few pairs score before the first step, in batches of at most `most`; shape (2 x pairs, 5).

        A row for each completion, chosen first: its log-prob by the policy and by the reference, its tokens, the loss
        of its pair, and that loss if the two agreed.
        """
        model = self.model_wrapped if self.is_fsdp_enabled or self.is_deepspeed_enabled else self.model

        def score(indices: list[int]) -> dict[int, Any]:
            inputs = self._batch(dataset, indices)
            policy, reference = self.scorer.score(model, inputs), self.score_reference(inputs)
            pairs = self._pair(policy, reference)
            losses = [self._losses(policy, compared).repeat(2) for compared in (pairs, pairs.agreeing())]
            columns = (policy.summed, reference, policy.length, *losses)
            rows = torch.stack([column.double() for column in columns], dim=1).view(2, len(indices), -1)
            return {index: rows[:, place].tolist() for place, index in enumerate(indices)}

        with self._as_evaluated():
            rows = self._score_in_batches(dataset, self.max_tokens if most > 1 else None, most, score)
        return torch.tensor(rows, dtype=torch.float64).transpose(0, 1).flatten(0, 1)

    def score_dataset(self, dataset: Dataset) -> list[dict[str, float | None]]:
        """One row of metrics per pair, in the order of the data set. Memory grows with the batch, not with the data.

        Pairs of similar length share a batch, which saves padding and changes no pair's numbers.
        """
        model = self.model_wrapped if self.is_fsdp_enabled or self.is_deepspeed_enabled else self.model
        limit, most = self.max_tokens, self.args.per_device_eval_batch_size
        return self._score_in_batches(dataset, limit, most, lambda indices: self._score_batch(model, dataset, indices))

    def _score_in_batches(
        self, dataset: Dataset, limit: int | None, most: int, score: Callable[[list[int]], dict[int, dict[str, float]]]
    ) -> list[dict[str, float]]:
        """The rows that `score` gives for batches of at most `limit` tokens, else of `most` pairs, in order."""
        rows: dict[int, dict[str, float]] = {}
        with self._attending():
            for indices in self.share_of_batches(self._batches(dataset, limit, most)):
                stop_if_asked()
                rows |= self._score_within_memory(indices, score)
        return self.merge_rows(rows)

    def _score_within_memory(
        self, indices: list[int], score: Callable[[list[int]], dict[int, dict[str, float]]]
    ) -> dict[int, dict[str, float]]:
        """What `score` gives for a batch: where memory runs out, half by half, in this batch and all later ones.

        Raises:
            LocalError: a pair alone does not fit, or it is computed by several processes together.
        """
        rows: dict[int, dict[str, float]] = {}
        waiting, repeated_alone = [indices], False
        while waiting:
            part = waiting.pop(0)
            if self._most_scored is not None and len(part) > self._most_scored:
                waiting[:0] = self._halve(part)
                continue
            try:
                rows |= score(part)
                continue
            except Exception as error:
                if not ran_out_of_memory(error):
                    raise
            # Here, not above: the exception held everything that was computed.
            release_memory()
            together = self.is_fsdp_enabled or self.is_deepspeed_enabled
            if together or (len(part) == 1 and repeated_alone):
                raise LocalError(
                    f"memory ran out in scoring {len(part)} pairs without a backward pass. What helps: a lower "
                    "--max_length, --per_device_eval_batch_size or --max_tokens_per_batch, or a device with more memory"
                )
            waiting.insert(0, part)
            if len(part) == 1:  # once more, now that memory is in order
                repeated_alone = True
                continue
            self._most_scored = len(part) // 2
            self.warn(
                f"memory ran out in scoring {len(part)} pairs at once (evaluation, or the reference); from here on "
                f"at most {self._most_scored} are scored at once, with the same result"
            )
        return rows

    def _halve(self, indices: list[int]) -> list[list[int]]:
        """A batch in two; what is kept of the reference for it, too."""
        half = len(indices) // 2
        parts = [indices[:half], indices[half:]]
        kept = self.kept_reference.get(tuple(indices))
        if kept is not None:
            rows = self._rows_of(indices)
            for part, own in zip(parts, (rows[:half], rows[half:]), strict=True):
                chosen, rejected = zip(*own, strict=True)
                own_rows = torch.cat([*chosen, *rejected])
                own_kept = {tuple(part): dataclasses.replace(kept, states=kept.states[own_rows])}
                self.kept_reference = {**self.kept_reference, **own_kept}
        return parts

    def _rows_of(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Of each held-out pair where the tokens of chosen and rejected stand among all of their batch."""
        pairs = self.eval_dataset.select(indices)
        lengths = [len(ids) for name in ("chosen_ids", "rejected_ids") for ids in pairs[name]]
        places = torch.arange(sum(lengths)).split(lengths)
        return list(zip(places[: len(indices)], places[len(indices) :], strict=True))

    def _batches(self, dataset: Dataset, limit: int | None, most: int) -> list[list[int]]:
        """Indices of pairs of similar length, for batches of at most `limit` tokens, else of `most` pairs."""
        sizes = self.data_collator.token_counts(dataset)
        return consecutive_batches(
            sizes, limit or sum(sizes) * 2, most if limit is None else len(sizes), padded=not self.data_collator.packs
        )

    def held_out_batches(self) -> list[list[int]]:
        """The batches of held-out pairs that this process evaluates, the same each time."""
        batches = self._batches(self.eval_dataset, self.max_tokens, self.args.per_device_eval_batch_size)
        return self.share_of_batches(batches)

    def _batch(self, dataset: Dataset, indices: list[int]) -> dict[str, Any]:
        """The pairs with these indices, on the device."""
        return self._prepare_inputs(self.data_collator.whole([dataset[index] for index in indices]))

    def _on_device(self, logits: KeptLogits) -> KeptLogits:
        """What is kept of the reference for a batch; the head's weight, of all batches the same, is moved once."""
        moved = logits.at(self.args.device, self._columns)
        self._columns = moved.columns
        return moved

    def _score_batch(self, model, dataset: Dataset, indices: list[int]) -> dict[int, dict[str, float | None]]:
        """Metrics of the pairs with these indices; what does not apply to a pair is None."""
        inputs = self._batch(dataset, indices)
        if REFERENCE_COLUMNS[0] in inputs:
            reference, logits = self.score_reference(inputs), self.kept_reference.get(tuple(indices))
            logits = logits and self._on_device(logits)
        else:
            reference, logits = self.compute_reference(inputs, keep=True)
        policy = self.scorer.score(model, inputs, reference=logits)
        pairs = self._pair(policy, reference)
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
