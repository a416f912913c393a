"""The DPO trainer: TRL's DPOTrainer with the loss, the metrics and the evaluation computed pair by pair."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from utils.data.tokenizing import LENGTH
from utils.errors import UserError
from utils.models.loading import Reference
from utils.models.proving import find_gradient_mismatch, find_mismatch
from utils.models.scoring import score_tokens, tokens_of
from utils.models.shared_prefix import shared_prefix_active
from utils.training.batches import (
    PAIR_IDS,
    REFERENCE_COLUMNS,
    PairCollator,
    consecutive_batches,
    count_pairs,
    parts_of,
)
from utils.training.losses import Divergence, LossParameters, Objective, PairLogProbs
from utils.training.metrics import pair_metrics, summarise
from utils.training.reference import ReferenceAhead
from utils.training.run_folder import RunFolderTrainer

UNCOUNTED = "uncounted"  # the key of a micro-batch that is computed and counts for nothing
ROW_MULTIPLE = 32  # tokens: bfloat16 products on a CPU are up to a tenth slower at other lengths
REFERENCE_ADAPTER = "ref"  # TRL's name for the frozen copy of an adapter that training continues


@dataclass(frozen=True)
class CompletionLogProbs:
    """What one forward pass says of 2 x pairs completions, chosen first: each tensor has shape (2 x pairs,)."""

    summed: Tensor  # nats, in float32, weighted by ld_alpha where it is set
    mean_negative: Tensor  # nats per token, unweighted
    length: Tensor  # tokens
    ended: Tensor  # whether the last token is an end-of-text token
    weight: Tensor | None  # WPO weights, where they are used
    auxiliary: Tensor | None  # load-balancing loss of a mixture of experts, a scalar


def sum_log_probs(log_probs: Tensor, mask: Tensor, ld_alpha: float | None) -> Tensor:
    """Summed log-probs of 2 x pairs completions, shape (2 x pairs,), in float32.

    With `ld_alpha` a, tokens beyond the length of the pair's shorter completion count a instead of 1 (LD-DPO, arXiv
    2409.06411).

    Args:
        log_probs: shape (2 x pairs, length), zero outside `mask`.
        mask: the same shape, 1 on completion tokens.
    """
    log_probs = log_probs.float()
    if ld_alpha is None:
        return log_probs.sum(dim=1)
    position, length = mask.cumsum(dim=1), mask.sum(dim=1)
    shorter = torch.minimum(*length.chunk(2)).repeat(2)
    return (log_probs * torch.where(position <= shorter.unsqueeze(1), 1.0, ld_alpha)).sum(dim=1)


def keep_last_layer(model: torch.nn.Module) -> None:
    """Leaves the last layer out of gradient checkpointing: the backward pass begins with it, and needs at once what
    would be thrown away."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if layers:
        layers[-1].gradient_checkpointing = False


