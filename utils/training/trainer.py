"""The DPO trainer: TRL's DPOTrainer with the loss, the metrics and the evaluation computed pair by pair."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer

from ..data.lengths import longest_first, read_numbers
from ..data.tokenizing import LENGTH
from ..distributed import most_of
from ..engine.completions import CompletionScorer
from ..engine.kernel_proof import attention_calls, find_fault_of_kernel
from ..engine.last_layer import LeftOut, leave_out_prompts
from ..engine.memory import freed_memory_returned, ran_out_of_memory
from ..engine.proving import describe_error, find_gradient_mismatch, find_mismatch, most_of_trial
from ..engine.scoring import tokens_of
from ..errors import UserError
from ..models.loading import TRAINED_ADAPTER, Reference
from ..objectives.objective import Objective
from ..objectives.pairs import PairLogProbs
from .batches import (
    PAIR_IDS,
    REFERENCE_COLUMNS,
    UNCOUNTED,
    PairCollator,
    count_pairs,
    uncounted,
)
from .metrics import pair_metrics
from .pair_scoring import REFERENCE_ADAPTER
from .reference import ReferenceAhead
from .run_folder import RunFolderTrainer
from .within_memory import StepsWithinMemory

ROW_MULTIPLE = 32  # tokens: bfloat16 products on a CPU are up to a tenth slower at other lengths


def shortened(pair: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A pair of at most so many tokens of each part."""
    return pair | {name: pair[name][:tokens] for name in PAIR_IDS}


def _adapts(parts: dict[str, Any]) -> bool:
    return parts.get("peft_config") is not None or isinstance(parts["model"], PeftModel)


