"""What the reference says of pairs: computed with each batch, or of all of them once, before training."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from heapq import nlargest
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..data.row_cache import flatten_rows
from ..distributed import gather, told_by_main
from ..engine.completions import CompletionScorer
from ..engine.counted import count_tokens
from ..engine.head import MARK, KeptLogits
from ..engine.memory import release_memory
from ..engine.scoring import Comparison, output_head
from ..runtime import is_main_process
from .batches import PAIR_IDS, REFERENCE_COLUMNS, PairCollator
from .in_batches import PairsInBatches
from .machine import Machine
from .reference_cache import hash_model, hash_rows, load_columns, save_columns

KEPT_BYTES = 2**27  # of each process, for the reference's hidden states
REFERENCE_ADAPTER = "ref"  # TRL's name for the frozen copy of an adapter that training continues


class ReferenceScores:
    """The reference's log-probs of pairs, and for evaluations its logits.

    The reference is the policy itself as it starts (`is_start`), a model of its own, a frozen copy of the adapter that
    training continues, or the base with the adapter switched off.
    """

    def __init__(self, machine: Machine, collator: PairCollator, scorer: CompletionScorer, is_start: bool) -> None:
        self.machine, self.collator, self.scorer, self.is_start = machine, collator, scorer, is_start
        self.in_batches = PairsInBatches(machine, collator, self._divide_kept)
        # Of batches of held-out pairs, where they are scored ahead; and those pairs.
        self._kept: dict[tuple[int, ...], KeptLogits] = {}
        self._held_out: Dataset | None = None
        self._columns: Tensor | None = None  # in an evaluation, the reference's head on the device

    def score(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The reference's summed log-probs of a batch's completions, shape (2 x pairs,), without gradient."""
        if REFERENCE_COLUMNS[0] in inputs:
            return torch.cat([inputs[name] for name in REFERENCE_COLUMNS])
        return self.compute(inputs)[0]

    def score_held_out(self, inputs: Mapping[str, Tensor], indices: list[int]) -> tuple[Tensor, KeptLogits | None]:
        """The same of held-out pairs, and its logits where they are known."""
        if REFERENCE_COLUMNS[0] not in inputs:
            return self.compute(inputs, keep=True)
        kept = self._kept.get(tuple(indices))
        if kept is not None:  # the head's weight, of all batches the same, is moved once
            kept = kept.at(self.machine.args.device, self._columns)
            self._columns = kept.columns
        return self.score(inputs), kept

    def finish_evaluation(self) -> None:
        """Lets go of what an evaluation put on the device."""
        self._columns = None

    def compute(self, inputs: Mapping[str, Tensor], keep: bool = False) -> tuple[Tensor, KeptLogits | None]:
        """The log-probs, computed now; and on request the logits, unless they are over another vocabulary."""
        passing = self.machine.is_sharded or self.is_start
        comparison = Comparison(keep=True, copied=passing) if keep and self.same_vocabulary() else None
        with (
            torch.no_grad(),
            self.machine.switches.nothing_recomputed(),
            self._active() as model,
        ):
            return self.scorer.sums(model, inputs, comparison)

    @contextlib.contextmanager
    def _active(self) -> Iterator[torch.nn.Module]:
        """The model that computes as the reference within the context."""
        own, policy = self.machine.reference, self.machine.policy
        if own is not None or self.is_start:
            yield own or policy
            return
        switches = self.machine.switches
        with switches.adapter(REFERENCE_ADAPTER if REFERENCE_ADAPTER in switches.model.peft_config else None):
            yield policy

    def same_vocabulary(self) -> bool:
        """Whether the next-token distributions of policy and reference are over the same tokens."""
        models = map(self.machine.unwrapped, self.machine.models())
        return len({model.config.get_text_config().vocab_size for model in models}) == 1

    def score_ahead(
        self, train: Dataset, held_out: Dataset | None, how: Mapping[str, Any], keep: bool = True
    ) -> tuple[Dataset, Dataset | None, bool]:
        """Scores every pair once, and lets go of a reference that is a model of its own.

        What was scored before, by the same reference on the same token ids, is read from the disk.

        Args:
            how: what decides how the reference computes, beside its weights, its config and its layout of batches.
            keep: whether the disk is read and written at all.

        Returns:
            The pairs with the reference's log-probs, and whether everything was found on the disk.
        """
        # Where weights are divided among processes none has all of them.
        key = self._key(how) if keep and is_main_process() and not self.machine.is_sharded else None
        train, found = self._with_scores(train, key)
        if held_out is not None:
            self._keep_logits(held_out)
            held_out, also_found = self._with_scores(held_out, key)
            found = found and also_found
        self._held_out, self.is_start = held_out, False
        self.machine.let_go_of_reference()
        release_memory()
        return train, held_out, found

    def _key(self, how: Mapping[str, Any]) -> str:
        model = self.machine.reference or self.machine.policy
        # A policy with an adapter also serves as reference with what of it is frozen.
        weights = [
            (name.removeprefix("base_model.model.").replace(".base_layer.", "."), value)
            for name, value in model.state_dict(keep_vars=True).items()
            if self.is_start or not getattr(value, "requires_grad", False)
        ]
        head = {"head": hasattr(output_head(model), MARK), "ld_alpha": self.scorer.ld_alpha}
        return hash_model(weights, model.config, {**how, **head})

    def _keep_logits(self, held_out: Dataset) -> None:
        """Keeps what the policy's divergence from the reference will be measured with: the reference's logits of all
        batches of held-out pairs, or of as many, evenly drawn, as KEPT_BYTES hold. They wait on the host."""
        if not self.same_vocabulary():
            return
        model, args = self.machine.unwrapped(self.machine.reference), self.machine.args
        tokens = [sum(map(count_tokens, held_out[name][:])) for name in ("chosen_ids", "rejected_ids")]
        config = model.config.get_text_config()
        width = config.hidden_size if hasattr(output_head(model), MARK) else config.vocab_size
        every = -(-4 * width * sum(tokens) // (KEPT_BYTES * args.world_size))
        kept: dict[tuple[int, ...], KeptLogits] = {}

        def keep(indices: list[int]) -> dict[int, Any]:
            _, logits = self.compute(self.in_batches.batch(held_out, indices), keep=True)
            columns = next(iter(kept.values())).columns if kept else None  # held once
            kept[tuple(indices)] = logits.at("cpu", columns)
            return {}

        self._held_out, batches = held_out, self.in_batches
        with self._computing(), batches.attending():
            own = batches.own_batches(held_out, self.collator.max_tokens, args.per_device_eval_batch_size)
            for indices in own[:: max(1, every)]:
                batches.within_memory(indices, keep)
        self._kept = kept

    def _divide_kept(self, indices: list[int], parts: list[list[int]]) -> None:
        """Divides what is kept of a batch that is scored in parts from here on."""
        kept = self._kept.get(tuple(indices))
        if kept is None or self._held_out is None:
            return
        pairs = self._held_out.select(indices)
        lengths = [count_tokens(ids) for name in ("chosen_ids", "rejected_ids") for ids in pairs[name]]
        places = torch.arange(sum(lengths)).split(lengths)  # of each completion's tokens among all of the batch
        begun = 0
        for part in parts:
            chosen, rejected = (places[at + begun : at + begun + len(part)] for at in (0, len(indices)))
            self._kept[tuple(part)] = dataclasses.replace(kept, states=kept.states[torch.cat([*chosen, *rejected])])
            begun += len(part)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Within the context models compute as in an evaluation."""
        policy = self.machine.policy
        was_training = policy.training
        policy.eval()
        with torch.no_grad(), self.machine.accelerator.autocast():
            yield
        policy.train(was_training)

    def _with_scores(self, dataset: Dataset, model_key: str | None) -> tuple[Dataset, bool]:
        """The data set with the reference's log-probs, and whether they were on the disk."""
        key = f"{model_key}-{hash_rows(dataset, PAIR_IDS)}" if model_key is not None else None
        columns = None
        if key is not None and is_main_process():
            columns = load_columns(key, REFERENCE_COLUMNS, len(dataset))
        columns = told_by_main(columns)
        found = columns is not None
        if columns is None:
            columns = self._score_all(dataset)
            if key is not None and is_main_process():
                save_columns(key, columns)
        dataset = flatten_rows(dataset)
        for name in REFERENCE_COLUMNS:
            dataset = dataset.add_column(name, columns[name])
        return dataset, found

    def _score_all(self, dataset: Dataset) -> dict[str, np.ndarray]:
        """The log-probs of every pair, in batches of their own: nothing is kept for a backward pass."""
        args = self.machine.args
        limit, most = self.collator.max_tokens, args.precompute_ref_batch_size
        if limit is None and most is None:
            sizes = self.collator.token_counts(dataset)
            longest = nlargest(args.per_device_train_batch_size, sizes)
            share = -(-sum(sizes) // args.world_size)
            limit = max(longest[0], min(4 * sum(longest), share))  # something for each process
        scores = np.zeros((len(REFERENCE_COLUMNS), len(dataset)))
        own = np.zeros(len(dataset), dtype=bool)  # what this process scored

        def score(indices: list[int]) -> dict[int, Any]:
            scored = self.score(self.in_batches.batch(dataset, indices)).double().view(2, -1)
            scores[:, indices], own[indices] = scored.cpu().numpy(), True
            return {}  # kept in 16 bytes a pair, not in a dictionary each

        with self._computing():
            self.in_batches.score(dataset, limit, most or len(dataset), score, "scoring the reference")
        for indices, values in gather((np.flatnonzero(own), scores[:, own])):
            scores[:, indices] = values
        return dict(zip(REFERENCE_COLUMNS, scores, strict=True))
