"""How batches of pairs are laid out: shared prefixes where the models are proven to compute them exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset

from ..data.lengths import longest_first, read_numbers
from ..data.tokenizing import LENGTH
from ..engine.kernel_proof import attention_calls, find_fault_of_kernel
from ..engine.last_layer import LeftOut, leave_out_prompts
from ..engine.memory import freed_memory_returned, ran_out_of_memory
from ..engine.proving import describe_error, find_gradient_mismatch, find_mismatch, most_of_trial
from ..errors import UserError
from .batches import PAIR_IDS, PairCollator
from .compiling import LayerCompiler
from .machine import Machine

ROW_MULTIPLE = 32  # tokens: bfloat16 products on a CPU are up to a tenth slower at other lengths


def shortened(pair: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A pair of at most so many tokens of each part."""
    return pair | {name: pair[name][:tokens] for name in PAIR_IDS}


class LayoutChoice:
    """Decides how the collator lays pairs out.

    `shared_prefix` is True, or the reason why batches are padded; `last_layer_in_part`, whether the last layer leaves
    out prompts; `pair_by_pair`, on a GPU, why attention is not one call over the row.
    """

    def __init__(self, machine: Machine, collator: PairCollator, compiler: LayerCompiler) -> None:
        self.machine, self.collator, self.compiler = machine, collator, compiler
        self.shared_prefix: bool | str = "not chosen"
        self.last_layer_in_part = False
        self.pair_by_pair: str | None = None
        self._left_out: dict[torch.nn.Module, LeftOut] = {}  # what last layers leave out

    @freed_memory_returned()
    def choose(self, wish: str, pairs: Dataset, auxiliary: bool) -> None:
        """Decides the layout for --engine.

        The policy, and a reference that is a model of its own, must score the longest pair and one of middle length
        alike in both layouts.

        Args:
            wish: what --engine asks for.
            pairs: those that are trained on.
            auxiliary: whether a load-balancing loss counts tokens.

        Raises:
            UserError: shared_prefix was asked for and the model does not compute it exactly.
        """
        order = longest_first(read_numbers(pairs, LENGTH))
        examples = [pairs[int(index)] for index in dict.fromkeys((order[0], order[len(order) // 2]))]
        brief = shortened(examples[-1], most_of_trial(self.machine.policy, rows=2, head=True))
        self.machine.choose_head(self.collator.whole([brief]))
        self._choose(wish, examples, auxiliary)
        self.compiler.compile(self.collator.whole([brief]), self._left_out)
        self._choose_kernel(brief, examples)

    def describe(self) -> dict[str, Any]:
        """What of it can change log-probs."""
        layout = {
            "shared_prefix": self.shared_prefix,
            "flex": self.collator.flex,
            "last_layer": self.last_layer_in_part,
        }
        return layout | ({"compiled": True} if self.compiler.is_asked_for else {})

    def limit_tokens(self, most: int, *datasets: Dataset | None) -> None:
        """Makes micro-batches of at most `most` tokens, once the layout is chosen.

        Raises:
            UserError: a pair of the data sets alone has more.
        """
        longest = max(size for rows in datasets if rows for size in self.collator.token_counts(rows))
        if longest > most:
            raise UserError(
                f"--max_tokens_per_batch is {most}, but the longest pair alone takes {longest} tokens "
                f"({'prompt, chosen and rejected' if self.collator.packs else 'two padded rows'}): "
                f"raise it to {longest}, or lower --max_length"
            )
        self.collator.max_tokens = most

    def _choose(self, wish: str, examples: list[dict[str, Any]], auxiliary: bool) -> None:
        if wish == "padded":
            self.shared_prefix = "padded batches were asked for"
            return
        args, collator = self.machine.args, self.collator
        collator.flex = next(self.machine.policy.parameters()).device.type == "cuda"  # else it cannot be proven
        if args.device.type == "cpu" and args.bf16 and not auxiliary:
            collator.multiple = ROW_MULTIPLE
        collator.keeps = args.gradient_checkpointing and not self.compiler.is_asked_for
        mismatch = self._find_mismatch_of_layout(examples)
        if mismatch is not None and collator.flex:
            self.pair_by_pair = mismatch
            collator.flex = False
            mismatch = self._find_mismatch_of_layout(examples)
        if mismatch is not None and wish == "shared_prefix":
            raise UserError(f"--engine shared_prefix: this model cannot use it: {mismatch}; pass auto or padded")
        self.shared_prefix = mismatch or True
        collator.packs = mismatch is None

    def device_to_come(self) -> torch.device | None:
        """The GPU that will compute, where the weights are not there yet: before they are sharded."""
        own = self.machine.args.device
        return own if own.type == "cuda" and next(self.machine.policy.parameters()).device.type != "cuda" else None

    def _choose_kernel(self, brief: dict[str, Any], examples: list[dict[str, Any]]) -> None:
        """Chooses FlexAttention for a device that the models come to later, if it computes there what they ask for.

        A brief pair shows what that is; it is computed for a row of the examples.
        """
        device, trial = self.device_to_come(), self.machine.trial()
        if device is None or not self.collator.packs:
            return
        most = most_of_trial(self.machine.policy, rows=2)
        row = self.collator.packed([shortened(pair, most) for pair in examples])["layout"]
        batch = self.collator.packed([brief])
        try:
            calls = set().union(*(attention_calls(model, batch, trial) for model in self.machine.models()))
            fault = find_fault_of_kernel(calls, row.lengths, device, trial)
        except Exception as error:
            if ran_out_of_memory(error):
                raise
            fault = describe_error(error)  # of a process that holds no weights yet
        self.pair_by_pair = self.machine.agree(fault)
        self.collator.flex = self.pair_by_pair is None

    def _find_mismatch_of_layout(self, examples: list[dict[str, Any]]) -> str | None:
        """Tries the layout with a last layer that leaves out prompts, then with a whole one; None when either does.

        Sets `last_layer_in_part`.
        """
        left_out = list(filter(None, map(leave_out_prompts, self.machine.models())))
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
        collator, trial, policy = self.collator, self.machine.trial(), self.machine.policy

        def prove(find: Callable[..., str | None], model: torch.nn.Module, pairs: list[dict[str, Any]]) -> str | None:
            return find(model, collator.packed(pairs), collator.whole(pairs), trial)

        found = (prove(find_mismatch, model, examples) for model in self.machine.models())
        mismatch = next(filter(None, found), None)
        if mismatch is None and any(parameter.requires_grad for parameter in policy.parameters()):
            brief = shortened(examples[-1], most_of_trial(policy, rows=2))
            mismatch = prove(find_gradient_mismatch, policy, [brief])
        return self.machine.agree(mismatch)