class PreferenceTrainer(ReferenceAhead, RunFolderTrainer, DPOTrainer):
    """Direct preference optimization of tokenized pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`, `row`).

    Differs from its parent in what it computes with the log-probs: each pair weighs the same in its optimizer step
    whatever micro-batch or process it fell in, metrics are means over pairs, trained weights are float32, and the
    evaluation reads each held-out pair once.
    """

    counted = "pairs"

    def __init__(
        self, *, reference: Reference, end_ids: frozenset[int], processing_class: PreTrainedTokenizerBase, **parts: Any
    ):
        super().__init__(
            ref_model=reference.model,
            data_collator=PairCollator(pad_token_id=processing_class.pad_token_id),
            processing_class=processing_class,
            **parts,
        )
        self._freeze_reference_adapter()
        self.end_ids = torch.tensor(sorted(end_ids))
        self.shared_prefix: bool | str = "not chosen"  # True, or the reason why not
        self.pair_by_pair: str | None = None  # on a GPU, why attention is not one call over the row
        args = self.args
        parameters = LossParameters(
            beta=args.beta,
            label_smoothing=args.label_smoothing,
            discopop_tau=args.discopop_tau,
            divergence=Divergence(args.f_divergence_type, args.f_alpha_divergence_coef),
        )
        self.objective = Objective(tuple(args.loss_type), tuple(self.loss_weights), parameters)

    def _freeze_reference_adapter(self) -> None:
        for name, parameter in self.model.named_parameters():
            if f".{REFERENCE_ADAPTER}." in name:
                parameter.requires_grad_(False)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset  # tokenized already, by utils/data/tokenizing.py

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*PAIR_IDS, *REFERENCE_COLUMNS, LENGTH]

    def count_items(self, batch: Mapping[str, Any]) -> int:
        """The pairs of a batch."""
        return count_pairs(batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The micro-batch's share of the optimizer step's mean loss; a backward pass over it gives its gradient."""
        uncounted = inputs.pop(UNCOUNTED, False)
        computed, padded = tokens_of(inputs)
        self.tokens_computed, self.tokens_padded = self.tokens_computed + computed, self.tokens_padded + padded
        if self.args.gradient_checkpointing:
            keep_last_layer(self.model)
        policy = self.score_completions(model, inputs, with_auxiliary=self.aux_loss_enabled)
        pairs = self._pair(policy, inputs)
        losses = self._losses(policy, pairs)
        if uncounted:  # policy and reference were computed in step with the other processes, for nothing else
            return 0.0 * losses.sum()
        self._count(pairs, losses)
        share = self.share_of_step(num_items_in_batch)
        loss = losses.sum() * share
        if policy.auxiliary is not None:
            loss = loss + self.router_aux_loss_coef * policy.auxiliary * len(losses) * share
        return loss

    def choose_layout(self, wish: str) -> None:
        """Decides the layout of batches for --engine, and says in `shared_prefix` why where it is the padded one.

        The policy, and a reference that is a model of its own, must score the longest pair and one of middle length
        alike in both layouts.

        Raises:
            UserError: shared_prefix was asked for and the model does not compute it exactly.
        """
        lengths = self.train_dataset[LENGTH][:]
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        examples = [self.train_dataset[index] for index in dict.fromkeys((order[0], order[len(order) // 2]))]
        self.choose_head(self.data_collator.whole(examples[-1:]))
        if wish == "padded":
            self.shared_prefix = "padded batches were asked for"
            return
        self.data_collator.flex = next(self.model.parameters()).device.type == "cuda"  # else it cannot be proven
        if self.args.device.type == "cpu" and self.args.bf16 and not self.aux_loss_enabled:
            self.data_collator.multiple = ROW_MULTIPLE
        mismatch = self._find_mismatch(examples)
        if mismatch is not None and self.data_collator.flex:
            self.pair_by_pair = mismatch
            self.data_collator.flex = False
            mismatch = self._find_mismatch(examples)
        if mismatch is not None and wish == "shared_prefix":
            raise UserError(f"--engine shared_prefix: this model cannot use it: {mismatch}; pass auto or padded")
        self.shared_prefix = mismatch or True
        self.data_collator.packs = mismatch is None

    def _find_mismatch(self, examples: list[dict[str, Any]]) -> str | None:
        """Why the models must not compute these pairs in one row, in any process; None when they may."""
        collator = self.data_collator

        def prove(find: Callable[..., str | None], model: torch.nn.Module, pairs: list[dict[str, Any]]) -> str | None:
            return find(model, collator.packed(pairs), collator.whole(pairs), self.trial())

        mismatch = next(filter(None, (prove(find_mismatch, model, examples) for model in self.models())), None)
        if mismatch is None:
            mismatch = prove(find_gradient_mismatch, self.model, examples[-1:])
        if self.args.world_size > 1:
            verdicts: list[Any] = [None] * self.args.world_size
            torch.distributed.all_gather_object(verdicts, mismatch)
            if self.is_fsdp_enabled:
                verdicts = verdicts[:1]  # the others may hold no weights yet
            mismatch = next((verdict for verdict in verdicts if verdict is not None), None)
        return mismatch

    def limit_tokens(self, most: int) -> None:
        """Makes micro-batches of at most `most` tokens, once the layout is chosen.

        Raises:
            UserError: a pair alone has more.
        """
        longest = max(
            size
            for rows in (self.train_dataset, self.eval_dataset)
            if rows
            for size in self.data_collator.token_counts(rows)
        )
        if longest > most:
            raise UserError(
                f"--max_tokens_per_batch is {most}, but the longest pair alone takes {longest} tokens "
                f"({'prompt, chosen and rejected' if self.data_collator.packs else 'two padded rows'}): "
                f"raise it to {longest}, or lower --max_length"
            )
        self.data_collator.max_tokens = most

    @property
    def max_tokens(self) -> int | None:
        """The limit of tokens per micro-batch, where there is one."""
        return self.data_collator.max_tokens

    def _attending(self):
        """The context in which models compute the layout of the batches."""
        if not self.data_collator.packs:
            return contextlib.nullcontext()
        stack = contextlib.ExitStack()
        for model in self.models():
            stack.enter_context(shared_prefix_active(model))
        return stack

    def models(self) -> list[torch.nn.Module]:
        """The policy, and a reference that is a model of its own."""
        return [model for model in (self.model, self.ref_model) if model is not None]

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Forward and backward of a batch, in micro-batches under a limit of tokens; both attend in its layout."""
        parts = self._as_many_in_each_process(parts_of(inputs))
        losses = []
        with self._attending():
            for number, part in enumerate(parts, 1):
                # Processes exchange their gradients once, with the last micro-batch.
                waits = self.accelerator.no_sync(model) if number < len(parts) else contextlib.nullcontext()
                with waits:
                    losses.append(super().training_step(model, part, num_items_in_batch))
        return torch.stack(losses).sum()

    def _as_many_in_each_process(self, parts: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Sharded models compute in step: where another process has more micro-batches, the first comes once more,
        to count for nothing."""
        if not (self.max_tokens and (self.is_fsdp_enabled or self.is_deepspeed_enabled)):
            return parts
        most = max(self.accelerator.gather(torch.tensor([len(parts)], device=self.args.device)).tolist())
        return [*parts, *[{**parts[0], UNCOUNTED: True}] * (most - len(parts))]

    def score_completions(
        self, model, inputs: Mapping[str, Tensor], with_auxiliary: bool = False
    ) -> CompletionLogProbs:
        """The log-probs that `model` gives the completions of a batch."""
        scores = score_tokens(model, inputs, with_squares=self.use_weighting, with_auxiliary=with_auxiliary)
        length = scores.mask.sum(dim=1)
        weight = None
        if scores.log_sum_sq_probs is not None:
            # WPO (arXiv 2406.11827, eq. 2): how likely a completion is under the policy, per token.
            aligned = (scores.log_probs - scores.log_sum_sq_probs).detach().sum(dim=1)
            weight = torch.exp(aligned / length)
        return CompletionLogProbs(
            summed=sum_log_probs(scores.log_probs, scores.mask, self.ld_alpha),
            mean_negative=-scores.log_probs.sum(dim=1) / length,
            length=length,
            ended=torch.isin(scores.last_ids, self.end_ids.to(scores.last_ids.device)),
            weight=weight,
            auxiliary=scores.auxiliary,
        )

    def score_reference(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The reference's summed log-probs of a batch's completions, shape (2 x pairs,), without gradient."""
        if REFERENCE_COLUMNS[0] in inputs:
            return torch.cat([inputs[name] for name in REFERENCE_COLUMNS])
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self._reference_active() as model,
        ):
            scores = score_tokens(model, inputs)
            return sum_log_probs(scores.log_probs, scores.mask, self.ld_alpha)

    @contextlib.contextmanager
    def _reference_active(self):
        """The model that computes as the reference within the context."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        unwrapped = self.accelerator.unwrap_model(self.model)
        adapter = REFERENCE_ADAPTER if REFERENCE_ADAPTER in unwrapped.peft_config else None
        with use_adapter(unwrapped, adapter_name=adapter):
            yield self.model

    def _pair(self, policy: CompletionLogProbs, inputs: Mapping[str, Tensor]) -> PairLogProbs:
        reference = self.score_reference(inputs)
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

    def _count(self, pairs: PairLogProbs, losses: Tensor) -> None:
        """Adds a micro-batch to the next log line."""
        rows = pair_metrics(pairs, losses, self.objective.parameters.beta)
        self.add_to_log({name: values.sum() for name, values in rows.items()}, len(losses))

    def measure_held_out(self) -> dict[str, float]:
        """Means over the held-out pairs; the pairs themselves stay in `held_out_rows`."""
        self.held_out_rows = self.score_dataset(self.eval_dataset)
        return summarise(self.held_out_rows)

    def score_dataset(self, dataset: Dataset) -> list[dict[str, float]]:
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
        sizes = self.data_collator.token_counts(dataset)
        batches = consecutive_batches(
            sizes, limit or sum(sizes) * 2, most if limit is None else len(sizes), padded=not self.data_collator.packs
        )
        rows: dict[int, dict[str, float]] = {}
        with self._attending():
            for indices in self.share_of_batches(batches):
                rows |= score(indices)
        return self.merge_rows(rows)

    def _batch(self, dataset: Dataset, indices: list[int]) -> dict[str, Any]:
        """The pairs with these indices, on the device."""
        return self._prepare_inputs(self.data_collator.whole([dataset[index] for index in indices]))

    def _score_batch(self, model, dataset: Dataset, indices: list[int]) -> dict[int, dict[str, float]]:
        """Metrics of the pairs with these indices."""
        inputs = self._batch(dataset, indices)
        policy = self.score_completions(model, inputs)
        pairs = self._pair(policy, inputs)
        columns = pair_metrics(pairs, self._losses(policy, pairs), self.objective.parameters.beta)
        columns |= {"ref_chosen_logps": pairs.ref_chosen, "ref_rejected_logps": pairs.ref_rejected}
        columns |= {"chosen_tokens": pairs.chosen_length, "rejected_tokens": pairs.rejected_length}
        columns["chosen_ends"] = policy.ended.chunk(2)[0]
        values = torch.stack([column.double() for column in columns.values()], dim=1).tolist()
        return {i: dict(zip(columns, row, strict=True)) for i, row in zip(indices, values, strict=True)}
