"""Running out of memory in mid-run: the work is done again in smaller parts, with the same result.

Memory that runs out in a backward pass leaves part of a gradient behind. The optimizer step is then begun anew: its
gradients are dropped, and all its pairs computed again in micro-batches of at most half the tokens of the one that did
not fit. Every pair weighs the same in whichever micro-batch it falls, so the gradient is the same.

Several processes that hold whole copies of the weights (DDP) exchange gradients during the backward pass of the last
micro-batch, and none could begin anew alone once that has begun. A micro-batch larger than any before is therefore
computed apart from the exchange, which follows when all processes have agreed that theirs is done. Where the weights
themselves are divided among processes, each forward pass is an exchange, and the run ends.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed import any_of, gather, most_of, sum_of
from ..engine.memory import LESS_MEMORY, ran_out_of_memory, release_memory
from ..engine.scoring import tokens_of
from ..errors import LocalError, UserError
from ..run.checkpoints import find_checkpoints
from .batches import ROWS, PairCollator, count_pairs, examples_of, fill_batches, parts_of, uncounted
from .machine import Machine
from .tally import StepTally

MICRO_BATCHES = "micro_batches"  # the key in run.json of how large they are


Compute = Callable[[torch.nn.Module, Mapping[str, Any], Any], Tensor]


class MicroBatches:
    """Computes optimizer steps in micro-batches, in smaller ones where memory runs out.

    `compute(model, micro-batch, items of the step)` is its forward and backward pass and returns its share of the loss.
    `sorting` names losses that sort the pairs of a micro-batch, which therefore cannot be divided.
    """

    def __init__(
        self,
        machine: Machine,
        tally: StepTally,
        collator: PairCollator,
        compute: Compute,
        sorting: Sequence[str] = (),
    ) -> None:
        self.machine, self.tally, self.collator, self.compute, self.sorting = machine, tally, collator, compute, sorting
        self.most_tokens: int | None = None  # of a micro-batch in this process, since memory ran out
        self._proven = 0  # tokens of the largest micro-batch that fitted
        self._step: list[Mapping[str, Any]] = []  # the batches of the optimizer step, as far as it is computed
        self._counts: dict[str, Any] = {}  # what was counted as it began
        self._repeated_alone = False  # a pair that did not fit
        self._part: Mapping[str, Any] = {}  # the micro-batch at hand
        self._in_exchange = False  # whether it is the one with which processes exchange gradients

    def divide(self, inputs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """A batch as micro-batches, within the tokens that memory has been found to hold."""
        parts = parts_of(inputs)
        if self.most_tokens is None or max(tokens_of(part)[0] for part in parts) <= self.most_tokens:
            return parts
        collator, examples = self.collator, examples_of(inputs)
        sizes = [collator.tokens_of_example(example) for example in examples]
        groups = fill_batches(sizes, self.most_tokens, padded=not collator.packs)
        return [collator.whole([examples[index] for index in group]) for group in groups]

    def take(self, model: torch.nn.Module, inputs: Mapping[str, Any], items: Any) -> Tensor:
        """Forward and backward of a batch: one of those that make an optimizer step, the last one when gradients are
        exchanged. Returns its share of the loss.

        Raises:
            UserError: a pair alone does not fit, or the step cannot be begun anew.
        """
        accelerator = self.machine.accelerator
        if not self._step:
            self._counts, self._repeated_alone = self.tally.read(), False
        self._step.append(inputs)
        exchanges = accelerator.sync_gradients
        replicas = self.machine.args.world_size > 1 and not self.machine.is_sharded
        if replicas and exchanges and self._any_process_has_news(inputs):
            with accelerator.no_sync(model):
                loss = _agreed(lambda: self._computed(model, inputs, items, apart=True))
            self._exchange_gradients()
        else:
            loss = self._computed(model, inputs, items, apart=not (replicas and exchanges))
        if exchanges:
            self._step = []
        return loss

    def _computed(self, model: torch.nn.Module, inputs: Mapping[str, Any], items: Any, apart: bool) -> Tensor:
        """The same. `apart`: no exchange of gradients with other processes is part of it."""
        batches = [inputs]
        while True:
            try:
                return self._forward_and_backward(model, batches, items)
            except Exception as error:
                if not ran_out_of_memory(error):
                    raise
                if self.machine.is_sharded or (self._in_exchange and not apart):
                    raise self._end_of_run("which cannot be repeated while other processes wait for it") from None
            # Here, not above: the exception held everything that was computed.
            self._make_room()
            batches = self._step

    def _forward_and_backward(self, model: torch.nn.Module, batches: list[Mapping[str, Any]], items: Any) -> Tensor:
        parts = [self._in_step(self.divide(batch)) for batch in batches]
        count = sum(map(len, parts))
        losses = []
        for number, part in enumerate((part for of_batch in parts for part in of_batch), 1):
            self._part, self._in_exchange = part, number == count
            # Processes exchange their gradients once, with the last micro-batch.
            with self.machine.accelerator.no_sync(model) if number < count else contextlib.nullcontext():
                losses.append(self.compute(model, part, items))
            self._proven = max(self._proven, tokens_of(part)[0])
        return torch.stack(losses[-len(parts[-1]) :]).sum()

    def _in_step(self, parts: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Sharded models compute in step: where another process has more micro-batches, the first comes once more,
        to count for nothing."""
        if not (self.collator.max_tokens and self.machine.is_sharded):
            return parts
        return [*parts, *[uncounted(parts[0])] * (most_of(len(parts)) - len(parts))]

    def _make_room(self) -> None:
        """Begins the optimizer step anew, in smaller micro-batches.

        Raises:
            LocalError: it was a pair alone, for the second time.
        """
        tokens, pairs = tokens_of(self._part)[0], count_pairs(self._part)
        if pairs == 1 and self._repeated_alone:
            raise self._end_of_run("and a single pair cannot be divided")
        if pairs > 1 and self.sorting:
            raise self._end_of_run(
                f"which --loss_type {self.sorting[0]} sorts, so that dividing it would change the loss"
            )
        self.machine.policy.zero_grad(set_to_none=True)
        release_memory()
        self.tally.write(self._counts)
        if pairs == 1:  # once more, now that memory is in order
            self._repeated_alone = True
            return
        sizes = [self.collator.tokens_of_example(example) for example in examples_of(self._part)]
        # Half of the pairs' own tokens: what fills a row up is not divided.
        self.most_tokens = max(min(tokens, sum(sizes)) // 2, max(sizes))
        self._proven = min(self._proven, self.most_tokens)
        self.machine.warn(
            f"{where(self.machine)}: memory ran out in a micro-batch of {tokens:,} tokens ({pairs} pairs). The step "
            f"was computed again in micro-batches of at most {self.most_tokens:,} tokens, which gives the same "
            "gradient; that limit holds for the rest of the run"
        )
        record, step = self.machine.record, self.machine.state.global_step + 1
        before = record.content.get(MICRO_BATCHES, {}).get("lowered", [])
        lowered = [*before, {"step": step, "max_tokens_per_batch": self.most_tokens}]
        record.update(**{MICRO_BATCHES: {"max_tokens_per_batch": self.most_tokens, "lowered": lowered}})

    def _end_of_run(self, why: str) -> LocalError:
        """What to say when memory ran out for good in the micro-batch at hand."""
        tokens, pairs = tokens_of(self._part)[0], count_pairs(self._part)
        places = [self.machine.place(row) for row in (self._part.get(ROWS) or [])[:3]]
        named = f" ({', '.join(places)}{', ...' if pairs > len(places) else ''})" if places else ""
        what = "a pair" if pairs == 1 else f"a micro-batch of {pairs} pairs"
        smaller = f"--max_tokens_per_batch {tokens // 2}, " if pairs > 1 and "sorts" not in why else ""
        return LocalError(
            f"{where(self.machine)}: memory ran out with {what} of {tokens:,} tokens{named}, {why}. That step was not "
            f"taken; {last_saved(self.machine)}. What helps: {smaller}{LESS_MEMORY}"
        )

    def _any_process_has_news(self, inputs: Mapping[str, Any]) -> bool:
        """Whether in any process the micro-batches of a step are larger than what is known to fit."""
        return any_of(max(tokens_of(part)[0] for part in self.divide(inputs)) > self._proven)

    def _exchange_gradients(self) -> None:
        """Makes each gradient the mean over all processes, as the backward pass of DDP does."""
        trained = [parameter for parameter in self.machine.policy.parameters() if parameter.requires_grad]
        has_one = gather([parameter.grad is not None for parameter in trained])
        for parameter, *anywhere in zip(trained, *has_one, strict=True):
            if any(anywhere):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                sum_of(parameter.grad.div_(self.machine.args.world_size))


def _agreed(compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` gives, when it has succeeded in every process.

    Raises:
        UserError: in all processes, when it has failed in one.
    """
    loss, fault = None, None
    try:
        loss = compute()
    except LocalError as error:
        fault = str(error)
    found = [text for text in gather(fault) if text is not None]
    if found:
        raise UserError(*found)
    assert loss is not None
    return loss


def where(machine: Machine) -> str:
    """The step that is computed, and the process where there are several."""
    process = f", process {machine.args.process_index}" if machine.args.world_size > 1 else ""
    return f"step {machine.state.global_step + 1}{process}"


def last_saved(machine: Machine) -> str:
    """The checkpoint that a run which ends now leaves."""
    checkpoints = find_checkpoints(Path(machine.args.output_dir))
    return f"the newest checkpoint, {checkpoints[-1]}, is intact" if checkpoints else "no checkpoint was saved yet"


def let_it_begin_anew(optimizer: torch.optim.Optimizer, machine: Machine) -> None:
    """Lets an optimizer step that ran out of memory before it changed anything be taken again; once is enough."""
    if machine.is_sharded or hasattr(optimizer, "_begins_anew"):
        return
    take = optimizer.step

    def step(_optimizer: torch.optim.Optimizer, closure: Any = None) -> Any:
        known, before = set(optimizer.state), _versions(optimizer)
        try:
            return take(closure)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
        for parameter in [parameter for parameter in optimizer.state if parameter not in known]:
            del optimizer.state[parameter]  # made in this step, and not whole
        if _versions(optimizer) == before:
            release_memory()
            try:
                return take(closure)
            except Exception as error:
                if not ran_out_of_memory(error):
                    raise
        raise LocalError(
            f"{where(machine)}: memory ran out in the optimizer step, where smaller micro-batches do not "
            f"help; {last_saved(machine)}. What helps: --use_lora, an optimizer with a smaller state (--optim "
            "adafactor), or a device with more memory"
        )

    vars(optimizer).update(step=types.MethodType(step, optimizer), _begins_anew=True)


def _versions(optimizer: torch.optim.Optimizer) -> list[Any]:
    """How often each tensor that an optimizer changes was changed so far, and its numbers."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = [value for parameter in parameters for value in optimizer.state.get(parameter, {}).values()]
    return [value._version if isinstance(value, Tensor) else value for value in (*parameters, *states)]
