"""The reference's log-probs of all pairs, scored once before training or read from the disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from heapq import nlargest
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..data.row_cache import flatten_rows
from ..distributed import gather, told_by_main
from ..engine.head import MARK, KeptLogits
from ..engine.memory import release_memory
from ..engine.scoring import output_head
from ..runtime import is_main_process
from ..settings.training import Settings
from .batches import PAIR_IDS, REFERENCE_COLUMNS
from .pair_scoring import PairScoring
from .reference_cache import hash_model, hash_rows, load_columns, save_columns

KEPT_BYTES = 2**27  # of each process, for the reference's hidden states


def scores_ahead(settings: Settings, adapts: bool, pairs: int, processes: int) -> bool:
    """Whether the reference scores all pairs before training.

    As asked with --precompute_ref_log_probs. Else where that costs less than scoring in every step, or as much and lets
    go of a second model; and where a reference that stays would have to be rounded to 4 bits.

    Args:
        adapts: whether the policy is an adapter on its base, which then is the reference too.
        pairs: those that are trained on.
        processes: those that train.
    """
    training = settings.training
    if training.precompute_ref_log_probs is not None:
        return training.precompute_ref_log_probs
    if settings.trainer_fields.get("sync_ref_model"):
        return False
    named = settings.model.ref_model_name_or_path is not None
    if settings.model.use_4bit and not adapts and not named:
        return True
    step = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
    passes = training.num_train_epochs if training.max_steps <= 0 else training.max_steps * step / pairs
    own_model = named or not adapts
    return passes >= (1 if own_model else 2) and not settings.run.dry_run


class ReferenceAhead(PairScoring):
    """The part of the preference trainer that scores pairs with the reference before training."""

    @property
    def scored_ahead(self) -> bool:
        """Whether the pairs carry the reference's log-probs."""
        return REFERENCE_COLUMNS[0] in self.train_dataset.column_names

    def precompute_reference(self, how: Mapping[str, Any], keep: bool = True) -> bool:
        """Scores every pair with the reference once, and lets go of a reference that is a model of its own.

        What was scored before, by the same reference on the same token ids, is read from the disk.

        Args:
            how: what decides how the reference computes, beside its weights, its config and the layout of batches.
            keep: whether the disk is read and written at all.

        Returns:
            Whether everything was found on the disk.
        """
        key = None
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # there no process has all weights
        if keep and is_main_process() and not sharded:
            # A policy with an adapter also serves as reference with what of it is frozen.
            weights = [
                (name.removeprefix("base_model.model.").replace(".base_layer.", "."), value)
                for name, value in (self.ref_model or self.model).state_dict(keep_vars=True).items()
                if self.starts_as_reference or not getattr(value, "requires_grad", False)
            ]
            layout = {"shared_prefix": self.shared_prefix, "flex": self.data_collator.flex}
            layout["head"] = hasattr(output_head(self.ref_model or self.model), MARK)
            layout["last_layer"] = self.last_layer_in_part
            if self.compiles:
                layout["compiled"] = True
            how = {**how, **layout, "ld_alpha": self.ld_alpha}
            key = hash_model(weights, (self.ref_model or self.model).config, how)
        self.train_dataset, found = self._with_reference(self.train_dataset, key)
        if self.eval_dataset is not None:
            self._keep_reference()
            self.eval_dataset, also_found = self._with_reference(self.eval_dataset, key)
            found = found and also_found
        self.accelerator._models[:] = [model for model in self.accelerator._models if model is not self.ref_model]
        self.ref_model, self.starts_as_reference = None, False
        release_memory()
        return found

    def _keep_reference(self) -> None:
        """Keeps what the policy's divergence from the reference will be measured with: the reference's logits of all
        batches of held-out pairs, or of as many, evenly drawn, as KEPT_BYTES hold. They wait on the host."""
        if not self.same_vocabulary():
            return
        model = self.accelerator.unwrap_model(self.ref_model or self.model)
        tokens = [
            sum(map(len, self.eval_dataset["chosen_ids"][:])),
            sum(map(len, self.eval_dataset["rejected_ids"][:])),
        ]
        config = model.config.get_text_config()
        width = config.hidden_size if hasattr(output_head(model), MARK) else config.vocab_size
        every = -(-4 * width * sum(tokens) // (KEPT_BYTES * self.args.world_size))
        kept: dict[tuple[int, ...], KeptLogits] = {}

        def keep(indices: list[int]) -> dict[int, dict[str, float]]:
            _, logits = self.compute_reference(self._batch(self.eval_dataset, indices), keep=True)
            columns = next(iter(kept.values())).columns if kept else None  # held once
            kept[tuple(indices)] = logits.at("cpu", columns)
            return {}

        with self._computing(), self._attending():
            for indices in self.held_out_batches()[:: max(1, every)]:
                self._score_within_memory(indices, keep)
        self.kept_reference = kept

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Within the context models compute as in an evaluation."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            yield
        self.model.train(was_training)

    def _with_reference(self, dataset: Dataset, model_key: str | None) -> tuple[Dataset, bool]:
        """The data set with the reference's log-probs, and whether they were on the disk."""
        key = f"{model_key}-{hash_rows(dataset, PAIR_IDS)}" if model_key is not None else None
        columns = None
        if key is not None and is_main_process():
            columns = load_columns(key, REFERENCE_COLUMNS, len(dataset))
        columns = told_by_main(columns)
        found = columns is not None
        if columns is None:
            columns = self._score_with_reference(dataset)
            if key is not None and is_main_process():
                save_columns(key, columns)
        dataset = flatten_rows(dataset)
        for name in REFERENCE_COLUMNS:
            dataset = dataset.add_column(name, columns[name])
        return dataset, found

    def _score_with_reference(self, dataset: Dataset) -> dict[str, np.ndarray]:
        """The reference's log-probs of every pair, in batches of their own: nothing is kept for a backward pass."""
        limit, most = self.max_tokens, self.args.precompute_ref_batch_size
        if limit is None and most is None:
            sizes = self.data_collator.token_counts(dataset)
            longest = nlargest(self.args.per_device_train_batch_size, sizes)
            share = -(-sum(sizes) // self.args.world_size)
            limit = max(longest[0], min(4 * sum(longest), share))  # something for each process
        scores = np.zeros((len(REFERENCE_COLUMNS), len(dataset)))
        own = np.zeros(len(dataset), dtype=bool)  # what this process scored

        def score(indices: list[int]) -> dict[int, dict[str, float]]:
            scored = self.score_reference(self._batch(dataset, indices)).double().view(2, -1)
            scores[:, indices], own[indices] = scored.cpu().numpy(), True
            return {}  # kept in 16 bytes a pair, not in a dictionary each

        with self._computing():
            self._score_in_batches(dataset, limit, most or len(dataset), score)
        for indices, values in gather((np.flatnonzero(own), scores[:, own])):
            scores[:, indices] = values
        return dict(zip(REFERENCE_COLUMNS, scores, strict=True))