@contextlib.contextmanager
def _copied_without_a_start(model: torch.nn.Module) -> Iterator[None]:
    """Within the context TRL's frozen copy of an adapter is made without changing the base as the adapter itself did.

    The copy gets the adapter's values in any case. A start such as PiSSA's would take its part out of the base's
    weights once more, under the adapter that is trained, and layers would be repeated again.
    """
    config = getattr(model, "peft_config", {}).get(TRAINED_ADAPTER)
    without = {"init_lora_weights": False, "layer_replication": None}
    before = {name: getattr(config, name) for name in without if hasattr(config, name)}
    for name in before:
        setattr(config, name, without[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


class PreferenceTrainer(StepsWithinMemory, ReferenceAhead, RunFolderTrainer, DPOTrainer):
    """Direct preference optimization of tokenized pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`, `row`).

    Differs from its parent in what it computes with the log-probs: each pair weighs the same in its optimizer step
    whatever micro-batch or process it fell in, metrics are means over pairs, trained weights are float32, and the
    evaluation reads each held-out pair once.
    """

    counted = "pairs"

    def __init__(
        self,
        *,
        objective: Objective,
        reference: Reference,
        end_ids: frozenset[int],
        processing_class: PreTrainedTokenizerBase,
        **parts: Any,
    ):
        model, args = parts["model"], parts["args"]
        self.starts_as_reference = reference.model is None and not _adapts(parts)
        args.precompute_ref_log_probs = self.starts_as_reference  # else TRL loads the model once more
        divergence, args.f_divergence_type = (
            args.f_divergence_type,
            "reverse_kl",
        )  # TRL refuses it beside losses of ours
        with _copied_without_a_start(model):
            super().__init__(
                ref_model=reference.model,
                data_collator=PairCollator(pad_token_id=processing_class.pad_token_id),
                processing_class=processing_class,
                **parts,
            )
        self._freeze_reference_adapter()
        self.scorer = CompletionScorer(end_ids, args.ld_alpha, args.use_weighting)
        self.shared_prefix: bool | str = "not chosen"  # True, or the reason why not
        self.last_layer_in_part = False  # whether it leaves out prompts
        self._left_out: dict[torch.nn.Module, LeftOut] = {}  # what last layers leave out
        self.pair_by_pair: str | None = None  # on a GPU, why attention is not one call over the row
        args.precompute_ref_log_probs, args.f_divergence_type = False, divergence
        self.objective = objective

    def _freeze_reference_adapter(self) -> None:
        """Freezes the copy of an adapter that training continues; of those whose weights end in the adapter's name
        (IA3, LoKr), which its maker leaves as they were made, it makes the copy."""
        weights = dict(self.model.named_parameters())
        for name, parameter in weights.items():
            if name.endswith(f".{REFERENCE_ADAPTER}"):
                parameter.data.copy_(weights[f"{name.removesuffix(REFERENCE_ADAPTER)}{TRAINED_ADAPTER}"].data)
            if f".{REFERENCE_ADAPTER}." in f"{name}.":
                parameter.requires_grad_(False)

    def _precompute_ref_logps(self, dataset, *_):
        return dataset  # `precompute_reference` scores it

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset  # tokenized already, by utils/data/tokenizing.py

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*PAIR_IDS, *REFERENCE_COLUMNS, LENGTH, "row"]

    def count_items(self, batch: Mapping[str, Any]) -> int:
        """The pairs of a batch."""
        return count_pairs(batch)

    def tokens_of_rows(self) -> Sequence[int]:
        """What each pair that is trained on puts through the model."""
        return self.data_collator.token_counts(self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The micro-batch's share of the optimizer step's mean loss; a backward pass over it gives its gradient."""
        fills_up = inputs.pop(UNCOUNTED, False)
        computed, padded = tokens_of(inputs)
        self.tokens_computed, self.tokens_padded = self.tokens_computed + computed, self.tokens_padded + padded
        if self.args.gradient_checkpointing:
            self.switches.keep_last_layer()
        policy = self.scorer.score(model, inputs, with_auxiliary=self.aux_loss_enabled)
        pairs = self._pair(policy, self.score_reference(inputs))
        losses = self._losses(policy, pairs)
        if fills_up:  # policy and reference were computed in step with the other processes, for nothing else
            self.add_to_log({name: torch.zeros(()) for name in pair_metrics(pairs, losses, self.objective.beta)}, 0)
            return 0.0 * losses.sum()
        self.note_rows(inputs, losses)
        self._count(pairs, losses)
        share = self.share_of_step(num_items_in_batch)
        loss = losses.sum() * share
        if policy.auxiliary is not None:
            loss = loss + self.router_aux_loss_coef * policy.auxiliary * len(losses) * share
        return loss

    @freed_memory_returned()
    def choose_layout(self, wish: str) -> None:
        """Decides the layout of batches for --engine, and says in `shared_prefix` why where it is the padded one.

        The policy, and a reference that is a model of its own, must score the longest pair and one of middle length
        alike in both layouts.

        Raises:
            UserError: shared_prefix was asked for and the model does not compute it exactly.
        """
        order = longest_first(read_numbers(self.train_dataset, LENGTH))
        examples = [self.train_dataset[int(index)] for index in dict.fromkeys((order[0], order[len(order) // 2]))]
        brief = shortened(examples[-1], most_of_trial(self.model, rows=2, head=True))
        self.choose_head(self.data_collator.whole([brief]))
        self._choose_layout(wish, examples)
        self.compile_layers(self.data_collator.whole([brief]), self._left_out)
        self._choose_kernel(brief, examples)

    def _choose_layout(self, wish: str, examples: list[dict[str, Any]]) -> None:
        if wish == "padded":
            self.shared_prefix = "padded batches were asked for"
            return
        self.data_collator.flex = next(self.model.parameters()).device.type == "cuda"  # else it cannot be proven
        if self.args.device.type == "cpu" and self.args.bf16 and not self.aux_loss_enabled:
            self.data_collator.multiple = ROW_MULTIPLE
        self.data_collator.keeps = self.args.gradient_checkpointing and not self.compiles
        mismatch = self._find_mismatch_of_layout(examples)
        if mismatch is not None and self.data_collator.flex:
            self.pair_by_pair = mismatch
            self.data_collator.flex = False
            mismatch = self._find_mismatch_of_layout(examples)
        if mismatch is not None and wish == "shared_prefix":
            raise UserError(f"--engine shared_prefix: this model cannot use it: {mismatch}; pass auto or padded")
        self.shared_prefix = mismatch or True
        self.data_collator.packs = mismatch is None

    def device_to_come(self) -> torch.device | None:
        """The GPU that will compute, where the weights are not there yet: before they are sharded."""
        own = self.args.device
        return own if own.type == "cuda" and next(self.model.parameters()).device.type != "cuda" else None

    def _choose_kernel(self, brief: dict[str, Any], examples: list[dict[str, Any]]) -> None:
        """Chooses FlexAttention for a device that the models come to later, if it computes there what they ask for.

        A brief pair shows what that is; it is computed for a row of the examples.
        """
        device = self.device_to_come()
        if device is None or not self.data_collator.packs:
            return
        most = most_of_trial(self.model, rows=2)
        row = self.data_collator.packed([shortened(pair, most) for pair in examples])["layout"]
        batch = self.data_collator.packed([brief])
        try:
            calls = set().union(*(attention_calls(model, batch, self.trial()) for model in self.models()))
            fault = find_fault_of_kernel(calls, row.lengths, device, self.trial())
        except Exception as error:
            if ran_out_of_memory(error):
                raise
            fault = describe_error(error)  # of a process that holds no weights yet
        self.pair_by_pair = self.agree(fault)
        self.data_collator.flex = self.pair_by_pair is None

    def _find_mismatch_of_layout(self, examples: list[dict[str, Any]]) -> str | None:
        """Tries the layout with a last layer that leaves out prompts, then with a whole one; None when either does.

        Sets `last_layer_in_part`.
        """
        left_out = list(filter(None, map(leave_out_prompts, self.models())))
        mismatch = self._find_mismatch(examples)
        self.last_layer_in_part = bool(left_out) and mismatch is None
        for part in left_out:
            if mismatch is None:
                part.where_it_pays = True
            else:
                part.undo()
        self._left_out = {part.layer: part for part in left_out} if self.last_layer_in_part else {}
        return self._find_mismatch(examples) if left_out and mismatch is not None else mismatch

    def _find_mismatch(self, examples: list[dict[str, Any]]) -> str | None:
        """Why the models must not compute these pairs in one row, in any process; None when they may."""
        collator = self.data_collator

        def prove(find: Callable[..., str | None], model: torch.nn.Module, pairs: list[dict[str, Any]]) -> str | None:
            return find(model, collator.packed(pairs), collator.whole(pairs), self.trial())

        mismatch = next(filter(None, (prove(find_mismatch, model, examples) for model in self.models())), None)
        if mismatch is None and any(parameter.requires_grad for parameter in self.model.parameters()):
            brief = shortened(examples[-1], most_of_trial(self.model, rows=2))
            mismatch = prove(find_gradient_mismatch, self.model, [brief])
        return self.agree(mismatch)

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

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Forward and backward of a batch, in micro-batches under a limit of tokens; both attend in its layout."""
        with self._attending():
            return self.step_within_memory(model, inputs, num_items_in_batch)

    def compute_part(self, model, part, num_items_in_batch) -> Tensor:
        try:
            return super().training_step(model, part, num_items_in_batch)
        finally:
            if "layout" in part and part["layout"].kept:
                part["layout"].kept.clear()  # of layers that were not computed again, or not any more

    def in_step(self, parts: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Sharded models compute in step: where another process has more micro-batches, the first comes once more,
        to count for nothing."""
        if not (self.max_tokens and (self.is_fsdp_enabled or self.is_deepspeed_enabled)):
            return parts
        most = most_of(len(parts))
        return [*parts, *[uncounted(parts[0])] * (most - len(parts))]

    def _count(self, pairs: PairLogProbs, losses: Tensor) -> None:
        """Adds a micro-batch to the next log line."""
        rows = pair_metrics(pairs, losses, self.objective.beta)
        self.add_to_log({name: values.sum() for name, values in rows.items()}, len(losses))
